"""Time `chunk_simple_gla` for each byte, over many shapes, to find any that costs much more than the shapes next to it.

    python benchmarks/shapes.py [--plot FILE.png]

There are three series of shapes: T from 128 to 1,048,576 at B x H x T = 2^20, with D 128 and with D 64; and D = K = V
from 16 to 256. The inputs are those of `run.py`, with gates that have a memory of 20 tokens. As there, the bytes are 4
passes over a tensor in the forward, and 11 with the backward. The ratio is a point's time for a byte over the lesser
time of its neighbours. Where the time of a call on the host is close to the measured time, the host is the reason.

The plot needs matplotlib. Without it, or without --plot, bars are printed.
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os

import run
import torch

from fla_simple_gla import chunk_simple_gla

CLIFF = 1.5
PASSES = {'forward': run.FORWARD_PASSES, 'forward + backward': run.BOTH_PASSES}


def lengths(D) -> list[tuple[int, ...]]:
    """Shapes with T from 2^7 to 2^20 at B x H x T = 2^20: up to T = 2^17 with 8 heads, then one sequence with fewer."""
    return [(max(1, 2**17 // T), T, min(8, 2**20 // T), D) for T in (2**i for i in range(7, 21))]


def dims() -> list[tuple[int, ...]]:
    return [(4, 4096, 16, D) for D in (16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256)]


# title of a series: its shapes, and which of B, T, H, D is the axis
SERIES = {
    'T at B x H x T = 2^20, D 128': (lengths(128), 1),
    'T at B x H x T = 2^20, D 64': (lengths(64), 1),
    'D at B4 T4096 H16': (dims(), 3),
}


@dataclasses.dataclass
class Point:
    """A measured shape."""

    shape: tuple[int, ...]
    ms: float
    host: float  # milliseconds too
    passes: int

    @property
    def ns_per_kib(self) -> float:
        return self.ms * 1e6 / (self.passes * run.pass_bytes(self.shape) / 2**10)

    @property
    def is_host_bound(self) -> bool:
        return self.host > 0.8 * self.ms


def ratios(points) -> list[float]:
    """For each point its time for a byte over the lesser time of its neighbours; 1 where it has none."""
    costs = [point.ns_per_kib for point in points]
    neighbours = [[*costs[max(0, i - 1) : i], *costs[i + 1 : i + 2]] for i in range(len(costs))]
    return [cost / min(others, default=cost) for cost, others in zip(costs, neighbours)]


def compile_for(shape) -> None:
    """Run a forward and backward of this shape, so that its kernels are in triton's cache."""
    B, T, H, D = shape
    leaves, do = run.inputs(B, T, H, D)
    run.calls(chunk_simple_gla, leaves, do)[1]()
    torch.cuda.synchronize()


def compile_all(shapes) -> None:
    """Compile the kernels of all shapes, in several processes.

    In one process they would take longer to compile than all else here.
    """
    workers = min(8, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context('spawn')) as pool:
        # what fails here fails again where it is timed, and is reported there
        concurrent.futures.wait([pool.submit(compile_for, shape) for shape in shapes])


def measure(shapes) -> dict[str, list[Point]]:
    """The points of a series for each of `PASSES`. A shape that fails is reported and left out."""
    points = {name: [] for name in PASSES}
    for shape in shapes:
        try:
            leaves, do = run.inputs(*shape)
            for (name, passes), call in zip(PASSES.items(), run.calls(chunk_simple_gla, leaves, do)):
                ms, host = run.median(call, warmup=5, rep=20), run.host_time(call, repeats=10)
                points[name].append(Point(shape, ms, host, passes))
        except Exception as error:
            print(f'{run.label(shape)} failed: {run.short(error)}', flush=True)
    return points


def table(points) -> str:
    lines = [f'{"shape":22}  {"ms":>8}  {"host ms":>8}  {"ns/KiB":>7}  {"ratio":>5}']
    for point, ratio in zip(points, ratios(points)):
        flag = '' if ratio <= CLIFF else f'  <- above {CLIFF}' + (', bound by the host' if point.is_host_bound else '')
        times = f'{point.ms:8.3f}  {point.host:8.3f}  {point.ns_per_kib:7.3f}'
        lines.append(f'{run.label(point.shape):22}  {times}  {ratio:5.2f}{flag}')
    return '\n'.join(lines)


def bars(points, axis, width=60) -> str:
    longest = max((point.ns_per_kib for point in points), default=1)
    lines = []
    for point in points:
        bar = '#' * max(1, round(width * point.ns_per_kib / longest))
        lines.append(f'{"BTHD"[axis]} {point.shape[axis]:<8}{bar} {point.ns_per_kib:.3f}')
    return '\n'.join(lines)


def plot(results, floor, path) -> bool:
    """Draw the points of each series, for each of `PASSES`. Returns False where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(5 * len(results), 4), layout='constrained')
    for axes, (title, series) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items()):
        axis = SERIES[title][1]
        for name, points in series.items():
            x, y = [point.shape[axis] for point in points], [point.ns_per_kib for point in points]
            axes.plot(x, y, marker='.', label=name)
        axes.axhline(floor, color='gray', linestyle='--', label='floor')
        axes.set(title=title, xlabel='BTHD'[axis], ylabel='ns / KiB')
        axes.set_xscale('log', base=2)
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(path)
    return True


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--plot', metavar='FILE.png', help='where to draw the series, if there is matplotlib')
    return parser.parse_args(arguments)


def main(arguments=None) -> None:
    options = parse(arguments)
    run.require_gpu()
    bandwidth = run.copy_bandwidth()
    floor = 2**10 / bandwidth * 1e9
    run.print_machine(bandwidth)
    print(f'floor {floor:.3f} ns/KiB', flush=True)
    compile_all([shape for shapes, _ in SERIES.values() for shape in shapes])
    results = {}
    for title, (shapes, _) in SERIES.items():
        results[title] = measure(shapes)
        for name, points in results[title].items():
            print(f'\n{title}: {name}\n{table(points)}', flush=True)

    every = [points for series in results.values() for points in series.values()]
    above = sum(ratio > CLIFF for points in every for ratio in ratios(points))
    print(f'\n{above} of {sum(map(len, every))} points cost more than {CLIFF} times a neighbour for a byte')
    if options.plot and plot(results, floor, options.plot):
        print(f'drawn in {options.plot}')
        return
    if options.plot:
        print('no matplotlib: bars in place of the plot')
    for title, series in results.items():
        for name, points in series.items():
            print(f'\n{title}: {name}, ns/KiB\n{bars(points, SERIES[title][1])}')


if __name__ == '__main__':
    main()
