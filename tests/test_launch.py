"""The host half of a call: plans, passes that are recorded and replayed, and launches by the CUDA driver.

Most tests need no GPU: CPU tensors go a GPU's way, to a driver that notes what it is told (`gpu`).
"""

import ctypes
import os
import struct
import subprocess
import sys
import threading
import time
import types
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from harness import GPU, MODES, STATEFUL, Case, check, launch_by_triton, make_inputs, poisoned_memory, reference, run

from fla_simple_gla import _driver, _launch, _passes, _plans, _private, _triton
from fla_simple_gla._cache import Cache
from fla_simple_gla._driver import Tiles, declared_sizes
from fla_simple_gla._passes import device_pass, empty, zeros
from fla_simple_gla._private import private
from fla_simple_gla._validation import Call

HALF = torch.bfloat16 if GPU else torch.float16
STREAM = 7
C_TYPES = {
    'i1': ctypes.c_bool, 'i8': ctypes.c_int8, 'i16': ctypes.c_int16, 'i32': ctypes.c_int32, 'i64': ctypes.c_int64, 'u1': ctypes.c_bool,
    'u8': ctypes.c_uint8, 'u16': ctypes.c_uint16, 'u32': ctypes.c_uint32, 'u64': ctypes.c_uint64, 'fp32': ctypes.c_float,
}  # fmt: skip
POINTERS = {torch.float32: '*fp32', torch.float16: '*fp16', torch.float64: '*fp64', torch.int32: '*i32', torch.int8: '*i8'}


def assert_same_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def in_threads(calls: list) -> None:
    """Make the calls at once, each in a thread of its own; raises what one of them raises."""
    start, raised = threading.Barrier(len(calls), timeout=30), []

    def guarded(call):
        try:
            start.wait()
            call()
        except BaseException as error:  # noqa: BLE001
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in raised:
        raise error


@pytest.fixture
def threads_that_take_turns():
    """Often: every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


# A kernel, triton and a driver that run nothing


def signature_of(args: tuple) -> dict:
    """As triton writes it: of a one and of None it makes constants."""

    def kind(arg):
        if arg is None or type(arg) is int and arg == 1:
            return 'constexpr'
        if isinstance(arg, torch.Tensor):
            return POINTERS[arg.dtype]
        if isinstance(arg, Tiles):
            return f'tensordesc<fp16{list(arg.block_shape)}>'
        if isinstance(arg, bool):
            return 'u1'
        if isinstance(arg, int):
            return 'i32' if -(2**31) <= arg < 2**31 else 'i64' if arg < 2**63 else 'u64'
        return 'fp32'

    return {i: kind(arg) for i, arg in enumerate(args)}


def ptx_of(signature: dict) -> str:
    """As triton 3.6 to 3.9 declare it, the two scratches at last."""
    pointer, declared = '.u64 .ptr .global .align 1 {}', []
    for kind in signature.values():
        if kind[0] == '*':
            declared.append(pointer)
        elif kind.startswith('tensordesc'):
            rank = kind.split(']')[0].count(',') + 1
            declared += ['.align 64 .b8 {}[128]', *['.u32 {}'] * rank, *['.u64 {}'] * rank]
        elif kind == 'fp32':
            declared.append('.f32 {}')
        elif kind != 'constexpr':
            declared.append(f'.u{8 * ctypes.sizeof(C_TYPES[kind])} {{}}')
    lines = ',\n'.join('\t.param ' + line.format(f'kernel_param_{i}') for i, line in enumerate([*declared, pointer, pointer]))
    return f'.version 8.7\n.target sm_90a\n\n.visible .entry kernel(\n{lines}\n)\n.reqntid 128\n{{\n\tret;\n}}\n'


class Compiled:
    """Stands in for `triton.compiler.CompiledKernel`."""

    all = []

    def __init__(self, signature: dict, ptx=ptx_of, **metadata):
        self.name, self.function = 'kernel', len(self.all)
        self.all.append(self)
        self.src = SimpleNamespace(signature=signature)
        self.asm = {'ptx': ptx(signature)}
        tiles = [kind for kind in signature.values() if kind.startswith('tensordesc')]
        known = dict(
            num_warps=4, num_ctas=1, shared=1000, launch_cooperative_grid=False, launch_pdl=False, global_scratch_size=0,
            profile_scratch_size=0, tensordesc_meta=[{'block_size': [16, 64], 'swizzle': 3, 'fp4_padded': False} for _ in tiles],
        )
        self.metadata = SimpleNamespace(**known | metadata)


class Kernel:
    """Stands in for a kernel: `launches` are those by triton. What it is compiled to can be told otherwise."""

    def __init__(self, count: int = 8, **compiled):
        self.arg_names = [f'x{i}' for i in range(count)]
        self.params = [SimpleNamespace(do_not_specialize=False, do_not_specialize_on_alignment=False) for _ in range(count)]
        self.compiled, self.launches = compiled, []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launches.append((grid, args, constants))
            return Compiled(signature_of(args), **self.compiled)

        return launch


class Config(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = [
        ('grid', ctypes.c_uint * 3), ('block', ctypes.c_uint * 3), ('shared', ctypes.c_uint), ('stream', ctypes.c_void_p),
        ('attributes', ctypes.c_void_p), ('count', ctypes.c_uint),
    ]  # fmt: skip


class Gpu:
    """A driver that notes its launches, and the descriptors that it encodes."""

    def __init__(self):
        self.launches, self.encoded, self.error, self.wait = [], [], 0, 0.0

    def launch(self, config, function, parameters, extra):
        if self.wait:
            time.sleep(self.wait)  # other threads run, as while a real driver is called
        config = Config.from_address(config)
        kinds = []
        for kind in Compiled.all[function].src.signature.values():
            if kind.startswith('tensordesc'):
                rank = kind.split(']')[0].count(',') + 1
                kinds += [kind, *['i32'] * rank, *['i64'] * rank]
            elif kind != 'constexpr':
                kinds.append(kind)
        places = (ctypes.c_void_p * (len(kinds) + 2)).from_address(parameters)
        values = []
        for kind, place in zip([*kinds, 'u64', 'u64'], places):
            if kind.startswith('tensordesc'):
                assert place % 64 == 0
                values.append(self.encoded[ctypes.c_uint64.from_address(place).value].address)
            else:
                c_type = ctypes.c_uint64 if kind[0] == '*' else C_TYPES[kind]
                assert place % ctypes.sizeof(c_type) == 0
                values.append(c_type.from_address(place).value)
        *values, scratch, profile = values
        assert (config.attributes, config.count, extra, profile) == (None, 0, None, 0)
        self.launches.append(SimpleNamespace(
            grid=(*config.grid,), block=(*config.block,), shared=config.shared, stream=config.stream, values=values, scratch=scratch,
            thread=threading.current_thread(),
        ))  # fmt: skip
        return self.error

    def encode(self, place, dtype, rank, address, shape, strides, box, steps, interleave, swizzle, promotion, fill):
        ctypes.memset(place, 255, 128)
        ctypes.c_uint64.from_address(place).value = len(self.encoded)
        self.encoded.append(SimpleNamespace(
            place=place, dtype=dtype, rank=rank, address=address, shape=[*struct.unpack(f'<{rank}Q', shape)],
            strides=[*struct.unpack(f'<{rank - 1}Q', strides)], box=[*box],
            steps=[*steps], interleave=interleave, swizzle=swizzle, promotion=promotion, fill=fill,
        ))  # fmt: skip
        return self.error

    def error_name(self, error, name):
        name._obj.value = b'CUDA_ERROR_OF_A_TEST'

    def values(self) -> list:
        """Those of the launches since the last time."""
        found, self.launches = [launch.values for launch in self.launches], []
        return found


@pytest.fixture
def gpu(monkeypatch):
    """CPU tensors go the way of a GPU's, whose driver this is."""
    found = Gpu()
    driver = _driver.Driver(found.launch, found.encode, found.error_name)
    monkeypatch.setattr(_driver, 'cuda_driver', lambda: driver)
    monkeypatch.setattr(_passes, 'on_gpu', lambda x: True)
    monkeypatch.setattr(_passes, 'why_not_direct', lambda: None)
    monkeypatch.setattr(_passes, 'launches_are_observed', lambda: False)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: -1)  # the number of the CPU
    for module in (_passes, _launch):
        monkeypatch.setattr(module, 'current_stream', lambda device: STREAM)
    monkeypatch.setattr(_passes.thread, 'devices', set())
    monkeypatch.setattr(_passes, 'records', Cache(1024))
    monkeypatch.setattr(_launch, 'variants', {})
    monkeypatch.setattr(_launch, 'ahead', set())
    monkeypatch.setattr(_launch, 'private', {'triton.compiler.CompiledKernel': Compiled}.get)
    monkeypatch.setattr(Compiled, 'all', [])
    yield found
    assert _passes.thread.running is None


