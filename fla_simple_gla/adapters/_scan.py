"""State space duality (SSD), the operator of Mamba-2, under the name and with the parameters of mamba_ssm.

    dt_t = clamp(softplus(dt_t + dt_bias))
    h_t  = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T          h: [P, N]
    y_t  = (h_t C_t + D x_t) * silu(z_t)

This is Simple GLA with q = C, k = B, v = dt x, g = dt A, scale 1, and S = h^T. What comes before and after it:

1. The prepare kernel makes the step sizes dt and the gates g. A token that begins a sequence of `seq_idx` resets.
2. `chunk.py` computes the operator. The sweeps of pairs of heads for Hopper take dt and D themselves (`_sweeps.Steps`)
   and read x, and that for o makes y too. For the other kernels the prepare kernel makes v, and step 3 follows.
3. The finish kernel adds D x, and multiplies by silu(z).

The backward goes the other way: the finish kernel gives the gradients of z and of what was gated, the operator's
backward those of C, B, v and g, and the prepare kernel those of dt, A and dt_bias, and of x and D where it has made v.
The forward keeps what it was given, with z also what is gated, and the states between the segments of `chunk.py`.

CPU tensors, compilers and whatever else sees operators of PyTorch take the same steps in PyTorch (`composed`).
"""

import contextlib
import math
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import _validation, chunk
from .._launch import launcher
from .._layout import cdiv, exists, next_power_of_2, rows_in_place, strides, transposed
from .._passes import device_pass, empty, zeros
from .._plans import PLAIN, Gradients, Inputs, Options, fp32_precision, needs_operator
from .._private import none_is_active
from .._sweeps import Setting, Steps, count_swept
from .._triton import jit, kernel_name, runs_kernels, tl
from ..hopper import Sweeps, as_taken, sweeps_for, takes

# Tokens to a program of the backward of the prepare kernel.
TOKENS = 64


@jit
def step_size(dt, bias, lowest, highest, SOFTPLUS: tl.constexpr):
    """The step size, and its derivative by dt, which is zero outside of the limits."""
    b = dt.to(tl.float32) + bias
    slope = 1.0
    if SOFTPLUS:
        slope = tl.sigmoid(b)
        # log(1 + e) with 1 + e rounded is corrected by how it was rounded
        e = tl.exp(-tl.abs(b))
        u = 1.0 + e
        log = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
        b = tl.where(b > 0, b, 0.0) + log
    slope = tl.where((b < lowest) | (b > highest), 0.0, slope)
    b = tl.where(b < lowest, lowest, b)
    return tl.where(b > highest, highest, b), slope


