"""Every mode against naive in fp64, outputs and gradients, over the rows of the contract."""

import pytest
import torch
from harness import CHUNKED, GPU, MODES, STATEFUL, Case, check, errors, make_inputs, reference, rms_error, run

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
INF = float('inf')

CASES = [
    # lengths around the chunk sizes, and dims
    Case(1), Case(2, K=1, V=1), Case(33, B=2), Case(9, K=40, V=72, H=3),
    # half precision
    Case(40, dtype=fp16), Case(9, dtype=fp16, K=24, V=40, B=2),
    # gates
    Case(40, gate='gamma', memory=5), Case(40, gate=None), Case(40, gate_dtype=fp16), Case(40, memory=1), Case(40, memory=1000),
    Case(66, resets=((0, -INF), (20, -1e30), (21, -INF), (50, -90.0), (65, -1e4)), memory=300),
    Case(40, resets=tuple((t, -200.0) for t in range(0, 40, 2)), memory=300), Case(24, resets=((5, 2.0), (9, 4.0))),
    Case(40, resets=((7, -INF), (20, -1e30)), memory=1), Case(40, resets=((7, -INF), (20, -1e30)), dtype=fp16),
    # grouped heads
    Case(40, H=4, HK=2), Case(40, H=3, HK=1, K=24, gate='gamma'), Case(40, H=4, HK=1, dtype=fp16),
    # states
    Case(40, initial_state=False), Case(40, output_final_state=False), Case(40, initial_state=False, output_final_state=False),
    Case(40, state_v_first=True, K=24), Case(40, state_dtype=fp16), Case(0), Case(0, B=2, state_v_first=True, V=24),
    # packed sequences: empty ones, tokens behind the last, both integer types
    Case(80, cu_seqlens=(0, 7, 7, 50, 70)), Case(60, cu_seqlens=(0, 0, 33, 60, 60), cu_dtype=torch.int32, state_v_first=True),
    Case(40, cu_seqlens=(0, 40), H=4, HK=2, gate='gamma'), Case(40, cu_seqlens=(0, 1, 2, 30), gate=None, initial_state=False),
    Case(40, cu_seqlens=(0, 0, 0)), Case(0, cu_seqlens=(0, 0)),
    # layouts and scale
    Case(40, layout='qkv', B=2, HK=1), Case(40, layout='heads_first', B=2), Case(40, layout='odd'),
    Case(40, layout='wide', K=20, V=12),
    Case(40, scale=0.3), Case(40, scale=-2.0),
]  # fmt: skip

# several chunks, blocks of an attention map, and steps of a long row
CHUNKED_CASES = [
    Case(31), Case(70, K=24, V=40), Case(50, K=40, V=72, B=2, H=3), Case(70, dtype=fp16, K=24, V=40, B=2),
    Case(300, memory=3), Case(300, memory=100), Case(150, dtype=fp16, memory=3, K=64, V=64), Case(290, cu_seqlens=(0, 130, 131, 280)),
    Case(33, K=300, V=20), Case(20, K=20, V=300), Case(20, K=512, V=512, H=1, dtype=fp16),
]  # fmt: skip

# segments of 128 tokens: whole ones, short last ones, sequences of one and of several, in every row of the contract
SEGMENT_CASES = [
    Case(256), Case(257, dtype=fp16, K=24, V=40), Case(400, B=2, H=4, HK=2, memory=100), Case(300, gate='gamma', state_v_first=True),
    Case(300, gate=None, layout='qkv'), Case(300, initial_state=False), Case(300, output_final_state=False, scale=0.3),
    Case(300, memory=300, resets=((0, -INF), (127, -1e30), (128, -INF), (200, -90.0), (255, -1e4))), Case(300, memory=1),
    Case(600, cu_seqlens=(0, 130, 130, 131, 387, 580), memory=100), Case(300, cu_seqlens=(0, 0, 300), cu_dtype=torch.int32, gate=None),
    Case(256, K=72, V=40, layout='odd'), Case(300, K=20, V=12, layout='wide', H=3, HK=1), Case(300, layout='heads_first', B=2),
    Case(300, gate_dtype=fp16, state_dtype=fp16),
]  # fmt: skip

REVERSE_CASES = [
    Case(20, reverse=True, B=2), Case(20, reverse=True, cu_seqlens=(0, 7, 7, 18), state_v_first=True, K=24),
    Case(20, reverse=True, gate='gamma', resets=(), H=4, HK=2), Case(12, reverse=True, resets=((3, -INF), (7, -1e5))),
]  # fmt: skip

