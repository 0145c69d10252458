"""Calls that the host has made before, at a fraction of their cost.

At each launch triton binds the arguments anew, finds out what of them to specialise on, looks for the kernel, and encodes the tensor
descriptors: that takes longer than a small kernel runs. But what a pass of a mode allocates and launches, with all its numbers, follows
from the layouts of the tensors that it is given. So it is recorded the first time, and later ones with the same layouts replay it: they
allocate, put in the addresses, and launch. Before the first time there is a rehearsal, which allocates nothing and launches nothing: it
tells which kernels there will be, and these are compiled side by side.
"""

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch

from ._triton import INTERPRET, scratch, triton

# Versions of triton of which it is known that a compiled kernel takes all arguments, constants too, in the order of the parameters,
# addresses as integers, and in the place of a descriptor the encoded one, its shape and its strides. With others every launch goes the
# usual way.
VERSIONS = ('3.6', '3.7', '3.8', '3.9')
DIRECT = (
    triton is not None and not INTERPRET and torch.version.cuda is not None and '.'.join(triton.__version__.split('.')[:2]) in VERSIONS
)
# Programs that are kept of one pass, and encoded descriptors of one argument of a launch
MOST = 1024
MOST_ADDRESSES = 64


class Recording(threading.local):
    plans = None  # what is to be launched in the pass that is being rehearsed in this thread
    program = None  # that of the pass that is being recorded

    def __init__(self):
        self.devices = set()  # whose contexts this thread has made its own


recording = Recording()
# device, kernel and constants; what triton specialises beyond that is compiled at the launch
asked_for = set()


