"""The sweep for dk and dv at once on Hopper, K and V up to 128, back in time; and of pairs of heads that for dq.

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
    row_sum_partition   2 warps            adds up rows of v . dv, where dg is wanted

**Pairs of heads.** Where heads share q and k and V is at most 64, a task is two heads (`common.is_paired`). Each has a
value partition. `key_partition` makes k . q once, and the sum of dk over both, in fp32 but for their decays, which it
multiplies into v. What it leaves is half as much as dk of every head, and is summed outside.

The same kernel makes their dq, forward in time: it is given k, q, do and v for q, k, v and do, and then its dS is S,
its dk is dq, and its dv is o, which is not stored.

**dg** (`_gates.py`). The part of k . dk that comes from the carried state is that of v . dv, which a value partition
has: z. Back in time the sweep also leaves the products of the anchors with dS. Of pairs of heads it leaves y, what the
pairs of tokens inside a chunk add to v . dv, and forward in time w, all of do . o: the same P is in both.

**Step sizes** (`_sweeps.Steps`) are in the decays, on the side of k, so that dv is already the gradient of x, but for
D do, and what is left of v . dv is as without them. dD is summed up forward in time: `key_partition` has the products
x . do on the diagonal of those of pairs.
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
    chunks_to_a_program,
    consumer_start,
    count_pair,
    decay_of_pairs,
    descriptor,
    fragment_indices,
    fragment_offsets,
    from_fragments,
    gate_buffers,
    gate_partition,
    padded,
    prefetch,
    producer_start,
    relay_buffers,
    ring,
    row_sum_partition,
    store_sum,
    thread_sums,
    tma_load,
    tma_store,
    to_fragments,
)


@aggregate
class Gradients:
    """What the partitions share."""

    work: Work
    state_in: States
    state_out: States
    skip: Skip
    dD: Pointer
    dD_h: Number
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
    vs: gl.shared_memory_descriptor  # [STAGES * values, C, BS]
    dos: gl.shared_memory_descriptor  # likewise
    ps: gl.shared_memory_descriptor  # [PRODUCTS * HEADS, C, C]
    dks: gl.shared_memory_descriptor  # [C, BK]
    dvs: gl.shared_memory_descriptor  # [values, C, BS]
    published: gl.shared_memory_descriptor  # [values * BS, BK]: dS, transposed, in 16 bits
    tiles: Ring
    products: Ring
    state: Ring
    gates: Gates
    sums: Sums
    GK: gl.constexpr
    K: gl.constexpr
    V: gl.constexpr
    BA: gl.constexpr
    NW: gl.constexpr  # value partitions
    REVERSE: gl.constexpr
    DG: gl.constexpr
    DV: gl.constexpr  # whether dv is made, or at least its sums

    @gluon.jit
    def anchor_of(self, i_a, i_h):
        """Where the anchor of a head begins."""
        SIZE: gl.constexpr = self.qs.shape[2] * (self.NW // self.work.HEADS) * BS
        return self.anchors + (i_a.to(gl.int64) * self.work.H + i_h) * SIZE


@gluon.jit
def load_partition(s):
    work = s.work
    NW: gl.constexpr = s.NW
    at = producer_start()
    for j in range(work.start(), work.stop(), work.step()):
        task, first, last = work.take(j)
        for t in range(first, last, C):
            i_t = task.chunk(t, s.REVERSE)
            s.tiles.acquire(at)
            bar = s.tiles.full.index(at.i)
            if s.DG and s.REVERSE:
                wanted, i_a = work.anchor(task, i_t // C, s.anchor_blocks, s.BA)
                if wanted:
                    # those of two heads lie one after the other
                    prefetch(s.anchor_of(i_a, task.i_h), 2 * s.qs.shape[2] * NW * BS)
            mbarrier.expect(bar, C * (2 * s.qs.shape[2] + 2 * NW * BS) * 2)
            of_k = work.tile(task, task.end, task.i_h // s.GK, i_t, 0)
            tma_load(s.desc_k, of_k, bar, s.ks.index(at.i))
            tma_load(s.desc_q, of_k, bar, s.qs.index(at.i))
            for w in gl.static_range(NW):
                of_v = work.columns(task, i_t, w, 1)
                tma_load(s.desc_do, of_v, bar, s.dos.index(at.i * NW + w))
                tma_load(s.desc_v, of_v, bar, s.vs.index(at.i * NW + w))
            at = s.tiles.after(at)


@gluon.jit
def key_partition(s, scale):
    """dk of each chunk, and the products that the partitions of dv need."""
    work = s.work
    NW: gl.constexpr = s.NW
    HEADS: gl.constexpr = work.HEADS
    OF_HEAD: gl.constexpr = NW // HEADS  # value partitions
    BK: gl.constexpr = s.qs.shape[2]
    dtype: gl.constexpr = s.qs.dtype
    layout_p: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    layout_k: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BK, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout_k, k_width=2)
    of_k = s.gates.to_end if s.REVERSE else s.gates.from_start
    o_j = gl.arange(0, C, gl.SliceLayout(1, layout_p))
    o_i = gl.arange(0, C, gl.SliceLayout(0, layout_p))
    at = consumer_start()
    at_p = producer_start()
    at_s = consumer_start()
    for j in range(work.start(), work.stop(), work.step()):
        task, first, last = work.take(j)
        d_skip = ()
        if s.dD is not None:
            for _ in gl.static_range(HEADS):
                d_skip = d_skip + (thread_sums(gl.zeros([C, C], gl.float32, layout_p)),)
        for t in range(first, last, C):
            i_t = task.chunk(t, s.REVERSE)
            s.tiles.wait(at)
            b_q = s.qs.index(at.i)
            zero = gl.zeros([C, C], gl.float32, layout_p)
            if s.DV:
                b_p = warpgroup_mma(s.ks.index(at.i), b_q.permute((1, 0)), zero, use_acc=False, is_async=True)
            s.gates.ring.wait(at)
            new_skip = ()
            for h in gl.static_range(HEADS):
                decay = decay_of_pairs(s.gates, at.i * HEADS + h, o_j, o_i, 0, C, scale, s.REVERSE)
                if s.DV:
                    if h == 0:
                        b_p = warpgroup_mma_wait(0, (b_p,))
                        s.products.acquire(at_p)
                    s.ps.index(at_p.i * HEADS + h).store((b_p * decay).to(dtype))
                    if h == HEADS - 1:
                        fence_async_shared()
                        s.products.commit(at_p)
                b_i = zero
                for w in gl.static_range(OF_HEAD):
                    i_w = at.i * NW + h * OF_HEAD + w
                    b_do = s.dos.index(i_w).permute((1, 0))
                    b_i = warpgroup_mma(s.vs.index(i_w), b_do, b_i, use_acc=w > 0, is_async=True)
                b_i = warpgroup_mma_wait(0, (b_i,))
                if s.dD is not None:
                    # x . do of each token is on the diagonal, and a thread adds up what it has of it
                    diagonal = thread_sums(gl.where(o_j[:, None] == o_i[None, :], b_i, 0.0))
                    new_skip = new_skip + (d_skip[h] + diagonal,)
                b_i = b_i * decay
                if h == 0:
                    b_a = b_i
                else:
                    b_a = b_a + b_i
            b_d = gl.convert_layout(b_a.to(dtype), operand)
            s.state.wait(at_s)
            b_k = gl.zeros([C, BK], gl.float32, layout_k)
            if HEADS == 1:
                for w in gl.static_range(NW):
                    b_s = s.published.slice(w * BS, BS, dim=0)
                    b_k = warpgroup_mma(s.vs.index(at.i * NW + w), b_s, b_k, use_acc=w > 0, is_async=True)
                decay_k = of_k.index(at.i).load(gl.SliceLayout(1, layout_k))
                b_k = warpgroup_mma_wait(0, (b_k,))
                s.state.release(at_s)
                b_k = b_k * decay_k[:, None]
            else:
                # each head has decays of its own: of the rows of v
                for h in gl.static_range(HEADS):
                    decay_k = of_k.index(at.i * HEADS + h).load(gl.SliceLayout(1, operand))
                    b_v = s.vs.index(at.i * NW + h).load(operand).to(gl.float32) * decay_k[:, None]
                    b_s = s.published.slice(h * BS, BS, dim=0)
                    b_k = warpgroup_mma(b_v.to(dtype), b_s, b_k, use_acc=h > 0, is_async=True)
                b_k = warpgroup_mma_wait(0, (b_k,))
                s.state.release(at_s)
            b_k = warpgroup_mma(b_d, b_q, b_k, is_async=True)
            s.gates.ring.release(at)
            tma.store_wait(0)
            b_k = warpgroup_mma_wait(0, (b_k,))
            s.tiles.release(at)
            s.dks.store(b_k.to(dtype))
            fence_async_shared()
            tma_store(s.desc_dk, work.tile(task, task.end, task.i_h // HEADS, i_t, 0), s.dks)
            at_p = s.products.after(at_p)
            at_s = s.state.after(at_s)
            at = s.tiles.after(at)
            d_skip = new_skip
        if s.dD is not None:
            # of a task that two programs share each has a part
            part = gl.where(first > 0, work.count(), 0) + task.i_s
            for h in gl.static_range(HEADS):
                p_d = s.dD + (task.i_h + h).to(gl.int64) * s.dD_h
                store_sum(p_d, d_skip[h], 0, part, 0, 2 * work.count(), 1)
        work.clear(task, s.desc_dk, s.dks, task.i_h // HEADS, 0)
    tma.store_wait(0)


@gluon.jit
def value_partition(s, W: gl.constexpr):
    """64 columns of dS and of dv: those from W * BS on, or those of head W."""
    work = s.work
    H: gl.constexpr = work.H
    NW: gl.constexpr = s.NW
    HEADS: gl.constexpr = work.HEADS
    HEAD: gl.constexpr = W if HEADS == 2 else 0
    COLUMN: gl.constexpr = 0 if HEADS == 2 else W * BS
    INTER: gl.constexpr = s.DG and s.REVERSE  # sums of what comes from the carried state
    WHOLE: gl.constexpr = s.DG and HEADS == 2  # sums of the whole
    SKIP: gl.constexpr = s.skip.p is not None
    BK: gl.constexpr = s.qs.shape[2]
    dtype: gl.constexpr = s.qs.dtype
    layout_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BK, 16])
    layout_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    operand_o: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout_o, k_width=2)
    operand_s: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout_s, k_width=2)
    of_o = s.gates.to_end if s.REVERSE else s.gates.from_start
    of_v = s.gates.from_start if s.REVERSE else s.gates.to_end
    o_v = COLUMN + gl.arange(0, BS, gl.SliceLayout(1, layout_s))
    o_k = gl.arange(0, BK, gl.SliceLayout(0, layout_s))
    o_r, o_x = fragment_indices(BK // 2)
    at = consumer_start()
    at_p = consumer_start()
    at_s = producer_start()
    at_z = producer_start()
    for j in range(work.start(), work.stop(), work.step()):
        task, first, last = work.take(j)
        i_h = task.i_h + HEAD
        b_s = gl.zeros([BS, BK], gl.float32, layout_s)
        if s.state_in.p is not None:
            p_in = s.state_in.of((task.i_s if work.SEGMENTS else task.i_n).to(gl.int64), i_h)
            # there is none of what lies in no sequence
            b_s = s.state_in.load(p_in, o_v, o_k, gl.where(is_sequence(task.i_n, work.N), s.V, 0), s.K)
        if work.relay is not None:
            if first > 0:
                b_s = work.take_over((b_s,), W, NW)[0]
        if SKIP:
            skip = s.skip.load(i_h, gl.arange(0, BS, gl.SliceLayout(1, layout_o)), s.V)
        for t in range(first, last, C):
            i_t = task.chunk(t, s.REVERSE)
            b_s = warpgroup_mma_wait(0, (b_s,))
            if s.DG:
                wanted, i_a = work.anchor(task, i_t // C, s.anchor_blocks, s.BA)
                if HEADS == 2:
                    p_a = s.anchor_of(i_a, i_h) + fragment_offsets(BK // 2, 8)
                else:
                    # `hopper_sweep_kernel` held the state the other way round
                    tile_16 = (W * (BS // 16) + o_r // 32) * (BK // 16) + o_x // 8
                    p_a = s.anchor_of(i_a, i_h) + ((tile_16 * 32 + o_r % 32) * 8 + o_x % 8)
                if s.REVERSE:
                    # asked for now, and multiplied while the tensor cores are at work
                    # all or nothing; o_x is in the mask for its shape
                    b_a = gl.load(p_a, mask=(o_r < gl.where(wanted, 128, 0)) & (o_x >= 0), other=0.0)
                elif wanted:
                    gl.store(p_a, to_fragments(b_s.to(dtype)))
            s.state.acquire(at_s)
            s.published.slice(W * BS, BS, dim=0).store(b_s.to(dtype))
            fence_async_shared()
            s.state.commit(at_s)
            at_s = s.state.after(at_s)
            s.tiles.wait(at)
            if s.DV:
                zero = gl.zeros([BS, C], gl.float32, layout_o)
                b_k = s.ks.index(at.i).permute((1, 0))
                b_o = warpgroup_mma(
                    s.published.slice(W * BS, BS, dim=0), b_k, zero, use_acc=False, is_async=True
                )  # fmt: skip
            if s.DG and s.REVERSE:
                if wanted:
                    if HEADS == 2:
                        crossing = gl.sum(b_a.to(gl.float32) * to_fragments(b_s), 1)
                    else:
                        crossing = gl.sum(from_fragments(b_a, layout_s, True).to(gl.float32) * b_s, 1)
                    store_sum(s.s_ds, crossing, 0 if HEADS == 2 else W, i_a, i_h, s.anchor_blocks + work.N, H)
            b_v = s.dos.index(at.i * NW + W).permute((1, 0)).load(operand_s)
            s.gates.ring.wait(at)
            decay = of_v.index(at.i * HEADS + HEAD).load(gl.SliceLayout(0, operand_s))
            b_d = (b_v.to(gl.float32) * decay[None, :]).to(dtype)
            decay_o = of_o.index(at.i * HEADS + HEAD).load(gl.SliceLayout(0, layout_o))
            b_s = b_s * s.gates.decays.index(at.i * HEADS + HEAD).load(gl.SliceLayout(0, layout_s))[None, :]
            b_s = warpgroup_mma(b_d, s.qs.index(at.i), b_s, is_async=True)
            if s.DV:
                b_o = warpgroup_mma_wait(1, (b_o,))
                b_o = b_o * decay_o[None, :]
                if INTER:
                    b_x = gl.convert_layout(s.vs.index(at.i * NW + W).permute((1, 0)).load(operand_o), layout_o)
                    b_x = add_rows(b_o * b_x.to(gl.float32), s.sums.partial.shape[1])
                    s.sums.ring.acquire(at_z)
                    s.sums.buffer(at_z, W * (1 + WHOLE)).store(b_x)
                    if not WHOLE:
                        s.sums.ring.commit(at_z)
                s.products.wait(at_p)
                b_do = s.dos.index(at.i * NW + W).permute((1, 0))
                b_p = s.ps.index(at_p.i * HEADS + HEAD).permute((1, 0))
                b_o = warpgroup_mma(b_do, b_p, b_o, is_async=True)
                if SKIP:
                    b_d = gl.convert_layout(b_do.load(operand_o), layout_o)
                if s.REVERSE:
                    tma.store_wait(0)
                b_s = warpgroup_mma_wait(1, (b_s,))
                b_o = warpgroup_mma_wait(0, (b_o,))
                if SKIP:
                    s.dvs.index(W).permute((1, 0)).store((b_o + b_d.to(gl.float32) * skip[:, None]).to(dtype))
                elif s.REVERSE:
                    s.dvs.index(W).permute((1, 0)).store(b_o.to(dtype))
                if s.REVERSE:
                    fence_async_shared()
                    tma_store(s.desc_dv, work.columns(task, i_t, W, 1), s.dvs.index(W))
                s.products.release(at_p)
                at_p = s.products.after(at_p)
                if WHOLE:
                    b_x = gl.convert_layout(s.vs.index(at.i * NW + W).permute((1, 0)).load(operand_o), layout_o)
                    b_x = add_rows(b_o * b_x.to(gl.float32), s.sums.partial.shape[1])
                    if not INTER:
                        s.sums.ring.acquire(at_z)
                    s.sums.buffer(at_z, W * (1 + INTER) + INTER).store(b_x)
                    s.sums.ring.commit(at_z)
                at_z = s.sums.ring.after(at_z)
            else:
                b_s = warpgroup_mma_wait(0, (b_s,))
            s.gates.ring.release(at)
            s.tiles.release(at)
            at = s.tiles.after(at)
        if work.relay is not None:
            if last < task.tokens():
                work.hand_over((b_s,), W, NW)
        if s.REVERSE:
            work.clear(task, s.desc_dv, s.dvs.index(W), i_h, COLUMN)
        if s.state_out.p is not None:
            swept = (task.first < task.end) if work.SEGMENTS else (task.first == task.bos)
            if is_sequence(task.i_n, work.N) & (task.first == task.bos) & swept & (last == task.tokens()):
                p_out = s.state_out.of(task.i_n.to(gl.int64), i_h)
                s.state_out.store(p_out, o_v, o_k, b_s, s.V, s.K)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=['tasks', 'N', 'T', 'segment', 'share', 'anchor_blocks', 'scale'],
    repr=kernel_name('hopper_gradients'),
)
def hopper_gradient_kernel(
    desc_q, desc_k,  # tiles [C, BK] of [B, T, H // GK, K]
    desc_v, desc_do,  # tiles [C, BS] of [B, T, H, V]
    desc_dk,  # tiles [C, BK] of [B, T, H // HEADS, K]
    desc_dv,  # tiles [C, BS] of [B, T, H, V]; None forward in time
    g, dt,  # [B, T, H], any strides, those of dt as those of g; or None
    D,  # [H, V], any strides, or None
    dD,  # [H, ...]: sums of x . do, zeros at first, `[4, 2, sequences or segments]` for a head, of each warp; or None
    state_in,  # [N, H, K, V], of segments [segments, H, K, V], any strides, or None
    state_out,  # [N, H, K, V], any strides, or None
    z,  # [1, B, H, T]: what the carried state adds to k . dk; forward in time all of q . dq
    y,  # [1, B, H, T]: of pairs of heads, what pairs of tokens inside a chunk add to k . dk; or None
    anchors,  # [anchor blocks + N, H, numbers of a state]: states before some chunks, left forward, read back; or None
    s_ds,  # [warps with a head, anchor blocks + N, H]: back in time, <anchor, state after the chunk>, of each warp
    cu_seqlens,  # [N + 1] or None
    relay, flags,  # [programs, BK * BV], [programs, 2 * BV]: what programs hand over, or None
    scale, tasks, N, T,
    segment,  # tokens
    share,  # chunks to a program in a relay
    anchor_blocks,
    g_b, g_t, g_h,
    D_h, D_v,
    dD_h,
    si_n, si_h, si_k, si_v,
    so_n, so_h, so_k, so_v,
    ROLE: gl.constexpr,
    H: gl.constexpr, GK: gl.constexpr,
    K: gl.constexpr, V: gl.constexpr, BA: gl.constexpr,
    SEGMENTS: gl.constexpr, REVERSE: gl.constexpr, DG: gl.constexpr,
    BK: gl.constexpr, NW: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, PRODUCTS: gl.constexpr,
    STATE_REGISTERS: gl.constexpr, KEY_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk and dv of one task after another. Rings, with NW value partitions, one for 64 columns of V or for a head:

        ring           buffers                    full                        empty
        tiles          STAGES: q, k, v, do        load, by TMA                each value, key
        gates          STAGES: sums, decays       gates                       each value, key
        products       PRODUCTS: P^T              key                         each value
        state          1: dS, in 16 bits          each value, its columns     key
        sums           1: partial row sums        each value                  row sums

    As compiled by triton 3.6, with no state given, no packed sequences and no head that programs share, with dg:
    bytes of shared memory, and bytes of spills, stored and loaded. `python -m benchmarks kernels` has the others, some
    of which spill more.

        K, V               dk and dv              dq
        64, 64             200,432     48,  60
        64, 128            174,280     60, 112
        128, 64            224,240     36,  60
        128, 64, pairs     224,984    124, 176    204,440    40,  44
        with step sizes, D 226,024    124, 164    205,496     80,  84
        128, 128           231,624     60, 112

    A value partition multiplies its own columns of the published dS at once: it has written them. `key_partition` waits
    for all columns.
    """
    dtype: gl.constexpr = desc_q.dtype
    by_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BK], dtype)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], dtype)
    of_state: gl.constexpr = gl.NVMMASharedLayout.get_default_for([NW * BS, BK], dtype)
    DV: gl.constexpr = REVERSE or DG
    qs = gl.allocate_shared_memory(dtype, [STAGES, C, BK], by_k)
    ks = gl.allocate_shared_memory(dtype, [STAGES, C, BK], by_k)
    vs = gl.allocate_shared_memory(dtype, [STAGES * NW, C, BS], square)
    dos = gl.allocate_shared_memory(dtype, [STAGES * NW, C, BS], square)
    dks = gl.allocate_shared_memory(dtype, [C, BK], by_k)
    published = gl.allocate_shared_memory(dtype, [NW * BS, BK], of_state)
    tiles = ring(STAGES, 1, NW + 1)
    gates = gate_buffers(STAGES * HEADS, ring(STAGES, 1, NW + 1), dt is not None)
    state = ring(1, NW, 1)
    # what is there stands in for what nobody reads
    ps = vs
    dvs = vs
    products = tiles
    sums = Sums(gates.sums, tiles)
    if DV:
        ps = gl.allocate_shared_memory(dtype, [PRODUCTS * HEADS, C, C], square)
        products = ring(PRODUCTS, 1, NW)
    if REVERSE:
        dvs = gl.allocate_shared_memory(dtype, [NW, C, BS], square)
    if DG:
        partial_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0])
        BUFFERS: gl.constexpr = NW * 2 if HEADS == 2 and REVERSE else NW
        # of two heads more is summed, for which there is no memory in more rows
        partial = gl.allocate_shared_memory(gl.float32, [BUFFERS, 8 if HEADS == 2 else 32, C], partial_layout)
        sums = Sums(partial, ring(1, NW, 1))
    fence_async_shared()

    # no pool, and so no slots of one: any number
    work = Work(cu_seqlens, None, tasks, N, T, N, segment, relay, flags, share, H, HEADS, SEGMENTS)
    s = Gradients(
        work, States(state_in, si_n, si_h, si_k, si_v), States(state_out, so_n, so_h, so_k, so_v),
        Skip(D, D_h, D_v), dD, dD_h, anchors, s_ds, anchor_blocks, desc_q, desc_k, desc_v, desc_do, desc_dk, desc_dv,
        qs, ks, vs, dos, ps, dks, dvs, published, tiles, products, state, gates, sums,
        GK, K, V, BA, NW, REVERSE, DG, DV,
    )  # fmt: skip
    tokens = GatesOfTokens(g, dt, g_b, g_t, g_h, scale)
    of_sums = (work, sums, z, y, REVERSE)
    if NW == 2:
        if DG:
            gl.warp_specialize([
                (value_partition, (s, 0)),
                (value_partition, (s, 1)),
                (key_partition, (s, scale)),
                (gate_partition, (work, gates, tokens, REVERSE, 0, HEADS)),
                (load_partition, (s,)),
                (row_sum_partition, of_sums),
            ], [4, 4, 1, 1, 2],
            [STATE_REGISTERS, KEY_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
        else:
            gl.warp_specialize([
                (value_partition, (s, 0)),
                (value_partition, (s, 1)),
                (key_partition, (s, scale)),
                (gate_partition, (work, gates, tokens, REVERSE, 0, HEADS)),
                (load_partition, (s,)),
            ], [4, 4, 1, 1], [STATE_REGISTERS, KEY_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
    elif DG:
        gl.warp_specialize([
            (value_partition, (s, 0)),
            (key_partition, (s, scale)),
            (gate_partition, (work, gates, tokens, REVERSE, 0, HEADS)),
            (load_partition, (s,)),
            (row_sum_partition, of_sums),
        ], [4, 1, 1, 2], [KEY_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (value_partition, (s, 0)),
            (key_partition, (s, scale)),
            (gate_partition, (work, gates, tokens, REVERSE, 0, HEADS)),
            (load_partition, (s,)),
        ], [4, 1, 1], [KEY_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS])  # fmt: skip


class Config(NamedTuple):
    """Buffers of the rings, and registers to a thread: of the second value partition (there is none up to V 64), of the
    key partition, of the others, and the most of the kernel as ptxas sees it.
    """

    stages: int
    products: int
    state_registers: int
    key_registers: int
    other_registers: int
    most_registers: int


# By rows and columns of the state of a head, heads of a task, and whether the sweep goes back in time. One program to a
# multiprocessor at D 64 too: with the registers of half of one, or with 136 for the keys of pairs of heads, ptxas puts
# a wait after every product (C7512). K 64, V 128 takes 0.317 ms at B4 T4096 H64, and as K = V = 128 it took 0.366
# (H200).
CONFIGS = {
    (64, 64, 1, True): Config(4, 4, 240, 200, 32, 168),
    (64, 128, 1, True): Config(2, 2, 176, 128, 32, 128),
    (128, 64, 1, True): Config(3, 3, 240, 200, 32, 168),
    (128, 64, 2, False): Config(2, 1, 160, 160, 32, 128),
    (128, 64, 2, True): Config(2, 1, 168, 144, 32, 128),
    (128, 128, 1, True): Config(2, 2, 176, 128, 32, 128),
}


def count_work(q: torch.Tensor, v: torch.Tensor, setting: Setting, cu_seqlens: torch.Tensor | None) -> tuple[int, int]:
    """The tasks and the programs of a launch."""
    B, T, *_ = q.shape
    H = v.shape[2]
    tasks = count_swept(B, T, setting.segment, cu_seqlens) * (H // count_pair(q, v))
    return tasks, min(tasks, multiprocessors(q.device))


@launcher
def launch_gradients(tensors, setting: Setting):
    q, k, v, do, dk, dv, g, dt, D, dD, state_in, state_out, *others, cu_seqlens, relay, flags = tensors
    _, _, anchors, _ = others
    B, T, H, K, V = sizes(q, v)
    BK, BV = padded(K, V)
    heads = count_pair(q, v)
    scale, segment, BA, reverse, _, role = setting
    tasks, programs = count_work(q, v, setting, cu_seqlens)
    config = CONFIGS[BK, BV, heads, reverse]
    args = (
        *(descriptor(t, BK, cu_seqlens) for t in (q, k)), *(descriptor(t, BS.value, cu_seqlens) for t in (v, do)),
        descriptor(dk, BK, cu_seqlens), None if dv is None else descriptor(dv, BS.value, cu_seqlens),
        g, dt, D, dD, state_in, state_out, *others, cu_seqlens, relay, flags,
        scale, tasks, count_sequences(B, cu_seqlens), T, segment or 0,
        chunks_to_a_program(relay, tasks, programs, T), count_blocks(B, T, BA, cu_seqlens),
        *strides(g, 3), *strides(D, 2), strides(dD, 2)[0], *strides(state_in, 4), *strides(state_out, 4),
    )  # fmt: skip
    constants = dict(
        ROLE=role, H=H, GK=H // q.shape[2], K=K, V=V, BA=BA, SEGMENTS=segment is not None, REVERSE=reverse,
        DG=anchors is not None, BK=BK, NW=BV // BS.value * heads, HEADS=heads, STAGES=config.stages,
        PRODUCTS=config.products, STATE_REGISTERS=config.state_registers, KEY_REGISTERS=config.key_registers,
        OTHER_REGISTERS=config.other_registers, maxnreg=config.most_registers, num_warps=4,
    )  # fmt: skip
    return hopper_gradient_kernel, (programs, 1, 1), args, constants


def sweep(operands: Operands, do: torch.Tensor, setting: Setting):
    """One sweep back in time over each sequence, or over each of its segments: dk and dv; and, if there are anchors,
    what dg needs: `z [1, B, H, T]`, of pairs of heads `y [1, B, H, T]`, and `<anchor, state> [warps, anchor blocks + N,
    H]`, one of each warp with a part of the state.

    Forward in time, of pairs of heads only: dq, None, w, None and None.
    """
    q, k, v, g, state_in, state_out, _, anchors, cu_seqlens, _, steps = operands
    B, T, H, K, V = sizes(q, v)
    heads = count_pair(q, v)
    dk = empty(q, B, T, H // heads, K)
    dv = empty(q, B, T, H, V) if setting.reverse else None
    z = y = s_ds = None
    if anchors is not None:
        z = empty(q, 1, B, H, T, dtype=torch.float32)
        if setting.reverse:
            s_ds = empty(q, padded(K, V)[1] // 16, anchors.shape[0], H, dtype=torch.float32)
        if setting.reverse and heads == 2:
            y = empty(z, *z.shape)
    if not setting.reverse:
        # the same with the roles of keys and queries exchanged, and those of v and do
        q, k, v, do = k, q, do, v
    tasks, programs = count_work(q, v, setting, cu_seqlens)
    handed_over = relay_buffers(operands, setting, tasks, (programs, 1), 128 * 128)
    dt, D, dD = (None,) * 3 if steps is None else (steps.dt, steps.D, steps.dD)
    D, dD = (D, None) if setting.reverse else (None, dD)
    given = q, k, v, do, dk, dv, g, dt, D, dD, state_in, state_out
    tensors = *given, z, y, anchors, s_ds, cu_seqlens, *handed_over
    launch_gradients(tensors, setting)
    return dk, dv, z, y, s_ds
