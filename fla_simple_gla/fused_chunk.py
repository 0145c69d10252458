"""Simple GLA in one sweep over each sequence, in chunks: the state never leaves the registers.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T
    o_t = scale * S_t^T q_t

A program owns one head of one sequence and a tile of V columns, and walks the chunks in order. With c the running sum of the gates
in a chunk of C tokens and S the state before it:

    o_i = scale * (sum_{j<=i} exp(c_i - c_j) (q_i . k_j) v_j  +  exp(c_i) S^T q_i)
    S'  = exp(c_C) S + sum_j exp(c_C - c_j) k_j v_j^T

The gradients are three more sweeps by the same kernel, with other tensors in the roles of q, k and v:

    role     q    k    v     state                out
    forward  q    k    v     S    [K, V]          o
    dq       do   v    k     S^T  [V, K]          dq
    dk       v    do   q     dS^T [V, K], back    dk
    dv       k    q    do    dS   [K, V], back    dv

A sweep back in time starts from the gradient of the final state and leaves that of the initial one. The state there is
dS = sum scale * q do^T: the scale is part of it, while the forward state has none.

For dg the sweeps for dq and dk also leave q . dq and k . dk, from the fp32 accumulators, the latter as two parts, of the pairs inside a
chunk and of the carried state, and every few chunks the product of the S before a chunk with the dS behind it (`_gates.py` says
why and how they add up). The products q_i . dq_i and k_j . dk_j share the terms of the pairs inside a chunk, and both sweeps round
the same decayed do_i . v_j, so that these cancel to fp32 accuracy.
"""

import functools
import os
from typing import NamedTuple

import torch

from ._blocks import block_bounds, count_numbers, count_sequences, count_slots, first_slot, is_sequence, sequence_bounds, state_slot
from ._gates import anchor_tokens, chunk_gates, gate_gradient
from ._launch import empty, launcher, plan_for, recorded
from ._layout import is_hopper, load_rows, open_rows, rows_in_place, store_rows, sum_heads, transposed, use_descriptors
from ._operators import Operators, apply, goes_by_operator, way_of
from ._pool import in_pool
from ._triton import jit, runs_kernels, tl, triton
from ._validation import check_no_gradients, under_autocast
from .naive import naive_chunk_simple_gla


