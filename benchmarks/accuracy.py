"""Relative RMS errors against naive in fp64, over lengths and gate memories: one row for a result.

The lengths T are 64 to 65,536; 67 has a last chunk of three tokens. The gate memories are 1 to 1,000 tokens. Every
combination is computed twice: without states, and with an initial state and a final state that has a gradient. The
parallel mode has no states, and stops at T 8,192. The inputs are standard normal, with 8 heads and K = V = 128; in bf16
there are other dims too, in the modes and for some of the lengths. A row has the worst error of a result over the gate
memories.
"""

import argparse
import collections

import torch

import fla_simple_gla

from .implementations import MODES
from .measuring import Column, Report, add_report_options

NAMES = ('o', 'dq', 'dk', 'dv', 'dg', 'ht', 'dh0')
LENGTHS = (64, 67, 100, 1000, 8192, 65536)
LONGEST = {'parallel': 8192}
MEMORIES = (1, 3, 10, 30, 100, 300, 1000)
DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}
H = 8  # heads of v
DIMS = 128, 128, H  # K, V and heads of q
OTHER_DIMS = [(256, 512, H), (128, 64, 1), (192, 192, H)]  # in OTHER_MODES and bf16
OTHER_LENGTHS = (67, 1000, 8192)
OTHER_MODES = ('chunk', 'fused_chunk')

COLUMNS = [
    Column('mode', 12, lambda row: row['mode'], True),
    Column('dtype', 5, lambda row: row['dtype'], True),
    Column('dims', 16, lambda row: 'K{K} V{V} HK{HK}'.format(**row), True),
    Column('T', 6, lambda row: str(row['T'])),
    Column('states', 6, lambda row: 'yes' if row['states'] else 'no', True),
    Column('result', 6, lambda row: row['result'], True),
    Column('error', 8, lambda row: f'{row["error"]:.1e}'),
    Column('memory', 6, lambda row: str(row['memory_tokens'])),
]


def make_inputs(dtype: torch.dtype, T: int, memory: int, dims: tuple[int, int, int]) -> list[torch.Tensor]:
    """q, k, v, g, h0, and the gradients of o and of the final state."""
    torch.manual_seed(T + memory)
    K, V, HK = dims
    q, k, v, do = (torch.randn(1, T, *x, device='cuda').to(dtype) for x in ((HK, K), (HK, K), (H, V), (H, V)))
    g = -2 * torch.rand(1, T, H, device='cuda') / memory
    h0, dht = torch.randn(2, 1, H, K, V, device='cuda')
    return [q, k, v, g, h0, do, dht]


def results(name: str, inputs: list[torch.Tensor], states: bool) -> list[torch.Tensor]:
    """What `NAMES` names; the first five without states."""
    *leaves, do, dht = inputs
    q, k, v, g, h0 = (x.detach().requires_grad_() for x in leaves)
    fn = getattr(fla_simple_gla, f'{name}_simple_gla')
    if states:
        o, ht = fn(q, k, v, g, initial_state=h0, output_final_state=True)
        *gradients, dh0 = torch.autograd.grad([o, ht], [q, k, v, g, h0], [do.to(o.dtype), dht.to(ht.dtype)])
        return [o.detach(), *gradients, ht.detach(), dh0]
    o, *_ = fn(q, k, v, g)
    return [o.detach(), *torch.autograd.grad(o, [q, k, v, g], do.to(o.dtype))]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--mode', choices=MODES, action='append', help='default: all three')
    add_report_options(parser)


def main(options: argparse.Namespace) -> None:
    modes = options.mode or list(MODES)
    todo = [(modes, dtype, T, states, DIMS) for T in LENGTHS for dtype in DTYPES for states in (False, True)]
    others = [mode for mode in modes if mode in OTHER_MODES]
    todo += [
        (others, 'bf16', T, states, dims) for T in OTHER_LENGTHS for states in (False, True) for dims in OTHER_DIMS
    ]
    report = Report(options, COLUMNS, sum(len(of) for of, *_ in todo) * len(NAMES))
    for of, dtype, T, states, dims in todo:
        here = [m for m in of if T <= LONGEST.get(m, T) and not (states and m == 'parallel')]
        worst: dict = collections.defaultdict(lambda: (0.0, None))
        for memory in MEMORIES:
            if not here:
                continue
            given = make_inputs(DTYPES[dtype], T, memory, dims)
            exact = results('naive_chunk', [x.double() for x in given], states)  # one for all modes
            for mode in here:
                for name, a, b in zip(NAMES, results(mode, given, states), exact):
                    error = ((a.double() - b).norm() / b.norm()).item()
                    worst[mode, name] = max(worst[mode, name], (error, memory))
        for (mode, name), (error, memory) in worst.items():
            row = {'mode': mode, 'dtype': dtype, 'T': T, 'states': states, 'result': name}
            report.row(**row, **dict(zip(('K', 'V', 'HK'), dims)), error=error, memory_tokens=memory)
    report.close()
