"""The kernels for Hopper: which calls they take, and what keeps calls from them."""

import itertools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from harness import (
    DEVICE,
    GPU,
    HALF,
    MODES,
    Case,
    assert_same_bits,
    check,
    launch_by_triton,
    make_inputs,
    place,
    reference,
    run,
)

from fla_simple_gla import chunk, fused_chunk, fused_chunk_simple_gla, hopper, parallel
from fla_simple_gla._cache import Cache
from fla_simple_gla._layout import is_hopper
from fla_simple_gla._plans import Inputs, Options, Plan
from fla_simple_gla._triton import why_not
from fla_simple_gla.hopper import Sweeps, attention_for, is_shared, sweeps_for, sweeps_of, takes, why_no_sweeps

on_hopper = pytest.mark.skipif(not GPU or not is_hopper(torch.device('cuda')), reason='for Hopper GPUs')


def qkv(inputs: dict) -> list[torch.Tensor]:
    return [inputs[name] for name in 'qkv']


@pytest.fixture
def hopper_switch(monkeypatch):
    """Sets the environment variable of the kernels for Hopper, or removes it."""

    def switch(value):
        if value is None:
            monkeypatch.delenv('FLA_SIMPLE_GLA_HOPPER', raising=False)
        else:
            monkeypatch.setenv('FLA_SIMPLE_GLA_HOPPER', value)
        for caches in ('fla_simple_gla._plans.plans', 'fla_simple_gla._passes.records', 'harness.PLANS'):
            monkeypatch.setattr(caches, Cache(1000))
        sweeps_of.cache_clear()

    yield switch
    sweeps_of.cache_clear()


@on_hopper
def test_what_the_sweeps_for_hopper_take(hopper_switch):
    def module_for(**change):
        case = Case(**dict(T=200, K=64, V=64, dtype=HALF) | change)
        sweeps = sweeps_for(*qkv(make_inputs(case)))
        return sweeps and sweeps.sweep.__module__.split('.')[-1]

    hopper_switch(None)
    assert {module_for(K=K, V=V) for K, V in ((64, 64), (128, 128), (8, 96), (128, 40))} == {'sweep'}
    if why_not('wide') is None:
        assert {module_for(K=K, V=V) for K, V in ((256, 256), (64, 136), (512, 8), (512, 512))} == {'wide'}
    assert module_for(dtype=torch.float16, HK=1, layout='qkv', cu_seqlens=(0, 90, 200)) == 'sweep'
    others = [dict(dtype=torch.float32), dict(V=20), dict(layout='odd')]
    assert [module_for(**change) for change in others] == [None] * len(others)
    hopper_switch('0')
    assert module_for() is None


@on_hopper
def test_what_the_attention_for_hopper_takes(hopper_switch):
    hopper_switch(None)
    for K, taken in ((64, True), (128, True), (256, False)):
        assert (attention_for(*qkv(make_inputs(Case(200, K=K, V=K, dtype=HALF)))) is not None) == taken


@on_hopper
def test_modes_take_the_sweeps_for_hopper_unless_they_are_switched_off(hopper_switch, monkeypatch):
    hopper_switch(None)
    launch_by_triton(monkeypatch)
    calls = mock.Mock()

    def watched(*arguments):
        sweeps = sweeps_of(*arguments)
        for name in ('sweep', 'gradients'):
            getattr(calls, name).side_effect = getattr(sweeps, name)
        return sweeps._replace(sweep=calls.sweep, gradients=sweeps.gradients and calls.gradients)

    monkeypatch.setattr(hopper, 'sweeps_of', watched)
    alone, pairs, wide = ['sweep', 'sweep', 'gradients'], ['sweep', 'gradients', 'gradients'], ['sweep'] * 4
    for V, heads, expected in ((64, 2, alone), (128, 2, alone), (64, 1, pairs), (256, 1, wide)):
        case = Case(200, K=128, V=V, HK=heads, dtype=HALF)
        for mode in ('chunk', 'segments', 'fused_chunk'):
            calls.reset_mock()
            run(MODES[mode], case)
            assert [name for name, *_ in calls.mock_calls] == expected
    monkeypatch.setattr(hopper, 'sweeps_of', sweeps_of)
    hopper_switch('0')
    calls.reset_mock()
    run(MODES['chunk'], case)
    assert not calls.mock_calls


