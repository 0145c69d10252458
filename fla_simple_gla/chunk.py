"""Simple GLA in sweeps over segments of the sequences, all at once: the GPU is full, however few sequences there are.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T
    o_t = scale * S_t^T q_t

A sequence is cut into segments of some hundred to many thousand tokens:

1. The summary kernel reads k and v. For each segment it leaves the state that the segment would end with had it begun
   with none, and its decay: `(S_local, a)`.
2. The combine kernel goes over the segments of a sequence, from its initial state: `S <- a S + S_local`. In the place
   of each S_local it puts the state before that segment.
3. The sweep of `fused_chunk.py` runs over every segment, from the state before it.

The backward keeps those states. In summaries back in time q and do take the places of k and v, and the combine leaves
the gradient of the state after each segment. Three sweeps over every segment (two on Hopper, up to D 128) then give dq,
dk, dv, and what dg is taken from, as in `fused_chunk.py`.

The last segment needs no summary. Chunks that have decayed to zero in fp32 by the end of their segment are not read, so
how long a summary takes depends on the gates. Where the sequences and heads fill the GPU by themselves there is one
segment, no summary, and nothing but the sweep. The host does not know how long packed sequences are. They are cut as
one sequence of all tokens would be, so that the longest one is cut, unless they are so many that a state for each would
be a burden.
"""

import functools
import math
from typing import NamedTuple

import torch

from ._blocks import (
    block_bounds,
    count_blocks,
    count_sequences,
    first_block,
    is_sequence,
    number_of,
    sequence_bounds,
    state_slot,
)
from ._gates import UNDERFLOW
from ._launch import launcher
from ._layout import (
    cdiv,
    exists,
    is_hopper,
    load_rows,
    multiprocessors,
    next_power_of_2,
    open_rows,
    sizes,
    strides,
    use_descriptors,
)
from ._mode import Mode
from ._passes import device_pass, empty
from ._plans import Gradients, Inputs, Options, Plan, Results
from ._sweeps import Operands, Setting, Steps, final_states
from ._triton import jit, kernel_name, tl
from ._validation import Call
from .fused_chunk import gradients, naive, outputs, sweep_config, sweep_gates
from .hopper import CHUNK_TOKENS, Sweeps, as_taken, is_shared, sweeps_for, sweeps_of

SCANNED_CHUNKS = tl.constexpr(32)  # chunks whose gates a summary looks at together


