"""The sums over heads that share q and k."""

import pytest
import torch
from harness import DEVICE, GPU, rms_error

from fla_simple_gla import _heads

# The interpreter does not round to bfloat16, it cuts off.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('heads, HK, K', [(1, 1, 8), (6, 2, 24), (9, 1, 100), (17, 1, 64), (40, 4, 1), (3, 1, 512)])
def test_sum_of_heads(heads, HK, K, dtype, monkeypatch):
    """In fp32, in the order of the heads, with one rounding at the end."""
    x = torch.zeros(2, 13, HK, K, device=DEVICE, dtype=dtype)
    dx = torch.randn(2, 13, heads, K, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    parts = dx.unflatten(2, (HK, -1)).unbind(3)
    memory = torch.full((x.numel() + 512,), torch.nan, device=DEVICE, dtype=dtype)
    monkeypatch.setattr(_heads, 'empty', lambda _, *shape: memory[: x.numel()].view(shape))
    total = _heads.sum_heads(dx, x)
    assert total.shape == x.shape
    assert memory[x.numel() :].isnan().all(), 'columns past K are written'
    assert torch.equal(total, sum(part.float() for part in parts).to(dtype))
    # of a sum of up to 17 numbers in fp32, and of its rounding
    assert rms_error(total, sum(part.double() for part in parts)) <= max(torch.finfo(dtype).eps / 2, 2e-7)
