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
from fla_simple_gla.hopper import attention_for, sweeps_for

ALL = Gradients(True, True, True, True, True)
SEGMENT_TOKENS = 512


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


def use_no_gpu(arch: int) -> None:
    """Choose kernels as for a GPU of this architecture, with 132 multiprocessors."""
    from triton.runtime import driver

    driver.set_active(NoGpu(arch))
    for module in (_layout, chunk, fused_chunk, parallel, hopper):
        for function, value in (('is_hopper', arch == 90), ('exists', True), ('multiprocessors', 132)):
            if hasattr(module, function):
                mock.patch.object(module, function, lambda *_, value=value: value).start()
    if arch == 90:
        from fla_simple_gla.hopper import attention, reverse, sweep, wide

        for module in (attention, reverse, sweep, wide):
            mock.patch.object(module, 'multiprocessors', lambda device: 132).start()


def inputs_of(D: int, dtype: torch.dtype, states: bool = False, packed: bool = False) -> Inputs:
    B, T, H = 1 if packed else 2, 2048, 4
    q, k, v = torch.zeros(3, B, T, H, D, dtype=dtype)
    bounds = torch.tensor([0, 1000, 1100, T]) if packed else None
    N = len(bounds) - 1 if packed else B
    return Inputs(q, k, v, torch.zeros(B, T, H), torch.zeros(N, H, D, D) if states else None, bounds)


def launches_of(run, *arguments) -> list:
    """What a pass launches."""
    return dry_run(Pass(run.__wrapped__, arguments, 0, True))


def chunk_launches(D: int, dtype: torch.dtype, states: bool, packed: bool) -> list:
    x = inputs_of(D, dtype, states, packed)
    precision = 'tf32x3' if dtype == torch.float32 else None
    setting = Setting(0.1, SEGMENT_TOKENS if packed else None, precision=precision)
    options = Options(0.1, True, precision=precision)
    found = launches_of(chunk.forward_pass, x, options, sweeps_for(*x[:3]), setting)
    # the states before segments, as many as there may be, and the gradient of the final states
    state = torch.zeros(64, 4, D, D) if packed else x.initial_state
    dht = torch.zeros(3 if packed else 2, 4, D, D)
    needs = ALL._replace(initial_state=states)
    return found + launches_of(chunk.backward_pass, (*x, state, None, torch.zeros_like(x.v), dht), needs, setting)


def parallel_launches(D: int, dtype: torch.dtype, packed: bool) -> list:
    x = inputs_of(D, dtype, packed=packed)
    options = Options(0.1, precision='tf32x3' if dtype == torch.float32 else None)
    attend = attention_for(*x[:3])
    needs = ALL._replace(initial_state=False)
    given = (*x, None, None, None, torch.zeros_like(x.v))
    return launches_of(parallel.forward_pass, x, options, attend) + launches_of(
        parallel.backward_pass, given, needs, options, attend
    )


def launches() -> list[tuple[str, object]]:
    """Calls, and the launches of their passes."""
    found = []
    kinds = {'': (False, False), ' with states': (True, False), ' packed': (True, True)}
    for dtype in (torch.bfloat16, torch.float32):
        for D in (64, 128, 256):
            for kind, (states, packed) in kinds.items():
                call = f'chunk {str(dtype)[6:]} D {D}{kind}'
                found += [(call, launch) for launch in chunk_launches(D, dtype, states, packed)]
                if not states or packed:
                    call = f'parallel {str(dtype)[6:]} D {D}{kind}'
                    found += [(call, launch) for launch in parallel_launches(D, dtype, packed)]
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
    cells = f'{compiled.metadata.name:<48} {call:<32} {registers:>4} {spills[0]:>5} {spills[1]:>5}'
    return f'{cells} {compiled.metadata.shared:>8} {warnings}'.rstrip()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--arch', type=int, default=90, help='compute capability without a dot, default 90')
    parser.add_argument('--match', default='', help='only kernels and calls whose names have this text')


def main(options: argparse.Namespace) -> None:
    use_no_gpu(options.arch)
    todo = {}
    for call, launch in launches():
        if options.match in call or options.match in launch.kernel.__name__:
            todo.setdefault(launch.key(0), (call, launch))
    print(f'{"kernel":<48} {"call":<32} {"regs":>4} {"spill":>5} {"":>5} {"shared":>8}')
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for line in pool.map(lambda launch: row(launch, options.arch), todo.values()):
            print(line, flush=True)