# K, V, heads of v and of q: every kernel that makes o, in every way in which states are cut
STATES = [(64, 64, 2, 2), (128, 128, 2, 2), (64, 128, 2, 2), (128, 64, 2, 2), (128, 64, 4, 1), (192, 192, 2, 2),
          (256, 256, 2, 1), (256, 512, 1, 1), (512, 512, 1, 1)]  # fmt: skip


def skip_unless_taken(K: int, V: int) -> None:
    if reason := why_no_sweeps(K, V, HALF, torch.device(DEVICE, 0)):
        pytest.skip(reason)


class Part(NamedTuple):
    """A call with some tokens, and its gradients."""

    o: torch.Tensor
    state: torch.Tensor  # after them
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dstate: torch.Tensor | None = None  # the gradient of the state before them, if one was given


def call_parts(T: int, K: int, V: int, H: int, HK: int, gate: str) -> tuple[list[torch.Tensor], Callable]:
    """q, k, v and do of T tokens, and a function that gives some tokens, and others in their roles, to the mode."""
    skip_unless_taken(K, V)
    inputs = make_inputs(Case(T, K=K, V=V, H=H, HK=HK, dtype=HALF, gate=gate))
    all_roles = [inputs[name] for name in ('q', 'k', 'v', 'do')]

    def part(of: slice, state=None, dstate=None, roles=all_roles) -> Part:
        q, k, v, do = (x[:, of].detach() for x in roles)
        g = None if inputs['g'] is None else inputs['g'][:, of]
        leaves = [x.detach().requires_grad_() for x in (q, k, v, state) if x is not None]
        o, end = fused_chunk_simple_gla(
            *leaves[:3], g, inputs['g_gamma'], K**-0.5, *leaves[3:], output_final_state=True
        )
        outputs, given = ([o], [do]) if dstate is None else ([o, end], [do, dstate])
        return Part(o.detach(), end.detach(), *torch.autograd.grad(outputs, leaves, given))

    return all_roles, part


