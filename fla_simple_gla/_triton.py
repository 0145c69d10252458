"""Triton, and what is known of its versions. Without triton the package imports too, and computes CPU tensors."""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    INTERPRET = triton.knobs.runtime.interpret
except (ImportError, AttributeError):  # there is no triton, or one before 3.4, which has no knobs
    triton = None
    INTERPRET = False

    class _Absent:
        """Stands in for `triton.language` and for decorators while modules with kernels are imported."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, decorated: Any = None, **options: Any) -> Any:
            return self if decorated is None else decorated

    tl = _Absent()

jit = tl if triton is None else triton.jit


def kernel_name(name: str) -> Callable:
    """For `repr` of a kernel: its name in a profile, with what it makes (ROLE) and the dims it is compiled for."""

    def tell(specialization: Any) -> str:
        constants = specialization.constants
        role = constants.get('ROLE')
        dims = [f'{dim}{constants[dim]}' for dim in (('K', 'V') if 'K' in constants else ('BK',)) if dim in constants]
        return '_'.join(['simple_gla', name, *filter(None, [role]), *dims])

    return tell


# The plain kernels are right with triton 3.4 and later. These versions have been found to support more:
#   direct: the parameters of a compiled kernel are known, so that the CUDA driver can launch it (`_driver.py`)
#   hopper: the kernels for Hopper compile without a wait after every product of the tensor cores (the ptxas of 3.8
#       warns of such waits, C7514, in the sweeps for o and dq up to D 128 that are given no states: not measured)
#   wide: so do those for dims over 128 (the ptxas of 3.9 adds such waits there, and warns of them as C7512)
# The kernels were compiled with all of these versions; those of 3.6 were measured and tested on a GPU. With other
# versions every call has the same results, but takes longer.
KNOWN: dict[str, set[str]] = {
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
    """The major and minor version of triton."""
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
    """Warn that a feature of `KNOWN` is off with this version of triton."""
    warnings.warn(f'fla_simple_gla: {WHAT[feature]}: {why_not(feature)}. The results are the same.', stacklevel=2)


def switched_off(variable: str) -> bool:
    """Whether this variable is 0 in the environment."""
    return os.environ.get(variable) == '0'


def scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Device memory for the tensor descriptors that a kernel makes, for `triton.set_allocator`."""
    return torch.empty(size, dtype=torch.int8, device='cuda')


def runs_kernels(x: torch.Tensor) -> bool:
    """Whether kernels compute x: on an accelerator, or on the CPU in Triton's interpreter.

    The interpreter multiplies bf16 wrongly, and kernels do not take fp64: naive functions compute these on the CPU.
    """
    if x.device.type == 'cpu':
        return INTERPRET and x.dtype in (torch.float32, torch.float16)
    if triton is None:
        raise RuntimeError(
            f'tensors on {x.device} are computed by kernels that need triton 3.4 or newer, which is not installed. '
            'CUDA builds of PyTorch bring triton; with another build, install it: pip install triton'
        )
    return True


def check_interpreter() -> None:
    """Raise an `ImportError` if `TRITON_INTERPRET` has changed since triton was imported.

    Triton decides at its own import whether its library is interpreted.
    """
    if triton is None:
        return
    interpreted = type(tl.cdiv).__name__ == 'InterpretedFunction'
    if interpreted != bool(INTERPRET):
        state = 'without' if INTERPRET else 'with'
        raise ImportError(
            f'triton was imported {state} TRITON_INTERPRET=1, and fla_simple_gla otherwise: set the variable before '
            'the first import of triton (which torch may import too), and leave it as it is'
        )


check_interpreter()