@jit(do_not_specialize=['N', 'T', 'P', 'segment', 'part', 'c_part', 'blocks', 'scale'])
def sweep_kernel(
    q, k,  # [B, T, H // GQ, K], any strides with contiguous rows
    v,  # [B, T, H // GV, V], likewise
    c,  # [1 or 2, chunk slots, H, BT]: running sums of the gates, or None
    state_in,  # [N, H, K, V], or with indices [slots, H, K, V], of segments [segment slots, H, K, V], any strides, or None
    o,  # [B, T, H, V]
    state_out,  # [N, H, K, V], or with indices [slots, H, K, V], any strides, or None
    x,  # [B, T, H // GV, V], or None
    x_o,  # [NV, B, H, T]: rows x . o, over the V tile; back in time with what of o comes from pairs inside a chunk
    x_inter,  # [NV, B, H, T]: the same with what comes from the carried state, back in time only
    anchors,  # [blocks + N, H, K, V]: states before some chunks (`_gates.py`), left forward in time and read back in time
    s_ds,  # [NV, blocks + N, H]: <anchor, state behind the chunk>, over the V tile, back in time only
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
    c_part,  # chunk slots * H * BT
    blocks,  # anchor blocks
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
):
    """o and the last state of one head of one sequence, or of one segment of it, in BV columns of V."""
    NV: tl.constexpr = (V + BV - 1) // BV
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
    a_slot = first_slot(cu_seqlens, i_n, bos, T, BA)
    c_slot = first_slot(cu_seqlens, i_n, bos, T, BT) + (first - bos) // BT

    r = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
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
        c += (c_slot.to(tl.int64) * H + i_h) * BT

    if state_in is not None:
        p_s = state_in + (i_s.to(tl.int64) if SEGMENTS else i_p) * si_n + i_h * si_h
        p_s += o_k.to(tl.int64)[:, None] * si_k + o_v.to(tl.int64)[None, :] * si_v
        b_s = tl.load(p_s, mask=m_s, other=0.0).to(tl.float32)
    else:
        b_s = tl.zeros([BK, BV], tl.float32)

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
                i_a = tl.where(ends_block, a_slot + n_c // (BA // BT), blocks + i_n).to(tl.int64)
                p_a = anchors + i_a * (H * K * V)
                if REVERSE:
                    b_a = tl.load(p_a, mask=m_s, other=0.0).to(tl.float32)
                    tl.store(s_ds + i_a * H, tl.sum(b_a * b_s))
                else:
                    tl.store(p_a, b_s.to(anchors.dtype.element_ty), mask=m_s)

        b_o = tl.dot(b_q, b_s.to(b_q.dtype), input_precision=PRECISION)
        b_p = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
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
            b_s *= tl.exp2(c_end)
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
        b_s = tl.dot(tl.trans(b_k), b_d, b_s, input_precision=PRECISION)

    if state_out is not None:
        # the last segment's; a sequence without tokens has no segment, and then the combine leaves its state
        if (first == bos if REVERSE else end == eos):
            p_out = state_out + i_p * so_n + i_h * so_h + o_k.to(tl.int64)[:, None] * so_k + o_v.to(tl.int64)[None, :] * so_v
            tl.store(p_out, b_s, mask=m_s)


class Config(NamedTuple):
    """How a sweep is cut: chunks of BT tokens, BV columns of V and `warps` to a program, loads `stages` chunks deep."""

    BT: int
    BV: int
    warps: int
    stages: int


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
# A V tile has rows of 128 bytes there: with shorter ones the wgmma operands of triton 3.6 can be read past the end of the shared
# memory, and some kernels failed (https://github.com/triton-lang/triton/issues/11366, seen up to triton 3.7.1).
#
# The others were only compiled, for sm_80: in 16 bits nothing spills up to D 128, and no kernel needs over 64 KiB of shared memory.
HOPPER = {
    2: {64: Config(64, 64, 4, 3), 128: Config(64, 64, 4, 2), 256: Config(64, 64, 4, 1), 512: Config(64, 64, 8, 1)},
    4: {64: Config(64, 32, 4, 2), 128: Config(64, 32, 4, 1), 256: Config(16, 32, 4, 1), 512: Config(16, 32, 8, 1)},
}
OTHERS = {
    2: {64: Config(32, 64, 4, 2), 128: Config(32, 32, 4, 2), 256: Config(32, 32, 8, 1), 512: Config(16, 16, 8, 1)},
    4: {64: Config(32, 32, 4, 2), 128: Config(16, 16, 4, 1), 256: Config(16, 16, 8, 1), 512: Config(16, 16, 8, 1)},
}


@functools.cache
def sweep_config(K: int, V: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Configuration of a sweep with a state `[K, V]`.

    The chunks are the same for `[V, K]`: all four sweeps of a call use the same sums of gates.
    """
    table = (HOPPER if is_hopper(device) else OTHERS)[dtype.itemsize]
    by_rows, by_both = (table[max(64, triton.next_power_of_2(dim))] for dim in (K, max(K, V)))
    return by_rows._replace(BT=by_both.BT)


def sweep_gates(q: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> torch.Tensor | None:
    """The sums of the gates in the chunks of the sweeps."""
    if g is None:
        return None
    BT = sweep_config(q.shape[-1], v.shape[-1], q.dtype, q.device).BT
    return chunk_gates(g, BT, q.dtype == torch.float32, cu_seqlens)


@launcher
def launch_sweep(
    q, k, v, c, state_in, o, state_out, x, x_o, x_inter, anchors, s_ds, cu_seqlens, indices,
    scale, slots, segment, BA, reverse, tma, precision,
):
    B, T, HQ, K = q.shape
    HV, V = v.shape[2:]
    H = max(HQ, HV)
    BT, BV, warps, stages = sweep_config(K, V, q.dtype, q.device)
    args = (
        q, k, v, c, state_in, o, state_out, x, x_o, x_inter, anchors, s_ds, cu_seqlens, indices,
        scale, count_sequences(B, cu_seqlens), T, 0 if indices is None else state_out.shape[0], segment or 0,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *((0, 0, 0) if x is None else x.stride()[:3]),
        *((0,) * 4 if state_in is None else state_in.stride()), *((0,) * 4 if state_out is None else state_out.stride()),
        B * H * T, 0 if c is None else c[0].numel(), count_slots(B, T, BA, cu_seqlens),
    )
    constants = dict(
        H=H, GQ=H // HQ, GV=H // HV, K=K, V=V,
        BT=BT, BK=max(16, triton.next_power_of_2(K)), BV=BV, BA=BA,
        REVERSE=reverse, SEGMENTS=segment is not None, TWO_PARTS=c is not None and c.shape[0] == 2,
        TMA=tma, PRECISION=precision, STAGES=stages, num_warps=warps,
    )
    return sweep_kernel, (slots * H * triton.cdiv(V, BV), 1, 1), args, constants


def sweep(
    q, k, v, c, scale, cu_seqlens, precision, *, segment=None, state_in=None, state_out=None, indices=None, x=None, anchors=None, BA=1,
    reverse=False,
):
    """One sweep over each sequence, or over each of its segments, which then have a state_in of their own: `o`, and with x
    also the rows `x . o [NV, B, H, T]`; or, back in time, these in two parts, of the carried state and of pairs inside a chunk, and
    `<anchor, state> [NV, blocks + N, H]`, for anchor blocks of BA tokens.

    H is the number of heads of the states, of which each of q and k, and of v and x, have it or a divisor of it.
    """
    B, T, HQ, K = q.shape
    HV, V = v.shape[2:]
    H = max(HQ, HV)
    o = empty(q, B, T, H, V)
    x_o = x_inter = s_ds = None
    if x is not None:
        NV = triton.cdiv(V, sweep_config(K, V, q.dtype, q.device).BV)
        x_o = empty(q, NV, B, H, T, dtype=torch.float32)
        if reverse:
            x_inter = empty(x_o, *x_o.shape)
            s_ds = empty(q, NV, anchors.shape[0], H, dtype=torch.float32)
    slots = count_numbers(B, cu_seqlens) if segment is None else count_slots(B, T, segment, cu_seqlens)
    if slots:
        tma = use_descriptors(q, k, v, o, x)
        tensors = q, k, v, c, state_in, o, state_out, x, x_o, x_inter, anchors, s_ds, cu_seqlens, indices
        launch_sweep(tensors, scale, slots, segment, BA, reverse, tma, precision)
    return (o, x_inter, x_o, s_ds) if reverse else (o, x_o, None, None)


# With which versions of triton the sweeps of `_hopper.py` were compiled; they ran on 3.6. Gluon changes from one to the next.
GLUON = ('3.6', '3.7', '3.8', '3.9')


@functools.cache
def hopper_sweeps(device: torch.device):
    """The module of the sweeps for Hopper, on one, if they are not turned off."""
    if not is_hopper(device) or os.environ.get('FLA_SIMPLE_GLA_HOPPER') == '0':
        return None
    if '.'.join(triton.__version__.split('.')[:2]) not in GLUON:
        return None
    from . import _hopper
    return _hopper


def hopper_module(K: int, V: int, dtype: torch.dtype, device: torch.device):
    """The module of the sweeps for Hopper for such states, if there is one."""
    module = hopper_sweeps(device)
    if module is None or dtype.itemsize != 2 or K % 8 or V % 8 or max(K, V) > 256:
        return None
    if max(K, V) <= 128:
        return module
    # the ptxas of 3.9 puts a wait behind every product of the wide ones (C7512)
    if triton.__version__.startswith('3.9'):
        return None
    from . import _hopper_wide
    return _hopper_wide


def hopper_for(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: torch.Tensor):
    """The module of the sweeps for Hopper if they take these tensors."""
    module = hopper_module(q.shape[-1], v.shape[-1], q.dtype, q.device)
    if module is None or not hopper_sweeps(q.device).takes(q, k, v, *others):
        return None
    return module


def new_states(q, v, cu_seqlens):
    """A tensor for the final states."""
    return empty(q, count_sequences(q.shape[0], cu_seqlens), v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


def outputs(
    q, k, v, g, c, state, cu_seqlens, hopper, scale, output_final_state, precision, segment=None, pool=None, indices=None, final_state=None,
):
    """`o`, and the final state or None, from the states that the sequences or their segments start with. With indices the final states go
    to these slots of the pool, which is returned.

    c are the sums of the gates; the sweeps for Hopper do without. hopper is `hopper_for(q, k, v)`. final_state is where the final states
    go, if there is a tensor for them already.
    """
    if indices is not None:
        final_state = pool
    elif output_final_state and final_state is None:
        final_state = new_states(q, v, cu_seqlens)
    options = dict(segment=segment, state_in=state, state_out=final_state, indices=indices)
    if hopper:
        o, *_ = hopper.sweep(q, k, v, g, scale, cu_seqlens, **options)
    else:
        o, *_ = sweep(q, k, v, c, scale, cu_seqlens, precision, **options)
    return o, final_state


def gradients(q, k, v, g, c, do, initial_state, state, dstate, cu_seqlens, needs, scale, precision, segment=None, dh0=None):
    """dq and dk for each head of v, dv, dg and dh0, each if it is needed, from the states that the sequences or their segments start
    with, and from the gradients of those that they end with. dh0 is where the last goes, if there is a tensor for it already.
    """
    need_q, need_k, need_v, need_g, need_h0 = needs
    B, T, H, V = v.shape
    K = q.shape[-1]
    hopper = hopper_for(q, k, v, do)
    # Where dk and dv are made one after the other they have the memory of dv for more anchors. Wide states need them: with 384 tokens the
    # error of dg was 7.6e-3 at K 256, V 160.
    one_reverse_sweep = hasattr(hopper, 'reverse_sweep')
    BA = anchor_tokens(segment, 384 if one_reverse_sweep else 256)
    anchors = None
    dq = dk = dv = dg = y = None
    if need_g:
        size = hopper.anchor_size(K, V) if hopper else K * V
        anchors = empty(q, count_slots(B, T, BA, cu_seqlens) + count_sequences(B, cu_seqlens), H, size)
    if need_h0 and dh0 is None:
        dh0 = empty(initial_state, *initial_state.shape)

    if hopper:
        BT = hopper.CHUNK
        run = functools.partial(hopper.sweep, g=g)
    else:
        if c is None and g is not None:
            c = sweep_gates(q, v, g, cu_seqlens)
        BT = 0 if c is None else c.shape[-1]
        run = functools.partial(sweep, c=c, precision=precision)
    run = functools.partial(run, scale=scale, cu_seqlens=cu_seqlens, segment=segment, BA=BA)
    if need_q or need_g:
        dq, w, y, *_ = run(do, v, k, state_in=transposed(state), x=q if need_g else None, anchors=anchors)
    if one_reverse_sweep:
        if need_k or need_v or need_g or need_h0:
            dk, dv, z, s_ds = hopper.reverse_sweep(
                q, k, v, g, do, scale, cu_seqlens, segment=segment, state_in=dstate, state_out=dh0, anchors=anchors, BA=BA,
            )
    else:
        if need_k or need_g:
            dk, z, pairs, s_ds = run(v, do, q, state_in=transposed(dstate), x=k if need_g else None, anchors=anchors, reverse=True)
            y = pairs if y is None else y
        anchors = None
        if need_v or need_h0:
            dv, *_ = run(k, q, do, state_in=dstate, state_out=dh0, reverse=True)
    if need_g:
        dg = gate_gradient(g, w, y, z, s_ds, BA, BT, q.dtype, initial_state is not None, cu_seqlens, segment)
    return dq, dk, dv, dg, dh0


@recorded
def forward_pass(q, k, v, g, initial_state, cu_seqlens, indices, hopper, scale, output_final_state, precision):
    c = None if hopper else sweep_gates(q, v, g, cu_seqlens)
    pool = initial_state
    results = outputs(
        q, k, v, g, c, initial_state, cu_seqlens, hopper, scale, output_final_state, precision, pool=pool, indices=indices,
    )
    return *results, c


@recorded
def backward_pass(q, k, v, g, c, do, initial_state, dht, cu_seqlens, needs, scale, precision):
    return gradients(q, k, v, g, c, do, initial_state, initial_state, dht, cu_seqlens, needs, scale, precision)


def forward(q, k, v, g, plan, initial_state, output_final_state, cu_seqlens, indices=None):
    """What `forward_pass` returns, and how fp32 products were computed; q, k and v have rows in place."""
    precision = fp32_precision(q.dtype)
    hopper = plan.once(hopper_for, q, k, v)
    tensors = q, k, v, g, initial_state, cu_seqlens, indices
    return *forward_pass(tensors, hopper, plan.scale, output_final_state, precision, plan=plan), precision


def backward(q, k, v, g, c, do, h0, dht, cu_seqlens, needs, scale, precision):
    do = torch.zeros_like(v) if do is None else rows_in_place(do)
    dq, dk, dv, dg, dh0 = backward_pass((q, k, v, g, c, do, h0, dht, cu_seqlens), needs, scale, precision)
    return sum_heads(dq, q), sum_heads(dk, k), dv, dg, dh0


class FusedChunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, plan, initial_state, output_final_state, cu_seqlens):
        q, k, v = map(rows_in_place, (q, k, v))
        o, final_state, c, precision = forward(q, k, v, g, plan, initial_state, output_final_state, cu_seqlens)
        ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens)
        # c is small, and no saved tensor: the operator has none either
        ctx.c, ctx.scale, ctx.precision = c, plan.scale, precision
        ctx.set_materialize_grads(False)
        return o, final_state

    @staticmethod
    def backward(ctx, do, dht):
        q, k, v, g, h0, cu_seqlens = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:4], ctx.needs_input_grad[5])
        if goes_by_operator(do, dht):
            dq, dk, dv, dg, dh0 = operators.gradients(q, k, v, g, h0, cu_seqlens, None, do, dht, ctx.scale, False, needs)
        else:
            dq, dk, dv, dg, dh0 = backward(q, k, v, g, ctx.c, do, h0, dht, cu_seqlens, needs, ctx.scale, ctx.precision)
        return dq, dk, dv, dg, None, dh0, None, None


def forward_of_operator(q, k, v, g, initial_state, cu_seqlens, scale, output_final_state, _):
    q, k, v = map(rows_in_place, (q, k, v))
    plan = plan_for(q, k, v, g, None, scale, initial_state, cu_seqlens)
    o, final_state, *_ = forward(q, k, v, g, plan, initial_state, output_final_state, cu_seqlens)
    return o, final_state, None


def backward_of_operator(q, k, v, g, initial_state, cu_seqlens, _, do, dht, scale, reverse, needs):
    q, k, v = map(rows_in_place, (q, k, v))
    return backward(q, k, v, g, None, do, initial_state, dht, cu_seqlens, tuple(needs), scale, fp32_precision(q.dtype))


def in_place(forward, q, k, v, g, pool, cu_seqlens, indices, _, scale, output, reverse, state_v_first, plan=None):
    """`o`, and None; the pool gets the final states. `forward` is that of a mode."""
    plan = plan or plan_for(q, k, v, g, None, scale, pool, cu_seqlens, state_v_first, indices)
    pool = transposed(pool, state_v_first)
    if runs_kernels(q):
        o, *_ = forward(*map(rows_in_place, (q, k, v)), g, plan, pool, True, cu_seqlens, indices)
        torch.autograd.graph.increment_version(pool)
    else:
        o = in_pool(functools.partial(naive_chunk_simple_gla, q, k, v, g, scale=scale, cu_seqlens=cu_seqlens), pool, indices, cu_seqlens)
    return o, None


def naive(q, k, v, g, initial_state, cu_seqlens, scale, output_final_state, reverse=False, chunk_size=64):
    return naive_chunk_simple_gla(q, k, v, g, initial_state, output_final_state, chunk_size, scale, cu_seqlens=cu_seqlens)


operators = Operators('fused_chunk', forward_of_operator, backward_of_operator, naive, functools.partial(in_place, forward))


def compute(
    function, operators, forward, q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens, state_v_first, state_indices,
    chunk_size=64,
):
    """A call of a mode, by the way that its tensors ask for."""
    q, k, v = under_autocast(q, k, v)
    plan = plan_for(q, k, v, g, g_gamma, scale, initial_state, cu_seqlens, state_v_first, state_indices)
    way = way_of(plan, q, k, v, g, g_gamma, initial_state)
    if state_indices is not None:
        check_no_gradients(q=q, k=k, v=v, g=g, g_gamma=g_gamma, initial_state=initial_state)
    if g_gamma is not None:
        g = g_gamma.expand(v.shape[:3])
    if state_indices is not None:
        arguments = q, k, v, g, initial_state, cu_seqlens, state_indices, None, plan.scale, True, False, state_v_first
        o, _ = operators.write(*arguments) if way == 'operators' else in_place(forward, *arguments, plan)
        return o, initial_state
    h0 = transposed(initial_state, state_v_first)
    if way == 'kernels':
        o, ht = apply(function, plan, q, k, v, g, plan, h0, output_final_state, cu_seqlens)
    elif way == 'operators':
        o, ht = operators(q, k, v, g, h0, cu_seqlens, plan.scale, output_final_state)
    else:
        o, ht = naive(q, k, v, g, h0, cu_seqlens, plan.scale, output_final_state, chunk_size=chunk_size)
    return o, transposed(ht, state_v_first)


def fp32_precision(dtype: torch.dtype) -> str | None:
    """How fp32 products are computed: to fp32 accuracy, or in tf32 where the user has allowed it in PyTorch."""
    if dtype != torch.float32:
        return None
    matmul = torch.backends.cuda.matmul
    # since torch 2.9 there is a new setting, which follows the older ones, while these raise once it was used
    if matmul.fp32_precision == 'tf32' if hasattr(matmul, 'fp32_precision') else matmul.allow_tf32:
        return 'tf32'
    return 'ieee' if torch.version.hip else 'tf32x3'


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
    r"""Simple Gated Linear Attention in one sweep over each sequence, chunk by chunk: for training, and for reading prompts.

        S_t = exp(g_t) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    Products are computed in the inputs' dtype and summed in fp32; fp32 inputs are computed to fp32 accuracy, or in TF32 where
    `torch.set_float32_matmul_precision` allows it. A sequence's results do not depend on what else is in the batch.
    Differentiable in q, k, v, g, g_gamma and initial_state, once. CPU tensors are computed by `naive_chunk_simple_gla`.

    Args:
        q: queries `[B, T, HK, K]`, in bfloat16, float16 or float32, with K from 1 to 512.
        k: keys, of q's shape and dtype.
        v: values `[B, T, H, V]` in q's dtype, V from 1 to 512, H a multiple of HK: head h reads q and k of head `h // (H // HK)`.
        g: log decay per token and head (natural logarithm) `[B, T, H]`, of any floating dtype. `-inf` resets the state. A positive
            gate is allowed as long as the result is finite.
        g_gamma: log decay per head `[H]`, instead of g. With neither, nothing decays.
        scale: factor of the products `q . k`. Default: `K ** -0.5`.
        initial_state: the state before the first token, `[N, H, K, V]`, of any floating dtype, N the number of sequences (B
            without `cu_seqlens`). Default: zeros.
        output_final_state: whether to return the state behind the last token.
        cu_seqlens: `[N + 1]`, int32 or int64: sequence n is the tokens from `cu_seqlens[n]` to `cu_seqlens[n + 1]` of a batch of one.
            It starts at 0, never decreases and stays on the device. Tokens behind the last sequence get zeros.
        state_v_first: states are `[N, H, V, K]`.
        state_indices: `[N]`, int32 or int64: initial_state is then a pool `[P, H, K, V]` (`[P, H, V, K]` with state_v_first) in fp32, bf16
            or fp16, of which sequence n has the state in slot `state_indices[n]`. It is read there and replaced by the final state, in
            place; no other slot is touched. -1 marks padding: a sequence without a state, whose outputs are zero. What two
            equal indices or one of P and above do is undefined. Nothing may need gradients.

    Returns:
        o `[B, T, H, V]` in q's dtype, and the final state in fp32, or None; with state_indices the pool.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or device, or excludes another; before any kernel starts.

    Source: Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv:2312.06635), with the scalar
    gate of Dao and Gu, Transformers are SSMs (arXiv:2405.21060).

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
    return compute(
        FusedChunk, operators, forward, q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens, state_v_first,
        state_indices,
    )
