"""The sums over heads that share q and k."""

import pytest
import torch
from harness import DEVICE, rms_error

from fla_simple_gla._heads import sum_heads


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('heads, HK, K', [(1, 1, 8), (6, 2, 24), (9, 1, 100), (17, 1, 64), (40, 4, 1)])
def test_sum_of_heads(heads, HK, K, dtype):
    """In fp32, with one rounding at the end."""
    x = torch.zeros(2, 13, HK, K, device=DEVICE, dtype=dtype)
    dx = torch.randn(2, 13, heads, K, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    found, expected = sum_heads(dx, x), dx.double().unflatten(2, (HK, -1)).sum(3)
    assert found.shape == x.shape and found.dtype == dtype
    assert rms_error(found, expected) <= torch.finfo(dtype).eps
