"""Launches of kernels at a fraction of what they keep the host, and the passes that they belong to.

At each launch triton binds the arguments anew, finds out what of them to specialise on, looks for the kernel, and encodes the tensor
descriptors: that takes longer than a small kernel runs. But what it finds depends on nothing but the numbers among the arguments and the
layouts of the tensors. So a launcher keeps what it found for these, and later launches with the same put in the addresses, and call the
CUDA driver (`_driver.py`). Each launch looks at the very tensors that it is given: nothing is assumed of what happened before it.

A pass is what a mode runs on the GPU in one go, forward or backward: it allocates, and launches. It runs on the device of its tensors.
When one of its launches needs a kernel that is not compiled yet, the pass is gone through once without memory and launches, to find out
which kernels there will be, and these are compiled side by side.
"""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ._cache import Cache
from ._driver import Launch, Tiles, Variant, cuda_driver
from ._private import launches_are_observed, private, with_allocator
from ._triton import scratch, switched_off, warn_once, why_not


class Pass(NamedTuple):
    """The pass that runs in a thread."""

    run: Callable
    arguments: tuple
    device: int
    direct: bool  # whether its launches are for the driver
    launches: list | None = None  # of a dry run, what it would launch


class Thread(threading.local):
    def __init__(self):
        self.running = None
        self.devices = set()  # whose contexts this thread has made its own


thread = Thread()
# What is to be launched: by launcher, device, numbers and the layouts of the tensors
launches = Cache(4096)
# Compiled kernels: by kernel, device, constants, and what triton specialises on
variants = {}
# Held by the one thread that compiles and loads kernels, which others may be about to launch. Triton up to 3.6 compiles a launcher in C for
# each signature, and all these modules have one name. Python, asked again for one that it has loaded before, puts its functions into the
# module that got the name last: it may be one that another thread has just loaded, and is about to take the launcher from. And triton, up
# to 3.9 at least, lets a thread launch a kernel that another is still loading.
loading = threading.RLock()
# Triton's interpreter replaces functions of `triton.language` while a kernel runs: one thread at a time.
interpreting = threading.RLock()


@functools.cache
def why_not_direct() -> str | None:
    """Why the CUDA driver is not called directly; None where it is."""
    if torch.version.cuda is None:
        return 'PyTorch is not built for CUDA'
    if switched_off('FLA_SIMPLE_GLA_DIRECT'):
        return 'FLA_SIMPLE_GLA_DIRECT=0 is in the environment'
    if private('triton.compiler.CompiledKernel') is None:
        return 'triton has no CompiledKernel'
    reason = why_not('direct')
    if reason is not None:
        warn_once('direct')
        return reason
    return None if cuda_driver() is not None else 'the CUDA driver (libcuda.so.1) is not found, or too old'


def device_pass(run: Callable) -> Callable:
    """Decorates a pass, `run(tensors, *others)`, whose first tensor is not None: it runs on the device of that one.

    It may run twice, the first time without launches and on allocations without memory. So all that it does with tensors is to allocate
    them with `empty` and `zeros`, to take views, and to launch; in that first run anything else is an error.
    """

    @functools.wraps(run)
    def call(*arguments):
        x = arguments[0][0]
        if not x.is_cuda:
            with interpreting:
                return run(*arguments)
        device = x.get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return call(*arguments)
        if device not in thread.devices:
            enter_context(x)
        outer = thread.running
        thread.running = Pass(run, arguments, device, why_not_direct() is None and not launches_are_observed())
        try:
            return run(*arguments)
        finally:
            thread.running = outer

    return call


def enter_context(x: torch.Tensor) -> None:
    """Make the context of x's device that of this thread.

    A thread that has not used the GPU itself has none, such as autograd's when its memory was there before. Triton's launches look
    for one, but to encode a descriptor fails without ("invalid device context").
    """
    x.new_zeros(1)  # any call that starts something there
    thread.devices.add(x.get_device())


