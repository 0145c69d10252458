"""The host half of a call: plans, passes that are recorded and replayed, and launches by the CUDA driver.

Most tests need no GPU: CPU tensors go a GPU's way, to a driver that notes what it is told (`gpu`).
"""

import ctypes
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from harness import GPU, MODES, Case, check, launch_by_triton, make_inputs, reference, run

from fla_simple_gla import _driver, _launch, _passes, _plans, _private, _triton
from fla_simple_gla._cache import Cache
from fla_simple_gla._driver import Tiles, declared_sizes
from fla_simple_gla._passes import device_pass, empty, zeros
from fla_simple_gla._validation import Call

HALF = torch.bfloat16 if GPU else torch.float16
STREAM = 7
C_TYPES = {
    'i8': ctypes.c_int8, 'i16': ctypes.c_int16, 'i32': ctypes.c_int32, 'i64': ctypes.c_int64, 'u1': ctypes.c_uint8, 'u8': ctypes.c_uint8,
    'u16': ctypes.c_uint16, 'u32': ctypes.c_uint32, 'u64': ctypes.c_uint64, 'fp32': ctypes.c_float,
}  # fmt: skip
POINTERS = {torch.float32: '*fp32', torch.float16: '*fp16', torch.float64: '*fp64', torch.int32: '*i32', torch.int8: '*i8'}


def assert_same_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# A kernel, triton and a driver that run nothing.


def signature_of(args: tuple) -> dict:
    """As triton writes it: of a one and of None it makes constants."""

    def kind(arg):
        if arg is None or isinstance(arg, int) and arg is not True and arg == 1:
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
        self.launches, self.encoded, self.error = [], [], 0

    def launch(self, config, function, parameters, extra):
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
            place=place, dtype=dtype, rank=rank, address=address, shape=[*shape], strides=[*strides][: rank - 1], box=[*box],
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


