"""Outputs and gradients of every mode against naive in fp64, for every row of the contract."""

import dataclasses

import pytest
import torch
from harness import (
    CHUNKED,
    GPU,
    HALF,
    MODES,
    STATEFUL,
    TOLERANCE,
    Case,
    check,
    errors,
    make_inputs,
    mark_slow,
    poisoned_memory,
    reference,
    rms_error,
    run,
    slow_rows,
)

from fla_simple_gla import naive_parallel_simple_gla, parallel_simple_gla

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
INF = float('inf')

# Each list of cases has a second one, whose cases are marked as slow.
CASES = [
    # Lengths and half precision.
    Case(0), Case(1), Case(40, dtype=fp16),
    # Gates.
    Case(40, gate='gamma', memory=5),
    # States, and grouped heads.
    Case(40, state_v_first=True, K=24), Case(40, H=4, HK=2),
    # Packed sequences: an empty one, and tokens after the last one.
    Case(80, cu_seqlens=(0, 7, 7, 50, 70)),
    # Rows that are parts of wider ones.
    Case(40, layout='wide', K=20, V=12),
]  # fmt: skip
SLOW_CASES = [
    # Lengths around the chunk sizes, and dimensions.
    Case(2, K=1, V=1), Case(33, B=2), Case(9, K=40, V=72, H=3), Case(9, dtype=fp16, K=24, V=40, B=2),
    # Gates.
    Case(40, gate=None), Case(40, gate_dtype=fp16), Case(40, memory=1), Case(40, memory=1000),
    Case(66, resets=((0, -INF), (20, -1e30), (21, -INF), (50, -90.0), (65, -1e4)), memory=300),
    Case(24, resets=((5, 2.0), (9, 4.0))),
    Case(40, resets=tuple((t, -200.0) for t in range(0, 40, 2)), memory=300),
    Case(40, resets=((7, -INF), (20, -1e30)), memory=1), Case(40, resets=((7, -INF), (20, -1e30)), dtype=fp16),
    # Grouped heads.
    Case(40, H=3, HK=1, K=24, gate='gamma'), Case(40, H=4, HK=1, dtype=fp16),
    # States.
    Case(40, initial_state=False), Case(40, output_final_state=False), Case(40, state_dtype=fp16),
    Case(40, initial_state=False, output_final_state=False), Case(0, B=2, state_v_first=True, V=24),
    # Packed sequences, with both integer types.
    Case(40, cu_seqlens=(0, 0, 0)), Case(0, cu_seqlens=(0, 0)),
    Case(60, cu_seqlens=(0, 0, 33, 60, 60), cu_dtype=torch.int32, state_v_first=True),
    Case(40, cu_seqlens=(0, 40), H=4, HK=2, gate='gamma'),
    Case(40, cu_seqlens=(0, 1, 2, 30), gate=None, initial_state=False),
    # Layouts and scale.
    Case(40, layout='qkv', B=2, HK=1), Case(40, layout='heads_first', B=2), Case(40, layout='odd'),
    Case(40, scale=0.3), Case(40, scale=-2.0),
]  # fmt: skip

# Several chunks, several blocks of an attention map, and several steps over a long row.
CHUNKED_CASES = [Case(31), Case(70, K=24, V=40)]
SLOW_CHUNKED_CASES = [
    Case(50, K=40, V=72, B=2, H=3), Case(70, dtype=fp16, K=24, V=40, B=2), Case(300, memory=3), Case(300, memory=100),
    Case(290, cu_seqlens=(0, 130, 131, 280)), Case(33, K=300, V=20), Case(20, K=20, V=300),
    Case(150, dtype=fp16, memory=3, K=64, V=64), Case(20, K=512, V=512, H=1, dtype=fp16),
]  # fmt: skip