def empty(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised tensor on like's device, and of its dtype if none is given: what a pass allocates."""
    if thread.running is not None and thread.running.launches is not None:
        return torch.empty(shape, dtype=dtype or like.dtype, device='meta')
    return like.new_empty(shape, dtype=dtype)


def zeros(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    if thread.running is not None and thread.running.launches is not None:
        return torch.empty(shape, dtype=dtype or like.dtype, device='meta')
    return like.new_zeros(shape, dtype=dtype)


class Prepared(NamedTuple):
    """A launch as triton takes it."""

    kernel: object
    grid: tuple[int, int, int]
    args: tuple
    constants: dict  # and options

    def key(self, device: int) -> tuple:
        """What the compiled kernel depends on, or more: triton specialises on no more of an argument than this tells."""
        kinds = [argument_kind(arg, rule) for arg, rule in zip(self.args, specialization_rules(self.kernel))]
        return self.kernel, device, tuple(self.constants.items()), tuple(kinds)


def argument_kind(arg, rule: str):
    if arg is None:
        return None
    if isinstance(arg, int):
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
    tensors are the kernel's first arguments, in this order, each None, as it is or in `Tiles`. What the function returns depends on
    nothing but the numbers, which are hashable, and of the tensors on dtypes, shapes, strides, whether an address is a multiple of 16, and
    which are None.
    """

    @functools.wraps(prepare)
    def launch(tensors: tuple[torch.Tensor | None, ...], *numbers) -> None:
        this = thread.running
        if this is None or not this.direct:
            launch_by_triton(Prepared(*prepare(tensors, *numbers)))
            return
        if this.launches is not None:
            this.launches.append(Prepared(*prepare(tensors, *numbers)))
            return
        key, addresses = [launch, this.device, *numbers], []
        for x in tensors:
            if x is None:
                key.append(None)
                addresses.append(None)
            else:
                address = x.data_ptr()
                addresses.append(address)
                key += x.dtype, x.shape, x.stride(), address % 16
        key = tuple(key)
        known = launches.get(key)
        if known is None:
            known = first_launch(key, Prepared(*prepare(tensors, *numbers)), this)
        if known is not None:
            known(addresses, tensors[0], this.device)

    return launch


def launch_by_triton(prepared: Prepared):
    kernel, grid, args, constants = prepared
    args = [arg.for_triton() if isinstance(arg, Tiles) else arg for arg in args]
    if constants.get('TMA'):  # such a kernel makes descriptors, in memory that triton allocates
        return with_allocator(scratch, lambda: kernel[grid](*args, **constants))
    return kernel[grid](*args, **constants)


def first_launch(key: tuple, prepared: Prepared, this: Pass) -> Launch | None:
    """What to launch; None where triton has launched it."""
    variant = variants.get(variant_key := prepared.key(this.device))
    if variant is None:
        with loading:
            variant = variants.get(variant_key)  # another thread may have compiled it by now
            if variant is None:
                compile_side_by_side(this)
                compiled = launch_by_triton(prepared)
                if isinstance(compiled, private('triton.compiler.CompiledKernel')):  # a hook of triton may have taken it away
                    variants[variant_key] = Variant(compiled, len(prepared.args))
                return None
    if not variant.is_understood:
        launch_by_triton(prepared)
        return None
    known = Launch(variant, prepared.grid, prepared.args)
    launches.put(key, known)
    return known


def compile_side_by_side(this: Pass) -> None:
    """Bring the kernels of a pass that are not compiled yet into triton's cache and onto the device.

    They are compiled side by side, with the launchers that triton 3.6 compiles for them, but loaded one by one (`loading`).
    """
    mode, future = private('triton.AsyncCompileMode'), private('triton.FutureKernel')
    launcher_class = private('triton.runtime.driver.active.launcher_cls')
    if mode is None or future is None or launcher_class is None:
        return
    new = {prepared.key(this.device): prepared for prepared in dry_run(this)}
    new = [prepared for key, prepared in new.items() if key not in variants]
    if len(new) < 2:
        return

    def build(kernel):
        kernel = kernel.result() if isinstance(kernel, future) else kernel
        if kernel is not None:
            # only for what it leaves in the cache on disk: this one may have got another's functions
            launcher_class(kernel.src, kernel.metadata)
        return kernel

    def start(prepared):
        kernel, grid, args, constants = prepared
        args = [arg.for_triton() if isinstance(arg, Tiles) else arg for arg in args]
        return kernel.warmup(*args, grid=grid, **constants)

    with ThreadPoolExecutor() as pool:
        with mode(pool):
            kernels = [start(prepared) for prepared in new]
        kernels = [*pool.map(build, kernels)]
    for kernel in kernels:
        _ = kernel and kernel.run  # loads it


def dry_run(this: Pass) -> list[Prepared]:
    """What a pass launches."""
    found = []
    thread.running = this._replace(launches=found)
    try:
        with AllocationsAndViews():
            this.run(*this.arguments)
    finally:
        thread.running = this
    return found


class AllocationsAndViews(TorchDispatchMode):
    """Refuses operations that compute or write: in a dry run there is nothing to compute from, and what is given must stay as it is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        schema = func._schema
        view = schema.returns and all(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
        if not view and func.overloadpacket.__name__ not in ('empty', 'new_empty', 'empty_like', 'new_zeros'):
            raise RuntimeError(f'a pass only allocates, takes views and launches, but calls {func}: call it outside of the pass')
        return func(*args, **kwargs or {})
