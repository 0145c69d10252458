"""What the modes share of the gates: their sums inside chunks, and their gradient from what the backward sweeps leave.

**Sums.** The decay between two tokens of a chunk is `exp2(c_i - c_j)`, with `c` the running sum of the gates, in units
of log 2, from the chunk's first token. A gate of -inf, or a very large one, is a reset: its decay must be zero, and the
small gates beside it must keep their accuracy. So a gate is cut off at -256, whose decay is zero in fp32 with room to
spare, and the sums have two parts: whole numbers, which fp32 adds exactly, and fractions. Where 16-bit inputs bound the
accuracy anyway, the parts are added and stored as one number. fp32 inputs get both, and subtract them part by part.

**Gradient.** The gate of token t decays all that goes from before t to t or to a later token. In a chunk of tokens
s_1 to s_e,

    dg_t = crossing + sum_{s<t} z_s + sum_{s>=t} (w_s - y_s)

with the products that the sweeps leave for each token, and S the state before the chunk and dS the gradient of the
state after it:

    w_s       of q_s . dq_s, the part that comes from S                              the sweep for dq
    z_s       of k_s . dk_s, the part that goes to dS                                the sweep for dk
    y_s       sum_i A_is - sum_j A_sj                                                see below
    crossing  exp(g_1 + ... + g_e) <S, dS>: what goes from before the chunk to after it

A_ij is what the pair of tokens (i, j) in the chunk adds to q_i . dq_i and to k_j . dk_j. In four tokens, g_3 decays the
pairs (3, 1), (3, 2), (4, 1) and (4, 2), and the sum of -y over the tokens 3 and 4 is just these: the pair (4, 3) is in
it twice, with both signs, and cancels. Its rounding must cancel too, so both sums over A are taken from the same
numbers, in fp32. Where they are left:

    sweeps         w has                                y has
    plain, wide    all of q . dq                        of k . dk, the part of pairs inside a chunk
    Hopper, <= 128 what S adds, less sum_i A_is         sum_j A_sj, negative
    pairs of heads all of do . o, which is q . dq       of v . dv, which is k . dk, the part of pairs inside a chunk

Over chunks, `crossing + sum z` of one is `crossing + sum (w - y)` of the next. A sum that runs far this way telescopes:
the rounding of w and z, which come from states in the inputs' dtype, adds up, and the value does not. So:

- The sweep for dq leaves an anchor, S before the last chunk of every anchor block (`anchor_tokens`). The sweep for dk
  multiplies it by the dS that it holds after this chunk, and there the crossing is known. The chunks before it continue
  the sum, back to the crossing of the block before, or to the zero that a sequence starts with. The error that shows
  there is spread evenly over the chunks on the way.
- Nothing crosses a chunk whose decay is below the noise of such a sum, and there the sum begins anew.
- The sum begins anew at the last chunk but one of a sequence, too, which has an anchor of its own. The last chunk may
  have few tokens. A final state's gradient, which can be far larger than all else, then decays in the chunk before.
"""

import functools
import math
from typing import NamedTuple

import torch

from ._blocks import block_bounds, count_blocks, count_sequences, first_block, is_sequence, number_of
from ._launch import launcher
from ._layout import cdiv, next_power_of_2
from ._passes import empty
from ._plans import Inputs
from ._sweeps import Steps
from ._triton import jit, kernel_name, tl

LOG2E = tl.constexpr(1.4426950408889634)
# In units of log 2: the decay of a gate at or below this is zero in fp32, as no kernel keeps denormal numbers.
UNDERFLOW = tl.constexpr(-126.0)
# A lower gate is taken for this one.
RESET = tl.constexpr(-256.0)

LONG_SEGMENT_TOKENS = 4096


@functools.cache
def anchor_tokens(segment: int | None, at_most: int) -> int:
    """Tokens to an anchor block, at most so many, where sequences run in segments or in one piece."""
    # Error of dg in 16 bits, and the anchors' share of the memory and traffic of k (D 64 to 128, T 2048, gates with a
    # memory of 10 to 1000 tokens):
    #   128 tokens   2.4e-3   1
    #   256          2.9e-3   1/2
    #   384          3.5e-3   1/3
    #   512          4.8e-3   1/4
    #
    # The sums of a block that lies in two segments are noisier, as the state between these was summed up with other
    # rounding: segments of 128 in blocks of 256 have an error of 6e-3. Of the blocks of long segments few do.
    whole = (BA for BA in (384, 256, 128) if BA <= at_most)
    return next(BA for BA in whole if segment is None or segment >= LONG_SEGMENT_TOKENS or segment % BA == 0)


