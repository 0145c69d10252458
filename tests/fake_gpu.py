"""A GPU that runs nothing: a kernel, what triton compiles it to, and a driver that records its calls.

The fixture `gpu` treats CPU tensors as tensors on a GPU with this driver.
"""

import ctypes
import struct
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from fla_simple_gla import _driver, _launch, _passes
from fla_simple_gla._cache import Cache
from fla_simple_gla._driver import Tiles
from fla_simple_gla._passes import device_pass, empty

STREAM = 7
C_TYPES = {
    'i1': ctypes.c_bool, 'i8': ctypes.c_int8, 'i16': ctypes.c_int16, 'i32': ctypes.c_int32, 'i64': ctypes.c_int64,
    'u1': ctypes.c_bool,
    'u8': ctypes.c_uint8, 'u16': ctypes.c_uint16, 'u32': ctypes.c_uint32, 'u64': ctypes.c_uint64,
    'fp32': ctypes.c_float,
}  # fmt: skip
POINTERS = {
    torch.float32: '*fp32',
    torch.float16: '*fp16',
    torch.float64: '*fp64',
    torch.int32: '*i32',
    torch.int8: '*i8',
}


def signature_of(args: tuple) -> dict:
    """The types of the arguments, as triton writes them. It makes constants of 1 and of None."""

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
    """PTX as triton 3.6 to 3.9 write it. The pointers to its two scratch memories are the last parameters."""
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
    lines = ',\n'.join(
        '\t.param ' + line.format(f'kernel_param_{i}') for i, line in enumerate([*declared, pointer, pointer])
    )
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
            num_warps=4,
            num_ctas=1,
            shared=1000,
            launch_cooperative_grid=False,
            launch_pdl=False,
            global_scratch_size=0,
            profile_scratch_size=0,
            tensordesc_meta=[{'block_size': [16, 64], 'swizzle': 3, 'fp4_padded': False} for _ in tiles],
        )
        self.metadata = SimpleNamespace(**known | metadata)


class Kernel:
    """Stands in for a kernel. `launches` are its launches by triton, and `compiled` are options of `Compiled`."""

    def __init__(self, count: int = 8, **compiled):
        self.arg_names = [f'x{i}' for i in range(count)]
        self.params = [
            SimpleNamespace(do_not_specialize=False, do_not_specialize_on_alignment=False) for _ in range(count)
        ]
        self.compiled, self.launches = compiled, []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launches.append((grid, args, constants))
            return Compiled(signature_of(args), **self.compiled)

        return launch


class Config(ctypes.Structure):
    """`CUlaunchConfig` of the CUDA driver."""

    _fields_ = [
        ('grid', ctypes.c_uint * 3), ('block', ctypes.c_uint * 3), ('shared', ctypes.c_uint),
        ('stream', ctypes.c_void_p),
        ('attributes', ctypes.c_void_p), ('count', ctypes.c_uint),
    ]  # fmt: skip


class Gpu:
    """A driver that records its launches, and the descriptors that it encodes."""

    def __init__(self):
        self.launches, self.encoded, self.error, self.wait = [], [], 0, 0.0

    def launch(self, config, function, parameters, extra):
        if self.wait:
            time.sleep(self.wait)  # other threads run meanwhile, as in a call of a real driver
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
            grid=(*config.grid,), block=(*config.block,), shared=config.shared, stream=config.stream, values=values,
            scratch=scratch,
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
        """The values of the parameters of each launch since the last call of this."""
        found, self.launches = [launch.values for launch in self.launches], []
        return found


@pytest.fixture
def gpu(monkeypatch):
    """The driver of a GPU on which the CPU tensors of a test seem to be."""
    found = Gpu()
    driver = _driver.Driver(found.launch, found.encode, found.error_name)
    monkeypatch.setattr(_driver, 'cuda_driver', lambda: driver)
    monkeypatch.setattr(_passes, 'on_gpu', lambda x: True)
    monkeypatch.setattr(_passes, 'why_not_direct', lambda: None)
    monkeypatch.setattr(_passes, 'launches_are_observed', lambda: False)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: -1)  # the index of the CPU
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
    """A launch of the kernel whose arguments are tensors only."""
    return _launch.launcher(lambda tensors: (kernel, (1, 3, 1), tensors, {}))


class Watched:
    """A pass that counts its runs. By default it allocates y, launches a kernel on x and y, and returns y and x."""

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
