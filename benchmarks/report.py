"""Make the tables and pictures of README.md and docs/ from the result files below benchmarks/results.

A table stands between two comments of a Markdown file, `<!-- table: NAME -->` and `<!-- end of table -->`, and what is
there is replaced. Pictures go to docs/figures; they need matplotlib, and carry a digest of the files that they show.
With --check nothing is written: what differs is listed, and the exit status is 1 if anything does.

The result files, each with the command that made it in its first line:

    python -m benchmarks run --out benchmarks/results/h200/run.jsonl

and so on for models, peers, plain, shapes, decode, host, compiled, training and accuracy; a folder for each card. Three
more files are scan, step and generation: of `models --whole`, `models --step` and `training --decode`.
"""

import argparse
import functools
import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from .measuring import ROOT, dims_label, label
from .training import FUNCTIONS

FOLDER = ROOT / 'benchmarks' / 'results'
FIGURES = ROOT / 'docs' / 'figures'
BLOCK = re.compile(r'(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end of table -->)', re.DOTALL)
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')])
    if BLOCK.search(path.read_text())
]

HEADLINE = (8, 8192, 16, 128)
CARDS = ('h200', 'h100')
NAMES = {
    'chunk': '`chunk_simple_gla`',
    'fused_chunk': '`fused_chunk_simple_gla`',
    'parallel': '`parallel_simple_gla`',
    'fla chunk': 'fla-core 0.6.0 `chunk_simple_gla`',
    'fla fused_chunk': 'fla-core 0.6.0 `fused_chunk_simple_gla`',
    'cuDNN attention': 'cuDNN causal attention',
    'flash attention': 'FlashAttention-2 of PyTorch',
    'nothing': 'PyTorch alone',
    'fla_simple_gla': 'this library',
    'mamba_ssm': 'mamba_ssm 2.3.2, its kernels in Triton',
    'PyTorch': "transformers' own code in PyTorch",
}
PEERS = {'mamba_ssm': 'mamba_ssm', 'fla chunk': 'fla-core'}  # of `models`
IN_CHINESE = NAMES | {'cuDNN attention': 'cuDNN 因果注意力'}


class Results(NamedTuple):
    """A result file."""

    machine: dict[str, Any]
    rows: list[dict[str, Any]]

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        return [row for row in self.rows if all(row.get(name) == value for name, value in wanted.items())]


class Files(dict):
    """Result files by card and name, as `h200/run`, read when they are asked for."""

    def __missing__(self, name: str) -> Results:
        first, *rest = [json.loads(line) for line in path_of(name).read_text().splitlines()]
        self[name] = Results(first, rest)
        return self[name]


def path_of(name: str) -> pathlib.Path:
    return FOLDER / f'{name}.jsonl'


def has(name: str) -> bool:
    return path_of(name).exists()


def digits(x: float) -> str:
    """Three significant digits, without an exponent."""
    for places, limit in ((4, 0.01), (3, 1), (2, 10), (1, 100)):
        if x < limit:
            return f'{x:.{places}f}'
    return f'{x:,.0f}'


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ['---', *['---:'] * (len(headings) - 1)], *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def gpu(results: Results) -> str:
    """H200 and so on."""
    return next(word for word in results.machine['gpu'].split() if word[0] in 'HAB' and word[1:].isdigit())


# Tables


def headline_rows(results: Results) -> dict[str, dict]:
    return {row['implementation']: row for row in results.find(**dict(zip('BTHD', HEADLINE)))}


def headline(files: Files) -> str:
    rows = headline_rows(files['h200/peers'])
    text = headline_table(rows, NAMES, ['one H200, ms', 'forward', 'forward + backward', 'memory added, MiB'])
    ours, fla, attention = (rows[x]['both_ms'] for x in ('chunk', 'fla chunk', 'cuDNN attention'))
    return (
        f'{text}\n\n{label(HEADLINE)} (sequences, tokens, heads, dim), bf16, a gate per token. Forward and backward '
        f'are {fla / ours:.1f} times\nas fast as those of fla-core, and {attention / ours:.1f} times as fast as '
        f'attention. To move the bytes alone takes {digits(rows["chunk"]["forward_floor_ms"])} and\n'
        f'{digits(rows["chunk"]["both_floor_ms"])} ms. Other shapes and GPUs: [Performance](docs/performance.md).'
    )


