"""The worst relative RMS errors of `fused_chunk_simple_gla` against naive in fp64, over lengths and gate memories, on a GPU.

    python benchmarks/accuracy.py

Every combination of a T from 64 to 65,536 (67: a last chunk of three tokens) and a gate memory from 1 to 1,000 tokens, with the
inputs standard normal, both without states and with a given initial state and a final state that has a gradient.
"""

import collections

import torch

from fla_simple_gla import fused_chunk_simple_gla, naive_chunk_simple_gla

NAMES = ('o', 'ht', 'dq', 'dk', 'dv', 'dg', 'dh0')


def errors(dtype, T, memory, states, H=8, D=128):
    torch.manual_seed(T + memory)
    q, k, v, do = (torch.randn(1, T, H, D, device='cuda').to(dtype) for _ in range(4))
    g = -2 * torch.rand(1, T, H, device='cuda') / memory
    h0, dht = torch.randn(2, 1, H, D, D, device='cuda') * states
    results = []
    for form, precision in ((fused_chunk_simple_gla, None), (naive_chunk_simple_gla, torch.float64)):
        leaves = [x.detach().to(precision or x.dtype).requires_grad_() for x in (q, k, v, g, h0)]
        o, ht = form(*leaves[:4], initial_state=leaves[4] if states else None, output_final_state=True)
        inputs = leaves if states else leaves[:4]
        outputs, gradients = ([o, ht], [do.to(o.dtype), dht.to(ht.dtype)]) if states else ([o], [do.to(o.dtype)])
        dq, dk, dv, *rest = torch.autograd.grad(outputs, inputs, gradients)
        results.append([o, ht, dq, dk, dv, *rest])
    return {name: ((a.double() - b).norm() / b.norm()).item() for name, a, b in zip(NAMES, *results)}


def main():
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}')
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        worst = collections.defaultdict(lambda: (0.0, None))
        for T in (64, 67, 100, 1000, 8192, 65536):
            for memory in (1, 3, 10, 30, 100, 300, 1000):
                for states in (False, True):
                    for name, error in errors(dtype, T, memory, states).items():
                        where = f'T{T} memory {memory}' + (' states' if states else '')
                        worst[name] = max(worst[name], (error, where))
        print(str(dtype).removeprefix('torch.'), ', '.join(f'{name} {worst[name][0]:.1e} ({worst[name][1]})' for name in NAMES), flush=True)


if __name__ == '__main__':
    main()
