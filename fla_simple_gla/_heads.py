"""Adds up the gradients of q and k over the heads that share them.

A sweep leaves dq or dk once for each head of v, or for each two. They are added up right after the sweep, so that the
memory of one is free before the next takes its own: with many heads they are as large as v.
"""

import torch

from ._launch import launcher
from ._layout import cdiv, next_power_of_2
from ._passes import empty
from ._triton import jit, kernel_name, tl

# Numbers of the sum to a program. A thread has 8 of them: in 16 bits, one load of 16 bytes for each head.
NUMBERS = 1024
# Heads to a turn of the loop, so that a thread has several loads on their way. Microseconds for K 128 in bf16 on one
# H200, at 16,384 tokens of 40 and of 8 heads: 42 and 7 with 4 or 8 heads to a turn, 47 and 12 with 16. torch.sum takes
# 45 and 12. Programs of 512 numbers are as fast, those of 2048 take 45 and 7, those of 4096 45 and 8.
UNROLL = 8


@jit(do_not_specialize=['R', 'P'], repr=kernel_name('sum_heads'))
def sum_heads_kernel(
    dx,  # [R, P, K]
    total,  # [R, K]
    R, P,
    K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """`total[r] = sum_p dx[r, p]`, in fp32 and in the order of p."""
    o_r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
    o_k = tl.arange(0, BK)[None, :]
    mask = (o_r < R) & (o_k < K)
    p_x = dx + o_r * (P * K) + o_k
    b = tl.zeros([BR, BK], tl.float32)
    for _ in tl.range(P, loop_unroll_factor=UNROLL):
        b += tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
        p_x += K
    tl.store(total + o_r * K + o_k, b.to(total.dtype.element_ty), mask=mask)


@launcher
def launch_sum(tensors):
    dx, total = tensors
    K = dx.shape[3]
    rows = total.numel() // K
    BK = next_power_of_2(K)
    BR = max(1, NUMBERS // BK)
    constants = dict(K=K, BR=BR, BK=BK, UNROLL=UNROLL, num_warps=4)
    return sum_heads_kernel, (cdiv(rows, BR), 1, 1), (dx, total, rows, dx.shape[2] // total.shape[2]), constants


def sum_heads(dx: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of x, which several heads read, from one for each of the heads, `[B, T, heads, K]`, contiguous."""
    if dx.shape[2] == x.shape[2]:
        return dx
    total = empty(dx, *x.shape)
    if total.numel():
        launch_sum((dx, total))
    return total
