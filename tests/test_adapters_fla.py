"""Retention and Lightning Attention: fla's signatures, the papers' formulas in fp64, fla's kernels on a GPU."""

import dataclasses
import functools
import importlib
import inspect
import math

import pytest
import torch
from harness import DEVICE, GPU, HALF, Case, assert_same_bits, check, make_inputs, needs_gpu, rms_error, run
from torch._subclasses.fake_tensor import FakeTensorMode

from fla_simple_gla._cache import Cache
from fla_simple_gla.adapters import fla

LAYER = dict(layer_idx=3, num_layers=5)
FUNCTIONS = {
    name: functools.partial(getattr(fla, name), **(LAYER if 'lightning' in name else {})) for name in fla.__all__
}
RECURRENT = [name for name in FUNCTIONS if 'recurrent' in name]


def log_decays(name: str, H: int) -> torch.Tensor:
    """From the papers: `[H]` in fp64."""
    if 'lightning' in name:
        rate = 8 / H * (1 - LAYER['layer_idx'] / LAYER['num_layers'])
        return torch.tensor([-rate * h for h in range(H)], dtype=torch.float64)
    return torch.tensor([math.log1p(-(2.0 ** (-5 - h))) for h in range(H)], dtype=torch.float64)


def formula(name: str):
    """A function of this name in fp64, as attention: a token's weight has decayed once for each token after it."""

    def one_sequence(q, k, v, S, scale, reverse):
        if reverse:
            o, S = one_sequence(q.flip(1), k.flip(1), v.flip(1), S, scale, False)
            return o.flip(1), S
        B, T, H, _ = v.shape
        q, k = (x.repeat_interleave(H // x.shape[2], 2) for x in (q, k))
        decays = log_decays(name, H).to(q.device)
        t = torch.arange(T, device=q.device)
        distance = (t[:, None] - t[None, :]).clamp_min(0)
        weights = (decays[:, None, None] * distance).exp() * (t[:, None] >= t[None, :])
        o = torch.einsum('bihk,bjhk,hij,bjhv->bihv', q, k, weights, v)
        S = torch.zeros(B, H, q.shape[-1], v.shape[-1], dtype=q.dtype, device=q.device) if S is None else S
        before = (decays[:, None] * (t + 1)).exp()
        o = o + torch.einsum('bihk,hi,bhkv->bihv', q, before, S)
        after = (decays[:, None] * (T - 1 - t)).exp()
        S = (decays * T).exp()[:, None, None] * S + torch.einsum('bjhk,hj,bjhv->bhkv', k, after, v)
        return o * (q.shape[-1] ** -0.5 if scale is None else scale), S

    def all_sequences(
        q, k, v, initial_state=None, scale=None, output_final_state=False, cu_seqlens=None, reverse=False,
        state_v_first=False,
    ):  # fmt: skip
        S = initial_state.mT if state_v_first and initial_state is not None else initial_state
        if cu_seqlens is None:
            o, S = one_sequence(q, k, v, S, scale, reverse)
        else:
            bounds = cu_seqlens.tolist()
            states = [None] * (len(bounds) - 1) if S is None else S.split(1)
            found = [
                one_sequence(q[:, bos:eos], k[:, bos:eos], v[:, bos:eos], S, scale, reverse)
                for bos, eos, S in zip(bounds, bounds[1:], states)
            ]
            o, S = torch.cat([o for o, _ in found], 1), torch.cat([S for _, S in found])
        return o, (S.mT if state_v_first else S) if output_final_state else None

    return all_sequences


def expected_of(name: str, case: Case, inputs: dict) -> dict[str, torch.Tensor]:
    return run(formula(name), case, {key: None if x is None else x.double() for key, x in inputs.items()})


def of(name: str, case: Case) -> Case:
    """The case, without states where the function has none; with fewer tokens where they go one by one."""
    if name == 'parallel_retention':
        case = case.of('parallel')
    if name in RECURRENT and not GPU:
        cu_seqlens = None if case.cu_seqlens is None else (0, 4, 4, 11)
        case = dataclasses.replace(case, T=11, cu_seqlens=cu_seqlens)
    return case


CASES = [
    Case(90, B=2, H=3, gate=None),
    Case(90, H=3, gate=None, cu_seqlens=(0, 17, 17, 90), scale=0.5),
    Case(90, H=4, HK=2, gate=None, initial_state=False, dtype=HALF),
    Case(90, H=3, V=24, gate=None, output_final_state=False, initial_state=False),
]


@pytest.mark.parametrize('name', FUNCTIONS)
def test_signatures(name):
    """The parameters of fla come first, in its order and with its defaults. Each other parameter has a default."""
    package = 'fla.ops.retention' if 'retention' in name else 'fla.ops.lightning_attn'
    theirs = getattr(pytest.importorskip(package, reason='fla-core is not installed'), name)
    ours, theirs = (list(inspect.signature(fn).parameters.values()) for fn in (getattr(fla, name), theirs))
    theirs = [p for p in theirs if p.kind != p.VAR_KEYWORD]
    for mine, other in zip(ours, theirs, strict=False):
        assert (mine.name, mine.kind, mine.default) == (other.name, other.kind, other.default)
    assert len(ours) >= len(theirs)
    assert all(p.default is not p.empty and p.kind == p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize(
    'name, case', [pytest.param(name, of(name, case), id=f'{name}-{case}') for name in FUNCTIONS for case in CASES]
)
def test_numbers(name, case):
    inputs = make_inputs(case)
    check(case, run(FUNCTIONS[name], case, inputs), expected_of(name, case, inputs))


@pytest.mark.parametrize('name', RECURRENT)
def test_reverse_and_layout_of_states(name):
    for case in (
        Case(11, B=2, H=3, gate=None, reverse=True),
        Case(11, H=3, gate=None, reverse=True, cu_seqlens=(0, 4, 11)),
        Case(11, H=3, V=24, gate=None, state_v_first=True),
    ):
        if case.state_v_first and 'retention' not in name:
            continue
        inputs = make_inputs(case)
        check(case, run(FUNCTIONS[name], case, inputs), expected_of(name, case, inputs))


def test_attention_map():
    case = Case(40, B=2, H=3, gate=None).of('parallel')
    inputs = make_inputs(case)
    q, k, v = (inputs[name] for name in 'qkv')
    o, found = fla.parallel_retention(q, k, v, output_attentions=True)
    # with the identity as v, o is the map
    eye = torch.eye(40, dtype=torch.float64, device=DEVICE)[None, :, None].expand(2, 40, 3, 40)
    expected, _ = formula('parallel_retention')(q.double(), k.double(), eye)
    assert rms_error(found, expected.transpose(1, 2)) < 1e-5
    assert torch.equal(o, fla.parallel_retention(q, k, v)[0]) and fla.parallel_retention(q, k, v)[1] is None


@pytest.mark.parametrize('name', FUNCTIONS)
def test_fp64_on_the_cpu(name):
    """Decays are not rounded to fp32, not even those of many heads, which are close to one."""
    case = dataclasses.replace(of(name, Case(20, H=24, gate=None)), dtype=torch.float64, state_dtype=torch.float64)
    inputs = make_inputs(case, 'cpu')
    found, expected = run(FUNCTIONS[name], case, inputs), expected_of(name, case, inputs)
    for key, x in found.items():
        assert x.dtype == torch.float64 and rms_error(x, expected[key]) < 1e-12, key


def test_decays_of_many_heads():
    """Also where 1 - 2^(-5 - h) is one in fp32."""
    found = fla.decays_for(torch.empty(1, 1, 64, 1, device=DEVICE), fla.retention_decays)
    assert found.dtype == torch.float32 and rms_error(found, log_decays('retention', 64).to(DEVICE)) < 1e-7
    assert (found < 0).all()


def test_deprecated_and_further_keywords():
    inputs = make_inputs(Case(9, H=2, V=24, gate=None, state_v_first=True))
    q, k, v, state = (inputs[name] for name in ('q', 'k', 'v', 'initial_state'))
    expected = fla.fused_recurrent_retention(q, k, v, None, state, True, False, True)
    with pytest.warns(DeprecationWarning, match='state_v_first'):
        found = fla.fused_recurrent_retention(
            q, k, v, initial_state=state, output_final_state=True, transpose_state_layout=True
        )
    assert all(map(torch.equal, found, expected))
    for name in ('chunk_retention', 'chunk_lightning_attn'):
        fn = FUNCTIONS[name]
        assert rms_error(fn(q, k, v, chunk_size=16)[0], fn(q, k, v)[0]) < 1e-5
        with pytest.raises(ValueError, match='chunk_size must be a power of two, got 12'):
            fn(q, k, v, chunk_size=12)


@pytest.mark.parametrize('name', FUNCTIONS)
def test_errors(name):
    """They name what is wrong, as those of the modes do."""
    fn = FUNCTIONS[name]
    q = torch.zeros(1, 3, 2, 16, device=DEVICE)
    for keyword in ('head_first', 'decay'):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
            fn(q, q, q, **{keyword: False})
    with pytest.raises(TypeError, match='v must be a torch.Tensor, got NoneType'):
        fn(q, q, None)
    for v in (q[0], q[0, 0], q[0, 0, 0]):
        with pytest.raises(ValueError, match='v must have 4 dimensions'):
            fn(q, q, v)
    with pytest.raises(ValueError, match="v must have a multiple of q's 2 heads, at least one, got 0"):
        fn(q, q, q[:, :, :0])
    if 'lightning' in name:
        wrong = [
            (TypeError, dict(layer_idx=1.0), 'layer_idx must be an int, got float'),
            (TypeError, dict(num_layers=None), 'num_layers must be an int, got NoneType'),
            (ValueError, dict(layer_idx=6), 'layer_idx must be 0 to num_layers = 5, got 6'),
            (ValueError, dict(layer_idx=-1), 'layer_idx must be 0 to num_layers = 5, got -1'),
            (ValueError, dict(num_layers=0, layer_idx=0), 'num_layers must be at least 1, got 0'),
        ]
        for kind, options, message in wrong:
            with pytest.raises(kind, match=message):
                fn(q, q, q, **options)


def test_decays_are_made_once():
    """Whatever the first call is under. The last layer, which no other test has, remembers all."""

    def decays(layer_idx=5, device=DEVICE):
        v = torch.zeros(1, 1, 7, 1, device=device)
        return fla.decays_for(v, fla.lightning_decays, layer_idx, 5)

    with FakeTensorMode():
        assert decays().shape == (7,)
    with torch.inference_mode():
        first = decays()
    assert type(first) is torch.Tensor and not first.is_inference()
    assert decays() is first and decays(4) is not first
    assert first.eq(0).all() and decays(4)[1:].lt(0).all()
    q, k, v = (torch.randn(1, 3, 7, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    fla.chunk_lightning_attn(q, k, v, 5, 5)[0].sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize('name', FUNCTIONS)
def test_compiled(name):
    q, k, v = (torch.randn(1, 5, 2, 16, device=DEVICE) for _ in range(3))
    found, _ = torch.compile(FUNCTIONS[name], backend='aot_eager', fullgraph=True)(q, k, v)
    assert rms_error(found, FUNCTIONS[name](q, k, v)[0]) < 1e-5


@needs_gpu
@pytest.mark.parametrize('name', FUNCTIONS)
def test_calls_do_not_synchronise(name):
    q, k, v = (torch.randn(1, 5, 2, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    for _ in range(3):
        expected, _ = FUNCTIONS[name](q, k, v)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        found, _ = FUNCTIONS[name](q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert_same_bits({'o': found}, {'o': expected})


@needs_gpu
def test_first_call_in_a_graph(monkeypatch):
    """The decays that a graph makes are in its own memory, and no other call gets them."""
    q, k, v = (torch.randn(1, 5, 11, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    for _ in range(3):
        expected, _ = fla.chunk_lightning_attn(q, k, v, 1, 5)
    monkeypatch.setattr(fla, 'decays', Cache(16))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, _ = fla.chunk_lightning_attn(q, k, v, 1, 5)
    assert len(fla.decays) == 0
    graph.replay()
    assert torch.equal(found, expected)


@needs_gpu
@pytest.mark.parametrize('name', FUNCTIONS)
def test_same_as_fla(name, untuned):
    """Both are in bfloat16, and fla rounds more. The tolerance shows a different meaning, and no different digits."""
    package = 'fla.ops.retention' if 'retention' in name else 'fla.ops.lightning_attn'
    theirs = functools.partial(getattr(importlib.import_module(package), name), **FUNCTIONS[name].keywords)
    whole = Case(320, B=2, H=4, K=64, V=64, gate=None, dtype=torch.bfloat16)
    for case in (whole, dataclasses.replace(whole, B=1, cu_seqlens=(0, 128, 192, 320), scale=0.3)):
        case = of(name, case)
        inputs = make_inputs(case)
        options = {'scale': case.scale}
        if case.output_final_state:
            options |= {'initial_state': inputs['initial_state'], 'output_final_state': True}
        if case.cu_seqlens is not None:
            options['cu_seqlens'] = torch.tensor(case.cu_seqlens, device=DEVICE)
        with torch.no_grad():
            found, expected = (fn(*(inputs[x] for x in 'qkv'), **options) for fn in (FUNCTIONS[name], theirs))
        for x, other in zip(found, expected):
            assert (x is None) == (other is None)
            if x is not None:
                error = rms_error(x, other)
                assert x.dtype == other.dtype and x.shape == other.shape and error < 1e-2, (case, error)
