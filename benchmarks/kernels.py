"""Compile the kernels of some calls for a GPU that need not be there, and print what each takes of a multiprocessor.

A row has the kernel, the call that launches it first, registers to a thread, bytes that are spilled (stored, loaded),
bytes of shared memory, and ptxas' warnings about wgmma: ARCHITECTURE.md says what they mean. Triton must not be
interpreted.
"""

import argparse
import concurrent.futures
import os
import re
import subprocess
import tempfile
from unittest import mock

import torch

from fla_simple_gla import _layout, chunk, fused_chunk, hopper, parallel
from fla_simple_gla._passes import Pass, dry_run
from fla_simple_gla._plans import Gradients, Inputs, Options
from fla_simple_gla._sweeps import Setting
from fla_simple_gla.adapters import _scan
from fla_simple_gla.hopper import attention_for, sweeps_for

ALL = Gradients(True, True, True, True, True)
SEGMENT_TOKENS = 512
MANY = 34  # times as many heads: more than programs, which then share some
H = 4  # heads of v
# K, V and heads of q
DIMS = ((64, 64, 4), (128, 128, 4), (256, 256, 4))
HOPPER_DIMS = ((64, 128, 4), (128, 64, 4), (128, 64, 1), (192, 192, 4), (256, 512, 4), (512, 512, 4))


