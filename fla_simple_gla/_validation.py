"""Checks the arguments of every mode, on the host: types, shapes and devices without synchronisation; and contents."""

import math
from numbers import Real
from typing import Any, NamedTuple

import torch

MAX_DIM = 512
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Call(NamedTuple):
    """The arguments of a call, by their public names. A mode without some argument leaves it at the default here."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None = None
    g_gamma: torch.Tensor | None = None
    initial_state: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    state_indices: torch.Tensor | None = None
    intermediate_states_buffer: torch.Tensor | None = None
    cu_seqlens_cpu: torch.Tensor | None = None
    scale: float | None = None
    output_final_state: bool = False
    state_v_first: bool = False
    reverse: bool = False
    chunk_size: int | None = None
    output_attentions: bool = False

    def optional_tensors(self) -> tuple[Any, ...]:
        """The tensors, and None for those that are not given."""
        return self[:TENSORS]

    def tensors(self) -> list[Any]:
        """The tensors that are given."""
        return [x for x in self[:TENSORS] if x is not None]


TENSORS = Call._fields.index('scale')  # so many of the arguments are tensors: they come first


def check_call(call: Call) -> float:
    """The scale. Raises a `TypeError` or `ValueError` if an argument is wrong.

    The error names the argument, what it must be and what it is.
    """
    _check_tokens(call)
    _check_gates(call)
    _check_packing(call)
    _check_states(call)
    for name in ('output_final_state', 'output_attentions', 'state_v_first', 'reverse'):
        value = getattr(call, name)
        if value is not None and not isinstance(value, bool):  # None is what some models pass for False
            raise TypeError(f'{name} must be a bool, got {type(value).__name__}')
    if call.output_attentions and call.cu_seqlens is not None:
        raise ValueError('output_attentions is not available with cu_seqlens: the map would be zero between sequences')
    _check_chunk_size(call.chunk_size)
    return _check_scale(call.scale, call.q.shape[-1])


def _check_tokens(call: Call) -> None:
    q, k, v = call.q, call.k, call.v
    for name, x in (('q', q), ('k', k), ('v', v)):
        _check_floats(name, x)
        if x.dim() != 4:
            raise ValueError(f'{name} must have 4 dimensions [B, T, H, D], got shape {_shape(x)}')
        _check_device(name, x, q)
    for name, x in (('k', k), ('v', v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    if q.dtype not in FLOATS and not (q.dtype == torch.float64 and q.device.type == 'cpu'):
        raise TypeError(f'q must be bfloat16, float16 or float32 (on the CPU float64 too), got {q.dtype}')
    B, T, HK, K = q.shape
    H, V = v.shape[2:]
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {_shape(q)}, got {_shape(k)}")
    if v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v must have q's batch and length {(B, T)}, got shape {_shape(v)}")
    if HK == 0 or H == 0 or H % HK:
        raise ValueError(f"v must have a multiple of q's {HK} heads, at least one, got {H}")
    for name, dim in (('q', K), ('v', V)):
        if not 1 <= dim <= MAX_DIM:
            raise ValueError(f'the head dimension of {name} must be 1 to {MAX_DIM}, got {dim}')


def _check_gates(call: Call) -> None:
    shapes = (('g', '[B, T, H]', [*call.v.shape[:3]]), ('g_gamma', '[H]', [call.v.shape[2]]))
    for name, meaning, shape in shapes:
        x = getattr(call, name)
        if x is not None:
            _check_floats(name, x)
            if call.g is None or call.g_gamma is None:
                _check_shape(name, x, meaning, shape)
            _check_device(name, x, call.q)
    if call.g is not None and call.g_gamma is not None:
        raise ValueError('g and g_gamma are both given: pass one of them, or neither')


def _check_packing(call: Call) -> None:
    q, cu_seqlens, copy = call.q, call.cu_seqlens, call.cu_seqlens_cpu
    if cu_seqlens is not None:
        _check_integers('cu_seqlens', cu_seqlens, q)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(f'cu_seqlens must have shape [N + 1] with N >= 1, got {_shape(cu_seqlens)}')
        if q.shape[0] != 1:
            raise ValueError(f'q must have a batch of 1 with cu_seqlens, got {q.shape[0]}: pack the sequences along T')
    if copy is not None:
        _check_dense('cu_seqlens_cpu', copy)
        if cu_seqlens is None:
            raise ValueError('cu_seqlens_cpu is given without cu_seqlens, of which it is a copy')
        if copy.device.type != 'cpu' or copy.shape != cu_seqlens.shape:
            what = f'shape {_shape(copy)} on {copy.device}'
            raise ValueError(f'cu_seqlens_cpu must be a copy of cu_seqlens {_shape(cu_seqlens)} on the CPU, got {what}')
        if copy.dtype not in (torch.int32, torch.int64):
            raise TypeError(f'cu_seqlens_cpu must be int32 or int64, got {copy.dtype}')


def _check_states(call: Call) -> None:
    q, state, indices, buffer = call.q, call.initial_state, call.state_indices, call.intermediate_states_buffer
    B, T, _, K = q.shape
    H, V = call.v.shape[2:]
    N = B if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    dims, names = ([V, K], 'H, V, K') if call.state_v_first is True else ([K, V], 'H, K, V')
    if indices is not None:
        _check_integers('state_indices', indices, q)
        _check_shape('state_indices', indices, '[N]', [N])
        if state is None:
            raise ValueError('state_indices is given without initial_state, the pool in which it names slots')
    if buffer is not None:
        _check_written('intermediate_states_buffer', buffer, q)
        _check_shape('intermediate_states_buffer', buffer, f'[B, T, {names}]', [B, T, H, *dims])
    if state is not None:
        _check_floats('initial_state', state)
        if indices is None:
            _check_shape('initial_state', state, f'[N, {names}]', [N, H, *dims])
        else:
            _check_written('initial_state', state, q)
            _check_shape('initial_state', state, f'with state_indices [P, {names}]', [*state.shape[:1], H, *dims])
        _check_device('initial_state', state, q)


def _check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is None:
        return
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
        raise TypeError(f'chunk_size must be an int or None, got {type(chunk_size).__name__}')
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f'chunk_size must be a power of two, got {chunk_size}')


def _check_scale(scale: float | None, K: int) -> float:
    if scale is None:
        return K**-0.5
    if not isinstance(scale, Real) or isinstance(scale, bool):
        raise TypeError(f'scale must be a number or None, got {type(scale).__name__}')
    if not -math.inf < scale < math.inf:
        raise ValueError(f'scale must be finite, got {scale}')
    return float(scale)


def check_no_gradients(call: Call) -> None:
    """Raise a `ValueError` if a tensor needs gradients: autograd cannot go back through states written in place."""
    if torch.is_grad_enabled():
        for name, x in zip(Call._fields, call.optional_tensors()):
            if x is not None and x.requires_grad:
                raise ValueError(
                    f'{name} must not need gradients with state_indices or intermediate_states_buffer, which are for '
                    'inference: call under torch.no_grad()'
                )


def under_autocast(call: Call) -> Call:
    """The call with q, k and v in the dtype of an enclosing `torch.autocast`. Gates and states keep their dtypes."""
    if not isinstance(call.q, torch.Tensor):
        return call
    device = 'cuda' if call.q.is_cuda else call.q.device.type
    if device == 'meta' or not torch.is_autocast_enabled(device):
        return call
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in call[:3])
    return Call(q, k, v, *call[3:])


def _check_dense(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f'{name} must be a torch.Tensor, got {type(x).__name__}')
    if x.is_nested:
        raise TypeError(
            f'{name} is a nested tensor: pack the sequences along T of a batch of one, and pass their boundaries as '
            'cu_seqlens'
        )
    if x.layout is not torch.strided:
        raise TypeError(f'{name} must be a dense (strided) tensor, got one of layout {x.layout}')
    if not torch.compiler.is_compiling() and any(base.__name__ == 'DTensor' for base in type(x).__mro__):
        raise TypeError(
            f'{name} is a DTensor: pass the part of this rank, {name}.to_local(), with the heads or the sequences split'
        )


def _check_floats(name: str, x: torch.Tensor) -> None:
    _check_dense(name, x)
    if not x.is_floating_point():
        raise TypeError(f'{name} must be a floating-point tensor, got {x.dtype}')


def _check_integers(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    _check_dense(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f'{name} must be int32 or int64, got {x.dtype}')
    if not x.is_contiguous():
        raise ValueError(f'{name} must be contiguous, got strides {x.stride()}')
    _check_device(name, x, q)


def _check_shape(name: str, x: torch.Tensor, meaning: str, shape: list[int]) -> None:
    if _shape(x) != shape:
        raise ValueError(f'{name} must have shape {meaning} = {shape}, got {_shape(x)}')


def _check_device(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")


def _check_written(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    """Check a tensor that is read and written in place."""
    _check_floats(name, x)
    if x.dtype not in FLOATS and not (x.dtype == torch.float64 and q.device.type == 'cpu'):
        raise TypeError(f'{name} is written in place, and must be bfloat16, float16 or float32, got {x.dtype}')
    if not torch.compiler.is_compiling() and x.is_neg():
        raise ValueError(f'{name} is written in place, and must not be a negated view: pass what it is a view of')
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)):
        raise ValueError(
            f'{name} is written in place, and must not overlap with itself: got strides {x.stride()} of shape '
            f'{_shape(x)}'
        )
    _check_device(name, x, q)


def _shape(x: torch.Tensor) -> list[int]:
    return list(x.shape)


def check_contents(
    cu_seqlens: torch.Tensor | None,
    cu_seqlens_cpu: torch.Tensor | None,
    state_indices: torch.Tensor | None,
    T: int,
    P: int = 0,
) -> None:
    """Raise a `ValueError` if the contents make no sense for T tokens and a pool of P slots. This waits for a GPU.

    Kernels do not need the check: if the contents are wrong, their results are zeros, or those of other sequences than
    were meant.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0:
            raise ValueError(f'cu_seqlens must begin with 0, got {bounds[0]}')
        for i, (start, end) in enumerate(zip(bounds, bounds[1:]), 1):
            if end < start:
                raise ValueError(f'cu_seqlens must never decrease, got {start} and then {end} at index {i}')
        if bounds[-1] > T:
            raise ValueError(f'cu_seqlens must not end beyond the {T} tokens, got {bounds[-1]}')
        if cu_seqlens_cpu is not None:
            for i, (copy, bound) in enumerate(zip(cu_seqlens_cpu.tolist(), bounds)):
                if copy != bound:
                    raise ValueError(
                        f'cu_seqlens_cpu must equal cu_seqlens, got {copy} at index {i} where that has {bound}'
                    )
    if state_indices is not None:
        named: dict[int, int] = {}
        for i, slot in enumerate(state_indices.tolist()):
            if slot >= P:
                raise ValueError(f'state_indices must be below the {P} slots of the pool, got {slot} at index {i}')
            if slot >= 0 and slot in named:
                raise ValueError(
                    f'state_indices must not name a slot twice, got {slot} at index {named[slot]} and at index {i}'
                )
            named[slot] = i
