"""Launches of kernels, as triton does them or without it.

At each launch triton binds the arguments anew, finds out what of them to specialise on, looks for the kernel, and encodes the tensor
descriptors: that takes longer than a small kernel runs. Here the first launch of a kernel with some constants and specialisation is
triton's; the compiled kernel is kept, and the CUDA driver is called for later ones (`_driver.py`).

When a launch needs a kernel that is not compiled yet, its pass is gone through once without memory and launches, to find out which
kernels there will be, and these are compiled side by side.
"""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from ._driver import Launch, Tiles, Variant
from ._passes import Pass, dry_run, thread
from ._private import current_stream, private, with_allocator
from ._triton import scratch

# Compiled kernels: by kernel, device, constants, and what triton specialises on
variants = {}
# The keys of those that were compiled ahead and are to be launched yet
ahead = set()
# Held by the one thread that compiles and loads kernels, which others may be about to launch. Triton up to 3.6 compiles a launcher in C for
# each signature, and all these modules have one name. Python, asked again for one that it has loaded before, puts its functions into the
# module that got the name last: it may be one that another thread has just loaded, and is about to take the launcher from. And triton, up
# to 3.9 at least, lets a thread launch a kernel that another is still loading.
loading = threading.RLock()


class Prepared(NamedTuple):
    """A launch as triton takes it."""

    kernel: object
    grid: tuple[int, int, int]
    args: tuple
    constants: dict  # and options

    def key(self, device: int) -> tuple:
        """What the compiled kernel depends on, or more: triton specialises on no more of an argument than this tells."""
        kinds = []
        for arg, rule in zip(self.args, specialization_rules(self.kernel)):
            # most are one of these two
            if arg is None:
                kinds.append(None)
            elif type(arg) is int and 0 <= arg < 2**31 and (arg != 1 or rule == 'size'):
                kinds.append(rule == 'all' and arg % 16 == 0)
            else:
                kinds.append(argument_kind(arg, rule))
        return self.kernel, device, tuple(self.constants.items()), tuple(kinds)


def argument_kind(arg, rule: str):
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
def specialization_rules(kernel) -> list[str]:
    """What triton specialises on of each number that a kernel takes: its size, also whether it is one, or all."""

    def rule(parameter):
        if getattr(parameter, 'do_not_specialize', False):
            return 'size'
        return 'one' if getattr(parameter, 'do_not_specialize_on_alignment', False) else 'all'

    parameters = getattr(kernel, 'params', None)
    return ['all'] * len(kernel.arg_names) if parameters is None else [*map(rule, parameters)]


def launcher(prepare: Callable) -> Callable:
    """Decorates a function that tells how to launch a kernel, which is then called as `launch(tensors, *numbers)`.

    The function, `prepare(tensors, *numbers)`, returns the kernel, a grid of three, the arguments, and the constants and options. The
    tensors are the kernel's first arguments, in this order, each None, as it is or in `Tiles`. In a dry run those that the pass allocates
    are on the meta device.
    """

    @functools.wraps(prepare)
    def launch(tensors: tuple[torch.Tensor | None, ...], *numbers) -> None:
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


def launch_by_triton(prepared: Prepared):
    kernel, grid, args, constants = prepared
    args = for_triton(args)
    if constants.get('TMA'):  # such a kernel makes descriptors, in memory that triton allocates
        return with_allocator(scratch, lambda: kernel[grid](*args, **constants))
    return kernel[grid](*args, **constants)


def for_triton(args: tuple) -> list:
    return [arg.for_triton() if isinstance(arg, Tiles) else arg for arg in args]


def launch_directly(prepared: Prepared, tensors: tuple[torch.Tensor | None, ...], this: Pass) -> Launch | None:
    """Launch by the driver; by triton, and return None, where the kernel is not compiled yet or takes other parameters than are known."""
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
                if isinstance(compiled, private('triton.compiler.CompiledKernel')):  # a hook of triton may have taken it away
                    variants[key] = Variant(compiled, len(prepared.args))
                return None
    if not variant.is_understood:
        launch_by_triton(prepared)
        return None
    launch = Launch.of(variant, prepared.grid, prepared.args)
    launch.start([None if x is None else x.data_ptr() for x in tensors], tensors[0], current_stream(this.device))
    return launch


def compile_side_by_side(this: Pass) -> None:
    """Bring the kernels of a pass that are not compiled yet into triton's cache and onto the device.

    They are compiled side by side, with the launchers that triton 3.6 compiles for them, but loaded one by one (`loading`).
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

    def build(kernel):
        kernel = kernel.result() if isinstance(kernel, future) else kernel
        if kernel is not None:
            # only for what it leaves in the cache on disk: this one may have got another's functions
            launcher_class(kernel.src, kernel.metadata)
        return kernel

    with ThreadPoolExecutor() as pool:
        with mode(pool):
            kernels = [kernel.warmup(*for_triton(args), grid=grid, **constants) for kernel, grid, args, constants in new.values()]
        kernels = [*pool.map(build, kernels)]
    for kernel in kernels:
        _ = kernel and kernel.run  # loads it
