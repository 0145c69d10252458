"""Simple GLA as attention without a softmax, over tiles of the decay-masked `q k^T`: quadratic, for short sequences.

    o_i = sum_{j<=i} A_ij v_j        A_ij = scale * D_ij (q_i . k_j)        D_ij = exp(g_{j+1} + ... + g_i)

A program owns one block of BT rows of one head and a tile of V columns, and goes over the blocks of columns. With c the
running sum of the gates in a block, c_end that of the whole block, and i in a later block than j,

    D_ij = exp(c_i) * exp(between + c_end - c_j)

where `between` is the sum over the blocks in between, a difference of two fp64 sums. The mask costs no exponential for
each pair, and nothing in it cancels. Where the product of the largest values of both factors is zero in fp32, so is
every decay of the tile. A program goes from the first tile to the last where that is not so.

The gradients are three more runs of the same kernel, with other tensors in the roles of q, k and v. A reverse run goes
over the blocks of columns after the rows, and D is transposed:

    role     q    k    v                 out
    forward  q    k    v                 o
    dq       do   v    k                 dq
    dk       v    do   q    reverse      dk
    dv       k    q    do   reverse      dv

On Hopper, 16-bit inputs go to the kernel of `hopper/attention.py`, in blocks of 128, if K and V are multiples of 8 up
to 128, TMA can read the rows, and the attention map is not wanted.

dg_t is the sum of A_ij (do_i . v_j) over the pairs with j < t <= i. With e the last token of t's block,

    dg_t = sum_{t<=s<=e} (q_s . dq_s - k_s . dk_s) + sum_{j<=e<i} A_ij (do_i . v_j)

The runs for dq and dk leave q . dq and k . dk. Both round the same products to the inputs' dtype, so that the first sum
has the rounding of fp32 only. The second sum is taken directly: before each tile of a block of rows, the run for dq
leaves the sum of its q . dq so far (`crossing`).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ._blocks import block_bounds, count_blocks, count_sequences, first_block, is_sequence, sequence_bounds
from ._gates import LOG2E, UNDERFLOW, chunk_gates
from ._heads import sum_heads
from ._launch import launcher
from ._layout import cdiv, is_hopper, load_rows, next_power_of_2, open_rows, sizes, store_rows, strides, use_descriptors
from ._mode import Mode
from ._passes import device_pass, empty, zeros
from ._plans import Gradients, Inputs, Options, Plan, Results
from ._triton import jit, kernel_name, tl
from ._validation import Call
from .hopper import BLOCK_TOKENS, as_taken, attention_for
from .naive import naive_parallel_simple_gla


@jit
def reaches(sums, scale, base, blocks, i_h, o_i, o_j, NT, H: tl.constexpr):
    """Whether block o_i comes after block o_j, and some decay from o_j to o_i is not zero in fp32."""
    p_i = sums + (base + o_i).to(tl.int64) * H + i_h
    p_j = sums + (base + o_j).to(tl.int64) * H + i_h
    later = tl.load(p_i + blocks * H, mask=o_i < NT, other=0.0).to(tl.float32)
    before = tl.load(p_i - H, mask=(o_i > 0) & (o_i < NT), other=0.0)
    earlier = (before - tl.load(p_j, mask=o_j < NT, other=0.0)).to(tl.float32)
    earlier += tl.load(p_j + 2 * blocks * H, mask=o_j < NT, other=0.0).to(tl.float32)
    return (tl.exp2(later) * scale * tl.exp2(earlier) != 0) & (o_j < o_i) & (o_i < NT)


@jit(do_not_specialize=['N', 'T', 'part', 'blocks', 'scale'], repr=kernel_name('block_sums'))
def block_sums_kernel(
    c,  # [1 or 2, blocks, H, BT]: running sums of the gates in blocks
    sums,  # [3, blocks, H], fp64: the gates up to a block's end; the largest c; the largest c_end - c
    ranges,  # [2, blocks, H]: the first block to reach this one, or itself; the one after the last it reaches; or None
    cu_seqlens,  # [N + 1] or None
    scale,
    N, T,
    part,  # blocks * H * BT
    blocks,
    H: tl.constexpr,
    BT: tl.constexpr,
    BI: tl.constexpr,
    TWO_PARTS: tl.constexpr,
):  # fmt: skip
    """The sums and ranges of the blocks of one head of one sequence, BI blocks at a time."""
    i_n, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    if cu_seqlens is None:
        bos = 0
        L = T
    else:
        bos, eos = sequence_bounds(cu_seqlens, i_n, N, T)
        L = eos - bos
    base = first_block(cu_seqlens, i_n, bos, T, BT)
    NT = tl.cdiv(L, BT)
    before = tl.zeros([], tl.float64)
    for i in range(0, NT, BI):
        o_i = i + tl.arange(0, BI)
        m_i = o_i < NT
        row = (base + o_i).to(tl.int64) * H + i_h
        p_c = c + row * BT
        b_end = tl.load(p_c + BT - 1, mask=m_i, other=0.0)
        p_c = p_c[:, None] + tl.arange(0, BT)[None, :]
        b_c = tl.load(p_c, mask=m_i[:, None], other=0.0)
        b_e = b_end[:, None] - b_c
        b_sum = b_end.to(tl.float64)
        if TWO_PARTS:
            f_end = tl.load(c + part + row * BT + BT - 1, mask=m_i, other=0.0)
            b_f = tl.load(p_c + part, mask=m_i[:, None], other=0.0)
            b_c += b_f
            b_e += f_end[:, None] - b_f
            b_sum += f_end.to(tl.float64)
        tl.store(sums + row, before + tl.cumsum(b_sum, 0), mask=m_i)
        tl.store(sums + blocks * H + row, tl.max(b_c, 1).to(tl.float64), mask=m_i)
        tl.store(sums + 2 * blocks * H + row, tl.max(b_e, 1).to(tl.float64), mask=m_i)
        before += tl.sum(b_sum, 0)

    if ranges is not None:
        # below, threads read what others have stored above
        tl.debug_barrier()
        for i in range(0, NT, BI):
            o_i = i + tl.arange(0, BI)
            lo = o_i
            for j in range(0, i + BI, BI):
                o_j = j + tl.arange(0, BI)
                alive = reaches(sums, scale, base, blocks, i_h, o_i[:, None], o_j[None, :], NT, H)
                lo = tl.minimum(lo, tl.min(tl.where(alive, o_j[None, :], NT), 1))
            hi = o_i + 1
            for j in range(i, NT, BI):
                o_j = j + tl.arange(0, BI)
                alive = reaches(sums, scale, base, blocks, i_h, o_j[None, :], o_i[:, None], NT, H)
                hi = tl.maximum(hi, tl.max(tl.where(alive, o_j[None, :] + 1, 0), 1))
            p_r = ranges + (base + o_i).to(tl.int64) * H + i_h
            tl.store(p_r, lo, mask=o_i < NT)
            tl.store(p_r + blocks * H, hi, mask=o_i < NT)


@jit
def products(
    b_q, r_q, q_t, r_k, k_t, L, i_q, i_k,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`q k^T` of the BT rows from i_q on with the BT columns from i_k on.

    If K is at most BK, b_q are the rows of q. Longer rows are read here, in steps of BK.
    """
    if K <= BK:
        b_p = tl.dot(b_q, tl.trans(load_rows(r_k, k_t, L, i_k, 0, K, BT, BK, TMA)), input_precision=P)
    else:
        b_p = tl.zeros([BT, BT], tl.float32)
        if K > 2 * BK and P is not None:
            # In fp32 the loop is not unrolled. If it were, the compiler would keep all rows of q in registers from tile
            # to tile, which takes 6 KB of stack to a thread (D 512, sm_80).
            for i in tl.range(0, K, BK, num_stages=1):
                b_qi = load_rows(r_q, q_t, L, i_q, i, K, BT, BK, TMA)
                b_ki = load_rows(r_k, k_t, L, i_k, i, K, BT, BK, TMA)
                b_p = tl.dot(b_qi, tl.trans(b_ki), b_p, input_precision=P)
        else:
            for i in tl.static_range(0, K, BK):
                b_q = load_rows(r_q, q_t, L, i_q, i, K, BT, BK, TMA)
                b_k = load_rows(r_k, k_t, L, i_k, i, K, BT, BK, TMA)
                b_p = tl.dot(b_q, tl.trans(b_k), b_p, input_precision=P)
    return b_p