def simple_launch(kernel):
    """Launches the kernel with the tensors alone."""
    return _launch.launcher(lambda tensors: (kernel, (1, 3, 1), tensors, {}))


class Watched:
    """A pass whose runs are counted: y, allocated, gets something from x; y and x are returned."""

    def __init__(self, body=None, kernel=None):
        self.runs, self.kernel = 0, kernel or Kernel()
        self.launch = simple_launch(self.kernel)

        def default(tensors, *numbers):
            x, *others = tensors
            y = empty(x, 5)
            self.launch((x, y, *others))
            return y, x, None

        body = body or default

        def a_pass(tensors, *numbers):
            self.runs += 1
            return body(tensors, *numbers)

        self.call = device_pass(a_pass)

    def __call__(self, *tensors, numbers=(), **options):
        return self.call(tensors, *numbers, **options)


def addresses(*tensors: torch.Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]


# Parameters of a launch


@pytest.mark.parametrize('kind', _driver.NUMBERS)
def test_numbers_of_every_type_get_to_the_driver(kind, gpu):
    """At the places that C would give them."""
    signature = {0: '*fp32', 1: 'i8', 2: kind, 3: 'i8', 4: 'i64', 5: 'constexpr'}
    bits = 8 * ctypes.sizeof(C_TYPES[kind])
    limits = {'i': (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), 'u': (0, 2**bits - 1), 'f': (-(2.0**100), 0.5)}[kind[0]]
    variant = _driver.Variant(Compiled(signature), 6)
    assert variant.is_understood
    for number in (False, True) if kind in ('i1', 'u1') else limits:
        launch = _driver.Launch.of(variant, (1, 1, 1), (torch.ones(1), -3, number, 5, -(2**40), 'constant'))
        launch.start([2**48], torch.ones(1), STREAM)
        assert gpu.values() == [[2**48, -3, number, 5, -(2**40)]]


def test_what_a_launch_tells_the_driver(gpu):
    x, y = torch.ones(4), torch.ones(4, dtype=torch.int32)
    kernel = Kernel(num_warps=8)
    launch = _launch.launcher(lambda tensors: (kernel, (5, 6, 7), (*tensors, -5, 1, True, 0.5, 2**40, 2**63), {'BT': 64}))
    a_pass = device_pass(lambda tensors: launch(tensors) or ())
    for _ in range(3):
        a_pass((x, None, y))
    assert kernel.launches == [((5, 6, 7), (x, None, y, -5, 1, True, 0.5, 2**40, 2**63), {'BT': 64})]  # the first is triton's
    for found in gpu.launches:
        assert (found.grid, found.block, found.shared, found.stream, found.scratch) == ((5, 6, 7), (256, 1, 1), 1000, STREAM, 0)
        assert found.values == [*addresses(x, y), -5, True, 0.5, 2**40, 2**63]


def test_the_stream_is_that_of_the_call(gpu, monkeypatch):
    a_pass, x = Watched(), torch.ones(4)
    for stream in range(4):
        for module in (_passes, _launch):
            monkeypatch.setattr(module, 'current_stream', lambda device, stream=stream: stream or None)
        a_pass(x)
    assert [found.stream for found in gpu.launches] == [1, 2, 3] and a_pass.runs == 2


def test_memory_that_a_kernel_asks_for_is_allocated_at_each_launch(gpu, monkeypatch):
    found = []
    allocate = torch.Tensor.new_empty

    def watched(*args, **kwargs):
        found.append(allocate(*args, **kwargs))
        return found[-1]

    a_pass = Watched(lambda tensors: a_pass.launch(tensors) or (), Kernel(global_scratch_size=50))
    a_pass(torch.ones(4))
    monkeypatch.setattr(torch.Tensor, 'new_empty', watched)
    for _ in range(3):
        a_pass(torch.ones(4))
    assert [memory.nbytes for memory in found] == [50 * 3] * 3  # a grid of three
    assert [launch.scratch for launch in gpu.launches] == addresses(*found)


# Tensor descriptors


@pytest.fixture
def tiled_pass(gpu, monkeypatch):
    """Launches of rows of 96 numbers, 128 apart, of which the kernel copies 16 by 64."""
    monkeypatch.setattr(Tiles, 'for_triton', lambda self: self)
    kernel = Kernel()

    @_launch.launcher
    def launch(tensors):
        x, y = tensors
        return kernel, (1, 1, 1), (Tiles(x, (3, 96), (128, 1), (16, 64), 'layout'), y, 12), {}

    return Watched(lambda tensors: launch(tensors) or tensors)


def test_what_the_driver_is_told_of_a_descriptor(tiled_pass, gpu):
    x, y = torch.zeros(3, 128, dtype=torch.float16), torch.zeros(4)
    for _ in range(3):
        tiled_pass(x, y)
    assert gpu.values() == [[x.data_ptr(), 3, 96, 128, 1, y.data_ptr(), 12]] * 2
    (found,) = gpu.encoded
    # from the last dimension on, strides in bytes without that of the last
    assert (found.rank, found.shape, found.strides, found.box, found.steps) == (2, [96, 3], [256], [64, 16], [1, 1])
    # fp16, no interleaving, 128 bytes, promotion to 128 bytes in L2, zeros outside
    assert (found.dtype, found.interleave, found.swizzle, found.promotion, found.fill) == (6, 0, 3, 2, 0)


def test_descriptors_are_encoded_once_for_each_of_the_last_addresses(tiled_pass, gpu):
    most = _driver.MAX_ADDRESSES
    several = [torch.zeros(3, 128, dtype=torch.float16) for _ in range(2 * most)]
    y = torch.zeros(4)
    tiled_pass(several[0], y)
    for _ in range(3):
        for x in several[:most]:
            tiled_pass(x, y)
    assert [found.address for found in gpu.encoded] == addresses(*several[:most])
    for x in several:
        tiled_pass(x, y)
    assert len(gpu.encoded) == 2 * most and tiled_pass.runs == 2
    assert [values[0] for values in gpu.values()[-len(several) :]] == addresses(*several)


def test_memory_of_descriptors_is_kept_while_they_are(tiled_pass, gpu):
    kept = [torch.zeros(3, 128, dtype=torch.float16) for _ in range(40)]
    for x in kept:
        tiled_pass(x, torch.zeros(4))
        records = [record for record in _passes.records.young.values() if isinstance(record, _passes.Record)]
        if not records:
            continue
        ((_, _, maps),) = records[0].steps[0].launch.maps
        assert 0 < len(maps.places) == len(maps.memory) <= _driver.MAX_ADDRESSES
        for place, memory in zip(maps.places.values(), maps.memory):
            start = ctypes.addressof(memory)
            assert place % 64 == 0 and start <= place and place + 128 <= start + len(memory)


# Records


