"""Calls that the host has made before, at a fraction of their cost.

Whether arguments are right, which kernels suit them and how long segments are follows from the layouts of the tensors: the first call
with some layouts finds out, and leaves a plan for the others.

At each launch triton binds the arguments anew, finds out what of them to specialise on, looks for the kernel, and encodes the tensor
descriptors: that takes longer than a small kernel runs. But what a pass of a mode allocates and launches, with all its numbers, follows
from the layouts too. So it is recorded the first time, and later ones with the same layouts replay it: they allocate, put in the
addresses, and launch. Before the first time there is a rehearsal, which allocates nothing and launches nothing: it tells which kernels
there will be, and these are compiled side by side.
"""

import ctypes
import functools
import inspect
import math
import operator
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch

from ._triton import INTERPRET, runs_kernels, triton
from ._validation import check_inputs

# Versions of triton of which it is known what parameters a compiled kernel takes (`Launch`). With others every launch goes the usual way.
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

    def __init__(self, scale: float, kept: bool, operator: bool = False):
        self.scale = scale
        self.kept = kept  # for later calls
        self.operator = operator  # such tensors are for the operators (`_operators.py`)
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
    """The plan of calls with such arguments, those of `check_inputs`. The first ones of a kind are checked, and all of tensors that have no
    memory.
    """
    plan = key = None
    compiling = torch.compiler.is_compiling()
    if not compiling and type(q) in (torch.Tensor, torch.nn.Parameter):
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
        given = [x for x in (q, k, v, g, g_gamma, initial_state) if x is not None]
        plan = Plan(scale, kept=key is not None, operator=compiling or any(map(is_for_operators, given)))
        if key is not None:
            if len(plans) >= MOST:
                plans.clear()
            plans[key] = plan
    return plan


def is_for_operators(x: torch.Tensor) -> bool:
    """Whether there is no memory to read, or kernels would misread it: x tells PyTorch itself what to do, or has its sign to come."""
    return type(x).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl or x.is_meta or x.is_neg() and runs_kernels(x)


def layouts(tensors: tuple[torch.Tensor | None, ...], addresses: list[int | None]) -> list:
    """Of each tensor all that a plan or a program may depend on. Their addresses are appended to an empty list."""
    addresses += [None if x is None else x.data_ptr() for x in tensors]
    found = [None if x is None else (x.dtype, x.shape, x.stride(), x.device, x.is_neg()) for x in tensors]
    found += [None if address is None else address % 16 for address in addresses]
    given = [address for address in addresses if address is not None]
    if len({*given}) < len(given):
        # launches tell tensors by their addresses: those that share one are others than those that do not
        found += [addresses.index(address) for address in addresses]
    return found


class Recording(threading.local):
    launches = None  # what is to be launched in the pass that is being rehearsed in this thread
    program = None  # that of the pass that is being recorded

    def __init__(self):
        self.devices = set()  # whose contexts this thread has made its own


