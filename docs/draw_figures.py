"""Draw the figures of the pages on mathematics: `docs/figures/math-*.svg`.

    python docs/draw_figures.py

Needs matplotlib. Everything drawn is computed here; nothing is measured. The background is transparent, and the colours
are of medium lightness, so that one file can be read on a light and on a dark page. Words are few and short, since the
pages in English and in Chinese show the same files.
"""

import io
import math
import pathlib
import re
import sys
from collections.abc import Callable

try:
    import matplotlib
except ImportError:
    sys.exit('draw_figures.py: needs matplotlib: pip install matplotlib')
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

FIGURES = pathlib.Path(__file__).parent / 'figures'
GREY, BLUE, ORANGE, GREEN, VIOLET = '#78808b', '#3f87d9', '#e0862a', '#2fa36b', '#a06fd6'

STYLE = {
    'font.size': 11,
    'axes.edgecolor': GREY,
    'axes.labelcolor': GREY,
    'axes.spines.right': False,
    'axes.spines.top': False,
    'axes.titlecolor': GREY,
    'axes.titlesize': 11,
    'grid.alpha': 0.25,
    'grid.color': GREY,
    'legend.frameon': False,
    'legend.labelcolor': GREY,
    'savefig.transparent': True,
    'svg.hashsalt': 'fla-simple-gla',
    'text.color': GREY,
    'xtick.color': GREY,
    'ytick.color': GREY,
}


def decay_mask(gates: np.ndarray) -> np.ndarray:
    """`D_ij = exp(g_{j+1} + ... + g_i)` for j <= i, else 0."""
    mask = np.eye(len(gates))
    for i in range(1, len(gates)):
        mask[i, :i] = np.exp(gates[i]) * mask[i - 1, :i]
    return mask


