"""Large sizes on a GPU: many programs, offsets above int32, a million tokens, and calls that do not wait."""

import pytest
import torch
from harness import (
    HALF,
    MODES,
    STATEFUL,
    TOLERANCE,
    Case,
    check,
    make_inputs,
    needs_gpu,
    reference,
    rms_error,
    run,
    tensors,
)

from fla_simple_gla import chunk_simple_gla, fused_recurrent_simple_gla, naive_chunk_simple_gla

pytestmark = needs_gpu

INF = float('inf')


@pytest.fixture
def memory_returned():
    """A test that needs much memory returns it to the GPU, where other processes need it."""
    yield
    torch.cuda.empty_cache()


def test_many_programs(memory_returned):
    """The batch has more heads than the second dimension of a grid can have programs."""
    for B, H in ((70_000, 1), (1, 70_000)):
        for mode in MODES:
            case = Case(3, B=B, H=H, K=16, V=16).of(mode)
            inputs = make_inputs(case)
            check(case, run(MODES[mode], case, inputs), reference(case, inputs))


@pytest.mark.parametrize(
    'mode, layout, K, V',
    [
        ('chunk', 'contiguous', 128, 8), ('chunk', 'heads_first', 8, 128), ('fused_chunk', 'heads_first', 128, 8),
        ('parallel', 'contiguous', 128, 8), ('parallel', 'heads_first', 8, 128),
    ],
)  # fmt: skip
def test_more_elements_than_int32_counts(mode, layout, K, V, memory_returned):
    """The tensors have 2.4e9 numbers. The last tokens are compared, which a reset separates from the others."""
    # The quadratic mode needs memory for the gate gradient that grows with the square of T.
    T, H, tail = (72_000, 256, 1000) if mode == 'parallel' else (1_150_000, 16, 1000)

    def random(D):
        shape = (1, T, H, D) if layout == 'contiguous' else (1, H, T, D)
        x = torch.randn(shape, dtype=torch.bfloat16, device='cuda')
        return x if layout == 'contiguous' else x.transpose(1, 2)

    q, k, v, do = random(K), random(K), random(V), random(V)
    assert max(q.numel(), v.numel()) > 2**31
    # With these gates the quadratic mode skips nearly all tiles.
    g = torch.full((1, T, H), -5.0 if mode == 'parallel' else -0.05, device='cuda')
    g[:, -tail] = -INF
    results = []
    for form, inputs in (
        (MODES[mode], (q, k, v, g)),
        (naive_chunk_simple_gla, tuple(x[:, -tail:].double() for x in (q, k, v, g))),
    ):
        leaves = [x.detach().requires_grad_() for x in inputs]
        o, ht = form(*leaves, **({'output_final_state': True} if mode in STATEFUL else {}))
        gradients = torch.autograd.grad(o, leaves, do[:, -o.shape[1] :].to(o.dtype))
        results.append([x.detach()[:, -tail:] for x in (o, *gradients)] + ([] if ht is None else [ht.detach()]))
    for name, found, expected in zip(('o', 'dq', 'dk', 'dv', 'dg', 'ht'), *results):
        assert rms_error(found, expected) < TOLERANCE[q.dtype][name == 'dg'], name


@pytest.mark.parametrize('mode', STATEFUL)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_rows_of_a_state_further_apart_than_int32_counts(mode, dtype, memory_returned):
    inputs = make_inputs(Case(140, B=2, K=64, V=16, dtype=dtype))
    tokens = [inputs[x] for x in ('q', 'k', 'v', 'g')]
    slots = torch.tensor([2, 0], device='cuda')
    pool = torch.empty(64 * 2**26, dtype=torch.bfloat16, device='cuda').as_strided((3, 2, 64, 16), (32, 16, 2**26, 1))
    pool.copy_(torch.randn(3, 2, 64, 16, generator=torch.Generator().manual_seed(1)))
    expected, ht = naive_chunk_simple_gla(
        *(x.double() for x in tokens),
        initial_state=pool[slots].double(),
        output_final_state=True,
    )
    with torch.no_grad():
        o, _ = MODES[mode](*tokens, initial_state=pool, state_indices=slots)
    assert rms_error(o, expected) <= TOLERANCE[dtype][0]
    assert rms_error(pool[slots], ht) <= TOLERANCE[pool.dtype][0]


def test_a_million_tokens(memory_returned):
    """The chunk mode agrees with the recurrent mode. Its memory grows with T: that of its results and a tenth more.

    The tenth is needed for dg: a state every 256 tokens, beside dk and dv, and four numbers for each token and head.
    """
    H, D = 4, 64
    extra = []
    for T in (500_000, 1_000_000):
        torch.manual_seed(0)
        q, k, v, do = (torch.randn(1, T, H, D, dtype=torch.bfloat16, device='cuda') for _ in range(4))
        g = torch.nn.functional.logsigmoid(torch.randn(1, T, H, device='cuda') + 5)
        leaves = [x.requires_grad_() for x in (q, k, v, g)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        o, ht = chunk_simple_gla(*leaves, output_final_state=True)
        gradients = torch.autograd.grad(o, leaves, do)
        extra.append(torch.cuda.max_memory_allocated() - before)
        results = sum(x.nbytes for x in (o, ht, *gradients))
        assert extra[-1] < 1.1 * results, f'{extra[-1] / results:.3f}'
        assert all(x.isfinite().all() for x in gradients)
    assert extra[1] < 2.05 * extra[0]
    with torch.no_grad():
        expected, state = fused_recurrent_simple_gla(*leaves, output_final_state=True)
    assert rms_error(o.detach(), expected) < TOLERANCE[o.dtype][0]
    assert rms_error(ht.detach(), state) < TOLERANCE[o.dtype][0]


def test_gradients_of_shared_heads_are_summed_in_turn(memory_returned):
    """A backward holds dq or dk of every head, not both: they are summed as soon as they are there."""
    B, T, H, K, V = 4, 2048, 80, 128, 64
    q, k = torch.randn(2, B, T, 1, K, dtype=torch.bfloat16, device='cuda').requires_grad_().unbind()
    v, do = torch.randn(2, B, T, H, V, dtype=torch.bfloat16, device='cuda').requires_grad_().unbind()
    g = torch.full((B, T, H), -0.05, device='cuda', requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o, _ = chunk_simple_gla(q, k, v, g)
    torch.autograd.grad(o, (q, k, v, g), do)
    of_every_head = B * T * H * K * v.itemsize
    # Pairs of heads make half of it; then dv is there too, which is as large as that half. Beside these there are
    # anchors, a fifth, and numbers for each token and head. With dq and dk at once it would be 1.6 and more.
    assert torch.cuda.max_memory_allocated() - before < 1.35 * (o.nbytes + of_every_head)


def test_no_call_waits_for_the_gpu():
    """Forward and backward do not synchronise, with packed sequences either."""
    case = Case(200, K=64, V=64, dtype=HALF, cu_seqlens=(0, 64, 65, 190))
    inputs = make_inputs(case)
    cu_seqlens = torch.tensor(case.cu_seqlens, device='cuda')
    leaves = [x.requires_grad_() for x in tensors(inputs)]
    torch.cuda.set_sync_debug_mode('error')
    try:
        for mode in MODES.values():
            o, _ = mode(*leaves, cu_seqlens=cu_seqlens)
            torch.autograd.grad(o, leaves, inputs['do'])
    finally:
        torch.cuda.set_sync_debug_mode('default')
