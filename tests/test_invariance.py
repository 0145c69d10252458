"""Results that do not depend on how a call is made: in pieces, by another mode, packed, in a batch, or twice."""

import dataclasses

import pytest
import torch
from harness import (
    CHUNKED,
    DEVICE,
    GPU,
    HALF,
    INVARIANT,
    LENGTH,
    MODES,
    STATEFUL,
    Case,
    D,
    assert_same_bits,
    check,
    make_inputs,
    mark_slow,
    reference,
    run,
    slow_rows,
    tensors,
)


@pytest.mark.parametrize('mode', mark_slow(STATEFUL, 'segments'))
def test_pieces_equal_the_whole(mode):
    """Two calls, which pass a state on, give the outputs and gradients of one call."""
    case = Case(LENGTH[mode], K=D, V=D)
    inputs = make_inputs(case)
    cut = case.T // 3 + 1

    def in_pieces(q, k, v, g, initial_state, **options):
        o1, state = MODES[mode](q[:, :cut], k[:, :cut], v[:, :cut], g[:, :cut], initial_state=initial_state, **options)
        o2, state = MODES[mode](q[:, cut:], k[:, cut:], v[:, cut:], g[:, cut:], initial_state=state, **options)
        return torch.cat([o1, o2], 1), state

    check(case, run(in_pieces, case, inputs), reference(case, inputs))


@pytest.mark.parametrize(
    'first, second',
    [
        ('chunk', 'fused_recurrent'),
        ('fused_recurrent', 'fused_chunk'),
        *slow_rows([('chunk', 'fused_chunk'), ('fused_chunk', 'chunk'), ('fused_chunk', 'fused_recurrent')]),
        *slow_rows([('fused_recurrent', 'chunk')]),
    ],
)
def test_modes_hand_states_to_each_other(first, second):
    case = Case(40, K=D, V=D, B=2, state_v_first=True)
    inputs = make_inputs(case)

    def handed_over(q, k, v, g, initial_state, **options):
        o1, state = MODES[first](q[:, :25], k[:, :25], v[:, :25], g[:, :25], initial_state=initial_state, **options)
        o2, state = MODES[second](q[:, 25:], k[:, 25:], v[:, 25:], g[:, 25:], initial_state=state, **options)
        return torch.cat([o1, o2], 1), state

    check(case, run(handed_over, case, inputs), reference(case, inputs))


@pytest.mark.parametrize('mode', MODES)
def test_causality(mode):
    case = Case(LENGTH[mode], K=D, V=D)
    inputs = make_inputs(case)
    before, _ = MODES[mode](*tensors(inputs))
    cut = case.T // 2 + 3
    for x in tensors(inputs):
        x[:, cut:] = -3.0
    after, _ = MODES[mode](*tensors(inputs))
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert not torch.equal(before[:, cut:], after[:, cut:])


@pytest.mark.parametrize('mode', mark_slow(INVARIANT, 'segments', 'parallel'))
@pytest.mark.parametrize('dtype', mark_slow([torch.float32, HALF], HALF), ids=str)
def test_a_packed_sequence_is_that_sequence_alone(mode, dtype):
    """The outputs, states and gradients of a sequence have the same bits wherever it starts."""
    bounds = (0, 33, 33, 34, LENGTH[mode] + 34) if mode in CHUNKED else (0, 5, 5, 6, LENGTH[mode])
    case = Case(bounds[-1] + 9, K=D, V=D, dtype=dtype, cu_seqlens=bounds).of(mode)
    inputs = make_inputs(case)
    packed = run(MODES[mode], case, inputs)
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        alone = {
            name: x if x is None else x[n : n + 1] if name in ('initial_state', 'dht') else x[:, start:end]
            for name, x in inputs.items()
        }
        expected = run(MODES[mode], Case(end - start, K=D, V=D, dtype=dtype).of(mode), alone)
        found = {
            name: x[n : n + 1] if name in ('ht', 'dinitial_state') else x[:, start:end] for name, x in packed.items()
        }
        assert_same_bits(found, expected)
    for name, x in packed.items():
        if name not in ('ht', 'dinitial_state'):
            assert (x[:, bounds[-1] :] == 0).all(), name


