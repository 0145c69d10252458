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

Two options time functions that the models of Mamba-2 call, in place of the operator. These are the models whose heads
share q and k, which there are C and B. v is x.

With --whole a row is `mamba_chunk_scan_combined` with softplus, dt_bias, D and z: by `fla_simple_gla.adapters`, and by
mamba_ssm with --mamba. x, dt, B, C and z are in bf16; A, D and dt_bias, one number for each head, in fp32. A is between
-16 and -1, and the step sizes are 1 / 50 to 1 / 20 on average. The backward makes the gradients of all eight. The
columns mean the same, but for these:

- limit: the bytes are those of x, dt, B, C, z and y, and in the backward those of the first five once more, of dy, and
  of dx, ddt, dB, dC and dz. The products are the operator's.
- ratio: in rows of mamba_ssm, the time of this library over its time, from CUDA graphs.
- error: the worst of y, dx, ddt, dB, dC and dz, against the formula in fp64, on the same tokens as above.

With --step a row is `selective_state_update`: one token for each sequence of a batch, with softplus, dt_bias, D and z.
A, dt, dt_bias and D are one number for each head, expanded. The columns:

- device: microseconds of a call, from CUDA graphs of many calls. The states of a small batch stay in the L2 cache, and
  it can take less than the floor.
- floor: the time of the bytes that have to move: each state read and written, the other tensors read, out written.
- share: the floor over the time.
- ratio: as above.
- host: microseconds that an eager call keeps the CPU, at a batch of one, where an eager call takes no less.
- error: the relative RMS error of out or of the states, whichever is larger, against the formula in fp64. States in
  bf16 are rounded.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import logsigmoid, silu, softplus

import fla_simple_gla
import fla_simple_gla.adapters.mamba_ssm as ours

from .implementations import fla
from .measuring import MEMORY, Column, Report, add_report_options, dims_label, host_time, median, milliseconds, share

TFLOPS = 700.0
CHUNK = 64
COMPARED = 1024  # tokens
CHUNK_OF_MAMBA = 256  # the default of its models
BATCHES = (1, 64, 256)  # of --step


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

    def scan_bytes(self) -> tuple[int, int]:
        """Of the scan of Mamba-2, all in 16 bits. Forward: x, dt, B, C, z and y.

        Backward: the first five, dy, and dx, ddt, dB, dC and dz.
        """
        tokens, groups, heads = self.B * self.T, self.HK * self.K, self.H * self.V
        return tokens * (4 * groups + 6 * heads + 2 * self.H), tokens * (8 * groups + 10 * heads + 4 * self.H)

    def limits(self, bandwidth: float, of_scan: bool = False) -> tuple[float, float]:
        """The least milliseconds of the forward, and of forward and backward."""
        heads, KV = self.B * self.T * self.H, self.K * self.V
        forward = heads * (4 * KV + 2 * CHUNK * (self.K + self.V))
        both = forward + heads * (10 * KV + 2 * CHUNK * (3 * self.K + 2 * self.V))
        first, second = self.scan_bytes() if of_scan else (self.forward_bytes(), self.backward_bytes())
        sizes = first, first + second
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


def number(name: str, form: str) -> Callable[[dict], str]:
    """What shows a number in a column."""
    return lambda row: '-' if row.get(name) is None else format(row[name], form)


