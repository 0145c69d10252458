"""Simple GLA token by token, for decoding: each token costs the same work and memory, however many came before.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T
    o_t = scale * S_t^T q_t

A program owns one head of one sequence and a tile of V columns, with the whole of K. The state [K, BV] stays in fp32
registers, all arithmetic is in fp32, and o needs no sum over programs. The state is nearly all that a decode step
moves. The state of a pool is read from the slot that `state_indices` names, and written back there.

The gradients are three more runs of the same kernel, with other tensors in the roles of q, k and v, as in
`fused_chunk.py`:

    role     q    k    v     state                out
    forward  q    k    v     S    [K, V]          o
    dq       do   v    k     S^T  [V, K]          dq
    dk       v    do   q     dS^T [V, K], back    dk
    dv       k    q    do    dS   [K, V], back    dv

An adjoint run goes back through the tokens. It differs from a forward run in two ways: token t is added to the state
before the state decays by g_t, and the scale is part of the state.

With S_e the state after any token e from t on, and dS_e the gradient that later tokens give it,

    dg_t = <S_e, dS_e> + sum_{t<=s<=e} (q_s . dq_s - k_s . dk_s)

The run for dq leaves an anchor, S_e, every `ANCHOR_TOKENS` tokens and at the end, so that no sum is longer. The run for
dk multiplies each anchor by the dS_e that it holds there, and adds up the terms on its way back. Both terms of a token
contain scale (q_s . k_s)(do_s . v_s), and both runs leave that out.
"""

import warnings
from typing import NamedTuple

import torch

from ._blocks import count_blocks, count_numbers, count_sequences, first_block, is_sequence, sequence_bounds, state_slot
from ._gates import LOG2E, UNDERFLOW
from ._heads import sum_heads
from ._launch import launcher
from ._layout import cdiv, next_power_of_2, sizes, strides, transposed
from ._mode import Mode
from ._passes import device_pass, empty
from ._plans import Gradients, Inputs, Options, Plan, Results
from ._triton import jit, kernel_name, tl
from ._validation import Call
from .naive import naive_recurrent_simple_gla

# Tokens between two anchors of the gate gradient: an fp32 sum of so many terms is good to about 2e-6.
ANCHOR_TOKENS = 1024

WARP_THREADS = 32

# How much of a state in a pool one program takes. `recurrence_config` says why.
COLUMNS_BYTES = 4096  # where K is contiguous: whole columns of so many bytes together
ROW_BYTES = 256  # where V is contiguous: so much of every row
POOL_WARPS = 4  # at most, where V is contiguous


@jit
def state_offsets(o_k, o_v, K: tl.constexpr, V: tl.constexpr, s_k: tl.constexpr, s_v: tl.constexpr):
    """Offsets of the elements of a state [K, V], in 64 bits where 32 are too few."""
    if K * s_k + V * s_v >= 2**31:
        o_k = o_k.to(tl.int64)
        o_v = o_v.to(tl.int64)
    return o_k[:, None] * s_k + o_v[None, :] * s_v


