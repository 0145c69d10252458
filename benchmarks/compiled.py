"""Time a training step of two layers, eager and under torch.compile: one row for a shape.

A layer is a norm, the projections of q, k, v and the gate, the mode, a projection, a norm and an MLP four times as
wide, with residuals. Its width is H x D. The parameters are in fp32, under autocast to bf16. A step is forward,
backward, and AdamW (fused). The columns:

- eager, compiled, graphs: milliseconds of a step, the medians of `do_bench`. Compilation is with `fullgraph=True`, so
  that nothing is left to Python. `graphs` is `mode='reduce-overhead'`: compiled, and replayed from CUDA graphs.
- losses: those of the first and of the last of 20 eager steps.
- difference: the largest relative difference of the losses, eager and compiled. The two round different intermediate
  results to bf16.
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import logsigmoid

import fla_simple_gla

from .implementations import MODES
from .measuring import Column, Report, add_report_options, add_shape, label, median

SHAPES = [(8, 1024, 8, 64), (4, 2048, 16, 128), (1, 16384, 16, 128)]
COLUMNS = [
    Column('shape', 22, lambda row: label(row[x] for x in 'BTHD'), True),
    Column('mode', 12, lambda row: row['mode'], True),
    Column('eager', 8, lambda row: f'{row["eager_ms"]:.2f}'),
    Column('compiled', 8, lambda row: f'{row["compiled_ms"]:.2f}'),
    Column('graphs', 8, lambda row: f'{row["graphs_ms"]:.2f}'),
    Column('losses', 16, lambda row: f'{row["first_loss"]:.3f} to {row["last_loss"]:.3f}', True),
    Column('difference', 10, lambda row: f'{row["difference"]:.1e}'),
]


class Layer(nn.Module):
    """The mode `fn` with projections and norms, then an MLP."""

    def __init__(self, heads, dim, fn):
        super().__init__()
        width = heads * dim
        self.heads, self.fn = heads, fn
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.gate = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, heads)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).unbind(2)
        o, _ = self.fn(q, k, v, logsigmoid(self.gate(y).float() + 3))
        x = x + self.out(o.flatten(2))
        return x + self.mlp(self.norm2(x))


def make_step(B, T, H, D, fn, **options):
    """A training step that returns its loss. If there are options for `torch.compile`, it is compiled."""
    torch.manual_seed(0)
    model = nn.Sequential(Layer(H, D, fn), Layer(H, D, fn)).to('cuda')
    x, target = torch.randn(2, B, T, H * D, device='cuda')
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    call = torch.compile(model, fullgraph=True, dynamic=False, **options) if options else model

    def step():
        with torch.autocast('cuda', torch.bfloat16):
            loss = (call(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure(shape, fn, **options) -> tuple[torch.Tensor, float]:
    """The losses of 20 steps, and the milliseconds of a step."""
    torch.compiler.reset()
    step = make_step(*shape, fn, **options)
    losses = torch.stack([step() for _ in range(20)])
    return losses, median(step)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_shape(parser, 'default: three shapes', action='append')
    parser.add_argument('--mode', choices=MODES, default='chunk', help='default: chunk')
    add_report_options(parser)


def main(options: argparse.Namespace) -> None:
    fn = getattr(fla_simple_gla, f'{options.mode}_simple_gla')
    shapes = [tuple(shape) for shape in options.shape or SHAPES]
    report = Report(options, COLUMNS, len(shapes))
    for shape in shapes:
        eager, eager_ms = measure(shape, fn)
        compiled, compiled_ms = measure(shape, fn, mode='default')
        _, graphs_ms = measure(shape, fn, mode='reduce-overhead')
        report.row(
            **dict(zip('BTHD', shape)),
            mode=options.mode,
            eager_ms=eager_ms,
            compiled_ms=compiled_ms,
            graphs_ms=graphs_ms,
            first_loss=eager[0].item(),
            last_loss=eager[-1].item(),
            difference=((compiled - eager).abs() / eager).max().item(),
        )
    report.close()
