"""Time training steps of a Mamba-2 model of transformers, patched by `fla_simple_gla.adapters` and as it is.

The model is a `Mamba2ForCausalLM` of two layers as wide as those of mamba2-2.7b (width 2,560, 80 heads of 64 channels,
128 numbers of state to a channel, one group), with a vocabulary of 1,024, so that the head takes little time. A step is
forward, loss, backward and AdamW (fused), on one batch of random tokens. The parameters are in fp32, under autocast to
bf16. Nothing is compiled. A row is a shape, a function and an implementation. The columns:

- function: what a layer calls. `split` is `mamba_split_conv1d_scan_combined`, with convolution, norm and output
  projection, which a model in training calls. `scan` is `mamba_chunk_scan_combined`, which the same model calls in
  evaluation mode, here with gradients: convolution, norm and projection are then those of transformers.
- implementation: what has run. The model as it is calls mamba_ssm where that can be imported, and its split needs the
  package causal_conv1d: without that the row fails. Elsewhere the model computes in PyTorch, which has no split, and
  takes so much memory that the row of a long text fails: give a shorter --length too.
- ms: of a step, the median of `do_bench`, where the host may be the bound.
- ratio: the time with the same function, patched, over this one.
- losses: those of the first and of the last of 20 steps. All rows begin with the same parameters.
- difference: the largest relative difference of the losses of these steps to those of the first row of the shape.
- MiB: the peak memory of a step beyond the parameters and what AdamW keeps, with the gradients.

With --decode a row is a batch and an implementation that generates, with a cache, after a prompt of 64 tokens. The
parameters are in bf16. A layer calls `selective_state_update`. The columns:

- eager: microseconds to a token, the median of `do_bench`: both layers, the head, and the choice of the next token. The
  host is the bound for small batches.
- device: the same from a CUDA graph.
- ratio: as above, from CUDA graphs.
- difference: the relative RMS difference of the logits of 16 given tokens to those of the patched model.
"""

import argparse
import contextlib
import copy
import gc
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fla_simple_gla.adapters import _patch, patch

from .measuring import Column, Report, add_report_options, median
from .models import IMPLEMENTATION, number

VOCABULARY, LAYERS = 1024, 2
STEPS = 20  # whose losses are compared
PROMPT, GIVEN = 64, 16  # tokens
FUNCTIONS = {
    'split': 'mamba_split_conv1d_scan_combined',
    'scan': 'mamba_chunk_scan_combined',
    'step': 'selective_state_update',
}
MODULE = 'transformers.models.mamba2.modeling_mamba2'

RATIO = Column('ratio', 5, number('ratio', '.2f'))
DIFFERENCE = Column('difference', 10, number('difference', '.1e'))
COLUMNS = [
    Column('shape', 12, lambda row: 'B{B} T{T}'.format(**row), True),
    Column('function', 8, lambda row: row['function'], True),
    IMPLEMENTATION,
    Column('ms', 8, number('step_ms', '.2f')),
    RATIO,
    Column('losses', 16, lambda row: f'{row["first_loss"]:.3f} to {row["last_loss"]:.3f}', True),
    DIFFERENCE,
    Column('MiB', 7, number('memory_mib', '.0f')),
]
DECODE_COLUMNS = [
    Column('batch', 5, lambda row: str(row['batch'])),
    IMPLEMENTATION,
    Column('eager', 8, number('eager_us', '.1f')),
    Column('device', 8, number('device_us', '.1f')),
    RATIO,
    DIFFERENCE,
]


def make_model(**changes: Any) -> torch.nn.Module:
    """The model in fp32 on the CPU, with the same parameters each time. `changes` are options of its configuration."""
    import transformers

    torch.manual_seed(0)
    options = dict(
        hidden_size=2560, expand=2, head_dim=64, num_heads=80, state_size=128, n_groups=1, conv_kernel=4,
        vocab_size=VOCABULARY, num_hidden_layers=LAYERS, initializer_range=0.02,
    )  # fmt: skip
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**options | changes))


@contextlib.contextmanager
def transformers_is(patched: bool) -> Iterator[None]:
    """transformers is patched, or as it is."""
    if not patched:
        yield
        return
    with patch('transformers') as report:
        if report.skipped:
            raise RuntimeError(report.skipped['transformers'])
        yield


def implementation_of(function: str) -> str:
    """What the model calls now: the package, and PyTorch where it is transformers itself."""
    for module, wrapper in _patch.wrappers():
        if module == MODULE and wrapper.name == FUNCTIONS[function]:
            package = wrapper.get().implementation.__module__.split('.')[0]
            return 'PyTorch' if package == 'transformers' else package
    raise RuntimeError(f'{MODULE} has no {FUNCTIONS[function]} that can be patched')


