"""Time the modes on a GPU, beside fla-core and PyTorch's attention: one row for a shape and an implementation.

    python benchmarks/run.py [--shape B T H D]... [--mode MODE]... [--memory TOKENS] [--fla] [--attention]
                             [--skip-first-call]

The inputs are in bf16 with the gate `g = logsigmoid(normal + log(memory))`, and K = V = D. Some kernels skip what has
decayed to zero: with a memory as long as the sequence there is nothing to skip. The columns:

- fwd, fwd+bwd: milliseconds of the forward, and of forward and backward together, the medians of
  `triton.testing.do_bench`.
- floor: the time that the bytes take at the bandwidth of a large copy, measured in the same run. The bytes are those
  that have to move: in the forward 4 passes over a tensor (q, k, v read and o written once), with the backward 11 (it
  reads q, k, v, do and writes dq, dk, dv).
- share: the floor over the time; 100% is the least time that is possible.
- host: milliseconds that a call keeps the CPU. Where the kernels take less than that, the medians show this time.
- MiB: the peak memory of a forward and backward beyond the inputs. o and the gradients of q, k, v are included;
  together they are 4 passes.
- error: the worst relative RMS error of o, dq, dk, dv, dg against naive in fp64, on two heads of the last sequence of
  the inputs that are timed. Attention computes something else, and has none.

The rows of fla tune themselves first, which takes up to minutes for each shape: choose a few with --shape.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import fla_simple_gla

# B, T, H, D
SHAPES = [
    (1, 8192, 96, 128),
    (2, 16384, 16, 128),
    (4, 2048, 16, 128),
    (4, 4096, 64, 128),
    (8, 2048, 32, 256),
    (8, 1024, 8, 64),
    (1, 131072, 8, 128),
    (1, 1000000, 4, 64),
]
FIRST_CALL_SHAPE = (1, 131072, 8, 128)
MEMORY = 20.0  # tokens
MODES = ('chunk', 'fused_chunk', 'parallel')
FORWARD_PASSES, BOTH_PASSES = 4, 11

HEADINGS = (
    'shape', 'implementation',
    'fwd', 'floor', 'share', 'fwd+bwd', 'floor', 'share',
    'host fwd', 'fwd+bwd', 'MiB', 'error',
)  # fmt: skip
WIDTHS = (22, 24, 8, 7, 6, 8, 7, 6, 8, 8, 6, 7)


@dataclasses.dataclass
class Implementation:
    name: str
    fn: Callable  # takes q, k, v, g; the first item that it returns is o
    note: str = ''
    is_gla: bool = True
    longest: float = math.inf  # the largest T that is timed: implementations with T^2 work are for short sequences
    context: Callable = contextlib.nullcontext  # is entered around the calls; the time of that does not count


def ours(modes=MODES) -> list[Implementation]:
    """The modes of this library."""
    longest = {'parallel': 4096}
    return [
        Implementation(mode, getattr(fla_simple_gla, f'{mode}_simple_gla'), longest=longest.get(mode, math.inf))
        for mode in modes
    ]


def fla() -> list[Implementation]:
    """fla-core's modes, which here also run with triton 3.4 to 3.7.0 on Hopper: there for timing only.

    fla-core refuses to, because these versions miscompile its backward.
    """
    try:
        import fla.ops.simple_gla as theirs

        # the refusal is an `if` in the backward of its chunk mode, which asks these flags of its module
        module = importlib.import_module('fla.ops.common.chunk_o')
        refuses = module.IS_NVIDIA_HOPPER and module.TRITON_ABOVE_3_4_0 and not module.TRITON_ABOVE_3_7_1
    except (ImportError, AttributeError) as error:
        sys.exit(f"--fla needs fla-core 0.6.0: pip install -e '.[bench]' ({short(error)})")
    if refuses:
        module.TRITON_ABOVE_3_7_1 = True
    return [
        Implementation('fla chunk', theirs.chunk_simple_gla, 'guard lifted' if refuses else ''),
        Implementation('fla fused_chunk', theirs.fused_chunk_simple_gla),
    ]


def attention() -> list[Implementation]:
    """PyTorch's causal attention, on tensors with our layout."""

    def causal(q, k, v, g):
        o = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return (o.transpose(1, 2),)

    backends = {'cuDNN': SDPBackend.CUDNN_ATTENTION, 'flash': SDPBackend.FLASH_ATTENTION}
    return [
        Implementation(
            f'{name} attention', causal, is_gla=False, longest=131072, context=functools.partial(sdpa_kernel, backend)
        )
        for name, backend in backends.items()
    ]


def require_gpu() -> None:
    if not torch.cuda.is_available():
        sys.exit('needs a CUDA GPU')