def canvas(width: float, height: float, x: float, y: float) -> tuple[Figure, Axes]:
    """A figure to draw shapes on: x from 0 to the right, y from 0 down, equal units, no frame."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, x), ylim=(y, 0), aspect='equal')
    axes.axis('off')
    return figure, axes


def cells(axes: Axes, values: np.ndarray, x: float, y: float, color: str, outline: bool = True) -> None:
    """A matrix of numbers from 0 to 1 as unit squares, right of and below (x, y): 0 is clear, 1 is the colour."""
    rows, columns = values.shape
    rounded = values.round(2)
    square = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]) * 0.94 + 0.03
    for value in np.unique(rounded[rounded > 0]):
        # all squares of one value are one shape: that keeps files small
        path = Path.make_compound_path(*(Path(square + (x + j, y + i)) for i, j in np.argwhere(rounded == value)))
        axes.add_patch(PathPatch(path, facecolor=to_rgba(color, value), linewidth=0, clip_on=False))
    if outline:
        axes.plot([x, x + columns, x + columns, x, x], [y, y, y + rows, y + rows, y], color=GREY, linewidth=0.8)


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    style = 'round,pad=0,rounding_size=0.15'
    shape = FancyBboxPatch((x, y), width, height, style, facecolor=to_rgba(color, 0.15), edgecolor=color)
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha='center', va='center')


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = GREY) -> None:
    axes.annotate('', end, start, arrowprops={'arrowstyle': '->', 'color': color, 'shrinkA': 0, 'shrinkB': 0})


def draw_cache() -> Figure:
    """Bytes that one layer keeps: a KV cache in 16 bits, and states in fp32; 32 heads, K = V = 128."""
    heads, dim = 32, 128
    figure = Figure(figsize=(7.2, 3.6), layout='constrained')
    axes = figure.subplots()
    tokens = np.array([16, 2**20])
    for kv_heads, color in ((heads, ORANGE), (8, VIOLET)):
        axes.plot(tokens, 2 * 2 * kv_heads * dim * tokens, color=color, linewidth=2)
        axes.plot(heads / kv_heads * dim, 4 * heads * dim**2, 'o', color=color)
    axes.plot(tokens, np.full(2, 4 * heads * dim**2), color=BLUE, linewidth=2)
    for text, size, color in (
        ('KV cache, 32 heads', 2 * 2 * heads * dim * tokens[1], ORANGE),
        ('KV cache, 8 heads', 2 * 2 * 8 * dim * tokens[1], VIOLET),
        ('32 states', 4 * heads * dim**2, BLUE),
    ):
        axes.text(1.3 * tokens[1], size, text, color=color, va='center')
    axes.set_xscale('log', base=2)
    axes.set_yscale('log', base=2)
    axes.set_xticks([2**i for i in (4, 7, 9, 12, 14, 17, 20)], ['16', '128', '512', '4K', '16K', '128K', '1M'])
    sizes = ['256 KiB', '2 MiB', '16 MiB', '128 MiB', '1 GiB', '8 GiB']
    axes.set_yticks([2**i for i in (18, 21, 24, 27, 30, 33)], sizes)
    axes.minorticks_off()
    axes.set_xlabel('tokens $T$')
    axes.set_title('bytes in one layer, $K = V = 128$')
    axes.grid()
    return figure


def draw_state() -> Figure:
    """One step: the state decays, a product is written, a query reads."""
    figure, axes = canvas(7.9, 2.65, 31.6, 10.6)
    k, v, q = np.array([0, 0, 1, 0.3]), np.array([0.9, 0.1, 0.6, 0, 0.35]), np.array([0.1, 0, 1, 0])
    before = np.outer([0.8, 0.1, 0, 0], [0.2, 1, 0, 0.8, 0.5]) + np.outer([0, 0.9, 0.1, 0], [1, 0, 0.3, 0.4, 0.9])
    decayed = 0.5 * before
    written = np.outer(k, v)
    after = decayed + written
    top, middle = 3.5, 5.5

    cells(axes, before, 0.6, top, BLUE)
    arrow(axes, (6, middle), (7.6, middle))
    cells(axes, decayed, 8, top, BLUE)
    axes.text(14, middle, '+', ha='center', va='center', fontsize=15)
    cells(axes, k[:, None], 15, top, GREEN)
    cells(axes, v[None], 16.4, top - 1.4, GREEN)
    cells(axes, written, 16.4, top, GREEN)
    axes.text(22.5, middle, '=', ha='center', va='center', fontsize=15)
    cells(axes, after, 23.6, top, BLUE)
    cells(axes, q[:, None], 29.6, top, ORANGE)
    cells(axes, (q @ after)[None], 23.6, top + 5, ORANGE)
    arrow(axes, (26.1, top + 4.05), (26.1, top + 4.95), ORANGE)

    for x, text, color in ((10.5, 'decay', BLUE), (18.9, 'write', GREEN), (30.1, 'read', ORANGE)):
        axes.text(x, 0.9, text, color=color, ha='center', va='center', fontsize=12)
    labels = (
        (3.1, 8.4, '$S_{t-1}$'),
        (10.5, 8.4, r'$\exp(g_t)\,S_{t-1}$'),
        (15.5, 8.4, '$k_t$'),
        (18.9, 8.4, '$k_tv_t^T$'),
        (22.1, 2.6, '$v_t^T$'),
        (26.1, 2.6, '$S_t$'),
        (30.1, 8.4, '$q_t$'),
        (22.6, 9, '$o_t^T$'),
    )
    for x, y, text in labels:
        axes.text(x, y, text, ha='center', va='center')
    return figure


def draw_memory() -> Figure:
    """What is left of a token after n others, for several gates."""
    figure = Figure(figsize=(7.2, 3.3), layout='constrained')
    axes = figure.subplots()
    n = np.linspace(0, 160, 321)
    for tokens, color in ((10, VIOLET), (55, BLUE), (250, GREEN)):
        axes.plot(n, np.exp(-n / tokens), color=color, linewidth=2, label=f'$g = -1/{tokens}$')
        if tokens < n[-1]:
            axes.plot(tokens, math.exp(-1), 'o', color=color)
        if tokens * math.log(2) < n[-1]:
            axes.plot(tokens * math.log(2), 0.5, 's', color=color, markersize=5)
    axes.plot(n, np.ones_like(n), color=GREY, linewidth=2, label='$g = 0$')
    left = np.where(n < 100, np.exp(-n / 250), 0)
    axes.plot(n, left, color=ORANGE, linewidth=2, linestyle=(0, (4, 2)), label=r'$g_{100} = -\infty$')
    for share, text in ((0.5, '1/2'), (math.exp(-1), '1/e')):
        axes.axhline(share, color=GREY, linewidth=0.8, linestyle=':')
        axes.text(161, share, text, va='center')
    axes.set(xlim=(0, 160), ylim=(0, 1.05), xlabel='tokens later', ylabel='share left')
    axes.legend(loc='center left', bbox_to_anchor=(1.06, 0.5))
    return figure


def draw_decay_mask() -> Figure:
    """The mask D for four series of gates, each beside its decays exp(g_i)."""
    T = 14
    varying = -np.abs(np.random.default_rng(3).normal(0, 0.35, T))
    reset = np.full(T, -1 / 8)
    reset[8] = -np.inf
    series = (
        ('$g = 0$', np.zeros(T)),
        ('$g = -1/4$', np.full(T, -1 / 4)),
        ('$g_t$', varying),
        (r'$g_9 = -\infty$', reset),
    )
    figure, axes = canvas(8.4, 2.55, 72.6, 22)
    for index, (title, gates) in enumerate(series):
        x = 2.6 + 18 * index
        cells(axes, np.exp(gates)[:, None], x, 4, ORANGE)
        cells(axes, decay_mask(gates), x + 1.5, 4, BLUE)
        axes.text(x + 8.5, 2.2, title, ha='center', va='center')
        axes.text(x + 0.5, 19.6, '$e^g$', ha='center', va='center', color=ORANGE)
        axes.text(x + 8.5, 19.6, '$j$', ha='center', va='center')
    axes.text(1.2, 11, '$i$', ha='center', va='center')
    return figure


def draw_chunks() -> Figure:
    """Left: which pairs of tokens meet in a chunk and which through the state. Right: chunks in a row."""
    C, N = 4, 4
    figure, axes = canvas(8.2, 3.1, 49, 18.5)
    causal = np.tri(C * N)
    same = np.kron(np.eye(N), np.ones((C, C)))
    cells(axes, 0.75 * causal * same, 1.8, 1, BLUE, outline=False)
    cells(axes, 0.45 * causal * (1 - same), 1.8, 1, ORANGE)
    for edge in range(C, C * N, C):
        axes.plot([1.8, 1.8 + C * N], [1 + edge] * 2, color=GREY, linewidth=0.8)
        axes.plot([1.8 + edge] * 2, [1, 1 + C * N], color=GREY, linewidth=0.8)
    axes.text(0.9, 9, '$i$', ha='center', va='center')
    axes.text(9.8, 17.8, '$j$', ha='center', va='center')

    for n in range(N):
        x = 22 + 6.6 * n
        box(axes, x, 5.2, 4.6, 2.6, r'$q\,k^T\odot D$', BLUE)
        box(axes, x, 10.6, 4.6, 2.4, 'state', ORANGE)
        axes.text(x + 2.3, 15.2, f'chunk {n + 1}', ha='center', va='center')
        axes.text(x + 2.3, 2.4, '$o$', ha='center', va='center')
        arrow(axes, (x + 2.3, 5.2), (x + 2.3, 3.2), BLUE)
        arrow(axes, (x + 2.3, 10.6), (x + 2.3, 7.9), ORANGE)
        if n < N - 1:
            arrow(axes, (x + 4.6, 11.8), (x + 6.6, 11.8), ORANGE)
            axes.text(x + 5.6, 10.9, f'$S_{{[{n + 1}]}}$', ha='center', va='center', fontsize=9)
    return figure


def draw_segments() -> Figure:
    """Summaries of four segments, and their running combinations in two steps."""
    figure, axes = canvas(7.6, 3.5, 30.4, 14)
    columns = [3.7 + 7.4 * n for n in range(4)]
    for n, x in enumerate(columns):
        box(axes, x - 3.2, 0.6, 6.4, 1.7, f'segment {n + 1}', BLUE)
        box(axes, x - 1.8, 3.7, 3.6, 1.6, f'$(S_{n + 1}, a_{n + 1})$', ORANGE)
        arrow(axes, (x, 2.3), (x, 3.6), ORANGE)
        axes.plot([x, x], [5.3, 11.2], color=GREY, linewidth=1)
        before = r' \cdot '.join(str(m + 1) for m in range(n + 1))
        axes.text(x, 12.2, f'${before}$', ha='center', va='center', color=GREEN, fontsize=12)
    for level, pairs in ((7.6, ((0, 1), (2, 3))), (10, ((1, 2), (1, 3)))):
        for start, end in pairs:
            axes.plot([columns[start], columns[end]], [level - 1.3, level], color=GREEN, linewidth=1.2)
            axes.plot(columns[end], level, 'o', color=GREEN, markersize=9)
    return figure


DRAWINGS: dict[str, Callable[[], Figure]] = {
    'cache': draw_cache,
    'state': draw_state,
    'memory': draw_memory,
    'decay-mask': draw_decay_mask,
    'chunks': draw_chunks,
    'segments': draw_segments,
}


def svg(figure: Figure) -> str:
    """The figure as SVG: the same text for the same figure, and short."""
    stream = io.StringIO()
    figure.savefig(stream, format='svg', metadata={'Date': None})
    # Hundredths of a point are enough for positions. Scales of glyphs are left alone.
    text = re.sub(r'(?<!scale\()(?<![\d.])(-?\d+\.\d\d)\d+', r'\1', stream.getvalue())
    return re.sub(r' +$', '', text, flags=re.M)


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        file = FIGURES / f'math-{name}.svg'
        with matplotlib.rc_context(STYLE):
            file.write_text(svg(draw()))
        print(f'{file}: {file.stat().st_size:,} bytes')


if __name__ == '__main__':
    main()