# T is specialised on 1: a decode step then has no loop, and takes fewer registers.
@jit(
    do_not_specialize=['N', 'P', 'part', 'scale'],
    do_not_specialize_on_alignment=['T'],
    repr=kernel_name('recurrent'),
)
def recurrent_kernel(
    q, k,  # [B, T, H // GQ, K], any strides with contiguous rows
    v,  # [B, T, H // GV, V], likewise
    g,  # [B, T, H], any strides, or None
    state_in,  # [N, H, K, V]; with indices a pool [P, H, K, V], which gets the last states too; any strides; or None
    o,  # [B, T, H, V]
    state_out,  # [N, H, K, V], any strides, or None
    states,  # [B, T, H, K, V], any strides: the state after every token; or None
    x,  # [B, T, H // GV, V], or None
    w,  # [NV, B, H, T]: x . o, over the V tile, less what the token adds to its own o; written forward, read as adjoint
    anchors,  # [anchor blocks, H, K, V]: states after the last tokens of anchor blocks; likewise
    dg,  # [NV, B, T, H]: the V tile's part, written as adjoint
    cu_seqlens,  # [N + 1] or None
    indices,  # [N]: the slots of the pool; or None
    scale,
    N, T,
    P,  # slots of the pool
    q_b, q_t, q_h,
    k_b, k_t, k_h,
    v_b, v_t, v_h,
    g_b, g_t, g_h,
    x_b, x_t, x_h,
    si_n, si_h,
    so_n, so_h,
    s_b, s_t, s_h,
    part,  # B * H * T
    ROLE: tl.constexpr,  # what the run makes: the kernel's name tells it
    H: tl.constexpr,
    GQ: tl.constexpr,
    GV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BA: tl.constexpr,
    si_k: tl.constexpr, si_v: tl.constexpr,
    so_k: tl.constexpr, so_v: tl.constexpr,
    s_k: tl.constexpr, s_v: tl.constexpr,
    REVERSE: tl.constexpr,  # a forward run goes from the last token of a sequence to the first
    ADJOINT: tl.constexpr,
):  # fmt: skip
    """o and the last state of one head of one sequence, in BV columns of V."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = (tl.program_id(0) // NV % H).to(tl.int64)
    i_n = tl.program_id(0) // (NV * H)
    if cu_seqlens is None:
        i_b = i_n.to(tl.int64)
        bos = i_b * 0
        L = T
        first_anchor = first_block(cu_seqlens, i_n, 0, T, BA)
    else:
        i_n -= 1
        i_b = tl.zeros([], tl.int64)
        first, end = sequence_bounds(cu_seqlens, i_n, N, T)
        bos = first.to(tl.int64)
        L = end - first
        first_anchor = first_block(cu_seqlens, i_n, first, T, BA)

    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_s = m_k[:, None] & m_v[None, :]

    o += ((i_b * T + bos) * H + i_h) * V + o_v
    if x is not None:
        o_w = i_v.to(tl.int64) * part + (i_b * H + i_h) * T + bos
        if ADJOINT:
            dg += i_v.to(tl.int64) * part + (i_b * T + bos) * H + i_h
    i_p = state_slot(indices, i_n, N, P)
    if cu_seqlens is not None or indices is not None:
        # tokens in no sequence, and padding, get zeros
        if ~is_sequence(i_n, N) | (i_p < 0):
            for _ in range(L):
                tl.store(o, tl.zeros([BV], tl.float32), mask=m_v)
                o += H * V
                if ADJOINT and x is not None:
                    tl.store(dg, 0.0)
                    dg += H
            return

    if x is not None:
        x += i_b * x_b + bos * x_t + i_h // GV * x_h + o_v
        anchors += (first_anchor.to(tl.int64) * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    if states is not None:
        states += i_b * s_b + bos * s_t + i_h * s_h + state_offsets(o_k, o_v, K, V, s_k, s_v)
    if state_in is not None:
        state_in += i_p * si_n + i_h * si_h + state_offsets(o_k, o_v, K, V, si_k, si_v)
        # The state of a pool should stay in the L2 cache until it is written back. On an H200 this makes steps at batch
        # 64 and 256 faster by 2 to 3%, even with other pools used in between, and kernels after them no slower.
        b_s = tl.load(
            state_in, mask=m_s, other=0.0, eviction_policy='' if indices is None else 'evict_last'
        ).to(tl.float32)  # fmt: skip
    else:
        b_s = tl.zeros([BK, BV], tl.float32)
    if indices is not None:
        state_out = state_in
    elif state_out is not None:
        state_out += i_p * so_n + i_h * so_h + state_offsets(o_k, o_v, K, V, so_k, so_v)

    q += i_b * q_b + bos * q_t + i_h // GQ * q_h + o_k
    k += i_b * k_b + bos * k_t + i_h // GQ * k_h + o_k
    v += i_b * v_b + bos * v_t + i_h // GV * v_h + o_v
    if g is not None:
        g += i_b * g_b + bos * g_t + i_h * g_h

    running = 0.0
    # the number of the token in the order of a forward run: the adjoint counts it down
    i = tl.zeros([], tl.int64) + L - 1 if ADJOINT else tl.zeros([], tl.int64)
    for _ in range(L):
        i_t = L - 1 - i if REVERSE else i
        # All loads are issued before any is used. To use q and k, warps exchange them and wait for each other, and the
        # compiler moves no load across such a wait.
        b_q = tl.load(q + i_t * q_t, mask=m_k, other=0.0)
        b_k = tl.load(k + i_t * k_t, mask=m_k, other=0.0)
        b_v = tl.load(v + i_t * v_t, mask=m_v, other=0.0)
        if g is not None:
            gate = tl.load(g + i_t * g_t)
        b_q = b_q.to(tl.float32)
        b_k = b_k.to(tl.float32)
        b_v = b_v.to(tl.float32)
        decay = 1.0
        if g is not None:
            gate = gate.to(tl.float32) * LOG2E
            decay = tl.exp2(gate)
        if ADJOINT:
            b_k *= scale
        else:
            b_q *= scale
            b_s *= decay

        if x is not None:
            if ADJOINT:
                if i == L - 1 or (i + 1) % BA == 0:
                    b_a = tl.load(anchors + i // BA * (H * K * V), mask=m_s, other=0.0)
                    running = tl.sum(b_a * b_s)
            b_x = tl.load(x + i_t * x_t, mask=m_v, other=0.0).to(tl.float32)
            x_o = tl.sum(b_x * tl.sum(b_s * b_q[:, None], 0))
            if ADJOINT:
                # nothing crosses a reset: the sum there is nothing but rounding
                running = tl.where(gate < UNDERFLOW, 0.0, running + tl.load(w + o_w + i_t) - x_o)
                tl.store(dg + i_t * H, running)
            else:
                tl.store(w + o_w + i_t, x_o)

        # An explicit fma rounds the same one of the two products with x and without.
        b_s = tl.fma(b_k[:, None], b_v[None, :], b_s)
        after = b_s * decay if ADJOINT else b_s
        # States are stored before the sum over K, for which warps wait for each other.
        if states is not None:
            tl.store(states + i_t * s_t, after, mask=m_s)
        if state_out is not None:
            if i == (0 if ADJOINT else L - 1):
                tl.store(state_out, after, mask=m_s)
        if x is not None and not ADJOINT:
            if i == L - 1 or (i + 1) % BA == 0:
                tl.store(anchors + i // BA * (H * K * V), b_s, mask=m_s)
        tl.store(o + i_t * (H * V), tl.sum(b_s * b_q[:, None], 0), mask=m_v)
        b_s = after
        i += -1 if ADJOINT else 1

    # An empty sequence ends with the state that it starts with. In a pool that is in place already.
    if state_out is not None and indices is None:
        if L == 0:
            tl.store(state_out, b_s, mask=m_s)


class Operands(NamedTuple):
    """What a run reads, q, k, v and x in their roles, and where it leaves states.

    With indices, state_in is a pool, which gets the last states too.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None
    state_in: torch.Tensor | None = None
    state_out: torch.Tensor | None = None
    states: torch.Tensor | None = None
    x: torch.Tensor | None = None  # dg needs its products with the rows of the output
    w: torch.Tensor | None = None  # these products, which the run for dq leaves for that for dk
    anchors: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    indices: torch.Tensor | None = None


