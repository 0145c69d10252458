"""Runs passes over kernels, and replays them in a fraction of the time that they take on the host.

A pass is what a mode runs on the GPU in one go, forward or backward: allocations and launches. Their sizes, grids and
constants follow from the numbers that the pass is called with, and from the layouts of its tensors. The first call with
such numbers and layouts runs the pass. The second call runs it too, and records what it does. Later calls replay the
record: they allocate, fill in the addresses, and call the CUDA driver (`_driver.py`).

A record holds allocations and launches only. So while a pass is recorded, any other operation on a tensor is an error,
except for views (`AllocationsAndViews`).

Memory: a record takes some 3 KB, and its launches some more. At most `MAX_RECORDS` are kept for passes that are called
without a plan (`_cache.py`). A plan keeps one record for each of its passes.
"""

import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ._cache import Cache
from ._driver import Launch, picker, why_not_direct
from ._private import current_stream, launches_are_observed

# In a replay, tensors of at most so many bytes share one allocation. They are freed at the end of the replay, and not
# after their last launches.
MAX_SHARING_BYTES = 2**24
# The addresses of tensors that share an allocation are multiples of this: more than any load or descriptor needs.
ALIGNMENT_BYTES = 256
MAX_RECORDS = 2048  # of passes that are called without a plan

# Triton's interpreter replaces functions of `triton.language` while a kernel runs: one thread at a time.
interpreting = threading.RLock()


class Pass(NamedTuple):
    """A pass that a thread is running."""

    run: Callable
    arguments: tuple
    device: int
    direct: bool  # whether the CUDA driver launches its kernels, and not triton
    record: 'RecordedPass | None' = None  # to which what it does is added
    dry: list | None = None  # in a dry run, to which what it would launch is added


class Thread(threading.local):
    """What is known of the current thread."""

    def __init__(self) -> None:
        self.running: Pass | None = None
        self.devices: set[int] = set()  # the devices whose contexts are current in this thread