class NoGpu:
    """Stands in for triton's driver: kernels are compiled for this target, and not loaded."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget('cuda', self.arch, 32)


def answer(value):
    """Stands in for a question about a device. In a dry run a tensor that the pass allocates has another device than in
    a real one: no pass may ask for it.
    """

    def of(device: torch.device):
        assert device.type != 'meta', 'a pass asks for the device of a tensor that it allocates'
        return value

    return of


def use_no_gpu(arch: int) -> None:
    """Choose kernels as for a GPU of this architecture, with 132 multiprocessors."""
    from triton.runtime import driver

    driver.set_active(NoGpu(arch))
    for module in (_layout, chunk, fused_chunk, parallel, hopper, _scan):
        for function, value in (('is_hopper', arch == 90), ('exists', True), ('multiprocessors', 132)):
            if hasattr(module, function):
                mock.patch.object(module, function, answer(value)).start()
    if arch == 90:
        from fla_simple_gla.hopper import attention, gradients, sweep, wide

        for module in (attention, gradients, sweep, wide):
            mock.patch.object(module, 'multiprocessors', answer(132)).start()


def inputs_of(dims: tuple, dtype: torch.dtype, states: bool = False, packed: bool = False, times: int = 1) -> Inputs:
    K, V, HK = dims
    B, T, HK, heads = 1 if packed else 2, 2048, HK * times, H * times
    q, k = torch.zeros(2, B, T, HK, K, dtype=dtype)
    bounds = torch.tensor([0, 1000, 1100, T]) if packed else None
    N = len(bounds) - 1 if packed else B
    v, state = torch.zeros(B, T, heads, V, dtype=dtype), torch.zeros(N, heads, K, V) if states else None
    return Inputs(q, k, v, torch.zeros(B, T, heads), state, bounds)


def launches_of(run, *arguments) -> list:
    """What a pass launches."""
    return dry_run(Pass(run.__wrapped__, arguments, 0, True))


def chunk_launches(dims: tuple, dtype: torch.dtype, states: bool, packed: bool, times: int = 1) -> list:
    x = inputs_of(dims, dtype, states, packed, times)
    K, V, _ = dims
    precision = 'tf32x3' if dtype == torch.float32 else None
    setting = Setting(0.1, SEGMENT_TOKENS if packed else None, precision=precision)
    options = Options(0.1, True, precision=precision)
    found = launches_of(chunk.forward_pass, x, options, sweeps_for(*x[:3]), setting)
    # the states before segments, as many as there may be, and the gradient of the final states
    state = torch.zeros(64, H, K, V) if packed else x.initial_state
    dht = torch.zeros(3 if packed else 2, H * times, K, V)
    needs = ALL._replace(initial_state=states)
    return found + launches_of(chunk.backward_pass, (*x, state, None, torch.zeros_like(x.v), dht), needs, setting)


def parallel_launches(dims: tuple, dtype: torch.dtype, packed: bool) -> list:
    x = inputs_of(dims, dtype, packed=packed)
    options = Options(0.1, precision='tf32x3' if dtype == torch.float32 else None)
    attend = attention_for(*x[:3])
    needs = ALL._replace(initial_state=False)
    given = (*x, None, None, None, torch.zeros_like(x.v))
    return launches_of(parallel.forward_pass, x, options, attend) + launches_of(
        parallel.backward_pass, given, needs, options, attend
    )


def scan_launches(dims: tuple, dtype: torch.dtype, states: bool, times: int = 1) -> list:
    """Of the scan of Mamba-2, with all that it takes."""
    x = inputs_of(dims, dtype, states, times=times)
    heads, state = torch.zeros(H * times), None if x.initial_state is None else x.initial_state.mT
    given = _scan.Tensors(x.v, x.g, heads, x.k, x.q, heads, x.v, heads, state)
    precision = 'tf32x3' if dtype == torch.float32 else None
    options = _scan.ScanOptions(True, 0.0, float('inf'), True, precision)
    found = launches_of(_scan.forward_pass, given, options)
    if not _scan.is_folded(given, options):
        found += launches_of(_scan.prepare_pass, given, options)
    D = (None, None) if _scan.is_folded(given, options) else (given.skip(), x.v)
    found += launches_of(_scan.finish_backward_pass, (x.v, *D, x.v, x.v))
    gates = torch.zeros(2, *x.g.mT.shape).unbind()
    prepared = (*gates, None if _scan.is_folded(given, options) else x.v)
    dstates = torch.zeros(2, H * times, *dims[:2])
    needs = _scan.Tensors(*[True] * 8, states, False, False)
    return found + launches_of(_scan.backward_pass, (*given, *prepared, None, x.v, dstates), options, needs)


def launches(arch: int) -> list[tuple[str, object]]:
    """Calls, and the launches of their passes."""
    found = []
    kinds = {'': (False, False), ' with states': (True, False), ' packed': (True, True)}
    for dtype in (torch.bfloat16, torch.float32):
        for dims in DIMS + (HOPPER_DIMS if dtype == torch.bfloat16 and arch == 90 else ()):
            name = '{} K {} V {} HK {}'.format(str(dtype)[6:], *dims)
            for kind, (states, packed) in kinds.items():
                found += [(f'chunk {name}{kind}', launch) for launch in chunk_launches(dims, dtype, states, packed)]
                if dims in DIMS and (not states or packed):
                    of_map = parallel_launches(dims, dtype, packed)
                    found += [(f'parallel {name}{kind}', launch) for launch in of_map]
            if dtype == torch.bfloat16 and arch == 90:
                of_many = chunk_launches(dims, dtype, False, False, MANY)
                found += [(f'chunk {name} many heads', launch) for launch in of_many]
            if dims[2] == 1 or dims in DIMS[:2]:
                found += [(f'scan {name}', launch) for launch in scan_launches(dims, dtype, False)]
                found += [(f'scan {name} with states', launch) for launch in scan_launches(dims, dtype, True)]
            if dims[2] == 1:
                found += [(f'scan {name} many heads', launch) for launch in scan_launches(dims, dtype, False, MANY)]
    return found


def row(launch: tuple, arch: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    call, (kernel, grid, arguments, constants) = launch
    arguments = [x.for_triton() if hasattr(x, 'for_triton') else x for x in arguments]
    compiled = kernel.warmup(*arguments, grid=grid, **constants)
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, 'kernel.ptx')
        with open(source, 'w') as file:
            file.write(compiled.asm['ptx'])
        command = [get_ptxas(arch).path, '-v', f'--gpu-name=sm_{arch}{"a" if arch >= 90 else ""}', source]
        log = subprocess.run([*command, '-o', f'{source}.cubin'], capture_output=True, text=True, check=True)
    text = log.stdout + log.stderr
    registers = max(map(int, re.findall(r'Used (\d+) registers', text)))
    spills = [sum(map(int, re.findall(rf'(\d+) bytes spill {what}', text))) for what in ('stores', 'loads')]
    warnings = ' '.join(sorted({*re.findall(r'C75\d\d', text)}))
    cells = f'{compiled.metadata.name:<48} {call:<46} {registers:>4} {spills[0]:>5} {spills[1]:>5}'
    return f'{cells} {compiled.metadata.shared:>8} {warnings}'.rstrip()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--arch', type=int, default=90, help='compute capability without a dot, default 90')
    parser.add_argument('--match', default='', help='only kernels and calls whose names have this text')


def main(options: argparse.Namespace) -> None:
    use_no_gpu(options.arch)
    todo = {}
    for call, launch in launches(options.arch):
        if options.match in call or options.match in launch.kernel.__name__:
            todo.setdefault(launch.key(0), (call, launch))
    print(f'{"kernel":<48} {"call":<46} {"regs":>4} {"spill":>5} {"":>5} {"shared":>8}')
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for line in pool.map(lambda launch: row(launch, options.arch), todo.values()):
            print(line, flush=True)
