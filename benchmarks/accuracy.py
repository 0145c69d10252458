"""The worst relative RMS errors of a mode against naive in fp64, over lengths and gate memories, on a GPU.

    python benchmarks/accuracy.py [chunk | fused_chunk | parallel]

The lengths T are 64 to 65,536; 67 has a last chunk of three tokens. The gate memories are 1 to 1,000 tokens. Every
combination is computed twice: without states, and with an initial state and a final state that has a gradient. The
parallel mode has no states, and stops at T 8,192. The inputs are standard normal.
"""

import argparse
import collections

import run
import torch

import fla_simple_gla

NAMES = ('o', 'dq', 'dk', 'dv', 'dg', 'ht', 'dh0')


def errors(mode, dtype, T, memory, states, H=8, D=128) -> dict[str, float]:
    """The relative RMS error of each result and gradient."""
    torch.manual_seed(T + memory)
    q, k, v, do = (torch.randn(1, T, H, D, device='cuda').to(dtype) for _ in range(4))
    g = -2 * torch.rand(1, T, H, device='cuda') / memory
    h0, dht = torch.randn(2, 1, H, D, D, device='cuda')
    results = []
    fn, naive = getattr(fla_simple_gla, f'{mode}_simple_gla'), fla_simple_gla.naive_chunk_simple_gla
    for form, precision in ((fn, None), (naive, torch.float64)):
        leaves = [x.detach().to(precision or x.dtype).requires_grad_() for x in (q, k, v, g, h0)]
        if states:
            o, ht = form(*leaves[:4], initial_state=leaves[4], output_final_state=True)
            *gradients, dh0 = torch.autograd.grad([o, ht], leaves, [do.to(o.dtype), dht.to(ht.dtype)])
            results.append([o, *gradients, ht, dh0])
        else:
            o, _ = form(*leaves[:4])
            results.append([o, *torch.autograd.grad(o, leaves[:4], do.to(o.dtype))])
    return {name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in zip(NAMES, *results)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('mode', nargs='?', choices=('chunk', 'fused_chunk', 'parallel'), default='chunk')
    mode = parser.parse_args().mode
    run.require_gpu()
    has_states = mode != 'parallel'
    print(f'{mode}, {torch.cuda.get_device_name()}, torch {torch.__version__}')
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        worst = collections.defaultdict(lambda: (0.0, None))
        for T in (64, 67, 100, 1000, 8192, *([65536] if has_states else [])):
            for memory in (1, 3, 10, 30, 100, 300, 1000):
                for states in (False, True) if has_states else (False,):
                    for name, error in errors(mode, dtype, T, memory, states).items():
                        where = f'T{T} memory {memory}' + (' states' if states else '')
                        worst[name] = max(worst[name], (error, where))
        cells = [f'{name} {error:.1e} ({where})' for name, (error, where) in worst.items()]
        print(str(dtype).removeprefix('torch.'), ', '.join(cells), flush=True)


if __name__ == '__main__':
    main()
