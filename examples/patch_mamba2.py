"""Train a Mamba-2 model of transformers and let it write, without and with the kernels of this library.

    pip install "transformers>=5.17"
    python examples/patch_mamba2.py

mamba_ssm is not needed. `patch('transformers')` makes models of transformers call this library, and nothing else
changes: the same model, with the same random weights, learns the same bytes twice. The losses of both stand side by
side, with the seconds that a step takes. Then the model writes, without and with the patch. Only the rounding differs.

With the defaults this takes less than half a minute on two CPU cores that are otherwise idle. There both ways are
computed by PyTorch. With a CUDA device the kernels run, in bfloat16, and the default model is larger.
"""

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from train_lm import BYTES, number, printable, read_text

from fla_simple_gla.adapters import patch

DEFAULTS = {
    'cpu': {'width': 128, 'layers': 2, 'state': 32, 'length': 256, 'batch': 4, 'steps': 100},
    'cuda': {'width': 1024, 'layers': 8, 'state': 128, 'length': 1024, 'batch': 4, 'steps': 100},
}
WARMUP = 3  # steps and runs whose times are not shown: they compile kernels


def make_model(args: argparse.Namespace, device: torch.device):
    """A model with random weights, the same at each call."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    head_dim = math.gcd(64, 2 * args.width)
    config = Mamba2Config(
        vocab_size=BYTES, hidden_size=args.width, num_hidden_layers=args.layers, state_size=args.state,
        num_heads=2 * args.width // head_dim, head_dim=head_dim, n_groups=1, chunk_size=min(128, args.length),
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    model = Mamba2ForCausalLM(config)
    return model.to(device, torch.bfloat16 if device.type == 'cuda' else torch.float32)


def seconds(call: Callable, device: torch.device) -> tuple:
    """What a call returns, and the seconds that it takes."""
    if device.type == 'cuda':
        torch.cuda.synchronize()
    start = time.monotonic()
    result = call()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return result, time.monotonic() - start


def train(model, text: torch.Tensor, args: argparse.Namespace) -> tuple[list[float], float]:
    """The loss of each step, in nats for each byte, and the seconds that a step takes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    dice = torch.Generator().manual_seed(args.seed)
    choices = text.unfold(0, args.length, 1)
    model.train()
    losses, times = [], []

    def step() -> torch.Tensor:
        batch = choices[torch.randint(len(choices), (args.batch,), generator=dice).to(text.device)].long()
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    for _ in range(args.steps):
        loss, duration = seconds(step, text.device)
        losses.append(loss.item())
        times.append(duration)
    return losses, statistics.median(times[WARMUP:] or times)


@torch.inference_mode()
def write(model, prompt: torch.Tensor, args: argparse.Namespace) -> tuple[bytes, float]:
    """The most likely bytes after the prompt `[1, T]`, and the seconds for each."""
    model.eval()

    def generate(count: int) -> torch.Tensor:
        return model.generate(prompt, max_new_tokens=count, do_sample=False)

    for _ in range(WARMUP):
        generate(2)
    tokens, duration = seconds(lambda: generate(args.generate), prompt.device)
    return bytes(tokens[0, prompt.shape[1] :].tolist()), duration / args.generate


def parse_arguments(device: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    helps = {
        'width': 'width of the residual stream', 'layers': 'layers', 'state': 'size of the state of each channel',
        'length': 'bytes in a training window', 'batch': 'windows in a step', 'steps': 'training steps',
    }  # fmt: skip
    for name, value in DEFAULTS[device].items():
        parser.add_argument(
            f'--{name}', type=number(int, 2), default=value, help=f'{helps[name]} (default here: %(default)s)'
        )
    parser.add_argument(
        '--text', type=Path, metavar='FILE', help='what to learn (default: the Python standard library)'
    )
    parser.add_argument(
        '--lr', type=number(float, 1e-8, 1.0), default=1e-3, help='learning rate (default: %(default)s)'
    )
    parser.add_argument('--prompt', default='def ', help='what the model goes on from (default: %(default)r)')
    parser.add_argument('--generate', type=number(int, 1), default=64, help='bytes to write (default: %(default)s)')
    parser.add_argument('--seed', type=number(int, 0, 2**63 - 1), default=0, help='(default: %(default)s)')
    args = parser.parse_args()
    if not args.prompt:
        parser.error('argument --prompt: must not be empty')
    return args


def main() -> None:
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    args = parse_arguments(device.type)
    sys.stdout.reconfigure(errors='replace')
    content, source = read_text(args.text)
    if len(content) < args.length:
        sys.exit(f'patch_mamba2.py: {source} holds {len(content):,} bytes, fewer than --length {args.length}')
    text = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
    prompt = torch.tensor([list(args.prompt.encode())], device=device)
    with patch('transformers') as report:
        if report.skipped:
            sys.exit(f'patch_mamba2.py: {report.skipped["transformers"]}')
    from transformers import logging

    logging.set_verbosity_error()  # it would tell that mamba_ssm is not installed

    ways = {'without': contextlib.nullcontext, 'with': lambda: patch('transformers')}
    losses, step_times, written, byte_times = {}, {}, {}, {}
    for way, context in ways.items():
        model = make_model(args, device)
        if way == 'without':
            print(f'{sum(x.numel() for x in model.parameters()):,} weights in {model.dtype}, {source}')
        with context():
            losses[way], step_times[way] = train(model, text, args)
    for way, context in ways.items():
        with context():
            written[way], byte_times[way] = write(model, prompt, args)

    print(f'{"":>24}{"without patch":>15}{"with patch":>15}')
    shown = sorted({*range(0, args.steps, math.ceil(args.steps / 5)), args.steps - 1})
    rows = [(f'loss of step {step + 1}', {way: f'{losses[way][step]:.4f}' for way in ways}) for step in shown]
    rows.append(('a training step', {way: f'{step_times[way] * 1e3:.1f} ms' for way in ways}))
    rows.append(('a byte that is written', {way: f'{byte_times[way] * 1e3:.1f} ms' for way in ways}))
    for name, row in rows:
        print(f'{name:<24}{row["without"]:>15}{row["with"]:>15}')
    same = next((i for i, (a, b) in enumerate(zip(*written.values())) if a != b), args.generate)
    print(f'the first {same} of {args.generate} bytes are the same:')
    print(printable(args.prompt.encode() + written['with']))


if __name__ == '__main__':
    main()
