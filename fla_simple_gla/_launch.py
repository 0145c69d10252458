"""Calls that the host has made before, at a fraction of their cost.

Whether arguments are right, which kernels suit them and how long segments are follows from the layouts of the tensors: the first call
with some layouts finds out, and leaves a plan for the others.

At each launch triton binds the arguments anew, finds out what of them to specialise on, looks for the kernel, and encodes the tensor
descriptors: that takes longer than a small kernel runs. But what a pass of a mode allocates and launches, with all its numbers, follows
from the layouts too. So it is recorded the first time, and later ones with the same layouts replay it: they allocate, put in the
addresses, and launch. Before the first time there is a rehearsal, which allocates nothing and launches nothing: it tells which kernels
there will be, and these are compiled side by side.
"""

import copy
import functools
import inspect
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch

from ._triton import INTERPRET, scratch, triton
from ._validation import check_inputs

# Versions of triton of which it is known that a compiled kernel takes all arguments, constants too, in the order of the parameters,
# addresses as integers, and in the place of a descriptor the encoded one, its shape and its strides; and that its launcher hands all it is
# given on to one function. With others every launch goes the usual way.
VERSIONS = ('3.6', '3.7', '3.8', '3.9')
DIRECT = (
    triton is not None and not INTERPRET and torch.version.cuda is not None and '.'.join(triton.__version__.split('.')[:2]) in VERSIONS
)
# Plans that are kept, programs of one pass, and encoded descriptors of one argument of a launch
MOST = 1024
MOST_ADDRESSES = 64
# Bytes of a tensor that a replay may keep until its end, so that it shares one allocation with all others of no more
SMALL = 2**24
# What addresses are multiples of, of tensors that share an allocation: more than any load or descriptor asks for
ALIGNMENT = 256


class Plan:
    """What calls with arguments of the same layouts have in common."""

    def __init__(self, scale: float, kept: bool):
        self.scale = scale
        self.kept = kept  # for later calls
        self.choices = {}

    def once(self, choose: Callable, *args):
        """What `choose(*args)` returned the first time, which depends on nothing but the layouts."""
        if choose not in self.choices:
            self.choices[choose] = choose(*args)
        return self.choices[choose]


plans = {}


def plan_for(
    q, k, v, g, g_gamma, scale, initial_state, cu_seqlens, state_v_first=False, state_indices=None, intermediate_states_buffer=None,
) -> Plan:
    """The plan of calls with such arguments, those of `check_inputs`. The first ones of a kind are checked, and all of subclasses, which
    may have no memory.
    """
    plan = key = None
    if type(q) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
        try:
            # the type: 1 + 0j equals 1.0, but is no scale
            tensors = q, k, v, g, g_gamma, initial_state, cu_seqlens, state_indices, intermediate_states_buffer
            key = type(scale), scale, bool(state_v_first), *layouts(tensors, [])
            plan = plans.get(key)
        except (AttributeError, TypeError, RuntimeError):  # something else than tensors, which the check refuses, or without memory
            key = None
    if plan is None:
        scale = check_inputs(
            q, k, v, g, g_gamma, scale, initial_state, cu_seqlens, state_v_first, state_indices, intermediate_states_buffer,
        )
        plan = Plan(scale, kept=key is not None)
        if key is not None:
            if len(plans) >= MOST:
                plans.clear()
            plans[key] = plan
    return plan


def once_differentiable(backward: Callable) -> Callable:
    """PyTorch's decorator of that name, without its cost where no gradient of a gradient can be asked for."""
    watched = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx, *grads):
        return (watched if torch.is_grad_enabled() else backward)(ctx, *grads)

    return run


def layouts(tensors: tuple[torch.Tensor | None, ...], addresses: list[int | None]) -> list:
    """Of each tensor all that a plan or a program may depend on. Their addresses are appended to those of others before them."""
    found = []
    for x in tensors:
        if x is None:
            found.append(None)
            addresses.append(None)
        else:
            address = x.data_ptr()
            # launches tell tensors by their addresses: those that share one are others than those that do not
            shared = addresses.index(address) if address in addresses else None
            found.append((x.dtype, x.shape, x.stride(), x.device, address % 16, shared))
            addresses.append(address)
    return found


class Recording(threading.local):
    launches = None  # what is to be launched in the pass that is being rehearsed in this thread
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
    if recording.launches is not None:
        return torch.empty(shape, dtype=dtype, device='meta')
    x = getattr(like, how)(shape, dtype=dtype)
    if recording.program is not None:
        recording.program.allocated(x, how, shape, dtype)
    return x


