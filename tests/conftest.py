"""Where there is no GPU the kernels run in Triton's interpreter. It has to be chosen before triton is imported."""

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'
    # The interpreter runs many small operations, which gain nothing from threads.
    torch.set_num_threads(1)

from fake_gpu import gpu  # noqa: E402, F401  a fixture of several files


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers in each run, in whatever order the tests run. PyTorch's own seed is random."""
    torch.manual_seed(0)


@pytest.fixture(scope='module')
def untuned():
    """Gives each kernel of fla one configuration. To tune them takes minutes, and only the numbers are compared."""
    for package in ('simple_gla', 'retention', 'lightning_attn'):
        pytest.importorskip(f'fla.ops.{package}', reason='fla-core is not installed')
    from triton.runtime.autotuner import Autotuner

    for tuner in gc.get_objects():
        if issubclass(type(tuner), Autotuner):  # isinstance asks a proxy for its object, which may be gone
            tuner.configs = tuner.configs[:1]
