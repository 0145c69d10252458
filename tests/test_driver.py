"""Launches by the CUDA driver: parameters, descriptors, what PTX declares, errors, and kernels that triton launches."""

import ctypes
import os
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from fake_gpu import C_TYPES, STREAM, Compiled, Kernel, Watched, addresses, ptx_of
from harness import run_python

from fla_simple_gla import _driver, _launch, _passes, _triton
from fla_simple_gla._driver import Tiles, declared_sizes
from fla_simple_gla._passes import device_pass

# Parameters of a launch


@pytest.mark.parametrize('kind', _driver.NUMBERS)
def test_numbers_of_every_type_get_to_the_driver(kind, gpu):
    """Each is at the offset that C gives it."""
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
    launch = _launch.launcher(
        lambda tensors: (kernel, (5, 6, 7), (*tensors, -5, 1, True, 0.5, 2**40, 2**63), {'BT': 64})
    )
    a_pass = device_pass(lambda tensors: launch(tensors) or ())
    for _ in range(3):
        a_pass((x, None, y))
    assert kernel.launches == [
        ((5, 6, 7), (x, None, y, -5, 1, True, 0.5, 2**40, 2**63), {'BT': 64})
    ]  # the first launch
    for found in gpu.launches:
        assert (found.grid, found.block, found.shared, found.stream, found.scratch) == (
            (5, 6, 7),
            (256, 1, 1),
            1000,
            STREAM,
            0,
        )
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
    """A pass whose kernel reads tiles of 16 by 64 numbers. The rows have 96 numbers and a stride of 128."""
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
    # The last dimension comes first. Strides are in bytes, and the last dimension has none.
    assert (found.rank, found.shape, found.strides, found.box, found.steps) == (2, [96, 3], [256], [64, 16], [1, 1])
    # fp16, no interleaving, swizzle of 128 bytes, promotion to 128 bytes in L2, zeros outside.
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
        records = [record for record in _passes.records.young.values() if isinstance(record, _passes.RecordedPass)]
        if not records:
            continue
        ((_, _, maps),) = records[0].steps[0].launch.maps
        assert 0 < len(maps.places) == len(maps.memory) <= _driver.MAX_ADDRESSES
        for place, memory in zip(maps.places.values(), maps.memory):
            start = ctypes.addressof(memory)
            assert place % 64 == 0 and start <= place and place + 128 <= start + len(memory)


# Kernels that are left to triton


def without_last(signature: dict) -> str:
    """PTX that lacks the last parameter."""
    head, _, tail = ptx_of(signature).rpartition(',\n')
    return head + tail[tail.index('\n)') :]


def with_more(signature: dict) -> str:
    """PTX with one parameter more."""
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
    {0: '*fp32', 1: ('i32', 'i32')}, {0: '*fp32', 1: 'bf16'}, {0: '*fp32', 1: 'i32', 2: '*fp32'},
    {0: '*fp32', 1: 'i32', 2: 'i32'},
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


# Errors


def test_an_error_of_a_launch_names_the_kernel_and_the_error(gpu):
    a_pass = Watched()
    a_pass(torch.ones(4))  # triton makes the first launch
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
    message = (
        r'descriptor of shape \[3, 96\], strides \[256\] in bytes failed with CUDA error 1 \(CUDA_ERROR_OF_A_TEST\)'
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            tiled_pass(x, y)
    gpu.error = 0
    for _ in range(2):
        tiled_pass(x, y)
    assert [values[0] for values in gpu.values()] == [x.data_ptr()] * 2


def test_there_is_no_driver_without_its_library(monkeypatch):
    """A library that lacks a function is no driver either."""
    _driver.cuda_driver.cache_clear()
    for library in (
        mock.Mock(side_effect=OSError),
        mock.Mock(return_value=SimpleNamespace(cuLaunchKernelEx=mock.Mock())),
    ):
        monkeypatch.setattr(ctypes, 'CDLL', library)
        assert _driver.cuda_driver() is None
        _driver.cuda_driver.cache_clear()
    monkeypatch.setattr(ctypes, 'CDLL', mock.Mock())
    assert _driver.cuda_driver() is not None
    _driver.cuda_driver.cache_clear()


# What PTX declares


def test_declared_sizes():
    ptx = ptx_of(
        {0: '*fp32', 1: 'tensordesc<fp16[16, 64]>', 2: 'i32', 3: 'u1', 4: 'i16', 5: 'fp32', 6: 'i64', 7: 'constexpr'}
    )
    assert (
        '.param .u64 .ptr .global .align 1 kernel_param_0,' in ptx
        and '.param .align 64 .b8 kernel_param_1[128],' in ptx
    )
    assert declared_sizes(ptx) == [8, 128, 4, 4, 8, 8, 4, 1, 2, 4, 8, 8, 8]
    older = '.visible .entry k_0123$x(\n .param .u64 k_param_0,\n .param .f64 k_param_1\n)\n.maxntid 128, 1, 1\n{'
    assert declared_sizes(older) == [8, 8]
    assert declared_sizes('.entry kernel () { ret; }') == []


@pytest.mark.parametrize('ptx', [
    '', 'nothing', '.func kernel(.param .u64 x) {', '.entry kernel(.param x) {',
    '.entry kernel(.param .u64 x, .reg .u32 y) {',
    '.entry kernel(.param .u64 x', '.entry kernel(.param .align 64 .b8 x[]) {',
])  # fmt: skip
def test_what_is_no_ptx_declares_nothing(ptx):
    assert declared_sizes(ptx) is None


KERNELS = """
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
"""
COMPILES = """
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
        kernels.kernel,
        {'x': '*fp32', 'y': '*fp32', 'n': 'i32', 'm': 'i64', 'scale': 'fp32', 'flag': 'u1', 'BLOCK': 'constexpr'},
        {'BLOCK': 64}, [8, 8, 4, 8, 4, 1, 8, 8],
    ),
    (kernels.tiled_kernel, {'tiles': 'tensordesc<fp16[16, 64]>', 'y': '*fp16', 'n': 'i32'}, {},
     [128, 4, 4, 8, 8, 8, 4, 8, 8]),
):
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget('cuda', 90, 32))
    assert declared_sizes(compiled.asm['ptx']) == sizes, compiled.asm['ptx'][:2000]
    variant = _driver.Variant(compiled, len(signature) - len(constants))
    assert variant.is_understood, vars(variant)
    assert (variant.name, variant.threads, variant.shared) == (kernel.__name__, 128, compiled.metadata.shared)
"""


@pytest.mark.slow
def test_what_triton_compiles_is_understood(tmp_path):
    """The installed triton compiles for a GPU that need not be there."""
    if _triton.why_not('direct'):
        pytest.skip(_triton.why_not('direct'))
    (tmp_path / 'kernels.py').write_text(KERNELS)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = run_python(COMPILES, TRITON_INTERPRET=None, TRITON_CACHE_DIR=str(tmp_path / 'cache'), PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
