"""How a batch is cut into blocks of tokens, be its sequences rows of equal length or packed one behind the other.

A kernel that runs on blocks of `BT` tokens needs to know which block is whose, and the boundaries of packed sequences are on the
device. So sequence n gets the slots from `cu_seqlens[n] // BT + n` on: always enough for its blocks, and `T // BT + N + 1` in all is
a bound that the host knows. Each sequence has at least one slot, an empty one too; some more stay empty. The tokens behind the last
sequence count as one more.
"""

import torch

from ._triton import jit, tl


@jit
def sequence_bounds(cu_seqlens, i_n, N, T):
    """First token of sequence i_n and the one after its last; sequence N is what lies behind the others."""
    bos = tl.load(cu_seqlens + i_n).to(tl.int32)
    eos = tl.load(cu_seqlens + i_n + 1, mask=i_n < N, other=T).to(tl.int32)
    return bos, eos


@jit
def state_slot(indices, i_n, N):
    """Where the state of sequence i_n lies among others; -1 where it has none, in a pool."""
    if indices is None:
        return i_n.to(tl.int64)
    else:
        return tl.load(indices + i_n, mask=i_n < N, other=-1).to(tl.int64)


@jit
def first_slot(cu_seqlens, i_n, bos, T, BT):
    """Where the slots of sequence i_n begin, whose first token is bos."""
    if cu_seqlens is None:
        return i_n * tl.cdiv(T, BT)
    else:
        return bos // BT + i_n


@jit
def block_bounds(cu_seqlens, i_s, N, T, BT):
    """Of slot i_s: its row of the batch, its sequence, its first token and the one after its last, and those of the sequence.

    first >= end in an empty slot.
    """
    if cu_seqlens is None:
        NT = tl.cdiv(T, BT)
        first = i_s % NT * BT
        return (i_s // NT).to(tl.int64), i_s // NT, first, tl.minimum(first + BT, T), 0, T
    else:
        lo = 0
        hi = N
        while lo < hi:
            mid = (lo + hi + 1) // 2
            if tl.load(cu_seqlens + mid).to(tl.int32) // BT + mid <= i_s:
                lo = mid
            else:
                hi = mid - 1
        bos, eos = sequence_bounds(cu_seqlens, lo, N, T)
        first = bos + (i_s - bos // BT - lo) * BT
        return (lo * 0).to(tl.int64), lo, first, tl.minimum(first + BT, eos), bos, eos


def count_sequences(B: int, cu_seqlens: torch.Tensor | None) -> int:
    return B if cu_seqlens is None else cu_seqlens.shape[0] - 1


def count_slots(B: int, T: int, BT: int, cu_seqlens: torch.Tensor | None) -> int:
    """Blocks of BT tokens in a batch, or a bound on them, the tokens behind the last sequence included."""
    return B * -(-T // BT) if cu_seqlens is None else T // BT + cu_seqlens.shape[0]