GPU_CASES = [
    *(Case(200, K=D, V=D, H=3, dtype=dtype) for D in (8, 16, 32, 64, 100, 128, 256, 512) for dtype in (bf16, fp16, fp32)),
    Case(1000, K=128, V=64, B=2, H=4, HK=2, dtype=bf16), Case(1000, K=64, V=256, B=2, H=4, dtype=bf16),
    Case(1000, K=192, V=160, dtype=bf16),
    Case(1000, K=128, V=128, dtype=bf16, cu_seqlens=(0, 64, 65, 65, 700, 990)), Case(1000, K=64, V=64, dtype=bf16, gate='gamma'),
    Case(1000, K=128, V=128, dtype=bf16, gate=None, state_v_first=True), Case(1000, K=128, V=128, dtype=bf16, layout='qkv', B=2),
    Case(1000, K=128, V=128, dtype=bf16, layout='odd'), Case(1000, K=128, V=128, dtype=bf16, layout='heads_first', B=2),
    # rows whose gaps are aligned and their ends are not: what is read through descriptors must stop there
    Case(1000, K=100, V=64, dtype=bf16, layout='wide'), Case(1000, K=64, V=1, dtype=fp16, layout='wide'),
    Case(300, K=1, V=64, layout='wide'),
    Case(1000, K=128, V=128, dtype=bf16, resets=((0, -INF), (500, -1e30), (501, -INF), (640, -90.0), (999, -1e4)), memory=300),
    Case(1000, K=128, V=128, dtype=bf16, gate_dtype=bf16, state_dtype=bf16), Case(3000, K=128, V=128, memory=1000),
]  # fmt: skip

# the rows of the contract where the state is cut in two halves of V
WIDE_CASES = [
    Case(64, K=256, V=256, dtype=bf16, initial_state=False, output_final_state=False), Case(500, K=256, V=160, H=3, dtype=bf16),
    Case(500, K=160, V=256, H=3, dtype=bf16), Case(500, K=256, V=64, dtype=bf16), Case(500, K=64, V=200, dtype=bf16),
    Case(1000, K=256, V=256, B=2, H=4, HK=2, dtype=bf16), Case(300, K=256, V=256, H=3, HK=1, dtype=bf16),
    Case(500, K=256, V=256, dtype=bf16, cu_seqlens=(0, 64, 65, 65, 300, 490)),
    Case(1000, K=256, V=256, dtype=fp16, gate=None, cu_seqlens=(0, 0, 64, 65, 65, 700, 1000)),
    Case(500, K=256, V=256, dtype=bf16, gate=None, state_v_first=True), Case(1000, K=256, V=256, dtype=bf16, layout='qkv', B=2),
    Case(1000, K=256, V=256, dtype=bf16, resets=((0, -INF), (500, -1e30), (501, -INF), (640, -90.0), (999, -1e4)), memory=300),
    # more heads than programs that run at once
    Case(3000, K=256, V=256, H=80, dtype=bf16, memory=1000),
]  # fmt: skip


# in the interpreter `chunk` never cuts, and is `fused_chunk` again: there `segments` stands for it
TABLE_MODES = [mode for mode in MODES if GPU or mode != 'chunk']


def with_mode(cases, *modes):
    found = {f'{mode}-{case.of(mode)}': (mode, case.of(mode)) for case in cases for mode in modes}
    return [pytest.param(*parameters, id=name) for name, parameters in found.items()]


def with_small_values(fn):
    """The mode with v divided by a power of two, and o multiplied by it."""

    def call(v, **others):
        o, state = fn(v=v / 64, **others)
        return o * 64, state

    return call


@pytest.mark.parametrize('mode', MODES)
def test_states_beyond_half_precision(mode):
    """The remedies of the contract: other modes, or a smaller v."""
    case = Case(150, dtype=fp16, gate=None, initial_state=False, output_final_state=False, scale=1.0)
    x = make_inputs(case)
    x |= {name: 32 + x[name] for name in 'kv'} | {'q': x['q'] / 512, 'do': x['do'] / 512}
    assert torch.einsum('bthk,bthv->bhkv', x['k'].double(), x['v'].double()).min() > 2 * 65504
    fn = MODES[mode]
    check(case, run(fn if mode in ('fused_recurrent', 'parallel') else with_small_values(fn), case, x), reference(case, x))