class TestParameters:
    def test_numbers_of_each_size_grid_and_stream(self, gpu):
        numbers = -5, 2**40, 2**63 + 1, 0.5, 7, 1, None
        kernel = Kernel(10)
        launch = _launch.launcher(lambda tensors: (kernel, (2, 3, 4), (*tensors, *numbers), {}))
        call = device_pass(lambda tensors: launch(tensors) or ())
        x = torch.ones(4)
        call((x,))
        assert len(kernel.launches) == 1 and not gpu.launches  # triton compiles, and launches
        call((x,))
        (seen,) = gpu.launches
        assert seen.values == [x.data_ptr(), -5, 2**40, 2**63 + 1, 0.5, 7]
        assert (seen.grid, seen.block, seen.shared, seen.stream, seen.scratch) == ((2, 3, 4), (128, 1, 1), 1000, STREAM, 0)

    @pytest.mark.parametrize('change', [7.5, 2**31, 16, 17])
    def test_numbers_are_those_of_the_call(self, gpu, change):
        kernel = Kernel(2)
        launch = _launch.launcher(lambda tensors, number: (kernel, (1, 1, 1), (*tensors, number), {}))
        call = device_pass(lambda tensors, number: launch(tensors, number) or ())
        x = torch.ones(4)
        for _ in range(4):
            for number in (3, change):
                call((x,), number)
        assert [values[1] for values in gpu.values()][-2:] == [3, change]

    def test_scratch_is_allocated_for_each_program(self, gpu):
        a_pass = Watched(kernel=Kernel(global_scratch_size=100))
        x = torch.ones(4)
        for _ in range(4):
            a_pass(x)
        assert all(launch.scratch not in (0, x.data_ptr()) for launch in gpu.launches) and len(gpu.launches) == 3

    def test_descriptors(self, gpu):
        kernel = Kernel(2)
        shape, strides = (3, 2, 32, 64), (8192, 64, 128, 1)

        def prepare(tensors):
            x, y = tensors
            return kernel, (1, 1, 1), (Tiles(x, shape, strides, (1, 1, 16, 64), 'layout'), y), {}

        kernel.compiled = dict(tensordesc_meta=[{'block_size': [1, 1, 16, 64], 'swizzle': 3, 'fp4_padded': False}])
        launch = _launch.launcher(prepare)
        call = device_pass(lambda tensors: launch(tensors) or ())
        monkey = Tiles.for_triton
        Tiles.for_triton = lambda self: self
        try:
            kept = [torch.ones(3, 32, 2, 64, dtype=torch.float16) for _ in range(_driver.MAX_ADDRESSES + 3)]
            y = torch.ones(4)
            for x in [kept[0]] * 4 + kept:
                call((x, y))
        finally:
            Tiles.for_triton = monkey
        expected = [x.data_ptr() for x in [kept[0]] * 3 + kept]
        assert [values[0] for values in gpu.values()] == expected
        first = gpu.encoded[-1]
        assert (first.dtype, first.rank, first.shape, first.strides) == (6, 4, [64, 32, 2, 3], [256, 128, 16384])
        assert (first.box, first.steps, first.swizzle) == ([64, 16, 1, 1], [1] * 4, 3)
        assert (first.interleave, first.promotion, first.fill) == (0, 2, 0)
        # once for an address while it is kept: in the two first launches, and in the record
        assert len(gpu.encoded) <= 2 + len(kept)

    @pytest.mark.parametrize('compiled', [
        dict(num_ctas=2), dict(launch_cooperative_grid=True), dict(launch_pdl=True), dict(profile_scratch_size=8),
        dict(ptx=lambda signature: ptx_of(dict([*signature.items()][:-1]))), dict(ptx=lambda signature: 'nonsense'),
        dict(ptx=lambda signature: ptx_of({**signature, 'more': 'i32'})),
    ], ids=['clusters', 'cooperative', 'pdl', 'profile', 'one less', 'nonsense', 'one more'])  # fmt: skip
    def test_what_is_not_understood_is_launched_by_triton(self, gpu, compiled):
        a_pass = Watched(kernel=Kernel(**compiled))
        x = torch.ones(4)
        for _ in range(4):
            assert a_pass(x)[1] is x
        assert len(a_pass.kernel.launches) == 4 == a_pass.runs and not gpu.launches

    def test_errors_of_the_driver_name_the_kernel(self, gpu):
        a_pass = Watched()
        x = torch.ones(4)
        a_pass(x)
        gpu.error = 700
        with pytest.raises(RuntimeError, match=r'the launch of kernel failed with CUDA error 700 \(CUDA_ERROR_OF_A_TEST\)'):
            a_pass(x)
        gpu.error = 0
        for _ in range(3):
            a_pass(x)

    def test_sizes_that_ptx_declares(self):
        text = (
            '.visible .entry k(\n\t.param .u64 .ptr .global .align 1 k_param_0,\n\t.param .align 64 .b8 k_param_1[128],\n'
            '\t.param .u32 k_param_2,\n\t.param .f32 k_param_3,\n\t.param .u8 k_param_4\n)\n.reqntid 128\n{'
        )
        assert declared_sizes(text) == [8, 128, 4, 4, 1]
        assert declared_sizes('.entry k() {') == []
        assert declared_sizes('nothing of the kind') is None