@jit(do_not_specialize=['N', 'T', 'part'], repr=kernel_name('chunk_gates'))
def chunk_gates_kernel(
    g,  # [B, T, H], any strides
    c,  # [1 or 2, chunks, H, BT]
    cu_seqlens,  # [N + 1] or None
    N, T,
    g_b, g_t, g_h,
    part,  # chunks * H * BT
    H: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    TWO_PARTS: tl.constexpr,
):  # fmt: skip
    """Running sums of the gates, in units of log 2, of BH heads over one chunk."""
    i_s, i_h = tl.program_id(0), tl.program_id(1)
    i_b, _, first, end, _, _ = block_bounds(cu_seqlens, i_s, N, T, BT)
    o_t = first + tl.arange(0, BT)
    o_h = i_h * BH + tl.arange(0, BH)
    mask = (o_t < end)[:, None] & (o_h < H)[None, :]
    o_t = o_t.to(tl.int64)

    p_g = g + i_b * g_b + o_t[:, None] * g_t + o_h[None, :].to(tl.int64) * g_h
    b_g = tl.load(p_g, mask=mask, other=0.0).to(tl.float32) * LOG2E
    b_g = tl.where(b_g < RESET, RESET, b_g)  # not tl.maximum: NaN stays NaN
    whole = tl.floor(b_g + 0.5)
    fraction = tl.cumsum(b_g - whole, 0)
    whole = tl.cumsum(whole, 0)
    # The whole chunk is stored. After the end of a sequence the sums go on with gates of zero: every decay is finite.
    p_c = c + (i_s.to(tl.int64) * H + o_h[None, :]) * BT + tl.arange(0, BT)[:, None]
    m_c = (o_h < H)[None, :]
    if TWO_PARTS:
        carry = tl.floor(fraction + 0.5)
        tl.store(p_c, whole + carry, mask=m_c)
        tl.store(p_c + part, fraction - carry, mask=m_c)
    else:
        tl.store(p_c, whole + fraction, mask=m_c)


@launcher
def launch_chunk_gates(tensors):
    g, c, cu_seqlens = tensors
    B, T, H = g.shape
    parts, chunks, _, BT = c.shape
    BH = min(16, next_power_of_2(H))
    args = g, c, cu_seqlens, count_sequences(B, cu_seqlens), T, *g.stride(), chunks * H * BT
    constants = dict(H=H, BT=BT, BH=BH, TWO_PARTS=parts == 2, num_warps=4)
    return chunk_gates_kernel, (chunks, cdiv(H, BH), 1), args, constants