@pytest.mark.parametrize(
    'mode, case',
    with_mode(CASES, *TABLE_MODES) + with_mode(CHUNKED_CASES, 'fused_chunk', 'parallel') + with_mode(SEGMENT_CASES, 'segments')
    + with_mode(REVERSE_CASES, 'fused_recurrent')
    + (with_mode(GPU_CASES, *MODES) + with_mode(WIDE_CASES, 'segments', 'fused_chunk') if GPU else []),
)
def test_against_naive(mode, case):
    inputs = make_inputs(case)
    results = run(MODES[mode], case, inputs)
    check(case, results, reference(case, inputs))
    assert results['o'].dtype == case.dtype
    for name, x in inputs.items():
        if f'd{name}' in results:
            assert results[f'd{name}'].dtype == x.dtype, name
    if case.output_final_state:
        assert results['ht'].dtype == fp32
    if case.gate == 'g':
        for t, value in case.resets:
            if value < -90:
                assert (results['dg'][:, t] == 0).all()


@pytest.mark.parametrize('T', [64, 67, 1000, 8192] if GPU else [67, 300])
@pytest.mark.parametrize('memory', [1, 3, 10, 100, 1000] if GPU else [1, 10, 1000])
@pytest.mark.parametrize('mode', ['segments', 'fused_chunk', 'parallel'])
def test_accuracy_does_not_depend_on_length_or_gates(mode, T, memory):
    """The gate gradient is a sum over all that follows: noise must not pile up in it, with no state given and with states."""
    # half precision has an eighth of bfloat16's rounding, with which the interpreter cannot multiply
    dtype, factor = (bf16, 1) if GPU else (fp16, 8)
    D = 128 if GPU else 32
    for states in (False, True) if mode in STATEFUL else (False,):
        case = Case(T, H=4, K=D, V=D, dtype=dtype, memory=memory, initial_state=states, output_final_state=states)
        inputs = make_inputs(case)
        found = errors(run(MODES[mode], case, inputs), reference(case, inputs))
        for name, error in found.items():
            assert error * factor <= (6e-3 if name == 'dg' else 4e-3), f'{states=} {found}'


@pytest.mark.parametrize('memory', [6, 10])
def test_gate_gradient_before_a_short_last_chunk(memory):
    """A last chunk of three tokens hardly decays the final state's large gradient; the chunk before it does."""
    dtype, factor, D = (bf16, 1, 128) if GPU else (fp16, 8, 32)
    case = Case(67, H=8, K=D, V=D, dtype=dtype, memory=memory)
    inputs = make_inputs(case)
    inputs['dht'] *= 8
    found = errors(run(MODES['fused_chunk'], case, inputs), reference(case, inputs))
    assert found['dg'] * factor <= 6e-3, found


def test_recurrent_gate_gradient_between_anchors(monkeypatch):
    """Sequences of several anchor blocks, whole and ragged, both ways."""
    import fla_simple_gla.fused_recurrent as module

    monkeypatch.setattr(module, 'ANCHOR', 8)
    for case in (Case(24), Case(29, reverse=True), Case(30, cu_seqlens=(0, 9, 9, 17, 27)), Case(20, resets=((7, -INF), (13, -1e9)))):
        inputs = make_inputs(case)
        check(case, run(MODES['fused_recurrent'], case, inputs), reference(case, inputs))

    # a final state with a huge gradient, which decays within a few tokens: its rounding must not stay in the sum
    case = Case(48, memory=1)
    inputs = make_inputs(case)
    inputs['dht'] *= 1e5
    found, expected = run(MODES['fused_recurrent'], case, inputs)['dg'], reference(case, inputs)['dg']
    assert rms_error(found[:, :24], expected[:, :24]) < 1e-5


SETTINGS = {
    'set_float32_matmul_precision': lambda allowed: torch.set_float32_matmul_precision('high' if allowed else 'highest'),
    'allow_tf32': lambda allowed: setattr(torch.backends.cuda.matmul, 'allow_tf32', allowed),
    'fp32_precision': lambda allowed: setattr(torch.backends.cuda.matmul, 'fp32_precision', 'tf32' if allowed else 'ieee'),
}


@pytest.mark.parametrize('mode', CHUNKED)
@pytest.mark.parametrize('setting', [name for name in SETTINGS if name != 'fp32_precision' or hasattr(torch.backends.cuda.matmul, name)])
def test_tf32_where_the_user_allows_it(setting, mode):
    from fla_simple_gla._plans import fp32_precision

    case = Case(200, K=32, V=32).of(mode)
    inputs = make_inputs(case)
    expected = reference(case, inputs)
    SETTINGS[setting](True)
    try:
        assert fp32_precision(torch.float32) == 'tf32'
        found = errors(run(MODES[mode], case, inputs), expected)
    finally:
        SETTINGS[setting](False)
    assert fp32_precision(torch.float32) == 'tf32x3'
    assert max(found.values()) < 2e-3, found
    if GPU:
        assert found['o'] > 1e-5, 'tf32 was allowed but not used'
    check(case, run(MODES[mode], case, inputs), expected)