@pytest.mark.parametrize('mode, tail', [*((mode, 11) for mode in MODES), *slow_rows((mode, 500) for mode in CHUNKED)])
@pytest.mark.parametrize('dtype', mark_slow([torch.float32, HALF], HALF), ids=str)
def test_tokens_after_the_last_sequence_are_not_read(mode, tail, dtype):
    """Padding may hold NaN. Its outputs and gradients are zero, and those of other tokens do not depend on it."""
    case = Case(19 + tail, K=D, V=D, dtype=dtype, cu_seqlens=(0, 7, 19)).of(mode)
    inputs = make_inputs(case)
    expected = reference(case, inputs)
    for name in ('q', 'k', 'v', 'g', 'do'):
        inputs[name][:, 19:] = float('nan')
    results = run(MODES[mode], case, inputs)
    check(case, results, expected)
    assert all((results[name][:, 19:] == 0).all() for name in ('o', 'dq', 'dk', 'dv', 'dg'))


@pytest.mark.parametrize('mode', mark_slow(INVARIANT, 'segments', 'fused_recurrent', 'parallel'))
@pytest.mark.parametrize('dtype', mark_slow([torch.float32, HALF], HALF), ids=str)
def test_batch_invariance(mode, dtype):
    case = Case(LENGTH[mode], B=3, K=D, V=D, dtype=dtype).of(mode)
    inputs = make_inputs(case)
    whole = run(MODES[mode], case, inputs)
    row = {name: x if x is None else x[1:2].clone() for name, x in inputs.items()}
    alone = run(MODES[mode], case, row)
    assert_same_bits({name: x[1:2] for name, x in whole.items()}, alone)
    # The other rows do not even need to hold numbers.
    for x in inputs.values():
        if x is not None:
            x[0] = x[2] = float('nan')
    broken = run(MODES[mode], case, inputs)
    assert_same_bits({name: x[1:2] for name, x in broken.items()}, alone)


@pytest.mark.parametrize('packed', mark_slow([False, True], False))
@pytest.mark.parametrize('name', mark_slow(['k', 'v', 'g'], 'k', 'g'))
@pytest.mark.parametrize('mode', mark_slow(MODES, 'segments', 'parallel'))
def test_nan_stays_in_its_head_and_sequence(mode, name, packed):
    """NaN may reach earlier tokens of its chunk, and all heads that share its key."""
    T = 12 if mode == 'fused_recurrent' and not GPU else 140
    bounds = (0, T // 3, 2 * T // 3, T)
    shape = dict(cu_seqlens=bounds) if packed else dict(B=3)
    case = dataclasses.replace(
        Case(T, H=4, HK=2, K=16, V=16, **shape).of(mode), initial_state=False, output_final_state=False
    )
    inputs = make_inputs(case)
    given = {key: inputs[key] for key in ('q', 'k', 'v', 'g')}
    options = {'cu_seqlens': torch.tensor(bounds, device=DEVICE)} if packed else {}
    expected, _ = MODES[mode](**given, **options)
    given[name] = given[name].clone()
    row, token = (0, bounds[1] + 3) if packed else (1, 3)
    given[name][row, token, 1] = float('nan')
    found, _ = MODES[mode](**given, **options)
    touched = torch.zeros_like(found, dtype=torch.bool)
    tokens = slice(bounds[1], bounds[2]) if packed else slice(None)
    touched[row, tokens, slice(2, 4) if name == 'k' else slice(1, 2)] = True
    assert found[touched].isnan().any()
    assert torch.equal(found[~touched], expected[~touched])


@pytest.mark.parametrize('dim', [64, 128, 256, 512] if GPU else [16])
@pytest.mark.parametrize('dtype', mark_slow([torch.float32, HALF], HALF), ids=str)
@pytest.mark.parametrize('mode', mark_slow(MODES, 'segments', 'fused_recurrent'))
def test_same_bits_every_time(mode, dtype, dim):
    case = Case(LENGTH[mode] if GPU else 20, B=2, H=8 if GPU else 2, K=dim, V=dim, dtype=dtype).of(mode)
    inputs = make_inputs(case)
    first = run(MODES[mode], case, inputs)
    for _ in range(20 if GPU else 1):
        assert_same_bits(run(MODES[mode], case, inputs), first)