def empty(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised tensor on like's device, and of its dtype if none is given: what a recorded pass allocates."""
    return allocate(like, 'new_empty', shape, dtype)


def zeros(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return allocate(like, 'new_zeros', shape, dtype)


def allocate(like, how, shape, dtype):
    dtype = dtype or like.dtype
    if recording.plans is not None:
        return torch.empty(shape, dtype=dtype, device='meta')
    x = getattr(like, how)(shape, dtype=dtype)
    if recording.program is not None:
        recording.program.allocated(x, how, shape, dtype)
    return x


def launcher(plan: Callable) -> Callable:
    """Decorates a function that tells how to launch a kernel, which is then called as `launch(tensors, *numbers)`.

    The function, `plan(*tensors, *numbers)`, returns the kernel, a grid of three, the arguments, and the constants and options. Its
    tensors are the kernel's first arguments, in this order, each None, as it is or in a descriptor; in a rehearsal those that the pass
    allocates are on the meta device.
    """

    @functools.wraps(plan)
    def launch(tensors: tuple[torch.Tensor | None, ...], *numbers) -> None:
        kernel, grid, args, constants = plan(*tensors, *numbers)
        if recording.plans is not None:
            recording.plans.append((kernel, grid, args, constants))
            return
        compiled = kernel[grid](*args, **constants)
        if recording.program is not None:
            recording.program.launched(compiled, grid, [*args, *(constants[name] for name in kernel.arg_names[len(args) :])], tensors)

    return launch


def recorded(run: Callable) -> Callable:
    """Decorates a pass over a mode's kernels, `run(*tensors, *numbers)`, which is then called as `replay(tensors, *numbers)`.

    The first tensor is not None. The pass returns a tuple of tensors that it was given or allocated, and None. All it does with tensors is
    to allocate them with `empty` and `zeros` and to give them to launchers, whole. How it does so depends on nothing but the numbers,
    which are hashable, and of the tensors on dtypes, shapes, strides, devices, whether an address is a multiple of 16, and which are None.
    """
    programs = {}

    @functools.wraps(run)
    def replay(tensors: tuple[torch.Tensor | None, ...], *numbers) -> tuple[torch.Tensor | None, ...]:
        if torch.compiler.is_compiling():
            return run(*tensors, *numbers)
        device = tensors[0].get_device()
        if device not in recording.devices:
            enter_context(tensors[0])
        if not DIRECT or observed():
            return run(*tensors, *numbers)
        key = [device, *numbers]
        addresses = []
        for x in tensors:
            if x is None:
                key.append(None)
                addresses.append(None)
            else:
                address = x.data_ptr()
                # launches tell tensors by their addresses: those that share one are others than those that do not
                key.append((x.dtype, x.shape, x.stride(), address % 16, addresses.index(address) if address in addresses else None))
                addresses.append(address)
        key = tuple(key)
        program = programs.get(key)
        if program is not None:
            return program(tensors, addresses, device)
        if len(programs) >= MOST:
            programs.clear()
        plans = recording.plans = []
        try:
            run(*tensors, *numbers)
        finally:
            recording.plans = None
        compile_all(plans, device)
        program = recording.program = Program(tensors, addresses)
        try:
            results = run(*tensors, *numbers)
        finally:
            recording.program = None
        if program.finish(results):
            programs[key] = program
        return results

    return replay


def enter_context(x):
    """Make the context of x's device that of this thread.

    A thread that has not used the GPU itself has none, such as autograd's when its memory was there before. Triton's launches look
    for one, but its encoding of descriptors fails ("invalid device context", seen with triton 3.6, unchanged up to 3.9).
    """
    x.new_zeros(1)  # any call that starts something there
    recording.devices.add(x.get_device())


class Program:
    """What a pass did, in terms of tensors by number: those it was given, then those it allocated. It holds on to none of them."""

    def __init__(self, tensors, addresses):
        self.given = self.count = len(tensors)
        # of each (allocation, shape, dtype), (Launch, the numbers of its tensors, None), or (None, number to free, None)
        self.steps = []
        self.complete = True
        # the latest with an address or an identity is the one that is alive, and of the given ones the first
        self.by_address = {address: i for i, address in reversed([*enumerate(addresses)])}
        self.by_identity = {id(x): i for i, x in enumerate(tensors)}

    def allocated(self, x, how, shape, dtype):
        self.steps.append((how, shape, dtype))
        self.by_address[x.data_ptr()] = self.by_identity[id(x)] = self.count
        self.count += 1

    def launched(self, compiled, grid, args, tensors):
        numbers = [None if x is None else self.by_address.get(x.data_ptr()) for x in tensors]
        self.complete &= all(x is None or number is not None for x, number in zip(tensors, numbers))
        if isinstance(compiled, triton.compiler.CompiledKernel):
            self.steps.append((Launch(compiled, grid, args, tensors), numbers, None))
        else:
            self.complete = False

    def finish(self, results):
        """Note the results, and free behind its last launch what is not among them; whether all of the pass is recorded."""
        self.results = [None if x is None else self.by_identity.get(id(x)) for x in results]
        del self.by_address, self.by_identity
        needed = set(self.results)
        steps = []
        for step in reversed(self.steps):
            if isinstance(step[0], Launch):
                for i in {i for i in step[1] if i is not None and i >= self.given} - needed:
                    steps.append((None, i, None))
                    needed.add(i)
            steps.append(step)
        self.steps = steps[::-1]
        return self.complete and all(x is None or i is not None for x, i in zip(results, self.results))

    def __call__(self, tensors, addresses, device):
        stream = triton.runtime.driver.active.get_current_stream(device)
        like = tensors[0]
        tensors = [*tensors]
        for what, which, dtype in self.steps:
            if what is None:
                tensors[which] = None
            elif dtype is None:
                what(tensors, addresses, which, stream)
            else:
                # by no name of its own, which would keep it from being freed
                tensors.append(getattr(like, what)(which, dtype=dtype))
                addresses.append(tensors[-1].data_ptr())
        return tuple([None if i is None else tensors[i] for i in self.results])


def compile_all(plans, device):
    """Bring kernels into triton's cache and onto the device, those that were not asked for before."""

    def load(kernel):
        kernel = kernel.result() if isinstance(kernel, triton.FutureKernel) else kernel
        with torch.cuda.device(device):
            return kernel and kernel.run  # which compiles a launcher too, in triton 3.6

    new = {}
    for kernel, grid, args, constants in plans:
        new.setdefault((device, kernel, *constants.items()), (kernel, grid, args, constants))
    new = {key: plan for key, plan in new.items() if key not in asked_for}
    if len(new) > 1:
        with ThreadPoolExecutor() as pool:
            with triton.AsyncCompileMode(pool):
                kernels = [kernel.warmup(*args, grid=grid, **constants) for kernel, grid, args, constants in new.values()]
            for _ in pool.map(load, kernels):
                pass
    asked_for.update(new)


class Launch:
    """A launch of which only the addresses are open."""

    def __init__(self, compiled, grid, args, tensors):
        self.compiled, self.grid = compiled, grid
        self.args = []
        self.pointers = []  # which tensor, and the place of its address in args
        self.descriptors = []  # which tensor, the place of the encoded descriptor, how to encode one, and those of some addresses
        metadata = iter(getattr(compiled.metadata, 'tensordesc_meta', None) or ())
        for i, arg in enumerate(args):
            if i >= len(tensors) or tensors[i] is None:
                self.args.append(arg)
            elif arg is tensors[i]:
                self.pointers.append((i, len(self.args)))
                self.args.append(0)
            else:
                fields = {name: field for name, field in vars(arg).items() if name != 'base'}
                self.descriptors.append((i, len(self.args), functools.partial(encode, fields, next(metadata)), {}))
                self.args += [None, *arg.shape, *arg.strides]
        self.launch = compiled.run
        self.needs_scratch = compiled.run.global_scratch_size > 0
        if self.descriptors:
            # triton's own encodes the descriptors and goes on with another one
            self.launch = copy.copy(compiled.run)
            self.launch.launch = inspect.getclosurevars(compiled.run.launch).nonlocals['launcher']

    def __call__(self, tensors, addresses, numbers, stream):
        args = self.args.copy()
        for i, place in self.pointers:
            args[place] = addresses[numbers[i]]
        for i, place, encoder, encoded in self.descriptors:
            address = addresses[numbers[i]]
            descriptor = encoded.get(address)
            if descriptor is None:
                if len(encoded) >= MOST_ADDRESSES:
                    encoded.clear()
                descriptor = encoded[address] = encoder(tensors[numbers[i]])
            args[place] = descriptor
        if self.needs_scratch:
            triton.set_allocator(scratch)
        compiled = self.compiled
        self.launch(*self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)


def encode(fields, metadata, x: torch.Tensor):
    """The encoded descriptor of x."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    # from triton 3.8 on there is a third argument, not used on this backend
    unused = (None,) * (len(inspect.signature(make_tensordesc_arg).parameters) - 2)
    return make_tensordesc_arg(SimpleNamespace(base=x, **fields), metadata, *unused)[0]


def observed() -> bool:
    """Whether what triton compiles is to be changed or watched, or its launches are."""
    knobs = triton.knobs
    return bool(
        knobs.runtime.debug
        or knobs.compilation.instrumentation_mode
        or knobs.runtime.add_stages_inspection_hook is not None
        or getattr(knobs.runtime.launch_enter_hook, 'calls', True)
        or getattr(knobs.runtime.launch_exit_hook, 'calls', True)
    )
