"""What the benchmarks share: the machine, inputs, clocks, and where rows go."""

import argparse
import csv
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
MEMORY = 20.0  # tokens
FORWARD_PASSES, BOTH_PASSES = 4, 11


def require_gpu() -> None:
    if not torch.cuda.is_available():
        sys.exit('needs a CUDA GPU')


def short(error: Exception) -> str:
    """The first line of an error, cut to what fits in a row."""
    message = f'{type(error).__name__}: {error}'.splitlines()[0]
    return message if len(message) <= 100 else message[:97] + '...'


def median(fn: Callable, warmup: int = 25, rep: int = 100) -> float:
    """The milliseconds of a call."""
    # not at the top: without a GPU there may be no triton, and --help has to work
    from triton.testing import do_bench

    return do_bench(fn, warmup=warmup, rep=rep, return_mode='median')


def host_time(fn: Callable, repeats: int = 50) -> float:
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


def gpu_time(fn: Callable, host_ms: float, warmup: int = 25, rep: int = 100) -> tuple[float, bool]:
    """The milliseconds of a call on the GPU, and whether they come from a CUDA graph.

    A call that keeps the host for more than half of its time is timed in a CUDA graph of many such calls: the time of
    the host differs by a factor of two from machine to machine. In a graph, small tensors stay in the L2 cache.
    """
    from triton.testing import do_bench_cudagraph

    ms = median(fn, warmup, rep)
    if host_ms < 0.5 * ms:
        return ms, False
    return do_bench_cudagraph(fn, rep=20, return_mode='median'), True


def copy_bandwidth() -> float:
    """The bytes that a copy of 2 GiB reads and writes in a second."""
    x = torch.empty(2**31, dtype=torch.int8, device='cuda')
    y = torch.empty_like(x)
    return 2 * x.numel() / median(lambda: y.copy_(x)) * 1e3


def pass_bytes(shape: Iterable[int]) -> int:
    """The bytes of one bf16 tensor."""
    return 2 * math.prod(shape)


def label(shape: Iterable[int]) -> str:
    return ' '.join(f'{name}{size}' for name, size in zip('BTHD', shape))


def dims_label(row: dict[str, Any]) -> str:
    """The same of a row with heads of q and with K and V."""
    return 'B{B} T{T} H{H} HK{HK} K{K} V{V}'.format(**row)


def inputs(B: int, T: int, H: int, D: int, memory: float = MEMORY) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v and g, which need gradients, and do."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(B, T, H, D, dtype=torch.bfloat16, device='cuda') for _ in range(4))
    g = torch.nn.functional.logsigmoid(torch.randn(B, T, H, device='cuda') + math.log(memory))
    return [x.requires_grad_() for x in (q, k, v, g)], do


def calls(fn: Callable, leaves: list[torch.Tensor], do: torch.Tensor) -> tuple[Callable, Callable]:
    """The two calls that are timed: a forward that is ready for a backward; a forward and its backward."""

    def forward():
        return fn(*leaves)[0]

    def both():
        o = forward()
        # attention has no gate, and no gradient for it
        return o, *torch.autograd.grad(o, leaves, do, allow_unused=True)

    return forward, both


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Where and of what code the rows of a run are."""
    import triton

    found = {
        'benchmark': options.command,
        'command': command_line(),
        'commit': options.commit or commit(),
        'date': datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        'gpu': torch.cuda.get_device_name(),
        'driver': driver(),
        'torch': torch.__version__,
        'triton': triton.__version__,
        'copy_tb_per_s': round(copy_bandwidth() / 1e12, 3),
    }
    if getattr(options, 'fla', False):
        found['fla_core'] = importlib.metadata.version('fla-core')
    settings = {name: os.environ[name] for name in sorted(os.environ) if name.startswith('FLA_SIMPLE_GLA')}
    return found | settings


def command_line() -> str:
    """The command of this process, without where its rows go."""
    kept, arguments = ['python', '-m', 'benchmarks'], iter(sys.argv[1:])
    for argument in arguments:
        if argument in ('--out', '--commit'):
            next(arguments, None)
        elif not argument.startswith(('--out=', '--commit=')):
            kept.append(argument)
    return shlex.join(kept)


def commit() -> str:
    """The commit of this checkout, and whether anything but results differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(['git', '-C', ROOT, *arguments], capture_output=True, text=True, check=True).stdout

    try:
        dirty = git('status', '--porcelain', '--', ':!benchmarks/results').strip()
        return git('rev-parse', '--short=12', 'HEAD').strip() + ('-dirty' if dirty else '')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