class TestRecords:
    def test_run_then_recorded_then_replayed(self, gpu):
        a_pass = Watched()
        for i in range(5):
            x = torch.ones(4)
            y, same, none = a_pass(x)
            assert same is x and none is None and y.shape == (5,)
            assert a_pass.runs == min(i + 1, 2)
            if i:
                assert gpu.values() == [addresses(x, y)]

    def test_other_layouts_and_numbers_are_other_passes(self, gpu):
        a_pass = Watched()
        memory = torch.ones(9)
        x = memory[:8][::2]
        changes = [
            (memory[:4],), (x,), (torch.ones(3),), (torch.ones(4, dtype=torch.float16),), (memory[1:5],), (memory[:4], memory[4:8]),
            (memory[:4], memory[:4]), (memory[:4], None),
        ]  # fmt: skip
        for tensors in changes:
            for numbers in ((), (1,), ('a', 2)):
                runs = a_pass.runs
                for _ in range(4):
                    y, *_ = a_pass(*tensors, numbers=numbers)
                    last = [z for z in (tensors[0], y, *tensors[1:]) if z is not None]
                assert a_pass.runs == runs + 2 and gpu.launches[-1].values == addresses(*last)

    def test_a_plan_stands_for_the_layouts_where_it_is_cached(self, gpu):
        a_pass = Watched()
        plan = _plans.Plan(_plans.Options(1.0))
        for cached in (False, True):
            plan.cached = cached
            for _ in range(3):
                a_pass(torch.ones(4), plan=plan)
        assert a_pass.runs == 4

    def test_zeros_are_zero_each_time(self, gpu):
        a_pass = Watched(lambda tensors: (zeros(tensors[0], 3, dtype=torch.int32),))
        for _ in range(4):
            (z,) = a_pass(torch.ones(4))
            assert z.tolist() == [0, 0, 0]
            z.fill_(5)
        assert a_pass.runs == 2

    def test_what_is_no_result_is_freed_after_its_last_launch(self, gpu, monkeypatch):
        monkeypatch.setattr(_passes, 'SMALL', 0)
        launch = simple_launch(Kernel())
        made, new_empty, new_zeros = [], torch.Tensor.new_empty, torch.Tensor.new_zeros

        def body(tensors):
            (x,) = tensors
            between = empty(x, 7)
            launch((x, between))
            result = zeros(x, 3)
            launch((result, x))
            return (result,)

        a_pass = Watched(body)
        for _ in range(2):
            a_pass(torch.ones(4))

        def watched_empty(*args, **options):
            made.append(weakref.ref(x := new_empty(*args, **options)))
            return x

        def watched_zeros(*args, **options):
            assert [x() for x in made] == [None]
            return new_zeros(*args, **options)

        monkeypatch.setattr(torch.Tensor, 'new_empty', watched_empty)
        monkeypatch.setattr(torch.Tensor, 'new_zeros', watched_zeros)
        x = torch.ones(4)
        (result,) = a_pass(x)
        assert a_pass.runs == 2 and len(made) == 1 and gpu.launches[-1].values == addresses(result, x)

    def test_small_ones_share_an_allocation(self, gpu, monkeypatch):
        monkeypatch.setattr(_passes, 'SMALL', 4 * 100)
        launch = simple_launch(Kernel())

        def body(tensors):
            (x,) = tensors
            a, b, c, large, result = (empty(x, n) for n in (3, 100, 70, 101, 4))
            launch((x, a, b, c, large, result))
            return (result,)

        a_pass = Watched(body)
        for _ in range(3):
            x = torch.ones(6)
            (result,) = a_pass(x)
        seen_x, a, b, c, large, seen_result = gpu.launches[-1].values
        assert (b - a, c - b) == (256, 512) and [seen_x, seen_result] == addresses(x, result)
        assert a % 4 == 0 and not a <= large < a + 1280

    @pytest.mark.parametrize('work', [
        lambda x, y: y.fill_(3), lambda x, y: x + 1, lambda x, y: x.add_(1), lambda x, y: y.copy_(x), lambda x, y: x.clone(),
    ])  # fmt: skip
    def test_work_that_a_record_would_lose_is_an_error(self, gpu, work):
        launch = simple_launch(Kernel())

        def body(tensors):
            (x,) = tensors
            y = empty(x, 4)
            launch((x, y))
            work(x, y)
            return (y,)

        a_pass = Watched(body)
        x = torch.ones(4)
        a_pass(x)
        x.fill_(1)
        for _ in range(2):
            with pytest.raises(RuntimeError, match='a pass only allocates, takes views and launches, but calls aten'):
                a_pass(x)
        assert (x == 1).all()
        this = _passes.Pass(body, ((x,),), -1, True)
        with pytest.raises(RuntimeError, match='call it outside of the pass'):
            _passes.dry_run(this)
        _passes.thread.running = None
        assert (x == 1).all()

    def test_views_are_allowed(self, gpu):
        launch = simple_launch(Kernel())

        def body(tensors):
            (x,) = tensors
            y = empty(x, 2, 3)
            launch((x.mT, y.mT, x.unflatten(0, (1, -1)).expand(1, 2, 2)))
            return y, x

        a_pass = Watched(body)
        for _ in range(3):
            x = torch.ones(2, 2)
            y, _ = a_pass(x)
            assert a_pass.runs < 3
        assert gpu.launches[-1].values == addresses(x, y, x)

    def test_tensors_of_unknown_origin(self, gpu):
        """A pass that launches one is never replayed, and is right each time."""
        unknown, launch = torch.ones(4), simple_launch(Kernel())

        def body(tensors):
            launch((*tensors, unknown))
            return (tensors[0],)

        a_pass = Watched(body)
        for i in range(4):
            x = torch.ones(4)
            a_pass(x)
            assert a_pass.runs == i + 1
        assert gpu.launches[-1].values == addresses(x, unknown)

    def test_an_error_in_a_pass_leaves_nothing_behind(self, gpu):
        def body(tensors):
            raise ValueError('of the pass')

        a_pass = Watched(body)
        for _ in range(3):
            with pytest.raises(ValueError, match='of the pass'):
                a_pass(torch.ones(4))
            assert _passes.thread.running is None

    def test_threads_that_call_first_at_once(self, gpu):
        kernel = Kernel()
        a_pass = Watched(kernel=kernel)
        start, wrong = threading.Barrier(8, timeout=30), []

        def call():
            start.wait()
            for _ in range(20):
                x = torch.ones(4)
                y, same, _ = a_pass(x)
                if same is not x or y.shape != (5,):
                    wrong.append(1)

        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and len(kernel.launches) == 1 and len(gpu.launches) == 159


