"""Calls without a GPU: the CPU path, Triton's interpreter, and checks of the contents of tensors."""

import dataclasses

import pytest
import torch
from harness import GPU, MODES, STATEFUL, Case, check, make_inputs, needs_gpu, reference, rms_error, run

from fla_simple_gla import naive_chunk_simple_gla, naive_parallel_simple_gla, naive_recurrent_simple_gla
from fla_simple_gla._operators import checks_on_gpu

MODES_HERE = [mode for mode in MODES if mode != 'segments']
CASE = Case(20, K=16, V=8)


@pytest.fixture(params=['interpreter', 'CPU path'])
def path(request, monkeypatch):
    if request.param == 'CPU path':
        monkeypatch.setattr('fla_simple_gla._triton.INTERPRET', False)
    elif GPU:
        pytest.skip('the kernels run on the GPU')
    return request.param


@pytest.mark.parametrize('change', [
    dict(dtype=torch.bfloat16),
    dict(dtype=torch.bfloat16, gate_dtype=torch.bfloat16, state_dtype=torch.bfloat16, cu_seqlens=(0, 7, 18)),
    dict(gate_dtype=torch.bfloat16, state_dtype=torch.bfloat16), dict(dtype=torch.float16),
], ids=str)  # fmt: skip
@pytest.mark.parametrize('mode', MODES_HERE)
def test_dtypes(mode, change, path):
    case = dataclasses.replace(CASE, **change).of(mode)
    inputs = make_inputs(case, 'cpu')
    check(case, run(MODES[mode], case, inputs), reference(case, inputs))


@pytest.mark.parametrize('mode', MODES_HERE)
def test_fp64(mode, path):
    case = CASE.of(mode)
    inputs = {name: x if x is None else x.double() for name, x in make_inputs(case, 'cpu').items()}
    results, expected = run(MODES[mode], case, inputs), reference(case, inputs)
    for name, x in results.items():
        assert x.dtype == torch.float64
        torch.testing.assert_close(x, expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('cu_seqlens', [None, (0, 0, 0)])
@pytest.mark.parametrize('mode', [*STATEFUL, 'naive_chunk', 'naive_recurrent'])
def test_final_states_are_not_the_initial_ones(mode, cu_seqlens, path):
    """A write to one does not change the other, without tokens either."""
    fn = MODES.get(mode) or {'naive_chunk': naive_chunk_simple_gla, 'naive_recurrent': naive_recurrent_simple_gla}[mode]
    q, state = torch.zeros(1, 0, 2, 8), torch.ones(1 if cu_seqlens is None else 2, 2, 8, 8)
    packed = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    _, final_state = fn(q, q, q, initial_state=state, output_final_state=True, cu_seqlens=packed)
    final_state.zero_()
    assert (state == 1).all()


@pytest.mark.parametrize('mode', MODES)
def test_cpu_path(mode, monkeypatch):
    """The functions compute CPU tensors by the naive ones, with gradients, states and packed sequences."""
    monkeypatch.setattr('fla_simple_gla._triton.INTERPRET', False)
    for case in (
        Case(70, B=2, H=4, HK=2, K=6, V=5, state_v_first=True),
        Case(40, K=6, V=5, gate='gamma', cu_seqlens=(0, 7, 7, 30), initial_state=False),
        Case(30, K=6, V=5, gate=None, dtype=torch.bfloat16),
    ):
        case = case.of(mode)
        inputs = make_inputs(case, 'cpu')
        check(case, run(MODES[mode], case, inputs), reference(case, inputs))
    case = Case(30).of(mode)
    inputs = {name: None if x is None else x.double() for name, x in make_inputs(case, 'cpu').items()}
    results, expected = run(MODES[mode], case, inputs), reference(case, inputs)
    assert results['o'].dtype == torch.float64
    assert all(rms_error(results[name], expected[name]) < 1e-12 for name in expected)


WRONG_BOUNDS = [
    ((0, 6, 3, 8), 'cu_seqlens must never decrease, got 6 and then 3 at index 2'),
    ((2, 5, 8), 'cu_seqlens must begin with 0, got 2'),
    ((-2, 5, 8), 'cu_seqlens must begin with 0, got -2'),
    ((0, 9), 'cu_seqlens must not end beyond the 8 tokens, got 9'),
]  # fmt: skip


@pytest.mark.parametrize('bounds, message', WRONG_BOUNDS)
@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
def test_wrong_boundaries(bounds, message, compiled, path):
    q, cu_seqlens = torch.ones(1, 8, 2, 8), torch.tensor(bounds)
    for mode in ('chunk',) if compiled else MODES_HERE:
        fn = torch.compile(MODES[mode], backend='eager') if compiled else MODES[mode]
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                fn(q, q, q, cu_seqlens=cu_seqlens)
    for naive in (naive_chunk_simple_gla, naive_recurrent_simple_gla, naive_parallel_simple_gla):
        with pytest.raises(ValueError, match=message):
            naive(q, q, q, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize('mode', ['chunk', 'parallel'])
def test_a_copy_that_disagrees(mode, path):
    q = torch.ones(1, 8, 2, 8)
    with pytest.raises(ValueError, match='cu_seqlens_cpu must equal cu_seqlens, got 4 at index 1 where that has 5'):
        MODES[mode](q, q, q, cu_seqlens=torch.tensor([0, 5, 8]), cu_seqlens_cpu=torch.tensor([0, 4, 8]))


@pytest.mark.parametrize('indices, message', [
    ((0, 4), 'state_indices must be below the 4 slots of the pool, got 4 at index 1'),
    ((2, 2), 'state_indices must not name a slot twice, got 2 at index 0 and at index 1'),
])  # fmt: skip
@pytest.mark.parametrize('mode', ['chunk', 'fused_chunk', 'fused_recurrent'])
def test_wrong_slots(mode, indices, message, path):
    q, pool = torch.ones(2, 3, 2, 8), torch.ones(4, 2, 8, 8)
    with pytest.raises(ValueError, match=message):
        MODES[mode](q, q, q, initial_state=pool, state_indices=torch.tensor(indices))
    assert (pool == 1).all()


@needs_gpu
def test_contents_are_checked_on_the_gpu_where_asked(monkeypatch):
    q, cu_seqlens = torch.ones(1, 8, 2, 8, device='cuda'), torch.tensor([0, 9], device='cuda')
    for mode in MODES_HERE:
        MODES[mode](q, q, q, cu_seqlens=cu_seqlens)
    monkeypatch.setenv('FLA_SIMPLE_GLA_CHECK', '1')
    monkeypatch.setattr('fla_simple_gla._operators.checks_on_gpu', checks_on_gpu.__wrapped__)  # without its cache
    for mode in MODES_HERE:
        with pytest.raises(ValueError, match='cu_seqlens must not end beyond the 8 tokens, got 9'):
            MODES[mode](q, q, q, cu_seqlens=cu_seqlens)
