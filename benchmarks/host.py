"""Time that a call keeps the host: one row for an implementation.

Times are means over many calls, in microseconds. A long kernel keeps the GPU busy while the calls are made. They are
made 50 at a time, because the driver holds up the host when some thousand launches wait. The first of each 50 calls
comes after the host has waited for the GPU. It can take ten times as long as the others, and counts too. The inputs are
those of `run`, which also times the GPU. The columns:

- forward: ready for a backward.
- both: forward and backward, by `torch.autograd.grad`.
- one thread: the same under `torch.autograd.set_multithreading_enabled(False)`, which keeps the backward in the
  caller's thread. Otherwise PyTorch hands it to a thread of its own and waits for it.

The first row is the time of PyTorch itself: an autograd.Function with as many inputs that computes nothing. Such times
differ by a factor of two from machine to machine, and from one moment to the next on a machine that others use: compare
rows of one run.

With --lengths each implementation has a second row, for lengths that come only once, as those of prompts and of
unpadded batches do: B 1, H 16, D 128, and T from 1000 on in steps of 7. The kernels are compiled before, by calls with
the neighbours of all these lengths.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from .implementations import Nothing, fla, ours
from .measuring import Column, Report, add_report_options, add_shape, calls, inputs, label

SHAPE = (8, 1024, 8, 64)
AT_ONCE = 50
# of the rows of new lengths: H, D, the first T and the step
STREAM = (16, 128, 1000, 7)


def microseconds(name: str) -> Callable[[dict], str]:
    return lambda row: '-' if row[name] is None else f'{row[name]:.0f}'


COLUMNS = [
    Column('implementation', 18, lambda row: row['implementation'], True),
    Column('shapes', 36, lambda row: row['shapes'], True),
    Column('forward', 8, microseconds('forward_us')),
    Column('both', 8, microseconds('both_us')),
    Column('one thread', 10, microseconds('one_thread_us')),
]


def mean_time(fn: Callable, calls: int) -> float:
    """The microseconds that a call keeps the host."""
    fn()
    times = []
    for _ in range(max(1, calls // AT_ONCE)):
        torch.cuda.synchronize()
        torch.cuda._sleep(10**8)  # cycles, some 50 ms
        start = time.perf_counter()
        for _ in range(AT_ONCE):
            fn()
        times.append((time.perf_counter() - start) / AT_ONCE)
    torch.cuda.synchronize()
    return statistics.mean(times) * 1e6


def stream_times(fn: Callable, lengths: int) -> list[float]:
    """The microseconds that a forward keeps the host, and forward and backward together, where each length is new."""
    H, D, first, step = STREAM

    def prepared(T):
        q, k, v, do = (torch.randn(1, T, H, D, device='cuda', dtype=torch.bfloat16) for _ in range(4))
        g = torch.nn.functional.logsigmoid(torch.randn(1, T, H, device='cuda') + 3)
        return [x.requires_grad_() for x in (q, k, v, g)], do

    def mean_over(calls, with_backward):
        torch.cuda.synchronize()
        torch.cuda._sleep(10**8)
        start = time.perf_counter()
        for leaves, do in calls:
            o, *_ = fn(*leaves)
            if with_backward:
                torch.autograd.grad(o, leaves, do)
        return (time.perf_counter() - start) / len(calls) * 1e6

    means = []
    T = first
    for with_backward in (False, True):
        for shift in (1, 0):  # neighbours of all lengths compile the kernels, and are not counted
            mean = mean_over([prepared(T + i * step + shift) for i in range(lengths)], with_backward)
        T += lengths * step
        means.append(mean)
    torch.cuda.synchronize()
    return means


def add_options(parser: argparse.ArgumentParser) -> None:
    add_shape(parser, 'default: 8 1024 8 64', default=SHAPE)
    parser.add_argument('--calls', type=int, default=1000, help='default: 1000')
    parser.add_argument('--lengths', type=int, default=0, help='new lengths; default: 0, which leaves them out')
    parser.add_argument('--fla', action='store_true', help="fla-core's chunk and fused_chunk")
    add_report_options(parser)


def main(options: argparse.Namespace) -> None:
    rows = [(x.name, x.fn) for x in ours() + (fla() if options.fla else [])]
    report = Report(options, COLUMNS, 1 + len(rows) * (2 if options.lengths else 1))
    leaves, do = inputs(*options.shape)
    for name, fn in [('nothing', Nothing.apply), *rows]:
        forward, both = calls(fn, leaves, do)
        times = [mean_time(call, options.calls) for call in (forward, both)]
        with torch.autograd.set_multithreading_enabled(False):
            times.append(mean_time(both, options.calls))
        report.row(implementation=name, shapes=label(options.shape), **named(times))
    if options.lengths:
        H, D, first, step = STREAM
        for name, fn in rows:
            shapes = f'new T: B1 T{first}+{step}n H{H} D{D}'
            report.row(implementation=name, shapes=shapes, **named([*stream_times(fn, options.lengths), None]))
    report.close()


def named(times: list) -> dict:
    return dict(zip(('forward_us', 'both_us', 'one_thread_us'), times))
