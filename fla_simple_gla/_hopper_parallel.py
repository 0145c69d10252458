"""The walks of `parallel.py` on Hopper: a job for every warp group, as in `_hopper.py`.

One program to a multiprocessor takes one block of 128 rows of a head after another, those with the most columns first. In it

- `load` brings the rows of q, and the tiles of k and v, to shared memory (TMA),
- `gates` makes the two factors of the decays of each tile, of its rows and of its columns,
- `rows`, one warp group for 64 rows, multiplies: while the tensor cores are at one tile's product with v, it has the scores of the next.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ._blocks import block_bounds, count_sequences, count_slots, is_sequence
from ._hopper import advance, buffers, descriptor, padded, tile, tma_load, tma_store
from ._launch import launcher
from ._layout import multiprocessors
from ._passes import empty, zeros

__all__ = ['BLOCK', 'walk']

BLOCK = 128
BT = gl.constexpr(BLOCK)
HALF = gl.constexpr(64)
STAGES = gl.constexpr(2)


@gluon.jit
def count_rounds(units):
    """How many units a program has: they are dealt to and fro, so that all have about as many columns."""
    P = gl.num_programs(0)
    whole = units // P
    return whole + gl.where(place(whole) < units - whole * P, 1, 0)


@gluon.jit
def place(i):
    """The place of a program in round i."""
    return gl.where(i % 2 == 0, gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0))


@gluon.jit
def unit_bounds(work, i, H: gl.constexpr, REVERSE: gl.constexpr):
    """Of the unit of round i: slot, head, row of the batch, first token of its block and the one after its last, those of the sequence,
    the number of the block in it, and the first and the number of the other blocks that it walks over.
    """
    cu_seqlens, ranges, units, slots, N, T = work
    unit = i * gl.num_programs(0) + place(i)
    if cu_seqlens is None:
        NT = (T + BT - 1) // BT
        rank = unit // (N * H)
        i_b = unit % (N * H) // H
        i_n = i_b
        i_r = rank if REVERSE else NT - 1 - rank
        i_s = i_b * NT + i_r
        bos = i_b * 0
        eos = bos + T
        first = i_r * BT
        end = gl.minimum(first + BT, T)
        i_b = i_b.to(gl.int64)
    else:
        i_s = unit // H if REVERSE else slots - 1 - unit // H
        i_b, i_n, first, end, bos, eos = block_bounds(cu_seqlens, i_s, N, T, BT)
        end = gl.maximum(first, end)
        i_r = (first - bos) // BT
    i_h = unit % H
    lo = i_r + 1 if REVERSE else i_r * 0
    n = ((eos - bos + BT - 1) // BT - lo) if REVERSE else i_r
    if ranges is not None:
        bound = gl.load(ranges + (i_s.to(gl.int64) + (slots if REVERSE else 0)) * H + i_h)
        if cu_seqlens is not None:
            # of bounds that decrease it may be another sequence's (`_blocks.py`), or of an empty slot anything
            bound = gl.minimum(gl.maximum(bound, lo), lo + n)
        if REVERSE:
            n = bound - lo
        else:
            lo = bound
            n = i_r - lo
    # nothing in an empty slot, nor in no sequence
    live = (first < end) & is_sequence(i_n, N)
    return i_s, i_h, i_b, i_n, first, end, bos, eos, i_r, lo, gl.where(live, n, 0), live


@gluon.jit
def load(work, descs, tiles, bars, H: gl.constexpr, GQ: gl.constexpr, GV: gl.constexpr, REVERSE: gl.constexpr, X: gl.constexpr):
    cu_seqlens, ranges, units, slots, N, T = work
    desc_q, desc_k, desc_v, desc_x = descs
    qs, ks, vs, xs = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty, x_full, x_empty = bars
    i = 0
    phase = 1
    x_phase = 1
    i_q = 0
    q_phase = 1
    for u in range(count_rounds(units)):
        _, i_h, i_b, _, first, end, bos, eos, i_r, lo, n, live = unit_bounds(work, u, H, REVERSE)
        if live:
            mbarrier.wait(q_empty.index(i_q), q_phase)
            mbarrier.expect(q_full.index(i_q), BT * qs.shape[2] * 2)
            for w in gl.static_range(2):
                at = tile(cu_seqlens, i_b, i_h // GQ, bos, eos, first - bos + w * HALF, 0)
                tma_load(desc_q, at, q_full.index(i_q), qs.index(i_q * 2 + w))
            for j in range(n + 1):
                # its own block last
                i_t = gl.where(j < n, lo + j, i_r) * BT
                mbarrier.wait(k_empty.index(i), phase)
                mbarrier.expect(k_full.index(i), BT * ks.shape[2] * 2)
                tma_load(desc_k, tile(cu_seqlens, i_b, i_h // GQ, bos, eos, i_t, 0), k_full.index(i), ks.index(i))
                mbarrier.wait(v_empty.index(i), phase)
                mbarrier.expect(v_full.index(i), BT * vs.shape[2] * 2)
                tma_load(desc_v, tile(cu_seqlens, i_b, i_h // GV, bos, eos, i_t, 0), v_full.index(i), vs.index(i))
                i, phase = advance(i, phase, STAGES)
                if X:
                    # that of the unit before is needed to its end, and so are no more tiles of this one
                    if j == gl.minimum(n, 1):
                        mbarrier.wait(x_empty.index(0), x_phase)
                        mbarrier.expect(x_full.index(0), BT * xs.shape[2] * 2)
                        for w in gl.static_range(2):
                            at = tile(cu_seqlens, i_b, i_h // GV, bos, eos, first - bos + w * HALF, 0)
                            tma_load(desc_x, at, x_full.index(0), xs.index(w))
            i_q, q_phase = advance(i_q, q_phase, 2)
            x_phase = x_phase ^ 1


@gluon.jit
def gates(work, c, sums, scale, bufs, bars, H: gl.constexpr, REVERSE: gl.constexpr):
    """The factors of a tile's rows and columns; of the block with itself, the sums of the gates."""
    cu_seqlens, ranges, units, slots, N, T = work
    of_rows, of_columns = bufs
    full, empty = bars
    layout: gl.constexpr = gl.BlockedLayout([BT // 32], [32], [1], [0])
    r = gl.arange(0, BT, layout)
    i = 0
    phase = 1
    for u in range(count_rounds(units)):
        i_s, i_h, _, _, _, _, _, _, i_r, lo, n, live = unit_bounds(work, u, H, REVERSE)
        if live:
            slot = i_s - i_r
            c_r = gl.zeros([BT], gl.float32, layout)
            earlier = c_r
            if c is not None:
                c_r = gl.load(c + (i_s.to(gl.int64) * H + i_h) * BT + r)
                earlier = gl.load(c + (i_s.to(gl.int64) * H + i_h) * BT + BT - 1) - c_r
                # the sum up to the rows' end, or, forward, to where they begin
                sum_r = gl.load(sums + (i_s.to(gl.int64) - (0 if REVERSE else 1)) * H + i_h, mask=(i_r > 0) | REVERSE, other=0.0)
            for j in range(n + 1):
                b_r = c_r
                b_c = c_r
                if j < n:
                    b_r = gl.full([BT], 1.0, gl.float32, layout) * scale
                    b_c = gl.full([BT], 1.0, gl.float32, layout)
                    if c is not None:
                        s = (slot + lo + j).to(gl.int64) * H + i_h
                        c_j = gl.load(c + s * BT + r)
                        if REVERSE:
                            between = (gl.load(sums + s - H) - sum_r).to(gl.float32)
                            b_r = gl.exp2(between + earlier)
                            b_c = gl.exp2(c_j) * scale
                        else:
                            between = (sum_r - gl.load(sums + s)).to(gl.float32)
                            b_r = gl.exp2(c_r) * scale
                            b_c = gl.exp2(between + (gl.load(c + s * BT + BT - 1) - c_j))
                mbarrier.wait(empty.index(i), phase)
                of_rows.index(i).store(b_r)
                of_columns.index(i).store(b_c)
                mbarrier.arrive(full.index(i), count=1)
                i, phase = advance(i, phase, STAGES)


@gluon.jit
def decayed(b_s, scale, own, of_rows, of_columns, W: gl.constexpr, REVERSE: gl.constexpr):
    """Products of a tile, decayed and scaled; of a block with itself those that are not before their time."""
    layout: gl.constexpr = b_s.type.layout
    b_r = of_rows.slice(W * HALF, HALF, dim=0).load(gl.SliceLayout(1, layout))[:, None]
    b_c = of_columns.load(gl.SliceLayout(0, layout))[None, :]
    if own:
        r = W * HALF + gl.arange(0, HALF, gl.SliceLayout(1, layout))[:, None]
        c = gl.arange(0, BT, gl.SliceLayout(0, layout))[None, :]
        if REVERSE:
            b_p = b_s * (gl.where(r <= c, gl.exp2(b_c - b_r), 0.0) * scale)
        else:
            b_p = b_s * (gl.where(r >= c, gl.exp2(b_r - b_c), 0.0) * scale)
    else:
        b_p = b_s * (b_r * b_c)
    return b_p


@gluon.jit
def rows(
    work, scale, x_o, crossing, NB, desc_o, tiles, bufs, bars,
    W: gl.constexpr, H: gl.constexpr, REVERSE: gl.constexpr, X: gl.constexpr, CROSSING: gl.constexpr,
):
    cu_seqlens, ranges, units, slots, N, T = work
    qs, ks, vs, xs = tiles
    of_rows, of_columns = bufs
    q_full, q_empty, k_full, k_empty, v_full, v_empty, x_full, x_empty, g_full, g_empty = bars
    dtype: gl.constexpr = qs.dtype
    BV: gl.constexpr = vs.shape[2]
    layout_p: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BT, 16])
    layout_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BV, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout_o, k_width=2)
    r_o = W * HALF + gl.arange(0, HALF, gl.SliceLayout(1, layout_o))
    x_phase = 0
    i = 0
    phase = 0
    i_q = 0
    q_phase = 0
    any_before = 0
    for u in range(count_rounds(units)):
        i_s, i_h, i_b, i_n, first, end, bos, eos, i_r, lo, n, live = unit_bounds(work, u, H, REVERSE)
        if live:
            b_q = qs.index(i_q * 2 + W)
            b_o = gl.zeros([HALF, BV], gl.float32, layout_o)
            mbarrier.wait(q_full.index(i_q), q_phase)
            mbarrier.wait(k_full.index(i), phase)
            b_s = warpgroup_mma(
                b_q, ks.index(i).permute((1, 0)), gl.zeros([HALF, BT], gl.float32, layout_p), use_acc=False, is_async=True,
            )
            # o of the unit before lies where its q was
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(i_q ^ 1), count=1, pred=any_before > 0)
            any_before = 1
            mbarrier.wait(g_full.index(i), phase)
            b_s = warpgroup_mma_wait(0, (b_s,))
            mbarrier.arrive(k_empty.index(i), count=1)
            b_p = decayed(b_s, scale, n == 0, of_rows.index(i), of_columns.index(i), W, REVERSE)
            b_p = gl.convert_layout(b_p.to(dtype), operand)
            for j in range(n):
                i_v = i
                v_phase = phase
                i, phase = advance(i, phase, STAGES)
                mbarrier.wait(k_full.index(i), phase)
                mbarrier.wait(v_full.index(i_v), v_phase)
                b_s = warpgroup_mma(
                    b_q, ks.index(i).permute((1, 0)), gl.zeros([HALF, BT], gl.float32, layout_p), use_acc=False, is_async=True,
                )
                b_o = warpgroup_mma(b_p, vs.index(i_v), b_o, is_async=True)
                # what was read of them is in b_p by now
                mbarrier.arrive(g_empty.index(i_v), count=1)
                mbarrier.wait(g_full.index(i), phase)
                b_s = warpgroup_mma_wait(1, (b_s,))
                mbarrier.arrive(k_empty.index(i), count=1)
                b_n = decayed(b_s, scale, j == n - 1, of_rows.index(i), of_columns.index(i), W, REVERSE)
                b_n = gl.convert_layout(b_n.to(dtype), operand)
                b_o = warpgroup_mma_wait(0, (b_o,))
                b_p = b_n
                mbarrier.arrive(v_empty.index(i_v), count=1)
                if CROSSING:
                    p_c = crossing + ((W * slots + i_s).to(gl.int64) * H + i_h) * NB + lo + j + 1
                    mbarrier.wait(x_full.index(0), x_phase)
                    gl.store(p_c, gl.sum(gl.sum(xs.index(W).load(layout_o).to(gl.float32) * b_o, 1), 0))
            mbarrier.wait(v_full.index(i), phase)
            b_o = warpgroup_mma(b_p, vs.index(i), b_o, is_async=True)
            mbarrier.arrive(g_empty.index(i), count=1)
            b_o = warpgroup_mma_wait(0, (b_o,))
            mbarrier.arrive(v_empty.index(i), count=1)
            b_q.store(b_o.to(dtype))
            fence_async_shared()
            tma_store(desc_o, tile(cu_seqlens, i_b, i_h, bos, eos, first - bos + W * HALF, 0), b_q)
            if X:
                o_x = first + r_o
                mbarrier.wait(x_full.index(0), x_phase)
                b_x = gl.sum(xs.index(W).load(layout_o).to(gl.float32) * b_o, 1)
                gl.store(x_o + (i_b * H + i_h) * T + o_x, b_x, mask=o_x < end)
                # behind a store of what was read: see `row_sums` in `_hopper.py`
                mbarrier.arrive(x_empty.index(0), count=1)
                x_phase = x_phase ^ 1
            i, phase = advance(i, phase, STAGES)
            i_q, q_phase = advance(i_q, q_phase, 2)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=['units', 'slots', 'N', 'T', 'NB', 'scale'])
