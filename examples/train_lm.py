"""Train a byte-level language model whose mixing layers are Simple Gated Linear Attention, then let it write.

    python examples/train_lm.py                    # learns the source code of Python's own standard library
    python examples/train_lm.py --text book.txt    # or any file of yours

Training and reading the prompt use a parallel mode of the library, and writing uses its recurrent mode. The recurrent
mode starts from the states that the parallel mode leaves, and they never grow. With the defaults this takes about a
minute on two CPU cores that are otherwise idle. With a CUDA device the kernels run, and the default model is larger.
"""

import argparse
import math
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import nn

from fla_simple_gla import chunk_simple_gla as parallel_mode
from fla_simple_gla import fused_recurrent_simple_gla as recurrent_mode

BYTES = 256
MAX_TEXT_BYTES = 4_000_000
HELD_OUT = 0.05
HELD_OUT_WINDOWS = 64
UNIFORM = math.log2(BYTES)

DEFAULTS = {
    'cpu': {'width': 128, 'layers': 3, 'heads': 4, 'length': 256, 'batch': 4, 'steps': 800, 'lr': 3e-3},
    'cuda': {'width': 384, 'layers': 6, 'heads': 6, 'length': 512, 'batch': 16, 'steps': 1500, 'lr': 1.5e-3},
}

# What the model remembers of the text so far: for each layer one state [batch, heads, head width, head width], in fp32.
Memory = list[torch.Tensor]


