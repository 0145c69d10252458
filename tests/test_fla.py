"""Comparison with fla-core: the same signatures, the same numbers on a GPU, and its layers run on this library."""

import copy
import functools
import inspect
import sys

import pytest
import torch
from harness import DEVICE, Case, make_inputs, needs_gpu, rms_error, run

import fla_simple_gla

MODES = ('chunk', 'fused_chunk', 'fused_recurrent', 'parallel')


@pytest.fixture(scope='module')
def fla():
    """The operators of fla-core."""
    return pytest.importorskip('fla.ops.simple_gla', reason='fla-core is not installed')


@pytest.fixture
def ours_and_theirs(fla):
    """Looks up a function of this name here and in fla."""

    def look_up(name):
        function = f'{name}_simple_gla'
        module = fla if name in MODES else sys.modules['fla.ops.simple_gla.naive']
        return getattr(fla_simple_gla, function), getattr(module, function)

    return look_up


@pytest.mark.parametrize('name', [*MODES, 'naive_chunk', 'naive_recurrent', 'naive_parallel'])
def test_signatures(name, ours_and_theirs):
    """The parameters of fla come first, in its order and with its defaults. Each other parameter has a default."""
    if name not in MODES:
        pytest.importorskip('fla.ops.simple_gla.naive')
    ours, theirs = (list(inspect.signature(fn).parameters.values()) for fn in ours_and_theirs(name))
    theirs = [p for p in theirs if p.kind != p.VAR_KEYWORD]
    for mine, other in zip(ours, theirs):
        assert (mine.name, mine.kind) == (other.name, other.kind)
        # A gate that fla requires may be left out here.
        assert mine.default == other.default or (
            other.name == 'g' and other.default is other.empty and mine.default is None
        )
    assert len(ours) >= len(theirs)
    assert all(p.default is not p.empty for p in ours[len(theirs) :])


CASES = [
    Case(300, B=2, K=64, V=64, dtype=torch.bfloat16),
    Case(300, K=64, V=64, dtype=torch.bfloat16, cu_seqlens=(0, 100, 170, 300)),
    Case(130, K=64, V=128, dtype=torch.bfloat16, scale=0.5, initial_state=False),
    Case(300, B=2, K=64, V=64, dtype=torch.bfloat16, gate='gamma'),
]


@needs_gpu
@pytest.mark.parametrize(
    'mode, case',
    [
        pytest.param(mode, case.of(mode), id=f'{mode}-{case.of(mode)}')
        for mode in MODES
        for case in CASES
        # The parallel mode of fla has no constant decay.
        if (mode, case.gate) != ('parallel', 'gamma')
    ],
)
def test_outputs_and_gradients(mode, case, untuned, ours_and_theirs):
    """Both are in bfloat16, and fla rounds more. The tolerances show a different meaning, and no different digits."""
    inputs = make_inputs(case)
    ours, theirs = ours_and_theirs(mode)
    if case.gate == 'gamma':
        # A constant decay has no gradient in fla.
        g_gamma, inputs['g_gamma'] = inputs['g_gamma'], None
        ours, theirs = functools.partial(ours, g_gamma=g_gamma), functools.partial(theirs, g_gamma=g_gamma)
    found = run(ours, case, inputs)
    try:
        expected = run(theirs, case, inputs)
    except RuntimeError as error:
        # On Hopper fla refuses the gated backward with triton 3.4 to 3.7.0, which miscompile it.
        # Other tests compare ours with naive.
        assert mode == 'chunk' and 'incorrect results' in str(error)
        with torch.no_grad():
            options = {'output_final_state': True, 'scale': case.scale}
            if case.cu_seqlens is not None:
                options['cu_seqlens'] = torch.tensor(case.cu_seqlens, device=DEVICE)
            o, ht = theirs(*(inputs[name] for name in 'qkvg'), initial_state=inputs['initial_state'], **options)
        expected = {'o': o, 'ht': ht}
    for name, x in expected.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape, name
        assert rms_error(found[name], x) < (5e-2 if name == 'dg' else 1e-2), name


@needs_gpu
def test_attention_map(untuned, ours_and_theirs):
    inputs = make_inputs(Case(200, B=2, K=64, V=64, dtype=torch.bfloat16))
    ours, theirs = (
        fn(*(inputs[name] for name in 'qkvg'), output_attentions=True)[1] for fn in ours_and_theirs('parallel')
    )
    assert ours.dtype == theirs.dtype and rms_error(ours, theirs) < 1e-2


@needs_gpu
def test_layers_run_on_this_library(untuned, monkeypatch):
    """The layer of fla trains, reads a prompt and decodes from a cache with the functions of this library."""
    module = pytest.importorskip(
        'fla.layers.simple_gla', reason='fla-core has no layers: they are in flash-linear-attention'
    )
    from fla.models.utils import Cache

    torch.manual_seed(0)
    layer = module.SimpleGatedLinearAttention(hidden_size=256, num_heads=4, layer_idx=0).to(DEVICE, torch.bfloat16)
    x = torch.randn(2, 150, 256, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn_like(x)
    with torch.no_grad():
        expected = layer(x)[0]

    def naive(q, k, v, g, initial_state=None, output_final_state=False, state_v_first=False, cu_seqlens=None):
        h0 = initial_state.mT if state_v_first and initial_state is not None else initial_state
        o, ht = fla_simple_gla.naive_chunk_simple_gla(
            q.float(),
            k.float(),
            v.float(),
            g.float(),
            h0,
            output_final_state,
            cu_seqlens=cu_seqlens,
        )
        return o.to(q.dtype), ht.mT if state_v_first and ht is not None else ht

    def train(**functions):
        for name, fn in functions.items():
            monkeypatch.setattr(module, name, fn)
        trained = copy.deepcopy(layer).train()
        y = trained(x)[0]
        (y * weight).sum().backward()
        return y.detach(), [p.grad for p in trained.parameters()]

    names = ('chunk_simple_gla', 'fused_recurrent_simple_gla')
    y, gradients = train(**{name: getattr(fla_simple_gla, name) for name in names})
    assert rms_error(y, expected) < 1e-2
    with torch.no_grad():
        cache = Cache()
        pieces = [layer(x[:, :100], past_key_values=cache, use_cache=True)[0]]
        pieces += [layer(x[:, t : t + 1], past_key_values=cache, use_cache=True)[0] for t in range(100, 110)]
    assert rms_error(torch.cat(pieces, 1), expected[:, :110]) < 1e-2
    reference, expected_gradients = train(**{name: naive for name in names})
    assert rms_error(y, reference) < 1e-2
    for found, right in zip(gradients, expected_gradients, strict=True):
        assert rms_error(found, right) < 2e-2
