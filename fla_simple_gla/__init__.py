"""Simple Gated Linear Attention: one scalar gate per head and token, trained like a Transformer, run like an RNN."""

from .chunk import chunk_simple_gla
from .fused_chunk import fused_chunk_simple_gla
from .fused_recurrent import fused_recurrent_simple_gla
from .naive import naive_chunk_simple_gla, naive_parallel_simple_gla, naive_recurrent_simple_gla
from .parallel import parallel_simple_gla

__all__ = [
    'chunk_simple_gla',
    'fused_chunk_simple_gla',
    'fused_recurrent_simple_gla',
    'naive_chunk_simple_gla',
    'naive_parallel_simple_gla',
    'naive_recurrent_simple_gla',
    'parallel_simple_gla',
]

__version__ = '0.1.0'