def launcher(prepare: Callable) -> Callable:
    """Decorates a function that tells how to launch a kernel, which is then called as `launch(tensors, *numbers)`.

    The function, `prepare(*tensors, *numbers)`, returns the kernel, a grid of three, the arguments, and the constants and options. Its
    tensors are the kernel's first arguments, in this order, each None, as it is or in a descriptor; in a rehearsal those that the pass
    allocates are on the meta device.
    """

    @functools.wraps(prepare)
    def launch(tensors: tuple[torch.Tensor | None, ...], *numbers) -> None:
        kernel, grid, args, constants = prepare(*tensors, *numbers)
        if recording.launches is not None:
            recording.launches.append((kernel, grid, args, constants))
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
    A plan that is given tells all that of the tensors, if it is one that is kept.
    """
    programs = {}

    @functools.wraps(run)
    def replay(tensors: tuple[torch.Tensor | None, ...], *numbers, plan: Plan | None = None) -> tuple[torch.Tensor | None, ...]:
        if torch.compiler.is_compiling():
            return run(*tensors, *numbers)
        device = tensors[0].get_device()
        if device not in recording.devices:
            enter_context(tensors[0])
        if not DIRECT or observed():
            return run(*tensors, *numbers)
        if plan is None or not plan.kept:
            addresses = []
            key = (*numbers, *layouts(tensors, addresses))
        else:
            addresses = [None if x is None else x.data_ptr() for x in tensors]
            key = (plan, *numbers)
        program = programs.get(key)
        if program is not None:
            return program(tensors, addresses, device)
        if len(programs) >= MOST:
            programs.clear()
        launches = recording.launches = []
        try:
            run(*tensors, *numbers)
        finally:
            recording.launches = None
        compile_all(launches, device)
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
        self.given = [(type(x), x.dtype, x.shape, x.stride()) if x is not None else None for x in tensors]
        self.allocations = {}  # by number: how, shape, dtype, and bytes
        self.recorded = []  # the number of what is allocated and None, or a launch and the numbers of its tensors
        self.steps = []  # of a replay: a launch; or None, a number, and what allocates it, or None to free it
        self.complete = True
        # the latest with an address or an identity is the one that is alive, and of the given ones the first
        self.by_address = {address: i for i, address in reversed([*enumerate(addresses)])}
        self.by_identity = {id(x): i for i, x in enumerate(tensors)}

    def allocated(self, x, how, shape, dtype):
        self.by_address[x.data_ptr()] = self.by_identity[id(x)] = self.add(how, shape, dtype, x.nbytes)

    def add(self, how, shape, dtype, size):
        number = len(self.given) + len(self.allocations)
        self.allocations[number] = how, shape, dtype, size
        self.recorded.append((number, None))
        return number

    def launched(self, compiled, grid, args, tensors):
        numbers = [None if x is None else self.by_address.get(x.data_ptr()) for x in tensors]
        self.complete &= all(x is None or number is not None for x, number in zip(tensors, numbers))
        if not isinstance(compiled, triton.compiler.CompiledKernel):
            self.complete = False
            return
        launch = Launch(compiled, grid, args, tensors, numbers)
        if launch.scratch_size:
            launch.scratch = self.add('new_empty', (launch.scratch_size,), torch.int8, launch.scratch_size)
        self.recorded.append((launch, {*numbers, launch.scratch}))

    def finish(self, results):
        """Put together what a replay does; whether all of the pass is recorded."""
        self.results = [None if x is None else self.by_identity.get(id(x)) for x in results]
        self.complete &= all(x is None or i is not None for x, i in zip(results, self.results))
        # small ones that are not among the results share an allocation
        self.offsets = [None] * len(self.allocations)
        self.shared = 0
        for number, (how, _, _, size) in self.allocations.items():
            if how == 'new_empty' and size <= SMALL and number not in self.results:
                self.offsets[number - len(self.given)] = self.shared
                self.shared += -(-size // ALIGNMENT) * ALIGNMENT
        # the others are freed behind their last launch
        needed = {*self.results, *range(len(self.given))}
        needed.update(number for number in self.allocations if self.offsets[number - len(self.given)] is not None)
        for what, numbers in reversed(self.recorded):
            if isinstance(what, Launch):
                freed = numbers - needed - {None}
                self.steps += [(None, number, None) for number in freed]
                needed |= freed
                self.steps.append((what, None, None))
            elif self.offsets[what - len(self.given)] is None:
                self.steps.append((None, what, self.maker(*self.allocations[what][:3])))
        self.steps.reverse()
        del self.by_address, self.by_identity, self.allocations, self.recorded
        return self.complete

    def maker(self, how, shape, dtype):
        """What allocates such a tensor, from the tensors so far."""
        twin = torch.Tensor, dtype, torch.Size(shape), torch.empty(shape, device='meta').stride()
        if how == 'new_empty' and twin in self.given:
            # two thirds of the time
            number = self.given.index(twin)
            return lambda tensors: torch.empty_like(tensors[number])
        return lambda tensors: getattr(tensors[0], how)(shape, dtype=dtype)

    def __call__(self, tensors, addresses, device):
        stream = triton.runtime.driver.active.get_current_stream(device)
        start = 0
        if self.shared:
            # the largest integer, with which PyTorch can be told to fill it, is NaN in every floating dtype
            shared = tensors[0].new_empty(self.shared // 4, dtype=torch.int32)
            start = shared.data_ptr()
        addresses += [None if offset is None else start + offset for offset in self.offsets]
        tensors = [*tensors, *[None] * len(self.offsets)]
        for launch, number, make in self.steps:
            if launch is not None:
                launch(addresses, stream)
            elif make is None:
                tensors[number] = None
            else:
                # by no name of its own, which would keep it from being freed
                tensors[number] = make(tensors)
                addresses[number] = tensors[number].data_ptr()
        return tuple([None if i is None else tensors[i] for i in self.results])


def compile_all(launches, device):
    """Bring kernels into triton's cache and onto the device, those that were not asked for before."""

    def load(kernel):
        kernel = kernel.result() if isinstance(kernel, triton.FutureKernel) else kernel
        with torch.cuda.device(device):
            return kernel and kernel.run  # which compiles a launcher too, in triton 3.6

    new = {}
    for kernel, grid, args, constants in launches:
        new.setdefault((device, kernel, *constants.items()), (kernel, grid, args, constants))
    new = {key: launch for key, launch in new.items() if key not in asked_for}
    if len(new) > 1:
        with ThreadPoolExecutor() as pool:
            with triton.AsyncCompileMode(pool):
                kernels = [kernel.warmup(*args, grid=grid, **constants) for kernel, grid, args, constants in new.values()]
            for _ in pool.map(load, kernels):
                pass
    asked_for.update(new)