def short(error: Exception) -> str:
    """The first line of an error, cut to what fits in a row."""
    message = f'{type(error).__name__}: {error}'.splitlines()[0]
    return message if len(message) <= 100 else message[:97] + '...'


def median(fn, warmup=25, rep=100) -> float:
    """The milliseconds of a call."""
    # not at the top: without a GPU there may be no triton, and --help has to work
    from triton.testing import do_bench

    return do_bench(fn, warmup=warmup, rep=rep, return_mode='median')


def host_time(fn, repeats=50) -> float:
    """The milliseconds that a call keeps the host, the median.

    The GPU is kept busy, so that a call that waits for it shows.
    """
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**8)  # cycles, some 0.1 s
    times = [time.perf_counter()]
    for _ in range(repeats):
        fn()
        times.append(time.perf_counter())
    torch.cuda.synchronize()
    return statistics.median(end - start for start, end in zip(times, times[1:])) * 1e3


def copy_bandwidth() -> float:
    """The bytes that a copy of 2 GiB reads and writes in a second."""
    x = torch.empty(2**31, dtype=torch.int8, device='cuda')
    y = torch.empty_like(x)
    return 2 * x.numel() / median(lambda: y.copy_(x)) * 1e3


def pass_bytes(shape) -> int:
    """The bytes of one bf16 tensor."""
    return 2 * math.prod(shape)


def label(shape) -> str:
    return ' '.join(f'{name}{size}' for name, size in zip('BTHD', shape))


def print_machine(bandwidth: float) -> None:
    import triton

    versions = f'torch {torch.__version__}, triton {triton.__version__}'
    print(f'{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s, {versions}')
    hopper = os.environ.get('FLA_SIMPLE_GLA_HOPPER')
    setting = 'not set' if hopper is None else repr(hopper)
    effect = ': the Hopper kernels are turned off' if hopper == '0' else ''
    print(f'FLA_SIMPLE_GLA_HOPPER is {setting}{effect}', flush=True)