def walk_kernel(
    desc_q, desc_k, desc_v, desc_o, desc_x,
    c,  # [slots, H, BLOCK]: running sums of the gates in blocks, or None
    sums,  # [slots, H], fp64: of the gates up to a block's end
    ranges,  # [2, slots, H], int32: the first block that a walk goes over, and, in reverse, the one behind the last; or None
    x_o, crossing, cu_seqlens,
    scale, units, slots, N, T, NB,
    H: gl.constexpr, GQ: gl.constexpr, GV: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, REVERSE: gl.constexpr,
    ROW_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = desc_q.dtype
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    X: gl.constexpr = x_o is not None
    CROSSING: gl.constexpr = crossing is not None
    qs = gl.allocate_shared_memory(dtype, [4, HALF, BK], gl.NVMMASharedLayout.get_default_for([HALF, BK], dtype))
    ks = gl.allocate_shared_memory(dtype, [STAGES, BT, BK], gl.NVMMASharedLayout.get_default_for([BT, BK], dtype))
    vs = gl.allocate_shared_memory(dtype, [STAGES, BT, BV], gl.NVMMASharedLayout.get_default_for([BT, BV], dtype))
    of_rows = gl.allocate_shared_memory(gl.float32, [STAGES, BT], vector)
    of_columns = gl.allocate_shared_memory(gl.float32, [STAGES, BT], vector)
    q_full = buffers(2, 1)
    q_empty = buffers(2, 2)
    k_full = buffers(STAGES, 1)
    k_empty = buffers(STAGES, 2)
    v_full = buffers(STAGES, 1)
    v_empty = buffers(STAGES, 2)
    g_full = buffers(STAGES, 1)
    g_empty = buffers(STAGES, 2)
    if X:
        xs = gl.allocate_shared_memory(dtype, [2, HALF, BV], gl.NVMMASharedLayout.get_default_for([HALF, BV], dtype))
        x_full = buffers(1, 1)
        x_empty = buffers(1, 2)
    else:
        xs = vs
        x_full = v_full
        x_empty = v_full
    fence_async_shared()

    work = (cu_seqlens, ranges, units, slots, N, T)
    tiles = (qs, ks, vs, xs)
    descs = (desc_q, desc_k, desc_v, desc_x)
    bufs = (of_rows, of_columns)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, x_full, x_empty, g_full, g_empty)
    load_bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, x_full, x_empty)
    # constants have to stand in these tuples themselves
    gl.warp_specialize([
        (rows, (work, scale, x_o, crossing, NB, desc_o, tiles, bufs, bars, 0, H, REVERSE, X, CROSSING)),
        (rows, (work, scale, x_o, crossing, NB, desc_o, tiles, bufs, bars, 1, H, REVERSE, X, CROSSING)),
        (load, (work, descs, tiles, load_bars, H, GQ, GV, REVERSE, X)),
        (gates, (work, c, sums, scale, bufs, (g_full, g_empty), H, REVERSE)),
    ], [4, 1, 1], [ROW_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])