class TestCache:
    def test_what_comes_again_survives_what_comes_once(self):
        cache = Cache(100)
        cache.put('decode', 1)
        assert cache.get('decode') == 1
        for i in range(10000):
            assert cache.get(i) is None
            cache.put(i, i)
            assert len(cache) <= 300
        assert cache.get('decode') == 1 and cache.get(9999) == 9999 and cache.get(0) is None

    def test_the_least_recently_used_goes_first(self):
        cache = Cache(100)
        for i in range(400):
            cache.put(i, i)
            cache.get(i)
            cache.get(0)
        assert cache.get(0) == 0 and cache.get(399) == 399 and cache.get(350) == 350 and cache.get(1) is None
        cache.put(0, 'other')
        assert cache.get(0) == 'other'

    def test_a_decode_plan_survives_other_lengths(self, monkeypatch):
        monkeypatch.setattr(_plans, 'plans', Cache(1024))

        def call(T):
            x = memory[:, :T]
            return Call(x, x, x)

        memory = torch.ones(1, 10020, 1, 1)
        decode = _plans.plan_for(call(1))
        assert _plans.plan_for(call(1)) is decode and decode.cached
        for T in range(2, 10003):
            _plans.plan_for(call(T))
        assert _plans.plan_for(call(1)) is decode and len(_plans.plans) <= 2048


