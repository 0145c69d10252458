"""The pictures of docs/figures, drawn with matplotlib from result files."""

import sys
from collections.abc import Callable
from typing import NamedTuple

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError:
    sys.exit("pictures need matplotlib: pip install -e '.[bench]'")

from .report import Files, Picture, Results, dims_of, gpu
from .shapes import HEADS, PASSES


class Theme(NamedTuple):
    ground: str
    ink: str
    grid: str
    chunk: str
    fla: str
    fla_fused: str
    attention: str
    extra: str


LIGHT = Theme('#ffffff', '#1f2328', '#d8dee4', '#d1242f', '#0969da', '#54aeff', '#6e7781', '#8250df')
DARK = Theme('#0d1117', '#e6edf3', '#30363d', '#ff7b72', '#58a6ff', '#388bfd', '#8b949e', '#d2a8ff')


def legend(axes: Axes, theme: Theme, **options) -> None:
    axes.legend(facecolor=theme.ground, edgecolor=theme.grid, labelcolor=theme.ink, fontsize=8, **options)


def finish(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.ground)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.tick_params(colors=theme.ink, labelsize=8, which='both')
    for item in (axes.title, axes.xaxis.label, axes.yaxis.label):
        item.set_color(theme.ink)
        item.set_fontsize(9)
    for spine in axes.spines.values():
        spine.set_color(theme.grid)


def powers_of_two(axes: Axes, values: list[int]) -> None:
    axes.set_xscale('log', base=2)
    names = [f'{x // 2**20}M' if x >= 2**20 else f'{x // 1024}K' if x >= 1024 else str(x) for x in values]
    axes.set_xticks(values, names)
    axes.minorticks_off()


def lengths(figure: Figure, results: Results, theme: Theme) -> None:
    """Time for a token and head against the length, at as many tokens in all."""
    styles = {
        'cuDNN attention': ('cuDNN causal attention', theme.attention, 's'),
        'fla fused_chunk': ('fla-core fused_chunk', theme.fla_fused, 'v'),
        'fla chunk': ('fla-core chunk', theme.fla, '^'),
        'chunk': ('fla_simple_gla chunk', theme.chunk, 'o'),
    }
    for axes, name in zip(figure.subplots(1, 2), PASSES):
        for implementation, (title, color, marker) in styles.items():
            rows = results.find(series='lengths, D 128', implementation=implementation, **{'pass': name}, H=HEADS)
            rows = sorted((row for row in rows if row['T'] >= 512), key=lambda row: row['T'])
            x = [row['T'] for row in rows]
            y = [row['ms'] * 1e6 / (row['B'] * row['T'] * row['H']) for row in rows]
            axes.plot(x, y, color=color, marker=marker, markersize=4, label=title)
            if implementation == 'chunk':
                floors = [row['ms'] / row['ns_per_kib'] * row['floor_ns_per_kib'] for row in rows]
                y = [ms * 1e6 / (row['B'] * row['T'] * row['H']) for ms, row in zip(floors, rows)]
                axes.plot(x, y, color=theme.ink, linestyle=':', linewidth=1, label='bytes / bandwidth')
                powers_of_two(axes, x)
        axes.set(title=f'{name}, {gpu(results)}', xlabel='tokens in a sequence', yscale='log')
        finish(axes, theme)
    figure.axes[0].set_ylabel('ns for a token and head (bf16, D 128)')
    legend(figure.axes[0], theme, loc='upper left')


def dims(figure: Figure, results: Results, theme: Theme) -> None:
    """Time for a byte against K = V = D."""
    for axes, name in zip(figure.subplots(1, 2, sharey=True), PASSES):
        for implementation, title, color in (
            ('chunk', 'fla_simple_gla chunk', theme.chunk),
            ('cuDNN attention', 'cuDNN causal attention', theme.attention),
        ):
            rows = results.find(series='dims', implementation=implementation, **{'pass': name})
            x, y = [row['D'] for row in rows], [row['ns_per_kib'] for row in rows]
            axes.plot(x, y, color=color, marker='o', markersize=4, label=title)
        floor = rows[0]['floor_ns_per_kib'] if rows else 0
        axes.axhline(floor, color=theme.ink, linestyle=':', linewidth=1, label='bytes / bandwidth')
        axes.set(title=f'{name}, {gpu(results)}, B4 T4096 H16', xlabel='K = V', yscale='log')
        finish(axes, theme)
    figure.axes[0].set_ylabel('ns for a KiB that has to move')
    legend(figure.axes[0], theme)


def decode(figure: Figure, results: Results, theme: Theme) -> None:
    """Time of a step against the batch."""
    axes = figure.subplots()
    for states, title, color, marker in (
        ('fla, new states', 'fla-core, fp32', theme.fla, '^'),
        ('float32 [V, K]', 'pool in fp32, [V, K]', theme.chunk, 'o'),
        ('bfloat16 [V, K]', 'pool in bf16, [V, K]', theme.extra, 's'),
    ):
        rows = results.find(states=states, tokens=1)
        x = [row['batch'] for row in rows]
        axes.plot(x, [row['device_us'] for row in rows], color=color, marker=marker, markersize=4, label=title)
        if states.startswith('float32'):
            floors = [row['floor_us'] for row in rows]
            axes.plot(x, floors, color=theme.ink, linestyle=':', linewidth=1, label='bytes / bandwidth, fp32')
    powers_of_two(axes, x)
    title = f'a decode step of one layer, H32, K = V = 128, {gpu(results)}'
    axes.set(title=title, xlabel='sequences', ylabel='microseconds', yscale='log')
    finish(axes, theme)
    legend(axes, theme)


def accuracy(figure: Figure, results: Results, theme: Theme) -> None:
    """Worst error over gate memories against the length, of o and of dg."""
    colors = {'bf16': theme.chunk, 'fp16': theme.extra, 'fp32': theme.fla}
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ('o', 'dg')):
        for dtype, color in colors.items():
            for states, style in ((False, '-'), (True, '--')):
                rows = results.find(mode='chunk', dtype=dtype, result=name, states=states)
                rows = [row for row in rows if dims_of(row) is None]
                x, y = [row['T'] for row in rows], [row['error'] for row in rows]
                title = dtype + (', with states' if states else '')
                axes.plot(x, y, color=color, linestyle=style, marker='o', markersize=3, label=title)
        axes.set(title=f'{name} of chunk, {gpu(results)}', xlabel='tokens', xscale='log', yscale='log')
        finish(axes, theme)
    figure.axes[0].set_ylabel('relative RMS error against fp64')
    legend(figure.axes[0], theme)


DRAW: dict[str, Callable] = {'lengths': lengths, 'dims': dims, 'decode': decode, 'accuracy': accuracy}
SIZES = {'lengths': (8.6, 3.4), 'dims': (8.6, 3.2), 'decode': (5.2, 3.4), 'accuracy': (8.6, 3.2)}


def draw(picture: Picture, files: Files) -> None:
    theme = DARK if picture.dark else LIGHT
    figure = Figure(figsize=SIZES[picture.what], layout='constrained', facecolor=theme.ground)
    DRAW[picture.what](figure, files[picture.files[0]], theme)
    # the same file from the same results
    with matplotlib.rc_context({'svg.hashsalt': picture.name}):
        description = f'data: sha256 {picture.digest()}'
        figure.savefig(picture.path(), metadata={'Date': None, 'Description': description})
    # matplotlib ends lines with spaces
    lines = [line.rstrip() for line in picture.path().read_text().splitlines()]
    picture.path().write_text('\n'.join(lines) + '\n')
