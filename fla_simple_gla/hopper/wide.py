"""The sweeps on Hopper where K or V is over 128, up to 256. `sweep.py` and `reverse.py` have those of smaller dims.

A state of 256 x 256 would fill all registers of a multiprocessor. So a program takes 128 columns of V. Where there are
more, another one, which runs at the same time and finds q and k in the L2 cache, takes the rest: the grid is
[programs, halves of V]. Its partitions:

    load_partition      1 warp          brings tiles of the next chunks to shared memory (TMA), anchors to the L2 cache
    gate_partition      1 warp          sums the gates of the next chunks, and makes the decays
    product_partition   4 warps         makes P_ij = scale * exp(c_i - c_j) (q_i . k_j) of the pairs i >= j in a chunk
    state_partition     4 warps, twice  keeps 64 columns of the state in registers, transposed, and makes these of o
    row_sum_partition   2 warps         adds up the rows of x . o, where dg is wanted

One kernel makes all four sweeps, in either direction: o, dq, dk and dv, with the roles that `fused_chunk.py` describes.
For dg the sweep for dq leaves w and anchors, and the one for dk z, y and what the anchors give (`_gates.py`). As in the
plain sweeps, w is the whole of q . dq, and y the part of k . dk that comes from pairs inside a chunk. To sum the pairs
apart, as the sweeps of smaller dims do, takes one more product, for which `product_partition` has neither the time nor
the registers.

A state partition holds its 64 columns as four tensors [64 of V, 64 of K]. They are converted for the tensor cores,
multiplied and waited for one after the other, as the registers have no room for a copy of the whole.
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
    Number,
    Pointer,
    Ring,
    States,
    Sums,
    Work,
    aggregate,
    barriers,
    consumer_start,
    descriptor,
    fragment_indices,
    gate_buffers,
    gate_partition,
    prefetch,
    producer_start,
    ring,
    row_sum_partition,
    store_sum,
    tma_load,
    tma_store,
    to_fragments,
)

BK = gl.constexpr(256)  # K, padded
BV = gl.constexpr(128)  # columns of V to a program
PIECE = gl.constexpr(64)  # columns of K to a tensor of the state: as many as a chunk has tokens
ROWS = gl.constexpr(16)  # partial sums of a warp group to a token


@aggregate
class Sweep:
    """What the partitions share."""

    work: Work
    state_in: States
    state_out: States
    anchors: Pointer
    s_ds: Pointer
    anchor_blocks: Number
    desc_q: Descriptor
    desc_k: Descriptor
    desc_v: Descriptor
    desc_o: Descriptor
    desc_x: Descriptor
    qs: gl.shared_memory_descriptor  # [STAGES, C, BK]
    ks: gl.shared_memory_descriptor  # likewise
    vs: gl.shared_memory_descriptor  # [STAGES, C, BV]
    ps: gl.shared_memory_descriptor  # [STAGES, C, C]
    os: gl.shared_memory_descriptor  # [2, C, BS]
    xs: gl.shared_memory_descriptor  # [1, C, BV]
    q: Ring
    k: Ring
    v: Ring
    products: Ring
    x: Ring
    gates: Gates
    sums: Sums
    GQ: gl.constexpr
    GV: gl.constexpr
    K: gl.constexpr
    V: gl.constexpr
    BA: gl.constexpr
    REVERSE: gl.constexpr
    X: gl.constexpr

    @gluon.jit
    def half_anchor(self, i_a, i_h):
        """Where the anchor of these columns begins: in the order of the threads, the same to leave and to read it."""
        # a constant: that the grid knows it too costs a load from local memory, which waits for the L2 cache
        HALVES: gl.constexpr = (self.V + BV - 1) // BV
        return self.anchors + ((i_a.to(gl.int64) * self.work.H + i_h) * HALVES + gl.program_id(1)) * (BK * BV)


@gluon.jit
def chunk_start(i, NT, REVERSE: gl.constexpr):
    """First token of the chunk that a sweep comes to after i others, counted from that of the task."""
    return ((NT - 1 - i) if REVERSE else i) * C


@gluon.jit
def sum_quads(x):
    """Of `x [64, N]`, in the layout of a product, rows i, i + 4, i + 8 and i + 12 of every 16 added up, `[16, N]`. A
    thread has two of the four, and another one the others.
    """
    N: gl.constexpr = x.shape[1]
    return gl.sum(gl.sum(x.reshape([4, 2, 2, 4, N]), 1), 1).reshape([ROWS, N])


@gluon.jit
def load_partition(s):
    work = s.work
    i_v = gl.program_id(1) * BV
    at = producer_start()
    at_x = producer_start()
    for i in range(gl.program_id(0), work.tasks, gl.num_programs(0)):
        task = work.task(i)
        NT = task.chunks()
        for n in range(NT):
            i_t = chunk_start(n, NT, s.REVERSE)
            of_q = work.tile(task, task.end, task.i_h // s.GQ, i_t, 0)
            of_v = work.tile(task, task.end, task.i_h // s.GV, i_t, i_v)
            s.q.acquire(at)
            if s.X and s.REVERSE:
                wanted, i_a = work.anchor(task, i_t // C, s.anchor_blocks, s.BA)
                if wanted:
                    prefetch(s.half_anchor(i_a, task.i_h), 2 * BK * BV)
            mbarrier.expect(s.q.full.index(at.i), C * BK * 2)
            tma_load(s.desc_q, of_q, s.q.full.index(at.i), s.qs.index(at.i))
            s.k.acquire(at)
            mbarrier.expect(s.k.full.index(at.i), C * BK * 2)
            tma_load(s.desc_k, of_q, s.k.full.index(at.i), s.ks.index(at.i))
            s.v.acquire(at)
            mbarrier.expect(s.v.full.index(at.i), C * BV * 2)
            tma_load(s.desc_v, of_v, s.v.full.index(at.i), s.vs.index(at.i))
            if s.X:
                s.x.acquire(at_x)
                mbarrier.expect(s.x.full.index(at_x.i), C * BV * 2)
                tma_load(s.desc_x, of_v, s.x.full.index(at_x.i), s.xs.index(at_x.i))
                at_x = s.x.after(at_x)
            at = s.q.after(at)


@gluon.jit
def product_partition(s, scale):
    """P of each chunk, in two halves of its columns."""
    work = s.work
    HALF: gl.constexpr = C // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    o_i = gl.arange(0, C, gl.SliceLayout(1, layout))
    o_j = gl.arange(0, HALF, gl.SliceLayout(0, layout))
    at = consumer_start()
    for i in range(gl.program_id(0), work.tasks, gl.num_programs(0)):
        task = work.task(i)
        for _ in range(0, task.end - task.first, C):
            s.q.wait(at)
            s.k.wait(at)
            for j in gl.static_range(2):
                b_k = s.ks.index(at.i).slice(j * HALF, HALF, dim=0).permute((1, 0))
                b_p = warpgroup_mma(
                    s.qs.index(at.i), b_k, gl.zeros([C, HALF], gl.float32, layout), use_acc=False, is_async=True
                )  # fmt: skip
                if j == 0:
                    s.gates.ring.wait(at)
                c_i = s.gates.sums.index(at.i).load(gl.SliceLayout(1, layout))
                c_j = s.gates.sums.index(at.i).slice(j * HALF, HALF, dim=0).load(gl.SliceLayout(0, layout))
                if s.REVERSE:
                    before = o_i[:, None] <= o_j[None, :] + j * HALF
                    d = c_j[None, :] - c_i[:, None]
                else:
                    before = o_i[:, None] >= o_j[None, :] + j * HALF
                    d = c_i[:, None] - c_j[None, :]
                decay = gl.where(before, gl.exp2(d), 0.0) * scale
                b_p = warpgroup_mma_wait(0, (b_p,))
                # empty: `gate_partition` has waited for that
                s.ps.index(at.i).slice(j * HALF, HALF, dim=1).store((b_p * decay).to(s.ps.dtype))
            fence_async_shared()
            s.products.commit(at)
            at = s.products.after(at)


@gluon.jit
def load_x(xs, W: gl.constexpr, operand: gl.constexpr, layout: gl.constexpr):
    return gl.convert_layout(xs.index(0).slice(W * BS, BS, dim=1).permute((1, 0)).load(operand), layout).to(gl.float32)


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
def state_partition(s, W: gl.constexpr):
    """Columns W * BS to (W + 1) * BS of the program's half of the state, and of o."""
    work = s.work
    H: gl.constexpr = work.H
    dtype: gl.constexpr = s.qs.dtype
    # of the state transposed [BS, PIECE], and of o transposed [BS, C]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout, k_width=2)
    of_o = s.gates.to_end if s.REVERSE else s.gates.from_start
    of_v = s.gates.from_start if s.REVERSE else s.gates.to_end
    i_v = gl.program_id(1) * BV + W * BS
    o_v = i_v + gl.arange(0, BS, gl.SliceLayout(1, layout))
    o_k = gl.arange(0, PIECE, gl.SliceLayout(0, layout))
    at = consumer_start()
    at_x = consumer_start()
    at_s = producer_start()
    for i in range(gl.program_id(0), work.tasks, gl.num_programs(0)):
        task = work.task(i)
        s0 = gl.zeros([BS, PIECE], gl.float32, layout)
        s1 = gl.zeros([BS, PIECE], gl.float32, layout)
        s2 = gl.zeros([BS, PIECE], gl.float32, layout)
        s3 = gl.zeros([BS, PIECE], gl.float32, layout)
        if s.state_in.p is not None:
            i_in = task.i_s.to(gl.int64) if work.SEGMENTS else work.slot(task.i_n)
            p_in = s.state_in.of(i_in, task.i_h)
            # there is none of padding, nor of what lies in no sequence
            columns = gl.where(is_sequence(task.i_n, work.N) & (i_in >= 0), s.V, 0)
            s0 = s.state_in.load(p_in, o_v, o_k, columns, s.K)
            s1 = s.state_in.load(p_in, o_v, o_k + PIECE, columns, s.K)
            s2 = s.state_in.load(p_in, o_v, o_k + 2 * PIECE, columns, s.K)
            s3 = s.state_in.load(p_in, o_v, o_k + 3 * PIECE, columns, s.K)
        NT = task.chunks()
        for n in range(NT):
            i_t = chunk_start(n, NT, s.REVERSE)
            if s.X:
                wanted, i_a = work.anchor(task, i_t // C, s.anchor_blocks, s.BA)
                if wanted:
                    p_a = s.half_anchor(i_a, task.i_h) + W * (BK * BS)
                    if s.REVERSE:
                        # two are on their way while one is multiplied
                        a0 = load_anchor(p_a)
                        a1 = load_anchor(p_a + PIECE * BS)
                        b_a = times_anchor(a0, s0)
                        a2 = load_anchor(p_a + 2 * PIECE * BS)
                        b_a += times_anchor(a1, s1)
                        a3 = load_anchor(p_a + 3 * PIECE * BS)
                        b_a += times_anchor(a2, s2)
                        b_a += times_anchor(a3, s3)
                        i_w = gl.program_id(1) * (BV // BS) + W
                        store_sum(s.s_ds, b_a, i_w, i_a, task.i_h, s.anchor_blocks + work.N, H)
                    else:
                        leave_anchor(p_a, s0)
                        leave_anchor(p_a + PIECE * BS, s1)
                        leave_anchor(p_a + 2 * PIECE * BS, s2)
                        leave_anchor(p_a + 3 * PIECE * BS, s3)
            s.q.wait(at)
            b_q = s.qs.index(at.i)
            b_o = warpgroup_mma(
                gl.convert_layout(s0.to(dtype), operand), b_q.slice(0, PIECE, dim=1).permute((1, 0)),
                gl.zeros([BS, C], gl.float32, layout), use_acc=False, is_async=True,
            )  # fmt: skip
            b_o = warpgroup_mma_wait(0, (b_o,))
            b_h = gl.convert_layout(s1.to(dtype), operand)
            b_o = warpgroup_mma(b_h, b_q.slice(PIECE, PIECE, dim=1).permute((1, 0)), b_o, is_async=True)
            b_o = warpgroup_mma_wait(0, (b_o,))
            b_h = gl.convert_layout(s2.to(dtype), operand)
            b_o = warpgroup_mma(b_h, b_q.slice(2 * PIECE, PIECE, dim=1).permute((1, 0)), b_o, is_async=True)
            b_o = warpgroup_mma_wait(0, (b_o,))
            b_h = gl.convert_layout(s3.to(dtype), operand)
            b_o = warpgroup_mma(b_h, b_q.slice(3 * PIECE, PIECE, dim=1).permute((1, 0)), b_o, is_async=True)
            s.gates.ring.wait(at)
            decay = s.gates.decays.index(at.i).load(gl.SliceLayout(0, layout))
            s0 = s0 * decay[None, :]
            s1 = s1 * decay[None, :]
            b_o = warpgroup_mma_wait(0, (b_o,))
            s2 = s2 * decay[None, :]
            s3 = s3 * decay[None, :]
            b_o = b_o * of_o.index(at.i).load(gl.SliceLayout(0, layout))[None, :]
            if s.X and s.REVERSE:
                s.x.wait(at_x)
                b_x = sum_quads(b_o * load_x(s.xs, W, operand, layout))
                s.sums.ring.acquire(at_s)
                s.sums.buffer(at_s, W).store(b_x)
            s.v.wait(at)
            b_v = s.vs.index(at.i).slice(W * BS, BS, dim=1).permute((1, 0))
            decay_v = of_v.index(at.i).load(gl.SliceLayout(0, operand))
            b_d = (b_v.load(operand).to(gl.float32) * decay_v[None, :]).to(dtype)
            s.k.wait(at)
            # whoever made P has read q and k
            s.products.wait(at)
            s.q.release(at)
            b_k = s.ks.index(at.i)
            b_o = warpgroup_mma(b_v, s.ps.index(at.i).permute((1, 0)), b_o, is_async=True)
            s0 = warpgroup_mma(b_d, b_k.slice(0, PIECE, dim=1), s0, is_async=True)
            s1 = warpgroup_mma(b_d, b_k.slice(PIECE, PIECE, dim=1), s1, is_async=True)
            s2 = warpgroup_mma(b_d, b_k.slice(2 * PIECE, PIECE, dim=1), s2, is_async=True)
            s3 = warpgroup_mma(b_d, b_k.slice(3 * PIECE, PIECE, dim=1), s3, is_async=True)
            b_o = warpgroup_mma_wait(4, (b_o,))
            s.v.release(at)
            tma.store_wait(0)
            s.os.index(W).permute((1, 0)).store(b_o.to(dtype))
            fence_async_shared()
            tma_store(s.desc_o, work.tile(task, task.end, task.i_h, i_t, i_v), s.os.index(W))
            s0, s1, s2, s3 = warpgroup_mma_wait(0, (s0, s1, s2, s3))
            s.products.release(at)
            s.k.release(at)
            if s.X:
                if not s.REVERSE:
                    s.x.wait(at_x)
                b_x = sum_quads(b_o * load_x(s.xs, W, operand, layout))
                if not s.REVERSE:
                    s.sums.ring.acquire(at_s)
                s.sums.buffer(at_s, W + (2 if s.REVERSE else 0)).store(b_x)
                s.sums.ring.commit(at_s)
                # not before the sums are written: see `row_sum_partition`
                s.x.release(at_x)
                at_x = s.x.after(at_x)
                at_s = s.sums.ring.after(at_s)
            at = s.q.after(at)
        work.clear(task, s.desc_o, s.os.index(W), i_v)
        if s.state_out.p is not None:
            # the last segment's; a sequence without tokens has no segment, and then the combine leaves its state
            last = (task.first == task.bos) if s.REVERSE else (task.end == task.eos)
            slot = work.slot(task.i_n)
            swept = (task.first < task.end) if work.SEGMENTS else (task.first == task.bos)
            if is_sequence(task.i_n, work.N) & (slot >= 0) & last & swept:
                p_out = s.state_out.of(slot, task.i_h)
                s.state_out.store(p_out, o_v, o_k, s0, s.V, s.K)
                s.state_out.store(p_out, o_v, o_k + PIECE, s1, s.V, s.K)
                s.state_out.store(p_out, o_v, o_k + 2 * PIECE, s2, s.V, s.K)
                s.state_out.store(p_out, o_v, o_k + 3 * PIECE, s3, s.V, s.K)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=['tasks', 'N', 'T', 'P', 'segment', 'part', 'anchor_blocks', 'scale'],
    repr=kernel_name('hopper_wide_sweep'),
)
def hopper_wide_sweep_kernel(
    desc_q, desc_k,  # tiles [C, BK] of [B, T, H // GQ, K]
    desc_v,  # tiles [C, BV] of [B, T, H // GV, V]
    desc_o,  # tiles [C, BS] of [B, T, H, V]
    desc_x,  # tiles [C, BV] of [B, T, H // GV, V], or None
    g,  # [B, T, H], any strides, or None
    state_in,  # [N, H, K, V], or with indices [slots, H, K, V], of segments [segments, H, K, V], any strides, or None
    state_out,  # [N, H, K, V], or with indices [slots, H, K, V], any strides, or None
    x_o,  # [halves, B, H, T]: rows x . o; back in time of what of o comes from the carried state
    y,  # [halves, B, H, T]: back in time, rows x . o of what of o comes from pairs inside a chunk
    anchors,  # [anchor blocks + N, H, halves * BK * BV]: states before some chunks, left forward, read back in time
    s_ds,  # [8 * halves, anchor blocks + N, H]: back in time, <anchor, state after the chunk>, of each warp
    cu_seqlens,  # [N + 1] or None
    indices,  # [N]: the slots of the sequences' states in a pool; or None
    scale, tasks, N, T,
    P,  # slots of the pool
    segment,  # tokens
    part,  # B * H * T
    anchor_blocks,
    g_b, g_t, g_h,
    si_n, si_h, si_k, si_v,
    so_n, so_h, so_k, so_v,
    ROLE: gl.constexpr,
    H: gl.constexpr, GQ: gl.constexpr, GV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BA: gl.constexpr,
    SEGMENTS: gl.constexpr, REVERSE: gl.constexpr, X: gl.constexpr, STAGES: gl.constexpr,
    STATE_REGISTERS: gl.constexpr, PRODUCT_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """o of one task after another, in 128 columns of V. Rings, of STAGES buffers where no number is given:

        ring           buffers                    full                        empty
        q, k, v        a tile each                load, by TMA                both states
        gates          sums, decays               gates                       that of products
        products       P                          products                    both states
        x              1: x                       load, by TMA                both states
        sums           1: partial row sums        both states                 row sums

    As compiled by triton 3.6, with no state given and no packed sequences: bytes of shared memory, and bytes of spills,
    stored and loaded:

        o     198,712    164, 316
        dq    223,464    112, 148    with x
        dk    231,704    100, 164    with x
        dv    198,712     96, 144

    `product_partition` does not wait until a buffer of P is empty: `gate_partition` has, before it filled the gates of
    the chunk. Nor does it release q and k: both states do after they have waited for P, which was made of them.
    """
    dtype: gl.constexpr = desc_q.dtype
    by_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BK], dtype)
    by_v: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BV], dtype)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    qs = gl.allocate_shared_memory(dtype, [STAGES, C, BK], by_k)
    ks = gl.allocate_shared_memory(dtype, [STAGES, C, BK], by_k)
    vs = gl.allocate_shared_memory(dtype, [STAGES, C, BV], by_v)
    ps = gl.allocate_shared_memory(dtype, [STAGES, C, C], square)
    os = gl.allocate_shared_memory(dtype, [2, C, BS], square)
    q = ring(STAGES, 1, 2)
    k = ring(STAGES, 1, 2)
    v = ring(STAGES, 1, 2)
    products = ring(STAGES, 1, 2)
    gates = gate_buffers(STAGES, Ring(barriers(STAGES, 1), products.empty))
    if X:
        xs = gl.allocate_shared_memory(dtype, [1, C, BV], by_v)
        x = ring(1, 1, 2)
        partial_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0])
        partial = gl.allocate_shared_memory(gl.float32, [4 if REVERSE else 2, ROWS, C], partial_layout)
        sums = Sums(partial, ring(1, 2, 1))
        x_o += gl.program_id(1).to(gl.int64) * part
        if REVERSE:
            y += gl.program_id(1).to(gl.int64) * part
    else:
        # what is there stands in for what nobody reads
        xs = vs
        x = v
        sums = Sums(gates.sums, v)
    fence_async_shared()

    work = Work(cu_seqlens, indices, tasks, N, T, P, segment, H, SEGMENTS)
    s = Sweep(
        work, States(state_in, si_n, si_h, si_k, si_v), States(state_out, so_n, so_h, so_k, so_v),
        anchors, s_ds, anchor_blocks, desc_q, desc_k, desc_v, desc_o, desc_x, qs, ks, vs, ps, os, xs,
        q, k, v, products, x, gates, sums, GQ, GV, K, V, BA, REVERSE, X,
    )  # fmt: skip
    of_g = (work, gates, g, (g_b, g_t, g_h), scale, REVERSE)
    if X:
        gl.warp_specialize([
            (state_partition, (s, 0)),
            (state_partition, (s, 1)),
            (product_partition, (s, scale)),
            (gate_partition, of_g),
            (load_partition, (s,)),
            (row_sum_partition, (work, sums, x_o, y, REVERSE)),
        ], [4, 4, 1, 1, 2],
        [STATE_REGISTERS, PRODUCT_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (state_partition, (s, 0)),
            (state_partition, (s, 1)),
            (product_partition, (s, scale)),
            (gate_partition, of_g),
            (load_partition, (s,)),
        ], [4, 4, 1, 1], [STATE_REGISTERS, PRODUCT_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip


class Config(NamedTuple):
    """Buffers of the rings, and registers to a thread: of the second state partition, of the products, of the others,
    and the most of the kernel as ptxas sees it.
    """

    stages: int
    state_registers: int
    product_registers: int
    other_registers: int
    most_registers: int


# With 208 for the states ptxas of triton 3.6 puts a wait after every wgmma (C7512), as that of triton 3.9 does in any
# case.
CONFIG = Config(2, 216, 56, 24, 128)


@launcher
def launch_wide_sweep(tensors, setting: Setting):
    q, k, v, o, x, g, state_in, state_out, *others, cu_seqlens, indices = tensors
    B, T, H, K, V = sizes(q, v)
    halves = count_halves(V)
    scale, segment, BA, reverse, _, role = setting
    tasks = count_swept(B, T, segment, cu_seqlens) * H
    args = (
        *(descriptor(t, BK.value, cu_seqlens) for t in (q, k)), descriptor(v, BV.value, cu_seqlens),
        descriptor(o, BS.value, cu_seqlens), None if x is None else descriptor(x, BV.value, cu_seqlens),
        g, state_in, state_out, *others, cu_seqlens, indices,
        scale, tasks, count_sequences(B, cu_seqlens), T,
        0 if indices is None else state_out.shape[0], segment or 0, B * H * T, count_blocks(B, T, BA, cu_seqlens),
        *strides(g, 3), *strides(state_in, 4), *strides(state_out, 4),
    )  # fmt: skip
    constants = dict(
        ROLE=role, H=H, GQ=H // q.shape[2], GV=H // v.shape[2], K=K, V=V, BA=BA,
        SEGMENTS=segment is not None, REVERSE=reverse, X=x is not None, STAGES=CONFIG.stages,
        STATE_REGISTERS=CONFIG.state_registers, PRODUCT_REGISTERS=CONFIG.product_registers,
        OTHER_REGISTERS=CONFIG.other_registers, maxnreg=CONFIG.most_registers, num_warps=4,
    )  # fmt: skip
    grid = min(tasks, max(multiprocessors(q.device) // halves, 1)), halves, 1
    return hopper_wide_sweep_kernel, grid, args, constants


def count_halves(V: int) -> int:
    return 1 if V <= BV.value else 2


def anchor_size(K: int, V: int) -> int:
    """Numbers of an anchor of a state `[K, V]`; the sweeps that leave and read it hold the state as `[V, K]`."""
    return BK.value * BV.value * count_halves(K)


def sweep(operands: Operands, setting: Setting):
    """One sweep over each sequence, or over each of its segments, which then have a state_in of their own: `o`, and
    three that are None without x, for dg (`_gates.py`). Forward in time the first is the rows
    `x . o [halves, B, H, T]`. Back in time these have two parts, of the carried state and of pairs inside a chunk, and
    the third is `<anchor, state> [8 * halves, anchor blocks + N, H]`, one of each warp. The halves are those of V, one
    up to V 128.
    """
    q, k, v, g, state_in, state_out, x, anchors, cu_seqlens, indices = operands
    B, T, H, _, V = sizes(q, v)
    o = empty(q, B, T, H, V)
    x_o = y = s_ds = None
    if x is not None:
        x_o = empty(q, count_halves(V), B, H, T, dtype=torch.float32)
        if setting.reverse:
            y = empty(x_o, *x_o.shape)
            s_ds = empty(q, 8 * count_halves(V), anchors.shape[0], H, dtype=torch.float32)
    launch_wide_sweep((q, k, v, o, x, g, state_in, state_out, x_o, y, anchors, s_ds, cu_seqlens, indices), setting)
    return o, x_o, y, s_ds