MODEL = Column('model', 24, lambda row: row['model'], True)
IMPLEMENTATION = Column('implementation', 14, lambda row: row['implementation'], True)
ERROR = Column('error', 7, number('error', '.1e'))
FORWARD = [
    Column('fwd', 7, milliseconds('forward_ms')),
    Column('limit', 6, milliseconds('forward_limit_ms')),
    Column('share', 5, share('forward', 'limit')),
    Column('eager', 7, milliseconds('forward_eager_ms')),
]
BOTH = [
    Column('fwd+bwd', 7, milliseconds('both_ms')),
    Column('limit', 6, milliseconds('both_limit_ms')),
    Column('share', 5, share('both', 'limit')),
    Column('eager', 7, milliseconds('both_eager_ms')),
]
LAYER = [MODEL, Column('shape', 32, dims_label, True), IMPLEMENTATION]
MEMORY_AND_ERROR = [Column('MiB', 6, number('memory_mib', '.0f')), ERROR]
COLUMNS = [*LAYER, *FORWARD, *BOTH, *MEMORY_AND_ERROR]
SCAN_COLUMNS = [
    *LAYER,
    *FORWARD,
    Column('ratio', 5, number('forward_ratio', '.2f')),
    *BOTH,
    Column('ratio', 5, number('both_ratio', '.2f')),
    *MEMORY_AND_ERROR,
]
STEP_COLUMNS = [
    MODEL,
    Column('shape', 20, lambda row: 'H{H} HK{HK} K{K} V{V}'.format(**row), True),
    Column('batch', 5, lambda row: str(row['batch'])),
    Column('states', 8, lambda row: row['states'], True),
    IMPLEMENTATION,
    Column('device', 8, number('device_us', '.2f')),
    Column('floor', 8, number('floor_us', '.2f')),
    Column('share', 5, lambda row: f'{row["floor_us"] / row["device_us"]:.0%}'),
    Column('ratio', 5, number('ratio', '.2f')),
    Column('host', 6, number('host_us', '.1f')),
    ERROR,
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
        found['g'] = logsigmoid(normal(B, T, H, dtype=torch.float32) + math.log(MEMORY))
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


def scan_inputs(model: Model, device: str = 'cuda') -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the scan of a layer computes from, as leaves, by the names of `mamba_chunk_scan_combined`; and dy."""
    torch.manual_seed(0)
    _, B, T, H, HK, K, V, _ = model

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    found = {
        'x': normal(B, T, H, V),
        'dt': normal(B, T, H),
        'A': -1 - 15 * torch.rand(H, device=device),
        'B': normal(B, T, HK, K),
        'C': normal(B, T, HK, K),
        'D': torch.randn(H, device=device),
        'z': normal(B, T, H, V),
        # exp(normal) is exp(1 / 2) on average
        'dt_bias': -math.log(MEMORY) - 0.5 - torch.rand(H, device=device),
    }
    return {name: x.requires_grad_() for name, x in found.items()}, normal(B, T, H, V)


def naive_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    dt_bias: torch.Tensor,
) -> tuple[torch.Tensor]:
    """The formula of the scan."""
    dt = softplus(dt + dt_bias)
    y, _ = fla_simple_gla.naive_chunk_simple_gla(C, B, dt[..., None] * x, dt * A, scale=1.0)
    return ((y + D[:, None] * x) * silu(z),)


def exact_scan(leaves: dict[str, torch.Tensor], dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """y and all gradients in fp64, of the last tokens of the last sequence: what is compared, and as many before it."""
    exact_leaves = {
        name: (x.detach()[-1:, -2 * COMPARED :] if x.dim() > 1 else x.detach()).double().requires_grad_()
        for name, x in leaves.items()
    }
    _, both = calls(naive_scan, exact_leaves, dy[-1:, -2 * COMPARED :].double())
    return tuple(x.detach() for x in both())


def scan_error(found: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> float:
    """The largest relative RMS error of y and of the gradients that tokens have, on the last tokens."""
    pairs = [(a.detach()[-1, -COMPARED:], b.detach()[0, -COMPARED:]) for a, b in zip(found, exact) if a.dim() > 1]
    return max(relative_error(a, b) for a, b in pairs)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def scan_of(implementation: str) -> Callable:
    """A scan as a function of the leaves that returns a tuple."""
    if implementation == 'mamba_ssm':
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as fn
    else:
        fn = ours.mamba_chunk_scan_combined
    return lambda **leaves: (fn(**leaves, chunk_size=CHUNK_OF_MAMBA, dt_softplus=True),)


def step_inputs(
    model: Model, batch: int, dtype: torch.dtype, device: str = 'cuda'
) -> tuple[dict[str, torch.Tensor], int]:
    """What a step computes from, by the names of `selective_state_update`; and the bytes that have to move."""
    torch.manual_seed(0)
    H, HK, K, V = model.H, model.HK, model.K, model.V

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    found = {
        'state': torch.randn(batch, H, V, K, device=device).to(dtype),
        'x': normal(batch, H, V),
        'dt': normal(batch, H),
        'A': -1 - 15 * torch.rand(H, device=device),
        'B': normal(batch, HK, K),
        'C': normal(batch, HK, K),
        'D': torch.randn(H, device=device),
        'z': normal(batch, H, V),
        'dt_bias': -math.log(MEMORY) - 0.5 - torch.rand(H, device=device),
    }
    size = sum(x.nbytes for x in (*found.values(), found['state'], found['x']))  # out is as large as x
    found['dt'] = found['dt'][:, :, None].expand(batch, H, V)
    found['A'] = found['A'][:, None, None].expand(H, V, K)
    return found | {name: found[name][:, None].expand(H, V) for name in ('D', 'dt_bias')}, size


def exact_step(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """out and the states after the step in fp64."""
    state, x, dt, A, B, C, D, z, dt_bias = (y.double() for y in tensors.values())
    B, C = (y.repeat_interleave(x.shape[1] // B.shape[1], 1)[:, :, None] for y in (B, C))
    dt = softplus(dt + dt_bias)
    state = (dt[..., None] * A).exp() * state + (dt * x)[..., None] * B
    return ((state * C).sum(-1) + D * x) * silu(z), state


def step_of(implementation: str, tensors: dict[str, torch.Tensor]) -> tuple[Callable, torch.Tensor]:
    """A step that returns out, and the states that it writes: its own."""
    if implementation == 'mamba_ssm':
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update as fn
    else:
        fn = ours.selective_state_update
    state = tensors['state'].clone()
    return functools.partial(fn, **tensors | {'state': state}, dt_softplus=True), state


def measure_step(step: Callable, batch: int) -> dict[str, Any]:
    """Times. The first calls record what later ones repeat, and come before those that a graph captures."""
    from triton.testing import do_bench_cudagraph

    for _ in range(3):
        step()
    host_us = host_time(step, 200) * 1e3 if batch == 1 else None
    return {'device_us': do_bench_cudagraph(step, rep=20, return_mode='median') * 1e3, 'host_us': host_us}


def add_options(parser: argparse.ArgumentParser) -> None:
    names = [model.name for model in MODELS]
    parser.add_argument('--model', choices=names, action='append', metavar='NAME', help=f'default: {", ".join(names)}')
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--whole', action='store_true', help='the scan of Mamba-2, with softplus, dt_bias, D and z')
    what.add_argument('--step', action='store_true', help='a step of Mamba-2, for decoding')
    parser.add_argument('--mamba', action='store_true', help='mamba_ssm too')
    parser.add_argument('--fla', action='store_true', help="fla-core's chunk too, beside the operator")
    add_report_options(parser)


def shape_of(model: Model) -> dict[str, Any]:
    return {'model': model.name} | {x: getattr(model, x) for x in ('B', 'T', 'H', 'HK', 'K', 'V', 'gamma')}


def operator_rows(model: Model, options: argparse.Namespace, report: Report) -> int:
    """The rows of a model. Returns how many of this library's failed."""
    failures = 0
    leaves, do = inputs(model)
    forward_limit, both_limit = model.limits(report.bandwidth)
    row = shape_of(model) | {'forward_limit_ms': forward_limit, 'both_limit_ms': both_limit}
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
    return failures


def implementations(options: argparse.Namespace) -> list[str]:
    """Those of the functions of Mamba-2, this library's first."""
    return ['fla_simple_gla', 'mamba_ssm'] if options.mamba else ['fla_simple_gla']


def ratios(row: dict[str, Any], first: dict[str, Any] | None, names: dict[str, str]) -> dict[str, float | None]:
    """The times of the first row over those of this one, for each name of a ratio that of the time."""
    return {name: None if first is None else first[time] / row[time] for name, time in names.items()}


def scan_rows(model: Model, options: argparse.Namespace, report: Report) -> int:
    """The rows of the scan of a model. Returns how many of this library's failed."""
    leaves, dy = scan_inputs(model)
    exact = exact_scan(leaves, dy)
    forward_limit, both_limit = model.limits(report.bandwidth, of_scan=True)
    limits = {'forward_limit_ms': forward_limit, 'both_limit_ms': both_limit}
    first, failures = None, 0
    for name in implementations(options):
        try:
            forward, both = calls(scan_of(name), leaves, dy)
            error = scan_error(both(), exact)
            found = measure(forward, both)
            found |= ratios(found, first, {'forward_ratio': 'forward_ms', 'both_ratio': 'both_ms'})
            report.row(**shape_of(model), function='scan', implementation=name, **limits, **found, error=error)
            first = found if name == 'fla_simple_gla' else first
        except Exception as problem:
            report.failed(f'{model.name} by {name}', problem)
            failures += name == 'fla_simple_gla'
    return failures


@torch.no_grad()
def step_rows(model: Model, options: argparse.Namespace, report: Report) -> int:
    """The rows of the step of a model. Returns how many of this library's failed."""
    failures = 0
    for batch in BATCHES:
        for dtype in (torch.float32, torch.bfloat16):
            tensors, size = step_inputs(model, batch, dtype)
            exact = exact_step(tensors)
            row = {x: y for x, y in shape_of(model).items() if x not in ('B', 'T', 'gamma')}
            row |= {'function': 'step', 'batch': batch, 'states': str(dtype)[6:]}
            row['floor_us'] = size / report.bandwidth * 1e6
            first = None
            for name in implementations(options):
                try:
                    step, state = step_of(name, tensors)
                    error = max(map(relative_error, (step(), state), exact))
                    found = measure_step(step, batch)
                    found |= ratios(found, first, {'ratio': 'device_us'})
                    report.row(**row, implementation=name, **found, error=error)
                    first = found if name == 'fla_simple_gla' else first
                except Exception as problem:
                    report.failed(f'{model.name}, batch {batch}, {row["states"]}, by {name}', problem)
                    failures += name == 'fla_simple_gla'
    return failures


def main(options: argparse.Namespace) -> None:
    models = [model for model in MODELS if model.name in (options.model or [model.name])]
    columns, rows, count = COLUMNS, operator_rows, 1 + (options.mamba or options.fla)
    if options.whole or options.step:
        models = [model for model in models if model.HK < model.H]
        if not models:
            sys.exit('--whole and --step need a model of Mamba-2, whose heads share B and C')
        count = len(implementations(options))
        columns, rows = (SCAN_COLUMNS, scan_rows) if options.whole else (STEP_COLUMNS, step_rows)
        if options.step:
            count *= 2 * len(BATCHES)
    report = Report(options, columns, len(models) * count)
    failures = sum(rows(model, options, report) for model in models)
    report.close()
    if failures:
        sys.exit(f'{failures} rows of this library failed')