@launcher
def launch_walk(tensors, scale, reverse):
    q, k, v, o, x, *others, cu_seqlens = tensors
    B, T, HQ, K = q.shape
    HV, V = v.shape[2:]
    H = max(HQ, HV)
    D = padded(K, V)
    slots = count_slots(B, T, BLOCK, cu_seqlens)
    args = (
        descriptor(q, D, cu_seqlens), *(descriptor(t, D, cu_seqlens, BLOCK) for t in (k, v)), descriptor(o, D, cu_seqlens),
        None if x is None else descriptor(x, D, cu_seqlens),
        *others, cu_seqlens,
        scale, slots * H, slots, count_sequences(B, cu_seqlens), T, -(-T // BLOCK),
    )
    constants = dict(
        H=H, GQ=H // HQ, GV=H // HV, BK=D, BV=D, REVERSE=reverse, ROW_REGISTERS=240, OTHER_REGISTERS=24, maxnreg=168, num_warps=4,
    )
    return walk_kernel, (min(slots * H, multiprocessors(q.device)), 1, 1), args, constants


def walk(operands, setting):
    """One walk: `o`; with x also the rows `x . o [1, B, H, T]` and, not in reverse, what of them comes from before each block
    `[2, slots, H, blocks]`, in two parts, of the first rows of a block and of the others.
    """
    q, k, v, gates, x, cu_seqlens = operands
    B, T, H, _, V = operands.sizes()
    # the tokens in no sequence get zeros, of which no program knows
    o = (empty if cu_seqlens is None else zeros)(q, B, T, H, V)
    x_o = crossing = None
    if x is not None:
        x_o = empty(q, 1, B, H, T, dtype=torch.float32)
        if not setting.reverse:
            # zeros, because tiles without anything are skipped
            crossing = zeros(q, 2, count_slots(B, T, BLOCK, cu_seqlens), H, -(-T // BLOCK), dtype=torch.float32)
    launch_walk((q, k, v, o, x, *gates, x_o, crossing, cu_seqlens), setting.scale, setting.reverse)
    return o, x_o, crossing
