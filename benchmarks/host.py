"""Time that a call keeps the host: one row for an implementation.

    python benchmarks/host.py [--shape B T H D] [--calls N] [--lengths N] [--fla]

Times are means over many calls, in microseconds. A long kernel keeps the GPU busy while the calls are made. They are
made 50 at a time, because the driver holds up the host when some thousand launches wait. The first of each 50 calls
comes after the host has waited for the GPU. It can take ten times as long as the others, and counts too. The inputs are
those of `run.py`, which also times the GPU. The columns:

- forward: ready for a backward.
- both: forward and backward, by `torch.autograd.grad`.
- one thread: the same under `torch.autograd.set_multithreading_enabled(False)`, which keeps the backward in the
  caller's thread. Otherwise PyTorch hands it to a thread of its own and waits for it.

The first row is the time of PyTorch itself: an autograd.Function with as many inputs that computes nothing. Such times
differ by a factor of two from machine to machine, and from one moment to the next on a machine that others use: compare
rows of one run.

With --lengths there is a second table. Each length in it comes only once, as the lengths of prompts and of unpadded
batches do: B 1, H 16, D 128, and T from 1000 on in steps of 7. The kernels are compiled before, by calls with the
neighbours of all these lengths.
"""

import argparse
import statistics
import time

import run
import torch

SHAPE = (8, 1024, 8, 64)
AT_ONCE = 50
WIDTHS = (24, 9, 9, 12)
# of the second table: H, D, the first T and the step
STREAM = (16, 128, 1000, 7)


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g):
        ctx.save_for_backward(q, k, v, g)
        return v.detach(), None

    @staticmethod
    def backward(ctx, do, _):
        return ctx.saved_tensors


def mean_time(fn, calls: int) -> float:
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


def stream_times(fn, lengths: int) -> tuple[float, float]:
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
    return tuple(means)


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_shape(parser, 'default: 8 1024 8 64', default=SHAPE)
    parser.add_argument('--calls', type=int, default=1000, help='default: 1000')
    parser.add_argument('--lengths', type=int, default=0, help='of the second table; default: 0, which leaves it out')
    parser.add_argument('--fla', action='store_true', help="fla-core's chunk and fused_chunk")
    return parser.parse_args(arguments)


def main(arguments=None) -> None:
    options = parse(arguments)
    run.require_gpu()
    run.print_machine(run.copy_bandwidth())
    leaves, do = run.inputs(*options.shape)
    print(f'{run.label(options.shape)}, microseconds on the host, means of {options.calls} calls')
    print_row('implementation', 'forward', 'both', 'one thread')
    rows = [('nothing', Nothing.apply), *((x.name, x.fn) for x in run.ours() + (run.fla() if options.fla else []))]
    for name, fn in rows:
        forward, both = run.calls(fn, leaves, do)
        times = [mean_time(call, options.calls) for call in (forward, both)]
        with torch.autograd.set_multithreading_enabled(False):
            times.append(mean_time(both, options.calls))
        print_row(name, *times)
    if options.lengths:
        H, D, first, step = STREAM
        stream = f'B1 H{H} D{D}, T from {first} on in steps of {step}'
        print(f'\n{stream}, microseconds on the host, means of {options.lengths} calls')
        print_row('implementation', 'forward', 'both')
        for name, fn in rows[1:]:
            print_row(name, *stream_times(fn, options.lengths))


def print_row(name: str, *cells: str | float) -> None:
    shown = (x if isinstance(x, str) else f'{x:.1f}' for x in cells)
    columns = [f'{name:<{WIDTHS[0]}}', *(f'{x:>{w}}' for x, w in zip(shown, WIDTHS[1:]))]
    print('| ' + ' | '.join(columns) + ' |', flush=True)


if __name__ == '__main__':
    main()
