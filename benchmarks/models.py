"""Time `chunk_simple_gla` at the dims of models that have this operator, beside mamba_ssm and fla-core.

A row is what one layer of a model computes, in bf16: B sequences of T tokens, H heads of v, HK of q and k, and their
dims K and V. The gate is `g = logsigmoid(normal + log(20))`, or RetNet's constants. The columns:

- fwd, fwd+bwd: milliseconds on the GPU of the forward, and of forward and backward together, from a CUDA graph; eager:
  the same by `triton.testing.do_bench`, where the host may be the bound.
- limit: the larger of two times. One is that of the bytes that have to move, at the bandwidth of a large copy, measured
  in the same run: q, k, v, g and o once, and in the backward q, k, v, g and do once more, and the gradients. The other
  is that of the products, at 700 TFLOP/s, about what large matrix products reach on a H100 or H200: 4KV a token and
  head in the forward and 10KV in the backward, and in chunks of 64 tokens those of pairs, 2 and 5 of 64 tokens each.
- share: the limit over the time.
- MiB: the peak memory of a forward and backward beyond the inputs, with o and the gradients.
- error: the worst relative RMS error of o, dq, dk, dv and dg against naive in fp64, on the last 1,024 tokens of the
  last sequence. The reference begins 1,024 tokens earlier: of what was before nothing is left. RetNet's constants decay
  slowly, and there it takes the whole sequence.

The peers: `mamba_chunk_scan_combined` of mamba_ssm, in chunks of 256 tokens, where heads share q and k (it takes dt and
A in place of a gate: dt is 1 / 20 on average, and A is -1); fla-core's `chunk_simple_gla` where they do not. Both tune
themselves first.
"""

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import fla_simple_gla

from .implementations import fla
from .measuring import MEMORY, Column, Report, add_report_options, dims_label, median, milliseconds, share

TFLOPS = 700.0
CHUNK = 64
COMPARED = 1024  # tokens


class Model(NamedTuple):
    """A layer of a model: its shape, and whether the gate is a constant of each head."""

    name: str
    B: int
    T: int
    H: int
    HK: int
    K: int
    V: int
    gamma: bool = False

    def forward_bytes(self) -> int:
        """q, k, v and o in 16 bits, and g in 32."""
        tokens = self.B * self.T
        return tokens * (4 * self.HK * self.K + 4 * self.H * self.V + (0 if self.gamma else 4 * self.H))

    def backward_bytes(self) -> int:
        """q, k, v, do, dq, dk and dv in 16 bits, and g and dg in 32."""
        tokens = self.B * self.T
        return tokens * (8 * self.HK * self.K + 6 * self.H * self.V + (0 if self.gamma else 8 * self.H))

    def limits(self, bandwidth: float) -> tuple[float, float]:
        """The least milliseconds of the forward, and of forward and backward."""
        heads, KV = self.B * self.T * self.H, self.K * self.V
        forward = heads * (4 * KV + 2 * CHUNK * (self.K + self.V))
        both = forward + heads * (10 * KV + 2 * CHUNK * (3 * self.K + 2 * self.V))
        sizes = self.forward_bytes(), self.forward_bytes() + self.backward_bytes()
        limits = (max(x / bandwidth, y / (TFLOPS * 1e12)) * 1e3 for x, y in zip(sizes, (forward, both)))
        return next(limits), next(limits)


MODELS = [
    Model('mamba2-2.7b', 4, 4096, 80, 1, 128, 64),
    Model('nemotron-h-8b', 2, 8192, 128, 8, 128, 64),
    Model('falcon-h1-7b', 2, 4096, 24, 1, 256, 128),
    Model('granite-4-small', 1, 32768, 128, 1, 128, 64),
    Model('Mamba-2, N 64', 2, 2048, 64, 1, 64, 64),
    Model("fla's layer, width 1024", 8, 4096, 4, 4, 256, 256),
    Model("fla's layer, width 2048", 8, 4096, 4, 4, 512, 512),
    Model('RetNet and GLA', 8, 2048, 4, 4, 256, 512),
    Model('RetNet and GLA, full GPU', 16, 4096, 4, 4, 256, 512),
    Model('retnet-3b', 4, 2048, 10, 10, 256, 512, gamma=True),
    Model('K = V = 256', 8, 2048, 32, 32, 256, 256),
    Model('K = V = 192', 4, 4096, 16, 16, 192, 192),
    Model('K = V = 96', 4, 4096, 32, 32, 96, 96),
    Model('K 64, V 128', 4, 4096, 64, 64, 64, 128),
    Model('K = V = 128', 4, 4096, 64, 64, 128, 128),
]


COLUMNS = [
    Column('model', 24, lambda row: row['model'], True),
    Column('shape', 32, dims_label, True),
    Column('implementation', 14, lambda row: row['implementation'], True),
    Column('fwd', 7, milliseconds('forward_ms')),
    Column('limit', 6, milliseconds('forward_limit_ms')),
    Column('share', 5, share('forward', 'limit')),
    Column('eager', 7, milliseconds('forward_eager_ms')),
    Column('fwd+bwd', 7, milliseconds('both_ms')),
    Column('limit', 6, milliseconds('both_limit_ms')),
    Column('share', 5, share('both', 'limit')),
    Column('eager', 7, milliseconds('both_eager_ms')),
    Column('MiB', 6, lambda row: f'{row["memory_mib"]:.0f}'),
    Column('error', 7, lambda row: '-' if row.get('error') is None else f'{row["error"]:.1e}'),
]


