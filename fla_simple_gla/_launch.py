"""Launches kernels: by triton, or without it.

At each launch triton binds the arguments anew, finds out which of their properties to specialise on, looks for the
compiled kernel, and encodes the tensor descriptors. That takes longer than a small kernel runs. Here triton makes only
the first launch of a kernel with some constants and specialisation. The compiled kernel is kept, and the CUDA driver is
called for later launches (`_driver.py`).

If a launch needs a kernel that is not compiled yet, there is a dry run of its pass, without memory and launches. It
tells which kernels the pass needs, and these are compiled side by side.
"""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from ._driver import Launch, Tiles, Variant
from ._passes import Pass, dry_run, thread
from ._private import current_stream, private, with_allocator
from ._triton import scratch

# Compiled kernels: by kernel, device, constants, and what triton specialises on (`Prepared.key`)
variants: dict[tuple, Variant] = {}
# The keys of kernels that `compile_side_by_side` has compiled, and that were not launched yet
ahead: set[tuple] = set()
# Held by the thread that compiles and loads kernels: one at a time, for two reasons. Triton up to 3.6 compiles a
# launcher in C for each signature, and all these modules have the same name. When Python is asked again for a module
# that it has loaded before, it puts the module's functions into the one that got the name last. That may be a module
# that another thread has just loaded, and is about to take the launcher from. And triton, up to 3.9 at least, lets a
# thread launch a kernel while another thread is still loading it.
loading = threading.RLock()


class Prepared(NamedTuple):
    """A launch as triton takes it."""

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple
    constants: dict[str, Any]  # and options

    def key(self, device: int) -> tuple:
        """What the compiled kernel depends on: all properties of the arguments that triton specialises on, or more."""
        kinds: list[Any] = []
        for arg, rule in zip(self.args, specialization_rules(self.kernel)):
            # most arguments are of one of the first two kinds
            if arg is None:
                kinds.append(None)
            elif type(arg) is int and 0 <= arg < 2**31 and (arg != 1 or rule == 'size'):
                kinds.append(rule == 'all' and arg % 16 == 0)
            else:
                kinds.append(argument_kind(arg, rule))
        return self.kernel, device, tuple(self.constants.items()), tuple(kinds)


def argument_kind(arg: Any, rule: str) -> Any:
    """The properties of an argument that triton may specialise on, for a number by one of `specialization_rules`."""
    if isinstance(arg, int) and not isinstance(arg, bool):
        size = 'i32' if -(2**31) <= arg < 2**31 else 'i64' if arg < 2**63 else 'u64'
        if rule == 'size':
            return size
        return size, arg == 1, rule == 'all' and arg % 16 == 0
    if isinstance(arg, Tiles):
        return arg.x.dtype, arg.block_shape, arg.layout
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    return type(arg)


@functools.cache
def specialization_rules(kernel: Any) -> list[str]:
    """For each argument of a kernel, the properties that triton specialises on if it is a number.

    'size': its integer type; 'one': also whether it is 1; 'all': also whether it is a multiple of 16.
    """

    def rule(parameter: Any) -> str:
        if getattr(parameter, 'do_not_specialize', False):
            return 'size'
        return 'one' if getattr(parameter, 'do_not_specialize_on_alignment', False) else 'all'

    parameters = getattr(kernel, 'params', None)
    return ['all'] * len(kernel.arg_names) if parameters is None else [*map(rule, parameters)]


def launcher(prepare: Callable) -> Callable:
    """Decorates a function that says how to launch a kernel. The result, `launch(tensors, *numbers)`, launches it.

    The function, `prepare(tensors, *numbers)`, returns the kernel, a grid of three numbers, the arguments, and a dict
    of constants and options. The tensors are the kernel's first arguments, in this order. Each is None, the tensor
    itself, or `Tiles` of it. In a dry run, tensors that the pass allocates are on the meta device.
    """

    @functools.wraps(prepare)
    def launch(tensors: tuple[torch.Tensor | None, ...], *numbers: Any) -> None:
        this = thread.running
        prepared = Prepared(*prepare(tensors, *numbers))
        if this is None or not this.direct:
            launch_by_triton(prepared)
        elif this.dry is not None:
            this.dry.append(prepared)
        else:
            started = launch_directly(prepared, tensors, this)
            if this.record is not None:
                this.record.launched(started, tensors)

    return launch


def launch_by_triton(prepared: Prepared) -> Any:
    """The compiled kernel, which triton has launched."""
    kernel, grid, given, constants = prepared
    args = for_triton(given)
    if constants.get('TMA'):  # the kernel makes descriptors, in memory that triton allocates
        return with_allocator(scratch, lambda: kernel[grid](*args, **constants))
    return kernel[grid](*args, **constants)


def for_triton(args: tuple) -> list:
    """The arguments as triton takes them: descriptors in place of `Tiles`."""
    return [arg.for_triton() if isinstance(arg, Tiles) else arg for arg in args]


def launch_directly(prepared: Prepared, tensors: tuple[Any, ...], this: Pass) -> Launch | None:
    """The launch that the driver has made; None where triton has made it.

    Triton makes it where the kernel is not compiled yet, and where its parameters are not understood.
    """
    key = prepared.key(this.device)
    variant = variants.get(key)
    if variant is None:
        with loading:
            variant = variants.get(key)  # another thread may have compiled it by now
            if variant is None:
                if key not in ahead:
                    compile_side_by_side(this)
                compiled = launch_by_triton(prepared)
                ahead.discard(key)
                # it is None if a hook of triton has stopped the launch
                if isinstance(compiled, private('triton.compiler.CompiledKernel')):
                    variants[key] = Variant(compiled, len(prepared.args))
                return None
    if not variant.is_understood:
        launch_by_triton(prepared)
        return None
    launch = Launch.of(variant, prepared.grid, prepared.args)
    launch.start([None if x is None else x.data_ptr() for x in tensors], tensors[0], current_stream(this.device))
    return launch


def compile_side_by_side(this: Pass) -> None:
    """Compile those kernels of a pass that are not compiled yet, and load them onto the device.

    They are compiled side by side, and so are the launchers that triton 3.6 compiles for them. They are loaded one by
    one (`loading`).
    """
    mode, future = private('triton.AsyncCompileMode'), private('triton.FutureKernel')
    launcher_class = private('triton.runtime.driver.active.launcher_cls')
    if mode is None or future is None or launcher_class is None:
        return
    new = {prepared.key(this.device): prepared for prepared in dry_run(this)}
    new = {key: prepared for key, prepared in new.items() if key not in variants and key not in ahead}
    if len(new) < 2:
        return
    ahead.update(new)

    def build(kernel: Any) -> Any:
        kernel = kernel.result() if isinstance(kernel, future) else kernel
        if kernel is not None:
            # This fills triton's cache on disk. The result is not used: it may have another module's functions
            # (`loading`).
            launcher_class(kernel.src, kernel.metadata)
        return kernel

    with ThreadPoolExecutor() as pool:
        with mode(pool):
            kernels = [
                kernel.warmup(*for_triton(args), grid=grid, **constants)
                for kernel, grid, args, constants in new.values()
            ]
        kernels = [*pool.map(build, kernels)]
    for kernel in kernels:
        _ = kernel and kernel.run  # loads it