# Segments of 128 tokens, whole and short, and sequences of one and of several, in every row of the contract.
SEGMENT_CASES = [
    Case(300, gate='gamma', state_v_first=True), Case(300, cu_seqlens=(0, 0, 300), cu_dtype=torch.int32, gate=None),
]  # fmt: skip
SLOW_SEGMENT_CASES = [
    Case(300, memory=300, resets=((0, -INF), (127, -1e30), (128, -INF), (200, -90.0), (255, -1e4))),
    Case(256), Case(257, dtype=fp16, K=24, V=40), Case(400, B=2, H=4, HK=2, memory=100),
    Case(300, gate=None, layout='qkv'),
    Case(300, initial_state=False), Case(300, output_final_state=False, scale=0.3), Case(300, memory=1),
    Case(600, cu_seqlens=(0, 130, 130, 131, 387, 580), memory=100), Case(256, K=72, V=40, layout='odd'),
    Case(300, K=20, V=12, layout='wide', H=3, HK=1), Case(300, layout='heads_first', B=2),
    Case(300, gate_dtype=fp16, state_dtype=fp16),
]  # fmt: skip

REVERSE_CASES = [
    Case(20, reverse=True, cu_seqlens=(0, 7, 7, 18), state_v_first=True, K=24),
    Case(12, reverse=True, resets=((3, -INF), (7, -1e5))),
]  # fmt: skip
SLOW_REVERSE_CASES = [Case(20, reverse=True, B=2), Case(20, reverse=True, gate='gamma', resets=(), H=4, HK=2)]

LONG_RESETS = (0, -INF), (500, -1e30), (501, -INF), (640, -90.0), (999, -1e4)
GPU_CASES = [
    *(Case(200, K=D, V=D, H=3, dtype=dtype) for D in (8, 16, 32, 64, 100, 128, 256, 512)
      for dtype in (bf16, fp16, fp32)),
    Case(1000, K=128, V=64, B=2, H=4, HK=2, dtype=bf16), Case(1000, K=64, V=256, B=2, H=4, dtype=bf16),
    Case(1000, K=192, V=160, dtype=bf16),
    Case(1000, K=128, V=128, dtype=bf16, cu_seqlens=(0, 64, 65, 65, 700, 990)),
    Case(1000, K=64, V=64, dtype=bf16, gate='gamma'),
    Case(1000, K=128, V=128, dtype=bf16, gate=None, state_v_first=True),
    Case(1000, K=128, V=128, dtype=bf16, layout='qkv', B=2),
    Case(1000, K=128, V=128, dtype=bf16, layout='odd'), Case(1000, K=128, V=128, dtype=bf16, layout='heads_first', B=2),
    # The strides of these rows are aligned, and their ends are not. Reads through descriptors must stop at the ends.
    Case(1000, K=100, V=64, dtype=bf16, layout='wide'), Case(1000, K=64, V=1, dtype=fp16, layout='wide'),
    Case(300, K=1, V=64, layout='wide'),
    Case(1000, K=128, V=128, dtype=bf16, resets=LONG_RESETS, memory=300),
    Case(1000, K=128, V=128, dtype=bf16, gate_dtype=bf16, state_dtype=bf16), Case(3000, K=128, V=128, memory=1000),
]  # fmt: skip