def inputs(B, T, H, D, memory=MEMORY):
    """q, k, v and g, which need gradients, and do."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(B, T, H, D, dtype=torch.bfloat16, device='cuda') for _ in range(4))
    g = torch.nn.functional.logsigmoid(torch.randn(B, T, H, device='cuda') + math.log(memory))
    return [x.requires_grad_() for x in (q, k, v, g)], do


def calls(fn, leaves, do):
    """The two calls that are timed: a forward that is ready for a backward; a forward and its backward."""

    def forward():
        return fn(*leaves)[0]

    def both():
        o = forward()
        # attention has no gate, and no gradient for it
        return o, *torch.autograd.grad(o, leaves, do, allow_unused=True)

    return forward, both


def part(x):
    """The last two heads of the last sequence."""
    return x[-1:, :, -2:]


def exact_part(leaves, do) -> list[torch.Tensor]:
    """o, dq, dk, dv, dg of `part`, in fp64. They do not depend on other sequences or heads."""
    exact_leaves = [part(x.detach()).double().requires_grad_() for x in leaves]
    _, both = calls(fla_simple_gla.naive_chunk_simple_gla, exact_leaves, part(do).double())
    return [x.detach() for x in both()]


def worst_error(found, exact) -> float:
    """The largest relative RMS error of o, dq, dk, dv and dg."""
    return max(((part(a.detach()).double() - b).norm() / b.norm()).item() for a, b in zip(found, exact))


def measure(implementation, leaves, do, exact):
    """The milliseconds of forward and forward + backward, the same two on the host, MiB, and the error or None."""
    forward, both = calls(implementation.fn, leaves, do)
    with implementation.context():
        error = worst_error(both(), exact) if implementation.is_gla else None
        times = [median(forward), median(both), host_time(forward), host_time(both)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        return *times, (torch.cuda.max_memory_allocated() - before) / 2**20, error


def line(cells) -> str:
    """A row of the table, which is Markdown too. The first two columns are text."""
    padded = [f'{cell:<{w}}' if i < 2 else f'{cell:>{w}}' for i, (cell, w) in enumerate(zip(cells, WIDTHS))]
    return '| ' + ' | '.join(padded) + ' |'


def header() -> str:
    return line(HEADINGS) + '\n' + line(['-' * w if i < 2 else '-' * (w - 1) + ':' for i, w in enumerate(WIDTHS)])


def numbers(measured, shape, bandwidth) -> list[str]:
    """The cells of a row after its first two."""
    forward, both, host_forward, host_both, memory, error = measured
    cells = []
    for ms, passes in ((forward, FORWARD_PASSES), (both, BOTH_PASSES)):
        floor = passes * pass_bytes(shape) / bandwidth * 1e3
        cells += [f'{ms:.3f}', f'{floor:.3f}', f'{floor / ms:.0%}']
    cells += [f'{host_forward:.3f}', f'{host_both:.3f}', f'{memory:.0f}']
    return [*cells, '-' if error is None else f'{error:.1e}']


def row(implementation, shape, bandwidth, measured) -> str:
    """A row of the table. `measured` is what `measure` returned, or the exception that it raised."""
    name = implementation.name + (f' ({implementation.note})' if implementation.note else '')
    first = (label(shape), name)
    if not isinstance(measured, Exception):
        return line([*first, *numbers(measured, shape, bandwidth)])
    if 'No available kernel' in str(measured) or 'No viable backend' in str(measured):
        # PyTorch's message where a backend does not take these tensors
        return line([*first, *['-'] * (len(WIDTHS) - 2)])
    return f'{line(first)} failed: {short(measured)}'


def time_first_call(name: str) -> None:
    """Print the seconds that the first forward and the first backward in this process take."""
    implementation = next(x for x in (fla() if name.startswith('fla') else ours()) if x.name == name)
    leaves, do = inputs(*FIRST_CALL_SHAPE)
    # the first backward in a process also imports parts of PyTorch, which can take seconds
    x = torch.ones(1, device='cuda', requires_grad=True)
    torch.autograd.grad(x + x, x, torch.ones_like(x))
    torch.cuda.synchronize()
    start = time.perf_counter()
    o = implementation.fn(*leaves)[0]
    torch.cuda.synchronize()
    middle = time.perf_counter()
    torch.autograd.grad(o, leaves, do)
    torch.cuda.synchronize()
    print(f'forward {middle - start:.1f} s, backward {time.perf_counter() - middle:.1f} s')


def first_call(name: str) -> str:
    """What `time_first_call` prints, in a process of its own with an empty kernel cache."""
    code = f'import run; run.time_first_call({name!r})'
    with tempfile.TemporaryDirectory() as cache:
        # the other process finds this file and the package where this one finds them
        paths = os.pathsep.join([os.path.dirname(os.path.abspath(__file__)), *filter(None, sys.path)])
        environment = os.environ | {'TRITON_CACHE_DIR': cache, 'PYTHONPATH': paths}
        child = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    # take the last line: the libraries may print before it, and a traceback ends with its error
    lines = (child.stdout if child.returncode == 0 else child.stderr or 'no message').strip().splitlines()
    return lines[-1] if child.returncode == 0 else f'failed: {lines[-1][:100]}'


def add_shape(parser: argparse.ArgumentParser, help: str, **options) -> None:
    """Add the option --shape B T H D."""
    parser.add_argument('--shape', type=int, nargs=4, metavar=('B', 'T', 'H', 'D'), help=help, **options)


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def flag(name: str, help: str) -> None:
        parser.add_argument(name, action='store_true', help=help)

    add_shape(parser, 'default: eight shapes', action='append')
    modes = 'of this library; default: all three, parallel up to T 4096'
    parser.add_argument('--mode', choices=MODES, action='append', help=modes)
    memory = 'after which a gate has decayed by about e'
    parser.add_argument('--memory', type=float, default=MEMORY, metavar='TOKENS', help=memory)
    flag('--fla', "fla-core's chunk and fused_chunk (they tune themselves: minutes)")
    flag('--attention', "PyTorch's causal attention, cuDNN and flash, up to T 131072")
    flag('--skip-first-call', 'do not time the first calls on an empty kernel cache')
    return parser.parse_args(arguments)


def main(arguments=None) -> None:
    options = parse(arguments)
    require_gpu()
    own = ours(options.mode or MODES)
    peers = (fla() if options.fla else []) + (attention() if options.attention else [])
    bandwidth = copy_bandwidth()
    print_machine(bandwidth)
    if not options.skip_first_call:
        for name in ('chunk', *(['fla chunk'] if options.fla else [])):
            print(f'first call of {name} on an empty cache, {label(FIRST_CALL_SHAPE)}: {first_call(name)}', flush=True)

    failures = 0
    print(header(), flush=True)
    for shape in map(tuple, options.shape or SHAPES):
        leaves, do = inputs(*shape, options.memory)
        exact = exact_part(leaves, do)
        for implementation in own + peers:
            if shape[1] > implementation.longest:
                continue
            try:
                measured = measure(implementation, leaves, do, exact)
            except Exception as error:
                # without its frames, which keep tensors alive
                measured = error.with_traceback(None)
                failures += implementation in own
            print(row(implementation, shape, bandwidth, measured), flush=True)
    if failures:
        sys.exit(f'{failures} rows of this library failed')


if __name__ == '__main__':
    main()
