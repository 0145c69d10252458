"""What every mode asks of its arguments, checked on the host from shapes, dtypes and devices alone: nothing synchronises."""

from numbers import Real

import torch

MAX_DIM = 512
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    g_gamma: torch.Tensor | None,
    scale: float | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    state_v_first: bool = False,
    state_indices: torch.Tensor | None = None,
    intermediate_states_buffer: torch.Tensor | None = None,
) -> float:
    """Raise a `TypeError` or `ValueError` that names the argument, what it got and what it needs; return the scale."""
    for name, x in (('q', q), ('k', k), ('v', v)):
        _check_tensor(name, x)
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

    if g is not None and g_gamma is not None:
        raise ValueError('g and g_gamma are both given: pass one of them, or neither')
    if g is not None:
        _check_tensor('g', g)
        if g.shape != (B, T, H):
            raise ValueError(f'g must have shape [B, T, H] = {[B, T, H]}, got {_shape(g)}')
        _check_device('g', g, q)
    if g_gamma is not None:
        _check_tensor('g_gamma', g_gamma)
        if g_gamma.shape != (H,):
            raise ValueError(f'g_gamma must have shape [H] = {[H]}, got {_shape(g_gamma)}')
        _check_device('g_gamma', g_gamma, q)

    N = B
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q)
        N = cu_seqlens.shape[0] - 1
    dims, names = ([V, K], 'H, V, K') if state_v_first else ([K, V], 'H, K, V')
    if state_indices is not None:
        _check_state_indices(state_indices, q, N)
        if initial_state is None:
            raise ValueError('state_indices is given without initial_state, the pool in which it names slots')
    if intermediate_states_buffer is not None:
        _check_written('intermediate_states_buffer', intermediate_states_buffer, q)
        shape = [B, T, H, *dims]
        if _shape(intermediate_states_buffer) != shape:
            got = _shape(intermediate_states_buffer)
            raise ValueError(f'intermediate_states_buffer must have shape [B, T, {names}] = {shape}, got {got}')
    if initial_state is not None:
        _check_tensor('initial_state', initial_state)
        shape, meaning = [N, H, *dims], f'[N, {names}]'
        if state_indices is not None:
            _check_written('initial_state', initial_state, q)
            shape, meaning = [*initial_state.shape[:1], H, *dims], f'with state_indices [P, {names}]'
        if _shape(initial_state) != shape:
            raise ValueError(f'initial_state must have shape {meaning} = {shape}, got {_shape(initial_state)}')
        _check_device('initial_state', initial_state, q)

    if scale is None:
        return K ** -0.5
    if not isinstance(scale, Real):
        raise TypeError(f'scale must be a number or None, got {type(scale).__name__}')
    return float(scale)


def check_no_gradients(**inputs: torch.Tensor | None) -> None:
    """What is written in place keeps no history: raise a `ValueError` if a gradient would be asked for."""
    if torch.is_grad_enabled():
        for name, x in inputs.items():
            if x is not None and x.requires_grad:
                raise ValueError(
                    f'{name} must not need gradients with state_indices or intermediate_states_buffer, which are for inference: call '
                    'under torch.no_grad()'
                )


def check_cu_seqlens_cpu(cu_seqlens_cpu: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> None:
    if cu_seqlens_cpu is None:
        return
    if not isinstance(cu_seqlens_cpu, torch.Tensor):
        raise TypeError(f'cu_seqlens_cpu must be a torch.Tensor, got {type(cu_seqlens_cpu).__name__}')
    if cu_seqlens is None:
        raise ValueError('cu_seqlens_cpu is given without cu_seqlens, of which it is a copy')
    if isinstance(cu_seqlens, torch.Tensor) and (cu_seqlens_cpu.device.type != 'cpu' or cu_seqlens_cpu.shape != cu_seqlens.shape):
        what = f'shape {_shape(cu_seqlens_cpu)} on {cu_seqlens_cpu.device}'
        raise ValueError(f'cu_seqlens_cpu must be a copy of cu_seqlens {_shape(cu_seqlens)} on the CPU, got {what}')


def check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is None:
        return
    if not isinstance(chunk_size, int):
        raise TypeError(f'chunk_size must be an int or None, got {type(chunk_size).__name__}')
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f'chunk_size must be a power of two, got {chunk_size}')


