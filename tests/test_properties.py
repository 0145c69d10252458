"""What holds between runs: pieces and wholes, modes and modes, batches and their rows, the same call twice."""

import dataclasses
import itertools

import pytest
import torch
from harness import (
    CHUNKED,
    DEVICE,
    GPU,
    INVARIANT,
    MODES,
    STATEFUL,
    TOLERANCE,
    Case,
    check,
    chunk_in_segments,
    make_inputs,
    poisoned_memory,
    reference,
    rms_error,
    run,
    segments_of,
)

from fla_simple_gla import (
    chunk_simple_gla,
    fused_recurrent_simple_gla,
    naive_chunk_simple_gla,
    naive_parallel_simple_gla,
    naive_recurrent_simple_gla,
    parallel_simple_gla,
)
from fla_simple_gla._cache import Cache
from fla_simple_gla._gates import chunk_gates
from fla_simple_gla._layout import rows_in_place
from fla_simple_gla._plans import Inputs
from fla_simple_gla.parallel import attention_config, block_sums

INF = float('inf')
HALF = torch.bfloat16 if GPU else torch.float16
# long enough for several chunks, blocks and segments; the interpreter goes token by token slowly
LENGTH = dict.fromkeys(MODES, 600 if GPU else 150) | {'segments': 600 if GPU else 280, 'fused_recurrent': 100 if GPU else 20}
D = 64 if GPU else 16


def tensors(inputs, *names):
    return [inputs[name] for name in names or ('q', 'k', 'v', 'g')]


def assert_same_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize('mode', STATEFUL)
def test_pieces_equal_the_whole(mode):
    """The state handed over at any point gives outputs and gradients of the whole, gradients flowing back through it."""
    case = Case(LENGTH[mode], K=D, V=D)
    inputs = make_inputs(case)
    cut = case.T // 3 + 1

    def in_pieces(q, k, v, g, initial_state, **options):
        o1, state = MODES[mode](q[:, :cut], k[:, :cut], v[:, :cut], g[:, :cut], initial_state=initial_state, **options)
        o2, state = MODES[mode](q[:, cut:], k[:, cut:], v[:, cut:], g[:, cut:], initial_state=state, **options)
        return torch.cat([o1, o2], 1), state

    check(case, run(in_pieces, case, inputs), reference(case, inputs))


@pytest.mark.parametrize('first, second', [*itertools.permutations(['chunk', 'fused_chunk', 'fused_recurrent'], 2)])
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


@pytest.mark.parametrize('mode', INVARIANT)
@pytest.mark.parametrize('dtype', [torch.float32, HALF], ids=str)
def test_a_packed_sequence_is_that_sequence_alone(mode, dtype):
    """Bit for bit, wherever it starts; so it is with its gradients and states."""
    bounds = (0, 33, 33, 34, LENGTH[mode] + 34) if mode in CHUNKED else (0, 5, 5, 6, LENGTH[mode])
    case = Case(bounds[-1] + 9, K=D, V=D, dtype=dtype, cu_seqlens=bounds).of(mode)
    inputs = make_inputs(case)
    packed = run(MODES[mode], case, inputs)
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        alone = {
            name: x if x is None else x[n : n + 1] if name in ('initial_state', 'dht') else x[:, start:end] for name, x in inputs.items()
        }
        expected = run(MODES[mode], Case(end - start, K=D, V=D, dtype=dtype).of(mode), alone)
        found = {
            name: x[n : n + 1] if name in ('ht', 'dinitial_state') else x[:, start:end] for name, x in packed.items()
        }
        assert_same_bits(found, expected)
    for name, x in packed.items():
        if name not in ('ht', 'dinitial_state'):
            assert (x[:, bounds[-1] :] == 0).all(), name