def test_the_first_call_runs_the_second_records_and_later_ones_replay(gpu):
    a_pass, runs, seen, results = Watched(), [], [], []
    kept = [(torch.ones(4), torch.ones(3)) for _ in range(5)]
    for x, z in kept:  # no address comes twice
        y, given, none = a_pass(x, z)
        assert given is x and none is None and y.shape == (5,)
        runs.append(a_pass.runs)
        seen.append(addresses(x, y, z))
        results.append(y)
    assert runs == [1, 2, 2, 2, 2]
    # the first launch of a kernel is triton's
    assert len(a_pass.kernel.launches) == 1 and gpu.values() == seen[1:]


def changed(x: torch.Tensor, z: torch.Tensor) -> dict:
    """Calls that no record of `(x, z)` is for."""
    return {
        'number': ((x, z), (2,)),
        'dtype': ((x.half(), z), (1,)),
        'shape': ((torch.ones(5, 4), z), (1,)),
        'strides': ((x.clone().T, z), (1,)),
        'alignment': ((torch.ones(17)[1:].view(4, 4), z), (1,)),
        'absent': ((x, None), (1,)),
        'one tensor twice': ((x, x), (1,)),
    }


@pytest.mark.parametrize('change', changed(torch.ones(4, 4), torch.ones(4, 4)))
def test_other_calls_are_other_records(change, gpu):
    a_pass = Watched()
    x, z = torch.ones(4, 4), torch.ones(4, 4)
    for _ in range(3):
        a_pass(x, z, numbers=(1,))
    tensors, numbers = changed(x, z)[change]
    for _ in range(3):
        a_pass(*tensors, numbers=numbers)
    a_pass(x, z, numbers=(1,))
    assert a_pass.runs == 4
    *_, other, last = gpu.launches
    for found, (first, second) in ((other, tensors), (last, (x, z))):
        assert found.values[0] == first.data_ptr()
        assert second is None and len(found.values) == 2 or found.values[2] == second.data_ptr()


@pytest.mark.parametrize('cached', [True, False])
def test_a_plan_stands_for_the_layouts_if_it_is_kept(cached, gpu, monkeypatch):
    layouts = mock.Mock(side_effect=_passes.layouts)
    monkeypatch.setattr(_passes, 'layouts', layouts)
    plan, a_pass = _plans.Plan(_plans.Options(1.0)), Watched()
    plan.cached = cached
    for _ in range(4):
        a_pass(x := torch.ones(4), plan=plan if cached else _plans.Plan(plan.options))
    assert (a_pass.runs, layouts.call_count) == (2, 0 if cached else 4)
    assert gpu.values()[-1][0] == x.data_ptr()


def test_a_replay_allocates_anew(gpu):
    a_pass, x = Watched(), torch.ones(4)
    results = [a_pass(x)[0] for _ in range(5)]
    assert len({*addresses(*results)}) == 5


def test_zeros_are_zero_each_time(gpu):
    """Those like a given tensor, too."""
    def body(tensors):
        y, z = zeros(tensors[0], 3, dtype=torch.int32), zeros(tensors[0], 4)
        a_pass.launch((*tensors, y))
        return y, z

    a_pass, kept = Watched(body), []
    for _ in range(4):
        with poisoned_memory():
            y, z = a_pass(torch.ones(4))
        assert (y.tolist(), y.dtype, z.tolist(), z.dtype) == ([0] * 3, torch.int32, [0.0] * 4, torch.float32)
        kept.append(y.fill_(9))


@pytest.mark.parametrize('contiguous', [True, False])
def test_a_result_like_a_given_tensor_is_contiguous_and_its_own(contiguous, gpu):
    x = torch.ones(4, 6) if contiguous else torch.ones(6, 4).T
    a_pass = Watched(lambda tensors: (empty(tensors[0], 4, 6), empty(tensors[0], 4, 6)))
    for _ in range(4):
        a, b = a_pass(x)
        assert len({*addresses(x, a, b)}) == 3
        assert all(y.shape == (4, 6) and y.is_contiguous() and y.dtype == x.dtype for y in (a, b))


def test_what_is_no_result_is_freed_after_its_last_launch(gpu, monkeypatch):
    monkeypatch.setattr(_passes, 'SMALL', 0)
    made, alive = [], []

    def body(tensors):
        (x,) = tensors
        a = empty(x, 5)
        a_pass.launch((x, a))
        b = empty(x, 6)
        a_pass.launch((a, b))
        c = empty(x, 7)
        del a
        a_pass.launch((b, c))
        return (c,)

    a_pass = Watched(body)
    for _ in range(2):
        a_pass(torch.ones(4))
    allocate, launch = torch.Tensor.new_empty_strided, gpu.launch

    def watched_empty(*args, **kwargs):
        made.append(weakref.ref(x := allocate(*args, **kwargs)))
        return x

    def watched_launch(*args):
        alive.append([tensor() is not None for tensor in made])
        return launch(*args)

    monkeypatch.setattr(torch.Tensor, 'new_empty_strided', watched_empty)
    for variant in _launch.variants.values():
        monkeypatch.setattr(variant, 'call', watched_launch)
    result = a_pass(torch.ones(4))
    assert alive == [[True], [True, True], [False, True, True]]
    assert [tensor() is not None for tensor in made] == [False, False, True] and len(result) == 1 and a_pass.runs == 2


@pytest.mark.parametrize('scratch', [0, 50])
def test_small_ones_share_an_allocation(scratch, gpu, monkeypatch):
    monkeypatch.setattr(_passes, 'SMALL', 400)

    def body(tensors):
        (x,) = tensors
        a, b, c, large, result = (empty(x, n) for n in (3, 100, 70, 101, 7))
        a_pass.launch((a, b, c))
        a_pass.launch((large, result, zeros(x, 2)))
        return (result,)

    a_pass = Watched(body, Kernel(global_scratch_size=scratch))
    for _ in range(2):
        a_pass(torch.ones(4))
    sizes, allocate = [], torch.Tensor.new_empty_strided

    def watched(*args, **kwargs):
        sizes.append((x := allocate(*args, **kwargs)).nbytes)
        return x

    monkeypatch.setattr(torch.Tensor, 'new_empty_strided', watched)
    gpu.launches.clear()
    (result,) = a_pass(torch.ones(4))
    (a, b, c), (large, last, _) = gpu.values()
    # 12, 400 and 280 bytes, each in a multiple of 256
    assert (b - a, c - b, last) == (256, 512, result.data_ptr())
    assert not a <= large < a + 1280
    assert sorted(size for size in sizes if size != scratch * 3) == [4 * 7, 4 * 101, 1280]


# What a pass may do


COMPUTATIONS = {
    'fills': lambda x, y: y.fill_(3),
    'adds': lambda x, y: x + 1,
    'adds in place': lambda x, y: x.add_(1),
    'copies into': lambda x, y: y.copy_(x),
    'clones': lambda x, y: x.clone(),
    'casts': lambda x, y: x.half(),
    'copies a transposed one': lambda x, y: x.T.contiguous(),
    'allocates by other functions': lambda x, y: torch.empty_like(x),
    'allocates ones': lambda x, y: x.new_ones(3),
    'reads a number': lambda x, y: x[0, 0].item(),
    'writes to an element': lambda x, y: x.__setitem__(0, 7),
    'changes a shape': lambda x, y: y.unsqueeze_(0),
    'writes by out': lambda x, y: torch.add(x, 1, out=y),
}


def computing_pass(name: str) -> Watched:
    def body(tensors):
        (x,) = tensors
        y = empty(x, 4, 4)
        COMPUTATIONS[name](x, y)
        return (y,)

    return Watched(body)


@pytest.mark.parametrize('name', COMPUTATIONS)
def test_a_pass_that_computes_is_an_error_when_it_is_recorded(name, gpu):
    a_pass, x = computing_pass(name), torch.ones(4, 4)
    a_pass(x.clone())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r'a pass only allocates, takes views and launches, but calls aten\.\w+'):
            a_pass(x)
    assert torch.equal(x, torch.ones(4, 4))


