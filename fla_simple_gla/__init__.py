"""Simple Gated Linear Attention (Simple GLA): one scalar gate per head and token.

For each sequence and head, with queries and keys of dimension K and values of dimension V::

    S_t = exp(g_t) S_{t-1} + k_t v_t^T          S: [K, V], fp32
    o_t = scale * S_t^T q_t

Each function computes this, in another way:

- `chunk_simple_gla`: chunk by chunk, in segments that run at once; for training and for reading prompts
- `fused_chunk_simple_gla`: chunk by chunk, in one sweep over each sequence, whose bits do not depend on the batch
- `fused_recurrent_simple_gla`: token by token; for decoding
- `parallel_simple_gla`: as attention without a softmax; for short sequences and for the attention map
- `naive_recurrent_simple_gla`, `naive_chunk_simple_gla`, `naive_parallel_simple_gla`: the specification in plain
  PyTorch
"""

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