# States of every shape in the kernels for Hopper: cut to one program or several, in columns and in rows, and to pieces;
# and two heads that share q and k as one task.
STATE_CASES = [
    # So many heads that the error of dg is a mean: over three it is up to 9e-3, as the inputs come.
    *(Case(500, K=K, V=V, H=51, dtype=bf16) for K, V in ((64, 128), (128, 64), (40, 96), (96, 40))),
    Case(1000, K=128, V=64, dtype=bf16, cu_seqlens=(0, 0, 64, 65, 65, 700, 990)),
    Case(1000, K=64, V=128, dtype=fp16, cu_seqlens=(0, 0, 64, 65, 65, 700, 990), state_v_first=True),
    Case(3000, K=64, V=128, H=160, HK=80, dtype=bf16, memory=1000),
    Case(64, K=256, V=256, dtype=bf16, initial_state=False, output_final_state=False),
    Case(500, K=256, V=160, H=3, dtype=bf16),
    Case(500, K=160, V=256, H=3, dtype=bf16), Case(500, K=256, V=64, dtype=bf16), Case(500, K=64, V=200, dtype=bf16),
    Case(1000, K=256, V=256, B=2, H=4, HK=2, dtype=bf16), Case(300, K=256, V=256, H=3, HK=1, dtype=bf16),
    Case(500, K=256, V=256, dtype=bf16, cu_seqlens=(0, 64, 65, 65, 300, 490)),
    Case(1000, K=256, V=256, dtype=fp16, gate=None, cu_seqlens=(0, 0, 64, 65, 65, 700, 1000)),
    Case(500, K=256, V=256, dtype=bf16, gate=None, state_v_first=True),
    Case(1000, K=256, V=256, dtype=bf16, layout='qkv', B=2),
    Case(1000, K=256, V=256, dtype=bf16, resets=LONG_RESETS, memory=300),
    # More heads than programs that run at once, which then share some.
    Case(3000, K=256, V=256, H=80, dtype=bf16, memory=1000), Case(1000, K=128, V=128, H=140, dtype=bf16, memory=1000),
    Case(500, K=64, V=64, H=300, B=2, dtype=fp16, gate=None, memory=1000),
    Case(300, K=512, V=128, H=140, HK=70, dtype=bf16), Case(300, K=256, V=512, H=40, HK=8, dtype=bf16),
    *(Case(500, K=K, V=V, dtype=bf16) for K, V in (
        (192, 192), (256, 512), (512, 256), (512, 512), (320, 64), (40, 392), (384, 136), (128, 256))),
    Case(1000, K=512, V=264, dtype=fp16, HK=1, state_v_first=True, memory=100),
    Case(1000, K=512, V=512, dtype=bf16, cu_seqlens=(0, 0, 64, 65, 65, 700, 1000)),
    Case(1000, K=256, V=512, dtype=bf16, gate='gamma', layout='qkv', B=2),
    Case(1000, K=512, V=128, dtype=bf16, gate=None), Case(1000, K=192, V=512, dtype=bf16, resets=LONG_RESETS),
    Case(500, K=128, V=64, H=4, HK=1, dtype=bf16), Case(500, K=256, V=64, H=6, HK=3, dtype=fp16, layout='qkv'),
    Case(500, K=72, V=40, H=4, HK=2, dtype=bf16, state_v_first=True), Case(500, K=512, V=48, H=2, HK=1, dtype=bf16),
    Case(1000, K=128, V=64, H=4, HK=1, dtype=bf16, cu_seqlens=(0, 0, 64, 65, 65, 700, 990), gate_dtype=bf16),
    Case(1000, K=128, V=64, B=2, H=8, HK=2, dtype=bf16, resets=LONG_RESETS, memory=300),
    Case(1000, K=128, V=64, HK=1, dtype=bf16, initial_state=False, output_final_state=False),
    Case(1000, K=128, V=64, H=8, HK=4, dtype=fp16, gate='gamma'),
    Case(1000, K=128, V=64, H=4, HK=2, dtype=fp16, gate=None, layout='heads_first', B=2),
    Case(3000, K=128, V=64, B=2, H=160, HK=1, dtype=bf16, memory=1000),
]  # fmt: skip


# In the interpreter `chunk` does what `fused_chunk` does, as it never cuts. There `segments` takes its place.
TABLE_MODES = [mode for mode in MODES if GPU or mode != 'chunk']