def headline_in_chinese(files: Files) -> str:
    rows = headline_rows(files['h200/peers'])
    text = headline_table(rows, IN_CHINESE, ['单张 H200，毫秒', '前向', '前向 + 反向', '额外显存，MiB'])
    ours, fla, attention = (rows[x]['both_ms'] for x in ('chunk', 'fla chunk', 'cuDNN attention'))
    return (
        f'{text}\n\n{label(HEADLINE)}（批大小、长度、头数、维度），bf16，逐 token 门控。前向加反向的速度是 fla-core 的 '
        f'{fla / ours:.1f} 倍、注意力的 {attention / ours:.1f} 倍；\n仅搬运必需的数据就要 '
        f'{digits(rows["chunk"]["forward_floor_ms"])} 和 {digits(rows["chunk"]["both_floor_ms"])} 毫秒。'
    )


def headline_table(rows: dict[str, dict], names: dict[str, str], headings: list[str]) -> str:
    shown = ('chunk', 'fla chunk', 'cuDNN attention')
    cells = [
        [names[x], digits(rows[x]['forward_ms']), digits(rows[x]['both_ms']), f'{rows[x]["memory_mib"]:,.0f}']
        for x in shown
    ]
    return markdown(headings, cells)


def layers(headings: list[str], files: Files) -> str:
    """Forward and backward of layers of models, beside the peer of each, without rows that have dims for a name."""
    cells = []
    for row, others in models_and_peers(files['h200/models'], 'chunk'):
        for other in others if not row['model'].startswith('K ') else []:
            times = [digits(row['both_ms']), f'{digits(other["both_ms"])} ({PEERS[other["implementation"]]})']
            times.append(f'{other["both_ms"] / row["both_ms"]:.1f}')
            memory = [f'{x["memory_mib"]:,.0f}' for x in (row, other)]
            cells.append([f'{row["model"]}: {dims_label(row)}', *times, *memory])
    return markdown(headings, cells)


def models_and_peers(results: Results, name: str) -> list[tuple[dict, list[dict]]]:
    """The rows of this library, which have that name there, each with those of its peers."""
    return [
        (row, [x for x in results.find(model=row['model']) if x['implementation'] in PEERS])
        for row in results.find(implementation=name)
    ]


def speed(card: str, files: Files) -> str:
    """All shapes: chunk with its floors, fused_chunk and parallel."""
    results = files[f'{card}/run']

    def pair(row: dict) -> str:
        times = [digits(row[f'{x}_ms']) + ('*' if row[f'{x}_in_graph'] else '') for x in ('forward', 'both')]
        return ' / '.join(times)

    cells = []
    for row in results.find(implementation='chunk'):
        shape = {x: row[x] for x in 'BTHD'}
        others = [results.find(implementation=name, **shape) for name in ('fused_chunk', 'parallel')]
        floors = f'{digits(row["forward_floor_ms"])} / {digits(row["both_floor_ms"])}'
        shares = [row[f'{x}_floor_ms'] / row[f'{x}_ms'] for x in ('forward', 'both')]
        cells.append(
            [label(shape.values()), pair(row), floors, ' / '.join(f'{x:.0%}' for x in shares)]
            + [f'{row["memory_mib"]:,.0f}', *(pair(x[0]) if x else '' for x in others)]
        )
    headings = ['shape', '`chunk`', 'floor', 'share', 'memory added, MiB', '`fused_chunk`', '`parallel`']
    return markdown(headings, cells) + source(results)


