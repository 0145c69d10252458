"""What the modes share of the gates: their sums within chunks, and their gradient from what the backward sweeps leave.

**Sums.** A decay between two tokens of a chunk is `exp2(c_i - c_j)`, with `c` the running sum of the gates (in units of
log 2) from the chunk's first token. A gate of -inf, or a very large one, is a reset: its decay must be zero and the small gates
beside it must keep their accuracy. So a gate is cut off at -256, whose decay is zero in fp32 with room to spare, and the sums are
taken in two parts, of whole numbers, which fp32 adds exactly, and of fractions. Where 16-bit inputs bound the accuracy
anyway the parts are added and stored as one number; fp32 inputs get both, and subtract them part by part.

**Gradient.** With `w_t = q_t . dq_t` and `z_t = k_t . dk_t`, and e any token from t on,

    dg_t = <S_e, dS_e> + sum_{s=t..e} (w_s - z_s)

The sum telescopes: rounding noise in w and z adds up while its value does not. What keeps dg accurate:

- The sum stays inside a chunk: e is its last token, and `<S_e, dS_e> = sum z_inter + crossing`. z_inter is the part of z that comes
  from dS_e, and cancels in the sum term by term; `crossing = exp(g_1 + ... + g_e) <S_0, dS_e>` is what goes from before the chunk to
  behind it. What is left to cancel is of the size of the pairs inside the chunk: the diagonal ones too, whose fp32 rounding stays.
- The sweep for dq leaves S before the last chunk of every `ANCHOR` tokens, and the one for dk multiplies it by the dS it holds
  behind the chunk. The chunks before that one continue the sum, and take the crossing to be what remains of it, or zero
  where the chunk's decay is below the noise of such a difference.
- So do they at the last chunk but one of a sequence. The last may have few tokens, and a final state's gradient, which can be far
  larger than all else, then decays in the one before it.
"""

import math

import torch

from ._blocks import block_bounds, count_sequences, count_slots
from ._triton import jit, tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
# the decay of one gate at or below this is zero in fp32 (no kernel keeps denormal numbers), in units of log 2
UNDERFLOW = tl.constexpr(-126.0)
RESET = tl.constexpr(-256.0)

# Tokens between two anchors of the gate gradient.
ANCHOR = 128


@jit(do_not_specialize=['N', 'T', 'part'])
def chunk_gates_kernel(
    g,  # [B, T, H], any strides
    c,  # [1 or 2, slots, H, BT]
    cu_seqlens,  # [N + 1] or None
    N, T,
    g_b, g_t, g_h,
    part,  # slots * H * BT
    H: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    TWO_PARTS: tl.constexpr,
):
    """Running sums of the gates, in units of log 2, of BH heads over one chunk."""
    i_s, i_h = tl.program_id(0), tl.program_id(1)
    i_b, _, first, end, _, _ = block_bounds(cu_seqlens, i_s, N, T, BT)
    o_t = first + tl.arange(0, BT)
    o_h = i_h * BH + tl.arange(0, BH)
    mask = (o_t < end)[:, None] & (o_h < H)[None, :]
    o_t = o_t.to(tl.int64)

    b_g = tl.load(g + i_b * g_b + o_t[:, None] * g_t + o_h[None, :].to(tl.int64) * g_h, mask=mask, other=0.0).to(tl.float32) * LOG2E
    b_g = tl.where(b_g < RESET, RESET, b_g)  # not tl.maximum: NaN stays NaN
    whole = tl.floor(b_g + 0.5)
    fraction = tl.cumsum(b_g - whole, 0)
    whole = tl.cumsum(whole, 0)
    # the whole slot: behind a sequence's end the sums go on with gates of zero, and every decay there is finite
    p_c = c + (i_s.to(tl.int64) * H + o_h[None, :]) * BT + tl.arange(0, BT)[:, None]
    m_c = (o_h < H)[None, :]
    if TWO_PARTS:
        carry = tl.floor(fraction + 0.5)
        tl.store(p_c, whole + carry, mask=m_c)
        tl.store(p_c + part, fraction - carry, mask=m_c)
    else:
        tl.store(p_c, whole + fraction, mask=m_c)