@pytest.mark.parametrize('mode, tail', [*((mode, 11) for mode in MODES), *((mode, 500) for mode in CHUNKED)])
@pytest.mark.parametrize('dtype', [torch.float32, HALF], ids=str)
def test_tokens_behind_the_last_sequence_are_not_read(mode, tail, dtype):
    """Padding may hold anything: its outputs and gradients are zero, and nothing of it gets into the others."""
    case = Case(19 + tail, K=D, V=D, dtype=dtype, cu_seqlens=(0, 7, 19)).of(mode)
    inputs = make_inputs(case)
    expected = reference(case, inputs)
    for name in ('q', 'k', 'v', 'g', 'do'):
        inputs[name][:, 19:] = float('nan')
    results = run(MODES[mode], case, inputs)
    check(case, results, expected)
    assert all((results[name][:, 19:] == 0).all() for name in ('o', 'dq', 'dk', 'dv', 'dg'))


@pytest.mark.parametrize('mode', INVARIANT)
@pytest.mark.parametrize('dtype', [torch.float32, HALF], ids=str)
def test_batch_invariance(mode, dtype):
    case = Case(LENGTH[mode], B=3, K=D, V=D, dtype=dtype).of(mode)
    inputs = make_inputs(case)
    whole = run(MODES[mode], case, inputs)
    # what is in the other rows must not even be a number
    row = {name: x if x is None else x[1:2].clone() for name, x in inputs.items()}
    alone = run(MODES[mode], case, row)
    assert_same_bits({name: x[1:2] for name, x in whole.items()}, alone)
    for x in inputs.values():
        if x is not None:
            x[0] = x[2] = float('nan')
    broken = run(MODES[mode], case, inputs)
    assert_same_bits({name: x[1:2] for name, x in broken.items()}, alone)


@pytest.mark.parametrize('dim', [64, 128, 256, 512] if GPU else [16])
@pytest.mark.parametrize('dtype', [torch.float32, HALF], ids=str)
@pytest.mark.parametrize('mode', MODES)
def test_same_bits_every_time(mode, dtype, dim):
    case = Case(LENGTH[mode] if GPU else 20, B=2, H=8 if GPU else 2, K=dim, V=dim, dtype=dtype).of(mode)
    inputs = make_inputs(case)
    first = run(MODES[mode], case, inputs)
    for _ in range(20 if GPU else 1):
        assert_same_bits(run(MODES[mode], case, inputs), first)


@pytest.mark.parametrize('mode', MODES)
def test_saved_tensors_that_come_back_otherwise(mode):
    """Hooks may move what is saved for the backward, and what comes back may lie otherwise."""
    case = Case(LENGTH[mode], K=D, V=D, layout='wide').of(mode)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.clone(memory_format=torch.contiguous_format))
    with hooks:
        results = run(MODES[mode], case)
    check(case, results, reference(case))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('gate', [-INF, -1e30, -3e4])
def test_nothing_crosses_a_reset(mode, gate):
    """Neither values forward nor gradients backward, to the bit; and what is beside the reset keeps its accuracy."""
    T = LENGTH[mode]
    t = T // 2 + 5
    case = Case(T, K=D, V=D, memory=1000, resets=((t, gate),)).of(mode)
    inputs = make_inputs(case)
    first = run(MODES[mode], case, inputs)
    check(case, first, reference(case, inputs))
    other = make_inputs(dataclasses.replace(case, seed=1))
    changed = {name: torch.cat([other[name][:, :t], inputs[name][:, t:]], 1) for name in ('q', 'k', 'v', 'do')}
    second = run(MODES[mode], case, inputs | changed | {'initial_state': other['initial_state']})
    for name in ('o', 'dq', 'dk', 'dv'):
        assert torch.equal(first[name][:, t:], second[name][:, t:]), name
    changed = {name: torch.cat([inputs[name][:, :t], other[name][:, t:]], 1) for name in ('q', 'k', 'v', 'do')}
    third = run(MODES[mode], case, inputs | changed | {'dht': other['dht']})
    for name in ('o', 'dq', 'dk', 'dv'):
        assert torch.equal(first[name][:, :t], third[name][:, :t]), name
    if mode in STATEFUL:
        assert torch.equal(first['dinitial_state'], third['dinitial_state'])
    # what follows is in the sums that dg is taken from, and cancels to their rounding
    assert rms_error(first['dg'][:, :t], third['dg'][:, :t]) < 1e-5
    assert (first['dg'][:, t] == 0).all()