@pytest.mark.parametrize('name', COMPUTATIONS)
def test_a_pass_that_computes_is_an_error_in_a_dry_run(name, gpu):
    a_pass, x = computing_pass(name), torch.ones(4, 4)
    this = _passes.Pass(a_pass.call.__wrapped__, ((x,),), -1, True)
    with pytest.raises(RuntimeError, match='a pass only allocates, takes views and launches'):
        _passes.dry_run(this)
    assert torch.equal(x, torch.ones(4, 4)) and _passes.thread.running is this
    _passes.thread.running = None


def test_views_are_allowed(gpu):
    def body(tensors):
        (x,) = tensors
        y = empty(x, 4, 6)
        views = x.mT, x[:2], x.view(-1), x.unflatten(1, (2, 2)), y.detach(), y[0].expand(3, 6), y.view(2, 12), y.as_strided((2,), (1,))
        a_pass.launch(views)
        return x, y

    a_pass = Watched(body)
    for _ in range(4):
        x, y = a_pass(torch.ones(4, 4))
        launched = (gpu.values() or [None])[-1]
        assert launched in (None, [x.data_ptr()] * 4 + [y.data_ptr()] * 4)
    assert a_pass.runs == 2 and launched


def test_the_dry_run_of_a_pass_neither_allocates_nor_launches(gpu):
    a_pass, x = Watched(), torch.ones(4)
    this = _passes.Pass(a_pass.call.__wrapped__, ((x, None),), -1, True)
    ((kernel, grid, args, constants),) = _passes.dry_run(this)
    assert (kernel, grid, constants) == (a_pass.kernel, (1, 3, 1), {})
    assert args[0] is x and args[1].is_meta and args[1].shape == (5,) and args[2] is None
    assert not kernel.launches and not gpu.launches
    _passes.thread.running = None


FOREIGN = {
    'a launch of a tensor from elsewhere': lambda x, y, other: ((x, other), (y,)),
    'a launch of a view elsewhere in a tensor': lambda x, y, other: ((x, x[1:]), (y,)),
    'a result from elsewhere': lambda x, y, other: ((x, y), (other,)),
    'a view as a result': lambda x, y, other: ((x, y), (y[1:],)),
}


@pytest.mark.parametrize('name', FOREIGN)
def test_a_pass_with_tensors_of_unknown_origin_runs_every_time(name, gpu):
    others = iter([torch.ones(3) for _ in range(5)])

    def body(tensors):
        (x,) = tensors
        launched, results = FOREIGN[name](x, empty(x, 4), next(others))
        a_pass.launch(launched)
        expected.append(addresses(*launched))
        return results

    a_pass, expected = Watched(body), []
    for i in range(5):
        (result,) = a_pass(torch.ones(4))
        assert result.shape == ((3,) if 'result' in name else (4,)) and a_pass.runs == i + 1
    assert gpu.values() == expected[1:]


def test_an_error_in_a_pass_leaves_the_thread_as_it_was(gpu):
    def body(tensors, fails):
        if fails:
            raise KeyError('a test')
        a_pass.launch(tensors)
        return tensors

    a_pass, x = Watched(body), torch.ones(4)
    for numbers in (True, True, False, False):
        if numbers:
            with pytest.raises(KeyError, match='a test'):
                a_pass(x, numbers=(numbers,))
        else:
            a_pass(x, numbers=(numbers,))
        assert _passes.thread.running is None
    assert gpu.values() == [[x.data_ptr()]]


def test_a_pass_inside_of_another_is_part_of_it(gpu):
    inner = Watched(lambda tensors: inner.launch(tensors) or tensors[:1])

    def body(tensors):
        x, z = tensors
        y = empty(x, 5)
        inner(x, y)
        inner(z, y)
        outer.launch((x, z))
        return (y,)

    outer = Watched(body)
    for i in range(4):
        x, z = torch.ones(4), torch.ones(4)
        (y,) = outer(x, z)
        found = gpu.values()
        expected = [addresses(x, y), addresses(z, y), addresses(x, z)]
        # the first launch of each kernel is triton's
        assert found == (expected if i else expected[1:2])
    assert (outer.runs, inner.runs) == (2, 4)


# What is left to triton


def without_last(signature: dict) -> str:
    """One parameter less than is known."""
    head, _, tail = ptx_of(signature).rpartition(',\n')
    return head + tail[tail.index('\n)') :]


def with_more(signature: dict) -> str:
    return ptx_of(signature).replace('\n)', ',\n\t.param .u64 kernel_param_9\n)')


OTHERWISE = {
    'one parameter less': dict(ptx=without_last),
    'one more': dict(ptx=with_more),
    'another size': dict(ptx=lambda signature: ptx_of(signature).replace('.u32', '.u64')),
    'another order': dict(ptx=lambda signature: ptx_of({0: '*fp32', 1: '*fp32', 2: 'i64', 3: 'i32'})),
    'no list of parameters': dict(ptx=lambda signature: 'nothing'),
    'clusters': dict(num_ctas=2),
    'a cooperative grid': dict(launch_cooperative_grid=True),
    'programmatic dependent launch': dict(launch_pdl=True),
    'memory for a profiler': dict(profile_scratch_size=1),
}


@pytest.mark.parametrize('name', OTHERWISE)
def test_kernels_with_other_parameters_than_known_are_launched_by_triton(name, gpu):
    kernel = Kernel(**OTHERWISE[name])
    launch = _launch.launcher(lambda tensors: (kernel, (1, 1, 1), (*tensors, -5, 2**40), {}))
    a_pass = Watched(lambda tensors: launch(tensors) or tensors)
    for i in range(4):
        x, y = torch.ones(4), torch.ones(4)
        a_pass(x, y)
        assert kernel.launches[-1][1][:2] == (x, y) and len(kernel.launches) == a_pass.runs == i + 1
    assert not gpu.launches


@pytest.mark.parametrize('signature', [
    {0: '*fp32', 1: ('i32', 'i32')}, {0: '*fp32', 1: 'bf16'}, {0: '*fp32', 1: 'i32', 2: '*fp32'}, {0: '*fp32', 1: 'i32', 2: 'i32'},
], ids=['a tuple', 'a new type', 'a pointer after a number', 'more than the arguments'])  # fmt: skip
def test_other_signatures_are_not_understood(signature, gpu):
    known = _driver.Variant(Compiled({0: '*fp32', 1: 'i32'}), 2)
    assert known.is_understood
    compiled = Compiled({0: '*fp32', 1: 'i32'})
    compiled.src.signature = signature
    compiled.asm['ptx'] = ptx_of({i: kind for i, kind in signature.items() if kind in ('*fp32', 'i32')})
    assert not _driver.Variant(compiled, 2 if len(signature) == 2 or signature[2] == 'i32' else 3).is_understood


@pytest.mark.parametrize('described', [None, [], [None], [{'block_size': [64], 'swizzle': 3}],
                                       [{'block_size': [16, 64], 'swizzle': 3, 'fp4_padded': True}]])  # fmt: skip
def test_descriptors_that_triton_describes_otherwise_are_not_understood(described, gpu):
    signature = {0: 'tensordesc<fp16[16, 64]>'}
    assert _driver.Variant(Compiled(signature), 1).is_understood
    assert not _driver.Variant(Compiled(signature, tensordesc_meta=described), 1).is_understood


