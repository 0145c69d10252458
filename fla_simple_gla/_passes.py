"""Passes over kernels, and their replay at a fraction of what they keep the host.

A pass is what a mode runs on the GPU in one go, forward or backward: it allocates, and launches. With which numbers it does so follows from
its own numbers and from the layouts of the tensors that it is given. The first call with some of these runs the pass. The second, too,
and what it does is recorded. Later ones replay the record: they allocate, put in the addresses, and call the CUDA driver (`_driver.py`).

A record holds allocations and launches, and nothing else that a pass might do with its tensors. So nothing else is let through while one
is made: it is an error (`AllocationsAndViews`).

Memory: a record has some 3 KB beside its launches. At most 1,024 are kept of passes without a plan (`_cache.py`), and one of each pass
for a plan.
"""

import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ._cache import Cache
from ._driver import Launch, picker, why_not_direct
from ._private import current_stream, launches_are_observed

# Triton's interpreter replaces functions of `triton.language` while a kernel runs: one thread at a time.
interpreting = threading.RLock()


class Pass(NamedTuple):
    """The pass that runs in a thread."""

    run: Callable
    arguments: tuple
    device: int
    direct: bool  # whether its launches are for the driver
    record: 'Record | None' = None  # that is being made of it
    dry: list | None = None  # of a dry run, what it would launch


class Thread(threading.local):
    def __init__(self):
        self.running = None
        self.devices = set()  # whose contexts this thread has made its own


thread = Thread()
# Bytes of a tensor that a replay may keep until its end, so that it shares one allocation with all others of no more
SMALL = 2**24
# What addresses are multiples of, of tensors that share an allocation: more than any load or descriptor asks for
ALIGNMENT = 256
# Of passes without a plan, by their numbers and the layouts of their tensors: SEEN, a record, or UNKNOWN where there can be none. Plans
# have those of theirs.
records = Cache(1024)
SEEN, UNKNOWN = 'seen', 'unknown'


def device_pass(run: Callable) -> Callable:
    """Decorates a pass, `run(tensors, *numbers)`, which is then called so, or with a plan from which the numbers and layouts follow.

    It runs on the device of the first tensor, which is not None, and returns a tuple of tensors that it was given or allocated, and None.
    All it does with tensors is to allocate them with `empty` and `zeros`, to take views, and to launch. How it does so depends on nothing
    but the numbers, which are hashable, and of the tensors on dtypes, shapes, strides, whether an address is a multiple of 16, which are
    None, and which share an address. A pass that is called in another is part of it.
    """

    @functools.wraps(run)
    def call(tensors: tuple[torch.Tensor | None, ...], *numbers, plan=None) -> tuple[torch.Tensor | None, ...]:
        x = tensors[0]
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
        if plan is not None and plan.cached:
            kept, key = plan.records, run
        else:
            kept, key = records, (run, device, numbers, layouts(tensors))
        record = kept.get(key)
        if type(record) is Record:
            return record.replay(tensors, device)
        this = Pass(run, (tensors, *numbers), device, direct=True)
        if record is SEEN:
            record = Record(tensors)
            results = run_pass(this._replace(record=record))
            kept[key] = record if record.finish(results) else UNKNOWN
            return results
        try:
            return run_pass(this)
        finally:
            if record is None:
                kept[key] = SEEN

    return call


def on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda


def enter_context(x: torch.Tensor) -> None:
    """Make the context of x's device that of this thread.

    A thread that has not used the GPU itself has none, such as autograd's when its memory was there before. Triton's launches look
    for one, but to encode a descriptor fails without ("invalid device context").
    """
    x.new_zeros(1)  # any call that starts something there
    thread.devices.add(x.get_device())


def layouts(tensors: tuple[torch.Tensor | None, ...]) -> tuple:
    """Of each tensor all that a plan or a record may depend on."""
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    found = [None if x is None else (x.dtype, x.shape, x.stride(), address % 16) for x, address in zip(tensors, addresses)]
    return *found, shared(addresses)


def shared(addresses: list[int | None]) -> tuple | None:
    """Which of the addresses are the same, if any are: records tell tensors by their addresses."""
    nones = addresses.count(None)
    if len({*addresses}) == len(addresses) - nones + bool(nones):
        return None
    return tuple([addresses.index(address) for address in addresses])