def driver() -> str:
    command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return 'unknown'


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add --out and --commit."""
    parser.add_argument('--out', type=out_file, metavar='FILE', help='where to write the rows: FILE.jsonl or FILE.csv')
    parser.add_argument('--commit', help='of the code that is measured; default: what git says')


def out_file(text: str) -> pathlib.Path:
    path = pathlib.Path(text)
    if path.suffix not in ('.jsonl', '.csv'):
        raise argparse.ArgumentTypeError(f'must end in .jsonl or .csv, got {text!r}')
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f'there is no folder {path.parent}')
    return path


def add_shape(parser: argparse.ArgumentParser, help: str, **options: Any) -> None:
    """Add the option --shape B T H D."""
    parser.add_argument('--shape', type=int, nargs=4, metavar=('B', 'T', 'H', 'D'), help=help, **options)


class Column(NamedTuple):
    """A column of a printed table. It is aligned to the left if it is text."""

    heading: str
    width: int
    cell: Callable[[dict], str]
    is_text: bool = False


def milliseconds(name: str) -> Callable[[dict], str]:
    """What shows a time in a column."""
    return lambda row: '-' if row.get(name) is None else f'{row[name]:.3f}'


def share(of: str, least: str) -> Callable[[dict], str]:
    """What shows the share in a time of the least one that is possible, a floor or a limit."""
    return lambda row: '-' if row.get(f'{of}_ms') is None else f'{row[f"{of}_{least}_ms"] / row[f"{of}_ms"]:.0%}'


class Report:
    """The rows of a run: printed as a table in Markdown, and written to --out. A progress bar stands below the table.

    A row is a flat dict. In JSON lines the machine is the first line; in CSV it stands above the header, in lines that
    begin with `#`.
    """

    def __init__(self, options: argparse.Namespace, columns: list[Column], total: int) -> None:
        self.columns = columns
        self.machine = machine(options)
        self.bandwidth = self.machine['copy_tb_per_s'] * 1e12
        self.bar = progress_bar(total)
        self.path, self.fields = options.out, []
        for key, value in self.machine.items():
            self.say(f'{key}: {value}')
        self.table()
        if self.path is not None:
            with self.path.open('w') as file:
                if self.path.suffix == '.jsonl':
                    print(json.dumps(self.machine), file=file)
                else:
                    file.writelines(f'# {key}: {value}\n' for key, value in self.machine.items())

    def say(self, text: str) -> None:
        self.bar.write(text)

    def table(self) -> None:
        """Begin a table."""
        rule = ['-' * c.width if c.is_text else '-' * (c.width - 1) + ':' for c in self.columns]
        self.say('\n' + self._line([c.heading for c in self.columns]) + '\n' + self._line(rule))

    def row(self, **values: Any) -> None:
        self.say(self._line([c.cell(values) for c in self.columns]))
        self._write(values)
        self.bar.update()

    def failed(self, what: str, error: Exception) -> None:
        self.say(f'| {what} failed: {short(error)}')
        self.bar.update()

    def skip(self) -> None:
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
        if self.path is not None:
            print(f'rows written to {self.path}')

    def _line(self, cells: list[str]) -> str:
        padded = [f'{x:<{c.width}}' if c.is_text else f'{x:>{c.width}}' for x, c in zip(cells, self.columns)]
        return '| ' + ' | '.join(padded) + ' |'

    def _write(self, values: dict) -> None:
        if self.path is None:
            return
        rounded = {name: float(f'{x:.5g}') if isinstance(x, float) else x for name, x in values.items()}
        with self.path.open('a', newline='') as file:
            if self.path.suffix == '.jsonl':
                print(json.dumps(rounded), file=file)
            else:
                is_first = not self.fields
                self.fields = self.fields or [*rounded]
                writer = csv.DictWriter(file, self.fields, extrasaction='ignore')
                if is_first:
                    writer.writeheader()
                writer.writerow(rounded)


class NoBar:
    """Stands in for tqdm where it is not installed."""

    def write(self, text: str) -> None:
        print(text, flush=True)

    def update(self) -> None:
        pass

    def close(self) -> None:
        pass


def progress_bar(total: int) -> Any:
    """A bar on a terminal, and nothing elsewhere."""
    try:
        from tqdm import tqdm
    except ImportError:
        return NoBar()
    return tqdm(total=total, disable=None, leave=False, unit='row') if sys.stderr.isatty() else NoBar()
