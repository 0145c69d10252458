"""All of a Mamba-2 layer between its two projections, under the name and with the parameters of mamba_ssm.

    [m0 | m1 | z | xBC | dt] = zxbcdt
    [x | B | C] = silu(conv(xBC))
    y = scan(x, dt, A, B, C, D)                    `_scan.py`
    y = y * silu(z), or the gated RMS norm of y    `_norm.py`
    out = [silu(m0) m1 | y] W^T + b

The convolution is that of the package causal_conv1d where it is installed, and PyTorch's elsewhere.
"""

import contextlib
import functools
import importlib
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import _validation
from ._norm import NormOptions, gated_rms_norm
from ._scan import as_contiguous, check_options, check_positive, mamba_chunk_scan_combined, takes_kernels

WIDTHS = (2, 3, 4)  # of the filters that causal_conv1d takes


class Tensors(NamedTuple):
    """The arguments that are tensors."""

    zxbcdt: torch.Tensor
    conv1d_weight: torch.Tensor
    conv1d_bias: torch.Tensor | None
    dt_bias: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor
    initial_states: torch.Tensor | None
    seq_idx: torch.Tensor | None
    rmsnorm_weight: torch.Tensor | None
    outproj_weight: torch.Tensor | None
    outproj_bias: torch.Tensor | None


class Options(NamedTuple):
    """The arguments that are no tensors."""

    chunk_size: int
    dt_limit: tuple[float, float]
    return_final_states: bool
    activation: str | None
    rmsnorm_eps: float
    headdim: int | None
    ngroups: int
    norm_before_gate: bool
    state_dtype: torch.dtype | None


class Sizes(NamedTuple):
    heads: int
    headdim: int
    state: int
    mlp: int  # channels of m0, and of m1

    @property
    def dim(self) -> int:
        return self.heads * self.headdim


@functools.cache
def causal_conv1d() -> Callable | None:
    """The function of the package, where it is installed."""
    try:
        return importlib.import_module('causal_conv1d').causal_conv1d_fn
    except ImportError:
        return None


def package_for(xBC: torch.Tensor, given: Tensors) -> Callable | None:
    """The function of causal_conv1d if it takes the convolution."""
    width, channels = given.conv1d_weight.shape[1], xBC.shape[2]
    if not xBC.is_cuda or width not in WIDTHS or channels % 8:
        return None
    return causal_conv1d() if takes_kernels(xBC, given.conv1d_weight, given.conv1d_bias, given.seq_idx) else None


def convolve(xBC: torch.Tensor, given: Tensors, activation: str | None) -> torch.Tensor:
    """The causal convolution of each channel, `[batch, seqlen, channels]`, and the activation."""
    _, weight, bias, *_ = given
    seq_idx = given.seq_idx
    kernel = package_for(xBC, given)
    if kernel is not None:
        # it reads 16 bytes at a time
        if xBC.data_ptr() % 16 or any(stride % 8 for stride in xBC.stride()[:2]) or xBC.stride(2) != 1:
            xBC = xBC.contiguous()
        seq_idx = None if seq_idx is None else seq_idx.int()
        return kernel(xBC.mT, weight.contiguous(), bias, seq_idx=seq_idx, activation=activation).mT
    dtype = torch.promote_types(xBC.dtype, weight.dtype)
    with without_autocast(xBC):
        if seq_idx is None and xBC.numel():
            # as PyTorch copies the transposed input, it may as well convert it
            x = xBC.mT.to(dtype, memory_format=torch.contiguous_format)
            filters, bias = weight.to(dtype)[:, None], None if bias is None else bias.to(dtype)
            y = F.conv1d(x, filters, bias, padding=weight.shape[1] - 1, groups=weight.shape[0])
            y = y[:, :, : xBC.shape[1]].mT
        else:
            y = convolve_sequences(xBC, given)
        return (y if activation is None else F.silu(y)).to(xBC.dtype)