@on_hopper
@pytest.mark.parametrize('gate', ['g', 'gamma'])
@pytest.mark.parametrize('K, V, H, HK', STATES)
def test_an_open_chunk_has_the_bits_of_a_full_pass(K, V, H, HK, gate):
    """From the fp32 state at its start: what stands after a token never touches its row, in o and in dq."""
    (q, k, v, do), part = call_parts(192, K, V, H, HK, gate)
    full = part(slice(192))
    state = state_of_dq = part(slice(128)).state
    if not sweeps_for(q, k, v).pairs:
        # that sweep rounds k as it adds to the state, in place of v
        k_of_heads = k.repeat_interleave(H // HK, 2)
        state_of_dq = part(slice(128), roles=(do, v, k_of_heads, k_of_heads)).state.mT
    for tokens in (1, 16, 41, 64):
        of = slice(128, 128 + tokens)
        assert torch.equal(full.o[:, of], part(of, state).o)
        assert torch.equal(full.dq[:, of], part(of, state_of_dq).dq)


@on_hopper
@pytest.mark.parametrize('gate', ['g', 'gamma'])
@pytest.mark.parametrize('K, V, H, HK', STATES)
def test_chunks_back_in_time_have_the_bits_of_a_full_pass(K, V, H, HK, gate):
    """From the gradient of the fp32 state at a chunk's end: dk and dv of this chunk and of those before it."""
    (q, k, v, do), part = call_parts(180, K, V, H, HK, gate)
    full = part(slice(180))
    before, after = slice(128), slice(128, 180)
    zeros = torch.zeros(1, H, K, V, device=DEVICE)
    dstate = dstate_of_dk = part(after, zeros).dstate
    if sweeps_for(q, k, v).gradients is None:
        # that for dk is a sweep of its own, which rounds q as it adds to the state, in place of do
        q_of_heads, k_of_heads = (x.repeat_interleave(H // HK, 2) for x in (q, k))
        dstate_of_dk = part(after, zeros.mT, roles=(do, v, k_of_heads, q_of_heads)).dstate.mT
    assert torch.equal(full.dv[:, before], part(before, dstate=dstate).dv)
    assert torch.equal(full.dk[:, before], part(before, dstate=dstate_of_dk).dk)


@on_hopper
@pytest.mark.parametrize('mode', ['chunk', 'segments', 'fused_chunk'])
@pytest.mark.parametrize('K, V', [(128, 64), (72, 40), (64, 64), (128, 128), (256, 64), (256, 128)])
def test_heads_that_share_q_and_k_have_the_bits_of_heads_that_do_not(K, V, mode):
    skip_unless_taken(K, V)
    inputs = make_inputs(Case(500, K=K, V=V, H=4, HK=1, dtype=HALF))
    given = {name: inputs[name] for name in ('q', 'k', 'v', 'g', 'initial_state')}
    expected = None
    for heads in (1, 2, 4):
        repeated = {name: given[name].repeat_interleave(heads, 2) for name in 'qk'}
        found = MODES[mode](**given | repeated, output_final_state=True)
        expected = expected or found
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


@on_hopper
@pytest.mark.parametrize(
    'K, V, H, HK', [(64, 64, 300, 300), (128, 128, 140, 140), (128, 64, 300, 1), (256, 256, 70, 70), (256, 512, 40, 40)]
)
def test_programs_that_share_heads_give_the_same_bits(K, V, H, HK, monkeypatch):
    """Where the programs are no divisor of the heads, they hand over states in the middle of some."""
    skip_unless_taken(K, V)
    launch_by_triton(monkeypatch)
    case = Case(700, K=K, V=V, H=H, HK=HK, dtype=HALF)
    inputs = make_inputs(case)
    found = []
    for gain in (float('inf'), 0.0, 0.0):
        monkeypatch.setattr(hopper, 'LEAST_GAIN', gain)
        found.append(run(MODES['fused_chunk'], case, inputs))
    alone, *shared = found
    for results in shared:
        assert_same_bits(results, alone)
    check(case, alone, reference(case, inputs))


@pytest.mark.skipif(why_not('hopper') is not None, reason='needs Gluon')
@pytest.mark.parametrize('K, V, H, HK, heads', [
    (128, 64, 80, 1, 2), (72, 8, 4, 2, 2), (128, 64, 6, 2, 1), (128, 64, 4, 4, 1), (64, 64, 4, 1, 1),
    (128, 72, 4, 1, 1), (256, 64, 4, 1, 1), (64, 128, 4, 2, 1),
])  # fmt: skip
def test_which_heads_are_taken_in_pairs(K, V, H, HK, heads):
    """Those that share q and k, if one fills a warp group. In no sweep with other roles: there v is shared."""
    from fla_simple_gla.hopper.common import count_pair

    q, v, do = torch.empty(1, 1, HK, K), torch.empty(1, 1, H, V), torch.empty(1, 1, H, V)
    assert count_pair(q, v) == heads
    assert count_pair(do, q) == 1


def test_when_programs_share_heads():
    """If they would take a fifth longer without."""
    assert [is_shared(tasks, 132) for tasks in (1, 132, 133, 160, 219, 221, 264, 265, 5000)] == [
        False, False, True, True, True, False, False, True, False,
    ]  # fmt: skip


def mean(do: torch.Tensor) -> torch.Tensor:
    """The gradient of a mean over tokens, the same for each: a stride of 0 along T."""
    return (do[:, :1] / do.shape[1]).expand_as(do)


def odd_address(do: torch.Tensor) -> torch.Tensor:
    """Contiguous, at an address that is no multiple of 16."""
    memory = do.new_empty(do.numel() + 1)[1:].view(do.shape)
    return memory.copy_(do)


GRADIENTS = {'mean': mean, 'odd rows': lambda do: place(do, 'odd'), 'odd address': odd_address}


@on_hopper
@pytest.mark.parametrize('layout', GRADIENTS)
@pytest.mark.parametrize('mode, dim', [*((mode, dim) for mode in ('chunk', 'fused_chunk') for dim in (64, 128, 256)),
                                       ('parallel', 64), ('parallel', 128)])  # fmt: skip
def test_gradients_that_the_kernels_for_hopper_cannot_read_are_copied(mode, dim, layout, hopper_switch, monkeypatch):
    """The plain kernels would read them, but take twice as long."""
    hopper_switch(None)
    if reason := why_no_sweeps(dim, dim, HALF, torch.device(DEVICE, 0)):
        pytest.skip(reason)
    case = Case(200, K=dim, V=dim, dtype=HALF).of(mode)
    inputs = make_inputs(case)
    inputs['do'] = GRADIENTS[layout](inputs['do'])
    assert sweeps_for(*qkv(inputs)) is not None and sweeps_for(*qkv(inputs), inputs['do']) is None
    expected = reference(case, inputs)
    with monkeypatch.context() as patch:
        launch_by_triton(patch)
        plain = mock.Mock(side_effect=AssertionError('a plain kernel'))
        patch.setattr(fused_chunk, 'sweep', plain)
        patch.setattr(parallel, 'attend', plain)
        results = run(MODES[mode], case, inputs)
    check(case, results, expected)
    # recorded and replayed, too
    for _ in range(3):
        again = run(MODES[mode], case, inputs)
        assert all(torch.equal(again[name], results[name]) for name in results)


@pytest.mark.parametrize('layout', ['contiguous', *GRADIENTS])
@pytest.mark.parametrize('mode', ['chunk', 'fused_chunk', 'parallel'])
def test_which_gradients_are_copied_for_the_kernels_for_hopper(mode, layout, monkeypatch):
    """Those that they take when they are copied, and no others. Without a GPU: the passes are not run."""
    module = {'chunk': chunk, 'fused_chunk': fused_chunk, 'parallel': parallel}[mode]
    inputs = make_inputs(Case(20, K=64, V=64, dtype=HALF))
    do = GRADIENTS[layout](inputs['do']) if layout in GRADIENTS else inputs['do']
    passes = mock.Mock(return_value=[None] * 5)
    monkeypatch.setattr(module, 'backward_pass', passes)
    place_of_do = {'chunk': 10, 'fused_chunk': 9, 'parallel': 11}[mode]
    for sweeps in (Sweeps(None, None, False, 1.0, 1.0, None), None):
        monkeypatch.setattr(hopper, 'sweeps_of', lambda *_, sweeps=sweeps: sweeps)
        monkeypatch.setattr(chunk, 'sweeps_of', lambda *_, sweeps=sweeps: sweeps)
        if mode == 'parallel':
            taken = None if sweeps is None else mock.Mock()
            monkeypatch.setattr(parallel, 'attention_for', lambda *_, taken=taken: taken)
        module.backward(Inputs(*qkv(inputs), None, None, None), (None, None), (do, None), None, Plan(Options(1.0)))
        found = passes.call_args.args[0][place_of_do]
        assert torch.equal(found, do)
        assert (found is not do) == (sweeps is not None and layout in GRADIENTS)
        assert sweeps is None or takes(found)


@pytest.mark.parametrize('on', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, HALF], ids=str)
def test_sweeps_are_cut_alike_by_tma_and_by_pointers_and_both_ways(dtype, on, monkeypatch):
    """All sweeps of a call, of states `[K, V]` and `[V, K]`, read one sum of gates. Memory for dg is laid out first."""
    monkeypatch.setattr(fused_chunk, 'is_hopper', lambda device: on)
    for K, V in itertools.product((1, 64, 100, 128, 200, 256, 300, 512), repeat=2):
        configs = [fused_chunk.sweep_config.__wrapped__(K, V, dtype, torch.device('cpu'), tma) for tma in (True, False)]
        turned = fused_chunk.sweep_config.__wrapped__(V, K, dtype, torch.device('cpu'))
        assert len({config.BT for config in (*configs, turned)}) == len({config.BV for config in configs}) == 1
