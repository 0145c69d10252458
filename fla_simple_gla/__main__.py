"""Prints what to paste into a bug report.

    python -m fla_simple_gla

Versions; the GPU; which kernels are chosen, and why; a check of every mode against naive. The exit status is 1 if a
mode is wrong.
"""

import os
import platform
import sys
from collections.abc import Callable

import torch

import fla_simple_gla

from ._driver import why_not_direct
from ._triton import INTERPRET, runs_kernels, triton
from .hopper import why_no_sweeps

DIMS = ((64, 64), (128, 128), (256, 256), (512, 512), (100, 60))
# relative RMS errors of outputs and gradients against naive in fp64
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
MODES = ('chunk', 'fused_chunk', 'fused_recurrent', 'parallel')


def short(dtype: torch.dtype) -> str:
    """The usual abbreviation of a dtype."""
    return {torch.float32: 'fp32', torch.float16: 'fp16', torch.bfloat16: 'bf16'}[dtype]


def print_versions(device: torch.device) -> None:
    print(f'fla_simple_gla {fla_simple_gla.__version__}, {os.path.dirname(__file__)}')
    triton_version = triton.__version__ if triton else 'not installed'
    print(f'python {platform.python_version()}, torch {torch.__version__}, triton {triton_version}')
    print(f'{platform.platform()}')
    for name in sorted(name for name in os.environ if name.startswith(('FLA_SIMPLE_GLA', 'TRITON_'))):
        print(f'{name}={os.environ[name]}')
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        runtime = f'ROCm {torch.version.hip}' if torch.version.hip else f'CUDA {torch.version.cuda}'
        print(f'GPU: {properties.name}, compute capability {properties.major}.{properties.minor}, {runtime}')
    else:
        computed_by = "the kernels in Triton's interpreter" if INTERPRET else 'the naive functions'
        print(f'GPU: none; CPU tensors are computed by {computed_by}')


def print_kernels(device: torch.device) -> None:
    reason = why_not_direct()
    print(f'launches: by the CUDA driver{"" if reason is None else f": no, by triton: {reason}"}')
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for K, V in DIMS:
            reason = why_no_sweeps(K, V, dtype, device)
            kernels = 'for Hopper' if reason is None else f'plain: {reason}'
            print(f'kernels of chunk and fused_chunk, {short(dtype)}, K {K}, V {V}: {kernels}')


def worst_error(mode: str, dtype: torch.dtype, D: int, device: torch.device) -> float:
    """The largest relative RMS error of o and of the gradients of q, k, v and g against naive in fp64."""
    generator = torch.Generator().manual_seed(0)
    T = 200 if device.type == 'cuda' else 70
    q, k, v, do = (torch.randn(2, T, 2, D, generator=generator) for _ in range(4))
    g = torch.nn.functional.logsigmoid(torch.randn(2, T, 2, generator=generator) + 3)
    inputs = [*(x.to(device, dtype) for x in (q, k, v)), g.to(device)]
    do = do.to(device, dtype)

    def results(fn: Callable, tensors: list[torch.Tensor], do: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        o, *_ = fn(*leaves)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    found = results(getattr(fla_simple_gla, f'{mode}_simple_gla'), inputs, do)
    expected = results(fla_simple_gla.naive_chunk_simple_gla, [x.double() for x in inputs], do.double())
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected))


def check_modes(device: torch.device) -> bool:
    """Whether every mode is right; prints the errors of each."""
    right = True
    # few, since kernels that were never run on this machine are compiled first
    dims = {torch.bfloat16: (64, 128, 256), torch.float16: (128,), torch.float32: (128,)}
    for mode in MODES:
        cells = []
        for dtype in dims:
            for D in dims[dtype] if device.type == 'cuda' else (16,):
                try:
                    error = worst_error(mode, dtype, D, device)
                except Exception as problem:  # noqa: BLE001 (any error belongs into the report)
                    cells.append(f'{short(dtype)} D {D} {type(problem).__name__}: {problem}')
                    right = False
                    continue
                wrong = not error <= TOLERANCES[dtype]
                right &= not wrong
                cells.append(f'{short(dtype)} D {D} {error:.1e}{" WRONG" if wrong else ""}')
        print(f'{mode}: error against naive in fp64: {", ".join(cells)}')
    return right


def main() -> None:
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    print_versions(device)
    if device.type == 'cuda' and triton is not None:
        print_kernels(device)
    elif runs_kernels(torch.zeros(1)):
        print('kernels: plain')
    right = check_modes(device)
    print('all modes are right' if right else 'some modes are WRONG')
    sys.exit(not right)


if __name__ == '__main__':
    main()
