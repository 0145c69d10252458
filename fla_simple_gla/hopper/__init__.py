"""The kernels for Hopper (sm_90), in Gluon: which of them take a call, and why not.

    sweep.py       o, and dq          K and V up to 128
    gradients.py   dk and dv at once  likewise; dq too of heads that share q and k and are taken in pairs
    wide.py        o, dq, dk and dv   K and V up to 512, one of them or both over 128
    attention.py   of `parallel`      K and V up to 128
    common.py      what they share

Nothing here imports Gluon before a call is taken: it changes between versions of triton (`_triton.py`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from .._layout import cdiv, is_hopper
from .._triton import switched_off, warn_once, why_not

CHUNK_TOKENS = 64  # of a chunk of the sweeps
BLOCK_TOKENS = 128  # of a block of rows of the attention
# Programs share tasks where they would take so much longer without. Less is no gain: heads that run side by side read
# memory side by side, and programs that share are at different tokens. With 3% to gain, the sweeps for o, dq, dk and dv
# took 0.371, 0.517, 0.635 and 0.369 ms in place of 0.346, 0.450, 0.548 and 0.343 (B8 T2048 H32 D256, H200).
LEAST_GAIN = 0.2


def is_shared(tasks: int, programs: int) -> bool:
    """Whether so many programs share tasks of equal length."""
    return tasks > programs and cdiv(tasks, programs) > (1 + LEAST_GAIN) * tasks / programs


class Sweeps(NamedTuple):
    """The sweeps for states of some size."""

    sweep: Callable
    gradients: Callable | None  # dk and dv at once; None where they are sweeps of their own
    pairs: bool  # whether tasks are two heads that share q and k: then `gradients` makes dq too, one of each two
    programs: float  # of a sweep for each head, half of one where two can be a task
    microseconds: float  # of a chunk of a program that does not wait for memory (H200)
    anchor_size: Callable[[int, int], int]  # numbers of an anchor of a state [K, V]


def why_no_sweeps(K: int, V: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the sweeps for Hopper do not take states of these dims; None where they do. The device is a GPU."""
    if not is_hopper(device):
        return 'the GPU is no Hopper'
    if switched_off('FLA_SIMPLE_GLA_HOPPER'):
        return 'FLA_SIMPLE_GLA_HOPPER=0 is in the environment'
    if dtype.itemsize != 2:
        return 'they take bf16 and fp16'
    if K % 8 or V % 8:
        return 'they take K and V that are multiples of 8'
    for feature in ('hopper', 'wide') if max(K, V) > 128 else ('hopper',):
        reason = why_not(feature)
        if reason is not None:
            warn_once(feature)
            return reason
    return None


@functools.cache
def sweeps_of(K: int, V: int, dtype: torch.dtype, device: torch.device, sharing: int = 1) -> Sweeps | None:
    """The sweeps for Hopper of such states, if there are any, where so many heads share q and k."""
    if why_no_sweeps(K, V, dtype, device) is not None:
        return None
    if max(K, V) <= 128:
        from . import common, gradients, sweep

        # These two do not depend on what is shared: the segments, which follow from them, and with them the bits of the
        # forward, must not.
        programs = 0.5 if common.is_paired(K, V, 2) else 1.0
        microseconds = 1.9 if programs < 1 else 1.0 if max(K, V) <= 64 else 1.45
        pairs = common.is_paired(K, V, sharing)
        return Sweeps(sweep.sweep, gradients.sweep, pairs, programs, microseconds, sweep.anchor_size)
    from . import wide

    shape = wide.cut(K, V)
    programs = float(shape.blocks * shape.parts)
    return Sweeps(wide.sweep, None, False, programs, wide.MICROSECONDS[shape.rows], wide.anchor_size)


def sweeps_for(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: torch.Tensor) -> Sweeps | None:
    """The sweeps for Hopper, if they take these tensors."""
    sweeps = sweeps_of(q.shape[-1], v.shape[-1], q.dtype, q.device, v.shape[2] // q.shape[2])
    return sweeps if sweeps is not None and takes(q, k, v, *others) else None


def attention_for(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable | None:
    """`attend` for Hopper, if it takes these tensors."""
    if max(q.shape[-1], v.shape[-1]) > 128 or sweeps_for(q, k, v) is None:
        return None
    from .attention import attend

    return attend


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the kernels can read these tensors of one dtype in place."""
    return takes_layouts(*[(x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in tensors])


@functools.lru_cache(1024)
def takes_layouts(*layouts: tuple[torch.dtype, torch.Size, tuple[int, ...], int]) -> bool:
    # What the kernels write is contiguous. Its rows, too, must be aligned to 16 bytes.
    return all(
        dtype.itemsize == 2
        and shape[-1] <= 512
        and shape[-1] % 8 == 0
        and shape.numel() > 0
        and offset == 0
        and all(size == 1 or stride > 0 and stride % 8 == 0 for stride, size in zip(strides[:3], shape))
        for dtype, shape, strides, offset in layouts
    )


def as_taken(do: torch.Tensor, taken: bool) -> torch.Tensor:
    """`do` as the kernels can read it, if they took the call: itself, or a contiguous copy. The plain kernels would
    read it in place, but take twice as long.

    A mean over tokens has a gradient with a stride of 0 along T.
    """
    if not taken or do.is_contiguous() and do.data_ptr() % 16 == 0 or takes(do):
        return do
    return do.clone(memory_format=torch.contiguous_format)
