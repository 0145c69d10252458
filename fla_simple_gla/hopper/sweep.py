"""The sweeps for o and dq on Hopper, K and V up to 128: every warp group has a job of its own, so that the tensor cores
are kept busy.

One program to a multiprocessor takes one head of a sequence, or of a segment of it, after another. Its partitions:

    load_partition      1 warp             brings tiles of the next chunks to shared memory (TMA)
    load_z_partition    1 warp             brings z of the next chunk, where o is gated
    gate_partition      1 warp             sums the gates of the next chunks, and makes the decays
    product_partition   4 warps            makes P_ij = scale * exp(c_i - c_j) (q_i . k_j) of pairs i >= j in a chunk
    state_partition     4 warps, 1 or 2    keeps 64 columns of the state in registers, transposed, and makes these of o
    row_sum_partition   2 warps            adds up the rows of x . o, where dg is wanted

The state is transposed so that it feeds the tensor cores from the registers of the warp group that keeps it.

Where heads share q and k and V is at most 64, a task of the sweep for o is two heads (`common.is_paired`). Each has a
state partition, a gate partition, and P of its own, and q . k is made once. `gradients.py` makes their dq. Only their
sweeps take step sizes and D (`_sweeps.Steps`). With one warp for the gates of both heads, o took 0.208 ms with step
sizes at B4 T4096 H80 HK1, and with one for each it takes 0.175 (H200).

Where o is gated by z, each state gates its columns, and leaves o too. A scan of this shape took 0.278 ms, and 0.295
with a kernel for z after the sweep. With Gluon's division it took 0.311, as the special function unit and what each
state does in turn are the bound. The product partition has no time for it: 0.342, in place of 0.302 on that card.

`fused_chunk.py` has the roles of q, k and v in the sweep for dq. For dg (`_gates.py`) that sweep leaves what the
carried states add to q . dq, and the products of the pairs inside a chunk,

    A_ij = scale * exp(c_i - c_j) (q_i . k_j) (do_i . v_j)        for i > j

summed over i for each j and over j for each i, in fp32. The diagonal is in neither: dg does not depend on it.
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .._blocks import count_blocks, count_sequences, is_sequence
from .._launch import launcher
from .._layout import multiprocessors, sizes, strides
from .._passes import empty
from .._sweeps import Operands, Setting, count_swept
from .._triton import kernel_name
from .common import (
    BS,
    C,
    Descriptor,
    Gates,
    GatesOfTokens,
    Number,
    Pointer,
    Ring,
    Skip,
    States,
    Sums,
    Work,
    add_rows,
    aggregate,
    barriers,
    chunks_to_a_program,
    consumer_start,
    count_pair,
    decay_of_pairs,
    descriptor,
    fragment_indices,
    gate_buffers,
    gate_partition,
    padded,
    producer_start,
    relay_buffers,
    ring,
    row_sum_partition,
    tma_load,
    tma_store,
    to_fragments,
)


@aggregate
class Sweep:
    """What the partitions share."""

    work: Work
    state_in: States
    state_out: States
    skip: Skip
    anchors: Pointer
    anchor_blocks: Number
    desc_q: Descriptor
    desc_k: Descriptor
    desc_v: Descriptor
    desc_o: Descriptor
    desc_x: Descriptor
    desc_z: Descriptor
    desc_y: Descriptor
    qs: gl.shared_memory_descriptor  # [STAGES, C, BK]
    ks: gl.shared_memory_descriptor  # likewise
    vs: gl.shared_memory_descriptor  # [STAGES * states, C, BS]
    ps: gl.shared_memory_descriptor  # [PRODUCTS * HEADS, C, C]
    os: gl.shared_memory_descriptor  # [states, C, BS]
    xs: gl.shared_memory_descriptor  # [X_STAGES * states, C, BS]
    zs: gl.shared_memory_descriptor  # [states, C, BS]
    tiles: Ring
    products: Ring
    x: Ring
    z: Ring
    gates: Gates
    sums: Sums
    GQ: gl.constexpr
    GV: gl.constexpr
    K: gl.constexpr
    V: gl.constexpr
    BA: gl.constexpr
    NW: gl.constexpr  # state partitions
    X: gl.constexpr


@gluon.jit
def load_partition(s):
    work = s.work
    NW: gl.constexpr = s.NW
    at = producer_start()
    at_x = producer_start()
    for j in range(work.start(), work.stop(), work.step()):
        task, first, last = work.take(j)
        for i_t in range(first, last, C):
            s.tiles.acquire(at)
            bar = s.tiles.full.index(at.i)
            mbarrier.expect(bar, C * (2 * s.qs.shape[2] + NW * BS) * 2)
            of_q = work.tile(task, task.end, task.i_h // s.GQ, i_t, 0)
            tma_load(s.desc_q, of_q, bar, s.qs.index(at.i))
            tma_load(s.desc_k, of_q, bar, s.ks.index(at.i))
            for w in gl.static_range(NW):
                tma_load(s.desc_v, work.columns(task, i_t, w, s.GV), bar, s.vs.index(at.i * NW + w))
            if s.X:
                s.x.acquire(at_x)
                bar_x = s.x.full.index(at_x.i)
                mbarrier.expect(bar_x, C * NW * BS * 2)
                for w in gl.static_range(NW):
                    tma_load(s.desc_x, work.columns(task, i_t, w, s.GV), bar_x, s.xs.index(at_x.i * NW + w))
                at_x = s.x.after(at_x)
            at = s.tiles.after(at)


@gluon.jit
def load_z_partition(s):
    """z of each chunk, when both states have read that of the one before: the tiles do not wait for that."""
    work = s.work
    NW: gl.constexpr = s.NW
    at = producer_start()
    for j in range(work.start(), work.stop(), work.step()):
        task, first, last = work.take(j)
        for i_t in range(first, last, C):
            s.z.acquire(at)
            bar = s.z.full.index(at.i)
            mbarrier.expect(bar, C * NW * BS * 2)
            for w in gl.static_range(NW):
                tma_load(s.desc_z, work.columns(task, i_t, w, 1), bar, s.zs.index(w))
            at = s.z.after(at)


@gluon.jit
def product_partition(s, scale, y):
    """P of each chunk, and the sums of A: it stores those over j, and leaves those over i to `row_sum_partition`."""
    work = s.work
    H: gl.constexpr = work.H
    HEADS: gl.constexpr = work.HEADS
    NW: gl.constexpr = s.NW
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    o_i = gl.arange(0, C, gl.SliceLayout(1, layout))
    o_j = gl.arange(0, C, gl.SliceLayout(0, layout))
    at = consumer_start()
    at_p = consumer_start()
    at_x = consumer_start()
    at_s = producer_start()
    for j in range(work.start(), work.stop(), work.step()):
        task, first, last = work.take(j)
        for i_t in range(first, last, C):
            s.tiles.wait(at)
            zero = gl.zeros([C, C], gl.float32, layout)
            b_q = warpgroup_mma(
                s.qs.index(at.i), s.ks.index(at.i).permute((1, 0)), zero, use_acc=False, is_async=True
            )  # fmt: skip
            s.gates.ring.wait(at_p)
            for h in gl.static_range(HEADS):
                decay = decay_of_pairs(s.gates, at_p.i * HEADS + h, o_i, o_j, 0, C, scale, False)
                if h == 0:
                    b_q = warpgroup_mma_wait(0, (b_q,))
                b_p = b_q * decay
                # empty: `gate_partition` has waited for that
                s.ps.index(at_p.i * HEADS + h).store(b_p.to(s.ps.dtype))
            fence_async_shared()
            s.products.commit(at_p)
            if s.X:
                s.x.wait(at_x)
                b_a = warpgroup_mma(
                    s.xs.index(at_x.i * NW), s.vs.index(at.i * NW).permute((1, 0)), zero, use_acc=False, is_async=True
                )  # fmt: skip
                for w in gl.static_range(1, NW):
                    b_v = s.vs.index(at.i * NW + w).permute((1, 0))
                    b_a = warpgroup_mma(s.xs.index(at_x.i * NW + w), b_v, b_a, is_async=True)
                b_a = warpgroup_mma_wait(0, (b_a,))
                s.tiles.release(at)
                s.x.release(at_x)
                b_a = gl.where(o_i[:, None] > o_j[None, :], -b_a * b_p, 0.0)
                p_y = y + (task.i_b * H + task.i_h) * work.T + task.first + i_t + o_i
                gl.store(p_y, gl.sum(b_a, 1), mask=task.first + i_t + o_i < task.end)
                b_a = add_rows(b_a, 32)
                s.sums.ring.acquire(at_s)
                s.sums.buffer(at_s, NW).store(b_a)
                s.sums.ring.commit(at_s)
                at_s = s.sums.ring.after(at_s)
                at_x = s.x.after(at_x)
            at = s.tiles.after(at)
            at_p = s.products.after(at_p)


@gluon.jit
def silu(x):
    """x / (1 + exp(-x)), with a reciprocal and an exponential in one instruction each, which round subnormal numbers to
    zero. Those of Gluon take several, for the sake of these.
    """
    return x * gl.inline_asm_elementwise(
        """{
            .reg .f32 e;
            mul.f32 e, $1, 0fBFB8AA3B;  // -log2(e)
            ex2.approx.ftz.f32 e, e;
            add.f32 e, e, 0f3F800000;  // 1
            rcp.approx.ftz.f32 $0, e;
        }""",
        '=f,f', [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def state_partition(s, W: gl.constexpr):
    """64 columns of the state and of o: those from W * BS on, or those of head W."""
    work = s.work
    H: gl.constexpr = work.H
    NW: gl.constexpr = s.NW
    HEADS: gl.constexpr = work.HEADS
    HEAD: gl.constexpr = W if HEADS == 2 else 0
    COLUMN: gl.constexpr = 0 if HEADS == 2 else W * BS
    BK: gl.constexpr = s.qs.shape[2]
    dtype: gl.constexpr = s.qs.dtype
    layout_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BK, 16])
    layout_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    operand_o: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout_o, k_width=2)
    operand_s: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout_s, k_width=2)
    o_v = COLUMN + gl.arange(0, BS, gl.SliceLayout(1, layout_s))
    o_k = gl.arange(0, BK, gl.SliceLayout(0, layout_s))
    at = consumer_start()
    at_p = consumer_start()
    at_x = consumer_start()
    at_s = producer_start()
    at_z = consumer_start()
    at_y = consumer_start()
    y_is_in_tile = False
    for j in range(work.start(), work.stop(), work.step()):
        task, first, last = work.take(j)
        i_h = task.i_h + HEAD
        b_s = gl.zeros([BS, BK], gl.float32, layout_s)
        if s.state_in.p is not None:
            i_in = task.i_s.to(gl.int64) if work.SEGMENTS else work.slot(task.i_n)
            # there is none of padding, nor of what lies in no sequence
            columns = gl.where(is_sequence(task.i_n, work.N) & (i_in >= 0), s.V, 0)
            b_s = s.state_in.load(s.state_in.of(i_in, i_h), o_v, o_k, columns, s.K)
        if work.relay is not None:
            if first > 0:
                b_s = work.take_over((b_s,), W, NW)[0]
        b_h = gl.convert_layout(b_s.to(dtype), operand_o)
        if s.skip.p is not None:
            skip = s.skip.load(i_h, gl.arange(0, BS, gl.SliceLayout(1, layout_o)), s.V)
        for i_t in range(first, last, C):
            if s.X:
                wanted, i_a = work.anchor(task, i_t // C, s.anchor_blocks, s.BA)
                if wanted:
                    # the reverse sweep holds the state the other way round
                    b_a = gl.inline_asm_elementwise(
                        'movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;', '=r,r', [b_h],
                        dtype=b_h.dtype, is_pure=False, pack=2,
                    )  # fmt: skip
                    t, x = fragment_indices(BK // 2)
                    tile_16 = x // 8 * (NW * BS // 16) + W * (BS // 16) + t // 32
                    p_a = s.anchors + (i_a.to(gl.int64) * H + task.i_h) * (BK * NW * BS)
                    gl.store(p_a + ((tile_16 * 32 + t % 32) * 8 + x % 8), to_fragments(b_a))
            s.tiles.wait(at)
            # a wait on what is done: without it ptxas puts one of its own before the product with the decay (C7517)
            b_s = warpgroup_mma_wait(0, (b_s,))
            b_o = warpgroup_mma(
                b_h, s.qs.index(at.i).permute((1, 0)), gl.zeros([BS, C], gl.float32, layout_o),
                use_acc=False, is_async=True,
            )  # fmt: skip
            b_v = s.vs.index(at.i * NW + W).permute((1, 0)).load(operand_s)
            s.gates.ring.wait(at_p)
            i_g = at_p.i * HEADS + HEAD
            to_end = s.gates.to_end.index(i_g).load(gl.SliceLayout(0, operand_s))
            b_d = (b_v.to(gl.float32) * to_end[None, :]).to(dtype)
            from_start = s.gates.from_start.index(i_g).load(gl.SliceLayout(0, layout_o))
            b_s = b_s * s.gates.decays.index(i_g).load(gl.SliceLayout(0, layout_s))[None, :]
            b_s = warpgroup_mma(b_d, s.ks.index(at.i), b_s, is_async=True)
            b_o = warpgroup_mma_wait(1, (b_o,))
            b_o = b_o * from_start[None, :]
            if s.X:
                s.x.wait(at_x)
                b_x = s.xs.index(at_x.i * NW + W).permute((1, 0)).load(operand_o)
                b_x = gl.convert_layout(b_x, layout_o)
                b_x = add_rows(b_o * b_x.to(gl.float32), 32)
                s.sums.ring.acquire(at_s)
                s.sums.buffer(at_s, W).store(b_x)
                s.sums.ring.commit(at_s)
                # not before the sums are written: see `row_sum_partition`
                s.x.release(at_x)
                at_s = s.sums.ring.after(at_s)
                at_x = s.x.after(at_x)
            s.products.wait(at_p)
            b_p = s.ps.index(i_g).permute((1, 0))
            b_o = warpgroup_mma(gl.convert_layout(b_v, operand_o), b_p, b_o, is_async=True)
            b_s = warpgroup_mma_wait(1, (b_s,))
            if (s.skip.p is None) & (s.desc_z is None):
                s.tiles.release(at)
            b_h = gl.convert_layout(b_s.to(dtype), operand_o)
            tma.store_wait(0)
            if s.desc_z is not None:
                if y_is_in_tile:
                    s.tiles.release(at_y)
                    at_y = s.tiles.after(at_y)
                y_is_in_tile = True
            b_o = warpgroup_mma_wait(0, (b_o,))
            s.products.release(at_p)
            if s.skip.p is not None:
                of_v = gl.convert_layout(s.vs.index(at.i * NW + W).permute((1, 0)).load(operand_o), layout_o)
                b_o += of_v.to(gl.float32) * skip[:, None]
            s.os.index(W).permute((1, 0)).store(b_o.to(dtype))
            if s.desc_z is not None:
                s.z.wait(at_z)
                b_z = gl.convert_layout(s.zs.index(W).permute((1, 0)).load(operand_o), layout_o).to(gl.float32)
                b_y = b_o * silu(b_z)
                # nobody reads v any more
                s.vs.index(at.i * NW + W).permute((1, 0)).store(b_y.to(dtype))
            elif s.skip.p is not None:
                s.tiles.release(at)
            fence_async_shared()
            tma_store(s.desc_o, work.tile(task, task.end, i_h, i_t, COLUMN), s.os.index(W))
            if s.desc_z is not None:
                s.z.release(at_z)
                at_z = s.z.after(at_z)
                tma_store(s.desc_y, work.columns(task, i_t, W, 1), s.vs.index(at.i * NW + W))
            at = s.tiles.after(at)
            at_p = s.products.after(at_p)
        if work.relay is not None:
            if last < task.tokens():
                work.hand_over((b_s,), W, NW)
        work.clear(task, s.desc_o, s.os.index(W), i_h, COLUMN)
        if s.state_out.p is not None:
            # the last segment's; a sequence without tokens has no segment, and then the combine leaves its state
            slot = work.slot(task.i_n)
            swept = (task.first < task.end) if work.SEGMENTS else (task.first == task.bos)
            if is_sequence(task.i_n, work.N) & (slot >= 0) & (task.end == task.eos) & swept & (last == task.tokens()):
                s.state_out.store(s.state_out.of(slot, i_h), o_v, o_k, b_s, s.V, s.K)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=['tasks', 'N', 'T', 'P', 'segment', 'share', 'anchor_blocks', 'scale'],
    repr=kernel_name('hopper_sweep'),
)
def hopper_sweep_kernel(
    desc_q, desc_k,  # tiles [C, BK] of [B, T, H // GQ, K]
    desc_v,  # tiles [C, BS] of [B, T, H // GV, V]
    desc_o,  # tiles [C, BS] of [B, T, H, V]
    desc_x,  # tiles [C, BS] of [B, T, H // GV, V], or None
    desc_z, desc_y,  # tiles [C, BS] of [B, T, H, V], or None
    g, dt,  # [B, T, H], any strides, those of dt as those of g; or None
    D,  # [H, V], any strides, or None
    state_in,  # [N, H, K, V], or with indices [slots, H, K, V], of segments [segments, H, K, V], any strides, or None
    state_out,  # [N, H, K, V], or with indices [slots, H, K, V], any strides, or None
    x_o,  # [1, B, H, T]: rows x . o of what of o comes from the carried state, less the sums of A over i
    y,  # [1, B, H, T]: the sums of A over j, negative
    anchors,  # [anchor blocks + N, H, BK * NW * BS]: states before some chunks, transposed 8 x 8 tile by 8 x 8 tile
    cu_seqlens,  # [N + 1] or None
    indices,  # [N]: the slots of the sequences' states in a pool; or None
    relay, flags,  # [programs, HEADS * BK * NW * BS], [programs, NW * 128]: what programs hand over, or None
    scale, tasks, N, T,
    P,  # slots of the pool
    segment,  # tokens
    share,  # chunks to a program in a relay
    anchor_blocks,
    g_b, g_t, g_h,
    D_h, D_v,
    si_n, si_h, si_k, si_v,
    so_n, so_h, so_k, so_v,
    ROLE: gl.constexpr,  # what the sweep makes: the kernel's name tells it
    H: gl.constexpr, GQ: gl.constexpr, GV: gl.constexpr,
    K: gl.constexpr, V: gl.constexpr, BA: gl.constexpr,
    SEGMENTS: gl.constexpr, X: gl.constexpr, BK: gl.constexpr, NW: gl.constexpr, HEADS: gl.constexpr,
    STAGES: gl.constexpr, X_STAGES: gl.constexpr, PRODUCTS: gl.constexpr, SUMS: gl.constexpr,
    STATE_REGISTERS: gl.constexpr, PRODUCT_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """o of one task after another. Rings, with NW state partitions, one for 64 columns of V or for a head:

        ring           buffers                    full                        empty
        tiles          STAGES: q, k, v            load, by TMA                each state; with x products
        gates          PRODUCTS: sums, decays     gates, of each head         that of products
        products       PRODUCTS: P                products                    each state
        x              X_STAGES: x                load, by TMA                each state, products
        z              1: z                       load_z, by TMA              each state
        sums           SUMS: partial row sums     each state, products        row sums

    As compiled by triton 3.6, with no state given, no packed sequences and no head that programs share:
    bytes of shared memory, and bytes of spills, stored and loaded. `python -m benchmarks kernels` has the others, some
    of which spill more.

        K, V of the roles    o                    dq with x
        64, 64               109,268    28,  32   108,608   128, 168    two programs to a multiprocessor
        64, 64, alone        142,808     0,   0   158,612     0,   0
        64, 128              142,088     0,   0   224,184    16,  16
        128, 64              158,420     0,   0   207,764     0,   0
        128, 64, pairs       218,132   104, 100
        with step sizes, D   219,700    48,  56
        and with z           217,704    52,  56
        128, 128             191,240    80,  92   224,152    72,  84

    `product_partition` does not wait until a buffer of P is empty: `gate_partition` has, before it filled the gates of
    the chunk. Without x it does not release tiles: each state does after it has waited for P, which was made of them.
    With D a state releases them after it has stored o, for which it reads v once more. With z it leaves y in the place
    of v, and releases the tiles in the next chunk, when y has been stored from there.
    """
    dtype: gl.constexpr = desc_q.dtype
    by_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BK], dtype)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    qs = gl.allocate_shared_memory(dtype, [STAGES, C, BK], by_k)
    ks = gl.allocate_shared_memory(dtype, [STAGES, C, BK], by_k)
    vs = gl.allocate_shared_memory(dtype, [STAGES * NW, C, BS], square)
    ps = gl.allocate_shared_memory(dtype, [PRODUCTS * HEADS, C, C], square)
    os = gl.allocate_shared_memory(dtype, [NW, C, BS], square)
    tiles = ring(STAGES, 1, NW + X)
    products = ring(PRODUCTS, 1, NW)
    gates = gate_buffers(PRODUCTS * HEADS, Ring(barriers(PRODUCTS, HEADS), products.empty), dt is not None)
    if X:
        xs = gl.allocate_shared_memory(dtype, [X_STAGES * NW, C, BS], square)
        x = ring(X_STAGES, 1, NW + 1)
        partial_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0])
        partial = gl.allocate_shared_memory(gl.float32, [SUMS * (NW + 1), 32, C], partial_layout)
        sums = Sums(partial, ring(SUMS, NW + 1, 1))
    else:
        # what is there stands in for what nobody reads
        xs = vs
        x = tiles
        sums = Sums(gates.sums, tiles)
    zs = vs
    z = tiles
    if desc_z is not None:
        zs = gl.allocate_shared_memory(dtype, [NW, C, BS], square)
        z = ring(1, 1, NW)
    fence_async_shared()

    work = Work(cu_seqlens, indices, tasks, N, T, P, segment, relay, flags, share, H, HEADS, SEGMENTS)
    s = Sweep(
        work, States(state_in, si_n, si_h, si_k, si_v), States(state_out, so_n, so_h, so_k, so_v),
        Skip(D, D_h, D_v), anchors, anchor_blocks, desc_q, desc_k, desc_v, desc_o, desc_x, desc_z, desc_y,
        qs, ks, vs, ps, os, xs, zs, tiles, products, x, z, gates, sums,
        GQ, GV, K, V, BA, NW, X,
    )  # fmt: skip
    tokens = GatesOfTokens(g, dt, g_b, g_t, g_h, scale)
    of_sums = (work, sums, x_o, None, False)
    if desc_z is not None:
        gl.warp_specialize([
            (state_partition, (s, 0)),
            (state_partition, (s, 1)),
            (product_partition, (s, scale, y)),
            (gate_partition, (work, gates, tokens, False, 0, 1)),
            (gate_partition, (work, gates, tokens, False, 1, 1)),
            (load_partition, (s,)),
            (load_z_partition, (s,)),
        ], [4, 4, 1, 1, 1, 1],
        [STATE_REGISTERS, PRODUCT_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS,
         OTHER_REGISTERS])  # fmt: skip
    elif HEADS == 2:
        gl.warp_specialize([
            (state_partition, (s, 0)),
            (state_partition, (s, 1)),
            (product_partition, (s, scale, y)),
            (gate_partition, (work, gates, tokens, False, 0, 1)),
            (gate_partition, (work, gates, tokens, False, 1, 1)),
            (load_partition, (s,)),
        ], [4, 4, 1, 1, 1],
        [STATE_REGISTERS, PRODUCT_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
    elif NW == 2:
        if X:
            gl.warp_specialize([
                (state_partition, (s, 0)),
                (state_partition, (s, 1)),
                (product_partition, (s, scale, y)),
                (gate_partition, (work, gates, tokens, False, 0, 1)),
                (load_partition, (s,)),
                (row_sum_partition, of_sums),
            ], [4, 4, 1, 1, 2],
            [STATE_REGISTERS, PRODUCT_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
        else:
            gl.warp_specialize([
                (state_partition, (s, 0)),
                (state_partition, (s, 1)),
                (product_partition, (s, scale, y)),
                (gate_partition, (work, gates, tokens, False, 0, 1)),
                (load_partition, (s,)),
            ], [4, 4, 1, 1], [STATE_REGISTERS, PRODUCT_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
    elif X:
        gl.warp_specialize([
            (state_partition, (s, 0)),
            (product_partition, (s, scale, y)),
            (gate_partition, (work, gates, tokens, False, 0, 1)),
            (load_partition, (s,)),
            (row_sum_partition, of_sums),
        ], [4, 1, 1, 2], [PRODUCT_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (state_partition, (s, 0)),
            (product_partition, (s, scale, y)),
            (gate_partition, (work, gates, tokens, False, 0, 1)),
            (load_partition, (s,)),
        ], [4, 1, 1], [PRODUCT_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip


class Config(NamedTuple):
    """Buffers of each ring, programs to a multiprocessor, and registers to a thread: of the second state partition
    (there is none up to V 64), of the product partition, of the others, and the most of the kernel as ptxas sees it.
    x_stages and sums are of sweeps with x.
    """

    stages: int
    x_stages: int
    products: int
    sums: int
    resident: int
    state_registers: int
    product_registers: int
    other_registers: int
    most_registers: int


# By rows and columns of the state of a head, heads of a task, and whether the sweep leaves what dg needs. The
# registers of all warp groups are 64 K, or half of that where two programs share a multiprocessor; with fewer for the
# states ptxas puts a wait after every product (C7512). At K 64, V 128, B4 T4096 H64, o takes 0.220 ms and dq 0.246, and
# as K = V = 128 they took 0.214 and 0.291 (H200).
CONFIGS = {
    (64, 64, 1, False): Config(3, 1, 3, 1, 2, 144, 64, 32, 80),
    (64, 64, 1, True): Config(2, 2, 2, 1, 2, 144, 72, 24, 80),
    (64, 128, 1, False): Config(3, 1, 3, 1, 1, 168, 136, 32, 128),
    (64, 128, 1, True): Config(3, 2, 3, 2, 1, 168, 144, 24, 128),
    (128, 64, 1, False): Config(3, 1, 3, 1, 1, 240, 200, 32, 168),
    (128, 64, 1, True): Config(3, 2, 3, 2, 1, 240, 200, 32, 168),
    (128, 64, 2, False): Config(3, 1, 3, 1, 1, 192, 88, 40, 128),
    (128, 128, 1, False): Config(3, 1, 3, 1, 1, 200, 80, 32, 128),
    (128, 128, 1, True): Config(2, 2, 3, 2, 1, 192, 96, 32, 128),
}
# Likewise, where each program has a multiprocessor to itself anyway. At B2 T2048 H64 HK1 D64 dq takes 0.045 ms in place
# of 0.065, and o 0.032 in place of 0.035 (H200).
ALONE = {
    (64, 64, 1, False): Config(4, 1, 4, 1, 1, 144, 200, 32, 168),
    (64, 64, 1, True): Config(3, 2, 3, 2, 1, 144, 200, 32, 168),
}


def count_work(q: torch.Tensor, v: torch.Tensor, setting: Setting, x: bool, cu_seqlens: torch.Tensor | None) -> tuple:
    """The tasks, the programs and the configuration of a launch."""
    B, T, H, K, V = sizes(q, v)
    heads = count_pair(q, v)
    tasks = count_swept(B, T, setting.segment, cu_seqlens) * (H // heads)
    key = *padded(K, V), heads, x
    config = CONFIGS[key] if tasks > multiprocessors(q.device) else ALONE.get(key, CONFIGS[key])
    return tasks, min(tasks, config.resident * multiprocessors(q.device)), config


@launcher
def launch_sweep(tensors, setting: Setting):
    q, k, v, o, x, z, y, g, dt, D, state_in, state_out, *others, cu_seqlens, indices, relay, flags = tensors
    B, T, H, K, V = sizes(q, v)
    heads = count_pair(q, v)
    BK, BV = padded(K, V)
    scale, segment, BA, *_ = setting
    tasks, programs, config = count_work(q, v, setting, x is not None, cu_seqlens)
    args = (
        *(descriptor(t, BK, cu_seqlens) for t in (q, k)),
        *(None if t is None else descriptor(t, BS.value, cu_seqlens) for t in (v, o, x, z, y)),
        g, dt, D, state_in, state_out, *others, cu_seqlens, indices, relay, flags,
        scale, tasks, count_sequences(B, cu_seqlens), T,
        0 if indices is None else state_out.shape[0], segment or 0,
        chunks_to_a_program(relay, tasks, programs, T), count_blocks(B, T, BA, cu_seqlens),
        *strides(g, 3), *strides(D, 2), *strides(state_in, 4), *strides(state_out, 4),
    )  # fmt: skip
    constants = dict(
        ROLE=setting.role, H=H, GQ=H // q.shape[2], GV=H // v.shape[2], K=K, V=V, BA=BA,
        SEGMENTS=segment is not None, X=x is not None,
        BK=BK, NW=BV // BS.value * heads, HEADS=heads, STAGES=config.stages, X_STAGES=config.x_stages,
        PRODUCTS=config.products - (z is not None),  # z has the memory of one
        SUMS=config.sums, STATE_REGISTERS=config.state_registers,
        PRODUCT_REGISTERS=config.product_registers, OTHER_REGISTERS=config.other_registers,
        maxnreg=config.most_registers, num_warps=4,
    )  # fmt: skip
    return hopper_sweep_kernel, (programs, 1, 1), args, constants


def sweep(operands: Operands, setting: Setting):
    """One sweep over each sequence, or over each of its segments, which then have a state_in of their own: `o`, and
    with x what dg needs: the rows `x . o [1, B, H, T]` of what of o comes from the carried state, less the sums of A
    over i, and those over j, `y [1, B, H, T]`, negative.
    """
    q, k, v, g, state_in, state_out, x, anchors, cu_seqlens, indices, steps = operands
    B, T, H, _, V = sizes(q, v)
    o = empty(q, B, T, H, V)
    x_o = y = None
    if x is not None:
        x_o, y = (empty(q, 1, B, H, T, dtype=torch.float32) for _ in range(2))
    tasks, programs, _ = count_work(q, v, setting, x is not None, cu_seqlens)
    handed_over = relay_buffers(operands, setting, tasks, (programs, 1), 128 * 128)
    others = x_o, y, anchors, cu_seqlens, indices
    dt, D, z, gated, *_ = steps or (None,) * 4
    launch_sweep((q, k, v, o, x, z, gated, g, dt, D, state_in, state_out, *others, *handed_over), setting)
    return o, x_o, y


def anchor_size(K: int, V: int) -> int:
    """Numbers of an anchor of a state `[K, V]`."""
    BK, BV = padded(K, V)
    return BK * BV
