"""Time a training step of two layers, eager and under torch.compile: one row for a shape.

    python benchmarks/compiled.py [--shape B T H D]... [--mode MODE]

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

import run
import torch
from torch import nn
from torch.nn.functional import logsigmoid

import fla_simple_gla

SHAPES = [(8, 1024, 8, 64), (4, 2048, 16, 128), (1, 16384, 16, 128)]
WIDTHS = (22, 12, 10, 10, 10, 16, 12)


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
    return losses, run.median(step)


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_shape(parser, 'default: three shapes', action='append')
    parser.add_argument('--mode', choices=run.MODES, default='chunk')
    return parser.parse_args(arguments)


def main(arguments=None) -> None:
    options = parse(arguments)
    run.require_gpu()
    run.print_machine(run.copy_bandwidth())
    fn = getattr(fla_simple_gla, f'{options.mode}_simple_gla')
    headings = ('shape', 'mode', 'eager', 'compiled', 'graphs', 'losses', 'difference')
    print('| ' + ' | '.join(f'{x:<{w}}' for x, w in zip(headings, WIDTHS)) + ' |')
    for shape in map(tuple, options.shape or SHAPES):
        eager, eager_time = measure(shape, fn)
        compiled, compiled_time = measure(shape, fn, mode='default')
        _, graphs_time = measure(shape, fn, mode='reduce-overhead')
        difference = ((compiled - eager).abs() / eager).max().item()
        times = [f'{x:.3f}' for x in (eager_time, compiled_time, graphs_time)]
        cells = run.label(shape), options.mode, *times, f'{eager[0]:.3f} to {eager[-1]:.3f}', f'{difference:.1e}'
        print('| ' + ' | '.join(f'{x:<{w}}' for x, w in zip(cells, WIDTHS)) + ' |', flush=True)


if __name__ == '__main__':
    main()