def test_a_kernel_is_compiled_again_for_what_triton_specialises_on(gpu):
    kernel, x = Kernel(), torch.ones(5)
    launch = _launch.launcher(lambda tensors, number: (kernel, (1, 1, 1), (*tensors, number), {}))
    a_pass = device_pass(lambda tensors, number: launch(tensors, number) or ())
    launched = []
    for tensor, number in ((x, 3), (x[1:], 3), (x.half(), 3), (x, 16), (x, 1), (x, 2**40), (x, 2**63), (x, 0.5), (x, False), (x, 0)):
        before = len(kernel.launches)
        a_pass((tensor,), number)
        launched.append(len(kernel.launches) - before)
    # nought is a multiple of 16, as 16 is
    assert launched == [1] * 9 + [0]
    for parameter in kernel.params:
        parameter.do_not_specialize = True
    _launch.specialization_rules.cache_clear()
    _launch.variants.clear()
    for number in (3, 16, 1, 0):
        a_pass((x[2:],), number)
    assert len(kernel.launches) == 9 + 1


def test_a_kernel_that_a_hook_took_away_is_launched_by_triton(gpu, monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(Kernel, '__getitem__', lambda self, grid: lambda *args, **constants: self.launches.append(args))
    a_pass = Watched(kernel=kernel)
    for _ in range(3):
        a_pass(torch.ones(4))
    assert len(kernel.launches) == a_pass.runs == 3 and not gpu.launches and not _launch.variants


@pytest.mark.parametrize('name', ['why_not_direct', 'launches_are_observed'])
def test_passes_run_each_time_where_the_driver_is_not_for_them(name, gpu, monkeypatch):
    monkeypatch.setattr(_passes, name, lambda: 'a reason')
    a_pass = Watched()
    for i in range(4):
        y, x, _ = a_pass(torch.ones(4))
        assert a_pass.kernel.launches[-1] == ((1, 3, 1), (x, y), {}) and len(a_pass.kernel.launches) == a_pass.runs == i + 1
    assert not gpu.launches and not len(_passes.records)
    # and the driver is called as soon as it may be
    monkeypatch.setattr(_passes, name, lambda: None)
    for _ in range(3):
        a_pass(torch.ones(4))
    assert a_pass.runs == 6 and len(gpu.launches) == 2


def test_a_record_is_not_replayed_while_triton_is_watched(gpu, monkeypatch):
    a_pass = Watched()
    for _ in range(3):
        a_pass(torch.ones(4))
    monkeypatch.setattr(_passes, 'launches_are_observed', lambda: True)
    a_pass(torch.ones(4))
    assert (a_pass.runs, len(gpu.launches), len(a_pass.kernel.launches)) == (3, 2, 2)


def test_hooks_and_options_of_triton_are_seen():
    knobs = pytest.importorskip('triton.knobs')
    if _triton.why_not('direct'):
        pytest.skip(_triton.why_not('direct'))
    assert not _private.launches_are_observed()
    for scope, name, value in (
        (knobs.runtime, 'debug', True), (knobs.compilation, 'instrumentation_mode', 'consan'),
        (knobs.runtime, 'add_stages_inspection_hook', lambda *args: None),
    ):  # fmt: skip
        with scope.scope():
            setattr(scope, name, value)
            assert _private.launches_are_observed(), name
        assert not _private.launches_are_observed()
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        hook.add(print)
        assert _private.launches_are_observed()
        hook.remove(print)
    assert not _private.launches_are_observed()


def test_a_triton_with_other_hooks_counts_as_observed(monkeypatch):
    for knobs in (None, SimpleNamespace(), SimpleNamespace(runtime=SimpleNamespace(debug=False))):
        monkeypatch.setattr(_private, 'private', lambda name, knobs=knobs: knobs)
        assert _private.launches_are_observed()


# Errors of the driver


def test_an_error_of_a_launch_names_the_kernel_and_the_error(gpu):
    a_pass = Watched()
    a_pass(torch.ones(4))  # the first launch is triton's
    gpu.error = 700
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r'launch of kernel failed with CUDA error 700 \(CUDA_ERROR_OF_A_TEST\)'):
            a_pass(torch.ones(4))
    gpu.error = 0
    for _ in range(2):
        a_pass(torch.ones(4))
    assert len(a_pass.kernel.launches) == 1


def test_an_error_of_a_descriptor_names_its_layout(tiled_pass, gpu):
    x, y = torch.zeros(3, 128, dtype=torch.float16), torch.zeros(4)
    tiled_pass(x, y)
    gpu.error = 1
    message = r'descriptor of shape \[3, 96\], strides \[256\] in bytes failed with CUDA error 1 \(CUDA_ERROR_OF_A_TEST\)'
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            tiled_pass(x, y)
    gpu.error = 0
    for _ in range(2):
        tiled_pass(x, y)
    assert [values[0] for values in gpu.values()] == [x.data_ptr()] * 2


# What PTX declares


def test_declared_sizes():
    ptx = ptx_of({0: '*fp32', 1: 'tensordesc<fp16[16, 64]>', 2: 'i32', 3: 'u1', 4: 'i16', 5: 'fp32', 6: 'i64', 7: 'constexpr'})
    assert '.param .u64 .ptr .global .align 1 kernel_param_0,' in ptx and '.param .align 64 .b8 kernel_param_1[128],' in ptx
    assert declared_sizes(ptx) == [8, 128, 4, 4, 8, 8, 4, 1, 2, 4, 8, 8, 8]
    older = '.visible .entry k_0123$x(\n .param .u64 k_param_0,\n .param .f64 k_param_1\n)\n.maxntid 128, 1, 1\n{'
    assert declared_sizes(older) == [8, 8]
    assert declared_sizes('.entry kernel () { ret; }') == []


@pytest.mark.parametrize('ptx', [
    '', 'nothing', '.func kernel(.param .u64 x) {', '.entry kernel(.param x) {', '.entry kernel(.param .u64 x, .reg .u32 y) {',
    '.entry kernel(.param .u64 x', '.entry kernel(.param .align 64 .b8 x[]) {',
])  # fmt: skip
def test_what_is_no_ptx_declares_nothing(ptx):
    assert declared_sizes(ptx) is None


KERNELS = '''
import triton
import triton.language as tl

@triton.jit
def kernel(x, y, n, m, scale, flag, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    a = tl.load(x + o, mask=o < n)
    if flag:
        a += scale
    tl.store(y + o + m, a)

@triton.jit
def tiled_kernel(tiles, y, n):
    o = tl.arange(0, 16)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(y + o, tiles.load([n, 0]))
'''
COMPILES = '''
import sys
from types import SimpleNamespace

import kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fla_simple_gla import _driver
from fla_simple_gla._driver import declared_sizes

_driver.cuda_driver = lambda: SimpleNamespace(launch=None)
for kernel, signature, constants, sizes in (
    (
        kernels.kernel, {'x': '*fp32', 'y': '*fp32', 'n': 'i32', 'm': 'i64', 'scale': 'fp32', 'flag': 'u1', 'BLOCK': 'constexpr'},
        {'BLOCK': 64}, [8, 8, 4, 8, 4, 1, 8, 8],
    ),
    (kernels.tiled_kernel, {'tiles': 'tensordesc<fp16[16, 64]>', 'y': '*fp16', 'n': 'i32'}, {}, [128, 4, 4, 8, 8, 8, 4, 8, 8]),
):
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget('cuda', 90, 32))
    assert declared_sizes(compiled.asm['ptx']) == sizes, compiled.asm['ptx'][:2000]
    variant = _driver.Variant(compiled, len(signature) - len(constants))
    assert variant.is_understood, vars(variant)
    assert (variant.name, variant.threads, variant.shared) == (kernel.__name__, 128, compiled.metadata.shared)
'''


def run_python(code: str, **environment: str | None) -> subprocess.CompletedProcess:
    """Run code in a process of its own, with this environment besides; None takes a variable out."""
    merged = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)} | environment
    merged = {name: value for name, value in merged.items() if value is not None}
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, env=merged)


def test_what_triton_compiles_is_understood(tmp_path):
    """With the triton that is installed, for a GPU that need not be there."""
    if _triton.why_not('direct'):
        pytest.skip(_triton.why_not('direct'))
    (tmp_path / 'kernels.py').write_text(KERNELS)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = run_python(COMPILES, TRITON_INTERPRET=None, TRITON_CACHE_DIR=str(tmp_path / 'cache'), PYTHONPATH=path)
    assert result.returncode == 0, result.stderr


