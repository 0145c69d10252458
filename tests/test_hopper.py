"""The kernels for Hopper: which calls they take, and what keeps calls from them."""

import itertools
from unittest import mock

import pytest
import torch
from harness import DEVICE, GPU, HALF, MODES, Case, check, launch_by_triton, make_inputs, place, reference, run

from fla_simple_gla import chunk, fused_chunk, hopper, parallel
from fla_simple_gla._cache import Cache
from fla_simple_gla._layout import is_hopper
from fla_simple_gla._plans import Inputs, Options, Plan
from fla_simple_gla._triton import why_not
from fla_simple_gla.hopper import Sweeps, attention_for, sweeps_for, sweeps_of, takes, why_no_sweeps

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
        assert {module_for(K=K, V=V) for K, V in ((256, 256), (64, 136))} == {'wide'}
    assert module_for(dtype=torch.float16, HK=1, layout='qkv', cu_seqlens=(0, 90, 200)) == 'sweep'
    others = [dict(dtype=torch.float32), dict(K=512), dict(V=20), dict(layout='odd')]
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
    case = Case(200, K=64, V=64, dtype=HALF)
    sweeps = sweeps_for(*qkv(make_inputs(case)))
    calls = mock.Mock(**{f'{name}.side_effect': getattr(sweeps, name) for name in ('sweep', 'reverse_sweep')})
    watched = sweeps._replace(sweep=calls.sweep, reverse_sweep=calls.reverse_sweep)
    monkeypatch.setattr(hopper, 'sweeps_of', lambda *_: watched)
    for mode in ('chunk', 'segments', 'fused_chunk'):
        calls.reset_mock()
        run(MODES[mode], case)
        assert [name for name, *_ in calls.mock_calls] == ['sweep', 'sweep', 'reverse_sweep']
    monkeypatch.setattr(hopper, 'sweeps_of', sweeps_of)
    hopper_switch('0')
    calls.reset_mock()
    run(MODES['chunk'], case)
    assert not calls.mock_calls


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
    for sweeps in (Sweeps(None, None, None), None):
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
