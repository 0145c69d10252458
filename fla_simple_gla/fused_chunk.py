"""Simple GLA in one sweep over each sequence, in chunks: the state never leaves the registers.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T
    o_t = scale * S_t^T q_t

A sweep is what the field also calls a fused inter-chunk scan. A program owns one head of one sequence and a tile of V
columns, and takes the chunks in order. With c the running sum of the gates in a chunk of C tokens, and S the state
before it:

    o_i = scale * (sum_{j<=i} exp(c_i - c_j) (q_i . k_j) v_j  +  exp(c_i) S^T q_i)
    S'  = exp(c_C) S + sum_j exp(c_C - c_j) k_j v_j^T

The gradients are three more sweeps by the same kernel, with other tensors in the roles of q, k and v:

    role     q    k    v     state                out
    forward  q    k    v     S    [K, V]          o
    dq       do   v    k     S^T  [V, K]          dq
    dk       v    do   q     dS^T [V, K], back    dk
    dv       k    q    do    dS   [K, V], back    dv

A sweep back in time starts from the gradient of the final state, and leaves that of the initial one. Its state is
dS = sum scale * q do^T: the scale is part of it, while the forward state has none.

For dg, the sweeps for dq and dk also leave rows of q . dq and k . dk, taken from the fp32 accumulators, and every few
chunks the product of the S before a chunk with the dS after it; `_gates.py` says why, and how they add up. The rows of
k . dk have two parts, of the pairs inside a chunk and of the carried state. The terms of the pairs are in q . dq and in
k . dk. Both sweeps round the same decayed do_i . v_j, so these terms cancel to fp32 accuracy.

On Hopper, 16-bit inputs go to the kernels of `hopper/` if K and V are multiples of 8 and TMA can read the rows. Up to
128 these make dk and dv in one sweep.
"""

import functools

import torch

from ._blocks import block_bounds, count_blocks, count_sequences, first_block, is_sequence, sequence_bounds, state_slot
from ._gates import GateParts, anchor_tokens, chunk_gates, gate_gradient
from ._heads import sum_heads
from ._launch import launcher
from ._layout import (
    cdiv,
    is_hopper,
    load_rows,
    next_power_of_2,
    open_rows,
    sizes,
    store_rows,
    strides,
    transposed,
    use_descriptors,
)
from ._mode import Mode
from ._passes import device_pass, empty
from ._plans import Gradients, Inputs, Options, Plan, Results
from ._sweeps import Operands, Setting, Steps, SweepConfig, count_swept, final_states
from ._triton import jit, kernel_name, tl
from ._validation import Call
from .hopper import CHUNK_TOKENS, Sweeps, as_taken, sweeps_for
from .naive import naive_chunk_simple_gla


