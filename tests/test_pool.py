"""States in a pool: read and replaced in place at the slots that are named, and nowhere else."""

import pytest
import torch
from harness import (
    DEVICE,
    GPU,
    HALF,
    MODES,
    STATEFUL,
    TOLERANCE,
    Case,
    D,
    make_inputs,
    mark_slow,
    place,
    poisoned_memory,
    rms_error,
)

from fla_simple_gla import fused_recurrent_simple_gla, naive_recurrent_simple_gla
from fla_simple_gla._cache import Cache
from fla_simple_gla.hopper import sweeps_of

SLOTS = 9
INDICES = [(5, -1, 0, 2), (8, 3, 1, 0), (-1, -1, -1, 4)]

CASES = [
    Case(1, B=4, K=D, V=D),
    Case(5, B=4, K=24, V=40, H=4, HK=2, state_v_first=True),
    Case(3, B=4, K=D, V=D, state_dtype=HALF),
    Case(40, B=4, K=D, V=D, state_dtype=torch.float16, gate='gamma'),
    Case(150, B=4, K=D, V=D, dtype=HALF, state_v_first=True),
    Case(40, cu_seqlens=(0, 20, 21, 21, 33), K=D, V=D),
    Case(30, cu_seqlens=(0, 1, 2, 9, 30), K=D, V=D, dtype=HALF, gate=None),
    Case(3, B=4, K=D, V=D, state_dtype=HALF, state_v_first=True, layout='wide'),
    Case(2, B=4, K=24, V=41, state_dtype=HALF, layout='odd'),
    Case(6, B=4, K=D, V=D, H=4, HK=2, reverse=True),
    Case(30, cu_seqlens=(0, 5, 5, 19, 27), K=D, V=24, reverse=True, state_dtype=HALF),
]
# dims and lengths of other kernels and configurations
LARGE_CASES = [
    *(
        Case(300, B=4, K=K, V=V, dtype=HALF, state_v_first=v_first)
        for K, V, v_first in ((128, 128, False), (256, 256, True), (64, 128, True), (512, 64, False), (512, 40, True))
    ),
    *(
        Case(4, B=4, K=128, V=V, state_dtype=HALF, state_v_first=v_first)
        for V in (128, 127)
        for v_first in (False, True)
    ),
    *(
        Case(700, cu_seqlens=(0, 300, 301, 301, 690), K=K, V=V, dtype=HALF, state_dtype=dtype)
        for K, V, dtype in ((64, 64, HALF), (128, 128, HALF), (256, 200, torch.float32))
    ),
]
MODES_HERE = {mode: MODES[mode] for mode in STATEFUL} | {
    f'cpu {mode}': MODES[mode] for mode in ('fused_recurrent', 'chunk', 'fused_chunk')
}


def outside(case, padding):
    """Rows of o that are zero."""
    if case.cu_seqlens is None:
        return torch.arange(case.B)[padding.cpu()], slice(None)
    bounds = case.cu_seqlens
    tokens = [t for n in range(4) if padding[n] for t in range(bounds[n], bounds[n + 1])]
    return slice(None), [*tokens, *range(bounds[-1], case.T)]