class TestLaunchesByTriton:
    @pytest.mark.parametrize('tma', [True, False])
    def test_the_allocator_of_the_user_stays(self, tma, monkeypatch):
        triton = pytest.importorskip('triton')
        allocation = pytest.importorskip('triton.runtime._allocation')

        def users(size, alignment, stream):
            raise AssertionError

        triton.set_allocator(users)
        seen = []
        kernel = mock.MagicMock()
        kernel.__getitem__.return_value = lambda *args, **options: seen.append(allocation._allocator.get())
        try:
            _launch.launch_by_triton(_launch.Prepared(kernel, (1, 1, 1), (), {'TMA': tma}))
            assert seen == [_triton.scratch if tma else users] and allocation._allocator.get() is users
            kernel.__getitem__.return_value = mock.Mock(side_effect=ValueError)
            with pytest.raises(ValueError):
                _launch.launch_by_triton(_launch.Prepared(kernel, (1, 1, 1), (), {'TMA': tma}))
            assert allocation._allocator.get() is users
        finally:
            allocation._allocator.set(allocation._NULL_ALLOCATOR)

    def test_the_allocator_where_it_is_a_global(self, monkeypatch):
        """As it is in triton 3.4."""
        triton = pytest.importorskip('triton')
        allocation = SimpleNamespace(_allocator='users')
        monkeypatch.setattr(triton, 'set_allocator', lambda allocator: setattr(allocation, '_allocator', allocator))
        monkeypatch.setattr(_private, 'private', lambda name: allocation)
        assert _private.with_allocator('ours', lambda: allocation._allocator) == 'ours'
        assert allocation._allocator == 'users'

    def test_passes_on_the_cpu_take_turns(self, monkeypatch):
        """Triton's interpreter is not made for several threads."""
        inside, most = [], []

        def body(tensors):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()
            return ()

        call = device_pass(body)
        monkeypatch.setattr(_passes, 'on_gpu', lambda x: False)
        threads = [threading.Thread(target=call, args=((torch.ones(1),),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1] * 4

    @pytest.mark.skipif(GPU, reason='for the interpreter')
    def test_modes_in_several_threads(self):
        cases = [(mode, Case(6, K=16, V=16).of(mode)) for mode in ('chunk', 'fused_recurrent', 'parallel', 'fused_chunk')]
        expected = [run(MODES[mode], case) for mode, case in cases]
        found = [None] * len(cases)

        def call(i):
            mode, case = cases[i]
            found[i] = [run(MODES[mode], case) for _ in range(2)]

        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(cases))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for results, right in zip(found, expected):
            for each in results:
                assert_same_bits(each, right)

    def test_compiled_side_by_side_and_loaded_one_by_one(self, monkeypatch):
        count = 3
        together, loaded = threading.Barrier(count, timeout=30), []

        class CompiledHere:
            src = metadata = None

            @property
            def run(self):
                loaded.append(threading.current_thread())
                return 'launcher'

        class KernelHere(Kernel):
            def warmup(self, *args, grid, **constants):
                return CompiledHere()

        names = {
            'triton.AsyncCompileMode': mock.MagicMock(), 'triton.FutureKernel': type('FutureKernel', (), {}),
            'triton.runtime.driver.active.launcher_cls': lambda src, metadata: together.wait(),
        }
        monkeypatch.setattr(_launch, 'private', names.get)
        monkeypatch.setattr(_launch, 'variants', {})
        prepared = [_launch.Prepared(KernelHere(), (1, 1, 1), (), {}) for _ in range(count)]
        monkeypatch.setattr(_launch, 'dry_run', lambda this: prepared)
        _launch.compile_side_by_side(SimpleNamespace(device=-1))
        assert loaded == [threading.current_thread()] * count


@pytest.fixture
def fresh_answers():
    def clear():
        for answer in (_triton.warn_once, _driver.why_not_direct, _private.private):
            answer.cache_clear()

    clear()
    yield
    clear()


@pytest.mark.usefixtures('fresh_answers')
class TestVersions:
    def test_an_unknown_version_is_told_once(self, monkeypatch):
        pytest.importorskip('triton')
        monkeypatch.setattr(_triton.triton, '__version__', '3.99.0')
        monkeypatch.setattr(torch.version, 'cuda', '13.0')
        with pytest.warns(UserWarning, match='launched by triton.*3.99.0 is not one of the versions.*3.6, 3.7, 3.8, 3.9.*same'):
            assert '3.99.0' in _driver.why_not_direct()
        _driver.why_not_direct.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert '3.99.0' in _driver.why_not_direct()

    def test_the_switch_for_direct_launches(self, monkeypatch):
        monkeypatch.setattr(torch.version, 'cuda', '13.0')
        monkeypatch.setenv('FLA_SIMPLE_GLA_DIRECT', '0')
        assert _driver.why_not_direct() == 'FLA_SIMPLE_GLA_DIRECT=0 is in the environment'

    @pytest.mark.parametrize('first, then', [('', '1'), ('1', '')])
    def test_the_interpreter_must_be_chosen_before_triton_is_imported(self, first, then):
        pytest.importorskip('triton')
        code = f"""
import os
os.environ['TRITON_INTERPRET'] = '{first or 0}'
import triton.language
os.environ['TRITON_INTERPRET'] = '{then or 0}'
try:
    import fla_simple_gla
except ImportError as error:
    assert 'before the first import of' in str(error) and 'TRITON_INTERPRET' in str(error)
    print('refused')
"""
        environment = {'PYTHONPATH': ':'.join(sys.path)}
        result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)
        assert result.stdout == 'refused\n', result.stderr

    @pytest.mark.parametrize('name', _private.NAMES)
    def test_each_private_name_can_be_missed(self, name, monkeypatch):
        """Forward and backward are right without it."""
        real = _private.private
        for module in (_private, _launch, _driver):
            monkeypatch.setattr(module, 'private', lambda asked: None if asked == name else real(asked))
        for mode in ('chunk', 'fused_recurrent'):
            case = Case(5, K=16, V=16)
            check(case, run(MODES[mode], case), reference(case))

    def test_import_without_private_names(self):
        """Taken away before the package is imported, those that PyTorch itself can do without."""
        code = """
import torch, torch.library, torch._library.fake_impl
del torch._library.fake_impl.allocate_size, torch._C._len_torch_dispatch_stack
import fla_simple_gla
q = torch.randn(1, 5, 2, 8, requires_grad=True)
for mode in fla_simple_gla.__all__:
    getattr(fla_simple_gla, mode)(q, q, q, -q[..., 0].abs())[0].sum().backward()
print('right')
"""
        environment = {'PYTHONPATH': ':'.join(sys.path), 'TRITON_INTERPRET': os.environ.get('TRITON_INTERPRET', '')}
        result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)
        assert result.stdout == 'right\n', result.stderr