def with_mode(cases, *modes, slow=()):
    """A parameter for each case and mode. Those of the cases in `slow` are marked."""
    quick, all_cases = (
        {f'{mode}-{case.of(mode)}': (mode, case.of(mode)) for case in given for mode in modes}
        for given in (cases, [*cases, *slow])
    )
    return [
        pytest.param(*parameters, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, parameters in all_cases.items()
    ]


def with_small_values(fn):
    """The mode for v divided by a power of two. Its o is multiplied by it."""

    def call(v, **others):
        o, state = fn(v=v / 64, **others)
        return o * 64, state

    return call


@pytest.mark.parametrize('mode', mark_slow(MODES, 'chunk', 'segments', 'fused_recurrent', 'parallel'))
def test_states_beyond_half_precision(mode):
    """The contract has two remedies: another mode, or a smaller v."""
    case = Case(150, dtype=fp16, gate=None, initial_state=False, output_final_state=False, scale=1.0)
    x = make_inputs(case)
    x |= {name: 32 + x[name] for name in 'kv'} | {'q': x['q'] / 512, 'do': x['do'] / 512}
    assert torch.einsum('bthk,bthv->bhkv', x['k'].double(), x['v'].double()).min() > 2 * 65504
    fn = MODES[mode]
    check(
        case, run(fn if mode in ('fused_recurrent', 'parallel') else with_small_values(fn), case, x), reference(case, x)
    )


@pytest.mark.parametrize(
    'mode, case',
    [
        *with_mode(CASES, *TABLE_MODES, slow=SLOW_CASES),
        *with_mode(CHUNKED_CASES, 'fused_chunk', 'parallel', slow=SLOW_CHUNKED_CASES),
        *with_mode(SEGMENT_CASES, 'segments', slow=SLOW_SEGMENT_CASES),
        *with_mode(REVERSE_CASES, 'fused_recurrent', slow=SLOW_REVERSE_CASES),
        *(with_mode(GPU_CASES, *MODES) if GPU else []),
    ],
)
def test_against_naive(mode, case):
    check_against_naive(mode, case)


@pytest.mark.parametrize('mode, case', with_mode(STATE_CASES, 'segments', 'fused_chunk') if GPU else [])
def test_states_of_all_shapes(mode, case):
    check_against_naive(mode, case)


def check_gate_of_tokens(mode, case, inputs, dg_gamma, expected):
    """The gradient of the same gate, given for each token, and that dg_gamma is its sum."""
    g = inputs['g_gamma'].expand(inputs['v'].shape[:3]).contiguous()
    dg = run(MODES[mode], dataclasses.replace(case, gate='g'), inputs | {'g': g, 'g_gamma': None})['dg']
    assert rms_error(dg, expected) <= TOLERANCE[case.dtype][1]
    # The two calls round their decays differently: in fp32, where many tokens have one error in common, and so their
    # products in the dtype, each for itself. A token left out would make tokens ** -0.5 of the norm.
    rounding = torch.finfo(case.dtype).eps / 2 + 1e-6 * dg[..., 0].numel() ** 0.5
    assert (dg_gamma.double() - dg.double().sum((0, 1))).norm() <= rounding * dg.double().norm()


def check_against_naive(mode, case):
    inputs = make_inputs(case)
    results = run(MODES[mode], case, inputs)
    expected = reference(case, inputs)
    check(case, results, expected)
    if case.gate == 'gamma':
        check_gate_of_tokens(mode, case, inputs, results['dg_gamma'], expected['dg'])
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


@pytest.mark.parametrize(
    'case',
    [*slow_rows([[Case(100, B=2, H=4, HK=2)]]), Case(70, gate='gamma', K=24, V=40, dtype=HALF), Case(40, gate=None)],
    ids=str,
)
def test_attention_map(case):
    inputs = make_inputs(case.of('parallel'))
    arguments = {name: inputs[name] for name in ('q', 'k', 'v', 'g', 'g_gamma')}
    arguments['q'].requires_grad_()
    with poisoned_memory():
        o, attention = parallel_simple_gla(**arguments, output_attentions=True)
    _, expected = naive_parallel_simple_gla(
        **{name: None if x is None else x.detach().double() for name, x in arguments.items()}
    )
    assert attention.dtype == case.dtype and not attention.requires_grad
    assert rms_error(attention, expected) <= TOLERANCE[case.dtype][0]
    assert (attention.triu(1) == 0).all()
    plain, none = parallel_simple_gla(**arguments)
    assert none is None and rms_error(o, plain) <= TOLERANCE[case.dtype][0]
    # The gradients of o are the same with and without the map.
    dq, expected = (torch.autograd.grad(x, arguments['q'], inputs['do'])[0] for x in (o, plain))
    assert rms_error(dq, expected) <= TOLERANCE[case.dtype][0]


@pytest.mark.parametrize('T', [64, 67, 1000, 8192] if GPU else mark_slow([67, 300], 300))
@pytest.mark.parametrize('memory', [1, 3, 10, 100, 1000] if GPU else mark_slow([1, 10, 1000], 1, 1000))
@pytest.mark.parametrize('mode', mark_slow(['segments', 'fused_chunk', 'parallel'], 'segments', 'parallel'))
def test_accuracy_does_not_depend_on_length_or_gates(mode, T, memory):
    """The gate gradient is a sum over all later tokens. Rounding must not add up in it, with and without states."""
    # The interpreter multiplies bfloat16 wrongly. Half precision rounds eight times less.
    dtype, factor = (bf16, 1) if GPU else (fp16, 8)
    D = 128 if GPU else 32
    for states in (False, True) if mode in STATEFUL else (False,):
        case = Case(T, H=4, K=D, V=D, dtype=dtype, memory=memory, initial_state=states, output_final_state=states)
        inputs = make_inputs(case)
        found = errors(run(MODES[mode], case, inputs), reference(case, inputs))
        for name, error in found.items():
            assert error * factor <= (6e-3 if name == 'dg' else 4e-3), f'{states=} {found}'


@pytest.mark.parametrize('memory', mark_slow([6, 10], 6))
def test_gate_gradient_before_a_short_last_chunk(memory):
    """A last chunk of three tokens hardly decays the large gradient of the final state. The chunk before it does."""
    dtype, factor, D = (bf16, 1, 128) if GPU else (fp16, 8, 32)
    case = Case(67, H=8, K=D, V=D, dtype=dtype, memory=memory)
    inputs = make_inputs(case)
    inputs['dht'] *= 8
    found = errors(run(MODES['fused_chunk'], case, inputs), reference(case, inputs))
    assert found['dg'] * factor <= 6e-3, found


@pytest.mark.slow
def test_recurrent_gate_gradient_between_anchors(monkeypatch):
    """Sequences have several anchor blocks, with a full or a short last one, forward and back in time."""
    import fla_simple_gla.fused_recurrent as module

    monkeypatch.setattr(module, 'ANCHOR_TOKENS', 8)
    for case in (
        Case(24),
        Case(29, reverse=True),
        Case(30, cu_seqlens=(0, 9, 9, 17, 27)),
        Case(20, resets=((7, -INF), (13, -1e9))),
    ):
        inputs = make_inputs(case)
        check(case, run(MODES['fused_recurrent'], case, inputs), reference(case, inputs))

    # The huge gradient of the final state decays within a few tokens. Its rounding must not stay in the sum.
    case = Case(48, memory=1)
    inputs = make_inputs(case)
    inputs['dht'] *= 1e5
    found, expected = run(MODES['fused_recurrent'], case, inputs)['dg'], reference(case, inputs)['dg']
    assert rms_error(found[:, :24], expected[:, :24]) < 1e-5


SETTINGS = {
    'set_float32_matmul_precision': lambda allowed: torch.set_float32_matmul_precision(
        'high' if allowed else 'highest'
    ),
    'allow_tf32': lambda allowed: setattr(torch.backends.cuda.matmul, 'allow_tf32', allowed),
    'fp32_precision': lambda allowed: setattr(
        torch.backends.cuda.matmul, 'fp32_precision', 'tf32' if allowed else 'ieee'
    ),
}


@pytest.mark.parametrize('mode', mark_slow(CHUNKED, 'segments', 'chunk', 'parallel'))
@pytest.mark.parametrize(
    'setting',
    mark_slow(
        [name for name in SETTINGS if name != 'fp32_precision' or hasattr(torch.backends.cuda.matmul, name)],
        'set_float32_matmul_precision',
        'fp32_precision',
    ),
)
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