def make_pool(case: Case, indices: tuple[int, ...], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool of SLOTS states, in which those that are not named are NaN; and all of the memory that it lies in."""
    shape = (case.H, case.V, case.K) if case.state_v_first else (case.H, case.K, case.V)
    # one more in front, which is where a slot -1 would be
    whole = torch.randn(1 + SLOTS, *shape, generator=torch.Generator().manual_seed(1))
    whole = place(whole.to(device, case.state_dtype), case.layout)
    whole[[0, *(1 + i for i in range(SLOTS) if i not in indices)]] = float('nan')
    # rows may be parts of wider ones
    return whole[1:], whole if whole._base is None else whole._base


def expected_in_pool(case: Case, inputs: dict, h0: torch.Tensor, cu_seqlens: torch.Tensor | None):
    """o, the final states, and those after every token, of naive in fp64 from h0."""
    precise = {name: None if x is None else x.double() for name, x in inputs.items()}
    q = precise['q']
    states = torch.empty(*q.shape[:2], case.H, case.K, case.V, dtype=torch.float64, device=q.device)
    o, ht = naive_recurrent_simple_gla(
        *(precise[name] for name in ('q', 'k', 'v', 'g')),
        initial_state=h0.mT if case.state_v_first else h0,
        g_gamma=precise['g_gamma'],
        cu_seqlens=cu_seqlens,
        intermediate_states_buffer=states,
        reverse=case.reverse,
    )
    return o, *(x.mT if case.state_v_first else x for x in (ht, states))


def check_pool(mode, case, indices, buffer=None):
    """A call against naive in fp64, from h0 gathered and with nothing in place. Padding is NaN.

    With a dtype for a buffer, the states after every token are asked for too.
    """
    device = 'cpu' if mode.startswith('cpu') else DEVICE
    inputs = make_inputs(case, device)
    pool, memory = make_pool(case, indices, device)
    before = memory.clone()
    slots = torch.tensor(indices, device=device, dtype=torch.int32 if case.T % 2 else torch.int64)
    named = slots >= 0
    cu_seqlens = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens, device=device)
    h0 = pool[slots.clamp_min(0).long()].double().nan_to_num()
    expected, ht, states = expected_in_pool(case, inputs, h0, cu_seqlens)
    rows = outside(case, ~named)
    expected[rows] = 0
    tokens = {name: inputs[name] for name in ('q', 'k', 'v', 'g') if inputs[name] is not None}
    for x in tokens.values():
        x[rows] = float('nan')

    options = {'reverse': True} if case.reverse else {}
    if buffer is not None:
        options['intermediate_states_buffer'] = torch.full(states.shape, 7.0, dtype=buffer, device=device)
    states_in = dict(initial_state=pool, state_v_first=case.state_v_first, state_indices=slots)
    with torch.no_grad(), poisoned_memory():
        o, final_state = MODES_HERE[mode](
            **tokens, g_gamma=inputs['g_gamma'], cu_seqlens=cu_seqlens, **states_in, **options
        )
    assert final_state is pool
    tolerance = TOLERANCE[case.dtype][0]
    assert (o[rows] == 0).all()
    assert rms_error(o, expected) <= tolerance
    eps = torch.finfo(case.state_dtype).eps
    # the recurrent mode rounds no state but where it is stored, once: an RMS error of about 0.21 eps
    of_state = max(1e-5, eps / 4) if 'fused_recurrent' in mode else max(tolerance, eps / 2)
    slots = slots[named].long()
    assert rms_error(pool[slots], ht[named]) <= of_state
    if buffer is not None:
        found = options['intermediate_states_buffer']
        assert (found[rows] == 7).all()
        found[rows], states[rows] = 0, 0
        assert rms_error(found, states) <= max(1e-5, torch.finfo(buffer).eps / 4)
    # nothing else is touched
    pool[slots] = h0[named].to(pool.dtype)
    assert torch.equal(memory.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize(
    'mode, case',
    [
        pytest.param(mode, case, id=f'{mode}-{case}')
        for mode in MODES_HERE
        for case in CASES + (LARGE_CASES if GPU and not mode.startswith('cpu') else [])
        if 'fused_recurrent' in mode or not case.reverse
    ],
)
@pytest.mark.parametrize('indices', mark_slow(INDICES, *INDICES[1:]))
def test_states_in_a_pool(mode, indices, case, monkeypatch):
    if mode.startswith('cpu'):
        monkeypatch.setattr('fla_simple_gla._triton.INTERPRET', False)
    buffers = {INDICES[0]: case.state_dtype, INDICES[2]: torch.float32} if 'fused_recurrent' in mode else {}
    check_pool(mode, case, indices, buffers.get(indices))


@pytest.mark.skipif(
    not GPU or sweeps_of(64, 64, HALF, torch.device(DEVICE)) is None, reason='needs the sweeps for Hopper'
)
@pytest.mark.parametrize('case', [case for case in LARGE_CASES if case.dtype == HALF], ids=str)
@pytest.mark.parametrize('mode', ['segments', 'fused_chunk'])
def test_padding_between_sequences_of_one_program(mode, case, monkeypatch):
    """One multiprocessor: the programs, which stay, go from sequences to padding and on."""
    for module in ('sweep', 'wide'):
        monkeypatch.setattr(f'fla_simple_gla.hopper.{module}.multiprocessors', lambda device: 1)
    for caches in ('fla_simple_gla._plans.plans', 'fla_simple_gla._passes.records', 'harness.PLANS'):
        monkeypatch.setattr(caches, Cache(1000))
    check_pool(mode, case, INDICES[0])


@pytest.mark.parametrize('mode', [mode for mode in MODES_HERE if mode != 'segments'])
def test_a_pool_without_slots(mode, monkeypatch):
    if mode.startswith('cpu'):
        monkeypatch.setattr('fla_simple_gla._triton.INTERPRET', False)
    device = 'cpu' if mode.startswith('cpu') else DEVICE
    inputs = make_inputs(Case(3, B=2), device)
    slots = torch.tensor([-1, -1], device=device)
    with poisoned_memory():
        pool = torch.empty(0, 2, 16, 16, device=device)
        tokens = {name: inputs[name] for name in ('q', 'k', 'v', 'g')}
        o, _ = MODES_HERE[mode](**tokens, initial_state=pool, state_indices=slots)
    assert (o == 0).all()


def test_states_after_every_token_without_a_pool():
    """And in a buffer with other strides."""
    case = Case(7, B=2, K=D, V=24)
    inputs = make_inputs(case)
    q, k, v, g = (inputs[name] for name in ('q', 'k', 'v', 'g'))
    expected = torch.empty(2, 7, 2, D, 24, dtype=torch.float64, device=DEVICE)
    naive_recurrent_simple_gla(*(x.double() for x in (q, k, v, g)), intermediate_states_buffer=expected)
    buffer = torch.full((7, 2, 2, 24, D + 8), float('nan'), device=DEVICE)
    view = buffer[..., :D].permute(1, 0, 2, 4, 3)
    _, ht = fused_recurrent_simple_gla(q, k, v, g, output_final_state=True, intermediate_states_buffer=view)
    assert rms_error(view, expected) <= 1e-5
    assert torch.equal(view[:, -1], ht) and buffer[..., D:].isnan().all()


@pytest.mark.parametrize('mode', ['chunk', 'fused_chunk', 'fused_recurrent'])
def test_bad_pools(mode):
    inputs = make_inputs(Case(3, B=4))
    q, k, v, g = (inputs[name] for name in ('q', 'k', 'v', 'g'))
    pool, slots = torch.zeros(SLOTS, 2, 16, 16, device=DEVICE), torch.zeros(4, dtype=torch.int32, device=DEVICE)

    def call(q=q, **options):
        MODES[mode](q, k, v, g, **options)

    with pytest.raises(ValueError, match='without initial_state'):
        call(state_indices=slots)
    with pytest.raises(TypeError, match='state_indices must be a torch.Tensor, got list'):
        call(initial_state=pool, state_indices=[0])
    with pytest.raises(TypeError, match='state_indices must be int32 or int64'):
        call(initial_state=pool, state_indices=slots.float())
    with pytest.raises(ValueError, match=r'state_indices must have shape \[N\] = \[4\], got \[3\]'):
        call(initial_state=pool, state_indices=slots[:3])
    with pytest.raises(ValueError, match='state_indices must be contiguous'):
        call(initial_state=pool, state_indices=slots.repeat(2)[::2])
    with pytest.raises(ValueError, match=r'\[P, H, K, V\] = \[9, 2, 16, 16\], got \[9, 2, 16, 8\]'):
        call(initial_state=pool[..., :8], state_indices=slots)
    with pytest.raises(ValueError, match='overlap'):
        call(initial_state=pool[:1].expand(9, -1, -1, -1), state_indices=slots)
    with pytest.raises(ValueError, match='q must not need gradients'):
        call(q.clone().requires_grad_(), initial_state=pool, state_indices=slots)


def test_bad_buffers():
    inputs = make_inputs(Case(3, B=4))
    q, k, v, g = (inputs[name] for name in ('q', 'k', 'v', 'g'))
    buffer = torch.zeros(4, 3, 2, 16, 16, device=DEVICE)
    for bad, error, message in (
        (buffer[:, :2], ValueError, r'\[B, T, H, K, V\] = \[4, 3, 2, 16, 16\], got \[4, 2, 2, 16, 16\]'),
        (buffer.double() if GPU else buffer.int(), TypeError, 'intermediate_states_buffer'),
        (buffer[:1].expand(4, -1, -1, -1, -1), ValueError, 'overlap'),
        (buffer.clone().requires_grad_(), ValueError, 'intermediate_states_buffer must not need gradients'),
    ):
        with pytest.raises(error, match=message):
            fused_recurrent_simple_gla(q, k, v, g, intermediate_states_buffer=bad)
