"""The attention of `parallel.py` on Hopper, K and V up to 128: a job for every warp group.

One program to a multiprocessor takes one block of 128 rows of a head after another, those with the most columns first.
Its partitions:

    load_partition   1 warp          brings the rows of q, and the tiles of k and v, to shared memory (TMA)
    gate_partition   1 warp          makes the two factors of the decays of each tile, of its rows and of its columns
    row_partition    4 warps, twice  multiplies 64 rows: while one tile is multiplied with v, decays the next scores
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

from .._blocks import block_bounds, count_blocks, count_sequences, is_sequence
from .._launch import launcher
from .._layout import multiprocessors, sizes
from .._passes import empty, zeros
from .._triton import kernel_name
from . import BLOCK_TOKENS
from .common import (
    RAGGED_END,
    Descriptor,
    Number,
    Pointer,
    Ring,
    aggregate,
    consumer_start,
    descriptor,
    padded,
    producer_start,
    ring,
    tma_load,
    tma_store,
)

BT = gl.constexpr(BLOCK_TOKENS)
HALF = gl.constexpr(64)  # rows to a row partition


@aggregate
class Task:
    """A block of rows of a head, and the blocks of columns that it multiplies: n others, and at last its own."""

    i_s: gl.tensor  # the number of the block in the batch
    i_h: gl.tensor  # the head
    i_b: gl.tensor  # the row of the batch
    first: gl.tensor  # first token of the block
    end: gl.tensor  # the one after its last
    bos: gl.tensor  # first token of the sequence
    eos: gl.tensor  # the one after its last
    i_r: gl.tensor  # the number of the block in the sequence
    lo: gl.tensor  # the first of the other blocks
    n: gl.tensor
    live: gl.tensor  # false of an empty block, and of tokens in no sequence


@gluon.jit
def position(i):
    """The place of a program in round i. Tasks are dealt to and fro, so that programs have about as many columns."""
    return gl.where(i % 2 == 0, gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0))


@aggregate
class Work:
    """The tasks of a launch."""

    cu_seqlens: Pointer  # [N + 1] or None
    ranges: Pointer  # [2, blocks, H]: which blocks reach which (`parallel.py`), or None
    tasks: Number
    blocks: Number
    N: Number  # sequences
    T: Number  # tokens to a row of the batch
    H: gl.constexpr
    REVERSE: gl.constexpr

    @gluon.jit
    def rounds(self):
        """How many tasks the program has."""
        P = gl.num_programs(0)
        whole = self.tasks // P
        return whole + gl.where(position(whole) < self.tasks - whole * P, 1, 0)

    @gluon.jit
    def task(self, i):
        """That of round i."""
        task = i * gl.num_programs(0) + position(i)
        if self.cu_seqlens is None:
            NT = (self.T + BT - 1) // BT
            rank = task // (self.N * self.H)
            i_b = task % (self.N * self.H) // self.H
            i_n = i_b
            i_r = rank if self.REVERSE else NT - 1 - rank
            i_s = i_b * NT + i_r
            bos = i_b * 0
            eos = bos + self.T
            first = i_r * BT
            end = gl.minimum(first + BT, self.T)
            i_b = i_b.to(gl.int64)
        else:
            i_s = task // self.H if self.REVERSE else self.blocks - 1 - task // self.H
            i_b, i_n, first, end, bos, eos = block_bounds(self.cu_seqlens, i_s, self.N, self.T, BT)
            end = gl.maximum(first, end)
            i_r = (first - bos) // BT
        i_h = task % self.H
        lo = i_r + 1 if self.REVERSE else i_r * 0
        n = ((eos - bos + BT - 1) // BT - lo) if self.REVERSE else i_r
        if self.ranges is not None:
            bound = gl.load(self.ranges + (i_s.to(gl.int64) + (self.blocks if self.REVERSE else 0)) * self.H + i_h)
            if self.cu_seqlens is not None:
                # of bounds that decrease it may be another sequence's (`_blocks.py`), or of an empty block anything
                bound = gl.minimum(gl.maximum(bound, lo), lo + n)
            if self.REVERSE:
                n = bound - lo
            else:
                lo = bound
                n = i_r - lo
        live = (first < end) & is_sequence(i_n, self.N)
        return Task(i_s, i_h, i_b, first, end, bos, eos, i_r, lo, gl.where(live, n, 0), live)

    @gluon.jit
    def tile(self, task, i_h, i_t, i_d):
        """Coordinates of a tile of head i_h, from token i_t of the sequence and column i_d to the sequence's end."""
        if self.cu_seqlens is None:
            return [task.i_b.to(gl.int32), 0, i_h, task.bos + i_t, i_d]
        else:
            return [RAGGED_END, task.eos, i_h, RAGGED_END - (task.eos - task.bos) + i_t, i_d]