class Mixer(nn.Module):
    """The layer that looks back: `S_t = exp(g_t) S_{t-1} + k_t v_t^T`, `o_t = scale * S_t^T q_t`, per head."""

    def __init__(self, width: int, heads: int, shortest: float = 4.0, longest: float = 256.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width)
        self.project = nn.Linear(width, 4 * width, bias=False)
        self.forget = nn.Linear(width, heads, bias=False)
        # A head that remembers for n tokens decays by exp(-1 / n) = sigmoid(bias) at each token. At the start, n goes
        # from `longest` to `shortest` over the heads, whatever they read, because the weights are zero.
        memories = torch.logspace(math.log10(longest), math.log10(shortest), heads)
        self.forget_bias = nn.Parameter(-torch.expm1(1 / memories).log())
        self.head_norm = nn.RMSNorm(width // heads)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None, decoding: bool, slots: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = self.norm(x)
        q, k, v, out_gate = self.project(x).unflatten(-1, (4, self.heads, -1)).unbind(2)
        # The bias is added in fp32: it may be large, and 1 - exp(g) is what a long memory depends on.
        g = F.logsigmoid(self.forget(x).float() + self.forget_bias)
        mode = recurrent_mode if decoding else parallel_mode
        wanted = state is not None
        o, state = mode(F.silu(q), F.silu(k), v, g, initial_state=state, output_final_state=wanted, state_indices=slots)
        # o is a sum over as many tokens as the head remembers: the norm makes its size independent of that number.
        o = self.head_norm(o.float()) * F.silu(out_gate)
        return self.out(o.flatten(2)), state


class MLP(nn.Module):
    """SwiGLU, on each token by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = math.ceil(width * 8 / 3 / 16) * 16
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.up(self.norm(x)).chunk(2, -1)
        return self.out(F.silu(gate) * value)


class LanguageModel(nn.Module):
    """Bytes in, the logits of the next byte out."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, width)
        self.mixers = nn.ModuleList(Mixer(width, heads) for _ in range(layers))
        self.mlps = nn.ModuleList(MLP(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        for name, weight in self.named_parameters():
            if name.endswith(('project.weight', 'up.weight')):
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            elif name.endswith('out.weight'):
                # 2 * layers of these add up in the residual stream
                nn.init.normal_(weight, std=(2 * layers * weight.shape[1]) ** -0.5)
            elif name.endswith('forget.weight'):
                nn.init.zeros_(weight)

    def forward(
        self,
        tokens: torch.Tensor,
        memory: Memory | None = None,
        decoding: bool = False,
        slots: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Memory | None]:
        """Logits `[B, T, 256]` of the bytes after tokens `[B, T]`, and the memory after them if one was given.

        With `decoding` the recurrent mode takes the tokens one by one; only the rounding differs. With `slots` `[B]`
        the memory is a pool with the states of many texts, which are replaced in place: row b is the text in slot
        `slots[b]`, or padding where that is -1 (`generate.py`).
        """
        x = self.embed(tokens)
        states = []
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            mixed, state = mixer(x, None if memory is None else memory[i], decoding, slots)
            states.append(state)
            x = x + mixed
            x = x + mlp(x)
        # the weights of the embedding, transposed, also make the logits
        return F.linear(self.norm(x), self.embed.weight).float(), None if memory is None else states

    def empty_memory(self, batch: int = 1) -> Memory:
        """The memory of a model that has read nothing."""
        width, heads = self.embed.embedding_dim, self.mixers[0].heads
        shape = (batch, heads, width // heads, width // heads)
        return [self.embed.weight.new_zeros(shape, dtype=torch.float32) for _ in self.mixers]


class Progress:
    """A bar on one line of the terminal, and lines above it that stay. Without a terminal, only those lines."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.start = time.monotonic()
        self.live = sys.stdout.isatty()
        self.columns = shutil.get_terminal_size().columns - 1  # the last one would wrap

    def update(self, done: int, note: str) -> None:
        if not self.live:
            return
        left = (time.monotonic() - self.start) / done * (self.total - done)
        bar = '#' * (30 * done // self.total)
        self._write(f'[{bar:<30}] {done}/{self.total}  {note}  {left:.0f} s left')

    def line(self, text: str) -> None:
        if self.live:
            self._write('')
        print(text, flush=True)

    def _write(self, text: str) -> None:
        # padded, so that a shorter text covers a longer one
        print(f'\r{text[: self.columns]:<{self.columns}}\r', end='', flush=True)


class Point(NamedTuple):
    """A line of the table that training prints, in bits per byte."""

    step: int
    training: float
    held_out: float


def windows(data: torch.Tensor, length: int) -> torch.Tensor:
    """All windows of length + 1 bytes, as a view `[N, length + 1]`: inputs, and targets shifted by one byte."""
    return data.unfold(0, length + 1, 1)


def bits(model: LanguageModel, batch: torch.Tensor) -> torch.Tensor:
    """The bits that the model needs for each byte of windows `[B, length + 1]`, without the first bytes; the mean."""
    batch = batch.long()
    logits, _ = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) / math.log(2)


@torch.inference_mode()
def held_out_bits(model: LanguageModel, held_out: torch.Tensor, args: argparse.Namespace) -> float:
    """The mean of `bits` over windows that are spread evenly over text that training never reads."""
    every = windows(held_out, args.length)
    count = min(HELD_OUT_WINDOWS, len(every))
    chosen = every[torch.linspace(0, len(every) - 1, count, device=every.device).long()]
    return sum(bits(model, batch).item() * len(batch) for batch in chosen.split(args.batch)) / count


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """The learning rate of a step: it rises linearly over the first 5%, then falls to a tenth along half a cosine."""
    warmup = math.ceil(0.05 * args.steps)
    if step <= warmup:
        return args.lr * step / warmup
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (args.steps - warmup)))


def train(model: LanguageModel, text: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace) -> list[Point]:
    """Train for `args.steps` steps and print a table; its lines, the first without a training loss (NaN)."""
    device = text.device
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    # no weight decay for norms and the biases of forget gates: nothing should pull them to zero
    groups = [{'params': matrices, 'weight_decay': 0.1}, {'params': vectors, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    choices = windows(text, args.length)
    dice = torch.Generator().manual_seed(args.seed)

    progress = Progress(args.steps)
    progress.line(f'bits per byte; one of {BYTES} bytes at random would cost {UNIFORM:.2f}')
    progress.line(f'{"step":>6} {"training":>9} {"held out":>9} {"seconds":>8}')
    points = [Point(0, math.nan, held_out_bits(model, held_out, args))]
    progress.line(f'{0:>6} {"":>9} {points[0].held_out:>9.3f} {0:>8.1f}')
    average = torch.tensor(UNIFORM, device=device)
    for step in range(1, args.steps + 1):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, args)
        batch = choices[torch.randint(len(choices), (args.batch,), generator=dice).to(device)]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda'):
            loss = bits(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        # the mean of the first steps, then a running mean; it is read only where it is shown, because that waits for
        # the GPU
        average.lerp_(loss.detach(), max(1 / step, 0.05))
        if progress.live and step % 5 == 0:
            progress.update(step, f'{average.item():.2f} bits per byte')
        if step == args.steps or step % math.ceil(args.steps / 10) == 0:
            seconds = time.monotonic() - progress.start
            point = Point(step, average.item(), held_out_bits(model, held_out, args))
            progress.line(f'{step:>6} {point.training:>9.3f} {point.held_out:>9.3f} {seconds:>8.1f}')
            if not math.isfinite(point.held_out):
                fail('the loss is no longer a number: a smaller --lr may help')
            points.append(point)
    return points


def plot(points: list[Point], file: Path) -> None:
    """Draw the losses against steps; the file's name says in which format."""
    from matplotlib.figure import Figure  # only --plot needs it

    steps, training, held_out = zip(*points)
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    axes.plot(steps, training, marker='.', label='training (running mean)')
    axes.plot(steps, held_out, marker='.', label='held out')
    axes.set(xlabel='step', ylabel='bits per byte')
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)


@torch.inference_mode()
def compare_modes(model: LanguageModel, text: torch.Tensor) -> tuple[float, float]:
    """The largest difference between the logits of one text `[1, T]`, read in two ways, and the largest logit.

    The first way is all of it with the parallel mode. The second is that of writing: the first third with the parallel
    mode, and from its memory byte by byte with the recurrent mode. (A third is rarely a multiple of the chunks.) All is
    in fp32, so that only the rounding can differ.
    """
    whole, _ = model(text)
    part = math.ceil(text.shape[1] / 3)
    logits, memory = model(text[:, :part], model.empty_memory())
    pieces = [logits]
    for token in text[:, part:].split(1, dim=1):
        logits, memory = model(token, memory, decoding=True)
        pieces.append(logits)
    return (torch.cat(pieces, 1) - whole).abs().max().item(), whole.abs().max().item()


@torch.inference_mode()
def write(model: LanguageModel, prompt: torch.Tensor, args: argparse.Namespace) -> tuple[bytes, Memory]:
    """`args.generate` bytes, sampled, that follow the prompt `[1, T]`, and the memory at the end."""
    dice = torch.Generator().manual_seed(args.seed)
    logits, memory = model(prompt, model.empty_memory())
    written = bytearray()
    while len(written) < args.generate:
        chances = (logits[0, -1] / args.temperature).softmax(-1)
        # drawn on the CPU: the generators of GPUs differ
        token = torch.multinomial(chances.cpu(), 1, generator=dice)
        written.append(token.item())
        logits, memory = model(token[None].to(prompt.device), memory, decoding=True)
    return bytes(written), memory


def printable(text: bytes) -> str:
    """Text for a terminal. The model can write any byte: control codes are replaced."""
    characters = text.decode(errors='replace')
    return ''.join(c if c.isprintable() or c in '\n\t' else '\N{REPLACEMENT CHARACTER}' for c in characters)


def fail(message: str) -> NoReturn:
    sys.exit(f'train_lm.py: {message}')


def read_text(path: Path | None) -> tuple[bytes, str]:
    """The bytes to learn from, at most MAX_TEXT_BYTES, and a description of where they come from."""
    if path is not None:
        files, source = [path], str(path)
    else:
        library = Path(sysconfig.get_paths()['stdlib'])
        files, source = sorted(library.glob('*.py')), f'{library}/*.py'
        if not files:
            fail(f'there is no Python source in {library}: name a text with --text FILE')
    text = bytearray()
    for file in files:
        try:
            if file.exists() and not file.is_file():
                fail(f'cannot read {file}: not a regular file')
            with file.open('rb') as stream:
                text += stream.read(MAX_TEXT_BYTES - len(text))
        except OSError as error:
            fail(f'cannot read {file}: {error.strerror}')
    return bytes(text), source


def number(kind: Callable[[str], float], least: float, most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite int or float in a range."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or math.isinf(value):
            limits = f'at least {least}' if math.isinf(most) else f'between {least} and {most}'
            what = 'a whole number' if kind is int else 'a number'
            raise argparse.ArgumentTypeError(f'must be {what} {limits}, got {text!r}')
        return value

    return parse


def plot_error(file: Path) -> str | None:
    """Why `plot` could not write this file, as far as that can be told before training."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        return 'needs matplotlib: pip install matplotlib'
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix[1:].lower() not in formats:
        return f'must end in the name of a format ({", ".join(formats)}), got {file}'
    return None


def parse_arguments(device: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = DEFAULTS[device]

    def option(name: str, kind: Callable[[str], float], help: str) -> None:
        parser.add_argument(f'--{name}', type=kind, default=defaults[name], help=f'{help} (default here: %(default)s)')

    parser.add_argument(
        '--text',
        type=Path,
        metavar='FILE',
        help=f'what to learn, any bytes, the first {MAX_TEXT_BYTES:,} of them (default: the Python standard library)',
    )
    parser.add_argument('--save', type=Path, metavar='FILE', help='where to leave the model, for generate.py')
    parser.add_argument(
        '--plot',
        type=Path,
        metavar='FILE',
        help='where to draw the losses against steps, in any format that matplotlib writes; needs matplotlib',
    )
    option('width', number(int, 1), 'width of the residual stream')
    option('layers', number(int, 1), 'pairs of a mixing layer and an MLP')
    option('heads', number(int, 1), 'heads of a mixing layer; they divide the width, and are at most 512 wide')
    option('length', number(int, 2), 'bytes in a training window')
    option('batch', number(int, 1), 'windows in a step')
    option('steps', number(int, 1), 'training steps')
    option('lr', number(float, 1e-8, 1.0), 'highest learning rate')
    parser.add_argument('--prompt', default='def ', help='what the model goes on from (default: %(default)r)')
    parser.add_argument('--generate', type=number(int, 1), default=400, help='bytes to write (default: %(default)s)')
    parser.add_argument(
        '--temperature',
        type=number(float, 0.01, 100.0),
        default=0.7,
        help='below 1 the likely bytes are preferred (default: %(default)s)',
    )
    parser.add_argument('--seed', type=number(int, 0, 2**63 - 1), default=0, help='(default: %(default)s)')
    args = parser.parse_args()
    if args.width % args.heads:
        parser.error(f'argument --heads: must divide the width {args.width}, got {args.heads}')
    if args.width // args.heads > 512:
        parser.error(f'argument --heads: a head is at most 512 wide, got {args.width} / {args.heads}')
    for name, file in (('save', args.save), ('plot', args.plot)):
        if file is not None and not file.parent.is_dir():
            parser.error(f'argument --{name}: there is no directory {file.parent}')
    if args.plot is not None and (reason := plot_error(args.plot)) is not None:
        parser.error(f'argument --plot: {reason}')
    if not args.prompt:
        parser.error('argument --prompt: must not be empty')
    return args


def main() -> None:
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    args = parse_arguments(device.type)
    sys.stdout.reconfigure(errors='replace')
    content, source = read_text(args.text)
    window = args.length + 1
    if len(content) < 2 * window:
        need = f'one window to learn from and one held out need {2 * window:,} (--length {args.length})'
        fail(f'{source} holds {len(content):,} bytes: {need}')

    torch.manual_seed(args.seed)
    model = LanguageModel(args.width, args.layers, args.heads).to(device)
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
    spare = max(window, int(HELD_OUT * len(data)))
    text, held_out = data[:-spare], data[-spare:]
    print(f'{len(text):,} bytes to learn from and {len(held_out):,} held out: {source}')
    size = sum(p.numel() for p in model.parameters())
    print(f'{size:,} parameters on {device.type}; a step reads {args.batch} x {args.length} bytes\n')
    points = train(model, text, held_out, args)
    if args.save is not None:
        dims = {name: getattr(args, name) for name in ('width', 'layers', 'heads')}
        torch.save({'dims': dims, 'weights': model.state_dict()}, args.save)
    if args.plot is not None:
        plot(points, args.plot)

    difference, largest = compare_modes(model, held_out[None, : args.length].long())
    print(f'\nlargest difference between the logits of training and of decoding: {difference:.1e}', end='')
    print(f' (largest logit: {largest:.1f})')
    if not difference < 1e-2:
        fail('the two modes do not agree')

    prompt = os.fsencode(args.prompt)
    start = time.monotonic()
    written, memory = write(model, torch.tensor([list(prompt)], device=device), args)
    seconds = time.monotonic() - start
    kept = sum(state.nbytes for state in memory)
    print(f'{len(written)} bytes in {seconds:.1f} s, from a memory of {kept:,} bytes that never grows:\n')
    print(printable(prompt + written))


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        sys.exit(130)
