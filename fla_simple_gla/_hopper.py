"""The sweeps of `fused_chunk.py` on Hopper: every warp group has a job of its own, and the tensor cores wait for none of them.

One program to a multiprocessor takes one head of a sequence, or of a segment of it, after another. In it

- `load` brings the tiles of the next chunks to shared memory (TMA),
- `gates` sums the gates of the next chunks,
- `products` makes the decayed products inside a chunk, P_ij = scale * exp(c_i - c_j) (q_i . k_j),
- `state`, one warp group for 64 columns of V, keeps these columns of the state in registers, transposed, so that they feed the
  tensor cores from there, and adds up o,
- `row_sums` adds up what the warp groups of the states leave of x . o.

`sweep_kernel` runs forward in time: o, or dq with the roles exchanged as `fused_chunk.py` describes. `reverse_kernel` makes dk and dv in
one sweep back in time: its states make dv, and hand dS on through shared memory to the warp group that makes both products and dk.

For dg (`_gates.py`) they leave what the carried states add to q . dq and k . dk, and the products of the pairs inside a chunk,

    A_ij = scale * exp(c_i - c_j) (q_i . k_j) (do_i . v_j)        for i > j

summed over i for each j and over j for each i, in fp32. The diagonal is in neither: dg does not depend on it.

Tiles end where a sequence ends: a descriptor of packed sequences has two more dimensions, whose offsets cancel each other modulo
2^64, so that the bound of the dimension of tokens falls on any token (`ragged` of https://github.com/triton-lang/triton, tools).
"""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ._blocks import block_bounds, count_numbers, count_sequences, count_slots, first_slot, is_sequence, sequence_bounds, state_slot
from ._driver import Tiles
from ._gates import LOG2E, RESET
from ._launch import launcher
from ._layout import multiprocessors
from ._passes import empty

# renamed in triton 3.8
tma_load = getattr(tma, 'async_load', None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, 'async_store', None) or tma.async_copy_shared_to_global

CHUNK = 64
C = gl.constexpr(CHUNK)
BS = gl.constexpr(64)  # columns of V to a warp group
FAR = gl.constexpr(2**30)
FAR_AWAY = 2**34


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def advance(i, phase, n: gl.constexpr):
    """The next of n buffers, and the phase of its barrier."""
    i += 1
    if i == n:
        i = 0
        phase = phase ^ 1
    return i, phase


@gluon.jit
def here(x):
    """x, as something that the compiler can not compute outside of a loop."""
    return gl.inline_asm_elementwise('mov.b32 $0, $1;', '=r,r', [x], dtype=x.dtype, is_pure=False, pack=1)


@gluon.jit
def unit_bounds(cu_seqlens, indices, unit, N, T, P, segment, H: gl.constexpr, SEGMENTS: gl.constexpr):
    """Of a unit of work: slot, head, row of the batch, number (`_blocks.py`), its first token and the one after its last, and those of the
    number. An empty slot has no tokens, nor has padding nor what lies in no sequence, here.
    """
    i_s = unit // H
    i_h = unit % H
    if SEGMENTS:
        i_b, i_n, first, end, bos, eos = block_bounds(cu_seqlens, i_s, N, T, segment)
        end = gl.where(is_sequence(i_n, N), gl.maximum(first, end), first)
    else:
        i_n = i_s
        if cu_seqlens is None:
            i_b = i_n.to(gl.int64)
            bos = i_n * 0
            eos = bos + T
            end = eos
        else:
            i_n -= 1
            i_b = (i_n * 0).to(gl.int64)
            bos, eos = sequence_bounds(cu_seqlens, i_n, N, T)
            end = gl.where(is_sequence(i_n, N), eos, bos)
        first = bos
    if indices is not None:
        end = gl.where(state_slot(indices, i_n, N, P) < 0, first, end)
    return i_s, i_h, i_b, i_n, first, end, bos, eos


@gluon.jit
def tile(cu_seqlens, i_b, i_h, first, end, i_t, i_d):
    """Coordinates of a tile that begins with token first + i_t and ends, at the latest, before token `end`."""
    if cu_seqlens is None:
        return [i_b.to(gl.int32), 0, i_h, first + i_t, i_d]
    else:
        return [FAR, end, i_h, FAR - (end - first) + i_t, i_d]


@gluon.jit
def clear(work, desc, buf, i_b, i_n, i_h, first, eos, i_d, SEGMENTS: gl.constexpr):
    """Zeros in the rows of padding and of what lies in no sequence, if this unit is those."""
    cu_seqlens, indices, units, N, T, P, segment = work
    COLUMNS: gl.constexpr = buf.shape[1]
    if cu_seqlens is not None or indices is not None:
        if ~is_sequence(i_n, N) | (state_slot(indices, i_n, N, P) < 0):
            end = gl.minimum(first + segment, eos) if SEGMENTS else eos
            tma.store_wait(0)
            buf.store(gl.zeros([C, COLUMNS], buf.dtype, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])))
            fence_async_shared()
            for i_t in range(0, end - first, C):
                tma_store(desc, tile(cu_seqlens, i_b, i_h, first, end, i_t, i_d), buf)


