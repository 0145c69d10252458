"""Time the modes, beside fla-core and PyTorch's attention: one row for a shape and an implementation.

The inputs are in bf16 with the gate `g = logsigmoid(normal + log(memory))`, and K = V = D. Some kernels skip what has
decayed to zero: with a memory as long as the sequence there is nothing to skip. The columns:

- fwd, fwd+bwd: milliseconds of the forward, and of forward and backward together, the medians of
  `triton.testing.do_bench`. Where a call keeps the host for more than half of that, the time on the GPU is taken from a
  CUDA graph instead, and marked with a `g`: there, small tensors stay in the L2 cache.
- floor: the time that the bytes take at the bandwidth of a large copy, measured in the same run. The bytes are those
  that have to move: in the forward 4 passes over a tensor (q, k, v read and o written once), with the backward 11 (it
  reads q, k, v, do and writes dq, dk, dv).
- share: the floor over the time; 100% is the least time that is possible.
- host: milliseconds that a call keeps the CPU.
- MiB: the peak memory of a forward and backward beyond the inputs. o and the gradients of q, k, v are included;
  together they are 4 passes.
- error: the worst relative RMS error of o, dq, dk, dv, dg against naive in fp64, on two heads of the last sequence of
  the inputs that are timed. Attention computes something else, and has none.

The rows of fla tune themselves first, which takes up to minutes for each shape: choose a few with --shape.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import fla_simple_gla

from .implementations import MODES, Implementation, attention, fla, ours, refuses_tensors
from .measuring import (
    BOTH_PASSES,
    FORWARD_PASSES,
    MEMORY,
    ROOT,
    Column,
    Report,
    add_report_options,
    add_shape,
    calls,
    gpu_time,
    host_time,
    inputs,
    label,
    milliseconds,
    pass_bytes,
    share,
)

# B, T, H, D
SHAPES = [
    (8, 8192, 16, 128),
    (1, 8192, 96, 128),
    (2, 16384, 16, 128),
    (4, 2048, 16, 128),
    (4, 4096, 64, 128),
    (8, 2048, 32, 256),
    (8, 1024, 8, 64),
    (1, 131072, 8, 128),
    (1, 1000000, 4, 64),
]
FIRST_CALL_SHAPE = (1, 131072, 8, 128)


def gpu_milliseconds(name: str) -> Callable[[dict], str]:
    return lambda row: milliseconds(f'{name}_ms')(row) + (' g' if row.get(f'{name}_in_graph') else '')


COLUMNS = [
    Column('shape', 22, lambda row: label(row[x] for x in 'BTHD'), True),
    Column('implementation', 24, lambda row: row['implementation'] + (row['note'] and f' ({row["note"]})'), True),
    Column('fwd', 8, gpu_milliseconds('forward')),
    Column('floor', 7, milliseconds('forward_floor_ms')),
    Column('share', 6, share('forward', 'floor')),
    Column('fwd+bwd', 8, gpu_milliseconds('both')),
    Column('floor', 7, milliseconds('both_floor_ms')),
    Column('share', 6, share('both', 'floor')),
    Column('host fwd', 8, milliseconds('host_forward_ms')),
    Column('fwd+bwd', 8, milliseconds('host_both_ms')),
    Column('MiB', 6, lambda row: '-' if row.get('memory_mib') is None else f'{row["memory_mib"]:.0f}'),
    Column('error', 7, lambda row: '-' if row.get('error') is None else f'{row["error"]:.1e}'),
]


def part(x: torch.Tensor) -> torch.Tensor:
    """The last two heads of the last sequence."""
    return x[-1:, :, -2:]


def exact_part(leaves: list[torch.Tensor], do: torch.Tensor) -> list[torch.Tensor]:
    """o, dq, dk, dv, dg of `part`, in fp64. They do not depend on other sequences or heads."""
    exact_leaves = [part(x.detach()).double().requires_grad_() for x in leaves]
    _, both = calls(fla_simple_gla.naive_chunk_simple_gla, exact_leaves, part(do).double())
    return [x.detach() for x in both()]


def worst_error(found: tuple[torch.Tensor, ...], exact: list[torch.Tensor]) -> float:
    """The largest relative RMS error of o, dq, dk, dv and dg."""
    return max(((part(a.detach()).double() - b).norm() / b.norm()).item() for a, b in zip(found, exact))


def measure(implementation: Implementation, leaves: list, do: torch.Tensor, exact: list) -> dict[str, Any]:
    """Times, memory and error of an implementation."""
    forward, both = calls(implementation.fn, leaves, do)
    with implementation.context():
        error = worst_error(both(), exact) if implementation.is_gla else None
        found: dict[str, Any] = {}
        for name, call in (('forward', forward), ('both', both)):
            host = host_time(call)
            ms, in_graph = gpu_time(call, host)
            found |= {f'{name}_ms': ms, f'{name}_in_graph': in_graph, f'host_{name}_ms': host}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        return found | {'memory_mib': (torch.cuda.max_memory_allocated() - before) / 2**20, 'error': error}


def time_first_call(name: str) -> None:
    """Print the seconds that the first forward and the first backward in this process take."""
    implementation = next(x for x in (fla() if name.startswith('fla') else ours()) if x.name == name)
    leaves, do = inputs(*FIRST_CALL_SHAPE)
    # the first backward in a process also imports parts of PyTorch, which can take seconds
    x = torch.ones(1, device='cuda', requires_grad=True)
    torch.autograd.grad(x + x, x, torch.ones_like(x))
    torch.cuda.synchronize()
    start = time.perf_counter()
    o = implementation.fn(*leaves)[0]
    torch.cuda.synchronize()
    middle = time.perf_counter()
    torch.autograd.grad(o, leaves, do)
    torch.cuda.synchronize()
    print(f'forward {middle - start:.1f} s, backward {time.perf_counter() - middle:.1f} s')


def first_call(name: str) -> str:
    """What `time_first_call` prints, in a process of its own with an empty kernel cache."""
    code = f'from benchmarks import run; run.time_first_call({name!r})'
    with tempfile.TemporaryDirectory() as cache:
        # the other process finds this package and the library where this one finds them
        paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        environment = os.environ | {'TRITON_CACHE_DIR': cache, 'PYTHONPATH': paths}
        child = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    # take the last line: the libraries may print before it, and a traceback ends with its error
    lines = (child.stdout if child.returncode == 0 else child.stderr or 'no message').strip().splitlines()
    return lines[-1] if child.returncode == 0 else f'failed: {lines[-1][:100]}'


def add_options(parser: argparse.ArgumentParser) -> None:
    def flag(name: str, help: str) -> None:
        parser.add_argument(name, action='store_true', help=help)

    add_shape(parser, f'default: {len(SHAPES)} shapes', action='append')
    modes = 'of this library; default: all three, parallel up to T 4096'
    parser.add_argument('--mode', choices=MODES, action='append', help=modes)
    memory = 'after which a gate has decayed by about e; default: 20'
    parser.add_argument('--memory', type=float, default=MEMORY, metavar='TOKENS', help=memory)
    flag('--fla', "fla-core's chunk and fused_chunk (they tune themselves: minutes)")
    flag('--attention', "PyTorch's causal attention, cuDNN and flash, up to T 131072")
    flag('--first-call', 'also time first calls on an empty kernel cache, at B1 T131072 H8 D128')
    add_report_options(parser)


def main(options: argparse.Namespace) -> None:
    own = ours(tuple(options.mode or MODES))
    peers = (fla() if options.fla else []) + (attention() if options.attention else [])
    shapes = [tuple(shape) for shape in options.shape or SHAPES]
    report = Report(options, COLUMNS, len(shapes) * len(own + peers))
    if options.first_call:
        for name in ('chunk', *(['fla chunk'] if options.fla else [])):
            report.say(f'first call of {name} on an empty cache, {label(FIRST_CALL_SHAPE)}: {first_call(name)}')
        report.table()

    failures = 0
    for shape in shapes:
        leaves, do = inputs(*shape, options.memory)
        exact = exact_part(leaves, do)
        floor = pass_bytes(shape) / report.bandwidth * 1e3
        floors = {'forward_floor_ms': FORWARD_PASSES * floor, 'both_floor_ms': BOTH_PASSES * floor}
        for implementation in own + peers:
            row = dict(zip('BTHD', shape)) | {'memory_tokens': options.memory}
            row |= {'implementation': implementation.name, 'note': implementation.note}
            if shape[1] > implementation.longest:
                report.skip()
                continue
            try:
                report.row(**row, **floors, **measure(implementation, leaves, do, exact))
            except Exception as error:
                if refuses_tensors(error):
                    report.row(**row)
                    continue
                report.failed(f'{label(shape)} {implementation.name}', error)
                failures += implementation in own
    report.close()
    if failures:
        sys.exit(f'{failures} rows of this library failed')