def peers(card: str, files: Files) -> str:
    results = files[f'{card}/peers']
    rows = headline_rows(results)
    cells = []
    for name, row in rows.items():
        if row.get('both_ms') is not None:
            ratio = row['both_ms'] / rows['chunk']['both_ms']
            times = [digits(row['forward_ms']), digits(row['both_ms']), f'{ratio:.2f}']
            note = f' ({row["note"]})' if row['note'] else ''
            cells.append([NAMES[name] + note, *times, f'{row["memory_mib"]:,.0f}'])
    headings = [label(HEADLINE), 'forward', 'forward + backward', 'to `chunk`', 'memory added, MiB']
    return markdown(headings, cells) + source(results)


def plain(card: str, files: Files) -> str:
    on, off = files[f'{card}/run'], files[f'{card}/plain']
    cells = []
    for row in off.find(implementation='chunk'):
        shape = {x: row[x] for x in 'BTHD'}
        (fast,) = on.find(implementation='chunk', **shape)
        cells.append([label(shape.values())] + [digits(x[y]) for y in ('forward_ms', 'both_ms') for x in (fast, row)])
    headings = ['shape', 'forward, for Hopper', 'plain', 'forward + backward, for Hopper', 'plain']
    return markdown(headings, cells) + source(off)


def decode(card: str, files: Files) -> str:
    """Microseconds of a step, a column for a batch."""
    results = files[f'{card}/decode']
    steps = sorted({(row['tokens'], row['batch']) for row in results.rows})
    names = list(dict.fromkeys(row['states'] for row in results.rows))
    cells = []
    for name in names:
        found = [results.find(states=name, tokens=T, batch=N) for T, N in steps]
        shown = {'fla, new states': 'fla-core 0.6.0, which returns new states'}.get(name, f'pool in {name}')
        cells.append([shown, *(digits(row[0]['device_us']) if row else '' for row in found)])
    floors = [results.find(states=names[0], tokens=T, batch=N)[0]['floor_us'] for T, N in steps]
    cells.append(['floor, fp32', *map(digits, floors)])
    headings = ['microseconds'] + [f'batch {N}' + (f', {T} tokens' if T > 1 else '') for T, N in steps]
    return markdown(headings, cells) + source(results)


def host(card: str, files: Files) -> str:
    results = files[f'{card}/host']
    known = [row for row in results.rows if row['one_thread_us'] is not None]
    cells = []
    for row in known:
        new = [x for x in results.find(implementation=row['implementation']) if x['one_thread_us'] is None]
        times = [row['forward_us'], row['both_us'], row['one_thread_us']]
        times += [new[0]['forward_us'], new[0]['both_us']] if new else [None, None]
        name = NAMES[row['implementation']]
        cells.append([name, *('' if x is None else f'{x:,.0f}' for x in times)])
    headings = ['microseconds', 'forward', 'forward + backward', 'the same in one thread']
    headings += ['new length, forward', 'forward + backward']
    return markdown(headings, cells) + source(results)


def compiled(card: str, files: Files) -> str:
    results = files[f'{card}/compiled']
    cells = [
        [label(row[x] for x in 'BTHD'), *(digits(row[f'{x}_ms']) for x in ('eager', 'compiled', 'graphs'))]
        + [f'{row["difference"]:.0e}']
        for row in results.rows
    ]
    headings = ['ms for a step', 'eager', 'compiled', "`mode='reduce-overhead'`", 'difference of losses']
    return markdown(headings, cells) + source(results)