@jit(do_not_specialize=['N', 'T', 'part', 'c_part', 'blocks', 'NB', 'scale'], repr=kernel_name('attention'))
def attention_kernel(
    q, k,  # [B, T, H // GQ, K], any strides with contiguous rows
    v,  # [B, T, H // GV, V], likewise
    c,  # [1 or 2, blocks, H, BT]: running sums of the gates in blocks, or None
    sums,  # [3, blocks, H]: of the gates over blocks, see block_sums_kernel
    o,  # [B, T, H, V]
    x,  # [B, T, H // GV, V], or None
    x_o,  # [NV, B, H, T]: rows x . o, over the V tile
    crossing,  # [NV, blocks, H, NB]: x . o summed over a block of rows, of the columns before block b; not in reverse
    attention,  # [B, H, T, T], or None
    cu_seqlens,  # [N + 1] or None
    scale,
    N, T,
    q_b, q_t, q_h,
    k_b, k_t, k_h,
    v_b, v_t, v_h,
    x_b, x_t, x_h,
    part,  # B * H * T
    c_part,  # blocks * H * BT
    blocks,
    NB,  # blocks in the longest sequence there can be
    ROLE: tl.constexpr,  # what the run makes: the kernel's name tells it
    H: tl.constexpr,
    GQ: tl.constexpr,
    GV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BI: tl.constexpr,
    REVERSE: tl.constexpr,
    TWO_PARTS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """o of one block of rows of one head, in BV columns of V."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_s = tl.program_id(0) // NV % blocks
    i_h = (tl.program_id(0) // NV // blocks).to(tl.int64)
    if not REVERSE:
        # the blocks with the most columns first
        i_s = blocks - 1 - i_s
    i_b, i_n, first, end, bos, eos = block_bounds(cu_seqlens, i_s, N, T, BT)
    if first >= end:
        return
    L = eos - bos
    i_r = (first - bos) // BT
    i_t = i_r * BT
    base = i_s - i_r
    i_f = bos + i_b * 0

    r_o = open_rows(o + ((i_b * T + i_f) * H + i_h) * V, H * V, L, V, BT, BV, TMA)
    if cu_seqlens is not None:
        # tokens in no sequence get zeros
        if ~is_sequence(i_n, N):
            store_rows(r_o, H * V, L, i_t, i_v * BV, tl.zeros([BT, BV], o.dtype.element_ty), V, BT, BV, TMA)
            return

    r_q = open_rows(q + i_b * q_b + i_f * q_t + i_h // GQ * q_h, q_t, L, K, BT, BK, TMA)
    r_k = open_rows(k + i_b * k_b + i_f * k_t + i_h // GQ * k_h, k_t, L, K, BT, BK, TMA)
    r_v = open_rows(v + i_b * v_b + i_f * v_t + i_h // GV * v_h, v_t, L, V, BT, BV, TMA)
    r = tl.arange(0, BT)
    b_q = load_rows(r_q, q_t, L, i_t, 0, K, BT, BK, TMA) if K <= BK else None
    if x is not None:
        r_x = open_rows(x + i_b * x_b + i_f * x_t + i_h // GV * x_h, x_t, L, V, BT, BV, TMA)
        b_x = load_rows(r_x, x_t, L, i_t, i_v * BV, V, BT, BV, TMA)
    if attention is not None:
        attention += (i_b * H + i_h) * T * T + (i_t + r).to(tl.int64)[:, None] * T + r[None, :]
    if crossing is not None:
        crossing += ((i_v * blocks + i_s).to(tl.int64) * H + i_h) * NB

    lo = i_r + 1 if REVERSE else i_r * 0
    hi = tl.cdiv(L, BT) if REVERSE else i_r
    if c is not None:
        c += (base.to(tl.int64) * H + i_h) * BT
        sums += base.to(tl.int64) * H + i_h
        p_c = c + i_r.to(tl.int64) * (H * BT)
        b_c = tl.load(p_c + r)
        b_e = tl.load(p_c + BT - 1) - b_c
        if TWO_PARTS:
            b_f = tl.load(p_c + c_part + r)
            b_e += tl.load(p_c + c_part + BT - 1) - b_f
        b_r = b_c + b_f if TWO_PARTS else b_c
        # the sum up to the start of the rows; in reverse up to their end
        if REVERSE:
            sum_r = tl.load(sums + i_r * H)
            largest_r = tl.load(sums + 2 * blocks * H + i_r * H).to(tl.float32)
        else:
            sum_r = tl.load(sums + (i_r - 1) * H, mask=i_r > 0, other=0.0)
            largest_r = tl.load(sums + blocks * H + i_r * H).to(tl.float32)
            b_r = tl.exp2(b_r) * scale

        # the first block of columns that reaches the rows, and the one after the last; in reverse, that the rows reach
        lo_alive = hi
        hi_alive = lo
        for i in range(lo, hi, BI):
            o_i = i + tl.arange(0, BI)
            m_i = o_i < hi
            if REVERSE:
                between = (tl.load(sums + (o_i - 1) * H, mask=m_i, other=sum_r) - sum_r).to(tl.float32)
                later = tl.load(sums + blocks * H + o_i * H, mask=m_i, other=0.0).to(tl.float32)
                earlier = between + largest_r
            else:
                between = (sum_r - tl.load(sums + o_i * H, mask=m_i, other=sum_r)).to(tl.float32)
                later = largest_r
                earlier = between + tl.load(sums + 2 * blocks * H + o_i * H, mask=m_i, other=0.0).to(tl.float32)
            alive = (tl.exp2(later) * scale * tl.exp2(earlier) != 0) & m_i
            lo_alive = tl.minimum(lo_alive, tl.min(tl.where(alive, o_i, hi)))
            hi_alive = tl.maximum(hi_alive, tl.max(tl.where(alive, o_i + 1, lo)))
        lo = lo_alive
        hi = hi_alive

    b_o = tl.zeros([BT, BV], tl.float32)
    for j in tl.range(0, hi - lo, num_stages=STAGES):
        i = lo + j
        b_v = load_rows(r_v, v_t, L, i * BT, i_v * BV, V, BT, BV, TMA)
        if TMA:
            # Reading b_o here makes Triton wait for the last product that was added to it. Otherwise Triton leaves that
            # product in flight, and ptxas then serialises every product of the loop (C7515; triton 3.6). At D 128 the
            # forward takes 0.23 ms without this line, and 0.19 with it.
            b_o = tl.inline_asm_elementwise('mov.b32 $0, $1;', '=r,r', [b_o], dtype=tl.float32, is_pure=True, pack=1)
        if crossing is not None:
            tl.store(crossing + i, tl.sum(b_x * b_o))
        b_p = products(b_q, r_q, q_t, r_k, k_t, L, i_t, i * BT, K, BT, BK, TMA, PRECISION)
        if c is not None:
            p_i = c + i.to(tl.int64) * (H * BT)
            b_i = tl.load(p_i + r)
            if TWO_PARTS:
                b_if = tl.load(p_i + c_part + r)
            if REVERSE:
                later = tl.exp2(b_i + b_if if TWO_PARTS else b_i) * scale
                earlier = tl.exp2((tl.load(sums + (i - 1) * H) - sum_r).to(tl.float32) + b_e)
                b_p *= earlier[:, None] * later[None, :]
            else:
                b_i = tl.load(p_i + BT - 1) - b_i
                if TWO_PARTS:
                    b_i += tl.load(p_i + c_part + BT - 1) - b_if
                earlier = tl.exp2((sum_r - tl.load(sums + i * H)).to(tl.float32) + b_i)
                b_p *= b_r[:, None] * earlier[None, :]
        else:
            b_p *= scale
        if attention is not None:
            tl.store(attention + i * BT, b_p, mask=(i_t + r < L)[:, None])
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)

    b_v = load_rows(r_v, v_t, L, i_t, i_v * BV, V, BT, BV, TMA)
    if crossing is not None:
        tl.store(crossing + i_r, tl.sum(b_x * b_o))
    before = (r[:, None] <= r[None, :]) if REVERSE else (r[:, None] >= r[None, :])
    b_p = products(b_q, r_q, q_t, r_k, k_t, L, i_t, i_t, K, BT, BK, TMA, PRECISION) * scale
    if c is not None:
        d = b_c[None, :] - b_c[:, None] if REVERSE else b_c[:, None] - b_c[None, :]
        if TWO_PARTS:
            d += b_f[None, :] - b_f[:, None] if REVERSE else b_f[:, None] - b_f[None, :]
        b_p *= tl.exp2(tl.where(before, d, float('-inf')))
    else:
        b_p = tl.where(before, b_p, 0.0)
    if attention is not None:
        tl.store(attention + i_t, b_p, mask=(i_t + r < L)[:, None] & (i_t + r < L)[None, :])
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)
    store_rows(r_o, H * V, L, i_t, i_v * BV, b_o.to(o.dtype.element_ty), V, BT, BV, TMA)
    if x is not None:
        x_o += i_v.to(tl.int64) * part + (i_b * H + i_h) * T + i_f + i_t
        tl.store(x_o + r, tl.sum(b_x * b_o, 1), mask=i_t + r < L)


@jit(do_not_specialize=['N', 'T', 'part', 'blocks', 'NB'], repr=kernel_name('attention_gate_gradient'))
def attention_gate_gradient_kernel(
    g, dg,  # [B, T, H], any strides; [B, T, H]
    w, z,  # [NK, B, H, T]: q . dq and k . dk, in NK parts
    crossing,  # [NC, blocks, H, NB]: w summed over a block of rows, of the columns before block b, in NC parts
    cu_seqlens,  # [N + 1] or None
    N, T,
    g_b, g_t, g_h,
    part,  # B * H * T
    blocks,
    NB,
    NK: tl.constexpr,
    NC: tl.constexpr,
    H: tl.constexpr,
    BT: tl.constexpr,
    BI: tl.constexpr,
):  # fmt: skip
    """dg of one head over one block."""
    i_s, i_h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    i_b, i_n, first, end, bos, eos = block_bounds(cu_seqlens, i_s, N, T, BT)
    read_end = tl.where(is_sequence(i_n, N), end, first)
    o_t = first + tl.arange(0, BT)
    m_t = o_t < read_end
    o_t = o_t.to(tl.int64)

    b_g = tl.load(g + i_b * g_b + o_t * g_t + i_h * g_h, mask=m_t, other=0.0).to(tl.float32) * LOG2E
    o_w = (i_b * H + i_h) * T + o_t
    # the pairs (i, j) with j up to the block's end and i after it
    i_next = (first - bos) // BT + 1
    rows = tl.cdiv(tl.where(is_sequence(i_n, N), eos, bos) - bos, BT)
    p_s = crossing + ((i_s - i_next + 1).to(tl.int64) * H + i_h) * NB + i_next
    b_s = tl.zeros([BI], tl.float32)
    b_w = tl.zeros([BT], tl.float32)
    for _ in tl.static_range(NK):
        b_w += tl.load(w + o_w, mask=m_t, other=0.0) - tl.load(z + o_w, mask=m_t, other=0.0)
        o_w += part
    for _ in tl.static_range(NC):
        for i in range(i_next, rows, BI):
            o_i = i + tl.arange(0, BI)
            b_s += tl.load(p_s + o_i.to(tl.int64) * (H * NB), mask=o_i < rows, other=0.0)
        p_s += blocks.to(tl.int64) * H * NB

    # No pair crosses a reset, so no sum does: what comes after the reset may be far larger, and so may its rounding.
    resets = tl.cumsum((b_g < UNDERFLOW).to(tl.int32), 0)
    r = tl.arange(0, BT)
    summed = (r[:, None] <= r[None, :]) & (resets[:, None] == resets[None, :])
    b_dg = tl.sum(tl.where(summed, b_w[None, :], 0.0), 1)
    b_dg += tl.where(resets == tl.max(resets), tl.sum(b_s), 0.0)
    # Nothing crosses a reset or the start of a sequence: the sums there are nothing but rounding.
    b_dg = tl.where((b_g < UNDERFLOW) | (o_t == bos), 0.0, b_dg)
    tl.store(dg + (i_b * T + o_t) * H + i_h, b_dg, mask=o_t < end)


class AttentionConfig(NamedTuple):
    """How a run is cut: blocks of BT rows and columns; K in steps of BK; BV columns of V and `warps` to a program.

    The loop over the blocks of columns has a pipeline of `stages` stages.
    """

    BT: int
    BK: int
    BV: int
    warps: int
    stages: int


# By the bytes of an input number and the dim, rounded up to a power of two from 64 on; for Hopper and everything else.
#
# Hopper, measured on one H200 (triton 3.6), ms of the runs for o, dq, dk and dv:
#   bf16, D 128, B4 T2048 H16   BT 64, BV 128, 4 warps, 3 stages             0.20 0.25 0.21 0.20
#                               2 stages: two programs to a multiprocessor   0.24 0.27 0.24 0.22
#                               BT 128, 8 warps, 3 stages                    0.22 0.29 0.24 0.23
#                               BV 64                                        0.33 0.41 0.36 0.33
#                               BK 64                                        0.38 0.46 0.38 0.37
#   bf16, D 64, B4 T2048 H32    BT 64, 4 warps, 3 stages (2 and 4 the same)  0.24 0.29 0.25 0.23
#                               BT 128, 8 warps                              0.32 0.40 0.36 0.32
#   bf16, D 256, B8 T2048 H16   BK 256, BV 128, 4 warps, 1 stage             1.27 1.54 1.22 1.16
#                               BK 128                                       1.43 2.06 1.79 1.37
#                               2 stages                                     1.69 2.07 1.73 1.59
#                               BV 256, 8 warps                              1.77 2.41 1.80 1.65
#   bf16, D 512, B2 T1024 H8    BK 256, BV 128, 4 warps, 1 stage             0.22 0.24 0.21 0.20
#                               BK 512, 8 warps                              0.39 0.47 0.41 0.37
#   fp32, D 64, B4 T2048 H32    BT 64, BK 64, 2 stages                       1.57 1.91 1.61 1.57
#   fp32, D 128, B4 T2048 H16   BT 64, BK 64, BV 64, 4 warps, 1 stage        2.39 2.84 2.44 2.37
#                               BK 128: spills                               2.62 4.78 2.73 2.66
#   fp32, D 256, B2 T1024 H8    BT 64, BK 64, BV 64, 4 warps, 1 stage        0.59 0.68 0.59 0.57
#                               BT 16, BV 128: too few rows for wgmma        1.45 2.12 1.69 1.31
#
# The others were only compiled, for sm_80: no kernel takes over 280 bytes of stack to a thread (triton 3.6).
HOPPER = {
    2: {
        64: AttentionConfig(64, 64, 64, 4, 3), 128: AttentionConfig(64, 128, 128, 4, 3),
        256: AttentionConfig(64, 256, 128, 4, 1), 512: AttentionConfig(64, 256, 128, 4, 1),
    },
    4: {
        64: AttentionConfig(64, 64, 64, 4, 2), 128: AttentionConfig(64, 64, 64, 4, 1),
        256: AttentionConfig(64, 64, 64, 4, 1), 512: AttentionConfig(64, 64, 64, 4, 1),
    },
}  # fmt: skip
OTHERS = {
    2: {
        64: AttentionConfig(32, 64, 64, 4, 2), 128: AttentionConfig(32, 128, 64, 4, 2),
        256: AttentionConfig(32, 128, 128, 8, 2), 512: AttentionConfig(32, 128, 128, 8, 2),
    },
    4: {
        64: AttentionConfig(32, 64, 64, 4, 2), 128: AttentionConfig(16, 128, 64, 4, 1),
        256: AttentionConfig(16, 64, 64, 4, 1), 512: AttentionConfig(16, 64, 64, 4, 1),
    },
}  # fmt: skip


def attention_config(K: int, V: int, dtype: torch.dtype, device: torch.device) -> AttentionConfig:
    """Configuration of a run with rows of K and V numbers. The blocks are the same with K and V exchanged."""
    table = (HOPPER if is_hopper(device) else OTHERS)[dtype.itemsize]
    config = table[max(64, next_power_of_2(max(K, V)))]
    return config._replace(BK=min(config.BK, max(16, next_power_of_2(K))))


class Gates(NamedTuple):
    """What the runs read of the gates: their sums in blocks, and what `block_sums` returns. All None without gates."""

    c: torch.Tensor | None = None
    sums: torch.Tensor | None = None
    ranges: torch.Tensor | None = None


class Operands(NamedTuple):
    """What a run reads, q, k, v and x in their roles."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: Gates
    x: torch.Tensor | None = None  # dg needs its products with the rows of the output
    cu_seqlens: torch.Tensor | None = None


class Setting(NamedTuple):
    """How a run goes: all that a launch depends on beside the layouts of its tensors."""

    scale: float
    reverse: bool = False
    precision: str | None = None  # of fp32 products, as `tl.dot` takes it
    role: str = 'o'  # what the run makes, which its kernel's name tells


@launcher
def launch_attention(tensors, setting):
    q, k, v, c, _, o, x, *_, cu_seqlens = tensors
    B, T, H, K, V = sizes(q, v)
    BT, BK, BV, warps, stages = attention_config(K, V, q.dtype, q.device)
    blocks = count_blocks(B, T, BT, cu_seqlens)
    args = (
        *tensors,
        setting.scale, count_sequences(B, cu_seqlens), T,
        *strides(q, 3), *strides(k, 3), *strides(v, 3), *strides(x, 3),
        B * H * T, 0 if c is None else c[0].numel(), blocks, cdiv(T, BT),
    )  # fmt: skip
    constants = dict(
        ROLE=setting.role, H=H, GQ=H // q.shape[2], GV=H // v.shape[2], K=K, V=V, BT=BT, BK=BK, BV=BV, BI=64,
        REVERSE=setting.reverse, TWO_PARTS=c is not None and c.shape[0] == 2, TMA=use_descriptors(q, k, v, o, x),
        PRECISION=setting.precision, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return attention_kernel, (blocks * H * cdiv(V, BV), 1, 1), args, constants


def attend(operands: Operands, setting: Setting, output_attentions: bool = False):
    """One run: `o`; the attention map or None; and two that are None without x. They are the rows `x . o [NV, B, H, T]`
    and, not in reverse, `crossing [NV, blocks, H, NB]`: the sums of these rows over blocks, of the columns before each
    block.
    """
    q, k, v, (c, sums, _), x, cu_seqlens = operands
    B, T, H, K, V = sizes(q, v)
    config = attention_config(K, V, q.dtype, q.device)
    BT, NV = config.BT, cdiv(V, config.BV)
    o = empty(q, B, T, H, V)
    x_o = crossing = None
    if x is not None:
        x_o = empty(q, NV, B, H, T, dtype=torch.float32)
        if not setting.reverse:
            # zeros, because the kernel writes nothing for tiles that it leaves out
            crossing = zeros(q, NV, count_blocks(B, T, BT, cu_seqlens), H, cdiv(T, BT), dtype=torch.float32)
    attention = zeros(q, B, H, T, T) if output_attentions else None
    if o.numel():
        launch_attention((q, k, v, c, sums, o, x, x_o, crossing, attention, cu_seqlens), setting)
    return o, attention, x_o, crossing


@launcher
def launch_block_sums(tensors, scale, N, T):
    c, *_ = tensors
    _, blocks, H, BT = c.shape
    args = *tensors, scale, N, T, c[0].numel(), blocks
    return block_sums_kernel, (N * H, 1, 1), args, dict(H=H, BT=BT, BI=32, TWO_PARTS=c.shape[0] == 2, num_warps=4)


def block_sums(c: torch.Tensor, inputs: Inputs, scale: float, with_ranges: bool):
    """Sums of the gates over blocks, and the largest ones in them, `[3, blocks, H]` in fp64; and the ranges of blocks
    that reach each other, `[2, blocks, H]` in int32, or None.
    """
    B, T = inputs.q.shape[:2]
    blocks, H = c.shape[1:3]
    sums = empty(c, 3, blocks, H, dtype=torch.float64)
    ranges = empty(c, 2, blocks, H, dtype=torch.int32) if with_ranges else None
    if sums.numel():
        launch_block_sums((c, sums, ranges, inputs.cu_seqlens), scale, count_sequences(B, inputs.cu_seqlens), T)
    return sums, ranges


@launcher
def launch_gate_gradient(tensors, BT):
    g, _, w, _, crossing, cu_seqlens = tensors
    B, T, H = g.shape
    NC, blocks, _, NB = crossing.shape
    args = *tensors, count_sequences(B, cu_seqlens), T, *g.stride(), B * H * T, blocks, NB
    constants = dict(NK=w.shape[0], NC=NC, H=H, BT=BT, BI=32, num_warps=4)
    return attention_gate_gradient_kernel, (blocks * H, 1, 1), args, constants


def gate_gradient(g, w, z, crossing, BT, cu_seqlens):
    """`dg [B, T, H]`, in g's dtype, from `w, z [NK, B, H, T]` and `crossing [NC, blocks, H, NB]`."""
    dg = empty(g, *g.shape)
    if dg.numel():
        launch_gate_gradient((g, dg, w, z, crossing, cu_seqlens), BT)
    return dg


def sums_of_gates(inputs: Inputs, hopper: Callable | None, scale: float) -> Gates:
    """What the runs read of the gates, in the blocks of the kernel that they take."""
    q, v, g = inputs.q, inputs.v, inputs.g
    if g is None:
        return Gates()
    BT = BLOCK_TOKENS if hopper else attention_config(q.shape[-1], v.shape[-1], q.dtype, q.device).BT
    c = chunk_gates(g, BT, q.dtype == torch.float32, inputs.cu_seqlens)
    return Gates(c, *block_sums(c, inputs, scale, hopper is not None))


@device_pass
def forward_pass(inputs: Inputs, options: Options, hopper: Callable | None):
    """`o`, the attention map or None, and the three of `Gates`, for the backward. hopper is from `hopper_attend`."""
    gates = sums_of_gates(inputs, hopper, options.scale)
    operands = Operands(*inputs[:3], gates, cu_seqlens=inputs.cu_seqlens)
    setting = Setting(options.scale, precision=options.precision)
    if hopper:
        o, *_ = hopper(operands, setting)
        return o, None, *gates
    o, attention, *_ = attend(operands, setting, options.output)
    return o, attention, *gates


@device_pass
def backward_pass(tensors: tuple, needs: Gradients, options: Options, hopper: Callable | None) -> Gradients:
    """The gradients that are needed."""
    inputs, (*gates, do) = Inputs(*tensors[:8]), tensors[8:]
    q, k, v, g, _, cu_seqlens, *_ = inputs
    gates = sums_of_gates(inputs, hopper, options.scale) if gates[0] is None else Gates(*gates)
    run = hopper or attend
    forward = Setting(options.scale, precision=options.precision)
    reverse = forward._replace(reverse=True)
    dq = dk = dv = dg = None
    if needs.q or needs.g:
        operands = Operands(do, v, k, gates, q if needs.g else None, cu_seqlens)
        dq, *_, w, crossing = run(operands, forward._replace(role='dq'))
        dq = sum_heads(dq, q) if needs.q else None
    if needs.k or needs.g:
        operands = Operands(v, do, q, gates, k if needs.g else None, cu_seqlens)
        dk, *_, z, _ = run(operands, reverse._replace(role='dk'))
        dk = sum_heads(dk, k) if needs.k else None
    if needs.g:
        dg = gate_gradient(g, w, z, crossing, gates.c.shape[-1], cu_seqlens)
    if needs.v:
        operands = Operands(k, q, do, gates, cu_seqlens=cu_seqlens)
        dv, *_ = run(operands, reverse._replace(role='dv'))
    return Gradients(dq, dk, dv, dg, None)


def hopper_attend(inputs: Inputs, plan: Plan) -> Callable | None:
    """`attend` for Hopper; None where it does not take these tensors, or where the attention map is wanted."""
    return None if plan.options.output else plan.once(attention_for, *inputs[:3])


def forward(inputs: Inputs, plan: Plan) -> Results:
    o, attention, *gates = forward_pass(inputs, plan.options, hopper_attend(inputs, plan), plan=plan)
    return Results(o, attention, gates=gates)


def backward(inputs: Inputs, kept: tuple, given: tuple, needs: Gradients, plan: Plan) -> tuple:
    (_, gates), (do, _) = kept, given
    hopper = hopper_attend(inputs, plan)
    # The gates were summed in the blocks of the forward's kernel, so the backward takes the same one.
    do = as_taken(do, hopper is not None)
    return backward_pass((*inputs, *(gates or Gates()), do), needs, plan.options, hopper)


def naive(inputs: Inputs, options: Options):
    q, k, v, g, _, cu_seqlens, *_ = inputs
    o, attention = naive_parallel_simple_gla(q, k, v, g, options.scale, cu_seqlens=cu_seqlens)
    return o, attention.detach().to(q.dtype) if options.output else None


def map_like(inputs: Inputs) -> torch.Tensor:
    """A tensor like the attention map."""
    B, T = inputs.q.shape[:2]
    return inputs.q.new_empty(B, inputs.v.shape[2], T, T)


mode = Mode('parallel', forward, backward, naive, second_like=map_like)


def parallel_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    *,
    g_gamma: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Simple Gated Linear Attention as attention without a softmax: for short sequences, and for the attention map.

    For each sequence and head::

        o_i = sum_{j<=i} A_ij v_j
        A_ij = scale * exp(g_{j+1} + ... + g_i) (q_i . k_j)

    The work is quadratic in T. Tiles whose decay is zero in fp32 are skipped, so that strong gates make it less. No
    state goes in or comes out: the other modes have them. A sequence's results do not depend on what else is in the
    batch. Products are computed in the inputs' dtype and summed in fp32; fp32 inputs are computed to fp32 accuracy, or
    in TF32 where `torch.set_float32_matmul_precision` allows it. Differentiable in q, k, v, g and g_gamma, once,
    through o alone. CPU tensors are computed by `naive_parallel_simple_gla`.

    Args:
        q: queries `[B, T, HK, K]` in bfloat16, float16 or float32 (on the CPU float64 too), K from 1 to 512.
        k: keys, of q's shape and dtype.
        v: values `[B, T, H, V]` in q's dtype, V from 1 to 512, H a multiple of HK. Head h reads q and k of head
            `h // (H // HK)`.
        g: log decay of each token and head (natural logarithm) `[B, T, H]`, of any floating dtype. `-inf` resets the
            state. A positive gate is allowed as long as all decays and the result are finite in fp32.
        scale: factor of the products `q . k`. Default: `K ** -0.5`.
        output_attentions: whether to return the attention map. Not with `cu_seqlens`.
        cu_seqlens: `[N + 1]`, int32 or int64: sequence n is the tokens from `cu_seqlens[n]` to `cu_seqlens[n + 1]` of a
            batch of one. It starts at 0, never decreases, and stays on the device. Tokens in no sequence get zeros. On
            the GPU its contents are not checked: bounds are moved into 0..T, and a sequence that would end before it
            begins is empty.
        cu_seqlens_cpu: a copy of cu_seqlens on the CPU. Accepted for code that has one; nothing here needs it.
        g_gamma: log decay of each head `[H]`, in place of g. With neither, nothing decays.

    Returns:
        o `[B, T, H, V]` in q's dtype, and the attention map `[B, H, T, T]` in q's dtype, zero above the diagonal, or
        None.

    Raises:
        TypeError: an argument has a wrong type or dtype, or is unknown.
        ValueError: an argument has a wrong shape, device, value or contents, or excludes another.

    The message names the argument, and nothing has been computed by then.

    Source: Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv:2312.06635), with
    the scalar gate of Dao and Gu, Transformers are SSMs (arXiv:2405.21060).

    Example::

        >>> import torch
        >>> from fla_simple_gla import parallel_simple_gla
        >>> q, k, v = torch.randn(3, 1, 100, 4, 64)
        >>> g = torch.nn.functional.logsigmoid(torch.randn(1, 100, 4))
        >>> o, attention = parallel_simple_gla(q, k, v, g, output_attentions=True)
        >>> o.shape, attention.shape
        (torch.Size([1, 100, 4, 64]), torch.Size([1, 4, 100, 100]))
    """
    return mode(Call(
        q, k, v, g, g_gamma, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu, scale=scale,
        output_attentions=output_attentions,
    ))  # fmt: skip