def under_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v in the dtype of an enclosing `torch.autocast`; gates and states are left in theirs."""
    device = tensors[0].device.type if isinstance(tensors[0], torch.Tensor) else 'cpu'
    if device == 'meta' or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in tensors)


def _check_tensor(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f'{name} must be a torch.Tensor, got {type(x).__name__}')
    if not x.is_floating_point():
        raise TypeError(f'{name} must be a floating-point tensor, got {x.dtype}')


def _check_device(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")


def _check_cu_seqlens(cu_seqlens: torch.Tensor, q: torch.Tensor) -> None:
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f'cu_seqlens must be a torch.Tensor, got {type(cu_seqlens).__name__}')
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f'cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}')
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f'cu_seqlens must have shape [N + 1] with N >= 1, got {_shape(cu_seqlens)}')
    if not cu_seqlens.is_contiguous():
        raise ValueError(f'cu_seqlens must be contiguous, got strides {cu_seqlens.stride()}')
    if q.shape[0] != 1:
        raise ValueError(f'q must have a batch of 1 with cu_seqlens, got {q.shape[0]}: pack the sequences along T')
    _check_device('cu_seqlens', cu_seqlens, q)


def _check_written(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    """What is read and written in place."""
    _check_tensor(name, x)
    if x.dtype not in FLOATS and not (x.dtype == torch.float64 and q.device.type == 'cpu'):
        raise TypeError(f'{name} is written in place, and must be bfloat16, float16 or float32, got {x.dtype}')
    if not torch.compiler.is_compiling() and x.is_neg():
        raise ValueError(f'{name} is written in place, and must not be a negated view: pass what it is a view of')
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)):
        raise ValueError(f'{name} is written in place, and must not overlap with itself: got strides {x.stride()} of shape {_shape(x)}')
    _check_device(name, x, q)


def _check_state_indices(state_indices: torch.Tensor, q: torch.Tensor, N: int) -> None:
    if not isinstance(state_indices, torch.Tensor):
        raise TypeError(f'state_indices must be a torch.Tensor, got {type(state_indices).__name__}')
    if state_indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f'state_indices must be int32 or int64, got {state_indices.dtype}')
    if state_indices.shape != (N,):
        raise ValueError(f'state_indices must have shape [N] = {[N]}, got {_shape(state_indices)}')
    if not state_indices.is_contiguous():
        raise ValueError(f'state_indices must be contiguous, got strides {state_indices.stride()}')
    _check_device('state_indices', state_indices, q)


def _shape(x: torch.Tensor) -> list[int]:
    return list(x.shape)


def check_contents(
    cu_seqlens: torch.Tensor | None, cu_seqlens_cpu: torch.Tensor | None, state_indices: torch.Tensor | None, T: int, P: int | None,
) -> None:
    """Raise a `ValueError` if the contents make no sense, of T tokens and a pool of P slots, or None. On a GPU it waits for them.

    Kernels do without: what is wrong there leads to zeros or to other sequences than were meant.
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
                    raise ValueError(f'cu_seqlens_cpu must equal cu_seqlens, got {copy} at index {i} where that has {bound}')
    if state_indices is not None:
        named = {}
        for i, slot in enumerate(state_indices.tolist()):
            if slot >= P:
                raise ValueError(f'state_indices must be below the {P} slots of the pool, got {slot} at index {i}')
            if slot >= 0 and slot in named:
                raise ValueError(f'state_indices must not name a slot twice, got {slot} at index {named[slot]} and at index {i}')
            named[slot] = i