def inputs(model: Model) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the layer computes from, as leaves, by the names of `chunk_simple_gla`; and do."""
    torch.manual_seed(0)
    _, B, T, H, HK, K, V, gamma = model

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device='cuda', dtype=dtype)

    found = {'q': normal(B, T, HK, K), 'k': normal(B, T, HK, K), 'v': normal(B, T, H, V)}
    if gamma:
        found['g_gamma'] = torch.log1p(-(2.0 ** (-5 - torch.arange(H, device='cuda', dtype=torch.float32))))
    else:
        found['g'] = torch.nn.functional.logsigmoid(normal(B, T, H, dtype=torch.float32) + math.log(MEMORY))
    # RetNet's constants are no parameters
    return {x: y.requires_grad_(x != 'g_gamma') for x, y in found.items()}, normal(B, T, H, V)


def calls(fn: Callable, leaves: dict[str, torch.Tensor], do: torch.Tensor) -> tuple[Callable, Callable]:
    """A forward that is ready for a backward; a forward and its backward, which returns o and all gradients."""

    def forward() -> torch.Tensor:
        return fn(**leaves)[0]

    def both() -> tuple[torch.Tensor, ...]:
        o = forward()
        return o, *torch.autograd.grad(o, [x for x in leaves.values() if x.requires_grad], do)

    return forward, both


def worst_error(model: Model, found: tuple, leaves: dict[str, torch.Tensor], do: torch.Tensor) -> float:
    """The largest relative RMS error of the results, on the last tokens of the last sequence."""
    start = 0 if model.gamma else max(0, model.T - 2 * COMPARED)
    compared = slice(None) if model.gamma else slice(-COMPARED, None)
    exact_leaves = {
        name: (x.detach() if name == 'g_gamma' else x.detach()[-1:, start:]).double().requires_grad_(x.requires_grad)
        for name, x in leaves.items()
    }
    _, both = calls(fla_simple_gla.naive_chunk_simple_gla, with_gamma(exact_leaves), do[-1:, start:].double())
    pairs = [(a.detach()[-1, compared].double(), b.detach()[0, compared]) for a, b in zip(found, both())]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def with_gamma(leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with g in place of g_gamma, which the naive functions do not take."""
    if 'g_gamma' not in leaves:
        return leaves
    g = leaves['g_gamma'].expand(leaves['v'].shape[:3])
    return {name: x for name, x in leaves.items() if name != 'g_gamma'} | {'g': g}


def mamba_ssm(leaves: dict[str, torch.Tensor]) -> tuple[Callable, dict[str, torch.Tensor]]:
    """`mamba_chunk_scan_combined` as a function of its own arguments, and these, with the shapes of leaves."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    q, k, v, g = (leaves[name].detach() for name in 'qkvg')
    A = torch.full((v.shape[2],), -1.0, device='cuda')

    def scan(x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> tuple[torch.Tensor]:
        return (mamba_chunk_scan_combined(x, dt, A, B, C, 256),)

    return scan, {name: x.requires_grad_() for name, x in {'x': v, 'dt': -g, 'B': k, 'C': q}.items()}


def measure(forward: Callable, both: Callable) -> dict[str, Any]:
    """Times and memory."""
    from triton.testing import do_bench_cudagraph

    found: dict[str, Any] = {}
    for name, call in (('forward', forward), ('both', both)):
        found[f'{name}_eager_ms'] = median(call, warmup=20, rep=60)
        found[f'{name}_ms'] = do_bench_cudagraph(call, rep=20, return_mode='median')
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    return found | {'memory_mib': (torch.cuda.max_memory_allocated() - before) / 2**20}


def peer_of(model: Model, leaves: dict, do: torch.Tensor, options: argparse.Namespace) -> tuple[str, tuple] | None:
    """The name and the calls of a peer that computes the same, if there is one and it is asked for."""
    if model.HK < model.H:
        return ('mamba_ssm', calls(*mamba_ssm(leaves), do)) if options.mamba else None
    return ('fla chunk', calls(fla()[0].fn, leaves, do)) if options.fla else None


def add_options(parser: argparse.ArgumentParser) -> None:
    names = [model.name for model in MODELS]
    parser.add_argument('--model', choices=names, action='append', metavar='NAME', help=f'default: {", ".join(names)}')
    parser.add_argument('--mamba', action='store_true', help='mamba_ssm too')
    parser.add_argument('--fla', action='store_true', help="fla-core's chunk too")
    add_report_options(parser)


def main(options: argparse.Namespace) -> None:
    models = [model for model in MODELS if model.name in (options.model or [model.name])]
    report = Report(options, COLUMNS, len(models) * (1 + (options.mamba or options.fla)))
    failures = 0
    for model in models:
        leaves, do = inputs(model)
        forward_limit, both_limit = model.limits(report.bandwidth)
        row = {'model': model.name} | {x: getattr(model, x) for x in ('B', 'T', 'H', 'HK', 'K', 'V', 'gamma')}
        row |= {'forward_limit_ms': forward_limit, 'both_limit_ms': both_limit}
        try:
            forward, both = calls(fla_simple_gla.chunk_simple_gla, leaves, do)
            error = worst_error(model, both(), leaves, do)
            report.row(**row, implementation='chunk', **measure(forward, both), error=error)
        except Exception as problem:
            report.failed(model.name, problem)
            failures += 1
        try:
            peer = peer_of(model, leaves, do, options)
            if peer is not None:
                report.row(**row, implementation=peer[0], **measure(*peer[1]))
        except Exception as problem:
            report.failed(f'{model.name} by the peer', problem)
        del leaves, do
    report.close()
    if failures:
        sys.exit(f'{failures} rows of this library failed')