# Caches


def test_a_cache_is_bounded():
    cache = Cache(100)
    for i in range(1000):
        cache[i] = i
        assert cache.get(i // 2) in (None, i // 2) and len(cache) <= 200
    assert len(cache) > 100


def test_what_is_looked_up_again_survives_what_comes_once():
    cache = Cache(100)
    for i in range(40):
        cache[('again', i)] = i
        assert cache.get(('again', i)) == i
    for i in range(10_000):
        assert cache.get(i) is None
        cache[i] = 'once'
    assert [cache.get(('again', i)) for i in range(40)] == [*range(40)]
    assert cache.get(9_999) == 'once' and cache.get(0) is None


def test_the_least_recently_used_is_dropped():
    cache = Cache(100)
    for i in range(1000):
        cache[i] = str(i)
        cache.get(i)
        cache.get(7)
    assert len(cache) <= 100 and cache.get(7) == '7'
    assert [cache.get(i) for i in range(960, 1000)] == [str(i) for i in range(960, 1000)]
    assert all(cache.get(i) is None for i in range(800) if i != 7)


@pytest.mark.parametrize('lookups', [0, 1, 60])
def test_a_new_value_takes_the_place_of_the_old(lookups):
    cache = Cache(100)
    cache['key'] = 'old'
    for i in range(lookups):
        cache.get('key')
        if i:  # these make the key an older one
            cache[i] = i
            cache.get(i)
    cache['key'] = 'new'
    assert cache.get('key') == 'new' and len(cache) == max(lookups, 1)


def test_a_cache_in_threads(threads_that_take_turns):
    cache, wrong = Cache(20), []

    def use(seed):
        numbers = torch.randint(40, (3000,), generator=torch.Generator().manual_seed(seed)).tolist()
        for i in numbers:
            value = cache.get(i)
            if value is None:
                cache[i] = str(i)
            elif value != str(i):
                wrong.append((i, value))

    in_threads([lambda seed=seed: use(seed) for seed in range(4)])
    assert not wrong and len(cache) <= 40
    kept = [*cache.new, *cache.young, *cache.old]
    assert len({*kept}) == len(kept)


def test_a_plan_survives_ten_thousand_other_lengths(monkeypatch):
    monkeypatch.setattr(_plans, 'plans', Cache(1024))
    memory, gates = torch.zeros(1, 10_001, 1, 1), torch.zeros(1, 10_001, 1)

    def plan_of(T):
        q = memory[:, :T]
        return _plans.plan_for(Call(q, q, q, gates[:, :T], output_final_state=True))

    plans = [plan_of(1), plan_of(1), *(plan_of(T) for T in range(2, 10_002)), plan_of(1)]
    assert plans[0] is plans[1] is plans[-1] and plans[0].cached
    assert len({*plans}) == 10_001 and len(_plans.plans) <= 2048


def test_a_record_survives_ten_thousand_other_calls(gpu):
    a_pass = Watched()
    for _ in range(2):
        a_pass(torch.ones(4), numbers=('of a token',))
    for i in range(10_000):
        a_pass(torch.ones(4), numbers=(i,))
    runs = a_pass.runs
    a_pass(torch.ones(4), numbers=('of a token',))
    assert a_pass.runs == runs == 10_002 and len(_passes.records) <= 2048


# Threads


def test_first_calls_of_threads_at_once_compile_a_kernel_once(gpu):
    class SlowKernel(Kernel):
        def __getitem__(self, grid):
            time.sleep(0.02)
            return super().__getitem__(grid)

    a_pass, launched = Watched(kernel=SlowKernel()), []

    def call():
        for _ in range(20):
            x = torch.ones(4)
            y, given, _ = a_pass(x)
            assert given is x
            launched.append((x, y))
            assert _passes.thread.running is None

    in_threads([call] * 4)
    ((_, by_triton, _),) = a_pass.kernel.launches
    assert sorted([*gpu.values(), addresses(*by_triton)]) == sorted(addresses(*tensors) for tensors in launched)
    # each thread runs it twice at most: another's record may be there by then
    assert 2 <= a_pass.runs <= 8


def test_threads_that_replay_at_once_get_their_own_addresses(gpu, threads_that_take_turns):
    """A launch's memory is one for all threads."""
    a_pass, seen = Watched(), {}
    for _ in range(2):
        a_pass(torch.ones(4))
    gpu.launches.clear()
    gpu.wait = 1e-4

    def call():
        for _ in range(50):
            x = torch.ones(4)
            y, *_ = a_pass(x)
            seen.setdefault(threading.current_thread(), []).append(addresses(x, y))

    in_threads([call] * 4)
    for thread, expected in seen.items():
        assert [launch.values for launch in gpu.launches if launch.thread is thread] == expected
    assert len(gpu.launches) == 200 and a_pass.runs == 2


@pytest.mark.parametrize('futures', [True, False])
def test_kernels_are_compiled_side_by_side_and_loaded_one_by_one(futures, gpu, monkeypatch):
    count, loaded, events = 3, [], []
    together = threading.Barrier(count, timeout=30)

    class Future:
        def __init__(self, kernel):
            self.result = lambda: kernel

    class Mode:
        def __init__(self, pool):
            self.pool = pool

        def __enter__(self):
            events.append('begin')

        def __exit__(self, *args):
            events.append('end')

    class CompiledAhead(Compiled):
        @property
        def run(self):
            loaded.append(threading.current_thread())
            return 'launcher'

    class KernelAhead(Kernel):
        def warmup(self, *args, grid, **constants):
            events.append((self, args[1].is_meta, grid, constants))
            compiled = CompiledAhead(signature_of((args[0], args[0])))
            return Future(compiled) if futures else compiled

    monkeypatch.setattr(_launch, 'private', {
        'triton.compiler.CompiledKernel': Compiled, 'triton.AsyncCompileMode': Mode, 'triton.FutureKernel': Future,
        'triton.runtime.driver.active.launcher_cls': lambda src, metadata: together.wait(),
    }.get)  # fmt: skip
    kernels = [KernelAhead() for _ in range(count)]

    def body(tensors):
        (x,) = tensors
        y = empty(x, 5)
        for kernel in kernels:
            simple_launch(kernel)((x, y))
            simple_launch(kernel)((x, y))
        return (y,)

    a_pass = Watched(body)
    for _ in range(3):  # known from the second time on
        a_pass(torch.ones(4))
    assert events == ['begin', *[(kernel, True, (1, 3, 1), {}) for kernel in kernels], 'end']
    assert loaded == [threading.current_thread()] * count
    assert [len(kernel.launches) for kernel in kernels] == [1] * count
    # gone through without memory, run twice
    assert a_pass.runs == 3


def test_a_kernel_alone_is_not_compiled_ahead(gpu, monkeypatch):
    mode = mock.Mock()
    monkeypatch.setattr(_launch, 'private', lambda name: Compiled if name == 'triton.compiler.CompiledKernel' else mode)
    a_pass = Watched()
    for _ in range(2):
        a_pass(torch.ones(4))
    assert not mode.mock_calls and a_pass.runs == 3 and len(a_pass.kernel.launches) == 1


@pytest.mark.skipif(GPU, reason='of the interpreter')
def test_threads_share_the_interpreter():
    """It replaces functions of `triton.language` while a kernel runs: one pass runs at a time, forward or backward."""
    cases = [Case(9, K=16, V=16, seed=seed).of(mode) for seed, mode in enumerate(MODES)]
    inputs = [make_inputs(case) for case in cases]
    expected = [run(MODES[mode], case, x) for mode, case, x in zip(MODES, cases, inputs)]
    found = [None] * len(cases)

    def call(i, mode):
        for _ in range(2):
            x = inputs[i]
            leaves = [x[name].detach().requires_grad_() for name in ('q', 'k', 'v', 'g')]
            options = dict(initial_state=x['initial_state'], output_final_state=True) if mode in STATEFUL else {}
            o, ht = MODES[mode](*leaves, **options)
            outputs, given = ([o, ht], [x['do'], x['dht']]) if mode in STATEFUL else ([o], [x['do']])
            gradients = torch.autograd.grad(outputs, leaves, given)
            found[i] = dict(zip(('o', 'dq', 'dk', 'dv', 'dg'), (o.detach(), *gradients)))

    in_threads([lambda i=i, mode=mode: call(i, mode) for i, mode in enumerate(MODES) if mode != 'segments'])
    for mode, results, exact in zip(MODES, found, expected):
        if mode != 'segments':  # which the harness makes by patching: for one thread
            assert_same_bits(results, {name: exact[name] for name in results})


# Memory that triton asks for


def ours(size, alignment, stream):
    """An allocator of a test."""


@pytest.fixture(params=['the version that is installed', 'a global, as in 3.4'])
def allocator_of_user(request, monkeypatch):
    """Tells which allocator triton has, and what the user set before."""
    triton = pytest.importorskip('triton')
    allocation = sys.modules['triton.runtime._allocation']
    if request.param != 'a global, as in 3.4':
        before = current = (lambda: getattr(allocation._allocator, 'get', lambda: allocation._allocator)())
        user, before = lambda size, alignment, stream: None, before()
        triton.set_allocator(user)
        yield current, user
        triton.set_allocator(before)
        return
    user = lambda size, alignment, stream: None  # noqa: E731
    allocation = types.ModuleType('_allocation')
    allocation._allocator = user
    monkeypatch.setattr(triton, 'set_allocator', lambda allocator: setattr(allocation, '_allocator', allocator))
    monkeypatch.setattr(_private, 'private', {'triton.runtime._allocation': allocation}.get)
    yield lambda: allocation._allocator, user


def test_the_allocator_of_the_user_is_in_place_after_a_call(allocator_of_user):
    current, user = allocator_of_user
    assert current() is user
    assert _private.with_allocator(ours, lambda: (current(), 'result')) == (ours, 'result')
    assert current() is user


def test_the_allocator_of_the_user_is_in_place_after_an_error(allocator_of_user):
    current, user = allocator_of_user

    def call():
        assert current() is ours
        raise KeyError('a test')

    with pytest.raises(KeyError, match='a test'):
        _private.with_allocator(ours, call)
    assert current() is user


def test_memory_is_for_kernels_that_make_descriptors(monkeypatch):
    with_allocator = mock.Mock(side_effect=lambda allocator, call: call())
    monkeypatch.setattr(_launch, 'with_allocator', with_allocator)
    kernel = Kernel()
    for constants, calls in (({}, 0), ({'TMA': False}, 0), ({'TMA': True}, 1)):
        _launch.launch_by_triton(_launch.Prepared(kernel, (1, 1, 1), ('x', 2), constants))
        assert kernel.launches[-1] == ((1, 1, 1), ('x', 2), constants) and with_allocator.call_count == calls
    assert with_allocator.call_args.args[0] is _triton.scratch


# Versions of triton, and the environment


@pytest.fixture
def reasons(monkeypatch):
    """What is decided once is decided anew, in the test and after it; as with CUDA and its driver."""
    from fla_simple_gla.fused_chunk import hopper_module

    caches = _driver.why_not_direct, _triton.warn_once, hopper_module
    monkeypatch.delenv('FLA_SIMPLE_GLA_DIRECT', raising=False)
    monkeypatch.delenv('FLA_SIMPLE_GLA_HOPPER', raising=False)
    monkeypatch.setattr(torch.version, 'cuda', '12.8')
    monkeypatch.setattr(_driver, 'cuda_driver', lambda: 'a driver')

    def clear():
        for cache in caches:
            cache.cache_clear()

    clear()
    yield clear
    clear()


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('version', _triton.KNOWN)
def test_known_versions_of_triton(version, reasons, monkeypatch):
    monkeypatch.setattr(_triton.triton, '__version__', f'{version}.1+git')
    for feature in _triton.WHAT:
        assert (_triton.why_not(feature) is None) == (feature in _triton.KNOWN[version])
    assert (_driver.why_not_direct() is None) == ('direct' in _triton.KNOWN[version])


@pytest.mark.parametrize('version', ['3.10.0', '3.5.1', '4.0.0'])
def test_what_another_version_of_triton_lacks_is_told_once(version, reasons, monkeypatch):
    monkeypatch.setattr(_triton.triton, '__version__', version)
    with pytest.warns(UserWarning) as warned:
        for _ in range(2):
            assert version in _driver.why_not_direct()
            for feature in _triton.WHAT:
                _triton.warn_once(feature)
            _driver.why_not_direct.cache_clear()
    texts = {str(found.message) for found in warned}
    assert len(warned) == len(texts) == len(_triton.WHAT) == 3
    for feature, what in _triton.WHAT.items():
        tested = [known for known, features in _triton.KNOWN.items() if feature in features]
        reason = f'triton {version} is not one of the versions that this was made for ({", ".join(tested)})'
        assert f'fla_simple_gla: {what}: {reason}. The results are the same.' in texts


def test_kernels_for_hopper_are_off_with_another_version_of_triton(reasons, monkeypatch):
    from fla_simple_gla import fused_chunk

    monkeypatch.setattr(fused_chunk, 'is_hopper', lambda device: True)
    device = torch.device('cuda', 0)
    monkeypatch.setattr(_triton.triton, '__version__', '3.9.0')
    assert fused_chunk.why_no_hopper_sweeps(64, 128, torch.bfloat16, device) is None
    with pytest.warns(UserWarning, match='off for K or V over 128.*triton 3.9.0'):
        assert '3.9.0' in fused_chunk.why_no_hopper_sweeps(64, 256, torch.bfloat16, device)
    monkeypatch.setattr(_triton.triton, '__version__', '3.10.0')
    with pytest.warns(UserWarning, match='the kernels for Hopper are off.*triton 3.10.0') as warned:
        for K in (64, 128, 256):
            assert '3.10.0' in fused_chunk.why_no_hopper_sweeps(K, K, torch.bfloat16, device)
            assert fused_chunk.hopper_module(K, K, torch.bfloat16, device) is None
    assert len(warned) == 1
    monkeypatch.setenv('FLA_SIMPLE_GLA_HOPPER', '0')
    assert 'FLA_SIMPLE_GLA_HOPPER=0' in fused_chunk.why_no_hopper_sweeps(64, 64, torch.bfloat16, device)


@pytest.mark.filterwarnings('error')
def test_why_the_driver_is_not_called(reasons, monkeypatch):
    monkeypatch.setattr(_triton.triton, '__version__', '3.9.0')
    assert _driver.why_not_direct() is None

    def reason():
        _driver.why_not_direct.cache_clear()
        return _driver.why_not_direct()

    with monkeypatch.context() as patch:
        patch.setenv('FLA_SIMPLE_GLA_DIRECT', '0')
        assert 'FLA_SIMPLE_GLA_DIRECT=0' in reason()
        patch.setenv('FLA_SIMPLE_GLA_DIRECT', '1')
        assert reason() is None
    with monkeypatch.context() as patch:
        patch.setattr(_driver, 'cuda_driver', lambda: None)
        assert 'libcuda.so.1' in reason()
    with monkeypatch.context() as patch:
        patch.setattr(_driver, 'private', lambda name: None)
        assert 'CompiledKernel' in reason()
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, 'cuda', None)
        assert 'not built for CUDA' in reason()
    assert reason() is None


