"""The sweeps on Hopper where K or V is over 128, up to 512. `sweep.py` and `gradients.py` have those of smaller dims.

The registers of a multiprocessor hold a state of 256 x 128 numbers. So a program takes 128 columns of V. Programs that
run at the same time take the other columns, and find q and k in the L2 cache: the grid is [programs, blocks of V, parts
of K]. Its partitions:

    load_partition      1 warp          brings tiles of the next chunks to shared memory (TMA), anchors to the L2 cache
    gate_partition      1 warp          sums the gates of the next chunks, and makes the decays
    product_partition   4 warps         makes P_ij = scale * exp(c_i - c_j) (q_i . k_j) of the pairs i >= j in a chunk
    state_partition     4 warps, twice  keeps 64 columns of the state in registers, transposed, and makes these of o
    row_sum_partition   2 warps         adds up the rows of x . o, where dg is wanted

One kernel makes all four sweeps, in either direction: o, dq, dk and dv, with the roles that `fused_chunk.py` describes.

**Rows of the state.** A state partition holds its 64 columns as tensors `[64 of V, PIECE of K]`, the pieces. At K 256
they are converted for the tensor cores, multiplied and waited for one after the other, as the registers have no room
for a copy of the whole.

**Parts.** Where K is over 256, a program takes half of the rows: o is a sum over rows of the state, and P one over
columns of q and k. The first of the two programs of a task writes its part of o in fp32, and after each chunk how many
chunks are done. The second adds that part to its own, while the first goes on, if both have a multiprocessor. It waits
for the first, and the first never for it. The GPU starts all first ones before any second one: none waits forever.

**dg** (`_gates.py`). The sweep for dq leaves w and anchors, and the one for dk z, y and what the anchors give. As in
the plain sweeps, w is the whole of q . dq, and y the part of k . dk that comes from pairs inside a chunk: to sum the
pairs apart, as the sweeps of smaller dims do, takes one more product, for which `product_partition` has neither the
time nor the registers at K 256.
"""

import functools
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

from .._blocks import count_blocks, count_sequences, first_block, is_sequence
from .._launch import launcher
from .._layout import cdiv, multiprocessors, sizes, strides
from .._passes import empty, zeros
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
    States,
    Sums,
    Work,
    add_rows,
    aggregate,
    as_tuple,
    barriers,
    chunks_to_a_program,
    consumer_start,
    decay_of_pairs,
    descriptor,
    fragment_offsets,
    from_fragments,
    gate_buffers,
    gate_partition,
    prefetch,
    producer_start,
    relay_buffers,
    ring,
    row_sum_partition,
    store_sum,
    thread_barrier,
    tma_load,
    tma_store,
    to_fragments,
)

BV = gl.constexpr(128)  # columns of V to a program
ROWS = gl.constexpr(16)  # partial sums of a warp group to a token


@aggregate
class Cut:
    """How the states are cut to programs and tensors. All are constants."""

    K: gl.constexpr
    V: gl.constexpr
    PIECES: gl.constexpr  # of the state of a state partition
    PIECE: gl.constexpr  # rows of K to a piece
    BLOCKS: gl.constexpr  # of 128 columns of V
    PARTS: gl.constexpr  # one or two, each of as many rows of K as the pieces have

    @gluon.jit
    def first_row(self):
        """Of this program's part."""
        if self.PARTS == 1:
            return 0
        else:
            return gl.program_id(2) * (self.PIECES * self.PIECE)

    @gluon.jit
    def part(self):
        """The number of this program's rows and columns among all of a state."""
        if self.PARTS == 1:
            return gl.program_id(1)
        else:
            return gl.program_id(1) * self.PARTS + gl.program_id(2)