def make_step(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A training step that returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def step() -> torch.Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """The losses of the first steps, the milliseconds of a step, and the MiB that one adds."""
    step = make_step(model, ids)
    losses = torch.stack([step() for _ in range(STEPS)])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    return losses, median(step, warmup=100, rep=500), mib


class Decoder:
    """A model that has read a prompt."""

    def __init__(self, model: torch.nn.Module, prompt: torch.Tensor):
        self.model = model
        # newer versions of transformers have renamed it
        names = inspect.signature(type(model).forward).parameters
        self.name = 'cache' if 'cache' in names else 'cache_params'
        self.cache = getattr(model(input_ids=prompt, use_cache=True), self.name)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Those after one more token for each sequence, `[N, 1]`."""
        return self.model(input_ids=tokens, use_cache=True, **{self.name: self.cache}).logits[:, -1]

    def make_step(self, tokens: torch.Tensor) -> Callable[[], None]:
        """A step of generation: the next tokens take the place of these."""

        def step() -> None:
            tokens.copy_(self.logits(tokens).argmax(-1, keepdim=True))

        return step


def measure_decoding(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, float, float | None]:
    """The logits of given tokens, and the microseconds to a token: eager, and from a CUDA graph if there can be one."""
    from triton.testing import do_bench_cudagraph

    decoder = Decoder(model, ids[:, :PROMPT])
    logits = torch.stack([decoder.logits(ids[:, i : i + 1]) for i in range(PROMPT, PROMPT + GIVEN)])
    step = decoder.make_step(ids[:, -1:].clone())
    eager_us = median(step, warmup=100, rep=300) * 1e3
    try:
        device_us = do_bench_cudagraph(step, rep=50, return_mode='median') * 1e3
    except Exception:  # something in the model cannot be captured
        device_us = None
    return logits, eager_us, device_us


def release() -> None:
    """Free the memory of the row before, which may have failed."""
    gc.collect()
    torch.cuda.empty_cache()


def training_rows(shape: tuple[int, int], report: Report, versions: dict[str, str]) -> int:
    """The rows of training steps with a shape. Returns how many of this library's failed."""
    B, T = shape
    base = make_model()
    ids = torch.randint(VOCABULARY, shape).to('cuda')
    expected, failures = None, 0
    for function in ('split', 'scan'):
        ours_ms = None
        for patched in (True, False):
            model = None
            release()
            try:
                with transformers_is(patched):
                    name = implementation_of(function)
                    if (function, name) == ('split', 'PyTorch'):
                        report.skip()
                        continue
                    model = copy.deepcopy(base).to('cuda').train(function == 'split')
                    losses, ms, mib = measure(model, ids)
                report.row(
                    B=B, T=T, layers=LAYERS, **versions, function=function, implementation=name, step_ms=ms,
                    ratio=None if ours_ms is None else ours_ms / ms,
                    first_loss=losses[0].item(), last_loss=losses[-1].item(),
                    difference=None if expected is None else ((losses - expected).abs() / expected).max().item(),
                    memory_mib=mib,
                )  # fmt: skip
                if patched:
                    ours_ms = ms
                    expected = losses if expected is None else expected
            except Exception as problem:
                report.failed(described(f'B{B} T{T}, {function}', patched), problem)
                failures += patched
    return failures


@torch.no_grad()
def decoding_rows(N: int, report: Report, versions: dict[str, str]) -> int:
    """The rows of decoding with a batch. Returns how many of this library's failed."""
    base = make_model().bfloat16().eval()
    ids = torch.randint(VOCABULARY, (N, PROMPT + GIVEN)).to('cuda')
    expected, ours_us, failures = None, None, 0
    for patched in (True, False):
        release()
        try:
            with transformers_is(patched):
                name = implementation_of('step')
                logits, eager_us, device_us = measure_decoding(copy.deepcopy(base).to('cuda'), ids)
            report.row(
                batch=N, layers=LAYERS, **versions, function='step', implementation=name,
                eager_us=eager_us, device_us=device_us,
                ratio=None if None in (ours_us, device_us) else ours_us / device_us,
                difference=None if expected is None else ((logits - expected).norm() / expected.norm()).item(),
            )  # fmt: skip
            if patched:
                ours_us, expected = device_us, logits
        except Exception as problem:
            report.failed(described(f'batch {N}', patched), problem)
            failures += patched
    return failures


def described(row: str, patched: bool) -> str:
    return f'{row}, {"patched" if patched else "as it is"}'


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--batch', type=int, action='append', metavar='B', help='default: 4; with --decode 1 and 64')
    parser.add_argument('--length', type=int, action='append', metavar='T', help='default: 2048')
    parser.add_argument('--decode', action='store_true', help='generation, in place of training steps')
    add_report_options(parser)


def main(options: argparse.Namespace) -> None:
    try:
        import transformers
    except ImportError as error:
        sys.exit(f'needs transformers: {error}')
    versions = {'transformers': transformers.__version__}
    if options.decode:
        todo = options.batch or [1, 64]
        columns, rows, count = DECODE_COLUMNS, decoding_rows, 2
    else:
        todo = [(B, T) for B in options.batch or [4] for T in options.length or [2048]]
        columns, rows, count = COLUMNS, training_rows, 4
    report = Report(options, columns, len(todo) * count)
    failures = sum(rows(x, report, versions) for x in todo)
    report.close()
    if failures:
        sys.exit(f'{failures} rows of this library failed')