def test_there_is_no_driver_without_its_library(monkeypatch):
    """Nor one that lacks a function."""
    _driver.cuda_driver.cache_clear()
    for library in (mock.Mock(side_effect=OSError), mock.Mock(return_value=SimpleNamespace(cuLaunchKernelEx=mock.Mock()))):
        monkeypatch.setattr(ctypes, 'CDLL', library)
        assert _driver.cuda_driver() is None
        _driver.cuda_driver.cache_clear()
    monkeypatch.setattr(ctypes, 'CDLL', mock.Mock())
    assert _driver.cuda_driver() is not None
    _driver.cuda_driver.cache_clear()


@pytest.mark.parametrize('before, after, message', [
    (None, '1', 'triton was imported without TRITON_INTERPRET=1, and fla_simple_gla otherwise'),
    ('1', None, 'triton was imported with TRITON_INTERPRET=1, and fla_simple_gla otherwise'),
], ids=['set', 'unset'])  # fmt: skip
def test_the_interpreter_must_be_asked_for_before_triton_is_imported(before, after, message):
    change = "os.environ['TRITON_INTERPRET'] = '1'" if after else "del os.environ['TRITON_INTERPRET']"
    result = run_python(f'import os, triton\n{change}\nimport fla_simple_gla', TRITON_INTERPRET=before)
    assert result.returncode == 1 and f'ImportError: {message}' in result.stderr
    assert 'set the variable before the first import of triton' in result.stderr


