"""Wrong contents of `cu_seqlens` and `state_indices`: no kernel leaves a tensor or leaves out a result.

Bounds are moved into 0..T. A sequence that would end before it begins is empty. Tokens in no sequence get zeros.
An index that is no slot of the pool is padding. Sequences with right bounds keep their results.
"""

import dataclasses
import itertools
import random

import pytest
import torch
from harness import (
    DEVICE,
    GPU,
    MODES,
    STATEFUL,
    Case,
    check,
    launch_by_triton,
    make_inputs,
    mark_slow,
    poisoned_memory,
    reference,
    rms_error,
    run,
    slow_rows,
)

from fla_simple_gla import fused_recurrent_simple_gla
from fla_simple_gla._validation import check_contents

DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]
# Without a GPU the chunk mode does not cut sequences, and does what fused_chunk does.
DIFFERENT = [mode for mode in MODES if GPU or mode != 'chunk']
MAX32, MAX64 = 2**31 - 1, 2**63 - 1
TOKENS = {'o', 'dq', 'dk', 'dv', 'dg'}

# Numbers of tokens, and bounds that never decrease.
SORTED = [
    (32, (0, 10, 40)), (32, (5, 20)), (32, (-2, 5, 8)), (32, (5, 5, 11, 11, 70)), (32, (40, 50, 60)),
    (32, (-9, -3, -3)),
    (32, (2**40, 2**41)), (32, (-(2**40), 10, 2**40)), (32, (0, 2**32 + 5, 2**32 + 9)), (32, (-(2**32) + 7, 9)),
    (32, (-MAX64 - 1, MAX64)),
    (32, (32, 32)), (32, (31, 32)), (1, (-1, 0, 1, 2)), (1, (1, 1)), (0, (5, 9)),
]  # fmt: skip
SORTED32 = [(32, (-MAX32 - 1, 7, MAX32)), (32, (MAX32, MAX32)), (32, (3, 40, 50))]
# Bounds of several segments.
LONG = [
    (500, (0, 300, 900)),
    (500, (140, 440)),
    (500, (-5, 130, 2**40)),
    (400, (399, 399, 401)),
    (300, (300, 300, 300)),
]
# Bounds that decrease, and the sequences that share no token with others. These keep their results.
DECREASING = [
    (32, (0, 20, 20, 12, 12), [0]), (32, (0, 20, 12, 32), []), (32, (9, 0), []), (32, (40, 7, 7, 3, -8, 12), []),
    (32, (30, 20, 10), []),
    (32, (4, 10, 2**40, 9), [0]), (32, (0, 5, 3, 5, 3, 5, 11), [5]),
]  # fmt: skip
# Several blocks and segments begin in slots that a later sequence has too.
LONG_DECREASING = [
    (600, (600, 600, 0, 600)), (600, (0, 600, 0, 0, 100)), (600, (0, 600, 0, 600, 0)), (600, (400, 0, 600)),
    (600, (0, 600, 200)),
    (600, (600, 0)), (600, (0, 130, 600, 5, 700, -600, 260)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Switches off the check of contents, which would refuse them."""
    monkeypatch.setattr('fla_simple_gla._validation.check_contents', lambda *args: None, raising=False)


def moved(bounds, T):
    return [min(max(bound, 0), T) for bound in bounds]


def dim(dtype):
    """A dimension for which the kernels for Hopper are taken in bf16."""
    return 16 if dtype == torch.float32 else 64


def case_of(mode, T, bounds, dtype=torch.float32, **options):
    return Case(T, cu_seqlens=bounds, K=dim(dtype), V=dim(dtype), dtype=dtype, **options).of(mode)


def expected_of(case, inputs):
    """The results of naive for bounds that do not decrease."""
    first, *others = moved(case.cu_seqlens, case.T)
    by_token = {name: inputs[name][:, first:] for name in ('q', 'k', 'v', 'g', 'do') if inputs[name] is not None}
    bounds = 0, *(bound - first for bound in others)
    results = reference(dataclasses.replace(case, T=case.T - first, cu_seqlens=bounds), inputs | by_token)
    for name in TOKENS & results.keys():
        x = results[name]
        results[name] = torch.cat([x.new_zeros(1, first, *x.shape[2:]), x], 1)
    return results


def check_bounds(mode, case, inputs, results):
    """Compares with naive. In bf16 the error of few tokens varies: a call with moved bounds gives the same bits."""
    if case.dtype == torch.float32:
        check(case, results, expected_of(case, inputs))
    else:
        same = run(MODES[mode], dataclasses.replace(case, cu_seqlens=tuple(moved(case.cu_seqlens, case.T))), inputs)
        for name, x in results.items():
            assert torch.equal(x, same[name]), name
        assert rms_error(results['o'], expected_of(case, inputs)['o']) < 1e-2
    check_zeros(case, results)
    check_empty(case, inputs, results)


def in_no_sequence(case):
    bounds = moved(case.cu_seqlens, case.T)
    return [*range(min(bounds)), *range(max(bounds), case.T)]


def check_zeros(case, results):
    for name in TOKENS & results.keys():
        assert (results[name][:, in_no_sequence(case)] == 0).all(), name


def check_empty(case, inputs, results):
    """The final state of a sequence without tokens is its initial state."""
    if not case.initial_state:
        return
    bounds = moved(case.cu_seqlens, case.T)
    for n, (bos, eos) in enumerate(itertools.pairwise(bounds)):
        if eos <= bos:
            assert torch.equal(results['ht'][n], inputs['initial_state'][n].float()), n
            assert torch.equal(results['dinitial_state'][n], inputs['dht'][n].to(case.state_dtype)), n


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(
    'T, bounds', [*slow_rows(SORTED[:1]), *SORTED[1:3], *slow_rows(SORTED[3:]), *slow_rows(SORTED32)]
)
@pytest.mark.parametrize('mode', DIFFERENT)
def test_bounds_outside_of_the_batch(mode, T, bounds, dtype):
    narrow = (T, bounds) in SORTED32
    case = case_of(mode, T, bounds, dtype=dtype, cu_dtype=torch.int32 if narrow else torch.int64)
    inputs = make_inputs(case)
    check_bounds(mode, case, inputs, run(MODES[mode], case, inputs))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('T, bounds', LONG if GPU else slow_rows(LONG[:3]))
@pytest.mark.parametrize('mode', [*MODES] if GPU else ['segments'])
def test_bounds_of_several_segments(mode, T, bounds, dtype):
    for gate in ('g', None):
        case = case_of(mode, T, bounds, dtype=dtype, gate=gate)
        inputs = make_inputs(case)
        check_bounds(mode, case, inputs, run(MODES[mode], case, inputs))


@pytest.mark.parametrize('T, bounds', [SORTED[1], *slow_rows(SORTED[2:4])])
def test_backwards(T, bounds):
    case = case_of('fused_recurrent', T, bounds, reverse=True, state_v_first=True)
    inputs = make_inputs(case)
    results = run(fused_recurrent_simple_gla, case, inputs)
    check(case, results, expected_of(case, inputs))
    check_zeros(case, results)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('T, bounds, whole', [DECREASING[0], *slow_rows(DECREASING[1:])])
@pytest.mark.parametrize('mode', DIFFERENT)
def test_bounds_that_decrease(mode, T, bounds, whole, dtype):
    case = case_of(mode, T, bounds, dtype=dtype)
    inputs = make_inputs(case)
    results = run(MODES[mode], case, inputs)
    assert all(x.isfinite().all() for x in results.values())
    check_zeros(case, results)
    check_empty(case, inputs, results)
    for n in whole:
        # Other sequences do not write what its final state depends on.
        if case.output_final_state:
            bos, eos = moved(bounds, T)[n : n + 2]
            alone = dataclasses.replace(case, T=eos - bos, cu_seqlens=(0, eos - bos))
            of_sequence = {
                name: x[:, bos:eos] if name in ('q', 'k', 'v', 'g', 'do') else x for name, x in inputs.items()
            }
            for name in ('initial_state', 'dht'):
                of_sequence[name] = inputs[name][n : n + 1]
            expected = reference(alone, of_sequence)
            assert rms_error(results['ht'][n : n + 1], expected['ht']) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(
    'T, bounds', LONG_DECREASING if GPU else [LONG_DECREASING[0], *slow_rows(LONG_DECREASING[1:4])]
)
@pytest.mark.parametrize('mode', [*MODES] if GPU else ['segments'])
def test_bounds_that_decrease_by_several_segments(mode, T, bounds, dtype):
    case = case_of(mode, T, bounds, dtype=dtype)
    inputs = make_inputs(case)
    results = run(MODES[mode], case, inputs)
    for name, x in results.items():
        assert x.isfinite().all(), name
    check_zeros(case, results)
    check_empty(case, inputs, results)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('T, bounds', LONG_DECREASING[:1])
def test_anchor_blocks_that_segments_left_out(T, bounds, dtype, monkeypatch):
    """A search among the larger blocks does not find these blocks."""
    monkeypatch.setattr('fla_simple_gla.fused_chunk.anchor_tokens', lambda *_: 384)
    launch_by_triton(monkeypatch)
    results = run(MODES['segments'], case_of('segments', T, bounds, dtype=dtype))
    assert results['dg'].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('mode', DIFFERENT)
def test_any_bounds(mode, dtype):
    generator = random.Random(mode)
    T = 200 if mode == 'segments' else 150 if GPU else 40
    for i in range(30 if GPU else 12):
        N = generator.randint(1, 6)
        bounds = [generator.randint(-T, 2 * T) for _ in range(N + 1)]
        if i % 2:
            bounds.sort()
        case = case_of(
            mode, T, tuple(bounds), dtype=dtype, cu_dtype=(torch.int32, torch.int64)[i // 2 % 2], H=1, seed=i
        )
        inputs = make_inputs(case)
        results = run(MODES[mode], case, inputs)
        for name, x in results.items():
            assert x.isfinite().all(), (bounds, name)
        clamped = moved(bounds, T)
        if clamped == sorted(clamped):
            check_bounds(mode, case, inputs, results)
        else:
            check_zeros(case, results)
            check_empty(case, inputs, results)


def surrounded(x, around, dim=0):
    """A copy of x in the middle of a larger tensor, and that tensor."""
    shape = list(x.shape)
    shape[dim] += 8
    whole = torch.full(shape, around, dtype=x.dtype, device=x.device)
    inner = whole.narrow(dim, 4, x.shape[dim])
    inner.copy_(x)
    return inner, whole


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(
    'T, bounds',
    [SORTED[0], *slow_rows(SORTED[1:3]), *slow_rows(SORTED[7:8]), *slow_rows(LONG[:2] if GPU else LONG[:1])],
)
@pytest.mark.parametrize('mode', DIFFERENT)
def test_nothing_beside_the_inputs_is_read(mode, T, bounds, dtype):
    if T > 100 and mode != 'segments' and not GPU:
        pytest.skip('takes long in the interpreter')
    case = case_of(mode, T, bounds, dtype=dtype)
    inputs = make_inputs(case)
    wholes = []
    for name, dim in (('q', 1), ('k', 1), ('v', 1), ('g', 1), ('do', 1), ('initial_state', 0), ('dht', 0)):
        if inputs[name] is not None:
            inputs[name], whole = surrounded(inputs[name], float('nan'), dim)
            wholes.append(whole)
    before = [whole.clone() for whole in wholes]

    def call(cu_seqlens, **options):
        return MODES[mode](cu_seqlens=surrounded(cu_seqlens, 3)[0], **options)

    check_bounds(mode, case, inputs, run(call, case, inputs))
    for whole, kept in zip(wholes, before):
        assert torch.equal(whole.view(torch.uint8), kept.view(torch.uint8))


def pool_call(mode, inputs, pool, indices, bounds=None, **options):
    cu_seqlens = None if bounds is None else surrounded(torch.tensor(bounds, device=DEVICE), 3)[0]
    with torch.no_grad(), poisoned_memory():
        o, same = MODES[mode](
            *(inputs[name] for name in ('q', 'k', 'v', 'g')),
            initial_state=pool,
            state_indices=indices,
            cu_seqlens=cu_seqlens,
            **options,
        )
    assert same is pool
    return o


POOL_INDICES = [(9, 2, 14, -1, -7), (3, 2**40, -(2**40), 2**32 + 1, 1), (MAX64, -MAX64 - 1, 9, 0, 8)]
POOL_BOUNDS = [
    (32, None),
    (32, (4, 9, 14, 21, 21, 60)),
    (32, (0, 20, 12, 20, 30, 32)),
    (300, (140, 290, 290, 291, 200, 301)),
]


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('indices', mark_slow(POOL_INDICES, *POOL_INDICES[1:]), ids=str)
@pytest.mark.parametrize('T, bounds', [*POOL_BOUNDS[:3], *slow_rows(POOL_BOUNDS[3:])])
@pytest.mark.parametrize('mode', STATEFUL)
def test_indices_outside_of_the_pool(mode, T, bounds, indices, dtype):
    """They are padding, as -1 is. What lies around the pool and around the indices is not read."""
    if T > 100 and mode != 'segments' and not GPU:
        pytest.skip('takes long in the interpreter')
    P = 9
    case = Case(T, B=5 if bounds is None else 1, K=dim(dtype), V=dim(dtype), cu_seqlens=bounds, dtype=dtype)
    inputs = make_inputs(case)
    shape = case.H, case.K, case.V
    states = torch.randn(P, *shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    pool, whole = surrounded(states, float('nan'))
    before = whole.clone()
    o = pool_call(mode, inputs, pool, surrounded(torch.tensor(indices, device=DEVICE), 5)[0], bounds)
    padding = tuple(i if 0 <= i < P else -1 for i in indices)
    twin = states.clone()
    expected = pool_call(mode, inputs, twin, torch.tensor(padding, device=DEVICE), bounds)
    decreases = bounds is not None and any(a > b for a, b in itertools.pairwise(bounds))
    assert o.isfinite().all() and pool.isfinite().all()
    if not decreases or not GPU:  # otherwise sequences share tokens, and any of them may write last
        assert torch.equal(o, expected)
        assert torch.equal(pool, twin)
    rest = [n for n in range(P) if n not in padding]
    assert torch.equal(pool[rest], states[rest])
    if bounds is None:
        assert (o[[n for n in range(5) if padding[n] < 0]] == 0).all()
    else:
        assert (o[:, in_no_sequence(case)] == 0).all()
    pool.copy_(states)
    assert torch.equal(whole.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize('mode', STATEFUL)
def test_a_pool_without_slots(mode):
    inputs = make_inputs(Case(3, B=2))
    pool = torch.empty(0, 2, 16, 16, device=DEVICE)
    assert (pool_call(mode, inputs, pool, torch.tensor([0, 3], device=DEVICE)) == 0).all()


@pytest.mark.parametrize('reverse', [False, True])
def test_states_after_tokens_in_no_sequence(reverse):
    """The buffer is not written for tokens in no sequence."""
    bounds = (5, 9, 9, 20, 14, 25)
    case = Case(32, cu_seqlens=bounds, reverse=reverse)
    inputs = make_inputs(case)
    buffer, whole = surrounded(torch.full((1, 32, case.H, case.K, case.V), 7.0, device=DEVICE), 7.0, 1)
    pool = torch.randn(3, case.H, case.K, case.V, device=DEVICE)
    indices = torch.tensor([0, 3, 1, -5, 2], device=DEVICE)
    pool_call('fused_recurrent', inputs, pool, indices, bounds, reverse=reverse, intermediate_states_buffer=buffer)
    outside = in_no_sequence(case)
    assert (buffer[:, outside] == 7).all()
    assert buffer.isfinite().all() and (buffer[:, 5:9] != 7).all()
    buffer.fill_(7.0)
    assert (whole == 7).all()


GOOD = torch.tensor([0, 3, 3, 8])


@pytest.mark.parametrize('kind', [torch.int32, torch.int64], ids=str)
def test_what_the_check_lets_pass(kind):
    cu_seqlens = GOOD.to(kind)
    for T in (8, 9):
        check_contents(cu_seqlens, None, None, T, None)
        check_contents(cu_seqlens, GOOD, torch.tensor([4, -1, 0], dtype=kind), T, 5)
    check_contents(None, None, torch.tensor([-1, -1, -7], dtype=kind), 5, 0)
    check_contents(None, None, None, 0, None)
    check_contents(torch.zeros(2, dtype=kind), None, None, 0, None)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'cu_seqlens': [5, 20]}, 'cu_seqlens must begin with 0, got 5'),
        ({'cu_seqlens': [-2, 5, 8]}, 'cu_seqlens must begin with 0, got -2'),
        ({'cu_seqlens': [0, 20, 12, 3]}, 'cu_seqlens must never decrease, got 20 and then 12 at index 2'),
        ({'cu_seqlens': [0, 10, 40]}, 'cu_seqlens must not end beyond the 32 tokens, got 40'),
        ({'cu_seqlens': [0, 2**40]}, f'cu_seqlens must not end beyond the 32 tokens, got {2**40}'),
        (
            {'cu_seqlens_cpu': [0, 10, 21, 32]},
            'cu_seqlens_cpu must equal cu_seqlens, got 21 at index 2 where that has 20',
        ),
        ({'state_indices': [0, 9, 10]}, 'state_indices must be below the 9 slots of the pool, got 9 at index 1'),
        (
            {'state_indices': [0, -1, 2**40]},
            f'state_indices must be below the 9 slots of the pool, got {2**40} at index 2',
        ),
        ({'state_indices': [4, -1, 4]}, 'state_indices must not name a slot twice, got 4 at index 0 and at index 2'),
        ({'state_indices': [8, 8, 8]}, 'state_indices must not name a slot twice, got 8 at index 0 and at index 1'),
    ],
)
def test_what_the_check_refuses(change, message):
    given = {'cu_seqlens': [0, 10, 20, 32], 'cu_seqlens_cpu': [0, 10, 20, 32], 'state_indices': [0, -1, 8]} | change
    if 'cu_seqlens' in change:
        given['cu_seqlens_cpu'] = None
    given = {
        name: None if x is None else torch.tensor(x, device='cpu' if name.endswith('cpu') else DEVICE)
        for name, x in given.items()
    }
    with pytest.raises(ValueError) as raised:
        check_contents(**given, T=32, P=9)
    assert str(raised.value) == message