def chunk_gates(g: torch.Tensor, BT: int, two_parts: bool, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Running sums of `g [B, T, H]` in chunks, `[parts, chunks, H, BT]`: one part, or whole numbers and fractions."""
    B, T, H = g.shape
    chunks = count_blocks(B, T, BT, cu_seqlens)
    c = empty(g, 1 + two_parts, chunks, H, BT, dtype=torch.float32)
    if chunks:
        launch_chunk_gates((g, c, cu_seqlens))
    return c


@jit(do_not_specialize=['N', 'T', 'segment', 'negligible', 'part', 'blocks'], repr=kernel_name('gate_gradient'))
def gate_gradient_kernel(
    g,  # [B, T, H], any strides
    dg, dt, ddt,  # [B, T, H], the same strides: with step sizes and what gets their gradient, or None
    w, y, z,  # [NW, B, H, T], [NY, B, H, T], [NW, B, H, T]: parts, to be added up
    s_ds,  # [NS, blocks + N, H]: <S before, dS after> the last chunk of anchor blocks; the last but one of sequences
    cu_seqlens,  # [N + 1] or None
    N, T,
    segment,  # tokens to a segment of the sweeps, or 0
    negligible,  # nothing crosses a chunk whose decay is below this, in units of log 2
    g_b, g_t, g_h,
    dg_b, dg_t, dg_h,
    part,  # B * H * T
    blocks,  # anchor blocks
    NW: tl.constexpr,
    NY: tl.constexpr,
    NS: tl.constexpr,
    H: tl.constexpr,
    BA: tl.constexpr,
    BT: tl.constexpr,
    NC: tl.constexpr,  # chunks of an anchor block, filled up to a power of two
    BH: tl.constexpr,
    STATE: tl.constexpr,
):  # fmt: skip
    """dg of BH heads over one anchor block."""
    i_s, i_h = tl.program_id(0), tl.program_id(1)
    i_b, i_n, first, end, bos, eos = block_bounds(cu_seqlens, i_s, N, T, BA)
    swept = is_sequence(i_n, N)
    if cu_seqlens is not None:
        if segment > 0:
            # Where bounds decrease, segments of this sequence may be another's, though this block is not: then nothing
            # was left for it. The sequences of segments never decrease, so the first and the last tell of those
            # between.
            s_first = first_block(cu_seqlens, i_n, bos, T, segment) + tl.maximum(first - 1 - bos, 0) // segment
            s_last = first_block(cu_seqlens, i_n, bos, T, segment) + tl.maximum(end - 1 - bos, 0) // segment
            swept &= number_of(cu_seqlens, s_first, N, T, segment) == i_n
            swept &= number_of(cu_seqlens, s_last, N, T, segment) == i_n
    # limits and not masks that are `& first < read_end`: the interpreter of triton 3.9 makes those int32, and refuses
    # them
    read_end = tl.where(swept, end, first)
    o_h = i_h * BH + tl.arange(0, BH)
    m_anchor = o_h < tl.where(first < read_end, H, 0)
    m_before = o_h < tl.where((first < read_end) & (first > bos), H, 0)
    n = tl.arange(0, NC)
    r = tl.arange(0, BT)

    # [NC, BT, BH]
    o_t = first + (n[:, None] * BT + r[None, :])[:, :, None]
    m_h = (o_h < H)[None, None, :]
    mask = (o_t < end) & m_h
    read = (o_t < read_end) & m_h
    o_t = o_t.to(tl.int64)
    o_w = (i_b * H + o_h[None, None, :]) * T + o_t
    p_g = g + i_b * g_b + o_t * g_t + o_h[None, None, :].to(tl.int64) * g_h
    b_g = tl.load(p_g, mask=read, other=0.0).to(tl.float32) * LOG2E
    b_w = tl.load(w + o_w, mask=read, other=0.0)
    b_y = tl.zeros_like(b_w)
    b_z = tl.load(z + o_w, mask=read, other=0.0)
    for i in tl.static_range(1, NW):
        b_w += tl.load(w + i * part + o_w, mask=read, other=0.0)
        b_z += tl.load(z + i * part + o_w, mask=read, other=0.0)
    for i in tl.static_range(NY):
        b_y += tl.load(y + i * part + o_w, mask=read, other=0.0)
    b_w -= b_y
    o_g = i_b * dg_b + o_t * dg_t + o_h[None, None, :].to(tl.int64) * dg_h
    if ddt is not None:
        # v . dv is the step size times its gradient. Where it is zero its logarithm is none, and so is the gradient.
        b_dt = tl.load(dt + o_g, mask=read, other=0.0)
        tl.store(ddt + o_g, tl.where(b_dt == 0.0, 0.0, (b_y + b_z) / b_dt), mask=mask)

    # [BH]
    b_last = tl.zeros([BH], tl.float32)
    b_last_but_one = tl.zeros([BH], tl.float32)
    b_before = tl.zeros([BH], tl.float32)
    for i in tl.static_range(NS):
        p_s = s_ds + i * (blocks + N) * H + o_h
        b_last += tl.load(p_s + i_s * H, mask=m_anchor, other=0.0)
        b_last_but_one += tl.load(p_s + (blocks + i_n) * H, mask=m_anchor, other=0.0)
        b_before += tl.load(p_s + (i_s - 1) * H, mask=m_before, other=0.0)

    # [NC, BH]: the sums of each chunk; whether its crossing is known; the crossing, or what it adds to the one before
    # it
    w_sum = tl.sum(b_w, 1)
    z_sum = tl.sum(b_z, 1)
    decay = tl.sum(b_g, 1)
    i_t = first + n * BT
    is_last = ((i_t < end) & (i_t + BT >= end))[:, None]
    is_last_but_one = ((i_t + BT < eos) & (i_t + 2 * BT >= eos))[:, None]
    crossing = tl.where(is_last_but_one, b_last_but_one[None, :], 0.0)
    crossing = tl.where(is_last, b_last[None, :], crossing) * tl.exp2(decay)
    known = is_last | is_last_but_one | (decay < negligible)
    crossing = tl.where(known, crossing, -z_sum)

    # the crossing of chunk n: the sum from the first chunk, from n on, of which it is known, back to n
    m_known = known.to(tl.int32)
    rank = tl.cumsum(m_known, 0) - m_known
    on_way = (rank[:, None, :] == rank[None, :, :]) & (n[:, None] <= n[None, :])[:, :, None]
    crossing = tl.sum(tl.where(on_way, crossing[None, :, :], 0.0), 1)
    later = on_way & (n[:, None] < n[None, :])[:, :, None]
    crossing += tl.sum(tl.where(later, w_sum[None, :, :], 0.0), 1)

    # the error that shows before the block, spread over the chunks up to the first whose crossing is known
    is_first = (n == 0)[:, None]
    missing = -tl.sum(tl.where(is_first, crossing + w_sum, 0.0), 0)
    if first > bos:
        o_b = (first - BT + r).to(tl.int64)[:, None]
        p_b = g + i_b * g_b + o_b * g_t + o_h[None, :].to(tl.int64) * g_h
        b_d = tl.load(p_b, mask=m_before[None, :], other=0.0).to(tl.float32) * LOG2E
        missing += b_before * tl.exp2(tl.sum(b_d, 0))
        for i in tl.static_range(NW):
            p_z = z + i * part + (i_b * H + o_h[None, :]) * T + o_b
            missing += tl.sum(tl.load(p_z, mask=m_before[None, :], other=0.0), 0)
    elif STATE:
        missing = tl.zeros([BH], tl.float32)
    first_known = tl.min(tl.where(known, n[:, None], NC), 0)
    crossing += (missing / (first_known + 1))[None, :] * tl.maximum(first_known[None, :] - n[:, None], 0)

    b_dg = crossing[:, None, :] + tl.cumsum(b_w, 1, reverse=True) + tl.cumsum(b_z, 1) - b_z
    # nothing crosses a reset: the sums there are nothing but rounding
    b_dg = tl.where(b_g < UNDERFLOW, 0.0, b_dg)
    tl.store(dg + o_g, b_dg, mask=mask)


class GateParts(NamedTuple):
    """What the sweeps of a backward leave for dg, in parts that are added up."""

    w: torch.Tensor  # [NW, B, H, T]
    y: torch.Tensor  # [NY, B, H, T]
    z: torch.Tensor  # [NW, B, H, T]
    s_ds: torch.Tensor  # [NS, blocks + N, H]


@launcher
def launch_gate_gradient(tensors, setting, BT, eps, state):
    g, dg, _, _, w, y, _, s_ds, cu_seqlens = tensors
    BA, segment = setting.BA, setting.segment or 0
    B, T, H = g.shape
    blocks = count_blocks(B, T, BA, cu_seqlens)
    BH = min(4, next_power_of_2(H))
    # relative to <S, dS>, the noise of <S, dS> - sum z is about an eighth of the dtype's eps
    negligible = math.log2(eps) - 3
    args = (
        *tensors, count_sequences(B, cu_seqlens), T, segment, negligible,
        *g.stride(), *dg.stride(), B * H * T, blocks,
    )  # fmt: skip
    NC = next_power_of_2(BA // BT)
    constants = dict(
        NW=w.shape[0], NY=y.shape[0], NS=s_ds.shape[0], H=H, BA=BA, BT=BT, NC=NC, BH=BH, STATE=state, num_warps=4
    )  # fmt: skip
    return gate_gradient_kernel, (blocks, cdiv(H, BH), 1), args, constants


def gate_gradient(parts: GateParts, inputs: Inputs, setting, BT: int, steps: Steps | None = None) -> torch.Tensor:
    """`dg [B, T, H]`, in g's dtype, from what the sweeps with this setting, in chunks of BT tokens, left. It leaves the
    gradient of step sizes too.
    """
    g, cu_seqlens = inputs.g, inputs.cu_seqlens
    B, T, H = g.shape
    # with step sizes as these lie
    dg = empty(g, B, T, H) if steps is None else empty(g, B, H, T).transpose(1, 2)
    if count_blocks(B, T, setting.BA, cu_seqlens):
        eps = torch.finfo(inputs.q.dtype).eps
        dt, ddt = (None, None) if steps is None else (steps.dt, steps.ddt)
        launch_gate_gradient((g, dg, dt, ddt, *parts, cu_seqlens), setting, BT, eps, inputs.initial_state is not None)
    return dg
