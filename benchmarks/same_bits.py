"""Compare the outputs and gradients of this checkout with those of another, bit by bit, over a table of cases.

A change that is not to change results is right if every line says "same". The checkouts run in processes of their own,
on the same inputs; segments are cut as they are for users. Exit status 1 where any bit differs.
"""

import argparse
import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent.parent
MODES = ('chunk', 'fused_chunk', 'fused_recurrent', 'parallel')
DIMS = ((64, 64), (128, 128), (256, 256), (40, 96), (256, 64), (20, 12))  # K, V; the last is for pointers
PACKED = (0, 0, 700, 1000, 1001, 1900)


def cases() -> list[dict]:
    """Dims and dtypes, then variations of what a call is given."""
    plain = dict(
        B=2, T=2000, H=4, HK=4, K=128, V=128, dtype='bfloat16', gate='g', states=True, packed=False, pool=False
    )
    found = []
    for (K, V), dtype in itertools.product(DIMS, ('bfloat16', 'float16', 'float32')):
        found.append(plain | dict(K=K, V=V, dtype=dtype))
    for K, change in itertools.product(
        (64, 128, 256),
        (
            dict(gate='gamma', HK=1),
            dict(gate=None),
            dict(states=False, HK=2),
            dict(B=1, packed=True),
            dict(B=1, packed=True, pool=True),
            dict(B=1, T=40000, H=2, HK=2),
        ),
    ):
        found.append(plain | dict(K=K, V=K) | change)
    return found


def results(mode: str, case: dict) -> dict:
    """Digests of the results of a call and of its gradients."""
    import torch

    import fla_simple_gla

    B, T, H, HK, K, V = (case[name] for name in ('B', 'T', 'H', 'HK', 'K', 'V'))
    dtype = getattr(torch, case['dtype'])
    generator = torch.Generator().manual_seed(1)

    def random(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to('cuda', dtype)

    inputs = dict(q=random(B, T, HK, K), k=random(B, T, HK, K), v=random(B, T, H, V))
    if case['gate'] is not None:
        shape, name = ((B, T, H), 'g') if case['gate'] == 'g' else ((H,), 'g_gamma')
        inputs[name] = torch.nn.functional.logsigmoid(random(*shape, dtype=torch.float32) + 3)
    N = len(PACKED) - 1 if case['packed'] else B
    options = {}
    if case['packed']:
        options['cu_seqlens'] = torch.tensor(PACKED, device='cuda')
    stateful = case['states'] and mode != 'parallel'
    if stateful:
        inputs['initial_state'] = random(N, H, K, V, dtype=torch.float32)
        options['output_final_state'] = True
    fn = getattr(fla_simple_gla, f'{mode}_simple_gla')
    if case['pool']:
        pool = inputs.pop('initial_state')
        indices = torch.tensor([3, 0, -1, 4, 1], device='cuda')
        with torch.no_grad():
            o, _ = fn(**inputs, **options, initial_state=pool, state_indices=indices)
        return digests(dict(o=o, pool=pool))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    o, state = fn(**leaves, **options)
    outputs, gradients = [o], [random(*o.shape)]
    if stateful:
        outputs.append(state)
        gradients.append(random(*state.shape, dtype=torch.float32))
    found = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    return digests(dict(o=o, state=state if stateful else None) | {f'd{n}': x for n, x in zip(leaves, found)})


def digests(tensors: dict) -> dict[str, str]:
    import torch

    return {
        name: hashlib.sha256(x.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()
        for name, x in tensors.items()
        if x is not None
    }


def calls() -> list[tuple[str, dict]]:
    found = itertools.product(MODES, cases())
    return [
        (mode, case)
        for mode, case in found
        if not (case['pool'] and mode == 'parallel' or case['T'] > 4096 and mode != 'chunk')
    ]


def start(checkout: pathlib.Path, job: int, jobs: int) -> subprocess.Popen:
    """A process with its share of the calls."""
    command = [sys.executable, __file__, str(job), str(jobs)]
    environment = os.environ | {'PYTHONPATH': str(checkout)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout)


def digests_of(processes: list[subprocess.Popen]) -> list[dict]:
    """The digests of all calls, in their order."""
    found = [None] * len(calls())
    for process in processes:
        for line in process.communicate()[0].splitlines():
            i, result = json.loads(line)
            found[i] = result
        if process.returncode:
            sys.exit(f'a process ended with {process.returncode}')
    return found


def work(job: int, jobs: int) -> None:
    """Print the digests of a share of the calls."""
    for i, (mode, case) in enumerate(calls()):
        if i % jobs == job:
            print(json.dumps([i, results(mode, case)]), flush=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('other', type=pathlib.Path, help='a checkout of another commit')
    parser.add_argument('--jobs', type=int, default=4, help='processes to each checkout, default 4')


def main(options: argparse.Namespace) -> None:
    checkouts = options.other.resolve(), HERE
    olds, news = [[start(checkout, job, options.jobs) for job in range(options.jobs)] for checkout in checkouts]
    different = count = 0
    for (mode, case), old, new in zip(calls(), digests_of(olds), digests_of(news)):
        assert old.keys() == new.keys()
        names = [name for name in new if old[name] != new[name]]
        different += bool(names)
        count += len(new)
        shown = ' '.join(f'{name}={value}' for name, value in case.items())
        print(f'{"DIFFERENT in " + ", ".join(names) if names else "same"}: {mode} {shown}')
    print(f'{len(calls())} calls, {count} tensors: {different} calls differ')
    sys.exit(different > 0)


if __name__ == '__main__':  # in a process of `start`, which imports the package of one of the checkouts
    work(*map(int, sys.argv[1:]))