@aggregate
class Attention:
    """What the partitions share."""

    work: Work
    desc_q: Descriptor
    desc_k: Descriptor
    desc_v: Descriptor
    desc_o: Descriptor
    desc_x: Descriptor
    qs: gl.shared_memory_descriptor  # [4, HALF, BK]: two halves each of two blocks
    ks: gl.shared_memory_descriptor  # [STAGES, BT, BK]
    vs: gl.shared_memory_descriptor  # [STAGES, BT, BV]
    xs: gl.shared_memory_descriptor  # [2, HALF, BV]
    of_rows: gl.shared_memory_descriptor  # [STAGES, BT]: factors of the decays of a tile's rows
    of_columns: gl.shared_memory_descriptor  # [STAGES, BT]: and of its columns
    q: Ring
    k: Ring
    v: Ring
    x: Ring
    gates: Ring
    GQ: gl.constexpr
    GV: gl.constexpr
    X: gl.constexpr


@gluon.jit
def load_partition(s):
    work = s.work
    at = producer_start()
    at_q = producer_start()
    at_x = producer_start()
    for i in range(work.rounds()):
        task = work.task(i)
        if task.live:
            row = task.first - task.bos
            s.q.acquire(at_q)
            mbarrier.expect(s.q.full.index(at_q.i), BT * s.qs.shape[2] * 2)
            for w in gl.static_range(2):
                of_q = work.tile(task, task.i_h // s.GQ, row + w * HALF, 0)
                tma_load(s.desc_q, of_q, s.q.full.index(at_q.i), s.qs.index(at_q.i * 2 + w))
            for j in range(task.n + 1):
                # its own block last
                i_t = gl.where(j < task.n, task.lo + j, task.i_r) * BT
                s.k.acquire(at)
                mbarrier.expect(s.k.full.index(at.i), BT * s.ks.shape[2] * 2)
                tma_load(s.desc_k, work.tile(task, task.i_h // s.GQ, i_t, 0), s.k.full.index(at.i), s.ks.index(at.i))
                s.v.acquire(at)
                mbarrier.expect(s.v.full.index(at.i), BT * s.vs.shape[2] * 2)
                tma_load(s.desc_v, work.tile(task, task.i_h // s.GV, i_t, 0), s.v.full.index(at.i), s.vs.index(at.i))
                at = s.k.after(at)
                if s.X:
                    # the x of the task before is needed to its end, and so are no more tiles of this one
                    if j == gl.minimum(task.n, 1):
                        s.x.acquire(at_x)
                        mbarrier.expect(s.x.full.index(at_x.i), BT * s.xs.shape[2] * 2)
                        for w in gl.static_range(2):
                            of_x = work.tile(task, task.i_h // s.GV, row + w * HALF, 0)
                            tma_load(s.desc_x, of_x, s.x.full.index(at_x.i), s.xs.index(w))
            at_q = s.q.after(at_q)
            if s.X:
                at_x = s.x.after(at_x)


@gluon.jit
def gate_partition(s, c, sums, scale):
    """The factors of a tile's rows and columns; of the block with itself, the sums of the gates."""
    work = s.work
    H: gl.constexpr = work.H
    REVERSE: gl.constexpr = work.REVERSE
    layout: gl.constexpr = gl.BlockedLayout([BT // 32], [32], [1], [0])
    r = gl.arange(0, BT, layout)
    at = producer_start()
    for i in range(work.rounds()):
        task = work.task(i)
        if task.live:
            base = task.i_s - task.i_r  # the sequence's first block
            c_r = gl.zeros([BT], gl.float32, layout)
            earlier = c_r
            if c is not None:
                c_r = gl.load(c + (task.i_s.to(gl.int64) * H + task.i_h) * BT + r)
                earlier = gl.load(c + (task.i_s.to(gl.int64) * H + task.i_h) * BT + BT - 1) - c_r
                # the sum up to the rows' end, or, forward, to where they begin
                p_r = sums + (task.i_s.to(gl.int64) - (0 if REVERSE else 1)) * H + task.i_h
                sum_r = gl.load(p_r, mask=(task.i_r > 0) | REVERSE, other=0.0)
            for j in range(task.n + 1):
                b_r = c_r
                b_c = c_r
                if j < task.n:
                    b_r = gl.full([BT], 1.0, gl.float32, layout) * scale
                    b_c = gl.full([BT], 1.0, gl.float32, layout)
                    if c is not None:
                        i_j = (base + task.lo + j).to(gl.int64) * H + task.i_h
                        c_j = gl.load(c + i_j * BT + r)
                        if REVERSE:
                            between = (gl.load(sums + i_j - H) - sum_r).to(gl.float32)
                            b_r = gl.exp2(between + earlier)
                            b_c = gl.exp2(c_j) * scale
                        else:
                            between = (sum_r - gl.load(sums + i_j)).to(gl.float32)
                            b_r = gl.exp2(c_r) * scale
                            b_c = gl.exp2(between + (gl.load(c + i_j * BT + BT - 1) - c_j))
                s.gates.acquire(at)
                s.of_rows.index(at.i).store(b_r)
                s.of_columns.index(at.i).store(b_c)
                s.gates.commit(at)
                at = s.gates.after(at)


@gluon.jit
def decayed(b_s, scale, own, of_rows, of_columns, W: gl.constexpr, REVERSE: gl.constexpr):
    """Scores of a tile, decayed and scaled. Of a block with itself, those of earlier (in reverse: later) rows are 0."""
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
def row_partition(s, scale, x_o, crossing, NB, W: gl.constexpr):
    """Rows W * HALF to (W + 1) * HALF of each block."""
    work = s.work
    H: gl.constexpr = work.H
    REVERSE: gl.constexpr = work.REVERSE
    dtype: gl.constexpr = s.qs.dtype
    BV: gl.constexpr = s.vs.shape[2]
    layout_p: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BT, 16])
    layout_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BV, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout_o, k_width=2)
    r_o = W * HALF + gl.arange(0, HALF, gl.SliceLayout(1, layout_o))
    at = consumer_start()
    at_q = consumer_start()
    at_x = consumer_start()
    any_before = 0
    for i in range(work.rounds()):
        task = work.task(i)
        if task.live:
            b_q = s.qs.index(at_q.i * 2 + W)
            b_o = gl.zeros([HALF, BV], gl.float32, layout_o)
            s.q.wait(at_q)
            s.k.wait(at)
            b_s = warpgroup_mma(
                b_q, s.ks.index(at.i).permute((1, 0)), gl.zeros([HALF, BT], gl.float32, layout_p),
                use_acc=False, is_async=True,
            )  # fmt: skip
            # o of the task before lies where its q was
            tma.store_wait(0)
            mbarrier.arrive(s.q.empty.index(at_q.i ^ 1), count=1, pred=any_before > 0)
            any_before = 1
            s.gates.wait(at)
            b_s = warpgroup_mma_wait(0, (b_s,))
            s.k.release(at)
            b_p = decayed(b_s, scale, task.n == 0, s.of_rows.index(at.i), s.of_columns.index(at.i), W, REVERSE)
            b_p = gl.convert_layout(b_p.to(dtype), operand)
            for j in range(task.n):
                at_v = at
                at = s.k.after(at)
                s.k.wait(at)
                s.v.wait(at_v)
                b_s = warpgroup_mma(
                    b_q, s.ks.index(at.i).permute((1, 0)), gl.zeros([HALF, BT], gl.float32, layout_p),
                    use_acc=False, is_async=True,
                )  # fmt: skip
                b_o = warpgroup_mma(b_p, s.vs.index(at_v.i), b_o, is_async=True)
                # what was read of them is in b_p by now
                s.gates.release(at_v)
                s.gates.wait(at)
                b_s = warpgroup_mma_wait(1, (b_s,))
                s.k.release(at)
                own = j == task.n - 1
                b_n = decayed(b_s, scale, own, s.of_rows.index(at.i), s.of_columns.index(at.i), W, REVERSE)
                b_n = gl.convert_layout(b_n.to(dtype), operand)
                b_o = warpgroup_mma_wait(0, (b_o,))
                b_p = b_n
                s.v.release(at_v)
                if crossing is not None:
                    p_c = crossing + ((W * work.blocks + task.i_s).to(gl.int64) * H + task.i_h) * NB
                    p_c += task.lo + j + 1
                    s.x.wait(at_x)
                    gl.store(p_c, gl.sum(gl.sum(s.xs.index(W).load(layout_o).to(gl.float32) * b_o, 1), 0))
            s.v.wait(at)
            b_o = warpgroup_mma(b_p, s.vs.index(at.i), b_o, is_async=True)
            s.gates.release(at)
            b_o = warpgroup_mma_wait(0, (b_o,))
            s.v.release(at)
            b_q.store(b_o.to(dtype))
            fence_async_shared()
            tma_store(s.desc_o, work.tile(task, task.i_h, task.first - task.bos + W * HALF, 0), b_q)
            if s.X:
                o_x = task.first + r_o
                s.x.wait(at_x)
                b_x = gl.sum(s.xs.index(W).load(layout_o).to(gl.float32) * b_o, 1)
                gl.store(x_o + (task.i_b * H + task.i_h) * work.T + o_x, b_x, mask=o_x < task.end)
                # after a store of what was read: see `row_sum_partition` in `common.py`
                s.x.release(at_x)
                at_x = s.x.after(at_x)
            at = s.k.after(at)
            at_q = s.q.after(at_q)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=['tasks', 'blocks', 'N', 'T', 'NB', 'scale'],
    repr=kernel_name('hopper_attention'),
)
def hopper_attention_kernel(
    desc_q,  # tiles [HALF, BK] of [B, T, H // GQ, K]
    desc_k,  # tiles [BT, BK] of [B, T, H // GQ, K]
    desc_v,  # tiles [BT, BV] of [B, T, H // GV, V]
    desc_o,  # tiles [HALF, BV] of [B, T, H, V]
    desc_x,  # tiles [HALF, BV] of [B, T, H // GV, V], or None
    c,  # [1, blocks, H, BT]: running sums of the gates in blocks, or None
    sums,  # [3, blocks, H], fp64, of which the first is read: the gates up to a block's end; or None
    ranges,  # [2, blocks, H], int32: the first block that rows multiply, in reverse the one after the last; or None
    x_o,  # [1, B, H, T]: rows x . o
    crossing,  # [2, blocks, H, NB]: the sum of x . o over half a block, of the columns before block b; or None
    cu_seqlens,  # [N + 1] or None
    scale, tasks, blocks, N, T,
    NB,  # blocks in the longest sequence there can be
    ROLE: gl.constexpr,
    H: gl.constexpr, GQ: gl.constexpr, GV: gl.constexpr,
    BK: gl.constexpr, BV: gl.constexpr,
    REVERSE: gl.constexpr, STAGES: gl.constexpr, ROW_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """o of one block of rows after another. Rings:

        ring     buffers                                   full            empty
        q        2: q of a block, and then its o           load, by TMA    both rows, when the o of it is stored
        k, v     STAGES: a tile each                       load, by TMA    both rows
        gates    STAGES: factors of rows and columns       gates           both rows
        x        1: x of a block                           load, by TMA    both rows

    As compiled by triton 3.6, with no packed sequences: bytes of shared memory, and bytes of spills, stored and loaded:

        D     o                  dq with x            dk with x            dv
        64    100,792   0, 0     117,280     4, 4     117,264     4, 4     100,792    4, 4
        128   199,096   4, 16    231,968    24, 84    231,952    24, 80    199,096   12, 24

    o leaves the memory of its q by TMA, so that q is released in the next task, after the wait for that store.
    """
    dtype: gl.constexpr = desc_q.dtype
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    X: gl.constexpr = x_o is not None
    qs = gl.allocate_shared_memory(dtype, [4, HALF, BK], gl.NVMMASharedLayout.get_default_for([HALF, BK], dtype))
    ks = gl.allocate_shared_memory(dtype, [STAGES, BT, BK], gl.NVMMASharedLayout.get_default_for([BT, BK], dtype))
    vs = gl.allocate_shared_memory(dtype, [STAGES, BT, BV], gl.NVMMASharedLayout.get_default_for([BT, BV], dtype))
    of_rows = gl.allocate_shared_memory(gl.float32, [STAGES, BT], vector)
    of_columns = gl.allocate_shared_memory(gl.float32, [STAGES, BT], vector)
    q = ring(2, 1, 2)
    k = ring(STAGES, 1, 2)
    v = ring(STAGES, 1, 2)
    gates = ring(STAGES, 1, 2)
    if X:
        xs = gl.allocate_shared_memory(dtype, [2, HALF, BV], gl.NVMMASharedLayout.get_default_for([HALF, BV], dtype))
        x = ring(1, 1, 2)
    else:
        # what is there stands in for what nobody reads
        xs = vs
        x = v
    fence_async_shared()

    work = Work(cu_seqlens, ranges, tasks, blocks, N, T, H, REVERSE)
    s = Attention(
        work, desc_q, desc_k, desc_v, desc_o, desc_x, qs, ks, vs, xs, of_rows, of_columns, q, k, v, x, gates, GQ, GV, X
    )  # fmt: skip
    gl.warp_specialize([
        (row_partition, (s, scale, x_o, crossing, NB, 0)),
        (row_partition, (s, scale, x_o, crossing, NB, 1)),
        (load_partition, (s,)),
        (gate_partition, (s, c, sums, scale)),
    ], [4, 1, 1], [ROW_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip


class Config(NamedTuple):
    """Buffers of the rings, and registers to a thread: of the second row partition, of the others, and the most of the
    kernel as ptxas sees it.
    """

    stages: int
    row_registers: int
    other_registers: int
    most_registers: int


CONFIG = Config(2, 240, 24, 168)


@launcher
def launch_attention(tensors, setting):
    q, k, v, o, x, *others, cu_seqlens = tensors
    B, T, H, K, V = sizes(q, v)
    D = max(padded(K, V))
    blocks = count_blocks(B, T, BLOCK_TOKENS, cu_seqlens)
    args = (
        descriptor(q, D, cu_seqlens, HALF.value), *(descriptor(t, D, cu_seqlens, BLOCK_TOKENS) for t in (k, v)),
        descriptor(o, D, cu_seqlens, HALF.value), None if x is None else descriptor(x, D, cu_seqlens, HALF.value),
        *others, cu_seqlens,
        setting.scale, blocks * H, blocks, count_sequences(B, cu_seqlens), T, -(-T // BLOCK_TOKENS),
    )  # fmt: skip
    constants = dict(
        ROLE=setting.role, H=H, GQ=H // q.shape[2], GV=H // v.shape[2], BK=D, BV=D, REVERSE=setting.reverse,
        STAGES=CONFIG.stages, ROW_REGISTERS=CONFIG.row_registers, OTHER_REGISTERS=CONFIG.other_registers,
        maxnreg=CONFIG.most_registers, num_warps=4,
    )  # fmt: skip
    return hopper_attention_kernel, (min(blocks * H, multiprocessors(q.device)), 1, 1), args, constants


def attend(operands, setting):
    """One run over all blocks of rows: `o`; with x also the rows `x . o [1, B, H, T]` and, not in reverse, what of them
    comes from before each block `[2, blocks, H, NB]`, in two parts, of the first rows of a block and of the others.
    """
    q, k, v, gates, x, cu_seqlens = operands
    B, T, H, _, V = sizes(q, v)
    # the tokens in no sequence get zeros: no program has them among its tasks
    o = (empty if cu_seqlens is None else zeros)(q, B, T, H, V)
    x_o = crossing = None
    if x is not None:
        x_o = empty(q, 1, B, H, T, dtype=torch.float32)
        if not setting.reverse:
            # zeros, because tiles without anything are skipped
            blocks = count_blocks(B, T, BLOCK_TOKENS, cu_seqlens)
            crossing = zeros(q, 2, blocks, H, -(-T // BLOCK_TOKENS), dtype=torch.float32)
    launch_attention((q, k, v, o, x, *gates, x_o, crossing, cu_seqlens), setting)
    return o, x_o, crossing