def convolve_sequences(xBC: torch.Tensor, given: Tensors) -> torch.Tensor:
    """The convolution of each of the sequences of `seq_idx`, tap by tap, in fp32 or better."""
    _, weight, bias, *_ = given
    length, width = xBC.shape[1], weight.shape[1]
    dtype = functools.reduce(torch.promote_types, (xBC.dtype, weight.dtype, torch.float32))
    padded = F.pad(xBC, (0, 0, width - 1, 0))
    numbers: Any = None if given.seq_idx is None else F.pad(given.seq_idx, (width - 1, 0))
    y = torch.zeros((), dtype=dtype, device=xBC.device) if bias is None else bias.to(dtype)
    for i in range(width):
        tap = padded[:, i : i + length]
        if numbers is not None:
            tap = tap.masked_fill(numbers[:, i : i + length].ne(given.seq_idx)[:, :, None], 0.0)
        y = torch.addcmul(y, tap.to(dtype), weight[:, i].to(dtype))
    return y


def without_autocast(x: torch.Tensor) -> Any:
    """A context in which PyTorch computes in the dtypes that it is given."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else contextlib.nullcontext()


def autocasts(x: torch.Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def swiglu(m0: torch.Tensor, m1: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(m0.dtype, torch.float32)
    return (F.silu(m0.to(dtype)) * m1).to(m0.dtype)


def check(given: Tensors, options: Options) -> Sizes:
    """The sizes. Raises a `TypeError` or `ValueError` if an argument is wrong, which it names."""
    zxbcdt = given.zxbcdt
    tensors: tuple[Any, ...] = given
    for name, x in zip(Tensors._fields, tensors):
        if x is None and name not in ('zxbcdt', 'conv1d_weight', 'dt_bias', 'A', 'D'):
            continue
        if name == 'seq_idx':
            _validation._check_integers(name, x, x)
        else:
            _validation._check_floats(name, x)
        if x.device != zxbcdt.device:
            raise ValueError(f"{name} must be on zxbcdt's device {zxbcdt.device}, got {x.device}")
    if zxbcdt.dtype not in _validation.FLOATS and not (zxbcdt.dtype == torch.float64 and zxbcdt.device.type == 'cpu'):
        raise TypeError(f'zxbcdt must be bfloat16, float16 or float32 (on the CPU float64 too), got {zxbcdt.dtype}')
    if given.outproj_weight is None and given.outproj_bias is not None:
        raise ValueError('outproj_bias is given without outproj_weight')
    check_numbers(options, given.rmsnorm_weight is not None)
    sizes = find_sizes(given, options)
    heads, headdim, state, mlp = sizes
    batch, length, _ = zxbcdt.shape
    channels = given.conv1d_weight.shape[0]
    outputs = 0 if given.outproj_weight is None else given.outproj_weight.shape[:1].numel()
    shapes = {
        'conv1d_bias': ('[channels]', [channels]),
        'dt_bias': ('[nheads]', [heads]),
        'A': ('[nheads]', [heads]),
        'initial_states': ('[batch, nheads, headdim, dstate]', [batch, heads, headdim, state]),
        'seq_idx': ('[batch, seqlen]', [batch, length]),
        'rmsnorm_weight': ('[dim]', [sizes.dim]),
        'outproj_weight': ('[outputs, dim + d_nonssm]', [outputs, sizes.dim + mlp]),
        'outproj_bias': ('[outputs]', [outputs]),
    }
    for name, (meaning, shape) in shapes.items():
        if getattr(given, name) is not None:
            _validation._check_shape(name, getattr(given, name), meaning, shape)
    if not autocasts(zxbcdt):
        for name in ('outproj_weight', 'outproj_bias'):
            x = getattr(given, name)
            if x is not None and x.dtype != zxbcdt.dtype:
                raise TypeError(f"{name} must have zxbcdt's dtype {zxbcdt.dtype} outside of autocast, got {x.dtype}")
    return sizes


def find_sizes(given: Tensors, options: Options) -> Sizes:
    """The sizes, which follow from those of zxbcdt, D and conv1d_weight."""
    zxbcdt, weight, D, groups, headdim = (
        given.zxbcdt, given.conv1d_weight, given.D, options.ngroups, options.headdim
    )  # fmt: skip
    if zxbcdt.dim() != 3:
        raise ValueError(f'zxbcdt must have 3 dimensions [batch, seqlen, channels], got shape {list(zxbcdt.shape)}')
    if D.dim() not in (1, 2) or D.shape[0] == 0:
        raise ValueError(f'D must have shape [nheads] or [nheads, headdim], got {list(D.shape)}')
    heads = D.shape[0]
    if D.dim() == 2:
        if headdim is not None and headdim != D.shape[1]:
            raise ValueError(f"headdim must be D's second dimension {D.shape[1]} or None, got {headdim}")
        headdim = D.shape[1]
    elif headdim is None:
        raise ValueError('headdim must be given if D has one dimension, got None')
    if not 1 <= headdim <= _validation.MAX_DIM:
        raise ValueError(f'headdim must be 1 to {_validation.MAX_DIM}, got {headdim}')
    if heads % groups:
        raise ValueError(f"ngroups must be a divisor of D's {heads} heads, got {groups}")
    dim = heads * headdim
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f'conv1d_weight must have shape [channels, width], got {list(weight.shape)}')
    state, rest = divmod(weight.shape[0] - dim, 2 * groups)
    if rest or not 1 <= state <= _validation.MAX_DIM:
        raise ValueError(
            f'conv1d_weight must have nheads * headdim + 2 * ngroups * dstate = {dim} + {2 * groups} * dstate '
            f'channels, with a dstate of 1 to {_validation.MAX_DIM}, got {weight.shape[0]}'
        )
    mlp, rest = divmod(zxbcdt.shape[2] - dim - weight.shape[0] - heads, 2)
    if rest or mlp < 0:
        raise ValueError(
            'zxbcdt must have 2 * (d_nonssm + nheads * headdim + ngroups * dstate) + nheads = '
            f'2 * d_nonssm + {dim + weight.shape[0] + heads} channels, got {zxbcdt.shape[2]}'
        )
    return Sizes(heads, headdim, state, mlp)


def check_numbers(options: Options, has_norm: bool) -> None:
    check_options(options.chunk_size, options.dt_limit, options.state_dtype)
    if options.headdim is not None:
        check_positive('headdim', options.headdim)
    check_positive('ngroups', options.ngroups)
    for name in ('return_final_states', 'norm_before_gate'):
        value = getattr(options, name)
        if not isinstance(value, bool):
            raise TypeError(f'{name} must be a bool, got {type(value).__name__}')
    if options.activation not in (None, 'silu', 'swish'):
        raise ValueError(f"activation must be 'silu', 'swish' or None, got {options.activation!r}")
    # without the norm's weight some models pass None
    eps = options.rmsnorm_eps if has_norm else 0.0
    if not isinstance(eps, Real) or isinstance(eps, bool):
        raise TypeError(f'rmsnorm_eps must be a number, got {type(eps).__name__}')
    if not 0 <= eps < math.inf:
        raise ValueError(f'rmsnorm_eps must be finite and not negative, got {eps}')


def mamba_split_conv1d_scan_combined(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    chunk_size: int,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = 'silu',
    rmsnorm_weight: torch.Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: torch.Tensor | None = None,
    outproj_bias: torch.Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """All of a Mamba-2 layer between its two projections, and the second one, as mamba_ssm's function of this name.

    With dim = nheads * headdim, channels = dim + 2 * ngroups * dstate, and zxbcdt the first projection::

        [m0 | m1 | z | xBC | dt] = zxbcdt, of d_nonssm, d_nonssm, dim, channels and nheads channels
        [x | B | C]_t = activation(conv1d_bias + sum_i conv1d_weight[:, i] * xBC_{t - width + 1 + i})
        dt_t = clamp(softplus(dt_t + dt_bias), *dt_limit)
        h_t  = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
        y_t  = h_t C_t + D x_t
        y    = y * silu(z)                      without rmsnorm_weight
               norm(y) * silu(z)                with it
               norm(y * silu(z))                with it, and norm_before_gate false
        out  = [silu(m0) * m1 | y] outproj_weight^T + outproj_bias

    norm divides each of ngroups groups of dim / ngroups channels by `sqrt(mean of squares + rmsnorm_eps)`, and
    multiplies by rmsnorm_weight. d_nonssm is what remains of zxbcdt's channels, mostly 0. Without outproj_weight, out
    is `[silu(m0) * m1 | y]`.

    Each of the steps rounds its result to zxbcdt's dtype; sums, the scan's gates and the norm are computed in fp32. The
    convolution is that of the package causal_conv1d where it is installed and takes the tensors. Otherwise it is
    PyTorch's, with more memory and time, above all with seq_idx. Differentiable in all floating tensors, once, from out
    and the final states. Under autocast the last projection is in its dtype, and all else as without.

    Args:
        zxbcdt: `[batch, seqlen, 2 * d_nonssm + dim + channels + nheads]` in bfloat16, float16 or float32 (on the CPU
            float64 too). The other floating tensors may have any floating dtype, unless stated otherwise.
        conv1d_weight: `[channels, width]`. It tells dstate, which is up to 512.
        conv1d_bias: `[channels]`, or None: zeros.
        dt_bias: `[nheads]`.
        A: `[nheads]`, negative where the state is to decay.
        D: `[nheads]` or `[nheads, headdim]`.
        chunk_size: tokens to a chunk. Accepted; the kernels have chunks of their own, and it changes no result.
        initial_states: the states before the first token, `[batch, nheads, headdim, dstate]`. Default: zeros. The
            convolution begins with zeros in any case.
        seq_idx: `[batch, seqlen]`, int32 or int64: the number of each token's sequence. Where it changes, the state
            begins anew with zeros, and the convolution reads no token of another number. Default: a row is a sequence.
        dt_limit: the smallest and the largest step size.
        return_final_states: whether to return the states after the last token.
        activation: 'silu' or 'swish', which are the same, or None.
        rmsnorm_weight: `[dim]`. Default: there is no norm.
        rmsnorm_eps: added to the mean of squares.
        outproj_weight: `[outputs, dim + d_nonssm]` in zxbcdt's dtype, or under autocast in any. Default: no projection.
        outproj_bias: `[outputs]`, likewise. Default: zeros.
        headdim: channels of a head, up to 512. Needed if D has one dimension.
        ngroups: groups of heads, of which each has its B and C, and its norm; a divisor of nheads.
        norm_before_gate: whether the norm comes before the gate silu(z).
        state_dtype: of the states that are returned. Default: float32.

    Returns:
        out `[batch, seqlen, outputs]`, or without outproj_weight `[batch, seqlen, dim + d_nonssm]`, in zxbcdt's dtype
        or, under autocast, that of the projection; with return_final_states a tuple of out and the final states
        `[batch, nheads, headdim, dstate]`.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value, or lacks another.

    Source: Dao and Gu, Transformers are SSMs (arXiv:2405.21060).

    Example::

        >>> import torch
        >>> from fla_simple_gla.adapters.mamba_ssm import mamba_split_conv1d_scan_combined
        >>> nheads, headdim, dstate = 4, 64, 128
        >>> channels = nheads * headdim + 2 * dstate
        >>> zxbcdt = torch.randn(1, 100, nheads * headdim + channels + nheads)
        >>> weight, bias = torch.randn(channels, 4), torch.randn(channels)
        >>> dt_bias, A, D = torch.randn(nheads), -torch.rand(nheads), torch.randn(nheads)
        >>> mamba_split_conv1d_scan_combined(zxbcdt, weight, bias, dt_bias, A, D, chunk_size=256, headdim=headdim).shape
        torch.Size([1, 100, 256])
    """
    seq_idx = as_contiguous(seq_idx)
    given = Tensors(
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, initial_states, seq_idx, rmsnorm_weight, outproj_weight,
        outproj_bias,
    )  # fmt: skip
    options = Options(
        chunk_size, dt_limit, return_final_states, activation, rmsnorm_eps, headdim, ngroups, norm_before_gate,
        state_dtype,
    )  # fmt: skip
    heads, _, _, mlp = sizes = check(given, options)
    dim, channels = sizes.dim, conv1d_weight.shape[0]
    m0, m1, z, xBC, dt = zxbcdt.split([mlp, mlp, dim, channels, heads], -1)
    x, B, C = convolve(xBC, given, activation).split([dim, (channels - dim) // 2, (channels - dim) // 2], -1)
    x, z_of_heads = (tensor.unflatten(2, (heads, -1)) for tensor in (x, z))
    B, C = (tensor.unflatten(2, (ngroups, -1)) for tensor in (B, C))
    scanned = mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D, z_of_heads if rmsnorm_weight is None else None, dt_bias, initial_states, seq_idx,
        dt_softplus=True, dt_limit=dt_limit, return_final_states=return_final_states,
        state_dtype=state_dtype,
    )  # fmt: skip
    y, states = scanned if return_final_states else (scanned, None)
    out = y.flatten(2)
    if rmsnorm_weight is not None:
        out = gated_rms_norm(out, z, rmsnorm_weight, NormOptions(float(rmsnorm_eps), dim // ngroups, norm_before_gate))
    if mlp:
        out = torch.cat([swiglu(m0, m1), out], -1)
    if outproj_weight is not None:
        out = F.linear(out, outproj_weight, outproj_bias)
    return (out, states) if return_final_states else out