@jit(do_not_specialize=['N', 'T', 'P', 'segment', 'part', 'c_part', 'blocks', 'scale'], repr=kernel_name('sweep'))
def sweep_kernel(
    q, k,  # [B, T, H // GQ, K], any strides with contiguous rows
    v,  # [B, T, H // GV, V], likewise
    c,  # [1 or 2, chunks, H, BT]: running sums of the gates, or None
    state_in,  # [N, H, K, V]; with indices [slots, H, K, V]; of segments [segments, H, K, V]; any strides; or None
    o,  # [B, T, H, V]
    state_out,  # [N, H, K, V], or with indices [slots, H, K, V], any strides, or None
    x,  # [B, T, H // GV, V], or None
    x_o,  # [NV, B, H, T]: rows x . o, over the V tile; back in time of the part of o from pairs inside a chunk
    x_inter,  # [NV, B, H, T]: back in time only, the same of the part from the carried state
    anchors,  # [blocks + N, H, K, V]: states before some chunks (`_gates.py`), left forward and read back in time
    s_ds,  # [NV, blocks + N, H]: <anchor, state after the chunk>, over the V tile, back in time only
    cu_seqlens,  # [N + 1] or None
    indices,  # [N]: the slots of the sequences' states; or None
    scale,
    N, T,
    P,  # slots of the pool
    segment,  # tokens
    q_b, q_t, q_h,
    k_b, k_t, k_h,
    v_b, v_t, v_h,
    x_b, x_t, x_h,
    si_n, si_h, si_k, si_v,
    so_n, so_h, so_k, so_v,
    part,  # B * H * T
    c_part,  # chunks * H * BT
    blocks,  # anchor blocks
    ROLE: tl.constexpr,  # what the sweep makes: the kernel's name tells it
    H: tl.constexpr,
    GQ: tl.constexpr,
    GV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BA: tl.constexpr,
    REVERSE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    TWO_PARTS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """o and the last state of one head of one sequence, or of one segment of it, in BV columns of V.

    The state is a tuple of NK pieces of BK rows. The products with q and k take one piece after the other, so that the
    registers hold BK columns of q and k at a time.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    i_v = tl.program_id(0) % NV
    i_h = (tl.program_id(0) // NV % H).to(tl.int64)
    i_s = tl.program_id(0) // (NV * H)
    if SEGMENTS:
        i_b, i_n, first, end, bos, eos = block_bounds(cu_seqlens, i_s, N, T, segment)
        if first >= end:
            return
    else:
        i_n = i_s
        if cu_seqlens is None:
            i_b = i_n.to(tl.int64)
            bos = i_n * 0
            eos = bos + T
        else:
            i_n -= 1
            i_b = tl.zeros([], tl.int64)
            bos, eos = sequence_bounds(cu_seqlens, i_n, N, T)
        first = bos
        end = eos
    L = end - first
    NT = tl.cdiv(L, BT)
    last = tl.cdiv(eos - bos, BT) - 1
    first_anchor = first_block(cu_seqlens, i_n, bos, T, BA)
    first_chunk = first_block(cu_seqlens, i_n, bos, T, BT) + (first - bos) // BT

    r = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    before = (r[:, None] <= r[None, :]) if REVERSE else (r[:, None] >= r[None, :])
    i_f = first.to(tl.int64)

    r_o = open_rows(o + ((i_b * T + i_f) * H + i_h) * V, H * V, L, V, BT, BV, TMA)
    i_p = state_slot(indices, i_n, N, P)
    if cu_seqlens is not None or indices is not None:
        # the tokens in no sequence, and padding
        if ~is_sequence(i_n, N) | (i_p < 0):
            for i_t in range(NT):
                store_rows(r_o, H * V, L, i_t * BT, i_v * BV, tl.zeros([BT, BV], o.dtype.element_ty), V, BT, BV, TMA)
            return

    r_q = open_rows(q + i_b * q_b + i_f * q_t + i_h // GQ * q_h, q_t, L, K, BT, BK, TMA)
    r_k = open_rows(k + i_b * k_b + i_f * k_t + i_h // GQ * k_h, k_t, L, K, BT, BK, TMA)
    r_v = open_rows(v + i_b * v_b + i_f * v_t + i_h // GV * v_h, v_t, L, V, BT, BV, TMA)
    if x is not None:
        r_x = open_rows(x + i_b * x_b + i_f * x_t + i_h // GV * x_h, x_t, L, V, BT, BV, TMA)
        o_x = i_v.to(tl.int64) * part + (i_b * H + i_h) * T + i_f
        anchors += i_h * K * V + o_k[:, None] * V + o_v[None, :]
        if REVERSE:
            s_ds += i_v.to(tl.int64) * (blocks + N) * H + i_h
    if c is not None:
        c += (first_chunk.to(tl.int64) * H + i_h) * BT

    if state_in is not None:
        state_in += (i_s.to(tl.int64) if SEGMENTS else i_p) * si_n + i_h * si_h
    b_s = ()
    for j in tl.static_range(NK):
        if state_in is not None:
            p_s = state_in + (j * BK + o_k).to(tl.int64)[:, None] * si_k + o_v.to(tl.int64)[None, :] * si_v
            b_s = b_s + (tl.load(p_s, mask=(j * BK + o_k < K)[:, None] & (o_v < V)[None, :], other=0.0).to(tl.float32),)
        else:
            b_s = b_s + (tl.zeros([BK, BV], tl.float32),)

    for i in tl.range(0, NT, num_stages=STAGES):
        i_c = NT - 1 - i if REVERSE else i
        i_t = i_c * BT
        b_q = load_rows(r_q, q_t, L, i_t, 0, K, BT, BK, TMA)
        b_k = load_rows(r_k, k_t, L, i_t, 0, K, BT, BK, TMA)
        b_v = load_rows(r_v, v_t, L, i_t, i_v * BV, V, BT, BV, TMA)

        if x is not None:
            # chunks and anchor blocks are counted from the sequence's first token
            n_c = (first - bos) // BT + i_c
            ends_block = ((n_c + 1) % (BA // BT) == 0) | (n_c == last)
            if ends_block | (n_c == last - 1):
                i_a = tl.where(ends_block, first_anchor + n_c // (BA // BT), blocks + i_n).to(tl.int64)
                p_a = anchors + i_a * (H * K * V)
                for j in tl.static_range(NK):
                    m_s = (j * BK + o_k < K)[:, None] & (o_v < V)[None, :]
                    if REVERSE:
                        product = tl.sum(tl.load(p_a, mask=m_s, other=0.0).to(tl.float32) * b_s[j])
                        if j == 0:
                            crossing = product
                        else:
                            crossing += product
                    else:
                        tl.store(p_a, b_s[j].to(anchors.dtype.element_ty), mask=m_s)
                    p_a += BK * V
                if REVERSE:
                    tl.store(s_ds + i_a * H, crossing)

        b_o = tl.dot(b_q, b_s[0].to(b_q.dtype), input_precision=PRECISION)
        b_p = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        for j in tl.static_range(1, NK):
            b_q = load_rows(r_q, q_t, L, i_t, j * BK, K, BT, BK, TMA)
            b_k = load_rows(r_k, k_t, L, i_t, j * BK, K, BT, BK, TMA)
            b_o = tl.dot(b_q, b_s[j].to(b_q.dtype), b_o, input_precision=PRECISION)
            b_p = tl.dot(b_q, tl.trans(b_k), b_p, input_precision=PRECISION)
        if c is not None:
            p_c = c + i_c.to(tl.int64) * (H * BT)
            b_c = tl.load(p_c + r)
            c_end = tl.load(p_c + BT - 1)
            d = b_c[None, :] - b_c[:, None] if REVERSE else b_c[:, None] - b_c[None, :]
            to_end = c_end - b_c
            if TWO_PARTS:
                b_f = tl.load(p_c + c_part + r)
                f_end = tl.load(p_c + c_part + BT - 1)
                d += b_f[None, :] - b_f[:, None] if REVERSE else b_f[:, None] - b_f[None, :]
                to_end += f_end - b_f
                b_c += b_f
                c_end += f_end
            b_p *= tl.exp2(tl.where(before, d, float('-inf'))) * scale
            from_start = tl.exp2(b_c)
            to_end = tl.exp2(to_end)
            if REVERSE:
                b_o *= to_end[:, None]
                b_d = (b_v * (from_start * scale)[:, None]).to(b_v.dtype)
            else:
                b_o *= (from_start * scale)[:, None]
                b_d = (b_v * to_end[:, None]).to(b_v.dtype)
            c_end = tl.exp2(c_end)
            decayed = ()
            for j in tl.static_range(NK):
                decayed = decayed + (b_s[j] * c_end,)
            b_s = decayed
        else:
            b_p = tl.where(before, b_p * scale, 0.0)
            if REVERSE:
                b_d = (b_v * scale).to(b_v.dtype)
            else:
                b_o *= scale
                b_d = b_v
        if x is not None:
            b_x = load_rows(r_x, x_t, L, i_t, i_v * BV, V, BT, BV, TMA)
        if REVERSE and x is not None:
            b_inter = tl.sum(b_x * b_o, 1)
            tl.store(x_inter + o_x + i_t + r, b_inter, mask=i_t + r < L)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)
        store_rows(r_o, H * V, L, i_t, i_v * BV, b_o.to(o.dtype.element_ty), V, BT, BV, TMA)
        if x is not None:
            b_x = tl.sum(b_x * b_o, 1)
            tl.store(x_o + o_x + i_t + r, b_x - b_inter if REVERSE else b_x, mask=i_t + r < L)
        updated = ()
        for j in tl.static_range(NK):
            if NK > 1:
                b_k = load_rows(r_k, k_t, L, i_t, j * BK, K, BT, BK, TMA)
            updated = updated + (tl.dot(tl.trans(b_k), b_d, b_s[j], input_precision=PRECISION),)
        b_s = updated

    if state_out is not None:
        # the last segment's; a sequence without tokens has no segment, and then the combine leaves its state
        if first == bos if REVERSE else end == eos:
            state_out += i_p * so_n + i_h * so_h
            for j in tl.static_range(NK):
                p_out = state_out + (j * BK + o_k).to(tl.int64)[:, None] * so_k + o_v.to(tl.int64)[None, :] * so_v
                tl.store(p_out, b_s[j], mask=(j * BK + o_k < K)[:, None] & (o_v < V)[None, :])


# Configurations by the bytes of an input number and the dim that is to fit, for Hopper and for everything else.
#
# Hopper, measured on one H200 (triton 3.6), ms of the sweeps for o, dq, dk and dv:
#   bf16, D 128, B4 T4096 H64   BV 64, 4 warps, 2 stages: two programs to a multiprocessor   0.40 0.50 0.61 0.39
#                               3 stages: one program                                        0.45 0.54 0.91 0.44
#                               BV 32                                                        0.64 0.71 0.79 0.70
#                               BV 128, 8 warps                                              0.58 0.82 1.04 0.60
#                               BT 32                                                        0.55 0.69 0.78 0.55
#   bf16, D 64, B4 T4096 H64    BV 64, 4 warps, 3 stages                                     0.14 0.20 0.21 0.14
#                               2 stages                                                     0.19 0.22 0.23 0.19
#                               4 stages                                                     0.15 0.23 0.32 0.15
#   bf16, D 256, B8 T2048 H32   BV 64, 4 warps, 1 stage                                      0.85 1.28 2.14 0.89
#                               BV 32, 2 stages                                              1.37 1.50 1.91 1.40
#                               BV 64, 8 warps, 2 stages                                     1.28 1.62 1.79 1.28
#   bf16, D 512, B2 T1024 H8    BV 64, 8 warps, 1 stage                                      0.18 0.29 0.50 0.17
#                               BT 32                                                        0.52 0.65 0.64 0.54
#   fp32, D 128, B2 T2048 H16   BV 32, 4 warps, 1 stage                                      0.59 0.49 0.57 0.55
#                               BT 32, 2 stages: too few rows for wgmma                      1.26 0.98 1.17 1.20
#                               8 warps                                                      0.86 0.83 1.03 0.89
# A V tile has rows of 128 bytes there. With shorter ones the wgmma operands of triton 3.6 can be read past the end of
# the shared memory, and some kernels failed (https://github.com/triton-lang/triton/issues/11366, seen up to triton
# 3.7.1).
#
# Pieces of the state bound the stack. The driver reserves it for all threads that the GPU can hold, so a thread gets at
# most 1 KB. With the state in one piece, the worst of o, dq and dk took (triton 3.6):
#   Hopper, bf16 and fp16   D 256   1864 (by pointers)   D 512    3360
#   Hopper, fp32            D 128   1888                 D 256    2632      D 512    5592
#   sm_80, bf16 and fp16                                 D 512    4112
#   sm_80, fp32             D 256   6704                 D 512   11328
# The times above of bf16, D 512, and of fp32, D 128, are those of one piece. A piece takes a copy to wait for, and
# saves spills: fp32 gets quicker by pieces, 16 bits do not. ms of a whole call of `fused_chunk`:
#   fp32, D 128, B2 T2048 H16   one piece  0.62, with the backward 2.21; 64 rows 0.42, 1.79
#   fp32, B2 T1024 H8           one piece  D 256   0.87, with the backward  3.98    D 512   10.2, 46.0
#                               64 rows            0.75                     3.23            3.3, 14.1
#   bf16, B2 T1024 H8           one piece  D 256   0.10                     0.48    D 512   0.18, 1.09
#                               128 rows           0.14                     0.63            0.29, 1.32
#                               64 rows, by pointers                                        0.24, 1.07
#
# The others were only compiled, for sm_80: in 16 bits nothing spills up to D 128, and no kernel needs over 64 KiB of
# shared memory.
# fmt: off
HOPPER = {
    2: {
        64: SweepConfig(64, 64, 4, 3), 128: SweepConfig(64, 64, 4, 2),
        256: SweepConfig(64, 64, 4, 1), 512: SweepConfig(64, 64, 8, 1, 64, TMA=False),
    },
    4: {
        64: SweepConfig(64, 32, 4, 2), 128: SweepConfig(64, 32, 4, 1, 64),
        256: SweepConfig(16, 32, 4, 1, 64), 512: SweepConfig(16, 32, 8, 1, 64),
    },
}
# In place of these, for rows that TMA cannot read: they pass through registers. In bf16 at D 256 that is slow where the
# GPU is full: 0.48 ms, with the backward 2.27, at B4 T2048 H16. One piece with 4 warps takes 0.28 and 1.23, but 2,048
# bytes of stack; 64 rows with 4 warps take 0.32 and 1.55, but 1,160 bytes.
POINTERS = {2: {256: SweepConfig(64, 64, 8, 1, 64)}, 4: {128: SweepConfig(64, 32, 4, 1, 32)}}
OTHERS = {
    2: {
        64: SweepConfig(32, 64, 4, 2), 128: SweepConfig(32, 32, 4, 2),
        256: SweepConfig(32, 32, 8, 1), 512: SweepConfig(16, 16, 8, 1, 128),
    },
    4: {
        64: SweepConfig(32, 32, 4, 2), 128: SweepConfig(16, 16, 4, 1),
        256: SweepConfig(16, 16, 8, 1, 64), 512: SweepConfig(16, 16, 8, 1, 64),
    },
}
# fmt: on


@functools.cache
def sweep_config(K: int, V: int, dtype: torch.dtype, device: torch.device, tma: bool = True) -> SweepConfig:
    """The configuration of a sweep with a state `[K, V]`, whose rows TMA can read or not.

    Chunks are the same for `[V, K]`: all four sweeps of a call read the same sums of gates. Chunks and BV are the same
    by TMA and by pointers.
    """
    size, row = dtype.itemsize, max(64, next_power_of_2(K))
    table = (HOPPER if is_hopper(device) else OTHERS)[size]
    config = table[row]
    if is_hopper(device) and not tma:
        config = POINTERS[size].get(row, config)
    BT = table[max(64, next_power_of_2(max(K, V)))].BT
    return config._replace(BT=BT, BK=min(config.BK, max(16, next_power_of_2(K))))


def sweep_gates(inputs: Inputs) -> torch.Tensor | None:
    """The sums of the gates in the chunks of the sweeps."""
    q, v, g = inputs.q, inputs.v, inputs.g
    if g is None:
        return None
    BT = sweep_config(q.shape[-1], v.shape[-1], q.dtype, q.device).BT
    return chunk_gates(g, BT, q.dtype == torch.float32, inputs.cu_seqlens)


@launcher
def launch_sweep(tensors, setting):
    q, k, v, c, state_in, o, state_out, x, *_, cu_seqlens, indices = tensors
    B, T, H, K, V = sizes(q, v)
    tma = use_descriptors(q, k, v, o, x)
    config = sweep_config(K, V, q.dtype, q.device, tma)
    scale, segment, BA, reverse, precision, role = setting
    args = (
        *tensors,
        scale, count_sequences(B, cu_seqlens), T, 0 if indices is None else state_out.shape[0], segment or 0,
        *strides(q, 3), *strides(k, 3), *strides(v, 3), *strides(x, 3), *strides(state_in, 4), *strides(state_out, 4),
        B * H * T, 0 if c is None else c[0].numel(), count_blocks(B, T, BA, cu_seqlens),
    )  # fmt: skip
    constants = dict(
        ROLE=role, H=H, GQ=H // q.shape[2], GV=H // v.shape[2], K=K, V=V,
        BT=config.BT, BK=config.BK, BV=config.BV, BA=BA,
        REVERSE=reverse, SEGMENTS=segment is not None, TWO_PARTS=c is not None and c.shape[0] == 2,
        TMA=tma and config.TMA, PRECISION=precision, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return sweep_kernel, (count_swept(B, T, segment, cu_seqlens) * H * cdiv(V, config.BV), 1, 1), args, constants


def sweep(operands: Operands, setting: Setting):
    """One sweep over each sequence, or over each of its segments, which then have a state_in of their own: `o`, and
    three that are None without x. Forward in time, with x, the first is the rows `x . o [NV, B, H, T]`. Back in time
    these have two parts, of the carried state and of pairs inside a chunk, and the third is
    `<anchor, state> [NV, blocks + N, H]`, for anchor blocks of BA tokens.
    """
    q, k, v, c, state_in, state_out, x, anchors, cu_seqlens, indices, _ = operands
    B, T, H, K, V = sizes(q, v)
    o = empty(q, B, T, H, V)
    x_o = x_inter = s_ds = None
    if x is not None:
        NV = cdiv(V, sweep_config(K, V, q.dtype, q.device).BV)
        x_o = empty(q, NV, B, H, T, dtype=torch.float32)
        if setting.reverse:
            x_inter = empty(x_o, *x_o.shape)
            s_ds = empty(q, NV, anchors.shape[0], H, dtype=torch.float32)
    if count_swept(B, T, setting.segment, cu_seqlens):
        launch_sweep((q, k, v, c, state_in, o, state_out, x, x_o, x_inter, anchors, s_ds, cu_seqlens, indices), setting)
    return (o, x_inter, x_o, s_ds) if setting.reverse else (o, x_o, None, None)


def outputs(
    inputs: Inputs,
    states: tuple,
    c: torch.Tensor | None,
    hopper: Sweeps | None,
    setting: Setting,
    steps: Steps | None = None,
) -> torch.Tensor:
    """o. `states` are those that the sequences or their segments start with, or None, and where the final ones go, or
    None.

    c are the sums of the gates, which the sweeps for Hopper do not need. hopper is `sweeps_for(q, k, v)`. Step sizes
    are for sweeps of pairs of heads.
    """
    q, k, v, g, _, cu_seqlens, indices, _ = inputs
    operands = Operands(q, k, v, g if hopper else c, *states, cu_seqlens=cu_seqlens, indices=indices, steps=steps)
    o, *_ = (hopper.sweep if hopper else sweep)(operands, setting)
    return o


def gradients(
    inputs: Inputs,
    states: tuple,
    c: torch.Tensor | None,
    do: torch.Tensor,
    needs: Gradients,
    setting: Setting,
    steps: Steps | None = None,
) -> Gradients:
    """The gradients that are needed.

    `states` are those that the sequences or their segments start with, the gradients of those that they end with, and
    where the gradients of the initial states go. Each may be None. Only sweeps of pairs of heads take step sizes.
    """
    q, k, v, g, _, cu_seqlens, *_ = inputs
    state, dstate, dh0 = states
    B, T, H, V = v.shape
    K = q.shape[-1]
    hopper = sweeps_for(q, k, v, do)
    # Where dk and dv are two sweeps, dv is allocated after the anchors are freed, so more anchors take no more memory.
    # Wide states need them: with 384 tokens to a block the error of dg was 7.6e-3 at K 256, V 160.
    at_once = hopper.gradients if hopper else None
    setting = setting._replace(BA=anchor_tokens(setting.segment, 384 if at_once else 256))
    anchors = None
    dq = dk = dv = dg = y = None
    if needs.g:
        size = hopper.anchor_size(K, V) if hopper else K * V
        anchors = empty(q, count_blocks(B, T, setting.BA, cu_seqlens) + count_sequences(B, cu_seqlens), H, size)

    if hopper:
        BT, gates, run = CHUNK_TOKENS, g, hopper.sweep
    else:
        gates, run = sweep_gates(inputs) if c is None else c, sweep
        BT = 0 if gates is None else gates.shape[-1]
    common = dict(cu_seqlens=cu_seqlens, anchors=anchors, steps=steps)
    if needs.q or needs.g or steps is not None and steps.dD is not None:
        as_dq = setting._replace(role='dq')
        if hopper and hopper.pairs:
            dq, _, w, *_ = at_once(Operands(q, k, v, gates, state, **common), do, as_dq)
        else:
            operands = Operands(do, v, k, gates, transposed(state), x=q if needs.g else None, **common)
            dq, w, y, *_ = run(operands, as_dq)
            del operands
        dq = sum_heads(dq, q) if needs.q else None
    setting = setting._replace(reverse=True)
    if at_once:
        if needs.k or needs.v or needs.g or needs.initial_state:
            operands = Operands(q, k, v, gates, dstate, dh0, **common)
            dk, dv, z, pairs, s_ds = at_once(operands, do, setting._replace(role='dk_dv'))
            y = pairs if y is None else y
            dk = sum_heads(dk, k) if needs.k else None
    else:
        if needs.k or needs.g:
            operands = Operands(v, do, q, gates, transposed(dstate), x=k if needs.g else None, **common)
            dk, z, y, s_ds = run(operands, setting._replace(role='dk'))
            del operands
            dk = sum_heads(dk, k) if needs.k else None
        del common, anchors
        if needs.v or needs.initial_state:
            operands = Operands(k, q, do, gates, dstate, dh0, cu_seqlens=cu_seqlens)
            dv, *_ = run(operands, setting._replace(role='dv'))
    if needs.g:
        dg = gate_gradient(GateParts(w, y, z, s_ds), inputs, setting, BT, steps)
    return Gradients(dq, dk, dv, dg, dh0)


@device_pass
def forward_pass(inputs: Inputs, options: Options, hopper: Sweeps | None):
    """o, the final state or None, and the sums of the gates or None."""
    c = None if hopper else sweep_gates(inputs)
    final_state = final_states(inputs, options)
    setting = Setting(options.scale, precision=options.precision)
    o = outputs(inputs, (inputs.initial_state, final_state), c, hopper, setting)
    return o, final_state, c


@device_pass
def backward_pass(tensors: tuple, needs: Gradients, options: Options) -> Gradients:
    inputs, (c, do, dht) = Inputs(*tensors[:8]), tensors[8:]
    h0 = inputs.initial_state
    dh0 = empty(h0, *h0.shape) if needs.initial_state else None
    return gradients(inputs, (h0, dht, dh0), c, do, needs, Setting(options.scale, precision=options.precision))


def forward(inputs: Inputs, plan: Plan) -> Results:
    o, final_state, c = forward_pass(inputs, plan.options, plan.once(sweeps_for, *inputs[:3]), plan=plan)
    return Results(o, final_state, gates=c)


def backward(inputs: Inputs, kept: tuple, given: tuple, needs: Gradients, plan: Plan) -> tuple:
    (_, c), (do, dht) = kept, given
    do = as_taken(do, plan.once(sweeps_for, *inputs[:3]) is not None)
    return backward_pass((*inputs, c, do, dht), needs, plan.options)


def naive(inputs: Inputs, options: Options):
    q, k, v, g, initial_state, cu_seqlens, *_ = inputs
    scale, output, _, chunk_size, _ = options
    return naive_chunk_simple_gla(q, k, v, g, initial_state, output, chunk_size, scale, cu_seqlens=cu_seqlens)


mode = Mode('fused_chunk', forward, backward, naive)


def fused_chunk_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    g_gamma: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    state_v_first: bool = False,
    *,
    state_indices: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Simple Gated Linear Attention in one sweep over each sequence: for training, and for reading prompts.

    For each sequence and head::

        S_t = exp(g_t) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    The sweep goes chunk by chunk. A sequence's results do not depend on what else is in the batch. Products are
    computed in the inputs' dtype and summed in fp32; fp32 inputs are computed to fp32 accuracy, or in TF32 where
    `torch.set_float32_matmul_precision` allows it. In fp16 no state may exceed 65504: use bf16 where one would, or a
    smaller v. Differentiable in q, k, v, g, g_gamma and initial_state, once. CPU tensors are computed by
    `naive_chunk_simple_gla`.

    Args:
        q: queries `[B, T, HK, K]` in bfloat16, float16 or float32 (on the CPU float64 too), K from 1 to 512.
        k: keys, of q's shape and dtype.
        v: values `[B, T, H, V]` in q's dtype, V from 1 to 512, H a multiple of HK. Head h reads q and k of head
            `h // (H // HK)`.
        g: log decay of each token and head (natural logarithm) `[B, T, H]`, of any floating dtype. `-inf` resets the
            state. A positive gate is allowed as long as all decays and the result are finite in fp32.
        g_gamma: log decay of each head `[H]`, in place of g. With neither, nothing decays.
        scale: factor of the products `q . k`. Default: `K ** -0.5`.
        initial_state: the state before the first token, `[N, H, K, V]`, of any floating dtype. N is the number of
            sequences: B, or with `cu_seqlens` the number of packed ones. Default: zeros.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: `[N + 1]`, int32 or int64: sequence n is the tokens from `cu_seqlens[n]` to `cu_seqlens[n + 1]` of a
            batch of one. It starts at 0, never decreases, and stays on the device. Tokens in no sequence get zeros. On
            the GPU its contents are not checked: bounds are moved into 0..T, and a sequence that would end before it
            begins is empty.
        state_v_first: states are `[N, H, V, K]`.
        state_indices: `[N]`, int32 or int64. initial_state is then a pool `[P, H, K, V]` (`[P, H, V, K]` with
            state_v_first) in fp32, bf16 or fp16, and sequence n has the state in slot `state_indices[n]`. It is read
            there and replaced by the final state, in place. No other slot is touched. -1 marks padding: a sequence
            without a state, whose outputs are zero. An index of P and above is padding too; on the CPU it is an error.
            What two equal indices do is undefined; on the CPU they are an error. Nothing may need gradients.

    Returns:
        o `[B, T, H, V]` in q's dtype, and the final state in fp32 (fp64 for fp64 inputs) or None. With state_indices
        the second is the pool.

    Raises:
        TypeError: an argument has a wrong type or dtype, or is unknown.
        ValueError: an argument has a wrong shape, device, value or contents, or excludes another.

    The message names the argument, and nothing has been computed by then.

    Source: Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv:2312.06635), with
    the scalar gate of Dao and Gu, Transformers are SSMs (arXiv:2405.21060).

    Example::

        >>> import torch
        >>> from fla_simple_gla import fused_chunk_simple_gla
        >>> q, k, v = torch.randn(3, 1, 100, 4, 64)
        >>> g = torch.nn.functional.logsigmoid(torch.randn(1, 100, 4))
        >>> o, state = fused_chunk_simple_gla(q, k, v, g, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 4, 64]), torch.Size([1, 4, 64, 64]))
        >>> # the same tokens as two packed sequences of 30 and 70
        >>> cu_seqlens = torch.tensor([0, 30, 100])
        >>> o, states = fused_chunk_simple_gla(q, k, v, g, output_final_state=True, cu_seqlens=cu_seqlens)
        >>> states.shape
        torch.Size([2, 4, 64, 64])
    """
    return mode(Call(
        q, k, v, g, g_gamma, initial_state, cu_seqlens, state_indices, None, None, scale, output_final_state,
        state_v_first,
    ))  # fmt: skip