def accuracy(files: Files) -> str:
    """The worst error over lengths, gate memories and cards."""
    cards = [files[f'{card}/accuracy'] for card in CARDS]
    columns = {'o': ['o'], 'final state': ['ht'], 'dq, dk, dv': ['dq', 'dk', 'dv'], 'dg': ['dg'], 'dh0': ['dh0']}
    groups: dict[tuple, list[dict]] = {}
    for row in sorted((row for card in cards for row in card.rows), key=lambda row: dims_of(row) or ''):
        groups.setdefault((row['mode'], row['dtype'], dims_of(row)), []).append(row)
    modes = list(dict.fromkeys(row['mode'] for row in cards[0].rows))
    cells = []
    for (mode, dtype, dims), rows in sorted(groups.items(), key=lambda group: modes.index(group[0][0])):
        worst = [[row['error'] for row in rows if row['result'] in names] for names in columns.values()]
        name = f'`{mode}`, {dtype}' + (f', {dims}' if dims else '')
        cells.append([name, *(f'{max(x):.1e}' if x else '-' for x in worst)])
    return markdown(['relative RMS error', *columns], cells) + ''.join(map(source, cards))


def dims_of(row: dict) -> str | None:
    """The dims of a row of `accuracy` in words, if they are not 128 with as many heads of q as of v."""
    dims = tuple(row.get(name, default) for name, default in (('K', 128), ('V', 128), ('HK', 8)))
    if dims == (128, 128, 8):
        return None
    return 'K {} V {}'.format(*dims) + (', heads share q and k' if dims[2] < 8 else '')


def models(card: str, files: Files, file: str = 'models', name: str = 'chunk') -> str:
    """The dims of models, beside what others take."""
    results = files[f'{card}/{file}']
    cells = []
    for row, others in models_and_peers(results, name):
        cell = [f'{row["model"]}: {dims_label(row)}']
        for x in ('forward', 'both'):
            ms, limit = row[f'{x}_ms'], row[f'{x}_limit_ms']
            cell += [digits(ms), f'{digits(limit)} ({limit / ms:.0%})']
            cell.append(''.join(f'{digits(y[f"{x}_ms"])} ({PEERS[y["implementation"]]})' for y in others))
        memory = [f'{y["memory_mib"]:,.0f}' for y in (row, *others)]
        cells.append([*cell, ' / '.join(memory), f'{row["error"]:.1e}'])
    headings = ['model', 'forward', 'limit', 'peer', 'forward + backward', 'limit', 'peer', 'MiB / peer', 'error']
    return markdown(headings, cells) + source(results)


def scan(card: str, files: Files) -> str:
    """The scan of Mamba-2 at the dims of models."""
    return models(card, files, 'scan', 'fla_simple_gla')


def step(card: str, files: Files) -> str:
    """Microseconds of a step of Mamba-2, a column for a batch and an implementation."""
    results = files[f'{card}/step']
    batches = sorted({row['batch'] for row in results.rows})
    cells = []
    for model, states in dict.fromkeys((row['model'], row['states']) for row in results.rows):
        found = results.find(model=model, states=states)
        by_batch = {(row['batch'], row['implementation']): row for row in found}
        cell = ['{model}: H{H} HK{HK} K{K} V{V}, states in {states}'.format(**found[0])]
        for N in batches:
            ours, theirs = (by_batch.get((N, x)) for x in ('fla_simple_gla', 'mamba_ssm'))
            share = '' if ours is None else f' ({ours["floor_us"] / ours["device_us"]:.0%})'
            cell += ['' if x is None else digits(x['device_us']) + more for x, more in ((ours, share), (theirs, ''))]
        cells.append(cell)
    headings = [x for N in batches for x in (f'batch {N} (share)', 'mamba_ssm')]
    return markdown(['microseconds', *headings], cells) + source(results)


def training(card: str, files: Files) -> str:
    results = files[f'{card}/training']
    cells = []
    for row in results.rows:
        name = f'`{FUNCTIONS[row["function"]]}`, {NAMES[row["implementation"]]}'
        difference = '-' if row['difference'] is None else f'{row["difference"]:.0e}'
        cells.append([name, digits(row['step_ms']), f'{row["memory_mib"]:,.0f}', difference])
    sizes = 'B{B} T{T}, {layers} layers; transformers {transformers}'.format(**results.rows[0])
    return markdown([sizes, 'ms', 'MiB', 'difference of losses'], cells) + source(results)


