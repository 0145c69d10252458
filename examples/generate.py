"""Serve many conversations at once from one pool of states: continuous batching.

    python examples/train_lm.py --save model.pt    # or go without, and see random weights write
    python examples/generate.py --model model.pt

A conversation is remembered by one state for each layer. The states never grow. Each layer has a pool of slots for the
states of all conversations. A conversation that joins gets a free slot: a parallel mode of the library reads the prompt
and leaves the state there. From then on, a step writes one byte for each of a few conversations: the recurrent mode
gets their slots, and replaces the states in place. The states of other conversations wait in the pool and cost nothing.
When a conversation is done it leaves, and its slot is free for the next one. All steps have the same shapes: a row
without a conversation is padding, with slot -1. So on a GPU the step is captured once, as a CUDA graph, and replayed.

None of this may change what is written: at the end every conversation runs once more by itself, and has to write the
same bytes.
"""

import argparse
import os
import sys
import time
from collections import deque
from pathlib import Path

import torch
from train_lm import LanguageModel, number, printable

PROMPTS = ('def ', 'import ', 'class ', 'for i in range(', '    return ', 'if __name__ == ', '"""', 'raise ValueError(')


class Conversation:
    """A prompt, and the bytes written after it."""

    def __init__(self, number: int, prompt: bytes, length: int, temperature: float) -> None:
        self.prompt = prompt
        self.length = length
        self.temperature = temperature
        self.dice = torch.Generator().manual_seed(number)
        self.slot = -1
        self.written = bytearray()

    @property
    def done(self) -> bool:
        return len(self.written) == self.length

    def write(self, logits: torch.Tensor) -> None:
        """Draw the next byte."""
        chances = (logits / self.temperature).softmax(-1)
        self.written.append(torch.multinomial(chances, 1, generator=self.dice).item())


class Engine:
    """A model, the states of the conversations that it has read, and the step that goes on with some of them."""

    def __init__(self, model: LanguageModel, slots: int, batch: int) -> None:
        self.model = model
        self.pools = model.empty_memory(slots)
        device = self.pools[0].device
        # what a step reads; a graph finds it at these addresses
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.slots = torch.full((batch,), -1, dtype=torch.int32, device=device)
        self.graph = None
        if device.type == 'cuda':
            self.next_logits()  # compiles; the slots are all padding
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.next_logits()

    def next_logits(self) -> torch.Tensor:
        logits, _ = self.model(self.tokens, self.pools, decoding=True, slots=self.slots)
        return logits[:, -1]

    def read(self, prompt: bytes, slot: int) -> torch.Tensor:
        """The logits of the byte after a prompt. The states after the prompt are left in this slot."""
        for pool in self.pools:
            pool[slot] = 0
        tokens = torch.tensor([list(prompt)], device=self.tokens.device)
        logits, _ = self.model(tokens, self.pools, slots=self.slots.new_tensor([slot]))
        return logits[0, -1].cpu()

    def step(self, conversations: list[Conversation]) -> torch.Tensor:
        """The logits of the next bytes of these conversations, which have slots. There are at most as many as rows."""
        padding = len(self.slots) - len(conversations)
        last = [c.written[-1] for c in conversations] + [0] * padding
        slots = [c.slot for c in conversations] + [-1] * padding
        self.tokens.copy_(torch.tensor(last)[:, None])
        self.slots.copy_(torch.tensor(slots))
        if self.graph is None:
            return self.next_logits()
        self.graph.replay()
        return self.logits.cpu()


@torch.inference_mode()
def serve(model: LanguageModel, conversations: list[Conversation], slots: int, batch: int) -> int:
    """Run all conversations to their ends. Returns the number of steps."""
    engine = Engine(model, slots, batch)
    waiting, joined, free = deque(conversations), deque(), list(range(slots))
    steps = 0
    while waiting or joined:
        while waiting and free:
            conversation = waiting.popleft()
            conversation.slot = free.pop()
            conversation.write(engine.read(conversation.prompt, conversation.slot))
            joined.append(conversation)
        # the conversations that have waited longest
        turn = [joined.popleft() for _ in range(min(batch, len(joined)))]
        running = [conversation for conversation in turn if not conversation.done]
        if running:
            for conversation, logits in zip(running, engine.step(running)):
                conversation.write(logits)
            steps += 1
        for conversation in turn:
            if conversation.done:
                free.append(conversation.slot)
            else:
                joined.append(conversation)
    return steps


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    at_least_one = number(int, 1)
    parser.add_argument('--model', type=Path, metavar='FILE', help='what train_lm.py left (default: random weights)')
    parser.add_argument('--conversations', type=at_least_one, default=16, help='(default: %(default)s)')
    parser.add_argument('--slots', type=at_least_one, default=8, help='in the pool (default: %(default)s)')
    parser.add_argument('--batch', type=at_least_one, default=4, help='conversations in a step (default: %(default)s)')
    parser.add_argument('--generate', type=at_least_one, default=100, help='most bytes for each (default: %(default)s)')
    parser.add_argument('--temperature', type=number(float, 0.01, 100.0), default=0.7, help='(default: %(default)s)')
    return parser.parse_args()


def load(path: Path | None, device: str) -> LanguageModel:
    if path is None:
        torch.manual_seed(0)
        return LanguageModel(width=128, layers=3, heads=4).to(device)
    try:
        saved = torch.load(path, map_location=device)
        model = LanguageModel(**saved['dims']).to(device)
        model.load_state_dict(saved['weights'])
    except OSError as error:
        sys.exit(f'generate.py: cannot read {path}: {error.strerror}')
    except Exception:  # the unpickler raises many kinds of errors for other files
        sys.exit(f'generate.py: {path} holds no model that train_lm.py saved')
    return model


def main() -> None:
    args = parse_arguments()
    sys.stdout.reconfigure(errors='replace')
    model = load(args.model, 'cuda' if torch.cuda.is_available() else 'cpu')

    def conversation(n: int) -> Conversation:
        # the lengths differ, so that they leave one by one
        length = max(1, args.generate * (4 + n % 5) // 8)
        return Conversation(n, os.fsencode(PROMPTS[n % len(PROMPTS)]), length, args.temperature)

    conversations = [conversation(n) for n in range(args.conversations)]
    start = time.monotonic()
    steps = serve(model, conversations, args.slots, args.batch)
    seconds = time.monotonic() - start
    for c in conversations[:3]:
        print(printable(c.prompt + c.written), end='\n\n')
    written = sum(len(c.written) for c in conversations)
    pool = sum(state.nbytes for state in model.empty_memory(args.slots))
    print(f'{len(conversations)} conversations, {written} bytes in {steps} steps of {args.batch} and {seconds:.1f} s')
    print(f'{args.slots} slots, {pool:,} bytes in all')

    for n, together in enumerate(conversations):
        alone = conversation(n)
        serve(model, [alone], args.slots, args.batch)
        if alone.written != together.written:
            sys.exit(f'generate.py: conversation {n} writes something else when it is alone')
    print('each writes the same when it is alone')


if __name__ == '__main__':
    main()
