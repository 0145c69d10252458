"""How a batch is cut into blocks of tokens, be its sequences rows of equal length or packed one after the other.

The bounds of packed sequences are on the device, and the host has not looked at them. So kernels take them for whatever
they are: a bound is moved into the batch, and a sequence that would end before it begins is empty. No content of
`cu_seqlens` then leads a kernel out of a tensor. Two stretches of a packed batch are no sequences: the tokens before
the first one have number -1, and those after the last one number N. They get zeros.

A kernel that runs on blocks of `BT` tokens needs to know whose a block is. Number n gets the blocks from
`bos // BT + n + 1` on. These are always enough for its tokens, and `T // BT + N + 2` in all is a bound that the host
knows. Each number has at least one block, be it empty, and some blocks stay empty.

A block belongs to a number whose blocks begin at it or before it, where those of the next number begin after it. If
bounds never decrease, there is one such number, and its blocks are all its own. If they decrease, there may be several,
and a search finds one of them. Every token is then still in some block: the search for a later block finds no earlier
number, and the first block that it finds of a number begins no later than the block before it ends. But sequences may
share tokens and blocks. Their results are then finite numbers without meaning. What one kernel leaves for a block may
belong to another sequence than the one that reads it, or not be there at all. So a kernel that runs on sequences, or on
blocks of another size, asks whose a block is (`number_of`) before it relies on it.
"""

import torch

from ._triton import jit, tl


@jit
def is_sequence(i_n, N):
    """Whether number i_n is a sequence, and not the tokens before or after all of them."""
    return (i_n >= 0) & (i_n < N)


@jit
def in_batch(bound, T):
    """A bound of any integer type, moved into 0..T."""
    return tl.minimum(tl.maximum(bound, 0), T).to(tl.int32)


@jit
def sequence_bounds(cu_seqlens, i_n, N, T):
    """First token of number i_n, from -1 to N, and the one after its last."""
    bos = in_batch(tl.load(cu_seqlens + i_n, mask=i_n >= 0, other=0), T)
    eos = in_batch(tl.load(cu_seqlens + i_n + 1, mask=i_n < N, other=T), T)
    return bos, tl.maximum(bos, eos)


@jit
def state_slot(indices, i_n, N, P):
    """The slot of the state of number i_n: in a pool of P slots by its index, or -1 where that names none; else i_n."""
    if indices is None:
        return i_n.to(tl.int64)
    else:
        i_p = tl.load(indices + i_n, mask=is_sequence(i_n, N), other=-1)
        return tl.where((i_p >= 0) & (i_p < P), i_p, -1).to(tl.int64)


@jit
def first_block(cu_seqlens, i_n, bos, T, BT):
    """The first block of number i_n, whose first token is bos."""
    if cu_seqlens is None:
        return i_n * tl.cdiv(T, BT)
    else:
        return bos // BT + i_n + 1


@jit
def number_of(cu_seqlens, i_s, N, T, BT):
    """The number that block i_s of packed sequences belongs to."""
    lo = -1
    hi = N
    while lo < hi:
        mid = (lo + hi + 1) // 2
        if first_block(cu_seqlens, mid, in_batch(tl.load(cu_seqlens + mid), T), T, BT) <= i_s:
            lo = mid
        else:
            hi = mid - 1
    return lo


@jit
def block_bounds(cu_seqlens, i_s, N, T, BT):
    """Of block i_s: its row of the batch and its number; its first token and the one after its last; those of the
    number.

    first >= end in an empty block, and first >= bos in any.
    """
    if cu_seqlens is None:
        NT = tl.cdiv(T, BT)
        first = i_s % NT * BT
        return (i_s // NT).to(tl.int64), i_s // NT, first, tl.minimum(first + BT, T), 0, T
    else:
        i_n = number_of(cu_seqlens, i_s, N, T, BT)
        bos, eos = sequence_bounds(cu_seqlens, i_n, N, T)
        first = bos + (i_s - first_block(cu_seqlens, i_n, bos, T, BT)) * BT
        return (i_n * 0).to(tl.int64), i_n, first, tl.minimum(first + BT, eos), bos, eos


def count_sequences(B: int, cu_seqlens: torch.Tensor | None) -> int:
    return B if cu_seqlens is None else cu_seqlens.shape[0] - 1


def count_numbers(B: int, cu_seqlens: torch.Tensor | None) -> int:
    """Sequences; of packed ones also the tokens before and after all of them."""
    return B if cu_seqlens is None else cu_seqlens.shape[0] + 1


def count_blocks(B: int, T: int, BT: int, cu_seqlens: torch.Tensor | None) -> int:
    """Blocks of BT tokens in a batch; of packed sequences a bound, with the tokens before and after all of them."""
    return B * -(-T // BT) if cu_seqlens is None else T // BT + cu_seqlens.shape[0] + 1
