"""Triton where there is one: without it the package still imports, and only CPU tensors can be computed."""

import torch

try:
    import triton
    import triton.language as tl

    INTERPRET = triton.knobs.runtime.interpret
except (ImportError, AttributeError):  # none, or one before 3.4, which has no knobs
    triton = None
    INTERPRET = False

    class _Absent:
        """Stands in for `triton.language` and for decorators while modules with kernels are being imported."""

        def __getattr__(self, name):
            return self

        def __call__(self, decorated=None, **options):
            return self if decorated is None else decorated

    tl = _Absent()

jit = tl if triton is None else triton.jit


def scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Device memory for the tensor descriptors that a kernel makes, for `triton.set_allocator`."""
    return torch.empty(size, dtype=torch.int8, device='cuda')


def runs_kernels(x: torch.Tensor) -> bool:
    """Whether x is computed by a kernel: on an accelerator, or on the CPU in Triton's interpreter."""
    if x.device.type == 'cpu':
        return INTERPRET
    if triton is None:
        raise RuntimeError(f'tensors on {x.device} need the triton package (3.4 or newer): pip install triton')
    return True