@pytest.mark.parametrize('mode', CHUNKED)
def test_no_noise_crosses_a_reset(mode):
    """What follows a reset may be far larger than what is before it: its rounding must not get into the gate gradient there."""
    t = 40
    case = Case(300, K=D, V=D, dtype=HALF, memory=100, resets=((t, -INF),)).of(mode)
    inputs = make_inputs(case)
    for name in ('v', 'do'):
        inputs[name][:, t:] *= 30
    found, expected = run(MODES[mode], case, inputs)['dg'], reference(case, inputs)['dg']
    assert rms_error(found[:, :t], expected[:, :t]) <= TOLERANCE[HALF][1]


@pytest.mark.parametrize('case', [Case(100, B=2, H=4, HK=2), Case(70, gate='gamma', K=24, V=40, dtype=HALF), Case(40, gate=None)], ids=str)
def test_attention_map(case):
    inputs = make_inputs(case.of('parallel'))
    arguments = {name: inputs[name] for name in ('q', 'k', 'v', 'g', 'g_gamma')}
    arguments['q'].requires_grad_()
    with poisoned_memory():
        o, attention = parallel_simple_gla(**arguments, output_attentions=True)
    _, expected = naive_parallel_simple_gla(**{name: None if x is None else x.detach().double() for name, x in arguments.items()})
    assert attention.dtype == case.dtype and not attention.requires_grad
    assert rms_error(attention, expected) <= TOLERANCE[case.dtype][0]
    assert (attention.triu(1) == 0).all()
    plain, none = parallel_simple_gla(**arguments)
    assert none is None and rms_error(o, plain) <= TOLERANCE[case.dtype][0]
    # the map does not change what flows back from o
    dq, expected = (torch.autograd.grad(x, arguments['q'], inputs['do'])[0] for x in (o, plain))
    assert rms_error(dq, expected) <= TOLERANCE[case.dtype][0]


@pytest.mark.parametrize('resets, memory', [(True, 100.0), (False, 0.05)], ids=['a reset', 'strong gates'])
@pytest.mark.parametrize('dtype', [torch.float32, HALF], ids=str)
def test_tiles_without_anything_are_skipped(resets, memory, dtype):
    """What is behind a decay of zero is not even read, where it would have made NaN of 0 times infinity; and the bits are the same."""
    # of the walks for Hopper and of all others
    BT = 128 if GPU and dtype == HALF else attention_config(D, D, dtype, torch.device(DEVICE)).BT
    first = 2 * BT if resets else 4 * BT
    case = Case(6 * BT, K=D, V=D, memory=memory, resets=((2 * BT, -INF),) if resets else (), dtype=dtype).of('parallel')
    inputs = make_inputs(case)
    inputs['g'].clamp_(max=-0.1 / memory)
    expected = run(parallel_simple_gla, case, inputs)
    for name in ('q', 'k', 'v', 'do'):
        inputs[name][:, : 2 * BT] = INF
    found = run(parallel_simple_gla, case, inputs)
    for name in ('o', 'dq', 'dk', 'dv'):
        assert torch.equal(found[name][:, first:], expected[name][:, first:]), name
    inputs = make_inputs(case)
    inputs['g'].clamp_(max=-0.1 / memory)
    for name in ('q', 'k', 'v', 'do'):
        inputs[name][:, 2 * BT :] = INF
    found = run(parallel_simple_gla, case, inputs)
    end = 2 * BT if resets else 0
    for name in ('o', 'dq', 'dk', 'dv'):
        assert torch.equal(found[name][:, :end], expected[name][:, :end]), name


