"""Time the modes on a GPU: forward, forward + backward, host time, the memory they add, the first call on an empty kernel cache.

    python benchmarks/run.py [--shape B T H D]... [--mode MODE]... [--fla]

Times are medians of `triton.testing.do_bench`, in milliseconds. The floor is the bytes that have to move, over the bandwidth of a
large copy measured in the same run: 4 passes forward (q, k, v read and o written once), 11 for forward + backward (backward reads
q, k, v, do and writes dq, dk, dv). The host time is how long a call keeps the CPU while the GPU has other work: where the kernels
take less, it is what the medians show. Before a shape is timed, its o and gradients for the first heads are compared with naive in
fp64.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import torch
from triton.testing import do_bench

import fla_simple_gla
from fla_simple_gla import naive_chunk_simple_gla

SHAPES = [
    (4, 4096, 64, 128), (1, 8192, 96, 128), (2, 16384, 16, 128), (4, 2048, 16, 128), (8, 2048, 32, 256), (8, 1024, 8, 64),
    (1, 131072, 8, 128), (1, 1000000, 4, 64),
]  # fmt: skip
# the quadratic mode is for short sequences
LONGEST = {'parallel': 4096}


def median(fn) -> float:
    return do_bench(fn, warmup=25, rep=100, return_mode='median')


def host_time(fn, calls=20) -> float:
    """Milliseconds of a call on the host, with the GPU kept busy so that no call waits for it."""
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # cycles, some half a second
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    return (time.perf_counter() - start) / calls * 1e3


def copy_bandwidth() -> float:
    """Bytes read and written in a second by a copy of 2 GiB."""
    x = torch.empty(2**31, dtype=torch.int8, device='cuda')
    y = torch.empty_like(x)
    return 2 * x.numel() / median(lambda: y.copy_(x)) * 1e3


def inputs(B, T, H, D):
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(B, T, H, D, dtype=torch.bfloat16, device='cuda') for _ in range(4))
    g = torch.nn.functional.logsigmoid(torch.randn(B, T, H, device='cuda') + 3)
    return [x.requires_grad_() for x in (q, k, v, g)], do


def worst_error(fn, leaves, do) -> float:
    """The largest relative RMS error of o, dq, dk and dv, on one sequence and two heads."""
    part = [x.detach()[:1, :, :2].clone().requires_grad_() for x in leaves]
    exact = [x.detach().double().requires_grad_() for x in part]
    results = []
    for form, xs in ((fn, part), (naive_chunk_simple_gla, exact)):
        o = form(*xs)[0]
        results.append([o, *torch.autograd.grad(o, xs[:3], do[:1, :, :2].to(o.dtype))])
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*results))


def time_shape(name, fn, shape, bandwidth):
    B, T, H, D = shape
    leaves, do = inputs(*shape)
    error = worst_error(fn, leaves, do)

    def forward():
        return fn(*leaves)[0]

    def both():
        return torch.autograd.grad(forward(), leaves, do)

    times = [f(x) for x in (forward, both) for f in (median, host_time)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    floor = B * T * H * D * 2 / bandwidth * 1e3
    print(
        f'{name:12} B{B} T{T} H{H} D{D}: forward {times[0]:.3f} (floor {4 * floor:.3f}, host {times[1]:.3f}), '
        f'forward + backward {times[2]:.3f} (floor {11 * floor:.3f}, host {times[3]:.3f}), {memory:.0f} MiB, error {error:.1e}',
        flush=True,
    )


def first_call() -> None:
    """In a process of its own with an empty kernel cache: seconds of the first forward and the first backward."""
    code = """
import time, torch
from fla_simple_gla import chunk_simple_gla
q, k, v, do = (torch.randn(1, 131072, 8, 128, dtype=torch.bfloat16, device='cuda') for _ in range(4))
g = torch.full((1, 131072, 8), -0.1, device='cuda')
leaves = [x.requires_grad_() for x in (q, k, v, g)]
torch.cuda.synchronize()
t0 = time.time()
o, _ = chunk_simple_gla(*leaves)
torch.cuda.synchronize()
t1 = time.time()
torch.autograd.grad(o, leaves, do)
torch.cuda.synchronize()
print(f'first call of chunk on an empty cache, in segments: forward {t1 - t0:.1f} s, backward {time.time() - t1:.1f} s')
"""
    with tempfile.TemporaryDirectory() as cache:
        path = os.pathsep.join([os.getcwd(), os.environ.get('PYTHONPATH', '')])
        subprocess.run([sys.executable, '-c', code], env=os.environ | {'TRITON_CACHE_DIR': cache, 'PYTHONPATH': path}, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shape', type=int, nargs=4, action='append', metavar=('B', 'T', 'H', 'D'))
    parser.add_argument('--mode', choices=('chunk', 'fused_chunk', 'parallel'), action='append')
    parser.add_argument('--fla', action='store_true', help="time fla-core's fused_chunk beside ours (it tunes itself first: minutes)")
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f'{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s, torch {torch.__version__}', flush=True)
    first_call()
    modes = {mode: getattr(fla_simple_gla, f'{mode}_simple_gla') for mode in options.mode or ('chunk', 'fused_chunk', 'parallel')}
    if options.fla:
        from fla.ops.simple_gla import fused_chunk_simple_gla as fla_fused_chunk

        modes['fla'] = fla_fused_chunk
    for shape in options.shape or SHAPES:
        for name, fn in modes.items():
            if shape[1] <= LONGEST.get(name, shape[1]):
                time_shape(name, fn, shape, bandwidth)


if __name__ == '__main__':
    main()
