"""What kernels take of a GPU, as compiled for GPUs that are not here: bytes of stack to a thread, and shared memory.

The driver reserves the stack for as many threads as the GPU can hold: at 10 KB that is over a gigabyte.

This file is also what the process runs that compiles, in which triton is not interpreted.
"""

import concurrent.futures
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from unittest import mock

import pytest

from fla_simple_gla._triton import why_not

ROOT = pathlib.Path(__file__).parent.parent
STACK = 1024  # bytes
SHARED = {80: 99 * 1024, 90: 227 * 1024}  # the least of the GPUs that run the code of an architecture; sm_86 has 99 KiB


def cuobjdump() -> pathlib.Path | None:
    triton = pytest.importorskip('triton')
    found = pathlib.Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
    return found if found.exists() else None


@pytest.mark.slow
def test_stack_and_shared_memory():
    """Of the entries of the tables whose states and rows are the longest."""
    if cuobjdump() is None:
        pytest.skip('triton comes without cuobjdump')
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    environment |= {'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}', 'TRITON_DEFAULT_FP_FUSION': '1'}
    result = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=600, env=environment)
    rows = [row.split('|') for row in result.stdout.splitlines()]
    assert len(rows) == len(entries()) and result.returncode == 0, result.stdout + result.stderr
    for name, arch, stack, shared in rows:
        assert int(stack) <= STACK and int(shared) <= SHARED[int(arch)], (name, stack, shared)


@pytest.mark.slow
@pytest.mark.parametrize('call', [
    'chunk bfloat16 K 128 V 128 HK 4 packed', 'chunk bfloat16 K 128 V 64 HK 1 packed',
    'parallel bfloat16 K 128 V 128 HK 4 packed', 'chunk bfloat16 K 64 V 64 HK 4 many heads',
    'chunk bfloat16 K 128 V 64 HK 1 many heads', 'scan bfloat16 K 128 V 64 HK 1',
])  # fmt: skip
def test_kernels_for_hopper_fit_and_are_not_serialised(call):
    """No warning of ptxas that every product of the tensor cores is waited for, and no more than the shared memory."""
    if cuobjdump() is None or why_not('hopper'):
        pytest.skip('the kernels for Hopper are off with this version of triton')
    ignored = 'TRITON_INTERPRET', 'FLA_SIMPLE_GLA_HOPPER'
    environment = {name: value for name, value in os.environ.items() if name not in ignored}
    environment |= {'PYTHONPATH': str(ROOT), 'TRITON_DEFAULT_FP_FUSION': '1'}
    command = [sys.executable, '-m', 'benchmarks', 'kernels', '--match', call]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    rows = re.findall(r'^simple_gla_hopper_\w+ .*$', result.stdout, re.MULTILINE)
    assert len(rows) >= 3 and result.returncode == 0, result.stdout + result.stderr
    assert 'ssd_finish_y' not in result.stdout  # the sweep of pairs of heads for o takes z
    for row in rows:
        assert 'C75' not in row and int(row.split()[-1]) <= SHARED[90], row


def entries() -> list[tuple]:
    """Kernel, architecture, whether by TMA, bytes of a number, dim, and whether back in time with what dg needs."""
    dims = [(4, 128), (4, 256), (4, 512), (2, 256), (2, 512)]
    kinds = [
        *itertools.product(['sweep'], [(80, False)], [(4, 256), (4, 512), (2, 512)]),
        *itertools.product(['sweep'], [(90, False), (90, True)], dims),
        *itertools.product(['attention'], [(80, False), (90, False), (90, True)], [(4, 256), (4, 512)]),
    ]
    return [(name, *where, *what, back) for name, where, what in kinds for back in (False, True)]


def compile_entry(entry: tuple) -> str:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fla_simple_gla import fused_chunk, parallel

    kernel_name, arch, tma, size, D, gradient = entry
    dtype, device = torch.float32 if size == 4 else torch.bfloat16, torch.device('cpu')
    module = fused_chunk if kernel_name == 'sweep' else parallel
    with mock.patch.object(module, 'is_hopper', lambda _: arch == 90):
        if kernel_name == 'sweep':
            kernel, config = fused_chunk.sweep_kernel, fused_chunk.sweep_config.__wrapped__(D, D, dtype, device, tma)
            tma = tma and config.TMA
        else:
            kernel, config = parallel.attention_kernel, parallel.attention_config(D, D, dtype, device)
    number = '*fp32' if size == 4 else '*bf16'
    types = {name: number for name in ('q', 'k', 'v', 'o')} | {name: '*fp32' for name in ('c', 'state_in', 'state_out')}
    types |= {'sums': '*fp64', 'scale': 'fp32'}
    types |= {name: 'i32' for name in ('N', 'T', 'P', 'segment', 'part', 'c_part', 'blocks', 'NB')}
    if gradient:
        types |= {'x': number, 'anchors': number} | {name: '*fp32' for name in ('x_o', 'x_inter', 's_ds')}
    constants = dict(
        H=4, GQ=1, GV=1, K=D, V=D, BT=config.BT, BK=config.BK, BV=config.BV, BA=256, BI=64, REVERSE=gradient,
        SEGMENTS=False, TWO_PARTS=size == 4, TMA=tma, PRECISION='tf32x3' if size == 4 else None, STAGES=config.stages,
    )  # fmt: skip
    signature = {}
    for name in kernel.arg_names:
        signature[name] = 'i32' if re.fullmatch(r'[qkvx]_[bth]|s[io]_[nhkv]', name) else types.get(name, 'constexpr')
    constants = {name: constants.get(name) for name, kind in signature.items() if kind == 'constexpr'}
    aligned = {(i,): [['tt.divisibility', 16]] for i, kind in enumerate(signature.values()) if kind[0] == '*'}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget('cuda', arch, 32), options=dict(num_warps=config.warps))
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        log = subprocess.run([cuobjdump(), '--dump-resource-usage', file.name], capture_output=True, text=True)
    stack = re.search(r'STACK:(\d+)', log.stdout)
    assert stack is not None, log.stdout + log.stderr
    return f'{entry}|{arch}|{stack[1]}|{compiled.metadata.shared}'


if __name__ == '__main__':
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        for line in pool.map(compile_entry, entries()):
            print(line)
