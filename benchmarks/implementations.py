"""What is timed: the modes of this library, those of fla-core, and PyTorch's attention."""

import contextlib
import dataclasses
import functools
import importlib
import math
import sys
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import fla_simple_gla

from .measuring import short

MODES = ('chunk', 'fused_chunk', 'parallel')


@dataclasses.dataclass
class Implementation:
    name: str
    fn: Callable  # takes q, k, v, g; the first item that it returns is o
    note: str = ''
    is_gla: bool = True
    longest: float = math.inf  # the largest T that is timed: implementations with T^2 work are for short sequences
    context: Callable = contextlib.nullcontext  # is entered around the calls; the time of that does not count


def ours(modes: tuple[str, ...] = MODES) -> list[Implementation]:
    """The modes of this library."""
    longest = {'parallel': 4096}
    return [
        Implementation(mode, getattr(fla_simple_gla, f'{mode}_simple_gla'), longest=longest.get(mode, math.inf))
        for mode in modes
    ]


def fla() -> list[Implementation]:
    """fla-core's modes, which here also run with triton 3.4 to 3.7.0 on Hopper: there for timing only.

    fla-core refuses to, because these versions miscompile its backward.
    """
    try:
        import fla.ops.simple_gla as theirs

        # the refusal is an `if` in the backward of its chunk mode, which asks these flags of its module
        module = importlib.import_module('fla.ops.common.chunk_o')
        refuses = module.IS_NVIDIA_HOPPER and module.TRITON_ABOVE_3_4_0 and not module.TRITON_ABOVE_3_7_1
    except (ImportError, AttributeError) as error:
        sys.exit(f"--fla needs fla-core 0.6.0: pip install -e '.[bench]' ({short(error)})")
    if refuses:
        module.TRITON_ABOVE_3_7_1 = True
    return [
        Implementation('fla chunk', theirs.chunk_simple_gla, 'guard lifted' if refuses else ''),
        Implementation('fla fused_chunk', theirs.fused_chunk_simple_gla),
    ]


def attention(backends: tuple[str, ...] = ('cuDNN', 'flash')) -> list[Implementation]:
    """PyTorch's causal attention, on tensors with our layout."""

    def causal(q, k, v, g):
        o = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return (o.transpose(1, 2),)

    known = {'cuDNN': SDPBackend.CUDNN_ATTENTION, 'flash': SDPBackend.FLASH_ATTENTION}
    return [
        Implementation(
            f'{name} attention',
            causal,
            is_gla=False,
            longest=131072,
            context=functools.partial(sdpa_kernel, known[name]),
        )
        for name in backends
    ]


def refuses_tensors(error: Exception) -> bool:
    """Whether this is PyTorch's message where a backend of its attention does not take these tensors."""
    return 'No available kernel' in str(error) or 'No viable backend' in str(error)


class Nothing(torch.autograd.Function):
    """The time that PyTorch takes for itself: as many inputs, and nothing is computed."""

    @staticmethod
    def forward(ctx, q, k, v, g):
        ctx.save_for_backward(q, k, v, g)
        return v.detach(), None

    @staticmethod
    def backward(ctx, do, _):
        return ctx.saved_tensors
