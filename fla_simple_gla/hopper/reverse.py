"""The sweep for dk and dv at once on Hopper, K and V up to 128, back in time.

The state is dS, which starts from the gradient of the final state and leaves that of the initial one. With c the
running sum of the gates in a chunk of C tokens and dS the state after it:

    dv_j = scale * sum_{i>=j} exp(c_i - c_j) (k_j . q_i) do_i  +  exp(c_C - c_j) dS^T k_j
    dk_j = scale * sum_{i>=j} exp(c_i - c_j) (v_j . do_i) q_i  +  exp(c_C - c_j) dS v_j
    dS'  = exp(c_C) dS + scale * sum_i exp(c_i) q_i do_i^T

One program to a multiprocessor takes one head of a sequence, or of a segment of it, after another. Its partitions:

    load_partition      1 warp             brings tiles of the next chunks to shared memory (TMA), anchors to L2
    gate_partition      1 warp             sums the gates of the next chunks, and makes the decays
    value_partition     4 warps, 1 or 2    keeps 64 columns of dS in registers, transposed, and makes these of dv
    key_partition       4 warps            makes the products of pairs inside a chunk for dv, those for dk, and dk
    row_sum_partition   2 warps            adds up what the states add to k . dk, where dg is wanted

For dg (`_gates.py`) it leaves z, the part of k . dk that comes from the carried state, and the products of the anchors
with dS.
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
    consumer_start,
    descriptor,
    fragment_indices,
    gate_buffers,
    gate_partition,
    padded,
    prefetch,
    producer_start,
    ring,
    row_sum_partition,
    store_sum,
    tma_load,
    tma_store,
)


@aggregate
class Reverse:
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
    desc_do: Descriptor
    desc_dk: Descriptor
    desc_dv: Descriptor
    qs: gl.shared_memory_descriptor  # [STAGES, C, BK]
    ks: gl.shared_memory_descriptor  # likewise
    vs: gl.shared_memory_descriptor  # [STAGES, C, BV]
    dos: gl.shared_memory_descriptor  # likewise
    ps: gl.shared_memory_descriptor  # [STAGES, C, C]
    dks: gl.shared_memory_descriptor  # [C, BK]
    dvs: gl.shared_memory_descriptor  # [values, C, BS]
    published: gl.shared_memory_descriptor  # [BV, BK]: dS, transposed, in 16 bits
    tiles: Ring
    products: Ring
    state: Ring
    gates: Gates
    sums: Sums
    GK: gl.constexpr
    K: gl.constexpr
    V: gl.constexpr
    BA: gl.constexpr
    DG: gl.constexpr


@gluon.jit
def from_fragments(x, layout: gl.constexpr):
    """The inverse of `to_fragments`, but that of a thread's 8 numbers those of the first 8 rows come first. So a tile
    that was transposed 8 x 8 by 8 x 8 is read as the whole transposed.
    """
    n: gl.constexpr = x.shape[1]
    x = x.reshape([4, 8, 4, n // 8, 2, 2, 2]).permute((0, 4, 1, 3, 5, 2, 6)).reshape([64, 2 * n])
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def load_partition(s):
    work = s.work
    at = producer_start()
    for i in range(gl.program_id(0), work.tasks, gl.num_programs(0)):
        task = work.task(i)
        NT = task.chunks()
        for i_r in range(NT):
            i_c = NT - 1 - i_r
            s.tiles.acquire(at)
            bar = s.tiles.full.index(at.i)
            if s.DG:
                wanted, i_a = work.anchor(task, i_c, s.anchor_blocks, s.BA)
                if wanted:
                    SIZE: gl.constexpr = s.qs.shape[2] * s.vs.shape[2]
                    prefetch(s.anchors + (i_a.to(gl.int64) * work.H + task.i_h) * SIZE, 2 * SIZE)
            mbarrier.expect(bar, C * (2 * s.qs.shape[2] + 2 * s.vs.shape[2]) * 2)
            of_k = work.tile(task, task.end, task.i_h // s.GK, i_c * C, 0)
            of_v = work.tile(task, task.end, task.i_h, i_c * C, 0)
            tma_load(s.desc_k, of_k, bar, s.ks.index(at.i))
            tma_load(s.desc_q, of_k, bar, s.qs.index(at.i))
            tma_load(s.desc_do, of_v, bar, s.dos.index(at.i))
            tma_load(s.desc_v, of_v, bar, s.vs.index(at.i))
            at = s.tiles.after(at)


@gluon.jit
def key_partition(s, scale):
    """dk of each chunk, and the products that the partitions of dv need."""
    work = s.work
    BK: gl.constexpr = s.qs.shape[2]
    dtype: gl.constexpr = s.qs.dtype
    layout_p: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    layout_k: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BK, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout_k, k_width=2)
    o_j = gl.arange(0, C, gl.SliceLayout(1, layout_p))
    o_i = gl.arange(0, C, gl.SliceLayout(0, layout_p))
    at = consumer_start()
    at_p = producer_start()
    at_s = consumer_start()
    for i in range(gl.program_id(0), work.tasks, gl.num_programs(0)):
        task = work.task(i)
        NT = task.chunks()
        for i_c in range(NT):
            i_t = (NT - 1 - i_c) * C
            s.tiles.wait(at)
            b_q = s.qs.index(at.i)
            b_v = s.vs.index(at.i)
            b_p = warpgroup_mma(
                s.ks.index(at.i), b_q.permute((1, 0)), gl.zeros([C, C], gl.float32, layout_p),
                use_acc=False, is_async=True,
            )  # fmt: skip
            s.gates.ring.wait(at)
            c_j = s.gates.sums.index(at.i).load(gl.SliceLayout(1, layout_p))
            c_i = s.gates.sums.index(at.i).load(gl.SliceLayout(0, layout_p))
            decay = gl.where(o_j[:, None] <= o_i[None, :], gl.exp2(c_i[None, :] - c_j[:, None]), 0.0) * scale
            b_p = warpgroup_mma_wait(0, (b_p,))
            s.products.acquire(at_p)
            s.ps.index(at_p.i).store((b_p * decay).to(dtype))
            fence_async_shared()
            s.products.commit(at_p)
            at_p = s.products.after(at_p)
            b_a = warpgroup_mma(
                b_v, s.dos.index(at.i).permute((1, 0)), gl.zeros([C, C], gl.float32, layout_p),
                use_acc=False, is_async=True,
            )  # fmt: skip
            b_a = warpgroup_mma_wait(0, (b_a,)) * decay
            b_d = gl.convert_layout(b_a.to(dtype), operand)
            s.state.wait(at_s)
            b_k = warpgroup_mma(b_v, s.published, gl.zeros([C, BK], gl.float32, layout_k), use_acc=False, is_async=True)
            decay_k = s.gates.to_end.index(at.i).load(gl.SliceLayout(1, layout_k))
            b_k = warpgroup_mma_wait(0, (b_k,))
            s.state.release(at_s)
            b_k = b_k * decay_k[:, None]
            b_k = warpgroup_mma(b_d, b_q, b_k, is_async=True)
            s.gates.ring.release(at)
            tma.store_wait(0)
            b_k = warpgroup_mma_wait(0, (b_k,))
            s.tiles.release(at)
            s.dks.store(b_k.to(dtype))
            fence_async_shared()
            tma_store(s.desc_dk, work.tile(task, task.end, task.i_h, i_t, 0), s.dks)
            at_s = s.state.after(at_s)
            at = s.tiles.after(at)
        work.clear(task, s.desc_dk, s.dks, 0)
    tma.store_wait(0)


@gluon.jit
def value_partition(s, W: gl.constexpr):
    """Columns W * BS to (W + 1) * BS of dS, and of dv."""
    work = s.work
    H: gl.constexpr = work.H
    BK: gl.constexpr = s.qs.shape[2]
    dtype: gl.constexpr = s.qs.dtype
    layout_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BK, 16])
    layout_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    operand_o: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout_o, k_width=2)
    operand_s: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout_s, k_width=2)
    o_v = W * BS + gl.arange(0, BS, gl.SliceLayout(1, layout_s))
    o_k = gl.arange(0, BK, gl.SliceLayout(0, layout_s))
    at = consumer_start()
    at_s = producer_start()
    at_z = producer_start()
    for i in range(gl.program_id(0), work.tasks, gl.num_programs(0)):
        task = work.task(i)
        b_s = gl.zeros([BS, BK], gl.float32, layout_s)
        if s.state_in.p is not None:
            p_in = s.state_in.of((task.i_s if work.SEGMENTS else task.i_n).to(gl.int64), task.i_h)
            # there is none of what lies in no sequence
            b_s = s.state_in.load(p_in, o_v, o_k, gl.where(is_sequence(task.i_n, work.N), s.V, 0), s.K)
        NT = task.chunks()
        for i_r in range(NT):
            i_c = NT - 1 - i_r
            b_s = warpgroup_mma_wait(0, (b_s,))
            if s.DG:
                # asked for now, and multiplied while the tensor cores are at work
                wanted, i_a = work.anchor(task, i_c, s.anchor_blocks, s.BA)
                t, x = fragment_indices(BK // 2)
                tile_16 = (W * (BS // 16) + t // 32) * (BK // 16) + x // 8
                p_a = s.anchors + (i_a.to(gl.int64) * H + task.i_h) * (BK * BK)
                # all or nothing; x is in the mask for its shape
                m_a = (t < gl.where(wanted, 128, 0)) & (x >= 0)
                b_a = gl.load(p_a + ((tile_16 * 32 + t % 32) * 8 + x % 8), mask=m_a, other=0.0)
            s.state.acquire(at_s)
            s.published.slice(W * BS, BS, dim=0).store(b_s.to(dtype))
            fence_async_shared()
            s.state.commit(at_s)
            at_s = s.state.after(at_s)
            s.tiles.wait(at)
            b_o = warpgroup_mma(
                s.published.slice(W * BS, BS, dim=0), s.ks.index(at.i).permute((1, 0)),
                gl.zeros([BS, C], gl.float32, layout_o), use_acc=False, is_async=True,
            )  # fmt: skip
            if s.DG:
                if wanted:
                    b_a_s = from_fragments(b_a, layout_s).to(gl.float32) * b_s
                    store_sum(s.s_ds, gl.sum(b_a_s, 1), W, i_a, task.i_h, s.anchor_blocks + work.N, H)
            b_v = s.dos.index(at.i).slice(W * BS, BS, dim=1).permute((1, 0)).load(operand_s)
            s.gates.ring.wait(at)
            from_start = s.gates.from_start.index(at.i).load(gl.SliceLayout(0, operand_s))
            b_d = (b_v.to(gl.float32) * from_start[None, :]).to(dtype)
            to_end = s.gates.to_end.index(at.i).load(gl.SliceLayout(0, layout_o))
            b_s = b_s * s.gates.decays.index(at.i).load(gl.SliceLayout(0, layout_s))[None, :]
            b_s = warpgroup_mma(b_d, s.qs.index(at.i), b_s, is_async=True)
            b_o = warpgroup_mma_wait(1, (b_o,))
            b_o = b_o * to_end[None, :]
            if s.DG:
                b_x = s.vs.index(at.i).slice(W * BS, BS, dim=1).permute((1, 0)).load(operand_o)
                b_x = gl.convert_layout(b_x, layout_o)
                b_x = gl.sum((b_o * b_x.to(gl.float32)).reshape([4, 2, 8, C]), 1).reshape([32, C])
                s.sums.ring.acquire(at_z)
                s.sums.buffer(at_z, W).store(b_x)
                s.sums.ring.commit(at_z)
                at_z = s.sums.ring.after(at_z)
            s.products.wait(at)
            b_do = s.dos.index(at.i).slice(W * BS, BS, dim=1).permute((1, 0))
            b_o = warpgroup_mma(b_do, s.ps.index(at.i).permute((1, 0)), b_o, is_async=True)
            tma.store_wait(0)
            b_s = warpgroup_mma_wait(1, (b_s,))
            b_o = warpgroup_mma_wait(0, (b_o,))
            s.dvs.index(W).permute((1, 0)).store(b_o.to(dtype))
            fence_async_shared()
            tma_store(s.desc_dv, work.tile(task, task.end, task.i_h, i_c * C, W * BS), s.dvs.index(W))
            s.products.release(at)
            s.gates.ring.release(at)
            s.tiles.release(at)
            at = s.tiles.after(at)
        work.clear(task, s.desc_dv, s.dvs.index(W), W * BS)
        if s.state_out.p is not None:
            swept = (task.first < task.end) if work.SEGMENTS else (task.first == task.bos)
            if is_sequence(task.i_n, work.N) & (task.first == task.bos) & swept:
                p_out = s.state_out.of(task.i_n.to(gl.int64), task.i_h)
                s.state_out.store(p_out, o_v, o_k, b_s, s.V, s.K)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=['tasks', 'N', 'T', 'segment', 'anchor_blocks', 'scale'],
    repr=kernel_name('hopper_reverse_sweep'),
)
def hopper_reverse_kernel(
    desc_q, desc_k,  # tiles [C, BK] of [B, T, H // GK, K]
    desc_v, desc_do,  # tiles [C, BV] of [B, T, H, V]
    desc_dk,  # tiles [C, BK] of [B, T, H, K]
    desc_dv,  # tiles [C, BS] of [B, T, H, V]
    g,  # [B, T, H], any strides, or None
    state_in,  # [N, H, K, V], of segments [segments, H, K, V], any strides, or None
    state_out,  # [N, H, K, V], any strides, or None
    z,  # [1, B, H, T]: what the carried state adds to k . dk
    anchors,  # [anchor blocks + N, H, BK * BK]: states that `hopper_sweep_kernel` left, or None
    s_ds,  # [BV // 16, anchor blocks + N, H]: <anchor, state after the chunk>, of each warp
    cu_seqlens,  # [N + 1] or None
    scale, tasks, N, T,
    segment,  # tokens
    anchor_blocks,
    g_b, g_t, g_h,
    si_n, si_h, si_k, si_v,
    so_n, so_h, so_k, so_v,
    ROLE: gl.constexpr,
    H: gl.constexpr, GK: gl.constexpr,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, BA: gl.constexpr,
    SEGMENTS: gl.constexpr, DG: gl.constexpr, STAGES: gl.constexpr,
    STATE_REGISTERS: gl.constexpr, KEY_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk and dv of one task after another. Rings, with NW value partitions, one for 64 columns of V:

        ring           buffers                    full                        empty
        tiles          STAGES: q, k, v, do        load, by TMA                each value, key
        gates          STAGES: sums, decays       gates                       each value, key
        products       STAGES: P^T                key                         each value
        state          1: dS, in 16 bits          each value, its columns     key
        sums           1: partial row sums        each value                  row sums

    As compiled by triton 3.6, with no state given and no packed sequences: bytes of shared memory, and bytes of spills,
    stored and loaded:

        D     with dg              without
        64    200,432    40, 32    192,128    12, 12
        128   231,640    76, 148   215,144    64, 112

    A value partition multiplies its own columns of the published dS at once: it has written them. `key_partition` waits
    for all columns.
    """
    dtype: gl.constexpr = desc_q.dtype
    by_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BK], dtype)
    by_v: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BV], dtype)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    NW: gl.constexpr = BV // BS
    qs = gl.allocate_shared_memory(dtype, [STAGES, C, BK], by_k)
    ks = gl.allocate_shared_memory(dtype, [STAGES, C, BK], by_k)
    vs = gl.allocate_shared_memory(dtype, [STAGES, C, BV], by_v)
    dos = gl.allocate_shared_memory(dtype, [STAGES, C, BV], by_v)
    ps = gl.allocate_shared_memory(dtype, [STAGES, C, C], square)
    dks = gl.allocate_shared_memory(dtype, [C, BK], by_k)
    dvs = gl.allocate_shared_memory(dtype, [NW, C, BS], square)
    published = gl.allocate_shared_memory(dtype, [BV, BK], gl.NVMMASharedLayout.get_default_for([BV, BK], dtype))
    tiles = ring(STAGES, 1, NW + 1)
    products = ring(STAGES, 1, NW)
    gates = gate_buffers(STAGES, ring(STAGES, 1, NW + 1))
    state = ring(1, NW, 1)
    if DG:
        partial_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0])
        sums = Sums(gl.allocate_shared_memory(gl.float32, [NW, 32, C], partial_layout), ring(1, NW, 1))
    else:
        # what is there stands in for what nobody reads
        sums = Sums(gates.sums, tiles)
    fence_async_shared()

    # no pool, and so no slots of one: any number
    work = Work(cu_seqlens, None, tasks, N, T, N, segment, H, SEGMENTS)
    s = Reverse(
        work, States(state_in, si_n, si_h, si_k, si_v), States(state_out, so_n, so_h, so_k, so_v),
        anchors, s_ds, anchor_blocks, desc_q, desc_k, desc_v, desc_do, desc_dk, desc_dv,
        qs, ks, vs, dos, ps, dks, dvs, published, tiles, products, state, gates, sums, GK, K, V, BA, DG,
    )  # fmt: skip
    of_g = (work, gates, g, (g_b, g_t, g_h), scale, True)
    of_sums = (work, sums, z, None, True)
    if NW == 2:
        if DG:
            gl.warp_specialize([
                (value_partition, (s, 0)),
                (value_partition, (s, 1)),
                (key_partition, (s, scale)),
                (gate_partition, of_g),
                (load_partition, (s,)),
                (row_sum_partition, of_sums),
            ], [4, 4, 1, 1, 2],
            [STATE_REGISTERS, KEY_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
        else:
            gl.warp_specialize([
                (value_partition, (s, 0)),
                (value_partition, (s, 1)),
                (key_partition, (s, scale)),
                (gate_partition, of_g),
                (load_partition, (s,)),
            ], [4, 4, 1, 1], [STATE_REGISTERS, KEY_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
    elif DG:
        gl.warp_specialize([
            (value_partition, (s, 0)),
            (key_partition, (s, scale)),
            (gate_partition, of_g),
            (load_partition, (s,)),
            (row_sum_partition, of_sums),
        ], [4, 1, 1, 2], [KEY_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (value_partition, (s, 0)),
            (key_partition, (s, scale)),
            (gate_partition, of_g),
            (load_partition, (s,)),
        ], [4, 1, 1], [KEY_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip


class Config(NamedTuple):
    """Buffers of the rings, and registers to a thread: of the second value partition (there is none up to D 64), of the
    key partition, of the others, and the most of the kernel as ptxas sees it.
    """

    stages: int
    state_registers: int
    key_registers: int
    other_registers: int
    most_registers: int


# By dim. One program to a multiprocessor at D 64 too: with the registers of half of one ptxas puts a wait after every
# product (C7512).
CONFIGS = {
    64: Config(4, 240, 200, 32, 168),
    128: Config(2, 176, 128, 32, 128),
}


@launcher
def launch_reverse_sweep(tensors, setting: Setting):
    q, k, v, do, dk, dv, g, state_in, state_out, z, anchors, s_ds, cu_seqlens = tensors
    B, T, H, K, V = sizes(q, v)
    D = padded(K, V)
    scale, segment, BA, *_ = setting
    tasks = count_swept(B, T, segment, cu_seqlens) * H
    config = CONFIGS[D]
    args = (
        *(descriptor(t, D, cu_seqlens) for t in (q, k, v, do, dk)), descriptor(dv, BS.value, cu_seqlens),
        g, state_in, state_out, z, anchors, s_ds, cu_seqlens,
        scale, tasks, count_sequences(B, cu_seqlens), T, segment or 0, count_blocks(B, T, BA, cu_seqlens),
        *strides(g, 3), *strides(state_in, 4), *strides(state_out, 4),
    )  # fmt: skip
    constants = dict(
        ROLE='dk_dv', H=H, GK=H // q.shape[2], K=K, V=V, BK=D, BV=D, BA=BA, SEGMENTS=segment is not None,
        DG=anchors is not None, STAGES=config.stages, STATE_REGISTERS=config.state_registers,
        KEY_REGISTERS=config.key_registers, OTHER_REGISTERS=config.other_registers, maxnreg=config.most_registers,
        num_warps=4,
    )  # fmt: skip
    return hopper_reverse_kernel, (min(tasks, multiprocessors(q.device)), 1, 1), args, constants


def reverse_sweep(operands: Operands, do: torch.Tensor, setting: Setting):
    """One sweep back in time over each sequence, or over each of its segments: dk and dv; and, if there are anchors,
    what dg needs: `z [1, B, H, T]` and `<anchor, state> [D / 16, anchor blocks + N, H]`, one of each warp, D the dim
    padded.
    """
    q, k, v, g, state_in, state_out, _, anchors, cu_seqlens, _ = operands
    B, T, H, K, V = sizes(q, v)
    dk = empty(q, B, T, H, K)
    dv = empty(q, B, T, H, V)
    z = s_ds = None
    if anchors is not None:
        z = empty(q, 1, B, H, T, dtype=torch.float32)
        s_ds = empty(q, padded(K, V) // 16, anchors.shape[0], H, dtype=torch.float32)
    launch_reverse_sweep((q, k, v, do, dk, dv, g, state_in, state_out, z, anchors, s_ds, cu_seqlens), setting)
    return dk, dv, z, s_ds