def empty(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised tensor on like's device, and of its dtype if none is given: what a pass allocates."""
    return allocate(like, 'new_empty', shape, dtype or like.dtype)


def zeros(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return allocate(like, 'new_zeros', shape, dtype or like.dtype)


def allocate(like, how, shape, dtype):
    this = thread.running
    if this is not None and this.dry is not None:
        return torch.empty(shape, dtype=dtype, device='meta')
    x = getattr(like, how)(shape, dtype=dtype)
    if this is not None and this.record is not None:
        this.record.allocated(x, how)
    return x


class Allocation(NamedTuple):
    """A tensor that a pass allocates: by which method of a tensor, and like which of those that it was given, if any."""

    how: str
    shape: tuple[int, ...]  # no torch.Size, which takes longer to read
    strides: tuple[int, ...]
    dtype: torch.dtype
    size: int  # bytes
    twin: int | None

    def maker(self) -> Callable:
        """A function that allocates it, from the tensors so far."""
        how, shape, strides, dtype, _, twin = self
        if how == 'new_zeros':
            return lambda tensors: tensors[0].new_zeros(shape, dtype=dtype)
        if twin is not None:
            return lambda tensors: torch.empty_like(tensors[twin])
        # a twin takes half the time of `new_empty`, and strides three quarters
        return lambda tensors: tensors[0].new_empty_strided(shape, strides, dtype=dtype)


class Step(NamedTuple):
    """Of a replay: a launch; or a tensor, by its number, and what allocates it, or None to free it."""

    launch: Launch | None
    number: int | None = None
    make: Callable | None = None


class Record:
    """What a pass did, in terms of tensors by number: those it was given, then those it allocated. It holds on to none of them."""

    def __init__(self, tensors: tuple[torch.Tensor | None, ...]):
        self.given = len(tensors)
        self.allocations = []
        self.steps = []
        self.is_complete = True
        self.twins = {
            (x.dtype, x.shape): i
            for i, x in enumerate(tensors)
            if type(x) is torch.Tensor and x.is_contiguous()
        }
        # The latest with an address or an identity is the one that is alive, and of the given ones the first.
        numbered = [(i, x) for i, x in enumerate(tensors) if x is not None]
        self.by_address = {x.data_ptr(): i for i, x in reversed(numbered)}
        self.by_identity = {id(x): i for i, x in reversed(numbered)}

    def allocated(self, x: torch.Tensor, how: str) -> None:
        number = self.given + len(self.allocations)
        self.by_address[x.data_ptr()] = self.by_identity[id(x)] = number
        twin = self.twins.get((x.dtype, x.shape)) if how == 'new_empty' else None
        self.allocations.append(Allocation(how, tuple(x.shape), x.stride(), x.dtype, x.nbytes, twin))
        self.steps.append(Step(None, number, self.allocations[-1].maker()))

    def launched(self, launch: Launch | None, tensors: tuple[torch.Tensor | None, ...]) -> None:
        """A launch of these tensors, None if it was not the driver's."""
        numbers = [None if x is None else self.by_address.get(x.data_ptr()) for x in tensors]
        if launch is None or any(x is not None and number is None for x, number in zip(tensors, numbers)):
            self.is_complete = False
        else:
            self.steps.append(Step(launch.renumbered(numbers)))

    def finish(self, results: tuple[torch.Tensor | None, ...]) -> bool:
        """Whether all of the pass is known, so that it can be replayed."""
        self.nones = [None] * (len(self.allocations) + 1)  # places of tensors to come, and the None of the results
        self.results = [-1 if x is None else self.by_identity.get(id(x)) for x in results]
        self.is_complete &= None not in self.results
        self.pick = picker(self.results)
        # Small ones that are not among the results share an allocation, at these offsets.
        self.offsets = [None] * len(self.allocations)
        self.shared = 0
        for i, allocation in enumerate(self.allocations):
            if allocation.how == 'new_empty' and allocation.size <= SMALL and self.given + i not in self.results:
                self.offsets[i] = self.shared
                self.shared += -(-allocation.size // ALIGNMENT) * ALIGNMENT
        sharing = {self.given + i for i, offset in enumerate(self.offsets) if offset is not None}
        # The others are freed after their last launch.
        needed, steps = {*self.results, *range(self.given), *sharing}, []
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

    def replay(self, tensors: tuple[torch.Tensor | None, ...], device: int) -> tuple[torch.Tensor | None, ...]:
        like, stream = tensors[0], current_stream(device)
        addresses = [None if x is None else x.data_ptr() for x in tensors]
        if self.shared:
            # the largest integer, with which PyTorch can be told to fill it, is NaN in every floating dtype
            memory = like.new_empty_strided((self.shared // 4,), (1,), dtype=torch.int32)
            start = memory.data_ptr()
            addresses += [None if offset is None else start + offset for offset in self.offsets]
        else:
            addresses += self.offsets
        tensors = [*tensors, *self.nones]
        for launch, number, make in self.steps:
            if launch is not None:
                launch.start(addresses, like, stream)
            elif make is None:
                tensors[number] = None
            else:
                # by no name of its own, which would keep it from being freed
                tensors[number] = make(tensors)
                addresses[number] = tensors[number].data_ptr()
        return self.pick(tensors)


def run_pass(this: Pass) -> tuple[torch.Tensor | None, ...]:
    """Run a pass, and record what it does if it has a record."""
    thread.running = this
    try:
        if this.record is None:
            return this.run(*this.arguments)
        with AllocationsAndViews():
            return this.run(*this.arguments)
    finally:
        thread.running = None


def dry_run(this: Pass) -> list:
    """What a pass launches: it runs without memory for what it allocates, and without launches."""
    found = []
    thread.running = this._replace(dry=found, record=None)
    try:
        with AllocationsAndViews():
            this.run(*this.arguments)
    finally:
        thread.running = this
    return found


class AllocationsAndViews(TorchDispatchMode):
    """Refuses operations that compute or write."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        view = returns and all(result.alias_info is not None and not result.alias_info.is_write for result in returns)
        if not view and func.overloadpacket.__name__ not in ('empty', 'new_empty', 'new_zeros'):
            raise RuntimeError(f'a pass only allocates, takes views and launches, but calls {func}: call it outside of the pass')
        return func(*args, **kwargs or {})