# Names that PyTorch and triton do not promise to keep


def without(monkeypatch, *names: str) -> None:
    """There is nothing of these names."""

    def found(name):
        return None if name in names else private(name)

    for module in (_private, _launch, _driver):
        monkeypatch.setattr(module, 'private', found)
    monkeypatch.setattr(_passes, 'why_not_direct', _driver.why_not_direct.__wrapped__)  # which is asked once
    # this one is looked at afresh each time
    if 'torch.autograd.forward_ad._current_level' in names:
        monkeypatch.setattr(_private, 'forward_ad', SimpleNamespace(unpack_dual=torch.autograd.forward_ad.unpack_dual))
    for mode in MODES.values():
        mode_object = getattr(sys.modules[mode.__module__], 'mode', None)
        if mode_object is not None:
            monkeypatch.setattr(mode_object, 'apply_without_transforms', _private.apply_without_transforms(mode_object.function))


@pytest.mark.parametrize('name', _private.NAMES)
def test_to_look_for_a_private_name_is_no_error(name):
    """Nor where triton has no driver, as without a GPU."""
    private.__wrapped__(name)


@pytest.mark.parametrize('name', [None, *_private.NAMES])
@pytest.mark.parametrize('mode', [mode for mode in MODES if mode != 'segments'])
def test_modes_are_right_without_a_private_name(mode, name, monkeypatch):
    without(monkeypatch, name)
    case = Case(3, K=16, V=16).of(mode)
    inputs = make_inputs(case)
    check(case, run(MODES[mode], case, inputs), reference(case, inputs))
    with torch.no_grad():
        o, _ = MODES[mode](*(inputs[x] for x in ('q', 'k', 'v', 'g')))
    assert o.isfinite().all()


DELETES = '''
import torch
import torch._library.fake_impl

del {name}

from harness import MODES, Case, check, make_inputs, reference, run

from fla_simple_gla._private import private

assert private('{name}') is None
for mode in MODES:
    case = Case(3, K=16, V=16).of(mode)
    inputs = make_inputs(case)
    check(case, run(MODES[mode], case, inputs), reference(case, inputs))
'''


@pytest.mark.parametrize('name', [
    'torch._library.fake_impl.allocate_size', 'torch._C._len_torch_dispatch_stack', 'torch._C._are_functorch_transforms_active',
])  # fmt: skip
def test_modes_are_right_with_a_pytorch_that_lacks_a_name(name):
    result = run_python(DELETES.format(name=name))
    assert result.returncode == 0, result.stderr


@pytest.mark.filterwarnings('ignore:.*torch.jit.script.*:DeprecationWarning')
def test_what_stands_in_for_private_names(monkeypatch):
    without(monkeypatch, *_private.NAMES)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: SimpleNamespace(cuda_stream=100 + device))
    assert _private.current_stream(3) == 103
    context = SimpleNamespace(new_dynamic_size=lambda: 'a size', _shape_env='shapes')
    monkeypatch.setattr(torch.library, 'get_ctx', lambda: context)
    assert _private.new_symbolic_size() == 'a size'
    assert _private.launches_are_observed()
    assert not _private.transforms_are_active() and not _private.dispatch_modes_are_active()
    assert not _private.is_zero_tensor(SimpleNamespace())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(1), torch.ones(1))
        assert _private.has_tangent([None, dual]) and not _private.has_tangent([torch.ones(1), None])


def test_a_name_that_is_not_there_is_none(monkeypatch):
    names = 'torch._C._there_is_no_such_name', 'torch.there.is.no.such.module', 'there_is_no_such_package.name', 'torch.Tensor.no.such'
    monkeypatch.setattr(_private, 'NAMES', dict.fromkeys([*names, 'torch.autograd.forward_ad', 'torch.Tensor.new_empty'], ''))
    assert [private(name) for name in names] == [None] * 4
    assert private('torch.autograd.forward_ad') is torch.autograd.forward_ad
    assert private('torch.Tensor.new_empty') == torch.Tensor.new_empty
    private.cache_clear()


@pytest.mark.parametrize('name', _private.NAMES)
def test_private_names_are_where_they_are_looked_for(name):
    """In the versions that are installed here. One that is gone costs what is told beside it."""
    if not GPU and ('cuda' in name or 'driver.active' in name):
        pytest.skip('needs a GPU')
    if name.startswith('triton') and (reason := _triton.why_not('direct')):
        pytest.skip(reason)
    assert private(name) is not None


# On a GPU


@pytest.mark.skipif(not GPU, reason='the interpreter compiles nothing')
@pytest.mark.parametrize('mode', MODES)
def test_recorded_passes(mode, monkeypatch):
    """The bits of passes that are replayed are those of passes that run, and whose launches are triton's, whatever came before."""
    layouts = [dict(layout=layout) for layout in ('contiguous', 'wide', 'odd', 'heads_first', 'qkv')]
    others = [dict(T=1), dict(H=1), dict(gate=None), dict(scale=1.0), dict(cu_seqlens=(0, 130, 250)), dict(dtype=torch.float32)]
    cases = [Case(**dict(T=300, K=64, V=64, dtype=HALF) | change).of(mode) for change in layouts + others]
    with monkeypatch.context() as patch:
        launch_by_triton(patch)
        expected = [run(MODES[mode], case) for case in cases]
    kept, replay = [], _passes.Record.replay
    replays = mock.Mock(side_effect=replay)
    monkeypatch.setattr(_passes.Record, 'replay', lambda *args: replays(*args))
    for i in range(4):
        for case, results in zip(cases, expected):
            kept.append(make_inputs(case))  # no address comes twice
            replays.reset_mock()
            assert_same_bits(run(MODES[mode], case, kept[-1]), results)
            # none is left out
            assert i < 2 or replays.call_count == 2 or _driver.why_not_direct() is not None


@pytest.mark.skipif(not GPU, reason='threads that have not used a GPU')
@pytest.mark.parametrize('direct', [True, False])
@pytest.mark.parametrize('mode', MODES)
def test_thread_without_a_context(mode, direct, monkeypatch):
    """The first use of a GPU by a thread, to which PyTorch hands memory that is there already."""
    if not direct:
        launch_by_triton(monkeypatch)
    case = Case(200, K=64, V=64, dtype=HALF)
    first, *others = (make_inputs(case) for _ in range(4))  # at addresses that no descriptor was encoded for
    results = []

    def call(inputs):
        with torch.no_grad():
            results.append(MODES[mode](*(inputs[name] for name in ('q', 'k', 'v', 'g')))[0].cpu())

    call(first)
    for inputs in others:  # which record, and replay
        in_threads([lambda inputs=inputs: call(inputs)])
    assert len(results) == 4 and all(torch.equal(result, results[0]) for result in results)