@pytest.mark.skipif(not GPU, reason='the interpreter compiles nothing')
@pytest.mark.parametrize('mode', MODES)
def test_recorded_passes(mode, monkeypatch):
    """The bits of passes that are replayed are those of passes whose launches are triton's, whatever came before."""
    layouts = [dict(layout=layout) for layout in ('contiguous', 'wide', 'odd', 'heads_first', 'qkv')]
    others = [dict(T=1), dict(H=1), dict(gate=None), dict(scale=1.0), dict(cu_seqlens=(0, 130, 250)), dict(dtype=torch.float32)]
    cases = [Case(**dict(T=300, K=64, V=64, dtype=HALF) | change).of(mode) for change in layouts + others]
    with monkeypatch.context() as patch:
        launch_by_triton(patch)
        expected = [run(MODES[mode], case) for case in cases]
    kept = []
    replay = _passes.Record.replay
    replays = mock.Mock(side_effect=replay)
    monkeypatch.setattr(_passes.Record, 'replay', lambda *args: replays(*args))
    for i in range(4):
        for case, results in zip(cases, expected):
            kept.append(make_inputs(case))  # no address comes twice
            replays.reset_mock()
            assert_same_bits(run(MODES[mode], case, kept[-1]), results)
            # run, recorded, and then replayed; a kernel that was not compiled before makes it one later
            assert i < 3 or replays.call_count == 2


@pytest.mark.skipif(not GPU, reason='threads that have not used a GPU')
@pytest.mark.parametrize('direct', [True, False])
@pytest.mark.parametrize('mode', MODES)
def test_thread_without_a_context(mode, direct, monkeypatch):
    """The first use of a GPU by a thread, to which PyTorch hands memory that is there already."""
    if not direct:
        launch_by_triton(monkeypatch)
    case = Case(200, K=64, V=64, dtype=HALF)
    inputs, others = make_inputs(case), make_inputs(case)  # at addresses that no descriptor was encoded for
    results = []

    def call(inputs):
        with torch.no_grad():
            results.append(MODES[mode](*(inputs[name] for name in ('q', 'k', 'v', 'g')))[0].cpu())

    call(inputs)
    thread = threading.Thread(target=call, args=(others,))
    thread.start()
    thread.join()
    assert len(results) == 2 and torch.equal(*results)