recording = Recording()
# device, kernel and constants; what triton specialises beyond that is compiled at the launch
asked_for = set()
# Held by the one thread that loads kernels. Triton up to 3.6 compiles a launcher in C for each signature, and all these modules have one
# name. Python, asked again for one that it has loaded before, puts its functions into the module that got the name last: it may be one
# that another thread has just loaded, and is about to take the launcher from. And triton, up to 3.9 at least, lets a thread launch a
# kernel that another is still loading.
loading = threading.RLock()


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

    It runs on the device of the first tensor, which is not None. The pass returns a tuple of tensors that it was given or allocated, and
    None. All it does with tensors is to allocate them with `empty` and `zeros` and to give them to launchers, whole. How it does so
    depends on nothing but the numbers, which are hashable, and of the tensors on dtypes, shapes, strides, devices, whether an address is a
    multiple of 16, and which are None. A plan that is given tells all that of the tensors, if it is one that is kept.
    """
    programs = {}

    @functools.wraps(run)
    def replay(tensors: tuple[torch.Tensor | None, ...], *numbers, plan: Plan | None = None) -> tuple[torch.Tensor | None, ...]:
        device = tensors[0].get_device()
        if tensors[0].is_cuda and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return replay(tensors, *numbers, plan=plan)
        if device not in recording.devices:
            enter_context(tensors[0])
        if not DIRECT or cuda_driver() is None or observed():
            return run(*tensors, *numbers)
        if plan is None or not plan.kept:
            addresses = []
            key = (*numbers, *layouts(tensors, addresses))
        else:
            addresses = [None if x is None else x.data_ptr() for x in tensors]
            key = (plan, *numbers)
        program = programs.get(key)
        if program is None:
            with loading:
                program = programs.get(key)  # which another thread may have recorded by now
                if program is None:
                    return record(key, tensors, numbers, addresses, device)
        return program(tensors, addresses, device) if program.complete else run(*tensors, *numbers)

    def record(key, tensors, numbers, addresses, device):
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
        program.finish(results)
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
        scratch = None
        if size := compiled.metadata.global_scratch_size * math.prod(grid):
            scratch = self.add('new_empty', (size,), torch.int8, size)
        try:
            launch = Launch(compiled, grid, args, tensors, numbers, scratch)
        except (KeyError, StopIteration, OverflowError, struct.error):  # a parameter of another kind, or a number beyond its kind
            self.complete = False
            return
        self.complete &= launch.is_understood()
        self.recorded.append((launch, {*numbers, scratch}))

    def finish(self, results):
        """Put together what a replay does; or find that not all of the pass is known, which then has none."""
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
    """Bring kernels into triton's cache and onto the device, those that were not asked for before.

    They are compiled side by side, with the launchers that triton 3.6 compiles for them, but loaded one by one (`loading`).
    """

    def build(kernel):
        kernel = kernel.result() if isinstance(kernel, triton.FutureKernel) else kernel
        if kernel is not None:
            # only for what it leaves in the cache on disk: this one may have got another's functions
            triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)
        return kernel

    new = {}
    for kernel, grid, args, constants in launches:
        new.setdefault((device, kernel, *constants.items()), (kernel, grid, args, constants))
    new = {key: launch for key, launch in new.items() if key not in asked_for}
    if len(new) > 1:
        with ThreadPoolExecutor() as pool:
            with triton.AsyncCompileMode(pool):
                kernels = [kernel.warmup(*args, grid=grid, **constants) for kernel, grid, args, constants in new.values()]
            kernels = [*pool.map(build, kernels)]
        with torch.cuda.device(device):
            for kernel in kernels:
                _ = kernel and kernel.run  # loads it
    asked_for.update(new)


class Config(ctypes.Structure):
    """CUlaunchConfig of the CUDA driver."""

    _fields_ = [
        ('grid', ctypes.c_uint * 3), ('block', ctypes.c_uint * 3), ('shared_memory', ctypes.c_uint), ('stream', ctypes.c_void_p),
        ('attributes', ctypes.c_void_p), ('count', ctypes.c_uint),
    ]  # fmt: skip


@functools.cache
def cuda_driver():
    """The driver's functions to launch a kernel and to tell the sizes of its parameters; None where it is not found, or so old (before
    CUDA 12.4) that it lacks the latter.
    """
    try:
        library = ctypes.CDLL('libcuda.so.1')
    except OSError:
        return None
    if not hasattr(library, 'cuFuncGetParamInfo'):
        return None
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    library.cuFuncGetParamInfo.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
    return library.cuLaunchKernelEx, library.cuFuncGetParamInfo


def parameter_sizes(function: int) -> list[int]:
    """Bytes of each parameter of a kernel, as the driver has them from its binary."""
    _, info = cuda_driver()
    sizes, offset, size = [], ctypes.c_size_t(), ctypes.c_size_t()
    while info(function, len(sizes), ctypes.byref(offset), ctypes.byref(size)) == 0:
        sizes.append(size.value)
    return sizes


TENSOR_MAP = 128  # bytes of an encoded descriptor
# of a number among the parameters, by the types of triton's signatures
NUMBERS = {'i1': 'b', 'i8': 'b', 'i16': 'h', 'i32': 'i', 'i64': 'q', 'u1': 'B', 'u8': 'B', 'u16': 'H', 'u32': 'I', 'u64': 'Q', 'fp32': 'f'}


class Launch:
    """A launch of which only the addresses are open: the kernel's parameters lie ready in memory, and the driver is called itself.

    Triton's kernels take what is not constant in the order of their signatures, of a descriptor the encoded one, its shape and its
    strides, and at last the addresses of two scratches.
    """

    def __init__(self, compiled, grid, args, tensors, numbers, scratch):
        metadata = compiled.metadata
        pointers, descriptors, values = [], [], []  # number of a tensor and place; likewise, how to encode; format, value and place
        place = 0
        descriptions = iter(getattr(metadata, 'tensordesc_meta', None) or ())
        for i, (kind, arg) in enumerate(zip(compiled.src.signature.values(), args, strict=True)):
            if kind == 'constexpr':
                continue
            if kind[0] == '*':
                pointers.append((numbers[i], place))
            elif kind.startswith('tensordesc'):
                fields = {name: field for name, field in vars(arg).items() if name != 'base'}
                descriptors.append((numbers[i], place, functools.partial(encode, fields, next(descriptions))))
                for number_kind, sizes in (('i', arg.shape), ('q', arg.strides)):
                    for size in sizes:
                        place += 1
                        values.append((number_kind, size, place))
            else:
                values.append((NUMBERS[kind], arg, place))
            place += 1
        if scratch is None:
            values.append(('Q', 0, place))
        else:
            pointers.append((scratch, place))
        values.append(('Q', 0, place + 1))  # of a profiler

        count = place + 2
        self.sizes = [TENSOR_MAP] * count
        # every parameter but a descriptor has eight bytes, the pointers first, which change with every launch
        self.memory = (ctypes.c_uint64 * count)()
        self.parameters = (ctypes.c_void_p * count)()
        formats = [('Q', place) for _, place in pointers] + [(kind, place) for kind, _, place in values]
        for slot, (kind, place) in enumerate(formats):
            self.parameters[place] = ctypes.addressof(self.memory) + 8 * slot
            self.sizes[place] = struct.calcsize(kind)
        for slot, (kind, value, _) in enumerate(values, len(pointers)):
            struct.pack_into(kind, self.memory, 8 * slot, value)
        numbers = tuple(number for number, _ in pointers)
        self.pointers = operator.itemgetter(*numbers) if len(numbers) > 1 else lambda addresses: [addresses[n] for n in numbers]
        self.write_pointers = struct.Struct(f'{len(pointers)}Q').pack_into
        self.descriptors = [(*descriptor, {}) for descriptor in descriptors]  # with those of some addresses

        block = 32 * metadata.num_warps, 1, 1
        self.config = Config(grid, block, metadata.shared)
        self.arguments = ctypes.addressof(self.config), compiled.function, ctypes.addressof(self.parameters), None
        self.compiled = compiled  # keeps the kernel on the device
        self.call, _ = cuda_driver()
        self.lock = threading.Lock()  # of the memory: the driver reads it while other threads run

    def is_understood(self) -> bool:
        """Whether the kernel takes such parameters and nothing else is asked of the launch."""
        metadata = self.compiled.metadata
        plain = metadata.num_ctas == 1 and not (metadata.profile_scratch_size or metadata.launch_cooperative_grid or metadata.launch_pdl)
        return plain and self.sizes == parameter_sizes(self.compiled.function)

    def __call__(self, addresses, stream):
        with self.lock:
            self.write_pointers(self.memory, 0, *self.pointers(addresses))
            for number, place, encoder, encoded in self.descriptors:
                address = addresses[number]
                self.parameters[place] = encoded.get(address) or self.encode(encoder, encoded, address)
            self.config.stream = stream
            error = self.call(*self.arguments)
        if error:
            raise RuntimeError(f'{self.compiled.name}: cuLaunchKernelEx failed with CUDA error {error}')

    def encode(self, encoder, encoded, address):
        """Where the driver finds the descriptor of what is at an address: at the end of an object, that is kept."""
        if len(encoded) >= 2 * MOST_ADDRESSES:
            encoded.clear()
        descriptor = encoder(address)
        encoded[address, 'object'] = descriptor
        encoded[address] = id(descriptor) + type(descriptor).__basicsize__ - TENSOR_MAP
        return encoded[address]


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
