"""Time `chunk_simple_gla` for each byte, over many shapes, to find any that costs much more than the shapes next to it.

There are three series of shapes: T from 128 to 1,048,576 at B x H x T = 2^20, with D 128 and with D 64; and D = K = V
from 16 to 256. The inputs are those of `run`, with gates that have a memory of 20 tokens. As there, the bytes are 4
passes over a tensor in the forward, and 11 with the backward. The columns:

- ms: the time on the GPU, as in `run`: from a CUDA graph where it is marked with a `g`.
- host: milliseconds that a call keeps the CPU.
- ns/KiB: the time for a byte; floor: the least that the bandwidth of a large copy allows.
- ratio: the time for a byte over the lesser one of the neighbours in the series.

With --fla and --attention, the peers are timed too: in the series of D 128 while it has 16 heads, attention also over
dims. fla tunes itself first, which takes minutes.
"""

import argparse
import concurrent.futures
import multiprocessing
import os

import torch

from .implementations import Implementation, attention, fla, ours, refuses_tensors
from .measuring import (
    BOTH_PASSES,
    FORWARD_PASSES,
    Column,
    Report,
    add_report_options,
    calls,
    gpu_time,
    host_time,
    inputs,
    label,
    pass_bytes,
)

CLIFF = 1.5
PASSES = {'forward': FORWARD_PASSES, 'forward + backward': BOTH_PASSES}
HEADS = 16

Shape = tuple[int, ...]


def lengths(D: int) -> list[Shape]:
    """T from 2^7 to 2^20 at B x H x T = 2^20: up to T = 2^16 with 16 heads, then one sequence with fewer."""
    return [(max(1, 2**16 // T), T, min(HEADS, 2**20 // T), D) for T in (2**i for i in range(7, 21))]


def dims() -> list[Shape]:
    return [(4, 4096, 16, D) for D in (16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256)]


SERIES = {'lengths, D 128': lengths(128), 'lengths, D 64': lengths(64), 'dims': dims()}

COLUMNS = [
    Column('shape', 22, lambda row: label(row[x] for x in 'BTHD'), True),
    Column('implementation', 16, lambda row: row['implementation'], True),
    Column('pass', 18, lambda row: row['pass'], True),
    Column('ms', 8, lambda row: f'{row["ms"]:.3f}' + (' g' if row['in_graph'] else '')),
    Column('host', 8, lambda row: f'{row["host_ms"]:.3f}'),
    Column('ns/KiB', 7, lambda row: f'{row["ns_per_kib"]:.3f}'),
    Column('floor', 6, lambda row: f'{row["floor_ns_per_kib"]:.3f}'),
]


def compile_for(shape: Shape) -> None:
    """Run a forward and backward of this shape, so that its kernels are in triton's cache."""
    leaves, do = inputs(*shape)
    calls(ours(('chunk',))[0].fn, leaves, do)[1]()
    torch.cuda.synchronize()


def compile_all(shapes: list[Shape]) -> None:
    """Compile the kernels of all shapes, in several processes.

    In one process they would take longer to compile than all else here.
    """
    workers = min(8, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context('spawn')) as pool:
        # what fails here fails again where it is timed, and is reported there
        concurrent.futures.wait([pool.submit(compile_for, shape) for shape in shapes])


def measure(implementation: Implementation, shape: Shape, report: Report) -> list[dict]:
    """A row for each of `PASSES`."""
    leaves, do = inputs(*shape)
    found = []
    with implementation.context():
        for (name, passes), call in zip(PASSES.items(), calls(implementation.fn, leaves, do)):
            host = host_time(call, repeats=10)
            ms, in_graph = gpu_time(call, host, warmup=5, rep=40)
            kib = passes * pass_bytes(shape) / 2**10
            row = dict(zip('BTHD', shape)) | {'implementation': implementation.name, 'pass': name}
            row |= {'ms': ms, 'in_graph': in_graph, 'host_ms': host, 'ns_per_kib': ms * 1e6 / kib}
            found.append(row | {'floor_ns_per_kib': 2**10 / report.bandwidth * 1e9})
    return found


def cliffs(rows: list[dict]) -> list[str]:
    """The points that cost more than `CLIFF` times a neighbour in their series for a byte, in words."""
    found = []
    for series in SERIES:
        for name in PASSES:
            points = [
                row for row in rows if (row['series'], row['pass'], row['implementation']) == (series, name, 'chunk')
            ]
            costs = [row['ns_per_kib'] for row in points]
            for i, row in enumerate(points):
                neighbours = [*costs[max(0, i - 1) : i], *costs[i + 1 : i + 2]]
                ratio = costs[i] / min(neighbours, default=costs[i])
                if ratio > CLIFF:
                    found.append(f'{label(row[x] for x in "BTHD")} {name}: {ratio:.2f} times a neighbour')
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--fla', action='store_true', help="fla-core's chunk and fused_chunk too")
    parser.add_argument('--attention', action='store_true', help="PyTorch's causal attention by cuDNN too")
    add_report_options(parser)


def main(options: argparse.Namespace) -> None:
    chunk = ours(('chunk',))
    on_lengths = (fla() if options.fla else []) + (attention(('cuDNN',)) if options.attention else [])
    todo = [(series, shape, x) for series, shapes in SERIES.items() for shape in shapes for x in chunk]
    todo += [('lengths, D 128', s, x) for x in on_lengths for s in SERIES['lengths, D 128'] if s[2] == HEADS]
    if options.attention:
        todo += [('dims', shape, x) for x in attention(('cuDNN',)) for shape in SERIES['dims']]
    report = Report(options, COLUMNS, len(PASSES) * len(todo))
    compile_all([shape for shapes in SERIES.values() for shape in shapes])
    rows = []
    for series, shape, implementation in todo:
        try:
            found = measure(implementation, shape, report)
        except Exception as error:
            if not refuses_tensors(error):
                report.failed(f'{label(shape)} {implementation.name}', error)
            continue
        for row in found:
            rows.append({'series': series} | row)
            report.row(**rows[-1])
    report.close()
    found = cliffs(rows)
    print(f'{len(found)} points cost more than {CLIFF} times a neighbour for a byte', *found, sep='\n')