@pytest.mark.parametrize('cu_seqlens', [None, (0, 0, 100, 120, 620)])
def test_which_blocks_reach_which(cu_seqlens):
    BT, T, H, scale = 16, 640, 2, 0.125
    packed = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=DEVICE)
    inputs = Inputs(*tensors(make_inputs(Case(T, H=H, memory=2.0, resets=((70, -INF), (300, -1e4))))), None, packed)
    c = chunk_gates(inputs.g, BT, False, packed)
    sums, ranges = block_sums(c, inputs, scale, True)
    for n, (bos, eos) in enumerate(itertools.pairwise(cu_seqlens or (0, T))):
        slot = 0 if cu_seqlens is None else bos // BT + n + 1
        blocks = -(-(eos - bos) // BT)
        if not blocks:
            continue
        c_n, (ends, largest, rests) = c[0, slot : slot + blocks], sums[:, slot : slot + blocks]
        assert torch.equal(largest, c_n.amax(2).double())
        assert torch.equal(rests, (c_n[:, :, -1:] - c_n).amax(2).double())
        before = torch.cat([torch.zeros_like(ends[:1]), ends])[:blocks]
        factors = torch.exp2(largest.float())[:, None] * scale, torch.exp2((before[:, None] - ends[None]).float() + rests.float()[None])
        row, column = torch.arange(blocks, device=DEVICE)[:, None, None], torch.arange(blocks, device=DEVICE)[None, :, None]

        product, least = factors[0] * factors[1], torch.finfo(torch.float32).tiny
        limits = []
        # a GPU may take what is subnormal for zero
        for alive in (product != 0, (factors[0] >= least) & (factors[1] >= least) & (product >= least)):
            alive = alive & (column <= row) | (row == column)
            assert alive.sum() < H * blocks * (blocks + 1) / 2 or blocks < 5
            limits.append((torch.where(alive, column, T).amin(1), torch.where(alive, row + 1, 0).amax(0)))
        (first, behind), (first_normal, behind_normal) = limits
        found_first, found_behind = ranges[:, slot : slot + blocks]
        assert ((first <= found_first) & (found_first <= first_normal)).all()
        assert ((behind_normal <= found_behind) & (found_behind <= behind)).all()


def test_how_many_segments(monkeypatch):
    """As many as fill the GPU, and one where the sequences and heads do."""
    from fla_simple_gla import chunk, fused_chunk

    monkeypatch.setattr(chunk, 'multiprocessors', lambda device: 132)
    monkeypatch.setattr(chunk, 'exists', lambda device: True)
    monkeypatch.setattr(fused_chunk, 'is_hopper', lambda device: True)

    def segments(B, T, H, D, sequences=None, specialized=False):
        device = torch.device('cuda', 0)
        config = fused_chunk.sweep_config.__wrapped__(D, D, torch.bfloat16, device)
        tokens = chunk.segment_tokens.__wrapped__(B, T, H, D, config, device, specialized, sequences)
        assert tokens is None or tokens % 128 == 0
        return 1 if tokens is None else -(-T // tokens)

    assert segments(4, 4096, 64, 128) == 1
    assert segments(1, 8192, 96, 128) == 1
    assert segments(1, 100, 1, 64) == 1
    # 16 programs to a segment, where 264 run at once
    assert 14 <= segments(1, 131072, 8, 128) <= 16
    assert segments(2, 16384, 16, 128) == 4
    assert segments(1, 1_000_000, 4, 64) > 60
    # a program of the sweeps for Hopper has a multiprocessor for itself
    assert segments(4, 4096, 64, 128, specialized=True) == 1
    assert segments(1, 131072, 8, 128, specialized=True) == 16
    assert segments(2, 16384, 16, 128, specialized=True) == 4
    # here a half would save less than the launches take
    assert segments(4, 2048, 16, 128, specialized=True) == 1
    assert segments(8, 1024, 8, 64, specialized=True) == 1
    # packed ones: as one, unless they are many and short
    assert segments(1, 131072, 8, 128, 20) == segments(1, 131072, 8, 128)
    assert segments(1, 131072, 8, 128, 2000) == 1


def test_growth_before_anything_is_there():
    """A positive gate before the first token, with no state to grow, must not make a segment's decay of inf meet a state of zero."""
    case = Case(256, K=D, V=D, resets=((0, 60.0), (70, 40.0)), initial_state=False, output_final_state=False)
    inputs = make_inputs(case)
    o, _ = chunk_in_segments(*tensors(inputs))
    expected, _ = naive_recurrent_simple_gla(*(x.double() for x in tensors(inputs)))
    assert rms_error(o, expected) < 1e-5


@pytest.mark.parametrize('dtype', [torch.float32, HALF], ids=str)
def test_what_has_decayed_is_not_summarised(dtype):
    """NaN at tokens of which nothing is left at the segment's end, forward or back in time, does not get there."""
    torch.manual_seed(0)
    q, k, v, do = (x.to(DEVICE, dtype) for x in torch.randn(4, 1, 1280, 1, D))
    g = torch.full((1, 1280, 1), -0.5, device=DEVICE)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected, _ = naive_chunk_simple_gla(*leaves, g.double())
    _, *expected_gradients = torch.autograd.grad(expected, leaves, do.double())
    k[:, 100] = do[:, 1180] = float('nan')
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with segments_of(640, Cache(1000)):
        o, _ = chunk_simple_gla(*leaves, g)
    _, *gradients = torch.autograd.grad(o, leaves, do)
    assert o[:, 100:640].isnan().any()
    assert rms_error(o[:, 640:], expected[:, 640:]) < TOLERANCE[dtype][0]
    for found, exact in zip(gradients, expected_gradients):
        assert found[:, 640:].isnan().any()
        assert rms_error(found[:, 200:640], exact[:, 200:640]) < TOLERANCE[dtype][0]


def test_growth_behind_what_has_decayed():
    """What is left of a token at the segment's end counts, not what is left of its chunk's first one."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 700, 1, D, device=DEVICE)
    v *= (torch.arange(700, device=DEVICE) == 295)[:, None, None]
    g = torch.zeros(1, 700, 1, device=DEVICE)
    g[:, 290], g[:, 302] = -70.0, 70.0
    g[:, 400] = g[:, 500] = -47.5
    with segments_of(640, Cache(1000)):
        o, _ = chunk_simple_gla(q, k, v, g)
    expected, _ = naive_chunk_simple_gla(*(x.double() for x in (q, k, v, g)))
    assert rms_error(o[:, 640:], expected[:, 640:]) < TOLERANCE[o.dtype][0]


@pytest.mark.parametrize('mode', MODES)
def test_expanded_gradient(mode):
    """`.sum().backward()` passes a gradient with strides of zero."""
    case = Case(20, K=D, V=D, initial_state=False, output_final_state=False)
    inputs = make_inputs(case)
    q, k, v, g = (x.requires_grad_() for x in tensors(inputs))
    MODES[mode](q, k, v, g)[0].sum().backward()
    expected = reference(case, inputs | {'do': torch.ones_like(v)})
    for name, x in (('dq', q), ('dk', k), ('dv', v), ('dg', g)):
        assert rms_error(x.grad, expected[name]) < 1e-5, name


@pytest.mark.parametrize('mode', MODES)
def test_gradients_of_some_inputs_only(mode):
    case = Case(LENGTH[mode], K=D, V=D).of(mode)
    inputs = make_inputs(case)
    expected = run(MODES[mode], case, inputs)
    names = ('q', 'k', 'v', 'g', 'initial_state') if mode in STATEFUL else ('q', 'k', 'v', 'g')
    options = {'output_final_state': True} if mode in STATEFUL else {}
    for name in names:
        arguments = {n: inputs[n].detach() for n in names}
        arguments[name].requires_grad_()
        with poisoned_memory():
            o, ht = MODES[mode](**arguments, **options)
            outputs, grads = ([o, ht], [inputs['do'], inputs['dht']]) if mode in STATEFUL else ([o], [inputs['do']])
            (grad,) = torch.autograd.grad(outputs, [arguments[name]], grads)
        arguments[name].requires_grad_(False)
        assert torch.equal(grad, expected[f'd{name}']), name


@pytest.mark.parametrize('mode', STATEFUL)
def test_gradient_through_the_state_alone(mode):
    case = Case(LENGTH[mode], K=D, V=D)
    inputs = make_inputs(case)
    q, k, v, g = (x.requires_grad_() for x in tensors(inputs))
    _, ht = MODES[mode](q, k, v, g, output_final_state=True)
    ht.backward(inputs['dht'])
    expected = reference(case, inputs | {'do': torch.zeros_like(v), 'initial_state': None})
    for name, x in (('dk', k), ('dv', v), ('dg', g)):
        assert rms_error(x.grad, expected[name]) < 1e-5, name
    assert (q.grad == 0).all()


@pytest.mark.parametrize('layout', ['contiguous', 'qkv', 'heads_first', 'odd', 'wide'])
def test_no_layout_with_contiguous_rows_is_copied(layout):
    inputs = make_inputs(Case(20, B=2, layout=layout))
    for name in ('q', 'k', 'v', 'do'):
        assert rows_in_place(inputs[name]) is inputs[name], name


@pytest.mark.parametrize('mode', MODES)
def test_inputs_are_left_alone(mode):
    case = Case(20, K=D, V=D, layout='qkv').of(mode)
    inputs = make_inputs(case)
    copies = {name: None if x is None else x.clone() for name, x in inputs.items()}
    run(MODES[mode], case, inputs)
    for name, x in inputs.items():
        assert x is None or torch.equal(x, copies[name]), name


@pytest.mark.parametrize('mode', MODES)
def test_last_dimension_with_a_stride(mode):
    case = Case(20, K=D, V=D).of(mode)
    inputs = make_inputs(case)
    strided = {name: x if name not in 'qkv' else x.mT.contiguous().mT for name, x in inputs.items()}
    assert strided['q'].stride(-1) != 1
    assert_same_bits(run(MODES[mode], case, strided), run(MODES[mode], case, inputs))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dtype', [HALF] if GPU else [torch.bfloat16], ids=str)
def test_autocast(mode, dtype, monkeypatch):
    """Under autocast q, k and v are cast, gates and states are not: as by hand."""
    if not GPU:
        # the interpreter multiplies bfloat16 wrongly, and the CPU's autocast has no float16 everywhere: the CPU path stands in
        monkeypatch.setattr('fla_simple_gla._triton.INTERPRET', False)
    case = Case(20, K=D, V=D)
    inputs = make_inputs(case)
    q, k, v, g = tensors(inputs)
    options = {'initial_state': inputs['initial_state'], 'output_final_state': True} if mode in STATEFUL else {}
    with torch.autocast(DEVICE, dtype):
        o, ht = MODES[mode](q, k.to(dtype), v, g, **options)
    by_hand = MODES[mode](q.to(dtype), k.to(dtype), v.to(dtype), g, **options)
    assert o.dtype == dtype and torch.equal(o, by_hand[0])
    if mode in STATEFUL:
        assert ht.dtype == torch.float32 and torch.equal(ht, by_hand[1])


@pytest.mark.parametrize('mode', MODES)
def test_second_derivatives_are_refused(mode):
    case = Case(8)
    q, k, v, g = (x.requires_grad_() for x in tensors(make_inputs(case)))
    o, _ = MODES[mode](q, k, v, g)
    expected = torch.autograd.grad(o.square().sum(), q, retain_graph=True)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    assert torch.equal(dq, *expected)
    # a penalty on a gradient, too, where there are first derivatives beside it
    for loss in (dq.sum(), o.sum() + dq.square().sum()):
        with pytest.raises(RuntimeError, match=r'_backward.* no autograd formula'):
            torch.autograd.grad(loss, q, retain_graph=True)


@pytest.mark.parametrize('mode', MODES)
def test_no_tokens_and_no_batch(mode):
    options = {'output_final_state': True} if mode in STATEFUL else {}
    for B, T in ((0, 5), (0, 300), (2, 0)):
        q = torch.zeros(B, T, 2, D, device=DEVICE, requires_grad=True)
        g = torch.zeros(B, T, 2, device=DEVICE, requires_grad=True)
        o, ht = MODES[mode](q, q, q, g, **options)
        assert o.shape == q.shape
        if mode in STATEFUL:
            assert ht.shape == (B, 2, D, D) and (ht == 0).all()
        torch.autograd.grad(o.sum(), [q, g])


@pytest.mark.parametrize('mode', MODES)
def test_cpu_path(mode, monkeypatch):
    """CPU tensors run the naive reference through the same function: gradients, states and packing included."""
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


if GPU:

    def test_many_programs(memory_returned):
        """More heads in the batch than a grid's second dimension could have."""
        for B, H in ((70_000, 1), (1, 70_000)):
            for mode in MODES:
                case = Case(3, B=B, H=H, K=16, V=16).of(mode)
                inputs = make_inputs(case)
                check(case, run(MODES[mode], case, inputs), reference(case, inputs))

    @pytest.fixture
    def memory_returned():
        """So that a test that needs much leaves it to those in other processes."""
        yield
        torch.cuda.empty_cache()

    @pytest.mark.parametrize(
        'mode, layout, K, V',
        [
            ('chunk', 'contiguous', 128, 8), ('chunk', 'heads_first', 8, 128), ('fused_chunk', 'heads_first', 128, 8),
            ('parallel', 'contiguous', 128, 8), ('parallel', 'heads_first', 8, 128),
        ],
    )  # fmt: skip
    def test_more_elements_than_int32_counts(mode, layout, K, V, memory_returned):
        """The end of tensors of 2.4e9 numbers, which a reset cuts off from what is before it, and its gradients."""
        # (the memory for the gate gradient of the quadratic mode grows with the square of T)
        T, H, tail = (72_000, 256, 1000) if mode == 'parallel' else (1_150_000, 16, 1000)

        def random(D):
            shape = (1, T, H, D) if layout == 'contiguous' else (1, H, T, D)
            x = torch.randn(shape, dtype=torch.bfloat16, device='cuda')
            return x if layout == 'contiguous' else x.transpose(1, 2)

        q, k, v, do = random(K), random(K), random(V), random(V)
        assert max(q.numel(), v.numel()) > 2**31
        # the quadratic mode is to skip nearly everything
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
            *(x.double() for x in tokens), initial_state=pool[slots].double(), output_final_state=True,
        )
        with torch.no_grad():
            o, _ = MODES[mode](*tokens, initial_state=pool, state_indices=slots)
        assert rms_error(o, expected) <= TOLERANCE[dtype][0]
        assert rms_error(pool[slots], ht) <= TOLERANCE[pool.dtype][0]

    def test_a_million_tokens(memory_returned):
        """The chunk mode agrees with the recurrent one, and its memory is that of its results and a tenth: it grows with T.


        The tenth is what dg is taken from: a state every 256 tokens, beside dk and dv, and four numbers to a token and head.
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

    def test_no_call_waits_for_the_gpu():
        """Neither forward nor backward synchronises, with packed sequences least of all."""
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
