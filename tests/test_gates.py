"""Gates: resets, tiles that are skipped as everything in them has decayed to zero, and growth."""

import dataclasses
import itertools

import pytest
import torch
from harness import (
    CHUNKED,
    DEVICE,
    GPU,
    HALF,
    LENGTH,
    MODES,
    STATEFUL,
    TOLERANCE,
    Case,
    D,
    check,
    chunk_in_segments,
    make_inputs,
    mark_slow,
    reference,
    rms_error,
    run,
    segments_of,
    slow_rows,
    tensors,
)

from fla_simple_gla import chunk_simple_gla, naive_chunk_simple_gla, naive_recurrent_simple_gla, parallel_simple_gla
from fla_simple_gla._cache import Cache
from fla_simple_gla._gates import chunk_gates
from fla_simple_gla._plans import Inputs
from fla_simple_gla.parallel import attention_config, block_sums

INF = float('inf')


@pytest.mark.parametrize('mode', mark_slow(MODES, 'segments', 'parallel'))
@pytest.mark.parametrize('gate', mark_slow([-INF, -1e30, -3e4], -1e30, -3e4))
def test_nothing_crosses_a_reset(mode, gate):
    """Values do not cross a reset forward, nor gradients backward, to the bit. Tokens beside it keep their accuracy."""
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
    # dg is a difference of sums over all tokens. In them the tokens after the reset cancel up to rounding.
    assert rms_error(first['dg'][:, :t], third['dg'][:, :t]) < 1e-5
    assert (first['dg'][:, t] == 0).all()


@pytest.mark.parametrize('mode', mark_slow(CHUNKED, 'segments', 'parallel'))
def test_no_noise_crosses_a_reset(mode):
    """Tokens after a reset may be much larger. Their rounding must not reach the gate gradients before it."""
    t = 40
    case = Case(300, K=D, V=D, dtype=HALF, memory=100, resets=((t, -INF),)).of(mode)
    inputs = make_inputs(case)
    for name in ('v', 'do'):
        inputs[name][:, t:] *= 30
    found, expected = run(MODES[mode], case, inputs)['dg'], reference(case, inputs)['dg']
    assert rms_error(found[:, :t], expected[:, :t]) <= TOLERANCE[HALF][1]


@pytest.mark.parametrize(
    'resets, memory', [(True, 100.0), *slow_rows([(False, 0.05)])], ids=['a reset', 'strong gates']
)
@pytest.mark.parametrize('dtype', mark_slow([torch.float32, HALF], HALF), ids=str)
def test_tiles_without_anything_are_skipped(resets, memory, dtype):
    """Tiles across a decay of zero are not read: infinity in them would give NaN. The bits are the same."""
    # The tile of the attention kernel for Hopper, or of the other one.
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
    """A block skips the blocks from which everything has decayed to zero, and no other block."""
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
        factors = (
            torch.exp2(largest.float())[:, None] * scale,
            torch.exp2((before[:, None] - ends[None]).float() + rests.float()[None]),
        )
        row, column = (
            torch.arange(blocks, device=DEVICE)[:, None, None],
            torch.arange(blocks, device=DEVICE)[None, :, None],
        )
        product, least = factors[0] * factors[1], torch.finfo(torch.float32).tiny
        limits = []
        # A GPU may take subnormal numbers for zero.
        for alive in (product != 0, (factors[0] >= least) & (factors[1] >= least) & (product >= least)):
            alive = alive & (column <= row) | (row == column)
            assert alive.sum() < H * blocks * (blocks + 1) / 2 or blocks < 5
            limits.append((torch.where(alive, column, T).amin(1), torch.where(alive, row + 1, 0).amax(0)))
        (first, end), (first_normal, end_normal) = limits
        found_first, found_end = ranges[:, slot : slot + blocks]
        assert ((first <= found_first) & (found_first <= first_normal)).all()
        assert ((end_normal <= found_end) & (found_end <= end)).all()


def test_growth_before_anything_is_there():
    """A positive gate may make the decay of a segment infinite. It must not be multiplied by a state of zero."""
    case = Case(256, K=D, V=D, resets=((0, 60.0), (70, 40.0)), initial_state=False, output_final_state=False)
    inputs = make_inputs(case)
    o, _ = chunk_in_segments(*tensors(inputs))
    expected, _ = naive_recurrent_simple_gla(*(x.double() for x in tensors(inputs)))
    assert rms_error(o, expected) < 1e-5


def test_growth_after_what_has_decayed():
    """A token counts by its own decay up to the end of the segment, not by that of the first token of its chunk."""
    q, k, v = torch.randn(3, 1, 700, 1, D, device=DEVICE)
    v *= (torch.arange(700, device=DEVICE) == 295)[:, None, None]
    g = torch.zeros(1, 700, 1, device=DEVICE)
    g[:, 290], g[:, 302] = -70.0, 70.0
    g[:, 400] = g[:, 500] = -47.5
    with segments_of(640, Cache(1000)):
        o, _ = chunk_simple_gla(q, k, v, g)
    expected, _ = naive_chunk_simple_gla(*(x.double() for x in (q, k, v, g)))
    assert rms_error(o[:, 640:], expected[:, 640:]) < TOLERANCE[o.dtype][0]
