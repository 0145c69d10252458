"""The sweeps of `fused_chunk.py` on Hopper where K or V is over 128, up to 256; `_hopper.py` has those of smaller dims.

The state of a head does not fit in the registers of one multiprocessor. So a program takes 128 columns of V, and another one, which runs
at the same time and finds q and k in the L2 cache, takes the rest: the grid is [programs, halves of V]. In a program

- `load` brings the tiles of the next chunks to shared memory (TMA),
- `gates` sums the gates of the next chunks,
- `products` makes the decayed products inside a chunk, P_ij = scale * exp(c_i - c_j) (q_i . k_j),
- `state`, twice, one warp group for 64 columns of V, keeps these columns of the state in registers, transposed, and adds up o,
- `row_sums` adds up what these two leave of x . o.

One kernel makes all four sweeps, in either direction: o, dq, dk and dv, with the roles that `fused_chunk.py` describes. For dg the
sweep for dq leaves w and anchors, and the one for dk z, y and what the anchors give (`_gates.py`): as in the plain sweeps, w is the whole
of q . dq, and y what of k . dk comes from pairs inside a chunk. Apart, as the sweeps of smaller dims take the pairs, they would need one
more product, for which the warp group of the products has neither the time nor the registers.

A warp group holds its 64 columns of the state as four tensors [64 of V, 64 of K]: they are converted for the tensor cores, multiplied
and waited for one after the other, as the registers have no room for a copy of the whole.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ._blocks import count_sequences, count_slots, is_sequence, state_slot
from ._hopper import (
    BS,
    CHUNK,
    C,
    advance,
    anchor_of,
    buffers,
    clear,
    count_units,
    descriptor,
    fragment_indices,
    gates,
    here,
    prefetch,
    row_sums,
    store_sum,
    strides,
    takes,
    tile,
    tma_load,
    tma_store,
    to_fragments,
    unit_bounds,
)
from ._launch import launcher
from ._layout import multiprocessors
from ._passes import empty

__all__ = ['CHUNK', 'anchor_size', 'sweep', 'takes']

BK = gl.constexpr(256)  # K, padded
BV = gl.constexpr(128)  # columns of V to a program
PIECE = gl.constexpr(64)  # columns of K to a tensor of the state: as many as a chunk has tokens
# Every buffer that is filled chunk by chunk is there twice, or once. So one index, i, serves all of those that are there twice, and is
# the phase of those that are there once.
STAGES = gl.constexpr(2)
ROWS = gl.constexpr(16)  # partial sums of a warp group to a token


@gluon.jit
def chunk_start(i, NT, REVERSE: gl.constexpr):
    """First token of the chunk that a sweep comes to after i others, counted from that of the unit."""
    return ((NT - 1 - i) if REVERSE else i) * C


@gluon.jit
def fold(x):
    """x [64, N], in the layout of a product, with every four rows added up: within a thread, and with one other."""
    N: gl.constexpr = x.shape[1]
    return gl.sum(gl.sum(x.reshape([4, 2, 2, 4, N]), 1), 1).reshape([ROWS, N])


@gluon.jit
def load(
    work, descs, tiles, bars, x_bars, anchor,
    H: gl.constexpr, GQ: gl.constexpr, GV: gl.constexpr, V: gl.constexpr, BA: gl.constexpr,
    SEGMENTS: gl.constexpr, REVERSE: gl.constexpr, X: gl.constexpr,
):
    cu_seqlens, indices, units, N, T, P, segment = work
    anchors, s_ds, blocks = anchor
    desc_q, desc_k, desc_v, desc_x = descs
    qs, ks, vs, xs = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    x_full, x_empty = x_bars
    i_v = gl.program_id(1) * BV
    i = 0
    phase = 1
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        _, i_h, i_b, i_n, first, end, bos, eos = unit_bounds(cu_seqlens, indices, unit, N, T, P, segment, H, SEGMENTS)
        NT = (end - first + C - 1) // C
        for n in range(NT):
            i_t = chunk_start(n, NT, REVERSE)
            mbarrier.wait(q_empty.index(i), phase)
            if X and REVERSE:
                wanted, i_a = anchor_of(cu_seqlens, blocks, i_t // C, i_n, first, bos, eos, T, BA)
                if wanted:
                    prefetch(anchors + half_anchor(i_a, i_h, H, V), 2 * BK * BV)
            mbarrier.expect(q_full.index(i), C * BK * 2)
            tma_load(desc_q, tile(cu_seqlens, i_b, i_h // GQ, first, end, i_t, 0), q_full.index(i), qs.index(i))
            mbarrier.wait(k_empty.index(i), phase)
            mbarrier.expect(k_full.index(i), C * BK * 2)
            tma_load(desc_k, tile(cu_seqlens, i_b, i_h // GQ, first, end, i_t, 0), k_full.index(i), ks.index(i))
            mbarrier.wait(v_empty.index(i), phase)
            mbarrier.expect(v_full.index(i), C * BV * 2)
            tma_load(desc_v, tile(cu_seqlens, i_b, i_h // GV, first, end, i_t, i_v), v_full.index(i), vs.index(i))
            if X:
                mbarrier.wait(x_empty.index(0), i ^ 1)
                mbarrier.expect(x_full.index(0), C * BV * 2)
                tma_load(desc_x, tile(cu_seqlens, i_b, i_h // GV, first, end, i_t, i_v), x_full.index(0), xs.index(0))
            i, phase = advance(i, phase, STAGES)


@gluon.jit
def products(work, scale, tiles, sums, bars, H: gl.constexpr, SEGMENTS: gl.constexpr, REVERSE: gl.constexpr):
    """P of each chunk, in two halves of its columns."""
    cu_seqlens, indices, units, N, T, P, segment = work
    qs, ks, ps = tiles
    q_full, k_full, p_full, g_full = bars
    HALF: gl.constexpr = C // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    o_i = gl.arange(0, C, gl.SliceLayout(1, layout))
    o_j = gl.arange(0, HALF, gl.SliceLayout(0, layout))
    i = 0
    phase = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        _, _, _, _, first, end, _, _ = unit_bounds(cu_seqlens, indices, unit, N, T, P, segment, H, SEGMENTS)
        for _ in range(0, end - first, C):
            mbarrier.wait(q_full.index(i), phase)
            mbarrier.wait(k_full.index(i), phase)
            for j in gl.static_range(2):
                b_p = warpgroup_mma(
                    qs.index(i), ks.index(i).slice(j * HALF, HALF, dim=0).permute((1, 0)), gl.zeros([C, HALF], gl.float32, layout),
                    use_acc=False, is_async=True,
                )
                if j == 0:
                    mbarrier.wait(g_full.index(i), phase)
                c_i = sums.index(i).load(gl.SliceLayout(1, layout))
                c_j = sums.index(i).slice(j * HALF, HALF, dim=0).load(gl.SliceLayout(0, layout))
                if REVERSE:
                    before = o_i[:, None] <= o_j[None, :] + j * HALF
                    d = c_j[None, :] - c_i[:, None]
                else:
                    before = o_i[:, None] >= o_j[None, :] + j * HALF
                    d = c_i[:, None] - c_j[None, :]
                decay = gl.where(before, gl.exp2(d), 0.0) * scale
                b_p = warpgroup_mma_wait(0, (b_p,))
                ps.index(i).slice(j * HALF, HALF, dim=1).store((b_p * decay).to(ps.dtype))
            fence_async_shared()
            mbarrier.arrive(p_full.index(i), count=1)
            i, phase = advance(i, phase, STAGES)


@gluon.jit
def load_piece(p_s, strides, o_v, o_k, K, V):
    """Of a state at p_s, transposed: these columns of V and of K."""
    _, _, s_k, s_v = strides
    o_v = here(o_v)[:, None]
    o_k = here(o_k)[None, :]
    return gl.load(p_s + (o_v.to(gl.int64) * s_v + o_k.to(gl.int64) * s_k), mask=(o_v < V) & (o_k < K), other=0.0).to(gl.float32)


@gluon.jit
def store_piece(p_s, strides, o_v, o_k, b_s, K, V):
    _, _, s_k, s_v = strides
    o_v = here(o_v)[:, None]
    o_k = here(o_k)[None, :]
    gl.store(p_s + (o_v.to(gl.int64) * s_v + o_k.to(gl.int64) * s_k), b_s, mask=(o_v < V) & (o_k < K))


@gluon.jit
def load_x(xs, W: gl.constexpr, operand: gl.constexpr, layout: gl.constexpr):
    return gl.convert_layout(xs.index(0).slice(W * BS, BS, dim=1).permute((1, 0)).load(operand), layout).to(gl.float32)


@gluon.jit
def half_anchor(i_a, i_h, H: gl.constexpr, V: gl.constexpr):
    """Where the anchor of these columns of V begins. Its numbers are in the order of the threads: the same ones leave and read it."""
    # a constant: that the grid knows it too costs a load from local memory, which waits for the L2 cache
    HALVES: gl.constexpr = (V + BV - 1) // BV
    return ((i_a.to(gl.int64) * H + i_h) * HALVES + gl.program_id(1)) * (BK * BV)


@gluon.jit
def leave_anchor(p, b_s):
    # the compiler must not see that the same is converted for the next product, and keep it for that
    b_s = gl.inline_asm_elementwise('mov.b32 $0, $1;', '=f,f', [b_s], dtype=gl.float32, is_pure=False, pack=1)
    b_s = to_fragments(b_s.to(p.dtype.element_ty))
    t, x = fragment_indices(b_s.shape[1])
    gl.store(p + ((x // 8 * 128 + t) * 8 + x % 8), b_s)


@gluon.jit
def load_anchor(p):
    t, x = fragment_indices(PIECE // 2)
    return gl.load(p + ((x // 8 * 128 + t) * 8 + x % 8))


@gluon.jit
def times_anchor(b_a, b_s):
    """Sums of each thread."""
    return gl.sum(b_a.to(gl.float32) * to_fragments(b_s), 1)


@gluon.jit
def state(
    work, states, anchor, desc_o, tiles, gate_bufs, bars, x_bufs, x_bars,
    W: gl.constexpr, H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BA: gl.constexpr,
    SEGMENTS: gl.constexpr, REVERSE: gl.constexpr, X: gl.constexpr,
):
    cu_seqlens, indices, units, N, T, P, segment = work
    state_in, state_out, si, so = states
    anchors, s_ds, blocks = anchor
    qs, ks, vs, ps, os = tiles
    sums, from_start, to_end, decays = gate_bufs
    q_full, q_empty, k_full, k_empty, v_full, v_empty, p_full, p_empty, g_full = bars
    xs, partial = x_bufs
    x_full, x_empty, s_full, s_empty = x_bars
    dtype: gl.constexpr = qs.dtype
    # of the state transposed [BS, PIECE], and of o transposed [BS, C]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout, k_width=2)
    of_o = to_end if REVERSE else from_start
    of_v = from_start if REVERSE else to_end
    i_v = gl.program_id(1) * BV + W * BS
    o_v = i_v + gl.arange(0, BS, gl.SliceLayout(1, layout))
    o_k = gl.arange(0, PIECE, gl.SliceLayout(0, layout))
    i = 0
    phase = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        i_s, i_h, i_b, i_n, first, end, bos, eos = unit_bounds(cu_seqlens, indices, unit, N, T, P, segment, H, SEGMENTS)
        s0 = gl.zeros([BS, PIECE], gl.float32, layout)
        s1 = gl.zeros([BS, PIECE], gl.float32, layout)
        s2 = gl.zeros([BS, PIECE], gl.float32, layout)
        s3 = gl.zeros([BS, PIECE], gl.float32, layout)
        if state_in is not None:
            place = i_s.to(gl.int64) if SEGMENTS else state_slot(indices, i_n, N, P)
            p_in = state_in + place * si[0] + i_h.to(gl.int64) * si[1]
            # there is none of padding, nor of what lies in no sequence
            columns = gl.where(is_sequence(i_n, N) & (place >= 0), V, 0)
            s0 = load_piece(p_in, si, o_v, o_k, K, columns)
            s1 = load_piece(p_in, si, o_v, o_k + PIECE, K, columns)
            s2 = load_piece(p_in, si, o_v, o_k + 2 * PIECE, K, columns)
            s3 = load_piece(p_in, si, o_v, o_k + 3 * PIECE, K, columns)
        NT = (end - first + C - 1) // C
        for n in range(NT):
            i_t = chunk_start(n, NT, REVERSE)
            if X:
                wanted, i_a = anchor_of(cu_seqlens, blocks, i_t // C, i_n, first, bos, eos, T, BA)
                if wanted:
                    p_a = anchors + half_anchor(i_a, i_h, H, V) + W * (BK * BS)
                    if REVERSE:
                        # two are on their way while one is multiplied
                        a0 = load_anchor(p_a)
                        a1 = load_anchor(p_a + PIECE * BS)
                        b_a = times_anchor(a0, s0)
                        a2 = load_anchor(p_a + 2 * PIECE * BS)
                        b_a += times_anchor(a1, s1)
                        a3 = load_anchor(p_a + 3 * PIECE * BS)
                        b_a += times_anchor(a2, s2)
                        b_a += times_anchor(a3, s3)
                        i_p = gl.program_id(1) * (BV // BS) + W
                        store_sum(s_ds, b_a, i_p, i_a, i_h, blocks + N, H)
                    else:
                        leave_anchor(p_a, s0)
                        leave_anchor(p_a + PIECE * BS, s1)
                        leave_anchor(p_a + 2 * PIECE * BS, s2)
                        leave_anchor(p_a + 3 * PIECE * BS, s3)
            mbarrier.wait(q_full.index(i), phase)
            b_q = qs.index(i)
            b_o = warpgroup_mma(
                gl.convert_layout(s0.to(dtype), operand), b_q.slice(0, PIECE, dim=1).permute((1, 0)),
                gl.zeros([BS, C], gl.float32, layout), use_acc=False, is_async=True,
            )
            b_o = warpgroup_mma_wait(0, (b_o,))
            b_o = warpgroup_mma(
                gl.convert_layout(s1.to(dtype), operand), b_q.slice(PIECE, PIECE, dim=1).permute((1, 0)), b_o, is_async=True,
            )
            b_o = warpgroup_mma_wait(0, (b_o,))
            b_o = warpgroup_mma(
                gl.convert_layout(s2.to(dtype), operand), b_q.slice(2 * PIECE, PIECE, dim=1).permute((1, 0)), b_o, is_async=True,
            )
            b_o = warpgroup_mma_wait(0, (b_o,))
            b_o = warpgroup_mma(
                gl.convert_layout(s3.to(dtype), operand), b_q.slice(3 * PIECE, PIECE, dim=1).permute((1, 0)), b_o, is_async=True,
            )
            mbarrier.wait(g_full.index(i), phase)
            decay = decays.index(i).load(gl.SliceLayout(0, layout))
            s0 = s0 * decay[None, :]
            s1 = s1 * decay[None, :]
            b_o = warpgroup_mma_wait(0, (b_o,))
            s2 = s2 * decay[None, :]
            s3 = s3 * decay[None, :]
            b_o = b_o * of_o.index(i).load(gl.SliceLayout(0, layout))[None, :]
            if X and REVERSE:
                mbarrier.wait(x_full.index(0), i)
                b_x = fold(b_o * load_x(xs, W, operand, layout))
                mbarrier.wait(s_empty.index(0), i ^ 1)
                partial.index(W).store(b_x)
            mbarrier.wait(v_full.index(i), phase)
            b_v = vs.index(i).slice(W * BS, BS, dim=1).permute((1, 0))
            b_d = (b_v.load(operand).to(gl.float32) * of_v.index(i).load(gl.SliceLayout(0, operand))[None, :]).to(dtype)
            mbarrier.wait(k_full.index(i), phase)
            # whoever made P has read q and k
            mbarrier.wait(p_full.index(i), phase)
            mbarrier.arrive(q_empty.index(i), count=1)
            b_k = ks.index(i)
            b_o = warpgroup_mma(b_v, ps.index(i).permute((1, 0)), b_o, is_async=True)
            s0 = warpgroup_mma(b_d, b_k.slice(0, PIECE, dim=1), s0, is_async=True)
            s1 = warpgroup_mma(b_d, b_k.slice(PIECE, PIECE, dim=1), s1, is_async=True)
            s2 = warpgroup_mma(b_d, b_k.slice(2 * PIECE, PIECE, dim=1), s2, is_async=True)
            s3 = warpgroup_mma(b_d, b_k.slice(3 * PIECE, PIECE, dim=1), s3, is_async=True)
            b_o = warpgroup_mma_wait(4, (b_o,))
            mbarrier.arrive(v_empty.index(i), count=1)
            tma.store_wait(0)
            os.index(W).permute((1, 0)).store(b_o.to(dtype))
            fence_async_shared()
            tma_store(desc_o, tile(cu_seqlens, i_b, i_h, first, end, i_t, i_v), os.index(W))
            s0, s1, s2, s3 = warpgroup_mma_wait(0, (s0, s1, s2, s3))
            mbarrier.arrive(p_empty.index(i), count=1)
            mbarrier.arrive(k_empty.index(i), count=1)
            if X:
                if not REVERSE:
                    mbarrier.wait(x_full.index(0), i)
                b_x = fold(b_o * load_x(xs, W, operand, layout))
                if not REVERSE:
                    mbarrier.wait(s_empty.index(0), i ^ 1)
                partial.index(W + (2 if REVERSE else 0)).store(b_x)
                mbarrier.arrive(s_full.index(0), count=1)
                # not before the sums are written: see `row_sums`
                mbarrier.arrive(x_empty.index(0), count=1)
            i, phase = advance(i, phase, STAGES)
        clear(work, desc_o, os.index(W), i_b, i_n, i_h, first, eos, i_v, SEGMENTS)
        if state_out is not None:
            # the last segment's; a sequence without tokens has no segment, and then the combine leaves its state
            last = (first == bos) if REVERSE else (end == eos)
            place = state_slot(indices, i_n, N, P)
            if is_sequence(i_n, N) & (place >= 0) & last & ((first < end) if SEGMENTS else (first == bos)):
                p_out = state_out + place * so[0] + i_h.to(gl.int64) * so[1]
                store_piece(p_out, so, o_v, o_k, s0, K, V)
                store_piece(p_out, so, o_v, o_k + PIECE, s1, K, V)
                store_piece(p_out, so, o_v, o_k + 2 * PIECE, s2, K, V)
                store_piece(p_out, so, o_v, o_k + 3 * PIECE, s3, K, V)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=['units', 'N', 'T', 'P', 'segment', 'part', 'blocks', 'scale'])
def wide_sweep_kernel(
    desc_q, desc_k, desc_v, desc_o, desc_x,
    g, state_in, state_out, x_o, y, anchors, s_ds, cu_seqlens, indices,
    scale, units, N, T, P, segment, part, blocks,
    g_b, g_t, g_h,
    si_n, si_h, si_k, si_v,
    so_n, so_h, so_k, so_v,
    H: gl.constexpr, GQ: gl.constexpr, GV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BA: gl.constexpr,
    SEGMENTS: gl.constexpr, REVERSE: gl.constexpr, X: gl.constexpr,
    STATE_REGISTERS: gl.constexpr, PRODUCT_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = desc_q.dtype
    by_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BK], dtype)
    by_v: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BV], dtype)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    qs = gl.allocate_shared_memory(dtype, [STAGES, C, BK], by_k)
    ks = gl.allocate_shared_memory(dtype, [STAGES, C, BK], by_k)
    vs = gl.allocate_shared_memory(dtype, [STAGES, C, BV], by_v)
    ps = gl.allocate_shared_memory(dtype, [STAGES, C, C], square)
    os = gl.allocate_shared_memory(dtype, [2, C, BS], square)
    sums = gl.allocate_shared_memory(gl.float32, [STAGES, C], row)
    from_start = gl.allocate_shared_memory(gl.float32, [STAGES, C], row)
    to_end = gl.allocate_shared_memory(gl.float32, [STAGES, C], row)
    decays = gl.allocate_shared_memory(gl.float32, [STAGES, 1], row)
    # who arrives: the load, once; the two states; the products; the gates
    q_full = buffers(STAGES, 1)
    q_empty = buffers(STAGES, 2)
    k_full = buffers(STAGES, 1)
    k_empty = buffers(STAGES, 2)
    v_full = buffers(STAGES, 1)
    v_empty = buffers(STAGES, 2)
    p_full = buffers(STAGES, 1)
    p_empty = buffers(STAGES, 2)
    g_full = buffers(STAGES, 1)
    if X:
        xs = gl.allocate_shared_memory(dtype, [1, C, BV], by_v)
        partial = gl.allocate_shared_memory(
            gl.float32, [4 if REVERSE else 2, ROWS, C], gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0]),
        )
        x_full = buffers(1, 1)
        x_empty = buffers(1, 2)
        s_full = buffers(1, 2)
        s_empty = buffers(1, 1)
        x_o += gl.program_id(1).to(gl.int64) * part
        if REVERSE:
            y += gl.program_id(1).to(gl.int64) * part
    else:
        xs = vs
        partial = sums
        x_full = v_full
        x_empty = v_full
        s_full = v_full
        s_empty = v_full
    fence_async_shared()

    work = (cu_seqlens, indices, units, N, T, P, segment)
    states = (state_in, state_out, (si_n, si_h, si_k, si_v), (so_n, so_h, so_k, so_v))
    anchor = (anchors, s_ds, blocks)
    gate_bufs = (sums, from_start, to_end, decays)
    x_bufs = (xs, partial)
    x_bars = (x_full, x_empty, s_full, s_empty)
    tiles = (qs, ks, vs, ps, os)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, p_full, p_empty, g_full)
    product_bars = (q_full, k_full, p_full, g_full)
    load_bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    descs = (desc_q, desc_k, desc_v, desc_x)
    load_tiles = (qs, ks, vs, xs)
    # constants have to stand in these tuples themselves
    if X:
        gl.warp_specialize([
            (state, (work, states, anchor, desc_o, tiles, gate_bufs, bars, x_bufs, x_bars, 0, H, K, V, BA, SEGMENTS, REVERSE, X)),
            (state, (work, states, anchor, desc_o, tiles, gate_bufs, bars, x_bufs, x_bars, 1, H, K, V, BA, SEGMENTS, REVERSE, X)),
            (products, (work, scale, (qs, ks, ps), sums, product_bars, H, SEGMENTS, REVERSE)),
            (gates, (work, g, (g_b, g_t, g_h), scale, sums, from_start, to_end, decays, g_full, p_empty, H, SEGMENTS, REVERSE)),
            (load, (work, descs, load_tiles, load_bars, (x_full, x_empty), anchor, H, GQ, GV, V, BA, SEGMENTS, REVERSE, X)),
            (row_sums, (work, x_o, y, partial, s_full, s_empty, H, SEGMENTS, REVERSE)),
        ], [4, 4, 1, 1, 2], [STATE_REGISTERS, PRODUCT_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])
    else:
        gl.warp_specialize([
            (state, (work, states, anchor, desc_o, tiles, gate_bufs, bars, x_bufs, x_bars, 0, H, K, V, BA, SEGMENTS, REVERSE, X)),
            (state, (work, states, anchor, desc_o, tiles, gate_bufs, bars, x_bufs, x_bars, 1, H, K, V, BA, SEGMENTS, REVERSE, X)),
            (products, (work, scale, (qs, ks, ps), sums, product_bars, H, SEGMENTS, REVERSE)),
            (gates, (work, g, (g_b, g_t, g_h), scale, sums, from_start, to_end, decays, g_full, p_empty, H, SEGMENTS, REVERSE)),
            (load, (work, descs, load_tiles, load_bars, (x_full, x_empty), anchor, H, GQ, GV, V, BA, SEGMENTS, REVERSE, X)),
        ], [4, 4, 1, 1], [STATE_REGISTERS, PRODUCT_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])


# With 208 for the states ptxas of triton 3.6 puts a wait behind every wgmma (C7512), as that of triton 3.9 does in any case.
REGISTERS = dict(STATE_REGISTERS=216, PRODUCT_REGISTERS=56, OTHER_REGISTERS=24)


@launcher
def launch_sweep(tensors, setting):
    q, k, v, o, x, g, state_in, state_out, *others, cu_seqlens, indices = tensors
    B, T, HQ, K = q.shape
    HV, V = v.shape[2:]
    H = max(HQ, HV)
    halves = count_halves(V)
    scale, segment, BA, reverse, _ = setting
    units = count_units(B, T, H, segment, cu_seqlens)
    args = (
        *(descriptor(t, BK.value, cu_seqlens) for t in (q, k)), descriptor(v, BV.value, cu_seqlens), descriptor(o, BS.value, cu_seqlens),
        None if x is None else descriptor(x, BV.value, cu_seqlens),
        g, state_in, state_out, *others, cu_seqlens, indices,
        scale, units, count_sequences(B, cu_seqlens), T, 0 if indices is None else state_out.shape[0], segment or 0,
        B * H * T, count_slots(B, T, BA, cu_seqlens),
        *strides(g, 3), *strides(state_in, 4), *strides(state_out, 4),
    )
    constants = dict(
        H=H, GQ=H // HQ, GV=H // HV, K=K, V=V, BA=BA, SEGMENTS=segment is not None, REVERSE=reverse, X=x is not None,
        **REGISTERS, maxnreg=128, num_warps=4,
    )
    return wide_sweep_kernel, (min(units, max(multiprocessors(q.device) // halves, 1)), halves, 1), args, constants


def count_halves(V: int) -> int:
    return 1 if V <= BV.value else 2


def anchor_size(K: int, V: int) -> int:
    """Numbers of an anchor of a state `[K, V]`; the sweeps that leave and read it hold the state as `[V, K]`."""
    return BK.value * BV.value * count_halves(K)


def sweep(operands, setting):
    """One sweep over each sequence, or over each of its segments, which then have a state_in of their own: `o`, and with x what dg needs
    (`_gates.py`), else None three times: forward in time the rows `x . o [halves, B, H, T]`; back in time these in two parts, of the
    carried state and of pairs inside a chunk, and `<anchor, state> [8 * halves, blocks + N, H]`, one of each warp. The halves are those
    of V, one where V is up to 128.
    """
    q, k, v, g, state_in, state_out, x, anchors, cu_seqlens, indices = operands
    B, T, H, _, V = operands.sizes()
    o = empty(q, B, T, H, V)
    x_o = y = s_ds = None
    if x is not None:
        x_o = empty(q, count_halves(V), B, H, T, dtype=torch.float32)
        if setting.reverse:
            y = empty(x_o, *x_o.shape)
            s_ds = empty(q, 8 * count_halves(V), anchors.shape[0], H, dtype=torch.float32)
    launch_sweep((q, k, v, o, x, g, state_in, state_out, x_o, y, anchors, s_ds, cu_seqlens, indices), setting)
    return o, x_o, y, s_ds