thread = Thread()
# For a pass, its numbers and the layouts of its tensors: SEEN after the first call, then the record, or UNKNOWN where
# the pass cannot be recorded. A plan has such a mapping of its own.
records = Cache(MAX_RECORDS // 2)
SEEN, UNKNOWN = 'seen', 'unknown'


def device_pass(run: Callable) -> Callable:
    """Decorates a pass, `run(tensors, *numbers)`. It is then called in the same way, or with a plan in addition.

    The first tensor is not None, and the pass runs on its device. A pass returns a tuple, each item of which is a
    tensor that it was given, a tensor that it allocated, or None. It allocates tensors with `empty` and `zeros`, takes
    views, and launches; it does nothing else with tensors. What it does depends only on the numbers, which are
    hashable, and on these properties of the tensors: dtypes, shapes, strides, which addresses are multiples of 16,
    which tensors are None, and which share an address. If a plan is given, all of that follows from the plan. A pass
    that is called by another one is a part of it.
    """

    @functools.wraps(run)
    def call(tensors: tuple[torch.Tensor | None, ...], *numbers: Any, plan: Any = None) -> tuple:
        x: Any = tensors[0]
        if thread.running is not None:
            return run(tensors, *numbers)
        if not on_gpu(x):
            with interpreting:
                return run(tensors, *numbers)
        device = x.get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return call(tensors, *numbers, plan=plan)
        if device not in thread.devices:
            enter_context(x)
        if why_not_direct() is not None or launches_are_observed():
            return run_pass(Pass(run, (tensors, *numbers), device, direct=False))
        kept: Any
        key: Hashable
        if plan is not None and plan.cached:
            kept, key = plan.records, run
        else:
            kept, key = records, (run, device, numbers, layouts(tensors))
        record = kept.get(key)
        if type(record) is RecordedPass:
            return record.replay(tensors, device)
        this = Pass(run, (tensors, *numbers), device, direct=True)
        if record is SEEN:
            record = RecordedPass(tensors)
            results = run_pass(this._replace(record=record))
            kept[key] = record if record.finish(results) else UNKNOWN
            return results
        results = run_pass(this)
        # A run that raises is no first call: it may not have compiled the kernels. Another thread may have recorded
        # the pass meanwhile.
        if record is None:
            kept.setdefault(key, SEEN)
        return results

    return call


def on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda


def enter_context(x: torch.Tensor) -> None:
    """Make the CUDA context of x's device current in this thread.

    A thread that has not used the GPU yet has no context: autograd's thread has none if all its memory was allocated
    before. Triton sets a context at a launch, but encoding a descriptor fails without one ("invalid device context").
    """
    x.new_zeros(1)  # any call that starts something on the device
    thread.devices.add(x.get_device())


def layouts(tensors: tuple[torch.Tensor | None, ...]) -> tuple:
    """All properties of the tensors that a record may depend on."""
    addresses: list[Any] = [None if x is None else x.data_ptr() for x in tensors]
    found = [
        None if x is None else (x.dtype, x.shape, x.stride(), address % 16) for x, address in zip(tensors, addresses)
    ]
    return *found, shared(addresses)


def shared(addresses: list[Any]) -> tuple | None:
    """Which of the addresses are equal; None where no two are. Records identify a tensor by its address."""
    nones = addresses.count(None)
    if len({*addresses}) == len(addresses) - nones + bool(nones):
        return None
    return tuple([addresses.index(address) for address in addresses])


def empty(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised tensor that a pass allocates, on the device of `like`, and by default of its dtype."""
    return allocate(like, 'new_empty', shape, dtype or like.dtype)


def zeros(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The same, filled with zeros."""
    return allocate(like, 'new_zeros', shape, dtype or like.dtype)


def allocate(like: torch.Tensor, how: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor made by the method `how` of `like`, and recorded. In a dry run it is on the meta device."""
    this = thread.running
    if this is not None and this.dry is not None:
        return torch.empty(shape, dtype=dtype, device='meta')
    x = getattr(like, how)(shape, dtype=dtype)
    if this is not None and this.record is not None:
        this.record.allocated(x, how)
    return x


class Allocation(NamedTuple):
    """A tensor that a pass allocates."""

    how: str  # the method of a tensor that makes it
    shape: tuple[int, ...]  # no torch.Size, which takes longer to read
    strides: tuple[int, ...]
    dtype: torch.dtype
    size: int  # bytes
    twin: int | None  # the number of a given tensor with the same dtype, shape and strides, if there is one

    def maker(self) -> Callable:
        """A function that allocates the tensor. It takes the list of all tensors; the given ones come first."""
        how, shape, strides, dtype, _, twin = self
        if how == 'new_zeros':
            return lambda tensors: tensors[0].new_zeros(shape, dtype=dtype)
        if twin is not None:
            return lambda tensors: torch.empty_like(tensors[twin])
        # `empty_like` takes half the time of `new_empty`, and `new_empty_strided` three quarters
        return lambda tensors: tensors[0].new_empty_strided(shape, strides, dtype=dtype)


class Step(NamedTuple):
    """A step of a replay: a launch, or else the allocation or the end of one tensor."""

    launch: Launch | None
    number: int | None = None  # of the tensor
    make: Callable | None = None  # allocates the tensor; None frees it


class RecordedPass:
    """What a pass did, in terms of numbers of tensors: first those it was given, then those it allocated.

    It keeps no tensor alive.
    """

    def __init__(self, tensors: tuple[torch.Tensor | None, ...]):
        self.given = len(tensors)
        self.allocations: list[Allocation] = []
        self.steps: list[Step] = []
        self.is_complete = True
        self.twins = {
            (x.dtype, x.shape): i for i, x in enumerate(tensors) if type(x) is torch.Tensor and x.is_contiguous()
        }
        # Several tensors can have the same address or identity, one after the other: the last one is alive. Of given
        # tensors that share an address the first one counts.
        numbered = [(i, x) for i, x in enumerate(tensors) if x is not None]
        self.by_address = {x.data_ptr(): i for i, x in reversed(numbered)}
        self.by_identity = {id(x): i for i, x in reversed(numbered)}

    def allocated(self, x: torch.Tensor, how: str) -> None:
        """Record that the pass has allocated x by the method `how`."""
        number = self.given + len(self.allocations)
        self.by_address[x.data_ptr()] = self.by_identity[id(x)] = number
        twin = self.twins.get((x.dtype, x.shape)) if how == 'new_empty' else None
        self.allocations.append(Allocation(how, tuple(x.shape), x.stride(), x.dtype, x.nbytes, twin))
        self.steps.append(Step(None, number, self.allocations[-1].maker()))

    def launched(self, launch: Launch | None, tensors: tuple[torch.Tensor | None, ...]) -> None:
        """Record that the pass has launched a kernel with these tensors. The launch is None if triton has made it."""
        numbers = [None if x is None else self.by_address.get(x.data_ptr()) for x in tensors]
        if launch is None or any(x is not None and number is None for x, number in zip(tensors, numbers)):
            self.is_complete = False
        else:
            self.steps.append(Step(launch.renumbered(numbers)))

    def finish(self, results: tuple[torch.Tensor | None, ...]) -> bool:
        """Prepare the replay. Returns whether there can be one: whether all that the pass did is known."""
        # the places of the allocated tensors, and last the None among the results
        self.nones = [None] * (len(self.allocations) + 1)
        self.results: list[Any] = [-1 if x is None else self.by_identity.get(id(x)) for x in results]
        self.is_complete &= None not in self.results
        self.pick = picker(self.results)
        # Small tensors that are not among the results share an allocation, at these offsets.
        self.offsets: list[int | None] = [None] * len(self.allocations)
        self.shared_bytes = 0
        for i, allocation in enumerate(self.allocations):
            is_small = allocation.size <= MAX_SHARING_BYTES
            if allocation.how == 'new_empty' and is_small and self.given + i not in self.results:
                self.offsets[i] = self.shared_bytes
                self.shared_bytes += -(-allocation.size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        sharing = {self.given + i for i, offset in enumerate(self.offsets) if offset is not None}
        # Other tensors are freed after their last launch.
        needed = {*self.results, *range(self.given), *sharing}
        steps: list[Step] = []
        for step in reversed(self.steps):
            if step.launch is not None:
                used = {*step.launch.pointers, *(i for _, i, _ in step.launch.maps)}
                steps += [Step(None, number) for number in used - needed]
                needed |= used
            if step.number not in sharing:
                steps.append(step)
        self.steps = steps[::-1]
        del self.by_address, self.by_identity, self.allocations, self.twins
        return self.is_complete

    def replay(self, given: tuple[Any, ...], device: int) -> tuple:
        """Do with other tensors what the pass did. Returns what the pass returns."""
        like, stream = given[0], current_stream(device)
        addresses = [None if x is None else x.data_ptr() for x in given]
        if self.shared_bytes:
            # PyTorch can be told to fill new memory with the largest integer: a NaN in every floating dtype
            memory = like.new_empty_strided((self.shared_bytes // 4,), (1,), dtype=torch.int32)
            start = memory.data_ptr()
            addresses += [None if offset is None else start + offset for offset in self.offsets]
        else:
            addresses += self.offsets
        tensors: list[Any] = [*given, *self.nones]
        number: Any
        for launch, number, make in self.steps:
            if launch is not None:
                launch.start(addresses, like, stream)
            elif make is None:
                tensors[number] = None
            else:
                # a name of its own would keep the tensor from being freed
                tensors[number] = make(tensors)
                addresses[number] = tensors[number].data_ptr()
        return self.pick(tensors)


def run_pass(this: Pass) -> tuple:
    """What the pass returns. It runs, and is recorded if it has a record."""
    thread.running = this
    try:
        if this.record is None:
            return this.run(*this.arguments)
        with AllocationsAndViews():
            return this.run(*this.arguments)
    finally:
        thread.running = None


def dry_run(this: Pass) -> list:
    """What a pass would launch, as `_launch.Prepared`: it runs, but neither allocates memory nor launches."""
    found: list = []
    thread.running = this._replace(dry=found, record=None)
    try:
        with AllocationsAndViews():
            this.run(*this.arguments)
    finally:
        thread.running = this
    return found


class AllocationsAndViews(TorchDispatchMode):
    """Refuses operations that compute or write."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        returns = func._schema.returns
        view = returns and all(result.alias_info is not None and not result.alias_info.is_write for result in returns)
        if not view and func.overloadpacket.__name__ not in ('empty', 'new_empty', 'new_zeros'):
            raise RuntimeError(
                f'a pass only allocates, takes views and launches, but calls {func}: call it outside of the pass'
            )
        return func(*args, **kwargs or {})
