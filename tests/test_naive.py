"""The specification: the equation, the agreement of its three forms in fp64, and gradients by finite differences."""

import pytest
import torch

from fla_simple_gla import naive_chunk_simple_gla, naive_parallel_simple_gla, naive_recurrent_simple_gla

INF = float('inf')


def make(B=2, T=37, HK=1, H=2, K=3, V=4, resets=True):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(B, T, heads, dim, generator=generator, dtype=torch.float64)
        for heads, dim in ((HK, K), (HK, K), (H, V))
    )
    g = -torch.rand(B, T, H, generator=generator, dtype=torch.float64)
    if resets:
        g[:, 5], g[:, 9], g[:, 10] = -INF, -1e30, 0.5
    return q, k, v, g


def test_equation():
    """The recurrence for one head, written without functions of the library."""
    q, k, v, g = make(B=1, H=1)
    S = torch.randn(3, 4, dtype=torch.float64)
    o, final = naive_recurrent_simple_gla(q, k, v, g, scale=0.7, initial_state=S[None, None])
    for t in range(q.shape[1]):
        S = g[0, t, 0].exp() * S + torch.outer(k[0, t, 0], v[0, t, 0])
        torch.testing.assert_close(o[0, t, 0], 0.7 * S.T @ q[0, t, 0])
    torch.testing.assert_close(final[0, 0], S)


@pytest.mark.parametrize('cu_seqlens', [None, (0, 1, 1, 20, 33)])
@pytest.mark.parametrize('gate', ['g', 'gamma', None])
def test_forms_agree(cu_seqlens, gate):
    q, k, v, g = make(B=1 if cu_seqlens else 2)
    N = len(cu_seqlens) - 1 if cu_seqlens else 2
    cu_seqlens = cu_seqlens and torch.tensor(cu_seqlens)
    gates = {'g': {'g': g}, 'gamma': {'g_gamma': torch.tensor([-0.1, -2.0], dtype=torch.float64)}, None: {}}[gate]
    h0 = torch.randn(N, 2, 3, 4, dtype=torch.float64)
    o, S = naive_recurrent_simple_gla(q, k, v, initial_state=h0, cu_seqlens=cu_seqlens, **gates)
    for chunk_size in (1, 8, 64):
        o2, S2 = naive_chunk_simple_gla(
            q,
            k,
            v,
            initial_state=h0,
            output_final_state=True,
            chunk_size=chunk_size,
            cu_seqlens=cu_seqlens,
            **gates,
        )
        torch.testing.assert_close(o2, o)
        torch.testing.assert_close(S2, S)
    o, _ = naive_recurrent_simple_gla(q, k, v, cu_seqlens=cu_seqlens, **gates)
    o3, A = naive_parallel_simple_gla(q, k, v, cu_seqlens=cu_seqlens, **gates)
    torch.testing.assert_close(o3, o)
    torch.testing.assert_close(torch.einsum('bhij,bjhv->bihv', A, v), o)


@pytest.mark.parametrize('form', [naive_recurrent_simple_gla, naive_chunk_simple_gla])
def test_gradients_are_those_of_finite_differences(form):
    q, k, v, g = make(B=1, T=6, resets=False)
    h0 = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, g, h0)]

    def fn(q, k, v, g, h0):
        return form(q, k, v, g, initial_state=h0, output_final_state=True)

    assert torch.autograd.gradcheck(fn, inputs)


def test_reverse_is_the_flipped_sequence():
    q, k, v, g = make()
    o, S = naive_recurrent_simple_gla(q, k, v, g, reverse=True)
    o2, S2 = naive_recurrent_simple_gla(*(x.flip(1) for x in (q, k, v, g)))
    torch.testing.assert_close(o, o2.flip(1))
    torch.testing.assert_close(S, S2)


def test_dtypes_and_defaults():
    q, k, v, g = (x.bfloat16() for x in make())
    for form in (naive_recurrent_simple_gla, naive_chunk_simple_gla, naive_parallel_simple_gla):
        o, _ = form(q, k, v, g)
        assert o.dtype == torch.bfloat16 and o.shape == v.shape
    assert naive_recurrent_simple_gla(q, k, v, g)[1].dtype == torch.float32
    assert naive_recurrent_simple_gla(q, k, v, g, output_final_state=False)[1] is None
    assert naive_chunk_simple_gla(q, k, v, g)[1] is None
    with pytest.raises(ValueError, match='g_gamma'):
        naive_chunk_simple_gla(q, k, v, g, g_gamma=torch.zeros(2))