def generation(card: str, files: Files) -> str:
    results = files[f'{card}/generation']
    cells = []
    for row in results.rows:
        times = ['-' if row[x] is None else digits(row[x]) for x in ('eager_us', 'device_us')]
        cells.append([f'batch {row["batch"]}, {NAMES[row["implementation"]]}', *times])
    sizes = '{layers} layers; transformers {transformers}'.format(**results.rows[0])
    return markdown([sizes, 'µs to a token, eager', 'on the GPU alone'], cells) + source(results)


def source(results: Results) -> str:
    """The command, and what it ran on."""
    m = results.machine
    settings = ''.join(f'{name}={value} ' for name, value in m.items() if name.isupper())
    versions = f'torch {m["torch"]}, triton {m["triton"]}, driver {m["driver"]}'
    place = f'{m["gpu"]}, copy {m["copy_tb_per_s"]:.2f} TB/s, {versions}; commit {m["commit"]}, {m["date"]}.'
    return f'\n\n`{settings}{m["command"]}`\n\n{place}'


TABLES: dict[str, Callable[[Files], str]] = {
    'headline': headline,
    'headline-zh': headline_in_chinese,
    'layers': functools.partial(layers, ['one H200, ms', 'here', 'peer', 'times as fast', 'memory added, MiB', 'peer']),
    'layers-zh': functools.partial(layers, ['单张 H200，毫秒', '本库', '对照', '倍数', '额外显存，MiB', '对照']),
    'accuracy': accuracy,
}
for _card in CARDS:
    for _table in (speed, models, peers, plain, decode, host, compiled, scan, step, training, generation):
        TABLES[f'{_table.__name__}-{_card}'] = lambda files, table=_table, card=_card: table(card, files)


def filled(text: str, files: Files) -> str:
    """A page with the tables of the result files."""
    return BLOCK.sub(lambda found: f'{found[1]}{TABLES[found[2]](files)}\n{found[4]}', text)


# Pictures


class Picture(NamedTuple):
    """What `pictures.py` draws into docs/figures, and the result files that it shows."""

    name: str
    what: str
    files: tuple[str, ...]
    dark: bool = False

    def path(self) -> pathlib.Path:
        return FIGURES / f'{self.name}.svg'

    def digest(self) -> str:
        found = hashlib.sha256()
        for name in self.files:
            found.update(path_of(name).read_bytes())
        return found.hexdigest()


PICTURES = [
    Picture('speed-h200-light', 'lengths', ('h200/shapes',)),
    Picture('speed-h200-dark', 'lengths', ('h200/shapes',), dark=True),
    Picture('speed-h100', 'lengths', ('h100/shapes',)),
    Picture('dims-h200', 'dims', ('h200/shapes',)),
    Picture('dims-h100', 'dims', ('h100/shapes',)),
    Picture('decode-h200', 'decode', ('h200/decode',)),
    Picture('decode-h100', 'decode', ('h100/decode',)),
    Picture('accuracy-h200', 'accuracy', ('h200/accuracy',)),
]


def stale_pictures() -> list[str]:
    """The pictures that do not show the result files as they are."""
    return [
        picture.name
        for picture in PICTURES
        if not picture.path().exists() or picture.digest() not in picture.path().read_text()
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--check', action='store_true', help='write nothing; say what differs')


def main(options: argparse.Namespace) -> None:
    files = Files()
    different = []
    for name in PAGES:
        text = (ROOT / name).read_text()
        new = filled(text, files)
        if new != text:
            different.append(name)
            if not options.check:
                (ROOT / name).write_text(new)
    stale = stale_pictures()
    if stale and not options.check:
        from . import pictures  # needs matplotlib

        for picture in PICTURES:
            if picture.name in stale:
                pictures.draw(picture, files)
    for name in different + stale:
        print(name, 'differs from the result files' if options.check else 'written')
    if options.check and different + stale:
        sys.exit(1)
