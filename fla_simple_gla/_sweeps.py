"""What a sweep is given: a plain one (`fused_chunk.py`) or one for Hopper (`hopper/`), over sequences or segments."""

from typing import NamedTuple

import torch

from ._blocks import count_blocks, count_numbers, count_sequences
from ._passes import empty
from ._plans import Inputs, Options


class Steps(NamedTuple):
    """What Mamba-2 adds to the operator (`adapters/_scan.py`). The values are x, each token's times its step size,
    `D x` is added to o, and o is gated by z. The sweeps of pairs of heads for Hopper take it, and read x itself.
    """

    dt: torch.Tensor  # [B, T, H] in fp32, not negative, and with the strides of the gates: those of one head contiguous
    D: torch.Tensor | None = None  # [H, V], any strides; for its gradient the same in all columns
    z: torch.Tensor | None = None  # [B, T, H, V], of packed sequences None
    y: torch.Tensor | None = None  # like z, contiguous: gets o silu(z)
    ddt: torch.Tensor | None = None  # like dt: gets its gradient, where that of the gates is needed
    dD: torch.Tensor | None = None  # [H, 8 * sequences or segments, or more], zeros: gets sums of v . do


class Operands(NamedTuple):
    """What a sweep reads, q, k, v and x in their roles, and where it leaves states."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: torch.Tensor | None  # the plain sweeps read their sums in chunks, those for Hopper the gates themselves
    state_in: torch.Tensor | None = None
    state_out: torch.Tensor | None = None
    x: torch.Tensor | None = None  # dg needs its products with the rows of the output
    anchors: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    steps: Steps | None = None


class Setting(NamedTuple):
    """How a sweep goes: all that a launch depends on beside the layouts of its tensors."""

    scale: float
    segment: int | None = None  # tokens of a segment; None where a sequence is swept in one piece
    BA: int = 1  # tokens of an anchor block
    reverse: bool = False
    precision: str | None = None  # of fp32 products, as `tl.dot` takes it
    role: str = 'o'  # what the sweep makes, which its kernel's name tells


class SweepConfig(NamedTuple):
    """How a plain sweep is cut: chunks of BT tokens; BV columns of V and `warps` to a program; loads `stages` chunks
    ahead; pieces of at most BK rows of the state. If TMA is False, rows are read by pointers even where TMA can read
    them.
    """

    BT: int
    BV: int
    warps: int
    stages: int
    BK: int = 512
    TMA: bool = True


def count_swept(B: int, T: int, segment: int | None, cu_seqlens: torch.Tensor | None) -> int:
    """How many sequences or segments a sweep goes over, with the tokens in no sequence, which get zeros."""
    return count_numbers(B, cu_seqlens) if segment is None else count_blocks(B, T, segment, cu_seqlens)


def final_states(inputs: Inputs, options: Options) -> torch.Tensor | None:
    """Where the final states go: with indices the pool; else a new tensor, if they are asked for."""
    q, _, v, _, pool, cu_seqlens, indices, _ = inputs
    if indices is not None:
        return pool
    if not options.output:
        return None
    return empty(q, count_sequences(q.shape[0], cu_seqlens), v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