def chunk_gates(g: torch.Tensor, BT: int, two_parts: bool, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Running sums of `g [B, T, H]` within chunks of BT: `[1, slots, H, BT]`, or `[2, slots, H, BT]`, whole numbers and fractions."""
    B, T, H = g.shape
    slots = count_slots(B, T, BT, cu_seqlens)
    c = torch.empty(1 + two_parts, slots, H, BT, dtype=torch.float32, device=g.device)
    if slots:
        N = count_sequences(B, cu_seqlens)
        BH = min(16, triton.next_power_of_2(H))
        chunk_gates_kernel[(slots, triton.cdiv(H, BH))](
            g, c, cu_seqlens, N, T, *g.stride(), c[0].numel(), H=H, BT=BT, BH=BH, TWO_PARTS=two_parts, num_warps=4,
        )
    return c


@jit(do_not_specialize=['N', 'T', 'negligible', 'part', 'blocks'])
def gate_gradient_kernel(
    g, dg,  # [B, T, H], any strides; [B, T, H]
    w, z,  # [NK, B, H, T]: q . dq and k . dk, in NK parts
    z_inter,  # [NK, B, H, T]: what of z comes from the gradient of the state behind the chunk
    s_ds,  # [NK, blocks + N, H]: <S before, dS behind> the last chunk of each anchor block, and the last but one of each sequence
    cu_seqlens,  # [N + 1] or None
    N, T,
    negligible,  # the decay of a chunk, in units of log 2, from which on nothing crosses it
    g_b, g_t, g_h,
    part,  # B * H * T
    blocks,
    NK: tl.constexpr,
    H: tl.constexpr,
    BA: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    """dg of BH heads over one anchor block, from its last chunk to its first."""
    i_s, i_h = tl.program_id(0), tl.program_id(1)
    i_b, i_n, first, end, _, eos = block_bounds(cu_seqlens, i_s, N, T, BA)
    read_end = tl.where(i_n < N, end, first)
    o_h = i_h * BH + tl.arange(0, BH)
    m_h = o_h < H

    # a limit and not a mask that is `& first < read_end`: the interpreter of triton 3.9 makes that mask int32, and refuses it
    m_anchor = o_h < tl.where(first < read_end, H, 0)
    b_last = tl.zeros([BH], tl.float32)
    b_last_but_one = tl.zeros([BH], tl.float32)
    for _ in tl.static_range(NK):
        b_last += tl.load(s_ds + i_s * H + o_h, mask=m_anchor, other=0.0)
        b_last_but_one += tl.load(s_ds + (blocks + i_n) * H + o_h, mask=m_anchor, other=0.0)
        s_ds += (blocks + N) * H

    b_s = tl.zeros([BH], tl.float32)
    for i in tl.static_range(BA // BT):
        i_t = first + BA - (i + 1) * BT
        o_t = (i_t + tl.arange(0, BT)).to(tl.int64)
        mask = (o_t < end)[:, None] & m_h[None, :]
        read = (o_t < read_end)[:, None] & m_h[None, :]
        p_g = g + i_b * g_b + o_t[:, None] * g_t + o_h[None, :].to(tl.int64) * g_h
        b_g = tl.load(p_g, mask=read, other=0.0).to(tl.float32) * LOG2E
        o_w = (i_b * H + o_h[None, :]) * T + o_t[:, None]
        b_w = tl.zeros([BT, BH], tl.float32)
        b_z = tl.zeros([BT, BH], tl.float32)
        for _ in tl.static_range(NK):
            b_w += tl.load(w + o_w, mask=read, other=0.0) - tl.load(z + o_w, mask=read, other=0.0)
            b_z += tl.load(z_inter + o_w, mask=read, other=0.0)
            o_w += part
        decay = tl.sum(b_g, 0)
        z_sum = tl.sum(b_z, 0)
        is_last = (i_t < end) & (i_t + BT >= tl.minimum(end, first + BA))
        is_last_but_one = (i_t + BT < eos) & (i_t + 2 * BT >= eos)
        crossing = tl.where(decay < negligible, 0.0, b_s - z_sum)
        crossing = tl.where(is_last_but_one, b_last_but_one * tl.exp2(decay), crossing)
        crossing = tl.where(is_last, b_last * tl.exp2(decay), crossing)
        b_s = crossing + z_sum
        # nothing crosses a reset: what is left of the sums there is their rounding
        b_dg = tl.where(b_g < UNDERFLOW, 0.0, tl.cumsum(b_w, 0, reverse=True) + b_s[None, :])
        tl.store(dg + (i_b * T + o_t[:, None]) * H + o_h[None, :], b_dg, mask=mask)
        b_s += tl.sum(b_w, 0)


def gate_gradient(
    g: torch.Tensor,
    w: torch.Tensor,
    z: torch.Tensor,
    z_inter: torch.Tensor,
    s_ds: torch.Tensor,
    BT: int,
    dtype: torch.dtype,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """`dg [B, T, H]`, in g's dtype, from `w, z, z_inter [NK, B, H, T]` and `s_ds [NK, blocks + N, H]`.

    BT is the size of the chunks, and dtype that of the products they were computed in.
    """
    B, T, H = g.shape
    dg = torch.empty(B, T, H, dtype=g.dtype, device=g.device)
    blocks = count_slots(B, T, ANCHOR, cu_seqlens)
    if blocks:
        BH = min(8, triton.next_power_of_2(H))
        N = count_sequences(B, cu_seqlens)
        # relative to <S, dS>, the noise of <S, dS> - sum z_inter is about an eighth of the dtype's eps
        negligible = math.log2(torch.finfo(dtype).eps) - 3
        gate_gradient_kernel[(blocks, triton.cdiv(H, BH))](
            g, dg, w, z, z_inter, s_ds, cu_seqlens, N, T, negligible, *g.stride(), B * H * T, blocks,
            NK=s_ds.shape[0], H=H, BA=ANCHOR, BT=BT, BH=BH, num_warps=4,
        )
    return dg