@jit(do_not_specialize=['N', 'T', 'segment', 'reverse', 'c_part', 'scale'], repr=kernel_name('summary'))
def summary_kernel(
    k,  # [B, T, H // GK, K], any strides with contiguous rows
    v,  # [B, T, H, V], likewise
    c,  # [1 or 2, chunks, H, BT]: running sums of the gates, or None
    dt,  # [B, T, H], any strides: factors of v; or None
    states,  # [segments, H, K, V]
    decays,  # [segments, H]: -1 where no state is left; or None, if there are neither gates nor packed sequences
    cu_seqlens,  # [N + 1] or None
    scale,
    N, T,
    segment,  # tokens
    reverse,  # 1 back in time, else 0
    k_b, k_t, k_h,
    v_b, v_t, v_h,
    dt_b, dt_t, dt_h,
    c_part,  # chunks * H * BT
    H: tl.constexpr,
    GK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TWO_PARTS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The state that one head of a segment ends with, having begun with none, in BV columns of V; and its decay."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    i_h = (tl.program_id(0) // NV % H).to(tl.int64)
    i_s = tl.program_id(0) // (NV * H)
    i_b, i_n, first, end, bos, eos = block_bounds(cu_seqlens, i_s, N, T, segment)
    # neither the last segment nor tokens in no sequence are followed by any that reads a summary
    if (first >= end) | tl.where(reverse != 0, first == bos, end == eos) | ~is_sequence(i_n, N):
        if decays is not None:
            if i_v == 0:
                tl.store(decays + i_s.to(tl.int64) * H + i_h, -1.0)
        return
    L = end - first
    NT = tl.cdiv(L, BT)
    i_f = first.to(tl.int64)

    r_k = open_rows(k + i_b * k_b + i_f * k_t + i_h // GK * k_h, k_t, L, K, BT, BK, TMA)
    r_v = open_rows(v + i_b * v_b + i_f * v_t + i_h * v_h, v_t, L, V, BT, BV, TMA)
    if c is not None:
        first_chunk = first_block(cu_seqlens, i_n, bos, T, BT) + (first - bos) // BT
        c += (first_chunk.to(tl.int64) * H + i_h) * BT

    r = tl.arange(0, BT)
    if dt is not None:
        dt += i_b * dt_b + i_f * dt_t + i_h * dt_h
    start = 0
    if c is not None:
        # The first chunk, in the order of the loop below, with a token of which anything is left when the loop ends.
        # Those before it are not read. `later` is the sum of the gates of the chunks after those that are looked at.
        start = NT
        later = 0.0
        for j in range(tl.cdiv(NT, SCANNED_CHUNKS) - 1, -1, -1):
            n = j * SCANNED_CHUNKS + tl.arange(0, SCANNED_CHUNKS)
            p_c = c + tl.where(reverse != 0, NT - 1 - n, n).to(tl.int64) * (H * BT)
            b_c = tl.load(p_c[:, None] + r[None, :], mask=(n < NT)[:, None], other=0.0)
            c_end = tl.load(p_c + BT - 1, mask=n < NT, other=0.0)
            if TWO_PARTS:
                b_c += tl.load(p_c[:, None] + c_part + r[None, :], mask=(n < NT)[:, None], other=0.0)
                c_end += tl.load(p_c + c_part + BT - 1, mask=n < NT, other=0.0)
            b_c = tl.where(reverse != 0, b_c, c_end[:, None] - b_c)
            b_c += (later + tl.cumsum(c_end, 0, reverse=True) - c_end)[:, None]
            # not `>`: NaN is something
            nothing = tl.max(tl.where(b_c <= UNDERFLOW, 0, 1), 1) == 0
            start = tl.minimum(start, tl.min(tl.where(nothing | (n >= NT), NT, n), 0))
            later += tl.sum(c_end, 0)
        start = tl.where(later <= UNDERFLOW, start, 0)
    decay = 1.0
    b_s = tl.zeros([BK, BV], tl.float32)
    for i in tl.range(start, NT, num_stages=STAGES):
        i_c = tl.where(reverse != 0, NT - 1 - i, i)
        b_k = load_rows(r_k, k_t, L, i_c * BT, 0, K, BT, BK, TMA)
        b_v = load_rows(r_v, v_t, L, i_c * BT, i_v * BV, V, BT, BV, TMA)
        if c is not None:
            p_c = c + i_c.to(tl.int64) * (H * BT)
            b_c = tl.load(p_c + r)
            c_end = tl.load(p_c + BT - 1)
            b_c = tl.where(reverse != 0, b_c, c_end - b_c)
            if TWO_PARTS:
                b_f = tl.load(p_c + c_part + r)
                f_end = tl.load(p_c + c_part + BT - 1)
                b_c += tl.where(reverse != 0, b_f, f_end - b_f)
                c_end += f_end
            of_v = tl.exp2(b_c) * scale
            if dt is not None:
                o_t = i_c * BT + r
                of_v *= tl.load(dt + o_t.to(tl.int64) * dt_t, mask=o_t < L, other=0.0)
            b_v = (b_v * of_v[:, None]).to(b_v.dtype)
            c_end = tl.exp2(c_end)
            b_s *= c_end
            decay *= c_end
        else:
            b_v = (b_v * scale).to(b_v.dtype)
        b_s = tl.dot(tl.trans(b_k), b_v, b_s, input_precision=PRECISION)

    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    i_s = i_s.to(tl.int64) * H + i_h
    p_s = states + i_s * (K * V) + o_k[:, None] * V + o_v[None, :]
    tl.store(p_s, b_s, mask=(o_k < K)[:, None] & (o_v < V)[None, :])
    if decays is not None:
        if c is not None:
            decay = tl.where(later <= UNDERFLOW, 0.0, decay)
        if i_v == 0:
            tl.store(decays + i_s, decay)


@jit(do_not_specialize=['N', 'T', 'P', 'segment', 'reverse'], repr=kernel_name('combine'))
def combine_kernel(
    state_in,  # [N, H, K, V], or with indices [slots, H, K, V], any strides, or None
    states,  # [segments, H, K, V]: read, the S_local of each segment; left, the state that each begins with
    decays,  # [segments, H]: -1 where a segment has no S_local; or None
    state_out,  # [N, H, K, V], any strides: gets the last states of sequences of which no sweep leaves one; or None
    cu_seqlens,  # [N + 1] or None
    indices,  # [N]: the slots of state_in; or None
    N, T,
    P,  # slots of the pool
    segment,  # tokens
    reverse,  # 1 back in time, else 0
    si_n, si_h, si_k, si_v,
    so_n, so_h, so_k, so_v,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BS: tl.constexpr,
):  # fmt: skip
    """BS numbers of the states of one head of one sequence, from segment to segment."""
    NS: tl.constexpr = (K * V + BS - 1) // BS
    o_s = tl.program_id(0) % NS * BS + tl.arange(0, BS)
    m_s = o_s < K * V
    i_h = (tl.program_id(0) // NS % H).to(tl.int64)
    i_n = tl.program_id(0) // (NS * H)
    o_k = (o_s // V).to(tl.int64)
    o_v = (o_s % V).to(tl.int64)
    if cu_seqlens is None:
        bos = 0
        L = T
    else:
        bos, eos = sequence_bounds(cu_seqlens, i_n, N, T)
        L = eos - bos
    segments = tl.maximum(tl.cdiv(L, segment), 1)
    base = first_block(cu_seqlens, i_n, bos, T, segment)

    if state_in is not None:
        i_p = state_slot(indices, i_n, N, P)
        if i_p < 0:  # padding, of which no state is read
            return
        p_in = state_in + i_p * si_n + i_h * si_h + o_k * si_k + o_v * si_v
        b_s = tl.load(p_in, mask=m_s, other=0.0).to(tl.float32)
    else:
        b_s = tl.zeros([BS], tl.float32)
    if cu_seqlens is not None and state_out is not None:
        # A sequence without tokens ends as it begins. So does, if bounds decrease, one whose last segment is another's.
        s_last = base + tl.where(reverse != 0, 0, segments - 1)
        if (L == 0) | (number_of(cu_seqlens, s_last, N, T, segment) != i_n):
            tl.store(state_out + i_n.to(tl.int64) * so_n + i_h * so_h + o_k * so_k + o_v * so_v, b_s, mask=m_s)
    # stages: loads of later segments do not wait for the sum
    for i in tl.range(0, segments, num_stages=4):
        i_s = base + tl.where(reverse != 0, segments - 1 - i, i)
        i_s = i_s.to(tl.int64) * H + i_h
        p_s = states + i_s * (K * V) + o_s
        # not masked by what the decay says, for which this load would have to wait
        b_l = tl.load(p_s, mask=m_s, other=0.0)
        decay = 1.0 if decays is None else tl.load(decays + i_s)
        tl.store(p_s, b_s, mask=m_s)
        # zero times a decay of inf, of a large positive gate before the first token, is zero here
        b_n = tl.where(b_s == 0.0, 0.0, b_s * decay) + b_l
        # without a summary b_l is whatever the memory held
        b_s = b_n if decays is None else tl.where(decay == -1.0, b_s, b_n)


@launcher
def launch_summary(tensors, setting):
    k, v, c, dt, states, _, cu_seqlens = tensors
    B, T, HK, K = k.shape
    H, V = v.shape[2:]
    BT = sweep_config(K, V, k.dtype, k.device).BT if c is None else c.shape[-1]
    BV, warps, stages = summary_config(K, V, k.dtype, k.device)
    args = (
        *tensors,
        setting.scale, count_sequences(B, cu_seqlens), T, setting.segment, int(setting.reverse),
        *strides(k, 3), *strides(v, 3), *strides(dt, 3), 0 if c is None else c[0].numel(),
    )  # fmt: skip
    constants = dict(
        H=H, GK=H // HK, K=K, V=V, BT=BT, BK=max(16, next_power_of_2(K)), BV=BV,
        TWO_PARTS=c is not None and c.shape[0] == 2, TMA=use_descriptors(k, v), PRECISION=setting.precision,
        STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return summary_kernel, (states.shape[0] * H * cdiv(V, BV), 1, 1), args, constants


@launcher
def launch_combine(tensors, N, T, segment, reverse):
    state, states, _, state_out, _, indices = tensors
    _, H, K, V = states.shape
    slots = 0 if indices is None else state.shape[0]
    args = *tensors, N, T, slots, segment, int(reverse), *strides(state, 4), *strides(state_out, 4)
    return combine_kernel, (N * H * cdiv(K * V, 1024), 1, 1), args, dict(H=H, K=K, V=V, BS=1024, num_warps=4)


def boundary_states(operands: Operands, setting: Setting) -> torch.Tensor:
    """The state before each segment `[segments, H, K, V]`, from the one before each sequence. In reverse, with q and do
    for k and v, the gradient of the state after each segment, from that after each sequence.

    state_out gets the last states of sequences without tokens; the sweeps leave the others.
    """
    q, k, v, c, state, state_out, _, _, cu_seqlens, indices, steps = operands
    B, T, H, K, V = sizes(q, v)
    N = count_sequences(B, cu_seqlens)
    segments = count_blocks(B, T, setting.segment, cu_seqlens)
    states = empty(k, segments, H, K, V, dtype=torch.float32)
    decays = None if c is None and cu_seqlens is None else empty(k, segments, H, dtype=torch.float32)
    launch_summary((k, v, c, None if steps is None else steps.dt, states, decays, cu_seqlens), setting)
    launch_combine((state, states, decays, state_out, cu_seqlens, indices), N, T, setting.segment, setting.reverse)
    return states


class SummaryConfig(NamedTuple):
    """How a summary is cut: BV columns of V and `warps` to a program, loads `stages` chunks ahead."""

    BV: int
    warps: int
    stages: int


# On Hopper, in 16 bits, by the dim that is to fit. Measured on one H200 (triton 3.6), ms of summary and combine where
# every chunk is read; in brackets the time to read k and v once at the speed of a copy:
#   D 128, B1 T131072 H8, 16 segments    64 columns, 4 warps, 3 stages    0.139 (0.118)      2 stages    0.189
#                                        128 columns                      0.148
#   D 64, B1 T131072 H16, 16 segments    64 columns, 4 warps, 3 stages    0.137 (0.118)      2 stages    0.179
#   D 256, B1 T65536 H4, 16 segments     128 columns, 8 warps, 3 stages   0.105 (0.059)
#                                        64 columns, 4 warps              0.143
# D 512 was not measured. fp32, and other GPUs, are cut as the sweep is.
HOPPER = {
    64: SummaryConfig(64, 4, 3),
    128: SummaryConfig(64, 4, 3),
    256: SummaryConfig(128, 8, 3),
    512: SummaryConfig(64, 8, 2),
}


def summary_config(K: int, V: int, dtype: torch.dtype, device: torch.device) -> SummaryConfig:
    if is_hopper(device) and dtype.itemsize == 2:
        return HOPPER[max(64, next_power_of_2(max(K, V)))]
    config = sweep_config(K, V, dtype, device)
    return SummaryConfig(config.BV, config.warps, config.stages)


# The cost model of `segment_tokens`. Its unit is the time of a chunk in a sweep.
#
# Plain sweeps. Programs that share a multiprocessor (Hopper, 16 bits, up to D 256), and what each but the first adds to
# the time of a chunk. A chunk in a summary, in both directions together, if none has decayed: the host does not know
# which have. The launches of a summary and its combine.
PROGRAMS_PER_MULTIPROCESSOR = 2
SHARING_COST_IN_CHUNKS = 0.3
SUMMARY_COST_IN_CHUNKS = 0.25
LAUNCH_COST_IN_CHUNKS = 24
# Sweeps for Hopper, which say how long a chunk takes. A program counts as alone on its multiprocessor. (At D 64 two
# share one in the sweeps for o and dq, but not in that for dk and dv.) In CUDA graphs on one H200, what two segments
# take more than half of the time of one, in microseconds, and chunks that the summary reads:
#   D 128, B4 H16           T 2048    45, 16 chunks     T 4096   61, 27 chunks
#   D 256, B8 T4096 H4      66, 27 chunks
#   K 128, V 64, 80 heads   B1 T4096  33, 27 chunks
# The forward of B4 T4096 H16 D128 takes 0.107 ms in two segments and 0.092 in one; with the backward 0.369 and 0.427.
LAUNCH_MICROSECONDS = 22.0
SUMMARY_MICROSECONDS = 1.2
# A segment in the combine.
COMBINE_COST_IN_CHUNKS = 0.1
# Segments are multiples of so many tokens, so that anchors may be as far apart (`_gates.py`).
SEGMENT_MULTIPLE = 256
# Packed sequences stay in one piece if the fp32 states before them took more than this part of the memory of k.
STATES_TO_K = 1 / 4


class Load(NamedTuple):
    """What `segment_tokens` knows of the sweeps of a call."""

    programs: float  # of a sweep for each head
    BT: int  # tokens to a chunk
    microseconds: float | None = None  # of a chunk in the sweeps for Hopper; None of plain ones

    def launch_cost(self) -> float:
        return LAUNCH_COST_IN_CHUNKS if self.microseconds is None else LAUNCH_MICROSECONDS / self.microseconds

    def summary_cost(self) -> float:
        return SUMMARY_COST_IN_CHUNKS if self.microseconds is None else SUMMARY_MICROSECONDS / self.microseconds


@functools.lru_cache(4096)
def segment_tokens(
    rows: int, T: int, H: int, V: int, load: Load, device: torch.device, sequences: int | None = None
) -> int | None:
    """Tokens to a segment, a multiple of SEGMENT_MULTIPLE, for `rows` of T tokens, one of which may hold `sequences`
    packed ones; None if they stay in one piece.

    The length is the one with which, by the cost model above, the last program ends first.
    """
    if not exists(device) or rows == 0:  # in the interpreter there is nothing to fill
        return None
    # (k has 2 bytes to a number, a state 4)
    if sequences is not None and sequences * V * 2 > T * STATES_TO_K:
        return None
    programs = math.ceil(rows * H * load.programs)
    processors = multiprocessors(device)
    at_once = processors * (PROGRAMS_PER_MULTIPROCESSOR if load.microseconds is None else 1)

    def chunk_time(programs):
        if programs > at_once:
            # the last ones share multiprocessors, though others are free
            return cdiv(programs, at_once) * (1 + SHARING_COST_IN_CHUNKS * (at_once // processors - 1))
        return 1 + SHARING_COST_IN_CHUNKS * (cdiv(programs, processors) - 1)

    in_one_piece = chunk_time(programs)
    if load.microseconds is not None and sequences is None and is_shared(programs, at_once):
        in_one_piece = programs / at_once
    best, chosen = cdiv(T, load.BT) * in_one_piece, None
    blocks = cdiv(T, SEGMENT_MULTIPLE)
    for segments in range(2, min(blocks, 2 * at_once // programs + 1) + 1):
        segment = cdiv(blocks, segments) * SEGMENT_MULTIPLE
        segments = cdiv(T, segment)
        sweep, summary = chunk_time(programs * segments), chunk_time(programs * (segments - 1))
        cost = segment // load.BT * (sweep + load.summary_cost() * summary) + load.launch_cost()
        cost += COMBINE_COST_IN_CHUNKS * segments
        if cost < best:
            best, chosen = cost, segment
    return chosen


@device_pass
def forward_pass(inputs: Inputs, options: Options, hopper: Sweeps | None, setting: Setting, steps: Steps | None = None):
    """o, the final state or None, the states before the segments or the initial ones, the sums of the gates or None.

    Step sizes are for a pass that this is a part of.
    """
    q, k, v, _, state, cu_seqlens, indices, _ = inputs
    c = None if setting.segment is None and hopper else sweep_gates(inputs)
    final_state = final_states(inputs, options)
    if setting.segment is not None:
        # the states of the forward have no scale in them
        state_out = None if indices is not None else final_state
        operands = Operands(q, k, v, c, state, state_out, cu_seqlens=cu_seqlens, indices=indices, steps=steps)
        state = boundary_states(operands, setting._replace(scale=1.0))
    return outputs(inputs, (state, final_state), c, hopper, setting, steps), final_state, state, c


@device_pass
def backward_pass(tensors: tuple, needs: Gradients, setting: Setting, steps: Steps | None = None) -> Gradients:
    """From the inputs, the states before the segments, the sums of the gates, the gradients of o and final states."""
    inputs, (state, c, do, dstate) = Inputs(*tensors[:8]), tensors[8:]
    dh0 = empty(inputs.initial_state, *inputs.initial_state.shape) if needs.initial_state else None
    if setting.segment is not None:
        if c is None:
            c = sweep_gates(inputs)
        operands = Operands(inputs.q, inputs.q, do, c, dstate, dh0, cu_seqlens=inputs.cu_seqlens)
        dstate = boundary_states(operands, setting._replace(reverse=True))
    return gradients(inputs, (state, dstate, dh0), c, do, needs, setting, steps)


def tokens_to_a_segment(inputs: Inputs) -> int | None:
    """Tokens to a segment; None if sequences stay in one piece.

    It follows from shapes alone. The operator of the backward may be given its tensors in other layouts than that of
    the forward, and has to find the same.
    """
    q = inputs.q
    B, T, _, K = q.shape
    H, V = inputs.v.shape[2:]
    sequences = None if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1
    hopper = sweeps_of(K, V, q.dtype, q.device)
    if hopper:
        load = Load(hopper.programs, CHUNK_TOKENS, hopper.microseconds)
    else:
        config = sweep_config(K, V, q.dtype, q.device)
        load = Load(cdiv(V, config.BV), config.BT)
    return segment_tokens(B, T, H, V, load, q.device, sequences)


def choices(inputs: Inputs, options: Options):
    """The sweeps for Hopper, if they take these inputs, and how sweeps go."""
    return sweeps_for(*inputs[:3]), Setting(options.scale, tokens_to_a_segment(inputs), precision=options.precision)


def forward(inputs: Inputs, plan: Plan) -> Results:
    hopper, setting = plan.once(choices, inputs, plan.options)
    o, final_state, state, c = forward_pass(inputs, plan.options, hopper, setting, plan=plan)
    return Results(o, final_state, None if setting.segment is None else state, c)


def backward(inputs: Inputs, kept: tuple, given: tuple, needs: Gradients, plan: Plan) -> tuple:
    (state, c), (do, dht) = kept, given
    hopper, setting = plan.once(choices, inputs, plan.options)
    if setting.segment is None:
        state = inputs.initial_state
    return backward_pass((*inputs, state, c, as_taken(do, hopper is not None), dht), needs, setting)


def count_states(inputs: Inputs) -> int | None:
    """How many states the operator of the forward leaves; None if a size is a symbol."""
    q, v, cu_seqlens = inputs.q, inputs.v, inputs.cu_seqlens
    shapes = *q.shape, *v.shape, *(() if cu_seqlens is None else cu_seqlens.shape)
    if any(isinstance(size, torch.SymInt) for size in shapes):
        return None
    segment = tokens_to_a_segment(inputs)
    return 0 if segment is None else count_blocks(*q.shape[:2], segment, cu_seqlens)


mode = Mode('chunk', forward, backward, naive, count_states=count_states)


def chunk_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    g_gamma: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    *,
    chunk_size: int | None = None,
    state_indices: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Simple Gated Linear Attention, chunk by chunk: for training, and for reading prompts.

    For each sequence and head::

        S_t = exp(g_t) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    Long sequences are cut into segments that run at once. How many there are depends on the shapes and on the GPU, and
    the last digits on them: `fused_chunk_simple_gla` gives a sequence the same bits whatever else is in the batch.
    Products are computed in the inputs' dtype and summed in fp32; fp32 inputs are computed to fp32 accuracy, or in TF32
    where `torch.set_float32_matmul_precision` allows it. In fp16 no state may exceed 65504: use bf16 where one would,
    or a smaller v. Differentiable in q, k, v, g, g_gamma and initial_state, once. CPU tensors are computed by
    `naive_chunk_simple_gla`.

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
        state_v_first: states are `[N, H, V, K]`.
        cu_seqlens: `[N + 1]`, int32 or int64: sequence n is the tokens from `cu_seqlens[n]` to `cu_seqlens[n + 1]` of a
            batch of one. It starts at 0, never decreases, and stays on the device. Tokens in no sequence get zeros. On
            the GPU its contents are not checked: bounds are moved into 0..T, and a sequence that would end before it
            begins is empty.
        cu_seqlens_cpu: a copy of cu_seqlens on the CPU. Accepted for code that has one; nothing here needs it.
        chunk_size: tokens to a chunk, a power of two. It changes no more than rounding. The CPU path uses it; the
            kernels have chunks of their own, chosen for the GPU.
        state_indices: `[N]`, int32 or int64. initial_state is then a pool `[P, H, K, V]` (`[P, H, V, K]` with
            state_v_first) in fp32, bf16 or fp16, and sequence n has the state in slot `state_indices[n]`. It is read
            there and replaced by the final state, in place. No other slot is touched. -1 marks padding: a sequence
            without a state, whose outputs are zero. An index of P and above is padding too; on the CPU it is an error.
            What two equal indices do is undefined; on the CPU they are an error. Nothing may need gradients.

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
        >>> from fla_simple_gla import chunk_simple_gla
        >>> q, k, v = torch.randn(3, 1, 100, 4, 64)
        >>> g = torch.nn.functional.logsigmoid(torch.randn(1, 100, 4))
        >>> o, state = chunk_simple_gla(q, k, v, g, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 4, 64]), torch.Size([1, 4, 64, 64]))
        >>> # the same tokens as two packed sequences of 30 and 70
        >>> cu_seqlens = torch.tensor([0, 30, 100])
        >>> o, states = chunk_simple_gla(q, k, v, g, output_final_state=True, cu_seqlens=cu_seqlens)
        >>> states.shape
        torch.Size([2, 4, 64, 64])
    """
    return mode(Call(
        q, k, v, g, g_gamma, initial_state, cu_seqlens, state_indices, None, cu_seqlens_cpu, scale, output_final_state,
        state_v_first, chunk_size=chunk_size,
    ))  # fmt: skip
