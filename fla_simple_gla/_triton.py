"""Triton where there is one, and what is known of its versions. Without it the package imports, and CPU tensors can be computed."""

import functools
import os
import warnings

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

# The versions of triton of which more is known than that the plain kernels are right.
#   direct: which parameters a compiled kernel takes, so that the CUDA driver can be called without triton (`_driver.py`)
#   hopper: the kernels for Hopper compile, with no wait after every product of the tensor cores
#   wide: so do those for dims over 128 (the ptxas of 3.9 puts such waits there: C7512)
# All were compiled; those of 3.6 were measured and tested on a GPU. With other versions every call has the same results, more slowly.
KNOWN = {
    '3.6': {'direct', 'hopper', 'wide'},
    '3.7': {'direct', 'hopper', 'wide'},
    '3.8': {'direct', 'hopper', 'wide'},
    '3.9': {'direct', 'hopper'},
}
WHAT = {
    'direct': 'kernels are launched by triton and not by the CUDA driver, which keeps the host longer',
    'hopper': 'the kernels for Hopper are off, and slower ones run in their place',
    'wide': 'the kernels for Hopper are off for K or V over 128, and slower ones run in their place',
}


def version() -> str:
    return '.'.join(triton.__version__.split('.')[:2])


def why_not(feature: str) -> str | None:
    """Why a feature of `KNOWN` is off with this version of triton; None where it is on."""
    if triton is None:
        return 'triton is not installed'
    if feature in KNOWN.get(version(), ()):
        return None
    tested = ', '.join(v for v, features in KNOWN.items() if feature in features)
    return f'triton {triton.__version__} is not one of the versions that this was made for ({tested})'


@functools.cache
def warn_once(feature: str) -> None:
    warnings.warn(f'fla_simple_gla: {WHAT[feature]}: {why_not(feature)}. The results are the same.', stacklevel=2)


def switched_off(variable: str) -> bool:
    return os.environ.get(variable) == '0'


def scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Device memory for the tensor descriptors that a kernel makes, for `triton.set_allocator`."""
    return torch.empty(size, dtype=torch.int8, device='cuda')


def runs_kernels(x: torch.Tensor) -> bool:
    """Whether x is computed by a kernel: on an accelerator, or on the CPU in Triton's interpreter.

    The interpreter multiplies bf16 wrongly, and no kernel has fp64: these are for the naive functions on the CPU.
    """
    if x.device.type == 'cpu':
        return INTERPRET and x.dtype in (torch.float32, torch.float16)
    if triton is None:
        raise RuntimeError(f'tensors on {x.device} need the triton package (3.4 or newer): pip install triton')
    return True


def check_interpreter() -> None:
    """Triton decides at its own import whether its library is interpreted: `TRITON_INTERPRET` must not change after that."""
    if triton is None:
        return
    interpreted = type(tl.cdiv).__name__ == 'InterpretedFunction'
    if interpreted != bool(INTERPRET):
        state = 'without' if INTERPRET else 'with'
        raise ImportError(
            f'triton was imported {state} TRITON_INTERPRET=1, and fla_simple_gla otherwise: set the variable before the first import of '
            'triton (which torch may import too), and leave it as it is'
        )


check_interpreter()
