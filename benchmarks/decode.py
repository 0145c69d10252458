"""Time decoding, beside fla-core: one row for a batch, a pool and an implementation.

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
from collections.abc import Callable

import torch

import fla_simple_gla

from .measuring import Column, Report, add_report_options, host_time, inputs

BATCHES = (1, 4, 16, 64, 256)
COLUMNS = [
    Column('batch', 7, lambda row: str(row['batch'])),
    Column('tokens', 6, lambda row: str(row['tokens'])),
    Column('states', 22, lambda row: row['states'], True),
    Column('device', 9, lambda row: f'{row["device_us"]:.2f}'),
    Column('floor', 8, lambda row: f'{row["floor_us"]:.2f}'),
    Column('share', 6, lambda row: f'{row["floor_us"] / row["device_us"]:.0%}'),
    Column('host', 7, lambda row: f'{row["host_us"]:.1f}'),
    Column('error', 8, lambda row: f'{row["error"]:.1e}'),
]


def error(step: Callable, tokens: list[torch.Tensor], states: torch.Tensor) -> float:
    """The error of a step from these states. `step()` returns o and the states after the step."""
    naive = fla_simple_gla.naive_recurrent_simple_gla
    exact = naive(*(x.double() for x in tokens), initial_state=states.double(), output_final_state=True)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(step(), exact))


def ours(tokens: list, states: torch.Tensor, dtype: torch.dtype, v_first: bool) -> tuple[Callable, Callable]:
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


def fla(tokens: list, states: torch.Tensor) -> tuple[Callable, Callable]:
    """The same two functions for fla-core, whose step returns new states in the order of the batch."""
    import fla.ops.simple_gla

    def step():
        return fla.ops.simple_gla.fused_recurrent_simple_gla(*tokens, initial_state=states, output_final_state=True)

    return step, step


def add_options(parser: argparse.ArgumentParser) -> None:
    batches = ', '.join(map(str, BATCHES))
    parser.add_argument('--batch', type=int, action='append', metavar='N', help=f'default: {batches}')
    tokens = 'of each sequence in a call; default: 1'
    parser.add_argument('--tokens', type=int, action='append', metavar='T', help=tokens)
    parser.add_argument('--heads', type=int, default=32, metavar='H', help='default: 32')
    parser.add_argument('--dim', type=int, default=128, metavar='D', help='K and V; default: 128')
    parser.add_argument('--fla', action='store_true', help="fla-core's fused_recurrent too")
    add_report_options(parser)


@torch.no_grad()
def main(options: argparse.Namespace) -> None:
    from triton.testing import do_bench_cudagraph

    H, D = options.heads, options.dim
    todo = [(T, N) for T in options.tokens or [1] for N in options.batch or BATCHES]
    report = Report(options, COLUMNS, len(todo) * (5 if options.fla else 4))
    for T, N in todo:
        tokens = [x.detach() for x in inputs(N, T, H, D)[0]]
        states = torch.randn(N, H, D, D, device='cuda')
        forms = {}
        for dtype in (torch.float32, torch.bfloat16):
            for v_first in (False, True):
                name = f'{str(dtype)[6:]} {"[V, K]" if v_first else "[K, V]"}'
                forms[name] = dtype, *ours(tokens, states.to(dtype).float(), dtype, v_first)
        if options.fla:
            forms['fla, new states'] = torch.float32, *fla(tokens, states)
        for name, (dtype, step, results) in forms.items():
            size = 2 * states.numel() * dtype.itemsize + sum(x.nbytes for x in tokens) + tokens[2].nbytes
            worst = error(results, tokens, states.to(dtype).float())  # before steps change the pool
            report.row(
                batch=N,
                tokens=T,
                H=H,
                D=D,
                states=name,
                device_us=do_bench_cudagraph(step, rep=50, return_mode='median') * 1e3,
                floor_us=size / report.bandwidth * 1e6,
                host_us=host_time(step, 200) * 1e3,
                error=worst,
            )
    report.close()