class Setting(NamedTuple):
    """How a run goes: all that a launch depends on beside the layouts of its tensors."""

    scale: float
    reverse: bool
    adjoint: bool = False
    role: str = 'o'  # what the run makes, which its kernel's name tells


def run_recurrence(operands: Operands, setting: Setting):
    """One run: `o`; and with x, for dg, `w [NV, B, H, T]` or, as adjoint, `dg [NV, B, T, H]`; else None."""
    q, k, v, g, state_in, state_out, states, x, w, anchors, cu_seqlens, indices = operands
    B, T, H, K, V = sizes(q, v)
    o = empty(q, B, T, H, V)
    left = dg = None
    if x is not None:
        NV = cdiv(V, recurrence_config(K, V, None).BV)
        if setting.adjoint:
            left = dg = empty(q, NV, B, T, H, dtype=torch.float32)
        else:
            left = w = empty(q, NV, B, H, T, dtype=torch.float32)
    if count_numbers(B, cu_seqlens):
        tensors = q, k, v, g, state_in, o, state_out, states, x, w, anchors, dg, cu_seqlens, indices
        launch_recurrence(tensors, setting)
    return o, left


class RecurrenceConfig(NamedTuple):
    """How a run is cut: BV columns of V and `warps` to a program."""

    BV: int
    warps: int


