"""The gated RMS norm of Mamba-2. A row of channels is normalised in groups of G:

    n = x / sqrt(mean(x^2) + eps) * weight

    norm first      x = y            out = n * silu(z)
    gate first      x = y * silu(z)  out = n

One kernel makes the forward and one the backward. A program goes through tiles of BR rows of one group, and reads each
number once: a tile stays in registers from the sum of squares on. All arithmetic is in fp32. With rstd the factor
1 / sqrt(mean(x^2) + eps), u = x rstd and du the gradient of u, the backward of the norm is

    dx = rstd (du - u mean(u du))

The gradient of weight is a sum over rows. Each program adds up those of its rows, and PyTorch adds up the programs.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .._launch import launcher
from .._layout import cdiv, multiprocessors, next_power_of_2, rows_in_place, strides
from .._passes import device_pass, empty
from .._triton import jit, kernel_name, tl
from ._scan import takes_kernels

MAX_GROUP = 16384  # channels: larger groups do not fit into the registers of a program
SHARED_BYTES = 96 * 1024  # of a program, at most: GPUs from sm_80 on have 99 KiB or more
STRIDES = ['y_b', 'y_t', 'z_b', 'z_t', 'dout_b', 'dout_t']


@jit
def row_offsets(o_r, T, s_b, s_t, UNIT: tl.constexpr):
    """Offsets of rows of a tensor [B, T, channels], whose strides are given in units of UNIT numbers."""
    i_b = o_r // T
    return ((i_b.to(tl.int64) * s_b + (o_r - i_b * T).to(tl.int64) * s_t) * UNIT)[:, None]


@jit(do_not_specialize=['R', 'T', 'eps', *STRIDES[:4]], repr=kernel_name('gated_norm'))
def norm_kernel(
    y, z,  # [B, T, C], any strides with contiguous rows
    weight,  # [C]
    out,  # [B, T, C]
    rstd,  # [B * T, C // G], or None
    R,  # B * T
    T, eps,
    y_b, y_t,
    z_b, z_t,
    C: tl.constexpr, G: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr,
    UNIT: tl.constexpr,  # of the strides, so that the compiler knows what divides them
    NORM_FIRST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out and rstd of one group, in tiles of BR rows. The programs of a group take turns."""
    i_g = tl.program_id(1)
    o_c = i_g * G + tl.arange(0, BG)[None, :]
    m_c = tl.arange(0, BG)[None, :] < G
    b_w = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    tiles = tl.cdiv(tl.cdiv(R, BR) - tl.program_id(0), tl.num_programs(0))
    for i in tl.range(tiles, num_stages=STAGES):
        o_r = (tl.program_id(0) + i * tl.num_programs(0)) * BR + tl.arange(0, BR)
        m_r = o_r < R
        mask = m_r[:, None] & m_c
        b_x = tl.load(y + row_offsets(o_r, T, y_b, y_t, UNIT) + o_c, mask=mask, other=0.0).to(tl.float32)
        b_z = tl.load(z + row_offsets(o_r, T, z_b, z_t, UNIT) + o_c, mask=mask, other=0.0).to(tl.float32)
        gate = b_z * tl.sigmoid(b_z)
        if not NORM_FIRST:
            b_x *= gate
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / G + eps)
        b_o = b_x * b_rstd[:, None] * b_w
        if NORM_FIRST:
            b_o *= gate
        tl.store(out + o_r.to(tl.int64)[:, None] * C + o_c, b_o, mask=mask)
        if rstd is not None:
            tl.store(rstd + o_r.to(tl.int64) * (C // G) + i_g, b_rstd, mask=m_r)


@jit(do_not_specialize=['R', 'T', *STRIDES], repr=kernel_name('gated_norm_backward'))
def norm_backward_kernel(
    y, z, dout,  # [B, T, C], any strides with contiguous rows
    weight,  # [C]
    rstd,  # [B * T, C // G]
    dy, dz,  # [B, T, C], or None
    dweight,  # [programs, C]: parts, or None
    R,  # B * T
    T,
    y_b, y_t,
    z_b, z_t,
    dout_b, dout_t,
    C: tl.constexpr, G: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr,
    UNIT: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of y and z in one group, in tiles of BR rows, and a part of that of weight. Programs take turns."""
    i_g = tl.program_id(1)
    o_c = i_g * G + tl.arange(0, BG)[None, :]
    m_c = tl.arange(0, BG)[None, :] < G
    b_w = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BR, BG], tl.float32)
    tiles = tl.cdiv(tl.cdiv(R, BR) - tl.program_id(0), tl.num_programs(0))
    for i in tl.range(tiles, num_stages=STAGES):
        o_r = (tl.program_id(0) + i * tl.num_programs(0)) * BR + tl.arange(0, BR)
        m_r = o_r < R
        mask = m_r[:, None] & m_c
        b_y = tl.load(y + row_offsets(o_r, T, y_b, y_t, UNIT) + o_c, mask=mask, other=0.0).to(tl.float32)
        b_z = tl.load(z + row_offsets(o_r, T, z_b, z_t, UNIT) + o_c, mask=mask, other=0.0).to(tl.float32)
        b_do = tl.load(dout + row_offsets(o_r, T, dout_b, dout_t, UNIT) + o_c, mask=mask, other=0.0).to(tl.float32)
        b_rstd = tl.load(rstd + o_r.to(tl.int64) * (C // G) + i_g, mask=m_r, other=0.0)[:, None]
        open = tl.sigmoid(b_z)
        gate = b_z * open
        b_s = b_y * (open + gate * (1.0 - open))  # the derivative of y silu(z) by z
        o_o = o_r.to(tl.int64)[:, None] * C + o_c
        if NORM_FIRST:
            b_u = b_y * b_rstd
            b_dw += b_do * gate * b_u
            b_du = b_do * gate * b_w
            if dz is not None:
                tl.store(dz + o_o, b_do * b_w * b_s * b_rstd, mask=mask)
        else:
            b_u = b_y * gate * b_rstd
            b_dw += b_do * b_u
            b_du = b_do * b_w
        b_dx = b_rstd * (b_du - b_u * (tl.sum(b_u * b_du, 1) / G)[:, None])
        if NORM_FIRST:
            if dy is not None:
                tl.store(dy + o_o, b_dx, mask=mask)
        else:
            if dy is not None:
                tl.store(dy + o_o, b_dx * gate, mask=mask)
            if dz is not None:
                tl.store(dz + o_o, b_dx * b_s, mask=mask)
    if dweight is not None:
        o_w = tl.program_id(0).to(tl.int64) * C + i_g * G + tl.arange(0, BG)
        tl.store(dweight + o_w, tl.sum(b_dw, 0), mask=tl.arange(0, BG) < G)


class NormOptions(NamedTuple):
    eps: float
    group: int  # channels
    norm_first: bool


class NormConfig(NamedTuple):
    """How a kernel is cut: `rows` of a group to a tile, `warps` and stages of loads to a program, and how many programs
    there are to a multiprocessor; as many as there are tiles if that is None.
    """

    rows: int
    warps: int
    stages: int = 1
    resident: int | None = None


# Milliseconds for 16,384 rows in bf16 on one H200 (triton 3.6), of the forward and of the backward with the sum of the
# parts of dweight; and how long the bytes take at 4.27 TB/s. Rows, warps, stages, programs to a multiprocessor:
#   one group of 5120 channels     1, 8, 3, 2     0.142                       1, 8, 3, 1    0.272
#                                  1, 8, 2, 2     0.181                       1, 16, 3, 1   0.328
#                                  1, 8, 1, all   0.195                       1, 16, 2, 1   0.399
#                                  (the bytes)    0.118                                     0.197
#   8 groups of 1024 channels      2, 4, 3, 8     0.222                       1, 2, 3, 8    0.361
#                                  4, 4, 2, 8     0.239                       1, 4, 3, 7    0.366
#                                  4, 4, 1, all   0.249                       1, 4, 2, 7    0.485
#                                  (the bytes)    0.189                                     0.314
def forward_config(group: int, size: int) -> NormConfig:
    """Of numbers of so many bytes."""
    BG = next_power_of_2(group)
    rows, warps = max(1, 2048 // BG), min(16, max(4, BG // 1024))
    # All stages but one lie in shared memory, two tiles each.
    stages = 1 + min(2, SHARED_BYTES // (2 * rows * BG * size))
    return NormConfig(rows, warps, stages, 8 if warps == 4 else 16 // warps)


def backward_config(group: int, size: int) -> NormConfig:
    BG = next_power_of_2(group)
    rows = max(1, 1024 // BG)
    warps = min(16, max(2, BG // 512)) if BG < 8192 else BG // 1024
    # likewise, three tiles each
    stages = 1 + min(2, SHARED_BYTES // (3 * rows * BG * size))
    return NormConfig(rows, warps, stages, 16 // warps if BG < 8192 else 1)


def count_programs(y: torch.Tensor, group: int, config: NormConfig) -> int:
    """Programs to a group of channels."""
    B, T, C = y.shape
    tiles = cdiv(B * T, config.rows)
    if config.resident is None:
        return tiles
    # in the interpreter as many as make each kernel go through several tiles
    processors = multiprocessors(y.device) if y.is_cuda else 2
    return min(tiles, max(1, processors * config.resident // (C // group)))


def common(config: NormConfig, options: NormOptions, *tensors: torch.Tensor) -> tuple[list[int], dict[str, Any]]:
    """The strides of tensors that kernels read, in units, and the constants."""
    C, G = tensors[0].shape[2], options.group
    given = [stride for x in tensors for stride in strides(x, 2)]
    unit = 8 if all(stride % 8 == 0 for stride in given) else 1
    constants = dict(
        C=C, G=G, BR=config.rows, BG=next_power_of_2(G), UNIT=unit, NORM_FIRST=options.norm_first,
        STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return [stride // unit for stride in given], constants


@launcher
def launch_norm(tensors, options: NormOptions):
    y, z, *_ = tensors
    B, T, C = y.shape
    config = forward_config(options.group, y.itemsize)
    given, constants = common(config, options, y, z)
    grid = count_programs(y, options.group, config), C // options.group, 1
    return norm_kernel, grid, (*tensors, B * T, T, options.eps, *given), constants


@launcher
def launch_norm_backward(tensors, options: NormOptions):
    y, z, dout, *_ = tensors
    B, T, C = y.shape
    config = backward_config(options.group, y.itemsize)
    given, constants = common(config, options, y, z, dout)
    grid = count_programs(y, options.group, config), C // options.group, 1
    return norm_backward_kernel, grid, (*tensors, B * T, T, *given), constants


@device_pass
def forward_pass(tensors: tuple, options: NormOptions, needs_backward: bool) -> tuple:
    """out, and rstd `[B * T, groups]` or None."""
    y, z, weight = tensors
    B, T, C = y.shape
    out = empty(y, B, T, C)
    rstd = empty(y, B * T, C // options.group, dtype=torch.float32) if needs_backward else None
    launch_norm((y, z, weight, out, rstd), options)
    return out, rstd


@device_pass
def backward_pass(tensors: tuple, options: NormOptions, needs: tuple[bool, bool, bool]) -> tuple:
    """The gradients of y, z and weight, None for those that are not needed; of weight parts `[programs, C]`."""
    y, z, _, _, _ = tensors
    dy = empty(y, *y.shape) if needs[0] else None
    dz = empty(z, *z.shape) if needs[1] else None
    parts = None
    if needs[2]:
        programs = count_programs(y, options.group, backward_config(options.group, y.itemsize))
        parts = empty(y, programs, y.shape[2], dtype=torch.float32)
    launch_norm_backward((*tensors, dy, dz, parts), options)
    return dy, dz, parts


class NormFunction(torch.autograd.Function):
    """The norm, computed by kernels in an ordinary eager call."""

    @staticmethod
    def forward(ctx: Any, options: NormOptions, *tensors: torch.Tensor) -> torch.Tensor:
        out, rstd = forward_pass(tensors, options, True)
        ctx.save_for_backward(*tensors, rstd)
        ctx.options = options
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple:
        y, z, weight, rstd = ctx.saved_tensors
        given = y, z, rows_in_place(dout), weight, rstd
        dy, dz, parts = backward_pass(given, ctx.options, tuple(ctx.needs_input_grad[1:]))
        return None, dy, dz, None if parts is None else parts.sum(0).to(weight.dtype)


def composed(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, options: NormOptions) -> torch.Tensor:
    """The norm by operations of PyTorch."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    x, gate = y.to(dtype), F.silu(z.to(dtype))
    if not options.norm_first:
        x = x * gate
    groups = x.unflatten(-1, (-1, options.group))
    n = (groups * (groups.square().mean(-1, keepdim=True) + options.eps).rsqrt()).flatten(-2) * weight.to(dtype)
    return (n * gate if options.norm_first else n).to(y.dtype)


def gated_rms_norm(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, options: NormOptions) -> torch.Tensor:
    """The norm of y `[B, T, C]` with gates z, of the same shape, and weight `[C]`, in y's dtype.

    C is a multiple of `options.group`. Differentiable in y, z and weight, once.
    """
    if options.group > MAX_GROUP or not takes_kernels(y, z, weight):
        return composed(y, z, weight, options)
    tensors = rows_in_place(y), rows_in_place(z), weight.contiguous()
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return NormFunction.apply(options, *tensors)
    return forward_pass(tensors, options, False)[0]