@gluon.jit
def gates(
    work, g, g_strides, scale, sums, from_start, to_end, decays, full, empty,
    H: gl.constexpr, SEGMENTS: gl.constexpr, REVERSE: gl.constexpr,
):
    """The sums of the gates in each chunk, and the decays from its start, to its end and over all of it; scale is in from_start."""
    cu_seqlens, indices, units, N, T, P, segment = work
    g_b, g_t, g_h = g_strides
    layout: gl.constexpr = gl.BlockedLayout([C // 32], [32], [1], [0])
    r = gl.arange(0, C, layout)
    i = 0
    phase = 1
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        _, i_h, i_b, _, first, end, _, _ = unit_bounds(cu_seqlens, indices, unit, N, T, P, segment, H, SEGMENTS)
        L = end - first
        NT = (L + C - 1) // C
        o_t = (NT - 1) * C + r if REVERSE else r
        b_g = gl.zeros([C], gl.float32, layout)
        if g is not None:
            p_g = g + i_b * g_b + i_h.to(gl.int64) * g_h + (first + o_t).to(gl.int64) * g_t
            # (back in time o_t is negative where there are no tokens)
            b_n = gl.load(p_g, mask=(o_t >= 0) & (o_t < L), other=0.0)
        for _ in range(NT):
            if g is not None:
                b_g = b_n.to(gl.float32) * LOG2E
                b_g = gl.where(b_g < RESET, RESET, b_g)  # NaN stays NaN
                # those of the next chunk arrive while these are summed
                o_t += -C if REVERSE else C
                p_g += -C * g_t if REVERSE else C * g_t
                b_n = gl.load(p_g, mask=(o_t >= 0) & (o_t < L), other=0.0)
            whole = gl.floor(b_g + 0.5)
            b_c = gl.associative_scan(whole, 0, add) + gl.associative_scan(b_g - whole, 0, add)
            c_end = gl.sum(whole, 0) + gl.sum(b_g - whole, 0)
            mbarrier.wait(empty.index(i), phase)
            sums.index(i).store(b_c)
            from_start.index(i).store(gl.exp2(b_c) * scale)
            to_end.index(i).store(gl.exp2(c_end - b_c))
            decays.index(i).store(gl.full([1], 0.0, gl.float32, layout) + gl.exp2(c_end))
            mbarrier.arrive(full.index(i), count=1)
            i, phase = advance(i, phase, sums.shape[0])


@gluon.jit
def load(work, descs, tiles, bars, H: gl.constexpr, GQ: gl.constexpr, GV: gl.constexpr, SEGMENTS: gl.constexpr, X: gl.constexpr):
    cu_seqlens, indices, units, N, T, P, segment = work
    desc_q, desc_k, desc_v, desc_x = descs
    qs, ks, vs, xs = tiles
    full, empty, x_full, x_empty = bars
    i = 0
    phase = 1
    i_x = 0
    x_phase = 1
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        _, i_h, i_b, _, first, end, _, _ = unit_bounds(cu_seqlens, indices, unit, N, T, P, segment, H, SEGMENTS)
        for i_t in range(0, end - first, C):
            mbarrier.wait(empty.index(i), phase)
            bar = full.index(i)
            mbarrier.expect(bar, C * (2 * qs.shape[2] + vs.shape[2]) * 2)
            tma_load(desc_q, tile(cu_seqlens, i_b, i_h // GQ, first, end, i_t, 0), bar, qs.index(i))
            tma_load(desc_k, tile(cu_seqlens, i_b, i_h // GQ, first, end, i_t, 0), bar, ks.index(i))
            tma_load(desc_v, tile(cu_seqlens, i_b, i_h // GV, first, end, i_t, 0), bar, vs.index(i))
            if X:
                mbarrier.wait(x_empty.index(i_x), x_phase)
                mbarrier.expect(x_full.index(i_x), C * vs.shape[2] * 2)
                tma_load(desc_x, tile(cu_seqlens, i_b, i_h // GV, first, end, i_t, 0), x_full.index(i_x), xs.index(i_x))
                i_x, x_phase = advance(i_x, x_phase, xs.shape[0])
            i, phase = advance(i, phase, qs.shape[0])


@gluon.jit
def products(work, scale, y, tiles, gate_bufs, bars, x_bufs, H: gl.constexpr, SEGMENTS: gl.constexpr, X: gl.constexpr):
    """P of each chunk, and the sums of A."""
    cu_seqlens, indices, units, N, T, P, segment = work
    qs, ks, vs, ps = tiles
    sums, from_start, to_end, decays = gate_bufs
    full, empty, p_full, g_full = bars
    xs, partial, x_full, x_empty, s_full, s_empty = x_bufs
    PARTS: gl.constexpr = partial.shape[0] // s_full.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    o_i = gl.arange(0, C, gl.SliceLayout(1, layout))
    o_j = gl.arange(0, C, gl.SliceLayout(0, layout))
    i = 0
    phase = 0
    i_p = 0
    p_phase = 0
    i_x = 0
    x_phase = 0
    i_s = 0
    s_phase = 1
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        _, i_h, i_b, _, first, end, _, _ = unit_bounds(cu_seqlens, indices, unit, N, T, P, segment, H, SEGMENTS)
        for i_t in range(0, end - first, C):
            mbarrier.wait(full.index(i), phase)
            b_p = warpgroup_mma(
                qs.index(i), ks.index(i).permute((1, 0)), gl.zeros([C, C], gl.float32, layout), use_acc=False, is_async=True,
            )
            mbarrier.wait(g_full.index(i_p), p_phase)
            c_i = sums.index(i_p).load(gl.SliceLayout(1, layout))
            c_j = sums.index(i_p).load(gl.SliceLayout(0, layout))
            decay = gl.where(o_i[:, None] >= o_j[None, :], gl.exp2(c_i[:, None] - c_j[None, :]), 0.0) * scale
            b_p = warpgroup_mma_wait(0, (b_p,))
            b_p = b_p * decay
            ps.index(i_p).store(b_p.to(ps.dtype))
            fence_async_shared()
            mbarrier.arrive(p_full.index(i_p), count=1)
            if X:
                mbarrier.wait(x_full.index(i_x), x_phase)
                b_a = warpgroup_mma(
                    xs.index(i_x), vs.index(i).permute((1, 0)), gl.zeros([C, C], gl.float32, layout), use_acc=False, is_async=True,
                )
                b_a = warpgroup_mma_wait(0, (b_a,))
                mbarrier.arrive(empty.index(i), count=1)
                mbarrier.arrive(x_empty.index(i_x), count=1)
                b_a = gl.where(o_i[:, None] > o_j[None, :], -b_a * b_p, 0.0)
                gl.store(y + (i_b * H + i_h) * T + first + i_t + o_i, gl.sum(b_a, 1), mask=first + i_t + o_i < end)
                b_a = gl.sum(b_a.reshape([4, 2, 8, C]), 1).reshape([32, C])
                mbarrier.wait(s_empty.index(i_s), s_phase)
                partial.index(i_s * PARTS + PARTS - 1).store(b_a)
                mbarrier.arrive(s_full.index(i_s), count=1)
                i_s, s_phase = advance(i_s, s_phase, s_full.shape[0])
                i_x, x_phase = advance(i_x, x_phase, xs.shape[0])
            i, phase = advance(i, phase, qs.shape[0])
            i_p, p_phase = advance(i_p, p_phase, ps.shape[0])


@gluon.jit
def state(
    work, states, anchor, desc_o, tiles, gate_bufs, bars, x_bufs,
    W: gl.constexpr, H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BA: gl.constexpr, SEGMENTS: gl.constexpr, X: gl.constexpr,
):
    cu_seqlens, indices, units, N, T, P, segment = work
    state_in, state_out, si, so = states
    si_n, si_h, si_k, si_v = si
    so_n, so_h, so_k, so_v = so
    anchors, blocks = anchor
    qs, ks, vs, ps, os = tiles
    sums, from_start, to_end, decays = gate_bufs
    full, empty, p_full, p_empty, g_full = bars
    xs, partial, x_full, x_empty, s_full, s_empty = x_bufs
    PARTS: gl.constexpr = partial.shape[0] // s_full.shape[0]
    BK: gl.constexpr = qs.shape[2]
    dtype: gl.constexpr = qs.dtype
    layout_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BK, 16])
    layout_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    operand_o: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout_o, k_width=2)
    operand_s: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout_s, k_width=2)
    o_v = W * BS + gl.arange(0, BS, gl.SliceLayout(1, layout_s))
    o_k = gl.arange(0, BK, gl.SliceLayout(0, layout_s))
    m_s = (o_v < V)[:, None] & (o_k < K)[None, :]
    i = 0
    phase = 0
    i_p = 0
    p_phase = 0
    i_x = 0
    x_phase = 0
    i_s = 0
    s_phase = 1
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        slot, i_h, i_b, i_n, first, end, bos, eos = unit_bounds(cu_seqlens, indices, unit, N, T, P, segment, H, SEGMENTS)
        b_s = gl.zeros([BS, BK], gl.float32, layout_s)
        if state_in is not None:
            place = slot.to(gl.int64) if SEGMENTS else state_slot(indices, i_n, N, P)
            p_in = state_in + place * si_n + i_h.to(gl.int64) * si_h
            b_s = gl.load(
                p_in + (here(o_v).to(gl.int64)[:, None] * si_v + here(o_k).to(gl.int64)[None, :] * si_k),
                mask=(o_v < gl.where(is_sequence(i_n, N) & (place >= 0), V, 0))[:, None] & (o_k < K)[None, :], other=0.0,
            ).to(gl.float32)
        b_h = gl.convert_layout(b_s.to(dtype), operand_o)
        NT = (end - first + C - 1) // C
        for i_c in range(NT):
            if X:
                wanted, i_a = anchor_of(cu_seqlens, blocks, i_c, i_n, first, bos, eos, T, BA)
                if wanted:
                    # the reverse sweep holds the state the other way round
                    b_a = gl.inline_asm_elementwise(
                        'movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;', '=r,r', [b_h], dtype=b_h.dtype, is_pure=False, pack=2,
                    )
                    t, x = fragment_indices(BK // 2)
                    tile_16 = x // 8 * (BK // 16) + W * (BS // 16) + t // 32
                    p_a = anchors + (i_a.to(gl.int64) * H + i_h) * (BK * BK)
                    gl.store(p_a + ((tile_16 * 32 + t % 32) * 8 + x % 8), to_fragments(b_a))
            mbarrier.wait(full.index(i), phase)
            # a wait on what is done: without it ptxas puts one of its own before the product with the decay (C7517)
            b_s = warpgroup_mma_wait(0, (b_s,))
            b_o = warpgroup_mma(
                b_h, qs.index(i).permute((1, 0)), gl.zeros([BS, C], gl.float32, layout_o), use_acc=False, is_async=True,
            )
            b_v = vs.index(i).slice(W * BS, BS, dim=1).permute((1, 0)).load(operand_s)
            mbarrier.wait(g_full.index(i_p), p_phase)
            b_d = (b_v.to(gl.float32) * to_end.index(i_p).load(gl.SliceLayout(0, operand_s))[None, :]).to(dtype)
            e = from_start.index(i_p).load(gl.SliceLayout(0, layout_o))
            b_s = b_s * decays.index(i_p).load(gl.SliceLayout(0, layout_s))[None, :]
            b_s = warpgroup_mma(b_d, ks.index(i), b_s, is_async=True)
            b_o = warpgroup_mma_wait(1, (b_o,))
            b_o = b_o * e[None, :]
            if X:
                mbarrier.wait(x_full.index(i_x), x_phase)
                b_x = gl.convert_layout(xs.index(i_x).slice(W * BS, BS, dim=1).permute((1, 0)).load(operand_o), layout_o)
                b_x = gl.sum((b_o * b_x.to(gl.float32)).reshape([4, 2, 8, C]), 1).reshape([32, C])
                mbarrier.wait(s_empty.index(i_s), s_phase)
                partial.index(i_s * PARTS + W).store(b_x)
                mbarrier.arrive(s_full.index(i_s), count=1)
                # not before the sums are written: see `row_sums`
                mbarrier.arrive(x_empty.index(i_x), count=1)
                i_s, s_phase = advance(i_s, s_phase, s_full.shape[0])
                i_x, x_phase = advance(i_x, x_phase, xs.shape[0])
            mbarrier.wait(p_full.index(i_p), p_phase)
            b_o = warpgroup_mma(gl.convert_layout(b_v, operand_o), ps.index(i_p).permute((1, 0)), b_o, is_async=True)
            b_s = warpgroup_mma_wait(1, (b_s,))
            mbarrier.arrive(empty.index(i), count=1)
            b_h = gl.convert_layout(b_s.to(dtype), operand_o)
            tma.store_wait(0)
            b_o = warpgroup_mma_wait(0, (b_o,))
            mbarrier.arrive(p_empty.index(i_p), count=1)
            os.index(W).permute((1, 0)).store(b_o.to(dtype))
            fence_async_shared()
            tma_store(desc_o, tile(cu_seqlens, i_b, i_h, first, end, i_c * C, W * BS), os.index(W))
            i, phase = advance(i, phase, qs.shape[0])
            i_p, p_phase = advance(i_p, p_phase, ps.shape[0])
        clear(work, desc_o, os.index(W), i_b, i_n, i_h, first, eos, W * BS, SEGMENTS)
        if state_out is not None:
            # the last segment's; a sequence without tokens has no segment, and then the combine leaves its state
            place = state_slot(indices, i_n, N, P)
            if is_sequence(i_n, N) & (place >= 0) & (end == eos) & ((first < end) if SEGMENTS else (first == bos)):
                p_out = state_out + place * so_n + i_h.to(gl.int64) * so_h
                gl.store(p_out + (here(o_v).to(gl.int64)[:, None] * so_v + here(o_k).to(gl.int64)[None, :] * so_k), b_s, mask=m_s)
    tma.store_wait(0)


@gluon.jit
def sum_parts(partial, start, PARTS: gl.constexpr):
    """The sums of the rows of PARTS buffers, as those of every fourth row."""
    # A warp has half of the columns, and a thread 4 of them in 2 rows of a slice: few, as it has few registers.
    layout: gl.constexpr = gl.BlockedLayout([2, 4], [4, 8], [1, 2], [1, 0])
    SLICES: gl.constexpr = partial.shape[1] // 8
    total = gl.sum(partial.index(start).slice(0, 8, dim=0).load(layout).reshape([4, 2, C]), 1)
    for j in gl.static_range(1, SLICES * PARTS):
        rows = partial.index(start + j // SLICES).slice(j % SLICES * 8, 8, dim=0).load(layout)
        total += gl.sum(rows.reshape([4, 2, C]), 1)
    return total


@gluon.jit
def row_sums(work, x_o, pairs, partial, full, empty, H: gl.constexpr, SEGMENTS: gl.constexpr, REVERSE: gl.constexpr):
    """Rows x . o of each chunk. With pairs there are two such o, whose partial sums lie one behind the other: x_o gets the rows of the
    first, and pairs what those of the second have more.
    """
    cu_seqlens, indices, units, N, T, P, segment = work
    BUFFERS: gl.constexpr = partial.shape[0] // full.shape[0]
    PARTS: gl.constexpr = BUFFERS if pairs is None else BUFFERS // 2
    i = 0
    phase = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        _, i_h, i_b, _, first, end, _, _ = unit_bounds(cu_seqlens, indices, unit, N, T, P, segment, H, SEGMENTS)
        NT = (end - first + C - 1) // C
        for i_c in range(NT):
            i_t = (NT - 1 - i_c if REVERSE else i_c) * C
            mbarrier.wait(full.index(i), phase)
            b_x = gl.sum(sum_parts(partial, i * BUFFERS, PARTS), 0)
            r = gl.arange(0, C, b_x.type.layout)
            o_x = (i_b * H + i_h) * T + first + i_t + r
            mask = r < end - first - i_t
            # A buffer is given back behind something that needs what was read of it. An arrival does not wait for the loads before it:
            # where x was given back right behind them, its sums were now and then those of the next tile, which TMA had put there
            # meanwhile (triton 3.6 on H200; ptxas leaves the last load under way across the barrier and the arrival).
            gl.store(x_o + o_x, b_x, mask=mask)
            if pairs is not None:
                gl.store(pairs + o_x, gl.sum(sum_parts(partial, i * BUFFERS + PARTS, PARTS), 0) - b_x, mask=mask)
            mbarrier.arrive(empty.index(i), count=1)
            i, phase = advance(i, phase, full.shape[0])


@gluon.jit
def anchor_of(cu_seqlens, blocks, i_c, i_n, first, bos, eos, T, BA: gl.constexpr):
    """Whether there is an anchor for chunk i_c of a unit (`_gates.py`), and its slot. Anchor blocks are the sequence's, not the unit's."""
    i_c += (first - bos) // C
    last = (eos - bos + C - 1) // C - 1
    ends_block = ((i_c + 1) % (BA // C) == 0) | (i_c == last)
    slot = first_slot(cu_seqlens, i_n, bos, T, BA) + i_c // (BA // C)
    return ends_block | (i_c == last - 1), gl.where(ends_block, slot, blocks + i_n)


@gluon.jit
def fragment_indices(n: gl.constexpr):
    """Thread and number of `[128, n]`, a thread to a row."""
    layout: gl.constexpr = gl.BlockedLayout([1, n], [32, 1], [4, 1], [1, 0])
    return gl.arange(0, 128, gl.SliceLayout(1, layout))[:, None], gl.arange(0, n, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def to_fragments(x):
    """x [64, N], in the layout of a product, as `[128, N // 2]`: row t is what thread t holds of it, the 8 numbers of a tile of 16 x 16
    side by side, those of its first 8 columns before the others, and of these those of its first 8 rows.
    """
    n: gl.constexpr = x.shape[1] // 2
    # warp, which 8 rows, row; which 16 columns, which 8, pair, number
    x = x.reshape([4, 2, 8, n // 8, 2, 4, 2]).permute((0, 2, 5, 3, 4, 1, 6)).reshape([128, n])
    return gl.convert_layout(x, gl.BlockedLayout([1, n], [32, 1], [4, 1], [1, 0]), assert_trivial=True)


@gluon.jit
def from_fragments(x, layout: gl.constexpr):
    """Back to the layout of a product, from 8 numbers whose first 8 rows come first and of these the first 8 columns: what
    `to_fragments` leaves of 8 x 8 tiles, each transposed, is read as the whole transposed.
    """
    n: gl.constexpr = x.shape[1]
    x = x.reshape([4, 8, 4, n // 8, 2, 2, 2]).permute((0, 4, 1, 3, 5, 2, 6)).reshape([64, 2 * n])
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def store_sum(s_ds, x, W, i_a, i_h, anchors, H: gl.constexpr):
    """The sums of what each warp of warp group W has of the numbers x: none waits for another."""
    x = gl.sum(x.reshape([4, x.shape[0] // 4]), 1)
    w = W * 4 + gl.arange(0, 4, x.type.layout)
    gl.store(s_ds + (w * anchors + i_a) * H + i_h, x)


@gluon.jit
def prefetch(p, size: gl.constexpr):
    """Bring `size` bytes from p on, in 32 pieces, to the L2 cache."""
    p = p.to(gl.int64, bitcast=True) + gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0])) * (size // 32)
    gl.inline_asm_elementwise(
        'cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;', '=r,l,r',
        [p, gl.full(p.shape, size // 32, gl.int32, p.type.layout)], dtype=gl.int32, is_pure=False, pack=1,
    )


@gluon.jit
def reverse_load(
    work, descs, tiles, bars, anchor, H: gl.constexpr, GK: gl.constexpr, BA: gl.constexpr, SEGMENTS: gl.constexpr, DG: gl.constexpr,
):
    cu_seqlens, indices, units, N, T, P, segment = work
    anchors, s_ds, blocks = anchor
    desc_q, desc_k, desc_v, desc_do = descs
    qs, ks, vs, dos = tiles
    full, empty = bars
    i = 0
    phase = 1
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        _, i_h, i_b, i_n, first, end, bos, eos = unit_bounds(cu_seqlens, indices, unit, N, T, P, segment, H, SEGMENTS)
        NT = (end - first + C - 1) // C
        for i_r in range(NT):
            i_c = NT - 1 - i_r
            i_t = i_c * C
            mbarrier.wait(empty.index(i), phase)
            bar = full.index(i)
            if DG:
                wanted, i_a = anchor_of(cu_seqlens, blocks, i_c, i_n, first, bos, eos, T, BA)
                if wanted:
                    SIZE: gl.constexpr = qs.shape[2] * vs.shape[2]
                    prefetch(anchors + (i_a.to(gl.int64) * H + i_h) * SIZE, 2 * SIZE)
            mbarrier.expect(bar, C * (2 * qs.shape[2] + 2 * vs.shape[2]) * 2)
            tma_load(desc_k, tile(cu_seqlens, i_b, i_h // GK, first, end, i_t, 0), bar, ks.index(i))
            tma_load(desc_q, tile(cu_seqlens, i_b, i_h // GK, first, end, i_t, 0), bar, qs.index(i))
            tma_load(desc_do, tile(cu_seqlens, i_b, i_h, first, end, i_t, 0), bar, dos.index(i))
            tma_load(desc_v, tile(cu_seqlens, i_b, i_h, first, end, i_t, 0), bar, vs.index(i))
            i, phase = advance(i, phase, qs.shape[0])


@gluon.jit
def keys(work, scale, desc_dk, tiles, gate_bufs, bars, H: gl.constexpr, SEGMENTS: gl.constexpr):
    """dk of each chunk, and the products that the warp groups of dv need."""
    cu_seqlens, indices, units, N, T, P, segment = work
    qs, ks, vs, dos, ps, dks, published = tiles
    sums, from_start, to_end, decays = gate_bufs
    full, empty, p_full, p_empty, g_full, g_empty, s_full, s_empty = bars
    BK: gl.constexpr = qs.shape[2]
    dtype: gl.constexpr = qs.dtype
    layout_p: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    layout_k: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BK, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout_k, k_width=2)
    o_j = gl.arange(0, C, gl.SliceLayout(1, layout_p))
    o_i = gl.arange(0, C, gl.SliceLayout(0, layout_p))
    i = 0
    phase = 0
    s_phase = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        _, i_h, i_b, i_n, first, end, _, eos = unit_bounds(cu_seqlens, indices, unit, N, T, P, segment, H, SEGMENTS)
        NT = (end - first + C - 1) // C
        for i_c in range(NT):
            i_t = (NT - 1 - i_c) * C
            mbarrier.wait(full.index(i), phase)
            b_p = warpgroup_mma(
                ks.index(i), qs.index(i).permute((1, 0)), gl.zeros([C, C], gl.float32, layout_p), use_acc=False, is_async=True,
            )
            mbarrier.wait(g_full.index(i), phase)
            c_j = sums.index(i).load(gl.SliceLayout(1, layout_p))
            c_i = sums.index(i).load(gl.SliceLayout(0, layout_p))
            decay = gl.where(o_j[:, None] <= o_i[None, :], gl.exp2(c_i[None, :] - c_j[:, None]), 0.0) * scale
            b_p = warpgroup_mma_wait(0, (b_p,))
            mbarrier.wait(p_empty.index(i), phase ^ 1)
            ps.index(i).store((b_p * decay).to(dtype))
            fence_async_shared()
            mbarrier.arrive(p_full.index(i), count=1)
            b_a = warpgroup_mma(
                vs.index(i), dos.index(i).permute((1, 0)), gl.zeros([C, C], gl.float32, layout_p), use_acc=False, is_async=True,
            )
            b_a = warpgroup_mma_wait(0, (b_a,)) * decay
            b_d = gl.convert_layout(b_a.to(dtype), operand)
            mbarrier.wait(s_full.index(0), s_phase)
            b_k = warpgroup_mma(vs.index(i), published, gl.zeros([C, BK], gl.float32, layout_k), use_acc=False, is_async=True)
            decay_k = to_end.index(i).load(gl.SliceLayout(1, layout_k))
            b_k = warpgroup_mma_wait(0, (b_k,))
            mbarrier.arrive(s_empty.index(0), count=1)
            b_k = b_k * decay_k[:, None]
            b_k = warpgroup_mma(b_d, qs.index(i), b_k, is_async=True)
            mbarrier.arrive(g_empty.index(i), count=1)
            tma.store_wait(0)
            b_k = warpgroup_mma_wait(0, (b_k,))
            mbarrier.arrive(empty.index(i), count=1)
            dks.store(b_k.to(dtype))
            fence_async_shared()
            tma_store(desc_dk, tile(cu_seqlens, i_b, i_h, first, end, i_t, 0), dks)
            s_phase = s_phase ^ 1
            i, phase = advance(i, phase, qs.shape[0])
        clear(work, desc_dk, dks, i_b, i_n, i_h, first, eos, 0, SEGMENTS)
    tma.store_wait(0)


@gluon.jit
def values(
    work, states, anchor, desc_dv, tiles, gate_bufs, bars, z_bufs,
    W: gl.constexpr, H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BA: gl.constexpr, SEGMENTS: gl.constexpr, DG: gl.constexpr,
):
    """The gradient of the state, in 64 columns of V, and these columns of dv."""
    cu_seqlens, indices, units, N, T, P, segment = work
    state_in, state_out, si, so = states
    si_n, si_h, si_k, si_v = si
    so_n, so_h, so_k, so_v = so
    anchors, s_ds, blocks = anchor
    qs, ks, vs, dos, ps, dvs, published = tiles
    partial, z_full, z_empty = z_bufs
    sums, from_start, to_end, decays = gate_bufs
    full, empty, p_full, p_empty, g_full, g_empty, s_full, s_empty = bars
    BK: gl.constexpr = qs.shape[2]
    dtype: gl.constexpr = qs.dtype
    layout_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BK, 16])
    layout_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    operand_o: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout_o, k_width=2)
    operand_s: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout_s, k_width=2)
    o_v = W * BS + gl.arange(0, BS, gl.SliceLayout(1, layout_s))
    o_k = gl.arange(0, BK, gl.SliceLayout(0, layout_s))
    m_s = (o_v < V)[:, None] & (o_k < K)[None, :]
    i = 0
    phase = 0
    s_phase = 1
    z_phase = 1
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        i_s, i_h, i_b, i_n, first, end, bos, eos = unit_bounds(cu_seqlens, indices, unit, N, T, P, segment, H, SEGMENTS)
        b_s = gl.zeros([BS, BK], gl.float32, layout_s)
        if state_in is not None:
            p_in = state_in + (i_s if SEGMENTS else i_n).to(gl.int64) * si_n + i_h.to(gl.int64) * si_h
            b_s = gl.load(
                p_in + (here(o_v).to(gl.int64)[:, None] * si_v + here(o_k).to(gl.int64)[None, :] * si_k),
                mask=(o_v < gl.where(is_sequence(i_n, N), V, 0))[:, None] & (o_k < K)[None, :], other=0.0,
            ).to(gl.float32)
        NT = (end - first + C - 1) // C
        for i_r in range(NT):
            i_c = NT - 1 - i_r
            b_s = warpgroup_mma_wait(0, (b_s,))
            if DG:
                # asked for now, and multiplied while the tensor cores are at work
                wanted, i_a = anchor_of(cu_seqlens, blocks, i_c, i_n, first, bos, eos, T, BA)
                t, x = fragment_indices(BK // 2)
                tile_16 = (W * (BS // 16) + t // 32) * (BK // 16) + x // 8
                p_a = anchors + (i_a.to(gl.int64) * H + i_h) * (BK * BK)
                # all or nothing; x is in the mask for its shape
                b_a = gl.load(p_a + ((tile_16 * 32 + t % 32) * 8 + x % 8), mask=(t < gl.where(wanted, 128, 0)) & (x >= 0), other=0.0)
            mbarrier.wait(s_empty.index(0), s_phase)
            published.slice(W * BS, BS, dim=0).store(b_s.to(dtype))
            fence_async_shared()
            mbarrier.arrive(s_full.index(0), count=1)
            s_phase = s_phase ^ 1
            mbarrier.wait(full.index(i), phase)
            b_o = warpgroup_mma(
                published.slice(W * BS, BS, dim=0), ks.index(i).permute((1, 0)), gl.zeros([BS, C], gl.float32, layout_o),
                use_acc=False, is_async=True,
            )
            if DG:
                if wanted:
                    b_a_s = from_fragments(b_a, layout_s).to(gl.float32) * b_s
                    store_sum(s_ds, gl.sum(b_a_s, 1), W, i_a, i_h, blocks + N, H)
            b_v = dos.index(i).slice(W * BS, BS, dim=1).permute((1, 0)).load(operand_s)
            mbarrier.wait(g_full.index(i), phase)
            b_d = (b_v.to(gl.float32) * from_start.index(i).load(gl.SliceLayout(0, operand_s))[None, :]).to(dtype)
            decay_o = to_end.index(i).load(gl.SliceLayout(0, layout_o))
            b_s = b_s * decays.index(i).load(gl.SliceLayout(0, layout_s))[None, :]
            b_s = warpgroup_mma(b_d, qs.index(i), b_s, is_async=True)
            b_o = warpgroup_mma_wait(1, (b_o,))
            b_o = b_o * decay_o[None, :]
            if DG:
                b_x = gl.convert_layout(vs.index(i).slice(W * BS, BS, dim=1).permute((1, 0)).load(operand_o), layout_o)
                b_x = gl.sum((b_o * b_x.to(gl.float32)).reshape([4, 2, 8, C]), 1).reshape([32, C])
                mbarrier.wait(z_empty.index(0), z_phase)
                partial.index(W).store(b_x)
                mbarrier.arrive(z_full.index(0), count=1)
                z_phase = z_phase ^ 1
            mbarrier.wait(p_full.index(i), phase)
            b_o = warpgroup_mma(
                dos.index(i).slice(W * BS, BS, dim=1).permute((1, 0)), ps.index(i).permute((1, 0)), b_o, is_async=True,
            )
            tma.store_wait(0)
            b_s = warpgroup_mma_wait(1, (b_s,))
            b_o = warpgroup_mma_wait(0, (b_o,))
            dvs.index(W).permute((1, 0)).store(b_o.to(dtype))
            fence_async_shared()
            tma_store(desc_dv, tile(cu_seqlens, i_b, i_h, first, end, i_c * C, W * BS), dvs.index(W))
            mbarrier.arrive(p_empty.index(i), count=1)
            mbarrier.arrive(g_empty.index(i), count=1)
            mbarrier.arrive(empty.index(i), count=1)
            i, phase = advance(i, phase, qs.shape[0])
        clear(work, desc_dv, dvs.index(W), i_b, i_n, i_h, first, eos, W * BS, SEGMENTS)
        if state_out is not None:
            if is_sequence(i_n, N) & (first == bos) & ((first < end) if SEGMENTS else (first == bos)):
                p_out = state_out + i_n.to(gl.int64) * so_n + i_h.to(gl.int64) * so_h
                gl.store(p_out + (here(o_v).to(gl.int64)[:, None] * so_v + here(o_k).to(gl.int64)[None, :] * so_k), b_s, mask=m_s)
    tma.store_wait(0)


@gluon.jit
def buffers(n: gl.constexpr, count: gl.constexpr):
    """Barriers of n buffers, each of which `count` arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit(do_not_specialize=['units', 'N', 'T', 'P', 'segment', 'blocks', 'scale'])
def sweep_kernel(
    desc_q, desc_k, desc_v, desc_o, desc_x,
    g, state_in, state_out, x_o, y, anchors, cu_seqlens, indices,
    scale, units, N, T, P, segment, blocks,
    g_b, g_t, g_h,
    si_n, si_h, si_k, si_v,
    so_n, so_h, so_k, so_v,
    H: gl.constexpr, GQ: gl.constexpr, GV: gl.constexpr,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, BA: gl.constexpr,
    SEGMENTS: gl.constexpr, X: gl.constexpr, STAGES: gl.constexpr, X_STAGES: gl.constexpr, PRODUCTS: gl.constexpr,
    SUMS: gl.constexpr, STATE_REGISTERS: gl.constexpr, PRODUCT_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = desc_q.dtype
    by_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BK], dtype)
    by_v: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BV], dtype)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    NW: gl.constexpr = BV // BS
    qs = gl.allocate_shared_memory(dtype, [STAGES, C, BK], by_k)
    ks = gl.allocate_shared_memory(dtype, [STAGES, C, BK], by_k)
    vs = gl.allocate_shared_memory(dtype, [STAGES, C, BV], by_v)
    ps = gl.allocate_shared_memory(dtype, [PRODUCTS, C, C], square)
    os = gl.allocate_shared_memory(dtype, [NW, C, BS], square)
    sums = gl.allocate_shared_memory(gl.float32, [PRODUCTS, C], row)
    from_start = gl.allocate_shared_memory(gl.float32, [PRODUCTS, C], row)
    to_end = gl.allocate_shared_memory(gl.float32, [PRODUCTS, C], row)
    decays = gl.allocate_shared_memory(gl.float32, [PRODUCTS, 1], row)
    full = buffers(STAGES, 1)
    empty = buffers(STAGES, NW + X)
    p_full = buffers(PRODUCTS, 1)
    p_empty = buffers(PRODUCTS, NW)
    g_full = buffers(PRODUCTS, 1)
    if X:
        xs = gl.allocate_shared_memory(dtype, [X_STAGES, C, BV], by_v)
        partial = gl.allocate_shared_memory(gl.float32, [SUMS * (NW + 1), 32, C], gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0]))
        x_full = buffers(X_STAGES, 1)
        x_empty = buffers(X_STAGES, NW + 1)
        s_full = buffers(SUMS, NW + 1)
        s_empty = buffers(SUMS, 1)
    else:
        xs = vs
        partial = sums
        x_full = full
        x_empty = full
        s_full = full
        s_empty = full
    fence_async_shared()

    work = (cu_seqlens, indices, units, N, T, P, segment)
    states = (state_in, state_out, (si_n, si_h, si_k, si_v), (so_n, so_h, so_k, so_v))
    anchor = (anchors, blocks)
    gate_bufs = (sums, from_start, to_end, decays)
    x_bufs = (xs, partial, x_full, x_empty, s_full, s_empty)
    tiles = (qs, ks, vs, ps, os)
    bars = (full, empty, p_full, p_empty, g_full)
    product_bars = (full, empty, p_full, g_full)
    descs = (desc_q, desc_k, desc_v, desc_x)
    load_tiles = (qs, ks, vs, xs)
    load_bars = (full, empty, x_full, x_empty)
    # constants have to stand in these tuples themselves
    if NW == 2:
        if X:
            gl.warp_specialize([
                (state, (work, states, anchor, desc_o, tiles, gate_bufs, bars, x_bufs, 0, H, K, V, BA, SEGMENTS, X)),
                (state, (work, states, anchor, desc_o, tiles, gate_bufs, bars, x_bufs, 1, H, K, V, BA, SEGMENTS, X)),
                (products, (work, scale, y, (qs, ks, vs, ps), gate_bufs, product_bars, x_bufs, H, SEGMENTS, X)),
                (gates, (work, g, (g_b, g_t, g_h), scale, sums, from_start, to_end, decays, g_full, p_empty, H, SEGMENTS, False)),
                (load, (work, descs, load_tiles, load_bars, H, GQ, GV, SEGMENTS, X)),
                (row_sums, (work, x_o, None, partial, s_full, s_empty, H, SEGMENTS, False)),
            ], [4, 4, 1, 1, 2], [STATE_REGISTERS, PRODUCT_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])
        else:
            gl.warp_specialize([
                (state, (work, states, anchor, desc_o, tiles, gate_bufs, bars, x_bufs, 0, H, K, V, BA, SEGMENTS, X)),
                (state, (work, states, anchor, desc_o, tiles, gate_bufs, bars, x_bufs, 1, H, K, V, BA, SEGMENTS, X)),
                (products, (work, scale, y, (qs, ks, vs, ps), gate_bufs, product_bars, x_bufs, H, SEGMENTS, X)),
                (gates, (work, g, (g_b, g_t, g_h), scale, sums, from_start, to_end, decays, g_full, p_empty, H, SEGMENTS, False)),
                (load, (work, descs, load_tiles, load_bars, H, GQ, GV, SEGMENTS, X)),
            ], [4, 4, 1, 1], [STATE_REGISTERS, PRODUCT_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])
    elif X:
        gl.warp_specialize([
            (state, (work, states, anchor, desc_o, tiles, gate_bufs, bars, x_bufs, 0, H, K, V, BA, SEGMENTS, X)),
            (products, (work, scale, y, (qs, ks, vs, ps), gate_bufs, product_bars, x_bufs, H, SEGMENTS, X)),
            (gates, (work, g, (g_b, g_t, g_h), scale, sums, from_start, to_end, decays, g_full, p_empty, H, SEGMENTS, False)),
            (load, (work, descs, load_tiles, load_bars, H, GQ, GV, SEGMENTS, X)),
            (row_sums, (work, x_o, None, partial, s_full, s_empty, H, SEGMENTS, False)),
        ], [4, 1, 1, 2], [PRODUCT_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])
    else:
        gl.warp_specialize([
            (state, (work, states, anchor, desc_o, tiles, gate_bufs, bars, x_bufs, 0, H, K, V, BA, SEGMENTS, X)),
            (products, (work, scale, y, (qs, ks, vs, ps), gate_bufs, product_bars, x_bufs, H, SEGMENTS, X)),
            (gates, (work, g, (g_b, g_t, g_h), scale, sums, from_start, to_end, decays, g_full, p_empty, H, SEGMENTS, False)),
            (load, (work, descs, load_tiles, load_bars, H, GQ, GV, SEGMENTS, X)),
        ], [4, 1, 1], [PRODUCT_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])


@gluon.jit(do_not_specialize=['units', 'N', 'T', 'segment', 'blocks', 'scale'])
def reverse_kernel(
    desc_q, desc_k, desc_v, desc_do, desc_dk, desc_dv,
    g, state_in, state_out, z, anchors, s_ds, cu_seqlens,
    scale, units, N, T, segment, blocks,
    g_b, g_t, g_h,
    si_n, si_h, si_k, si_v,
    so_n, so_h, so_k, so_v,
    H: gl.constexpr, GK: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, BA: gl.constexpr,
    SEGMENTS: gl.constexpr, DG: gl.constexpr, STAGES: gl.constexpr,
    STATE_REGISTERS: gl.constexpr, KEY_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = desc_q.dtype
    by_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BK], dtype)
    by_v: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BV], dtype)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    NW: gl.constexpr = BV // BS
    qs = gl.allocate_shared_memory(dtype, [STAGES, C, BK], by_k)
    ks = gl.allocate_shared_memory(dtype, [STAGES, C, BK], by_k)
    vs = gl.allocate_shared_memory(dtype, [STAGES, C, BV], by_v)
    dos = gl.allocate_shared_memory(dtype, [STAGES, C, BV], by_v)
    ps = gl.allocate_shared_memory(dtype, [STAGES, C, C], square)
    dks = gl.allocate_shared_memory(dtype, [C, BK], by_k)
    dvs = gl.allocate_shared_memory(dtype, [NW, C, BS], square)
    published = gl.allocate_shared_memory(dtype, [BV, BK], gl.NVMMASharedLayout.get_default_for([BV, BK], dtype))
    sums = gl.allocate_shared_memory(gl.float32, [STAGES, C], row)
    from_start = gl.allocate_shared_memory(gl.float32, [STAGES, C], row)
    to_end = gl.allocate_shared_memory(gl.float32, [STAGES, C], row)
    decays = gl.allocate_shared_memory(gl.float32, [STAGES, 1], row)
    full = buffers(STAGES, 1)
    empty = buffers(STAGES, NW + 1)
    p_full = buffers(STAGES, 1)
    p_empty = buffers(STAGES, NW)
    g_full = buffers(STAGES, 1)
    g_empty = buffers(STAGES, NW + 1)
    s_full = buffers(1, NW)
    s_empty = buffers(1, 1)
    if DG:
        partial = gl.allocate_shared_memory(gl.float32, [NW, 32, C], gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0]))
        z_full = buffers(1, NW)
        z_empty = buffers(1, 1)
    else:
        partial = sums
        z_full = full
        z_empty = full
    fence_async_shared()

    # no pool, and so no slots of one: any number
    work = (cu_seqlens, None, units, N, T, N, segment)
    states = (state_in, state_out, (si_n, si_h, si_k, si_v), (so_n, so_h, so_k, so_v))
    anchor = (anchors, s_ds, blocks)
    z_bufs = (partial, z_full, z_empty)
    gate_bufs = (sums, from_start, to_end, decays)
    bars = (full, empty, p_full, p_empty, g_full, g_empty, s_full, s_empty)
    value_tiles = (qs, ks, vs, dos, ps, dvs, published)
    key_tiles = (qs, ks, vs, dos, ps, dks, published)
    descs = (desc_q, desc_k, desc_v, desc_do)
    load_tiles = (qs, ks, vs, dos)
    # constants have to stand in these tuples themselves
    if NW == 2:
        if DG:
            gl.warp_specialize([
                (values, (work, states, anchor, desc_dv, value_tiles, gate_bufs, bars, z_bufs, 0, H, K, V, BA, SEGMENTS, DG)),
                (values, (work, states, anchor, desc_dv, value_tiles, gate_bufs, bars, z_bufs, 1, H, K, V, BA, SEGMENTS, DG)),
                (keys, (work, scale, desc_dk, key_tiles, gate_bufs, bars, H, SEGMENTS)),
                (gates, (work, g, (g_b, g_t, g_h), scale, sums, from_start, to_end, decays, g_full, g_empty, H, SEGMENTS, True)),
                (reverse_load, (work, descs, load_tiles, (full, empty), anchor, H, GK, BA, SEGMENTS, DG)),
                (row_sums, (work, z, None, partial, z_full, z_empty, H, SEGMENTS, True)),
            ], [4, 4, 1, 1, 2], [STATE_REGISTERS, KEY_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])
        else:
            gl.warp_specialize([
                (values, (work, states, anchor, desc_dv, value_tiles, gate_bufs, bars, z_bufs, 0, H, K, V, BA, SEGMENTS, DG)),
                (values, (work, states, anchor, desc_dv, value_tiles, gate_bufs, bars, z_bufs, 1, H, K, V, BA, SEGMENTS, DG)),
                (keys, (work, scale, desc_dk, key_tiles, gate_bufs, bars, H, SEGMENTS)),
                (gates, (work, g, (g_b, g_t, g_h), scale, sums, from_start, to_end, decays, g_full, g_empty, H, SEGMENTS, True)),
                (reverse_load, (work, descs, load_tiles, (full, empty), anchor, H, GK, BA, SEGMENTS, DG)),
            ], [4, 4, 1, 1], [STATE_REGISTERS, KEY_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])
    elif DG:
        gl.warp_specialize([
            (values, (work, states, anchor, desc_dv, value_tiles, gate_bufs, bars, z_bufs, 0, H, K, V, BA, SEGMENTS, DG)),
            (keys, (work, scale, desc_dk, key_tiles, gate_bufs, bars, H, SEGMENTS)),
            (gates, (work, g, (g_b, g_t, g_h), scale, sums, from_start, to_end, decays, g_full, g_empty, H, SEGMENTS, True)),
            (reverse_load, (work, descs, load_tiles, (full, empty), anchor, H, GK, BA, SEGMENTS, DG)),
            (row_sums, (work, z, None, partial, z_full, z_empty, H, SEGMENTS, True)),
        ], [4, 1, 1, 2], [KEY_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])
    else:
        gl.warp_specialize([
            (values, (work, states, anchor, desc_dv, value_tiles, gate_bufs, bars, z_bufs, 0, H, K, V, BA, SEGMENTS, DG)),
            (keys, (work, scale, desc_dk, key_tiles, gate_bufs, bars, H, SEGMENTS)),
            (gates, (work, g, (g_b, g_t, g_h), scale, sums, from_start, to_end, decays, g_full, g_empty, H, SEGMENTS, True)),
            (reverse_load, (work, descs, load_tiles, (full, empty), anchor, H, GK, BA, SEGMENTS, DG)),
        ], [4, 1, 1], [KEY_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])


@functools.cache
def tile_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, 1, rows, columns], gl.float16 if dtype == torch.float16 else gl.bfloat16)


def descriptor(x: torch.Tensor, columns: int, cu_seqlens: torch.Tensor | None, rows: int = CHUNK) -> Tiles:
    """Of tiles `[1, 1, 1, rows, columns]` of `x [B, T, H, D]`, at coordinates as `tile` makes them."""
    B, T, H, D = x.shape
    # a dimension of one may have any stride
    b, t, h = (stride if size > 1 else 64 for stride, size in zip(x.stride(), (B, T, H)))
    if cu_seqlens is None:
        shape, strides = (B, 1, H, T, D), (b, t, h, t, 1)
    else:
        shape, strides = (2**31 - 1, 2**31 - 1, H, FAR.value, D), (FAR_AWAY - t, t, h, t, 1)
    return Tiles(x, shape, strides, (1, 1, 1, rows, columns), tile_layout(rows, columns, x.dtype))


def strides(x: torch.Tensor | None, n: int) -> tuple[int, ...]:
    """The first n strides of x, or zeros where there is none."""
    return (0,) * n if x is None else x.stride()[:n]


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the sweeps, these and those of `_hopper_wide.py`, can read these tensors of one dtype in place, and are made for them."""
    return takes_layouts(*[(x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in tensors])


@functools.lru_cache(1024)
def takes_layouts(*layouts: tuple[torch.dtype, torch.Size, tuple[int, ...], int]) -> bool:
    # what the sweeps write is contiguous: its rows, too, must be aligned to 16 bytes
    return all(
        dtype.itemsize == 2 and shape[-1] <= 256 and shape[-1] % 8 == 0 and shape.numel() > 0 and offset == 0
        and all(size == 1 or stride > 0 and stride % 8 == 0 for stride, size in zip(strides[:3], shape))
        for dtype, shape, strides, offset in layouts
    )


def count_units(B, T, H, segment, cu_seqlens):
    slots = count_numbers(B, cu_seqlens) if segment is None else count_slots(B, T, segment, cu_seqlens)
    return slots * H


def padded(K: int, V: int) -> int:
    return 64 if max(K, V) <= 64 else 128


def registers(states: int, products: int, others: int) -> dict[str, int]:
    return dict(STATE_REGISTERS=states, PRODUCT_REGISTERS=products, OTHER_REGISTERS=others)


# By dim, and whether the sweep leaves what dg needs: buffers and registers. The registers of all warp groups are 64 K, or half of that
# where two programs share a multiprocessor; with fewer for the states ptxas puts a wait behind every product (C7512).
SWEEP = {
    (64, False): dict(STAGES=3, X_STAGES=1, PRODUCTS=3, SUMS=1, maxnreg=80) | registers(144, 64, 32),
    (64, True): dict(STAGES=2, X_STAGES=2, PRODUCTS=2, SUMS=1, maxnreg=80) | registers(144, 72, 24),
    (128, False): dict(STAGES=3, X_STAGES=1, PRODUCTS=3, SUMS=1, maxnreg=128) | registers(200, 80, 32),
    (128, True): dict(STAGES=2, X_STAGES=2, PRODUCTS=3, SUMS=2, maxnreg=128) | registers(192, 96, 32),
}
# One program to a multiprocessor at D 64 too: with the registers of half of one there is such a wait.
REVERSE = {
    64: dict(STAGES=4, STATE_REGISTERS=240, KEY_REGISTERS=200, OTHER_REGISTERS=32, maxnreg=168),
    128: dict(STAGES=2, STATE_REGISTERS=176, KEY_REGISTERS=128, OTHER_REGISTERS=32, maxnreg=128),
}


@launcher
def launch_sweep(tensors, setting):
    q, k, v, o, x, g, state_in, state_out, *others, cu_seqlens, indices = tensors
    B, T, HQ, K = q.shape
    HV, V = v.shape[2:]
    H = max(HQ, HV)
    D = padded(K, V)
    scale, segment, BA, *_ = setting
    units = count_units(B, T, H, segment, cu_seqlens)
    resident = 2 if D == 64 else 1
    args = (
        *(descriptor(t, D, cu_seqlens) for t in (q, k, v)), descriptor(o, 64, cu_seqlens),
        None if x is None else descriptor(x, D, cu_seqlens),
        g, state_in, state_out, *others, cu_seqlens, indices,
        scale, units, count_sequences(B, cu_seqlens), T, 0 if indices is None else state_out.shape[0], segment or 0,
        count_slots(B, T, BA, cu_seqlens),
        *strides(g, 3), *strides(state_in, 4), *strides(state_out, 4),
    )
    constants = dict(
        H=H, GQ=H // HQ, GV=H // HV, K=K, V=V, BK=D, BV=D, BA=BA, SEGMENTS=segment is not None, X=x is not None,
        **SWEEP[D, x is not None], num_warps=4,
    )
    return sweep_kernel, (min(units, resident * multiprocessors(q.device)), 1, 1), args, constants


def sweep(operands, setting):
    """One sweep over each sequence, or over each of its segments, which then have a state_in of their own: `o`, and with x
    what dg needs: the rows `x . o [1, B, H, T]` of what of o comes from the carried state, less the sums of A over i, and
    those over j, `y [1, B, H, T]`, negative.
    """
    q, k, v, g, state_in, state_out, x, anchors, cu_seqlens, indices = operands
    B, T, H, _, V = operands.sizes()
    o = empty(q, B, T, H, V)
    x_o = y = None
    if x is not None:
        x_o, y = (empty(q, 1, B, H, T, dtype=torch.float32) for _ in range(2))
    launch_sweep((q, k, v, o, x, g, state_in, state_out, x_o, y, anchors, cu_seqlens, indices), setting)
    return o, x_o, y


def anchor_size(K: int, V: int) -> int:
    """Numbers of an anchor of a state `[K, V]`."""
    return padded(K, V) ** 2


@launcher
def launch_reverse(tensors, setting):
    q, k, v, do, dk, dv, g, state_in, state_out, z, anchors, s_ds, cu_seqlens = tensors
    B, T, HK, K = k.shape
    H, V = v.shape[2:]
    D = padded(K, V)
    scale, segment, BA, *_ = setting
    units = count_units(B, T, H, segment, cu_seqlens)
    args = (
        *(descriptor(t, D, cu_seqlens) for t in (q, k, v, do, dk)), descriptor(dv, 64, cu_seqlens),
        g, state_in, state_out, z, anchors, s_ds, cu_seqlens,
        scale, units, count_sequences(B, cu_seqlens), T, segment or 0, count_slots(B, T, BA, cu_seqlens),
        *strides(g, 3), *strides(state_in, 4), *strides(state_out, 4),
    )
    constants = dict(
        H=H, GK=H // HK, K=K, V=V, BK=D, BV=D, BA=BA, SEGMENTS=segment is not None, DG=anchors is not None, **REVERSE[D], num_warps=4,
    )
    return reverse_kernel, (min(units, multiprocessors(q.device)), 1, 1), args, constants


def reverse_sweep(operands, do, setting):
    """One sweep back in time over each sequence, or over each of its segments: dk and dv; and, if there are anchors, what dg needs:
    `z [1, B, H, T]` and `<anchor, state> [D / 16, blocks + N, H]`, one of each warp, D the dim padded.
    """
    q, k, v, g, state_in, state_out, _, anchors, cu_seqlens, _ = operands
    B, T, H, K, V = operands.sizes()
    dk = empty(q, B, T, H, K)
    dv = empty(q, B, T, H, V)
    z = s_ds = None
    if anchors is not None:
        z = empty(q, 1, B, H, T, dtype=torch.float32)
        s_ds = empty(q, padded(K, V) // 16, anchors.shape[0], H, dtype=torch.float32)
    launch_reverse((q, k, v, do, dk, dv, g, state_in, state_out, z, anchors, s_ds, cu_seqlens), setting)
    return dk, dv, z, s_ds