def recurrence_config(
    K: int, V: int, pool: torch.Tensor | None, states: torch.Tensor | None = None
) -> RecurrenceConfig:
    """Configuration of a run with states `[K, V]`, in a pool or not, that stores `states` after every token or not.

    It does not depend on the batch: a sequence gets the same bits in any.
    """
    BK, BV = next_power_of_2(K), next_power_of_2(V)
    if pool is None:
        # at most 64 numbers of the state to a thread
        BV = min(BV, 16 if BK <= 256 else 8)
        return RecurrenceConfig(BV, max(1, BK * BV // (64 * WARP_THREADS)))

    # A program reads all of its tile before it writes any. Times are of one H200 (triton 3.6), H32, K = V = 128.
    size = pool.itemsize
    if pool.stride(-2) == 1:
        # A tile is whole columns. 4 KiB of them are enough at batch 64, and good at batch 1.
        BV = min(BV, COLUMNS_BYTES // (BK * size))
        return RecurrenceConfig(BV, max(1, BK * BV // (32 * WARP_THREADS)))

    # A tile is a piece of every row, of which the memory wants 256 bytes. With 128, batch 256 takes 278 microseconds
    # instead of 262 in fp32, and 145 instead of 136 in bf16. (In bf16, 128 would be better at batch 1, where a step
    # would take 2.5 instead of 3.2, and with 4 tokens at batch 64: 72 instead of 95.)
    #
    # With K over 128 the registers allow less: at most 128 numbers of the state to a thread. It is half of that where
    # they would be spilled: where states are stored in another dtype, and where rows are too odd for loads of 16 bytes.
    tight = states is not None and states.dtype != pool.dtype or pool.stride(-2) * size % 16 != 0
    BV = min(BV, ROW_BYTES // size, (64 if tight else 128) * POOL_WARPS * WARP_THREADS // BK)
    warps = BK * BV // ((64 if tight else 256 // size) * WARP_THREADS)
    return RecurrenceConfig(BV, min(POOL_WARPS, max(1, warps)))


@launcher
def launch_recurrence(tensors, setting: Setting):
    q, k, v, g, state_in, _, state_out, states, x, *_, cu_seqlens, indices = tensors
    B, T, H, K, V = sizes(q, v)
    BV, warps = recurrence_config(K, V, None if indices is None else state_in, states)
    args = (
        *tensors,
        setting.scale, count_sequences(B, cu_seqlens), T, 0 if indices is None else state_in.shape[0],
        *strides(q, 3), *strides(k, 3), *strides(v, 3), *strides(g, 3), *strides(x, 3),
        *strides(state_in, 2), *strides(state_out, 2), *strides(states, 3),
        B * H * T,
    )  # fmt: skip
    constants = dict(
        ROLE=setting.role, H=H, GQ=H // q.shape[2], GV=H // v.shape[2], K=K, V=V,
        BK=next_power_of_2(K), BV=BV, BA=ANCHOR_TOKENS,
    )  # fmt: skip
    for name, state in (('si', state_in), ('so', state_out), ('s', states)):
        constants[name + '_k'], constants[name + '_v'] = (0, 0) if state is None else state.stride()[-2:]
    constants.update(REVERSE=setting.reverse, ADJOINT=setting.adjoint, num_warps=warps)
    return recurrent_kernel, (count_numbers(B, cu_seqlens) * H * cdiv(V, BV), 1, 1), args, constants


@device_pass
def forward_pass(inputs: Inputs, options: Options):
    """`o`, and the final state or None. With indices the initial state is a pool, which gets the final states."""
    q, k, v, g, initial_state, cu_seqlens, indices, states = inputs
    final_state = None
    if options.output and indices is None:
        N, H, K, V = count_sequences(q.shape[0], cu_seqlens), v.shape[2], q.shape[3], v.shape[3]
        final_state = empty(q, N, H, K, V, dtype=torch.float32)
    operands = Operands(q, k, v, g, initial_state, final_state, states, cu_seqlens=cu_seqlens, indices=indices)
    o, _ = run_recurrence(operands, Setting(options.scale, options.reverse))
    return o, final_state


@device_pass
def backward_pass(tensors: tuple, needs: Gradients, options: Options) -> Gradients:
    """The gradients that are needed. dg is `[NV, B, T, H]`, to be added up."""
    q, k, v, g, initial_state, cu_seqlens, _, _, do, dht = tensors
    forward = Setting(options.scale, options.reverse, role='dq')
    adjoint = forward._replace(adjoint=True)
    w = anchors = None
    dq = dk = dv = dg = dh0 = None
    if needs.g:
        B, T, H, V = v.shape
        anchors = empty(q, count_blocks(B, T, ANCHOR_TOKENS, cu_seqlens), H, V, q.shape[-1], dtype=torch.float32)
    common = dict(anchors=anchors, cu_seqlens=cu_seqlens)
    if needs.q or needs.g:
        operands = Operands(do, v, k, g, transposed(initial_state), x=q if needs.g else None, **common)
        dq, w = run_recurrence(operands, forward)
        dq = sum_heads(dq, q) if needs.q else None
    if needs.k or needs.g:
        operands = Operands(v, do, q, g, transposed(dht), x=k if needs.g else None, w=w, **common)
        dk, dg = run_recurrence(operands, adjoint._replace(role='dk'))
        dk = sum_heads(dk, k) if needs.k else None
    if needs.initial_state:
        dh0 = empty(initial_state, *initial_state.shape)
    if needs.v or needs.initial_state:
        operands = Operands(k, q, do, g, dht, dh0, cu_seqlens=cu_seqlens)
        dv, _ = run_recurrence(operands, adjoint._replace(role='dv'))
    return Gradients(dq, dk, dv, dg, dh0)


def forward(inputs: Inputs, plan: Plan) -> Results:
    return Results(*forward_pass(inputs, plan.options, plan=plan))


def backward(inputs: Inputs, kept: tuple, given: tuple, needs: Gradients, plan: Plan) -> tuple:
    dq, dk, dv, dg, dh0 = backward_pass((*inputs, *given), needs, plan.options)
    return dq, dk, dv, None if dg is None else dg.sum(0).to(inputs.g.dtype), dh0


def naive(inputs: Inputs, options: Options):
    q, k, v, g, initial_state, cu_seqlens, _, states = inputs
    return naive_recurrent_simple_gla(
        q, k, v, g, options.scale, initial_state, options.output, cu_seqlens=cu_seqlens, reverse=options.reverse,
        intermediate_states_buffer=states,
    )  # fmt: skip


mode = Mode('fused_recurrent', forward, backward, naive)


def fused_recurrent_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    g_gamma: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    state_indices: torch.Tensor | None = None,
    intermediate_states_buffer: torch.Tensor | None = None,
    transpose_state_layout: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Simple Gated Linear Attention, token by token: for decoding, with constant memory for each sequence.

    For each sequence and head::

        S_t = exp(g_t) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    All arithmetic is in fp32. A sequence's results do not depend on what else is in the batch. Training is faster with
    `chunk_simple_gla`. Differentiable in q, k, v, g, g_gamma and initial_state, once. CPU tensors are computed by
    `naive_recurrent_simple_gla`.

    Args:
        q: queries `[B, T, HK, K]` in bfloat16, float16 or float32 (on the CPU float64 too), K from 1 to 512.
        k: keys, of q's shape and dtype.
        v: values `[B, T, H, V]` in q's dtype, V from 1 to 512, H a multiple of HK. Head h reads q and k of head
            `h // (H // HK)`.
        g: log decay of each token and head (natural logarithm) `[B, T, H]`, of any floating dtype. `-inf` resets the
            state. A positive gate is allowed as long as all decays and the result are finite in fp32.
        g_gamma: log decay of each head `[H]`, in place of g. With neither, nothing decays.
        scale: factor of the products `q . k`. Default: `K ** -0.5`.
        initial_state: the state before the first token, `[N, H, K, V]`, of any floating dtype. N is the number of
            sequences: B, or with `cu_seqlens` the number of packed ones. Default: zeros.
        output_final_state: whether to return the state after the last token.
        reverse: go through each sequence from its last token to its first.
        state_v_first: states are `[N, H, V, K]`.
        cu_seqlens: `[N + 1]`, int32 or int64: sequence n is the tokens from `cu_seqlens[n]` to `cu_seqlens[n + 1]` of a
            batch of one. It starts at 0, never decreases, and stays on the device. Tokens in no sequence get zeros. On
            the GPU its contents are not checked: bounds are moved into 0..T, and a sequence that would end before it
            begins is empty.
        state_indices: `[N]`, int32 or int64. initial_state is then a pool `[P, H, K, V]` (`[P, H, V, K]` with
            state_v_first) in fp32, bf16 or fp16, and sequence n has the state in slot `state_indices[n]`. It is read
            there and replaced by the final state, in place. No other slot is touched. -1 marks padding: a sequence
            without a state, whose outputs are zero. An index of P and above is padding too; on the CPU it is an error.
            What two equal indices do is undefined; on the CPU they are an error. Nothing may need gradients.
        intermediate_states_buffer: gets the state after every token, `[B, T, H, K, V]` (`[B, T, H, V, K]` with
            state_v_first), in fp32, bf16 or fp16; for packed sequences B is 1. The rows of padding and of tokens in no
            sequence are left as they are. For speculative decoding: of the T draft tokens of sequence n, the state
            after the last accepted one is `buffer[n, accepted[n] - 1]`. Nothing may need gradients.
        transpose_state_layout: deprecated name of state_v_first.

    Returns:
        o `[B, T, H, V]` in q's dtype, and the final state in fp32 (fp64 for fp64 inputs) or None. With state_indices
        the second is the pool.

    Raises:
        TypeError: an argument has a wrong type or dtype, or is unknown.
        ValueError: an argument has a wrong shape, device, value or contents, or excludes another.

    The message names the argument, and nothing has been computed by then.

    Source: Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv:2312.06635), with
    the scalar gate of Dao and Gu, Transformers are SSMs (arXiv:2405.21060).

    Example::

        >>> import torch
        >>> from fla_simple_gla import chunk_simple_gla, fused_recurrent_simple_gla
        >>> q, k, v = torch.randn(3, 1, 10, 4, 64)
        >>> g = torch.nn.functional.logsigmoid(torch.randn(1, 10, 4))
        >>> # read nine tokens at once, then the tenth on its own
        >>> _, state = chunk_simple_gla(q[:, :9], k[:, :9], v[:, :9], g[:, :9], output_final_state=True)
        >>> o, state = fused_recurrent_simple_gla(
        ...     q[:, 9:], k[:, 9:], v[:, 9:], g[:, 9:], initial_state=state, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 1, 4, 64]), torch.Size([1, 4, 64, 64]))
    """
    if transpose_state_layout is not None:
        if state_v_first:
            raise ValueError(
                'state_v_first and its deprecated name transpose_state_layout are both given: pass state_v_first'
            )
        if not torch.compiler.is_compiling():
            warnings.warn('transpose_state_layout is deprecated: pass state_v_first', DeprecationWarning, stacklevel=2)
        state_v_first = transpose_state_layout
    return mode(Call(
        q, k, v, g, g_gamma, initial_state, cu_seqlens, state_indices, intermediate_states_buffer, None, scale,
        output_final_state, state_v_first, reverse,
    ))  # fmt: skip