class Launch:
    """A launch of which only the addresses are open."""

    def __init__(self, compiled, grid, args, tensors, numbers):
        self.args = []
        self.pointers = []  # the number of a tensor, and the place of its address in args
        self.descriptors = []  # likewise, of an encoded descriptor; how to encode one, and those of some addresses
        metadata = iter(getattr(compiled.metadata, 'tensordesc_meta', None) or ())
        for i, arg in enumerate(args):
            if i >= len(tensors) or tensors[i] is None:
                self.args.append(arg)
            elif arg is tensors[i]:
                self.pointers.append((numbers[i], len(self.args)))
                self.args.append(0)
            else:
                fields = {name: field for name, field in vars(arg).items() if name != 'base'}
                self.descriptors.append((numbers[i], len(self.args), functools.partial(encode, fields, next(metadata)), {}))
                self.args += [None, *arg.shape, *arg.strides]
        run = copy.copy(compiled.run)
        if self.descriptors:
            # triton's own encodes the descriptors and goes on with another one
            run.launch = inspect.getclosurevars(run.launch).nonlocals['launcher']
        # What triton does in Python, nearly half of the time of a launch, is the same each time. All of it goes on to a function in C, the
        # arguments of the kernel last, from triton 3.7 on as a tuple.
        passed = []
        self.launch = run.launch
        run.launch = lambda *args: passed.extend(args)
        if run.global_scratch_size:
            triton.set_allocator(lambda size, alignment, stream: scratch)
        try:
            run(*grid, 0, compiled.function, compiled.packed_metadata, None, None, None, *self.args)
        finally:
            if run.global_scratch_size:
                triton.set_allocator(scratch)
        self.compiled, self.grid = compiled, grid  # the one keeps the kernel on the device
        self.nested = passed[-len(self.args) :] != self.args
        self.behind = passed[len(grid) + 1 : -1 if self.nested else -len(self.args)]  # what is behind grid and stream
        self.scratch_size = run.global_scratch_size * run.num_ctas * math.prod(grid)
        self.scratch = None  # the number of what the program allocates for that
        self.place = self.behind.index(scratch) if self.scratch_size else None

    def __call__(self, addresses, stream):
        args = self.args.copy()
        for number, place in self.pointers:
            args[place] = addresses[number]
        for number, place, encoder, encoded in self.descriptors:
            address = addresses[number]
            descriptor = encoded.get(address)
            if descriptor is None:
                if len(encoded) >= MOST_ADDRESSES:
                    encoded.clear()
                descriptor = encoded[address] = encoder(address)
            args[place] = descriptor
        behind = self.behind
        if self.scratch is not None:
            behind = behind.copy()
            behind[self.place] = addresses[self.scratch]
        self.launch(*self.grid, stream, *behind, *([tuple(args)] if self.nested else args))


def encode(fields, metadata, address: int):
    """The encoded descriptor of what is at an address."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    base = SimpleNamespace(data_ptr=lambda: address)
    # from triton 3.8 on there is a third argument, not used on this backend
    unused = (None,) * (len(inspect.signature(make_tensordesc_arg).parameters) - 2)
    return make_tensordesc_arg(SimpleNamespace(base=base, **fields), metadata, *unused)[0]


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
