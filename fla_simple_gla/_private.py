"""All names of PyTorch and Triton that their authors do not promise to keep.

Each is looked up when it is first needed, never at import. If a version lacks a name, only the feature or the speed is
lost that stands beside the name.
"""

import contextvars
import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad

# Each name, and what is lost without it
NAMES = {
    'torch._C._FunctionBase': 'speed: a microsecond at each call that may need gradients',
    'torch._C._are_functorch_transforms_active': "our own error for transforms of torch.func: PyTorch's is raised",
    'torch._C._len_torch_dispatch_stack': 'a `TorchDispatchMode` sees the allocations of a mode, and not one operator',
    'torch._C._cuda_getCurrentRawStream': 'speed: some microseconds at each launch',
    'torch.Tensor._is_zerotensor': "gradients that PyTorch keeps as zeros without memory: they are PyTorch's error",
    'torch._library.fake_impl.allocate_size': 'compiled calls with a symbolic length: each length gets its own graph',
    'torch.autograd.forward_ad._current_level': 'speed: some microseconds at each call',
    'triton.AsyncCompileMode': 'time: the kernels of a first call are compiled one by one',
    'triton.FutureKernel': 'the same',
    'triton.runtime.driver.active.launcher_cls': 'the same',
    'triton.compiler.CompiledKernel': 'speed: kernels are launched by triton',
    'triton.knobs': 'the same',
    'triton.runtime._allocation': 'with triton 3.4: the allocator that the user gave triton, which ours replaces',
}


@functools.cache
def private(name: str) -> Any:
    """The object with this name, one of `NAMES`; None where there is none."""
    assert name in NAMES
    package, *rest = name.split('.')
    try:
        found = importlib.import_module(package)
        for i, part in enumerate(rest, 1):
            try:
                found = getattr(found, part)
            except AttributeError:
                found = importlib.import_module('.'.join([package, *rest[:i]]))
    except (ImportError, AttributeError, RuntimeError):  # triton has no driver where there is no GPU
        return None
    return found


def apply_without_transforms(function: type[torch.autograd.Function]) -> Callable:
    """`function.apply` without the part that serves the transforms of torch.func, which takes time at every call."""
    base = private('torch._C._FunctionBase')
    found: Any = function if base is None else super(torch.autograd.Function, function)
    return found.apply


def transforms_are_active() -> bool:
    """Whether the call is inside a transform of torch.func."""
    ask = private('torch._C._are_functorch_transforms_active')
    return ask is not None and ask()


def dispatch_modes_are_active() -> bool:
    """Whether a `TorchDispatchMode` watches the call."""
    ask = private('torch._C._len_torch_dispatch_stack')
    return ask is not None and ask() > 0


def none_is_active() -> bool:
    """Whether no forward-mode differentiation, no transform and no dispatch mode is active."""
    transforms = private('torch._C._are_functorch_transforms_active')
    modes = private('torch._C._len_torch_dispatch_stack')
    try:
        return forward_ad._current_level < 0 and not transforms() and not modes()
    except (AttributeError, TypeError):  # a version that lacks one of them
        return False


def is_zero_tensor(x: torch.Tensor) -> bool:
    """Whether x stands for zeros without memory, as PyTorch makes them for gradients."""
    ask = private('torch.Tensor._is_zerotensor')
    return ask is not None and ask(x)


def has_tangent(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether one of the tensors is a dual number of forward-mode differentiation."""
    if getattr(forward_ad, '_current_level', 0) < 0:  # a number that changes: `private` would keep the first
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def new_symbolic_size() -> Any:
    """A size that a trace does not know, for a fake implementation of an operator."""
    context = torch.library.get_ctx()
    allocate = private('torch._library.fake_impl.allocate_size')
    shapes = getattr(context, '_shape_env', None)
    # `new_dynamic_size` calls `allocate_size` in the end. Before, unless `capture_dynamic_output_shape_ops` is set, it
    # refuses where graphs may break, and with torch 2.8 and 2.9 everywhere. That is meant for sizes that depend on
    # data.
    return context.new_dynamic_size() if allocate is None or shapes is None else allocate(shapes)


def current_stream(device: int) -> int:
    """PyTorch's current CUDA stream on the device."""
    ask = private('torch._C._cuda_getCurrentRawStream')
    return torch.cuda.current_stream(device).cuda_stream if ask is None else ask(device)


def launches_are_observed() -> bool:
    """Whether a setting or a hook of triton changes or watches compilations or launches: triton must make them then."""
    knobs = private('triton.knobs')
    try:
        runtime = knobs.runtime
        return bool(
            runtime.debug
            or knobs.compilation.instrumentation_mode
            or runtime.add_stages_inspection_hook is not None
            or runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
        )
    except AttributeError:  # a version with other names or other hooks
        return True


def with_allocator(allocator: Callable, call: Callable) -> Any:
    """The result of `call()`, during which triton's kernels get memory from this allocator, and not from the user's."""
    import triton

    def run() -> Any:
        triton.set_allocator(allocator)
        return call()

    before = private('triton.runtime._allocation')
    if before is None or isinstance(getattr(before, '_allocator', None), contextvars.ContextVar):
        return contextvars.copy_context().run(run)
    # triton 3.4 has a global in place of a context variable
    previous = before._allocator
    try:
        return run()
    finally:
        triton.set_allocator(previous)