@aggregate
class Sweep:
    """What the partitions share."""

    work: Work
    cut: Cut
    state_in: States
    state_out: States
    partial: Pointer
    progress: Pointer
    anchors: Pointer
    s_ds: Pointer
    anchor_blocks: Number
    desc_q: Descriptor
    desc_k: Descriptor
    desc_v: Descriptor
    desc_o: Descriptor
    desc_x: Descriptor
    qs: gl.shared_memory_descriptor  # [STAGES * PIECES, C, PIECE]
    ks: gl.shared_memory_descriptor  # likewise
    vs: gl.shared_memory_descriptor  # [STAGES * 2, C, BS]
    ps: gl.shared_memory_descriptor  # [STAGES, C, C]
    os: gl.shared_memory_descriptor  # [2, C, BS]
    xs: gl.shared_memory_descriptor  # [2, C, BS]
    q: Ring
    k: Ring
    v: Ring
    products: Ring
    x: Ring
    gates: Gates
    sums: Sums
    GQ: gl.constexpr
    GV: gl.constexpr
    BA: gl.constexpr
    STAGES: gl.constexpr
    REVERSE: gl.constexpr
    X: gl.constexpr

    @gluon.jit
    def part_anchor(self, i_a, i_h):
        """Where the anchor of this part of a state begins: in the order of the threads, the same to leave and to read
        it.
        """
        c = self.cut
        i = (i_a.to(gl.int64) * self.work.H + i_h) * (c.BLOCKS * c.PARTS) + c.part()
        return self.anchors + i * (c.PIECES * c.PIECE * BV)

    @gluon.jit
    def partial_tile(self, task, i_t, W: gl.constexpr):
        """Where the tile of the first part's o begins."""
        i = first_block(self.work.cu_seqlens, task.i_n, task.bos, self.work.T, C) + (task.first - task.bos + i_t) // C
        i = (i.to(gl.int64) * self.work.H + task.i_h) * self.cut.BLOCKS + gl.program_id(1)
        return self.partial + (i * 2 + W) * (BS * C)

    @gluon.jit
    def done_by_first(self):
        """The address of the number of chunks of which the first part has written its o."""
        p = self.progress + gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
        return p.to(gl.int64, bitcast=True)

    @gluon.jit
    def tell_second(self, n):
        """The first part has written its o of n chunks, which this partition has waited for."""
        gl.inline_asm_elementwise(
            'st.release.gpu.global.b32 [$1], $2; mov.b32 $0, 0;', '=r,l,r', [self.done_by_first(), n],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip

    @gluon.jit
    def wait_for_first(self, n):
        """Wait until the first part has written its o of n chunks."""
        gl.inline_asm_elementwise(
            '{ .reg .pred p; wait: ld.acquire.gpu.global.b32 $0, [$1]; setp.lt.s32 p, $0, $2; @p bra wait; }',
            '=r,l,r', [self.done_by_first(), n], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def load_pieces(s, desc, tiles, ring, at, task, i_t):
    """The tiles of a chunk of q or k."""
    c = s.cut
    bar = ring.full.index(at.i)
    ring.acquire(at)
    mbarrier.expect(bar, C * c.PIECES * c.PIECE * 2)
    for p in gl.static_range(c.PIECES):
        coordinates = s.work.tile(task, task.end, task.i_h // s.GQ, i_t, c.first_row() + p * c.PIECE)
        tma_load(desc, coordinates, bar, tiles.index(at.i * c.PIECES + p))


@gluon.jit
def load_columns(s, desc, tiles, ring, at, task, i_t):
    """The tiles of a chunk of v or x, one to a state partition."""
    bar = ring.full.index(at.i)
    ring.acquire(at)
    mbarrier.expect(bar, C * BV * 2)
    for w in gl.static_range(2):
        coordinates = s.work.columns(task, i_t, gl.program_id(1) * 2 + w, s.GV)
        tma_load(desc, coordinates, bar, tiles.index(at.i * 2 + w))


@gluon.jit
def load_partition(s):
    work = s.work
    c = s.cut
    at = producer_start()
    at_x = producer_start()
    n = gl.to_tensor(0)
    for j in range(work.start(), work.stop(), work.step()):
        task, first, last = work.take(j)
        for t in range(first, last, C):
            i_t = task.chunk(t, s.REVERSE)
            if s.X and s.REVERSE:
                wanted, i_a = work.anchor(task, i_t // C, s.anchor_blocks, s.BA)
                if wanted:
                    prefetch(s.part_anchor(i_a, task.i_h), 2 * c.PIECES * c.PIECE * BV)
            load_pieces(s, s.desc_q, s.qs, s.q, at, task, i_t)
            load_pieces(s, s.desc_k, s.ks, s.k, at, task, i_t)
            if c.PARTS > 1:
                n += 1
                if gl.program_id(2) > 0:
                    s.wait_for_first(n)
            load_columns(s, s.desc_v, s.vs, s.v, at, task, i_t)
            if c.PARTS > 1:
                if gl.program_id(2) == 0:
                    # k was loaded where that of STAGES chunks before was: both states have released it, and they have
                    # written o before
                    s.tell_second(n - s.STAGES)
            if s.X:
                load_columns(s, s.desc_x, s.xs, s.x, at_x, task, i_t)
                at_x = s.x.after(at_x)
            at = s.q.after(at)
    if c.PARTS > 1:
        if gl.program_id(2) == 0:
            for i in gl.static_range(1, s.STAGES + 1):
                s.k.acquire(at)
                s.tell_second(n - s.STAGES + i)
                at = s.k.after(at)


@gluon.jit
def product_partition(s, scale):
    """P of each chunk, in two halves of its columns where the registers have no room for the whole."""
    work = s.work
    c = s.cut
    N: gl.constexpr = C // 2 if c.PIECES * c.PIECE > 192 else C
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    o_i = gl.arange(0, C, gl.SliceLayout(1, layout))
    o_j = gl.arange(0, N, gl.SliceLayout(0, layout))
    at = consumer_start()
    for j in range(work.start(), work.stop(), work.step()):
        task, first, last = work.take(j)
        for _ in range(first, last, C):
            s.q.wait(at)
            s.k.wait(at)
            for i in gl.static_range(C // N):
                b_p = gl.zeros([C, N], gl.float32, layout)
                for p in gl.static_range(c.PIECES):
                    b_k = s.ks.index(at.i * c.PIECES + p).slice(i * N, N, dim=0).permute((1, 0))
                    b_p = warpgroup_mma(s.qs.index(at.i * c.PIECES + p), b_k, b_p, use_acc=p > 0, is_async=True)
                if i == 0:
                    s.gates.ring.wait(at)
                decay = decay_of_pairs(s.gates, at.i, o_i, o_j, i * N, N, scale, s.REVERSE)
                b_p = warpgroup_mma_wait(0, (b_p,))
                # empty: `gate_partition` has waited for that
                s.ps.index(at.i).slice(i * N, N, dim=1).store((b_p * decay).to(s.ps.dtype))
            fence_async_shared()
            s.products.commit(at)
            at = s.products.after(at)


@gluon.jit
def load_x(xs, W: gl.constexpr, operand: gl.constexpr, layout: gl.constexpr):
    return gl.convert_layout(xs.index(W).permute((1, 0)).load(operand), layout).to(gl.float32)


@gluon.jit
def leave_anchor(p, b_s):
    # the compiler must not see that the same is converted for the next product, and keep it for that
    b_s = gl.inline_asm_elementwise('mov.b32 $0, $1;', '=f,f', [b_s], dtype=gl.float32, is_pure=False, pack=1)
    b_s = to_fragments(b_s.to(p.dtype.element_ty))
    gl.store(p + fragment_offsets(b_s.shape[1], 8), b_s)


@gluon.jit
def load_anchor(p, PIECE: gl.constexpr):
    return gl.load(p + fragment_offsets(PIECE // 2, 8))


@gluon.jit
def times_anchor(b_a, b_s):
    """Sums of each thread."""
    return gl.sum(b_a.to(gl.float32) * to_fragments(b_s), 1)


@gluon.jit
def cross_anchor(p_a, b_s):
    """Sums of each thread of the anchor at p_a times the state."""
    PIECE: gl.constexpr = b_s[0].shape[1]
    N: gl.constexpr = len(b_s)
    # two are on their way while one is multiplied
    on_way = (load_anchor(p_a, PIECE),)
    for p in gl.static_range(N):
        if p + 1 < N:
            on_way = on_way + (load_anchor(p_a + (p + 1) * (PIECE * BS), PIECE),)
        product = times_anchor(on_way[p], b_s[p])
        if p == 0:
            total = product
        else:
            total += product
    return total


@gluon.jit
def leave_partial(p, b_o):
    b_o = to_fragments(b_o)
    gl.store(p + fragment_offsets(b_o.shape[1], 4), b_o)


@gluon.jit
def load_partial(p, layout: gl.constexpr):
    return from_fragments(gl.load(p + fragment_offsets(C // 2, 4)), layout, False)


@gluon.jit
def state_partition(s, W: gl.constexpr):
    """Columns W * BS to (W + 1) * BS of the program's part of the state, and of o."""
    if s.cut.PARTS == 1:
        sweep_states(s, W, 0)
    else:
        if gl.program_id(2) == 0:
            sweep_states(s, W, 0)
        else:
            sweep_states(s, W, 1)


@gluon.jit
def sweep_states(s, W: gl.constexpr, PART: gl.constexpr):
    work = s.work
    c = s.cut
    H: gl.constexpr = work.H
    PIECES: gl.constexpr = c.PIECES
    PIECE: gl.constexpr = c.PIECE
    LAST: gl.constexpr = PART + 1 == c.PARTS  # whether this program makes the whole of o
    dtype: gl.constexpr = s.qs.dtype
    # of the state transposed [BS, PIECE], and of o transposed [BS, C]
    layout_s: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PIECE, 16]
    )
    layout_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    operand_s: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout_s, k_width=2)
    operand_o: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout_o, k_width=2)
    of_o = s.gates.to_end if s.REVERSE else s.gates.from_start
    of_v = s.gates.from_start if s.REVERSE else s.gates.to_end
    i_v = gl.program_id(1) * BV + W * BS
    o_v = i_v + gl.arange(0, BS, gl.SliceLayout(1, layout_s))
    o_k = PART * PIECES * PIECE + gl.arange(0, PIECE, gl.SliceLayout(0, layout_s))
    at = consumer_start()
    at_x = consumer_start()
    at_s = producer_start()
    for j in range(work.start(), work.stop(), work.step()):
        task, first, last = work.take(j)
        b_s = ()
        if s.state_in.p is not None:
            i_in = task.i_s.to(gl.int64) if work.SEGMENTS else work.slot(task.i_n)
            p_in = s.state_in.of(i_in, task.i_h)
            # there is none of padding, nor of what lies in no sequence
            columns = gl.where(is_sequence(task.i_n, work.N) & (i_in >= 0), c.V, 0)
            for p in gl.static_range(PIECES):
                b_s = b_s + (s.state_in.load(p_in, o_v, o_k + p * PIECE, columns, c.K),)
        else:
            for _ in gl.static_range(PIECES):
                b_s = b_s + (gl.zeros([BS, PIECE], gl.float32, layout_s),)
        if work.relay is not None:
            if first > 0:
                b_s = work.take_over(b_s, W, 2)
        for t in range(first, last, C):
            i_t = task.chunk(t, s.REVERSE)
            if s.X:
                wanted, i_a = work.anchor(task, i_t // C, s.anchor_blocks, s.BA)
                if wanted:
                    p_a = s.part_anchor(i_a, task.i_h) + W * (PIECES * PIECE * BS)
                    if s.REVERSE:
                        store_sum(
                            s.s_ds, cross_anchor(p_a, b_s), c.part() * 2 + W, i_a, task.i_h,
                            s.anchor_blocks + work.N, H,
                        )  # fmt: skip
                    else:
                        for p in gl.static_range(PIECES):
                            leave_anchor(p_a + p * (PIECE * BS), b_s[p])
            s.q.wait(at)
            b_h = gl.convert_layout(b_s[0].to(dtype), operand_o)
            zero = gl.zeros([BS, C], gl.float32, layout_o)
            b_q = s.qs.index(at.i * PIECES).permute((1, 0))
            b_o = warpgroup_mma(b_h, b_q, zero, use_acc=False, is_async=True)
            for p in gl.static_range(1, PIECES):
                b_o = warpgroup_mma_wait(0, (b_o,))
                b_h = gl.convert_layout(b_s[p].to(dtype), operand_o)
                b_q = s.qs.index(at.i * PIECES + p).permute((1, 0))
                b_o = warpgroup_mma(b_h, b_q, b_o, is_async=True)
            s.gates.ring.wait(at)
            decay = s.gates.decays.index(at.i).load(gl.SliceLayout(0, layout_s))
            decayed = ()
            for p in gl.static_range(PIECES):
                if p == PIECES // 2:
                    b_o = warpgroup_mma_wait(0, (b_o,))
                decayed = decayed + (b_s[p] * decay[None, :],)
            b_o = b_o * of_o.index(at.i).load(gl.SliceLayout(0, layout_o))[None, :]
            if s.X and s.REVERSE:
                s.x.wait(at_x)
                b_x = add_rows(b_o * load_x(s.xs, W, operand_o, layout_o), ROWS)
                s.sums.ring.acquire(at_s)
                s.sums.buffer(at_s, W).store(b_x)
            s.v.wait(at)
            b_v = s.vs.index(at.i * 2 + W).permute((1, 0))
            decay_v = of_v.index(at.i).load(gl.SliceLayout(0, operand_s))
            b_d = (b_v.load(operand_s).to(gl.float32) * decay_v[None, :]).to(dtype)
            s.k.wait(at)
            # whoever made P has read q and k
            s.products.wait(at)
            s.q.release(at)
            b_o = warpgroup_mma(b_v, s.ps.index(at.i).permute((1, 0)), b_o, is_async=True)
            updated = ()
            for p in gl.static_range(PIECES):
                updated = updated + (warpgroup_mma(b_d, s.ks.index(at.i * PIECES + p), decayed[p], is_async=True),)
            if PART > 0:
                # it arrives while the tensor cores are at work
                b_first = load_partial(s.partial_tile(task, i_t, W), layout_o)
            b_o = warpgroup_mma_wait(PIECES, (b_o,))
            s.v.release(at)
            if not LAST:
                leave_partial(s.partial_tile(task, i_t, W), b_o)
                # one thread releases k, by which `load_partition` knows that all have written theirs
                thread_barrier()
            else:
                b_all = b_o
                if PART > 0:
                    b_all += b_first
                tma.store_wait(0)
                s.os.index(W).permute((1, 0)).store(b_all.to(dtype))
                fence_async_shared()
                tma_store(s.desc_o, work.tile(task, task.end, task.i_h, i_t, i_v), s.os.index(W))
            b_s = as_tuple(warpgroup_mma_wait(0, updated), PIECES)
            s.products.release(at)
            s.k.release(at)
            if s.X:
                if not s.REVERSE:
                    s.x.wait(at_x)
                b_x = add_rows(b_o * load_x(s.xs, W, operand_o, layout_o), ROWS)
                if not s.REVERSE:
                    s.sums.ring.acquire(at_s)
                s.sums.buffer(at_s, W + (2 if s.REVERSE else 0)).store(b_x)
                s.sums.ring.commit(at_s)
                # not before the sums are written: see `row_sum_partition`
                s.x.release(at_x)
                at_x = s.x.after(at_x)
                at_s = s.sums.ring.after(at_s)
            at = s.q.after(at)
        if work.relay is not None:
            if last < task.tokens():
                work.hand_over(b_s, W, 2)
        if LAST:
            work.clear(task, s.desc_o, s.os.index(W), task.i_h, i_v)
        if s.state_out.p is not None:
            # the last segment's; a sequence without tokens has no segment, and then the combine leaves its state
            at_end = (task.first == task.bos) if s.REVERSE else (task.end == task.eos)
            slot = work.slot(task.i_n)
            swept = (task.first < task.end) if work.SEGMENTS else (task.first == task.bos)
            if is_sequence(task.i_n, work.N) & (slot >= 0) & at_end & swept & (last == task.tokens()):
                p_out = s.state_out.of(slot, task.i_h)
                for p in gl.static_range(PIECES):
                    s.state_out.store(p_out, o_v, o_k + p * PIECE, b_s[p], c.V, c.K)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=['tasks', 'N', 'T', 'P', 'segment', 'share', 'part', 'anchor_blocks', 'scale'],
    repr=kernel_name('hopper_wide_sweep'),
)
def hopper_wide_sweep_kernel(
    desc_q, desc_k,  # tiles [C, PIECE] of [B, T, H // GQ, K]
    desc_v,  # tiles [C, BS] of [B, T, H // GV, V]
    desc_o,  # tiles [C, BS] of [B, T, H, V]
    desc_x,  # tiles [C, BS] of [B, T, H // GV, V], or None
    g,  # [B, T, H], any strides, or None
    state_in,  # [N, H, K, V], or with indices [slots, H, K, V], of segments [segments, H, K, V], any strides, or None
    state_out,  # [N, H, K, V], or with indices [slots, H, K, V], any strides, or None
    partial,  # [chunks, H, BLOCKS, 2, BS * C], fp32: o of the first of two parts, which the second adds; or None
    progress,  # [BLOCKS, programs], zeros: the chunks of which the first part has written its o; or None
    x_o,  # [BLOCKS * PARTS, B, H, T]: rows x . o; back in time of what of o comes from the carried state
    y,  # likewise: back in time, rows x . o of what of o comes from pairs inside a chunk
    anchors,  # [anchor blocks + N, H, .]: states before some chunks, left forward, read back in time
    s_ds,  # [8 * BLOCKS * PARTS, anchor blocks + N, H]: back in time, <anchor, state after the chunk>, of each warp
    cu_seqlens,  # [N + 1] or None
    indices,  # [N]: the slots of the sequences' states in a pool; or None
    relay,  # [PARTS, BLOCKS, programs, PIECES * PIECE * BV]: what programs hand over; or None
    flags,  # [PARTS, BLOCKS, programs, 256]: whether it is there; or None
    scale, tasks, N, T,
    P,  # slots of the pool
    segment,  # tokens
    share,  # chunks to a program in a relay
    part,  # B * H * T
    anchor_blocks,
    g_b, g_t, g_h,
    si_n, si_h, si_k, si_v,
    so_n, so_h, so_k, so_v,
    ROLE: gl.constexpr,
    H: gl.constexpr, GQ: gl.constexpr, GV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BA: gl.constexpr,
    SEGMENTS: gl.constexpr, REVERSE: gl.constexpr, X: gl.constexpr,
    PIECES: gl.constexpr, PIECE: gl.constexpr, BLOCKS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
    STATE_REGISTERS: gl.constexpr, PRODUCT_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """o of one task after another, in 128 columns of V. Rings, of STAGES buffers where no number is given:

        ring           buffers                    full                        empty
        q, k, v        a chunk's tiles each       load, by TMA                both states
        gates          sums, decays               gates                       that of products
        products       P                          products                    both states
        x              1: x                       load, by TMA                both states
        sums           1: partial row sums        both states                 row sums

    As compiled by triton 3.6, with no state given, no packed sequences and no head that programs share:
    bytes of shared memory, and bytes of spills, stored and loaded. `python -m benchmarks kernels` has the others, some
    of which spill more.

        K of the role    o                     dq                    dk                     dv
        192              165,944    36,  36    190,696    12,  12    198,936    80, 108     165,944    28,  40
        256              198,712   192, 376    223,464    68,  80    231,688   100, 156     198,712    92, 128
        512              198,728   128, 184    223,480   104, 132    231,704   132, 244     198,728   112, 188

    `product_partition` does not wait until a buffer of P is empty: `gate_partition` has, before it filled the gates of
    the chunk. Nor does it release q and k: both states do after they have waited for P, which was made of them.
    """
    cut = Cut(K, V, PIECES, PIECE, BLOCKS, PARTS)
    dtype: gl.constexpr = desc_q.dtype
    by_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, PIECE], dtype)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    qs = gl.allocate_shared_memory(dtype, [STAGES * PIECES, C, PIECE], by_k)
    ks = gl.allocate_shared_memory(dtype, [STAGES * PIECES, C, PIECE], by_k)
    vs = gl.allocate_shared_memory(dtype, [STAGES * 2, C, BS], square)
    ps = gl.allocate_shared_memory(dtype, [STAGES, C, C], square)
    q = ring(STAGES, 1, 2)
    k = ring(STAGES, 1, 2)
    v = ring(STAGES, 1, 2)
    products = ring(STAGES, 1, 2)
    gates = gate_buffers(STAGES, Ring(barriers(STAGES, 1), products.empty))
    os = gl.allocate_shared_memory(dtype, [2, C, BS], square)
    if X:
        xs = gl.allocate_shared_memory(dtype, [2, C, BS], square)
        x = ring(1, 1, 2)
        partial_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0])
        row_sums = gl.allocate_shared_memory(gl.float32, [4 if REVERSE else 2, ROWS, C], partial_layout)
        sums = Sums(row_sums, ring(1, 2, 1))
        first = cut.part().to(gl.int64) * part
        x_o += first
        if REVERSE:
            y += first
    else:
        # what is there stands in for what nobody reads
        xs = vs
        x = v
        sums = Sums(gates.sums, v)
    fence_async_shared()

    if PARTS > 1 and relay is not None:
        of_other_part = gl.program_id(2) * (gl.num_programs(0) * gl.num_programs(1))  # programs
        relay += of_other_part.to(gl.int64) * (PIECES * PIECE * BV)
        flags += of_other_part * 256
    work = Work(cu_seqlens, indices, tasks, N, T, P, segment, relay, flags, share, H, 1, SEGMENTS)
    s = Sweep(
        work, cut, States(state_in, si_n, si_h, si_k, si_v), States(state_out, so_n, so_h, so_k, so_v),
        partial, progress, anchors, s_ds, anchor_blocks, desc_q, desc_k, desc_v, desc_o, desc_x,
        qs, ks, vs, ps, os, xs, q, k, v, products, x, gates, sums, GQ, GV, BA, STAGES, REVERSE, X,
    )  # fmt: skip
    tokens = GatesOfTokens(g, None, g_b, g_t, g_h, scale)
    if X:
        gl.warp_specialize([
            (state_partition, (s, 0)),
            (state_partition, (s, 1)),
            (product_partition, (s, scale)),
            (gate_partition, (work, gates, tokens, REVERSE, 0, 1)),
            (load_partition, (s,)),
            (row_sum_partition, (work, sums, x_o, y, REVERSE)),
        ], [4, 4, 1, 1, 2],
        [STATE_REGISTERS, PRODUCT_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (state_partition, (s, 0)),
            (state_partition, (s, 1)),
            (product_partition, (s, scale)),
            (gate_partition, (work, gates, tokens, REVERSE, 0, 1)),
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


# By rows of the state of a program. With 208 for the states at 256 ptxas of triton 3.6 puts a wait after every wgmma
# (C7512), as that of triton 3.9 does in any case.
CONFIGS = {
    64: Config(3, 176, 136, 24, 128),
    128: Config(2, 192, 104, 24, 128),
    192: Config(2, 200, 88, 24, 128),
    256: Config(2, 216, 56, 24, 128),
}
# Of a chunk, by rows of the state of a program, where no program waits for memory (H200).
MICROSECONDS = {64: 1.4, 128: 1.7, 192: 2.1, 256: 2.45}


class Shape(NamedTuple):
    """How a state is cut: the fields of `Cut`, on the host."""

    pieces: int
    piece: int
    blocks: int
    parts: int

    @property
    def rows(self) -> int:
        """Rows of the state of a program."""
        return self.pieces * self.piece


@functools.cache
def cut(K: int, V: int) -> Shape:
    """How a state `[K, V]` is cut."""
    parts = 1 if K <= 256 else 2
    rows = cdiv(cdiv(K, parts), 64) * 64
    pieces, piece = (1, rows) if rows <= 128 else (rows // 64, 64)
    return Shape(pieces, piece, cdiv(V, BV.value), parts)


def count_work(q: torch.Tensor, v: torch.Tensor, setting: Setting, cu_seqlens: torch.Tensor | None) -> tuple[int, int]:
    """The tasks of a launch, and the programs for each block of V and part of K."""
    B, T, H, K, V = sizes(q, v)
    tasks = count_swept(B, T, setting.segment, cu_seqlens) * H
    return tasks, min(tasks, max(multiprocessors(q.device) // cut(K, V).blocks, 1))


@launcher
def launch_wide_sweep(tensors, setting: Setting):
    q, k, v, o, x, g, state_in, state_out, *others, cu_seqlens, indices, relay, flags = tensors
    B, T, H, K, V = sizes(q, v)
    shape = cut(K, V)
    scale, segment, BA, reverse, _, role = setting
    config = CONFIGS[shape.rows]
    tasks, programs = count_work(q, v, setting, cu_seqlens)
    args = (
        *(descriptor(t, shape.piece, cu_seqlens) for t in (q, k)),
        *(None if t is None else descriptor(t, BS.value, cu_seqlens) for t in (v, o, x)),
        g, state_in, state_out, *others, cu_seqlens, indices, relay, flags,
        scale, tasks, count_sequences(B, cu_seqlens), T,
        0 if indices is None else state_out.shape[0], segment or 0,
        chunks_to_a_program(relay, tasks, programs, T), B * H * T, count_blocks(B, T, BA, cu_seqlens),
        *strides(g, 3), *strides(state_in, 4), *strides(state_out, 4),
    )  # fmt: skip
    constants = dict(
        ROLE=role, H=H, GQ=H // q.shape[2], GV=H // v.shape[2], K=K, V=V, BA=BA,
        SEGMENTS=segment is not None, REVERSE=reverse, X=x is not None,
        PIECES=shape.pieces, PIECE=shape.piece, BLOCKS=shape.blocks, PARTS=shape.parts, STAGES=config.stages,
        STATE_REGISTERS=config.state_registers, PRODUCT_REGISTERS=config.product_registers,
        OTHER_REGISTERS=config.other_registers, maxnreg=config.most_registers, num_warps=4,
    )  # fmt: skip
    return hopper_wide_sweep_kernel, (programs, shape.blocks, shape.parts), args, constants


def anchor_size(K: int, V: int) -> int:
    """Numbers of an anchor of a state `[K, V]`; the sweeps that leave and read it hold the state as `[V, K]`."""
    shape = cut(V, K)
    return shape.parts * shape.rows * shape.blocks * BV.value


def sweep(operands: Operands, setting: Setting):
    """One sweep over each sequence, or over each of its segments, which then have a state_in of their own: `o`, and
    three that are None without x, for dg (`_gates.py`). Forward in time the first is the rows
    `x . o [parts, B, H, T]`. Back in time these have two parts, of the carried state and of pairs inside a chunk, and
    the third is `<anchor, state> [8 * parts, anchor blocks + N, H]`, one of each warp. The parts are those of the
    state, in rows and in columns.
    """
    q, k, v, g, state_in, state_out, x, anchors, cu_seqlens, indices, _ = operands
    B, T, H, K, V = sizes(q, v)
    shape = cut(K, V)
    tasks, programs = count_work(q, v, setting, cu_seqlens)
    partial = progress = x_o = y = s_ds = None
    if shape.parts > 1:
        chunks = count_blocks(B, T, C.value, cu_seqlens)
        partial = empty(q, chunks, H, shape.blocks * BV.value, C.value, dtype=torch.float32)
        progress = zeros(q, shape.blocks, programs, dtype=torch.int32)
    if x is not None:
        parts = shape.blocks * shape.parts
        x_o = empty(q, parts, B, H, T, dtype=torch.float32)
        if setting.reverse:
            y = empty(x_o, *x_o.shape)
            s_ds = empty(q, 8 * parts, anchors.shape[0], H, dtype=torch.float32)
    relay = relay_buffers(operands, setting, tasks, (programs, shape.blocks * shape.parts), shape.rows * BV.value)
    o = empty(q, B, T, H, V)
    others = partial, progress, x_o, y, anchors, s_ds, cu_seqlens, indices
    launch_wide_sweep((q, k, v, o, x, g, state_in, state_out, *others, *relay), setting)
    return o, x_o, y, s_ds
