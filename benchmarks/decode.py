"""Time decoding on a GPU, beside fla-core: one row for a batch, a pool and an implementation.

    python benchmarks/decode.py [--batch N]... [--tokens T] [--heads H] [--dim D] [--fla]

The states of the batch are in shuffled slots of a pool. A call adds T tokens to each sequence (1, or a few drafts), in
bf16 with a gate. fla-core has no pools: it is given the states of the batch, and returns new ones. The columns:

- device: microseconds of a call, from CUDA graphs of many calls (`triton.testing.do_bench_cudagraph`). The states of a
  small batch stay in the L2 cache, and it can take less than the floor.
- floor: the time that the bytes take at the bandwidth of a large copy, measured in the same run. The bytes are those
  that have to move: each state read and written, q, k, v, g read and o written.
- share: the floor over the time.
- host: microseconds that an eager call keeps the CPU, the median, with the GPU kept busy.
- error: the relative RMS error of o or of the states, whichever is larger, against naive in fp64. A pool in 16 bits
  rounds the states.
"""

import argparse

import torch
from run import copy_bandwidth, host_time, inputs, print_machine, require_gpu

import fla_simple_gla

BATCHES = (1, 16, 64, 256)
WIDTHS = (7, 22, 9, 8, 6, 7, 8)


def error(step, tokens, states) -> float:
    """The error of a step from these states. `step()` returns o and the states after the step."""
    naive = fla_simple_gla.naive_recurrent_simple_gla
    exact = naive(*(x.double() for x in tokens), initial_state=states.double(), output_final_state=True)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(step(), exact))


def ours(tokens, states, dtype, v_first):
    """A step from a pool, and a function that makes one and returns its results in the order of the batch.

    Every fourth slot of the pool is free.
    """
    N = states.shape[0]
    slots = torch.randperm(N + N // 3 + 1, device='cuda')[:N].int()
    pool = torch.zeros(N + N // 3 + 1, *states.shape[1:], dtype=dtype, device='cuda')
    pool[slots.long()] = states.to(dtype)
    view = pool.mT.contiguous() if v_first else pool

    fn = fla_simple_gla.fused_recurrent_simple_gla

    def step():
        return fn(*tokens, initial_state=view, state_v_first=v_first, state_indices=slots)

    def results():
        o, after = step()
        after = after[slots.long()]
        return o, after.mT if v_first else after

    return step, results


def fla(tokens, states):
    """The same two functions for fla-core, whose step returns new states in the order of the batch."""
    import fla.ops.simple_gla

    def step():
        return fla.ops.simple_gla.fused_recurrent_simple_gla(*tokens, initial_state=states, output_final_state=True)

    return step, step


def line(cells) -> str:
    return '| ' + ' | '.join(f'{cell:>{width}}' for cell, width in zip(cells, WIDTHS)) + ' |'


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, action='append', metavar='N', help='default: 1, 16, 64 and 256')
    parser.add_argument('--tokens', type=int, default=1, metavar='T', help='of each sequence in a call')
    parser.add_argument('--heads', type=int, default=32, metavar='H')
    parser.add_argument('--dim', type=int, default=128, metavar='D', help='K and V')
    parser.add_argument('--fla', action='store_true', help="fla-core's fused_recurrent too")
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments=None) -> None:
    options = parse(arguments)
    require_gpu()
    from triton.testing import do_bench_cudagraph

    bandwidth = copy_bandwidth()
    print_machine(bandwidth)
    T, H, D = options.tokens, options.heads, options.dim
    print(f'T{T} H{H} D{D}, microseconds\n')
    print(line(('batch', 'pool', 'device', 'floor', 'share', 'host', 'error')))
    print('|' + '|'.join('-' * (width + 1) + ':' for width in WIDTHS) + '|', flush=True)
    for N in options.batch or BATCHES:
        tokens = [x.detach() for x in inputs(N, T, H, D)[0]]
        states = torch.randn(N, H, D, D, device='cuda')
        rows = {}
        for dtype in (torch.float32, torch.bfloat16):
            for v_first in (False, True):
                name = f'{str(dtype)[6:]} {"[V, K]" if v_first else "[K, V]"}'
                rows[name] = dtype, *ours(tokens, states.to(dtype).float(), dtype, v_first)
        if options.fla:
            rows['fla, new states'] = torch.float32, *fla(tokens, states)
        for name, (dtype, step, results) in rows.items():
            worst = error(results, tokens, states.to(dtype).float())
            device = do_bench_cudagraph(step, rep=100, return_mode='median') * 1e3
            host = host_time(step, 200) * 1e3
            size = 2 * states.numel() * dtype.itemsize + sum(x.nbytes for x in tokens) + tokens[2].nbytes
            floor = size / bandwidth * 1e6
            cells = N, name, f'{device:.2f}', f'{floor:.2f}', f'{floor / device:.0%}', f'{host:.1f}', f'{worst:.1e}'
            print(line(cells), flush=True)


if __name__ == '__main__':
    main()