@jit(do_not_specialize=['T', 'lowest', 'highest'], repr=kernel_name('ssd_prepare'))
def prepare_kernel(
    dt,  # [B, T, H], any strides
    dt_bias, A,  # [H]; the first may be None
    seq_idx,  # [B, T] or None
    x,  # [B, T, H, P], any strides with contiguous rows; or None
    steps, g,  # [B, H, T]
    v,  # [B, T, H, P], or None
    T, lowest, highest,
    dt_b, dt_t, dt_h,
    x_b, x_t, x_h,
    H: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Step sizes and gates of BH heads of BT tokens, and v = dt x of x."""
    i_b = (tl.program_id(0) // tl.cdiv(T, BT)).to(tl.int64)
    o_t = (tl.program_id(0) % tl.cdiv(T, BT) * BT + tl.arange(0, BT)).to(tl.int64)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    mask = (o_t < T)[:, None] & (o_h < H)[None, :]
    b_dt = tl.load(dt + i_b * dt_b + o_t[:, None] * dt_t + o_h[None, :] * dt_h, mask=mask, other=0.0)
    bias = tl.zeros([BH], tl.float32) if dt_bias is None else tl.load(dt_bias + o_h, mask=o_h < H, other=0.0)
    b_dt, _ = step_size(b_dt, bias.to(tl.float32)[None, :], lowest, highest, SOFTPLUS)
    b_g = b_dt * tl.load(A + o_h, mask=o_h < H, other=0.0).to(tl.float32)[None, :]
    if seq_idx is not None:
        m_t = (o_t > 0) & (o_t < T)
        p_s = seq_idx + i_b * T + o_t
        begins = tl.load(p_s, mask=m_t, other=0) != tl.load(p_s - 1, mask=m_t, other=0)
        b_g = tl.where(begins[:, None], float('-inf'), b_g)
    o_s = (i_b * H + o_h[None, :]) * T + o_t[:, None]
    tl.store(steps + o_s, b_dt, mask=mask)
    tl.store(g + o_s, b_g, mask=mask)
    if v is not None:
        o_p = tl.arange(0, BP)[None, None, :]
        m_x = mask[:, :, None] & (o_p < P)
        o_x = i_b * x_b + (o_t[:, None] * x_t + o_h[None, :].to(tl.int64) * x_h)[:, :, None] + o_p
        b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
        o_v = ((i_b * T + o_t[:, None]) * H + o_h[None, :]) * P
        tl.store(v + o_v[:, :, None] + o_p, b_x * b_dt[:, :, None], mask=m_x)


@jit(do_not_specialize=['parts', 'T', 'lowest', 'highest'], repr=kernel_name('ssd_prepare_backward'))
def prepare_backward_kernel(
    dt,  # [B, T, H], any strides
    dt_bias, A,  # [H]; the first may be None
    steps, dsteps,  # [B, H, T]: step sizes; their gradient where the sweeps have left it, or None
    dg,  # [B, T, H], any strides, or None if no gradient of dt, dt_bias and A is needed
    D,  # [H, P], any strides, or None
    x, dv, do,  # [B, T, H, P], any strides with contiguous rows; None where the sweeps have made dx, or if not needed
    dx,  # [B, T, H, P] or None
    dD,  # [programs, H, P]: parts, or None
    ddt,  # [B, T, H] or None
    sums,  # [3, H, parts]: gets parts of the gradients of dt_bias and A at 1 and 2; or None
    parts,
    T, lowest, highest,
    dt_b, dt_t, dt_h,
    dg_b, dg_t, dg_h,
    D_h, D_p,
    x_b, x_t, x_h,
    dv_b, dv_t, dv_h,
    do_b, do_t, do_h,
    H: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr, SOFTPLUS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """The gradients of dt, and of x, and parts of those of dt_bias, A and D, of BH heads of TOKENS tokens."""
    i_b = (tl.program_id(0) // tl.cdiv(T, TOKENS)).to(tl.int64)
    i_t = tl.program_id(0) % tl.cdiv(T, TOKENS) * TOKENS
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    r_p = tl.arange(0, BP)
    o_p = r_p[None, None, :]
    bias = tl.zeros([BH], tl.float32) if dt_bias is None else tl.load(dt_bias + o_h, mask=o_h < H, other=0.0)
    b_A = tl.load(A + o_h, mask=o_h < H, other=0.0).to(tl.float32)
    b_dbias = tl.zeros([BH], tl.float32)
    b_dA = tl.zeros([BH], tl.float32)
    b_dD = tl.zeros([BH, BP], tl.float32)
    if D is not None:
        m_D = (o_h < H)[:, None] & (r_p[None, :] < P)
        b_D = tl.load(D + o_h[:, None] * D_h + r_p[None, :] * D_p, mask=m_D, other=0.0).to(tl.float32)
    for j in range(0, TOKENS, BT):
        o_t = (i_t + j + tl.arange(0, BT)).to(tl.int64)
        mask = (o_t < T)[:, None] & (o_h < H)[None, :]
        o_s = (i_b * H + o_h[None, :]) * T + o_t[:, None]
        o_r = (i_b * T + o_t[:, None]) * H + o_h[None, :]
        b_dt = tl.load(steps + o_s, mask=mask, other=0.0)
        if x is None:
            b_dsteps = tl.load(dsteps + o_s, mask=mask, other=0.0)
        else:
            m_x = mask[:, :, None] & (o_p < P)
            o_x = o_t[:, None] * x_t + o_h[None, :].to(tl.int64) * x_h
            b_x = tl.load(x + i_b * x_b + o_x[:, :, None] + o_p, mask=m_x, other=0.0).to(tl.float32)
            b_dx = tl.zeros([BT, BH, BP], tl.float32)
            b_dsteps = tl.zeros([BT, BH], tl.float32)
            if dv is not None:
                o_dv = o_t[:, None] * dv_t + o_h[None, :].to(tl.int64) * dv_h
                b_dv = tl.load(dv + i_b * dv_b + o_dv[:, :, None] + o_p, mask=m_x, other=0.0).to(tl.float32)
                b_dsteps = tl.sum(b_x * b_dv, 2)
                b_dx = b_dv * b_dt[:, :, None]
            if D is not None:
                o_do = o_t[:, None] * do_t + o_h[None, :].to(tl.int64) * do_h
                b_do = tl.load(do + i_b * do_b + o_do[:, :, None] + o_p, mask=m_x, other=0.0).to(tl.float32)
                b_dx += b_do * b_D[None, :, :]
                b_dD += tl.sum(b_x * b_do, 0)
            if dx is not None:
                tl.store(dx + o_r[:, :, None] * P + o_p, b_dx, mask=m_x)
        if dg is not None:
            o_g = i_b * dg_b + o_t[:, None] * dg_t + o_h[None, :].to(tl.int64) * dg_h
            b_dg = tl.load(dg + o_g, mask=mask, other=0.0)
            b_raw = tl.load(dt + i_b * dt_b + o_t[:, None] * dt_t + o_h[None, :] * dt_h, mask=mask, other=0.0)
            _, slope = step_size(b_raw, bias.to(tl.float32)[None, :], lowest, highest, SOFTPLUS)
            b_ddt = tl.where(mask, (b_dsteps + b_A[None, :] * b_dg) * slope, 0.0)
            if ddt is not None:
                tl.store(ddt + o_r, b_ddt, mask=mask)
            b_dbias += tl.sum(b_ddt, 0)
            b_dA += tl.sum(b_dt * b_dg, 0)
    if sums is not None:
        o_sum = (H + o_h).to(tl.int64) * parts + tl.program_id(0)
        tl.store(sums + o_sum, b_dbias, mask=o_h < H)
        tl.store(sums + o_sum + parts.to(tl.int64) * H, b_dA, mask=o_h < H)
    if dD is not None:
        o_part = tl.program_id(0).to(tl.int64) * H + o_h
        tl.store(dD + o_part[:, None] * P + r_p[None, :], b_dD, mask=m_D)


@jit(do_not_specialize=['T'], repr=kernel_name('ssd_finish'))
def finish_kernel(
    o,  # [B, T, H, P]
    D,  # [H, P], any strides, or None where o has D x in it
    x, z,  # [B, T, H, P], any strides with contiguous rows; or None
    dy,  # likewise; None in the forward
    y, dz,  # [B, T, H, P]: y and None; in the backward the gradients of o + D x and of z
    T,
    D_h, D_p,
    x_b, x_t, x_h,
    z_b, z_t, z_h,
    dy_b, dy_t, dy_h,
    ROLE: tl.constexpr,
    H: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """y = (o + D x) silu(z) of BH heads of BT tokens, or its backward."""
    i_b = (tl.program_id(0) // tl.cdiv(T, BT)).to(tl.int64)
    o_t = (tl.program_id(0) % tl.cdiv(T, BT) * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    o_h = (tl.program_id(1) * BH + tl.arange(0, BH)).to(tl.int64)[None, :]
    o_p = tl.arange(0, BP)[None, None, :]
    mask = ((o_t < T) & (o_h < H))[:, :, None] & (o_p < P)
    o_o = (((i_b * T + o_t) * H + o_h) * P)[:, :, None] + o_p
    b_o = tl.load(o + o_o, mask=mask, other=0.0).to(tl.float32)
    if D is not None:
        b_x = tl.load(x + i_b * x_b + (o_t * x_t + o_h * x_h)[:, :, None] + o_p, mask=mask, other=0.0)
        b_D = tl.load(D + (o_h * D_h)[:, :, None] + o_p * D_p, mask=mask, other=0.0)
        b_o += b_x.to(tl.float32) * b_D.to(tl.float32)
    if z is not None:
        p_z = z + i_b * z_b + (o_t * z_t + o_h * z_h)[:, :, None] + o_p
        b_z = tl.load(p_z, mask=mask, other=0.0).to(tl.float32)
        b_s = tl.sigmoid(b_z)
        if dy is not None:
            p_dy = dy + i_b * dy_b + (o_t * dy_t + o_h * dy_h)[:, :, None] + o_p
            b_dy = tl.load(p_dy, mask=mask, other=0.0).to(tl.float32)
            tl.store(dz + o_o, b_dy * b_o * b_s * (1.0 + b_z * (1.0 - b_s)), mask=mask)
            b_o = b_dy
        b_o *= b_z * b_s
    tl.store(y + o_o, b_o, mask=mask)


class ScanOptions(NamedTuple):
    """The arguments of a scan that are no tensors."""

    softplus: bool
    lowest: float  # step size
    highest: float
    output: bool  # whether the final states are wanted
    precision: str | None  # of fp32 products, as `tl.dot` takes it

    def is_positive(self) -> bool:
        """Whether step sizes are above zero, or as good as zero in fp32, where softplus has no derivative either."""
        return self.highest >= 0 and (self.softplus or self.lowest > 0)


class Tensors(NamedTuple):
    """The arguments of a scan that are tensors."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None = None  # [H] or [H, P]
    z: torch.Tensor | None = None
    dt_bias: torch.Tensor | None = None
    initial_states: torch.Tensor | None = None
    seq_idx: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None

    def skip(self) -> torch.Tensor | None:
        """D as `[H, P]`."""
        return self.D if self.D is None or self.D.dim() == 2 else self.D[:, None].expand(self.x.shape[2:])


def tile(H: int, P: int, BT: int, numbers: int) -> dict[str, int]:
    """A tile of BT tokens and about so many numbers, in rows of heads next to each other."""
    BP = next_power_of_2(P)
    return dict(H=H, P=P, BT=BT, BH=min(next_power_of_2(H), max(1, numbers // (BT * BP))), BP=BP)


# Milliseconds at 16,384 tokens of 80 heads, P 64, in bf16 (H200): of the finish kernel, which moves 504 MB, and of its
# backward, which moves 839.
#   tokens, heads to a tile, warps    1, 16, 2     0.121 0.204
#                                     1, 16, 4     0.121 0.204
#                                     4, 8, 4      0.125 0.212
#                                     16, 1, 4     0.135 0.232
#                                     1, 128, 8    0.129 0.196
# The backward is faster with whole tokens where these are long, though 48 of the 128 heads are none. With 128 heads it
# takes 0.316 in place of 0.327. With 64 heads, at 4,096 tokens, it takes 0.053 in place of 0.050.
LONG = 8192  # numbers of a token, H and P filled up to powers of two


def rows_tile(H: int, P: int, device: torch.device, backward: bool = False) -> dict[str, int]:
    if not exists(device):  # the interpreter is slow with many programs
        return tile(H, P, 64, 64 * 1024) | dict(num_warps=2)
    if backward and next_power_of_2(H) * next_power_of_2(P) >= LONG:
        return tile(H, P, 1, LONG) | dict(num_warps=8)
    return tile(H, P, 1, 1024) | dict(num_warps=2)


@launcher
def launch_prepare(tensors, options: ScanOptions):
    dt, _, _, _, x, _, _, v = tensors
    B, T, H = dt.shape
    constants = tile(H, 1, 32, 1024) | dict(num_warps=4) if v is None else rows_tile(H, v.shape[3], dt.device)
    grid = B * cdiv(T, constants['BT']), cdiv(H, constants['BH']), 1
    args = *tensors, T, options.lowest, options.highest, *dt.stride(), *strides(x, 3)
    return prepare_kernel, grid, args, constants | dict(SOFTPLUS=options.softplus)


@launcher
def launch_prepare_backward(tensors, options: ScanOptions):
    dt, *_, dg, D, x, dv, do, _, _, _, sums = tensors
    B, T, H = dt.shape
    args = (
        *tensors, 0 if sums is None else sums.shape[2], T, options.lowest, options.highest,
        *dt.stride(), *strides(dg, 3), *strides(D, 2), *map_strides(x, dv, do),
    )  # fmt: skip
    constants = tile(H, 1, 32, 1024) if x is None else tile(H, x.shape[3], 4, 2048)
    constants |= dict(SOFTPLUS=options.softplus, TOKENS=TOKENS, num_warps=4)
    return prepare_backward_kernel, (B * cdiv(T, TOKENS), cdiv(H, constants['BH']), 1), args, constants


@launcher
def launch_finish(tensors, device):
    o, D, x, z, dy, *_ = tensors
    B, T, H, P = o.shape
    constants = dict(ROLE='y' if dy is None else 'dz') | rows_tile(H, P, device, dy is not None)
    args = *tensors, T, *strides(D, 2), *map_strides(x, z, dy)
    return finish_kernel, (B * cdiv(T, constants['BT']), cdiv(H, constants['BH']), 1), args, constants


def map_strides(*tensors: torch.Tensor | None) -> list[int]:
    return [stride for x in tensors for stride in strides(x, 3)]


class AsOperator(NamedTuple):
    """A scan as the operator."""

    inputs: Inputs
    steps: Steps | None  # what the sweeps take beyond the inputs: then v is x
    hopper: Sweeps | None
    setting: Setting


def is_folded(given: Tensors, options: ScanOptions) -> bool:
    """Whether the sweeps take the step sizes and D, and read x."""
    hopper = sweeps_for(given.C, given.B, given.x)
    of_head = given.D is None or given.D.dim() == 1
    return hopper is not None and hopper.pairs and options.is_positive() and of_head


def as_operator(given: Tensors, prepared: tuple, options: ScanOptions) -> AsOperator:
    """`prepared` are the step sizes and gates `[B, H, T]`, and v or None."""
    dt, g, v = prepared
    steps = Steps(dt.transpose(1, 2), given.skip()) if v is None else None
    state = transposed(given.initial_states)
    inputs = Inputs(given.C, given.B, given.x if v is None else v, g.transpose(1, 2), state, given.cu_seqlens)
    return AsOperator(inputs, steps, *chunk.choices(inputs, Options(1.0, precision=options.precision)))


@device_pass
def prepare_pass(tensors: tuple, options: ScanOptions):
    """The step sizes and gates `[B, H, T]`; and v, for sweeps that do not take these, or None."""
    given = Tensors(*tensors)
    x = given.x
    B, T, H, P = x.shape
    dt, g = (empty(x, B, H, T, dtype=torch.float32) for _ in range(2))
    x, v = (None, None) if is_folded(given, options) else (x, empty(x, B, T, H, P))
    launch_prepare((given.dt, given.dt_bias, given.A, given.seq_idx, x, dt, g, v), options)
    return dt, g, v


@device_pass
def forward_pass(tensors: tuple, options: ScanOptions):
    """y, the final states `[N, H, N, P]` or None; and for the backward what z gates, the states between segments, and
    the step sizes and gates, each or None.
    """
    given = Tensors(*tensors)
    dt, g, v = prepare_pass(tensors, options)
    inputs, steps, hopper, setting = as_operator(given, (dt, g, v), options)
    y = None
    if steps is not None and given.z is not None and given.z.dtype == given.x.dtype and takes(given.z):
        y = empty(given.x, *given.x.shape)
        steps = steps._replace(z=given.z, y=y)
    o, final_state, states, _ = chunk.forward_pass(inputs, Options(1.0, options.output), hopper, setting, steps)
    kept = None if setting.segment is None else states, *((None, None) if steps is None else (dt, g))
    D = given.skip() if steps is None else None
    if y is not None:
        return y, final_state, o, *kept
    if D is None and given.z is None:
        return o, final_state, None, *kept
    y = empty(o, *o.shape)
    launch_finish((o, D, None if D is None else given.x, given.z, None, y, None), given.x.device)
    return y, final_state, None if given.z is None else o, *kept


@device_pass
def finish_backward_pass(tensors: tuple):
    """The gradients of what z gates, and of z, from that, D and x, or None where D x is in it, z and dy."""
    o, D, x, z, dy = tensors
    do, dz = (empty(like, *z.shape) for like in (o, z))
    launch_finish((o, D, x, z, dy, do, dz), o.device)
    return do, dz


@device_pass
def backward_pass(tensors: tuple, options: ScanOptions, needs: Tensors):
    """The gradients of x and dt; sums of parts of those of D, if the sweeps make it, dt_bias and A; the gradients of B
    and C; parts of that of D, if the sweeps do not make it; and, transposed, the gradient of the initial states.

    The tensors are those of the forward, what the prepare pass has made, the states between segments or None, and the
    gradients of o and of the final states. None of those in the role of q is allocated here, as a dry run has to know
    their device.
    """
    given, (*prepared, states, do, dstates) = Tensors(*tensors[:11]), tensors[11:]
    x = given.x
    B, T, H, P = x.shape
    inputs, steps, _, setting = as_operator(given, tuple(prepared), options)
    needs_g = needs.dt or needs.A or needs.dt_bias
    parts = B * cdiv(T, TOKENS)
    if steps is not None:
        parts = max(parts, 8 * count_swept(B, T, setting.segment, given.cu_seqlens))
    sums = zeros(x, 3, H, parts, dtype=torch.float32) if needs_g or needs.D and steps is not None else None
    if steps is not None:
        ddt = empty(x, B, H, T, dtype=torch.float32).transpose(1, 2) if needs_g else None
        steps = steps._replace(ddt=ddt, dD=sums[0] if needs.D else None)
    found = chunk.backward_pass(
        (*inputs, inputs.initial_state if states is None else states, None, do, dstates),
        Gradients(needs.C, needs.B, needs.x or needs_g and steps is None, needs_g, needs.initial_states),
        setting,
        steps,
    )  # fmt: skip
    dx, ddt, dD, rows, dsteps = found.v, None, None, (None,) * 6, None
    if steps is None:
        dx = empty(x, B, T, H, P) if needs.x else None
        dD = empty(x, parts, H, P, dtype=torch.float32) if needs.D else None
        rows = given.skip(), x, found.v, None if given.D is None else do, dx, dD
    else:
        dsteps = steps.ddt
    if needs_g or steps is None and (needs.x or needs.D):
        ddt = empty(given.dt, B, T, H) if needs.dt else None
        given_dt = given.dt, given.dt_bias, given.A, prepared[0], dsteps, found.g
        launch_prepare_backward((*given_dt, *rows, ddt, sums if needs_g else None), options)
    return dx, ddt, sums, found.k, found.q, dD, found.initial_state


class ScanFunction(torch.autograd.Function):
    """A scan, computed by kernels in an ordinary eager call."""

    @staticmethod
    def forward(ctx: Any, options: ScanOptions, *tensors: Any) -> tuple:
        y, final_state, *kept = forward_pass(tensors, options)
        ctx.save_for_backward(*tensors, *kept)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None, dstate: torch.Tensor | None) -> tuple:
        tensors, (o, states, *gates) = ctx.saved_tensors[:11], ctx.saved_tensors[11:]
        given, needs, options = Tensors(*tensors), Tensors(*ctx.needs_input_grad[1:]), ctx.options
        folded = gates[0] is not None
        prepared = (*gates, None) if folded else prepare_pass(tensors, options)
        dy = torch.zeros_like(given.x) if dy is None else rows_in_place(dy)
        dz = None
        if given.z is None:
            dy = as_taken(dy, sweeps_for(given.C, given.B, given.x) is not None)
        else:
            of_D = (None, None) if folded or given.D is None else (given.skip(), given.x)
            dy, dz = finish_backward_pass((o, *of_D, given.z, dy))
        dx, ddt, sums, dB, dC, dD, dh0 = backward_pass((*tensors, *prepared, states, dy, dstate), options, needs)
        dA = dbias = None
        if sums is not None:
            of_D, dbias, dA = sums.sum(2)
            dD = of_D if dD is None else dD
        if dD is not None and dD.dim() == 3:  # of programs and channels
            dD = dD.sum((0, 2) if given.D.dim() == 1 else 0)
        found = Tensors(dx, ddt, dA, dB, dC, dD, dz, dbias, transposed(dh0))
        found = found._replace(
            **{name: getattr(found, name).to(getattr(given, name).dtype) for name in ('A', 'D', 'dt_bias')
               if getattr(needs, name)}
        )  # fmt: skip
        return None, *(x if need else None for x, need in zip(found, needs))


def composed(given: Tensors, options: ScanOptions) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y and the final states `[N, H, N, P]` or None, by operations of PyTorch before and after the operator."""
    x, dt, A, B, C, D, z, dt_bias, states, seq_idx, cu_seqlens = given
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if dt_bias is not None:
        dt = dt + dt_bias
    if options.softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(options.lowest, options.highest)
    g = dt * A
    if seq_idx is not None:
        begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        g = g.masked_fill(begins[:, :, None], -math.inf)
    # as the kernels, in x's dtype whatever autocast says
    has_autocast = x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if has_autocast else contextlib.nullcontext():
        y, final_states = chunk.chunk_simple_gla(
            C, B, (dt[..., None] * x).to(x.dtype), g, scale=1.0, initial_state=transposed(states),
            output_final_state=options.output, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    if D is not None:
        y = y + given.skip() * x
    if z is not None:
        y = y * F.silu(z.to(torch.promote_types(z.dtype, torch.float32)))
    return y.to(x.dtype), final_states


def takes_kernels(*tensors: torch.Tensor | None) -> bool:
    """Whether this is an ordinary eager call, with tensors that kernels read. The first is not None."""
    x: Any = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and none_is_active()
        and all(x is None or type(x) in PLAIN and not needs_operator(x) for x in tensors)
        and x.numel() > 0
        and runs_kernels(x)
    )


def check(given: Tensors, options: dict[str, Any]) -> None:
    """Raise a `TypeError` or `ValueError` if an argument is wrong, which it names."""
    x = given.x
    _validation._check_floats('x', x)
    if x.dim() != 4:
        raise ValueError(f'x must have 4 dimensions [batch, seqlen, nheads, headdim], got shape {list(x.shape)}')
    if x.dtype not in _validation.FLOATS and not (x.dtype == torch.float64 and x.device.type == 'cpu'):
        raise TypeError(f'x must be bfloat16, float16 or float32 (on the CPU float64 too), got {x.dtype}')
    batch, length, heads, dim = x.shape
    _validation._check_floats('B', given.B)
    if given.B.dim() != 4 or given.B.shape[2] == 0 or heads % given.B.shape[2]:
        raise ValueError(
            f"B must have shape [batch, seqlen, ngroups, dstate], x's {heads} heads a multiple of ngroups, got "
            f'{list(given.B.shape)}'
        )
    groups, size = given.B.shape[2:]
    for name, what, n in (('x', 'headdim', dim), ('B', 'dstate', size)):
        if not 1 <= n <= _validation.MAX_DIM:
            raise ValueError(f'{name} must have a {what} of 1 to {_validation.MAX_DIM}, got {n}')
    skip = [heads] if given.D is not None and given.D.dim() == 1 else [heads, dim]
    shapes = {
        'dt': ('[batch, seqlen, nheads]', [batch, length, heads]),
        'A': ('[nheads]', [heads]),
        'B': ('[batch, seqlen, ngroups, dstate]', [batch, length, groups, size]),
        'C': ('[batch, seqlen, ngroups, dstate]', [batch, length, groups, size]),
        'D': ('[nheads] or [nheads, headdim]', skip),
        'z': ('[batch, seqlen, nheads, headdim]', [batch, length, heads, dim]),
        'dt_bias': ('[nheads]', [heads]),
        'initial_states': ('[batch, nheads, headdim, dstate]', [batch, heads, dim, size]),
        'seq_idx': ('[batch, seqlen]', [batch, length]),
    }
    for name, (meaning, shape) in shapes.items():
        tensor = getattr(given, name)
        if tensor is None and name not in ('dt', 'A', 'B', 'C'):
            continue
        if name == 'seq_idx':
            _validation._check_integers(name, tensor, x)
        else:
            _validation._check_floats(name, tensor)
        _validation._check_shape(name, tensor, meaning, shape)
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
        if name in ('B', 'C') and tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")
    check_options(**options)
    if given.cu_seqlens is not None:
        _validation._check_integers('cu_seqlens', given.cu_seqlens, x)
        if batch != 1 or given.cu_seqlens.dim() != 1 or given.cu_seqlens.shape[0] < 2:
            shape = list(given.cu_seqlens.shape)
            raise ValueError(
                f'cu_seqlens must have shape [N + 1] with N >= 1, and x a batch of 1, got {shape} and {batch}'
            )


def check_options(chunk_size: int, dt_limit: tuple[float, float], state_dtype: torch.dtype | None) -> None:
    check_positive('chunk_size', chunk_size)
    if not isinstance(dt_limit, (tuple, list)) or not all(isinstance(x, Real) for x in dt_limit):
        raise TypeError(f'dt_limit must be a tuple of two numbers, got {dt_limit!r}')
    if len(dt_limit) != 2 or not dt_limit[0] <= dt_limit[1]:
        raise ValueError(f'dt_limit must be a smallest and a largest step size, got {dt_limit!r}')
    if state_dtype is not None and not (isinstance(state_dtype, torch.dtype) and state_dtype.is_floating_point):
        raise TypeError(f'state_dtype must be a floating dtype or None, got {state_dtype!r}')


def check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f'{name} must be an int, got {type(value).__name__}')
    if value < 1:
        raise ValueError(f'{name} must be positive, got {value}')


def as_contiguous(x: Any) -> Any:
    """Integers of tokens or sequences, which may be a slice of others'; what is no tensor as it is."""
    return x.contiguous() if isinstance(x, torch.Tensor) and x.layout is torch.strided and not x.is_nested else x


def scan(given: Tensors, options: ScanOptions) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y and the final states `[N, nheads, headdim, dstate]`, or None."""
    if takes_kernels(*given):
        rows = {name: rows_in_place(getattr(given, name)) for name in 'xBC'}
        z = None if given.z is None else rows_in_place(given.z)
        bias = None if given.dt_bias is None else given.dt_bias.contiguous()
        given = given._replace(**rows, z=z, dt_bias=bias, A=given.A.contiguous())
        y, states = ScanFunction.apply(options, *given)
    else:
        y, states = composed(given, options)
    return y, None if states is None else states.mT.contiguous()


def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """The scan of Mamba-2, as mamba_ssm's function of this name, by `chunk_simple_gla`.

    For each sequence and head::

        dt_t = clamp(softplus(dt_t + dt_bias), *dt_limit)
        h_t  = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
        y_t  = (h_t C_t + D x_t) * silu(z_t)

    Products are computed in x's dtype and summed in fp32; step sizes, gates, and what D and z add, in fp32.
    Differentiable in x, dt, A, B, C, D, z, dt_bias and initial_states, once, from y and the final states.

    Args:
        x: `[batch, seqlen, nheads, headdim]` in bfloat16, float16 or float32 (on the CPU float64 too), headdim up to
            512.
        dt: step sizes before the bias, `[batch, seqlen, nheads]`, of any floating dtype.
        A: `[nheads]`, negative where the state is to decay.
        B: `[batch, seqlen, ngroups, dstate]` in x's dtype, dstate up to 512. nheads is a multiple of ngroups: head h
            reads group `h // (nheads // ngroups)`.
        C: like B.
        chunk_size: tokens to a chunk. Accepted; the kernels have chunks of their own, and it changes no result.
        D: `[nheads]` or `[nheads, headdim]`. Default: zeros.
        z: `[batch, seqlen, nheads, headdim]`. Default: y is not gated.
        dt_bias: `[nheads]`. Default: zeros.
        initial_states: the states before the first token, `[batch, nheads, headdim, dstate]`. Default: zeros.
        seq_idx: `[batch, seqlen]`, int32 or int64: the number of each token's sequence. Where it changes, the state
            begins anew with zeros.
        cu_seqlens: `[N + 1]`, int32 or int64, of a batch of one: the boundaries of the sequences whose states
            `return_varlen_states` asks for. Without that it is not used, as in mamba_ssm: `seq_idx` keeps sequences
            apart.
        dt_softplus: whether softplus is applied to dt.
        dt_limit: the smallest and the largest step size.
        return_final_states: whether to return the states after the last token.
        return_varlen_states: whether to return the states after each sequence of cu_seqlens. They have no gradients.
        state_dtype: of the states that are returned. Default: float32.

    Returns:
        y `[batch, seqlen, nheads, headdim]` in x's dtype; or a tuple of y and, in this order, what is asked for of the
        final states `[batch, nheads, headdim, dstate]` and the states of sequences `[N, nheads, headdim, dstate]`.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value, or lacks another.

    Source: Dao and Gu, Transformers are SSMs (arXiv:2405.21060).

    Example::

        >>> import torch
        >>> from fla_simple_gla.adapters.mamba_ssm import mamba_chunk_scan_combined
        >>> x, dt, A = torch.randn(1, 100, 4, 64), torch.randn(1, 100, 4), -torch.rand(4)
        >>> B, C = torch.randn(2, 1, 100, 1, 128)
        >>> mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, dt_softplus=True).shape
        torch.Size([1, 100, 4, 64])
    """
    seq_idx = as_contiguous(seq_idx)
    given = Tensors(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, as_contiguous(cu_seqlens))
    check(given, dict(chunk_size=chunk_size, dt_limit=dt_limit, state_dtype=state_dtype))
    precision = None if torch.compiler.is_compiling() else fp32_precision(x.dtype)
    options = ScanOptions(bool(dt_softplus), *map(float, dt_limit), bool(return_final_states), precision)
    varlen_states = None
    if not return_varlen_states:
        y, final_states = scan(given._replace(cu_seqlens=None), options)
    elif cu_seqlens is None:
        raise ValueError('cu_seqlens must be given with return_varlen_states: it has the sequences')
    else:
        y, final_states = scan(given._replace(cu_seqlens=None), options)
        with torch.no_grad():
            # the same again, as packed sequences, each from zeros
            packed = given._replace(D=None, z=None, initial_states=None, seq_idx=None)
            _, varlen_states = scan(packed, options._replace(output=True))
    found = [y]
    for states, wanted in ((final_states, return_final_states), (varlen_states, return_varlen_states)):
        if wanted:
            found.append(states if state_dtype is None else states.to(state_dtype))
    return tuple(found) if len(found) > 1 else y
