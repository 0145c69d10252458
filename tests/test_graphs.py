"""CUDA graphs: a replay computes what the same tensors now contain."""

import dataclasses

import pytest
import torch
from harness import DEVICE, MODES, Case, make_inputs, needs_gpu, reference, rms_error

from fla_simple_gla import naive_recurrent_simple_gla

pytestmark = needs_gpu

SLOTS = 12
CASES = [
    ('fused_recurrent', Case(1, B=4, K=64, V=64, dtype=torch.bfloat16)),
    ('fused_recurrent', Case(4, B=4, H=4, HK=2, K=64, V=48, state_v_first=True, state_dtype=torch.bfloat16)),
    ('fused_recurrent', Case(12, cu_seqlens=(0, 1, 2, 11, 12), K=64, V=64, dtype=torch.bfloat16)),
    ('chunk', Case(300, cu_seqlens=(0, 100, 101, 101, 300), K=64, V=64, dtype=torch.bfloat16)),
    ('segments', Case(300, B=4, K=128, V=128, dtype=torch.bfloat16, gate='gamma')),
    ('fused_chunk', Case(100, B=4, K=64, V=64)),
]
INDICES = [(3, 0, 7, 1), (-1, 5, -1, 4), (11, 3, -1, 2)]


def pooled(mode, case):
    """A call with a pool of states, and its tensors by name."""
    inputs = make_inputs(case)
    tensors = {name: inputs[name] for name in ('q', 'k', 'v', 'g', 'g_gamma') if inputs[name] is not None}
    shape = (SLOTS, case.H, case.V, case.K) if case.state_v_first else (SLOTS, case.H, case.K, case.V)
    tensors['initial_state'] = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(
        DEVICE, case.state_dtype
    )
    tensors['state_indices'] = torch.full((4,), -1, dtype=torch.int32, device=DEVICE)
    if case.cu_seqlens is not None:
        tensors['cu_seqlens'] = torch.tensor(case.cu_seqlens, device=DEVICE)

    def call(**tensors):
        with torch.no_grad():
            return MODES[mode](**tensors, state_v_first=case.state_v_first)[0]

    return call, tensors


def captured(call, tensors):
    """The graph of a call, and its o. The call is made once before, which compiles the kernels."""
    call(**tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = call(**tensors)
    return graph, o


@pytest.mark.parametrize('mode, case', [pytest.param(mode, case, id=f'{mode}-{case}') for mode, case in CASES])
def test_slots_and_tokens_change_between_replays(mode, case):
    """Replays give the bits of eager calls, which are made before and between them."""
    call, tensors = pooled(mode, case)
    eager_pool = tensors['initial_state'].clone()
    graph, o = captured(call, tensors)
    for n, indices in enumerate(INDICES):
        tensors['state_indices'].copy_(torch.tensor(indices))
        for name in 'qkv':
            tensors[name].mul_(1 + n / 4)
        expected = call(**tensors | {'initial_state': eager_pool})
        o.fill_(float('nan'))
        graph.replay()
        assert torch.equal(o, expected)
        assert torch.equal(tensors['initial_state'], eager_pool)


@pytest.mark.parametrize('mode, case', [pytest.param(mode, case, id=f'{mode}-{case}') for mode, case in CASES])
def test_no_call_waits_for_the_gpu(mode, case):
    call, tensors = pooled(mode, case)
    call(**tensors)
    before = torch.cuda.memory_stats()
    torch.cuda.set_sync_debug_mode('error')
    try:
        o = call(**tensors)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    after = torch.cuda.memory_stats()
    if mode == 'fused_recurrent':  # it allocates only its output
        assert after['allocation.all.allocated'] - before['allocation.all.allocated'] == 1
        assert after['requested_bytes.all.allocated'] - before['requested_bytes.all.allocated'] == o.nbytes


TRAINING = [
    *((mode, Case(200, B=2, H=4, HK=2, K=64, V=64, dtype=torch.bfloat16)) for mode in MODES),
    *((mode, Case(500, cu_seqlens=(0, 200, 200, 417, 480), K=64, V=64, dtype=torch.bfloat16)) for mode in MODES),
    ('chunk', Case(5000, K=256, V=128, dtype=torch.bfloat16)), ('chunk', Case(300, K=24, V=40, gate='gamma')),
]  # fmt: skip
# Bounds of packed sequences that replace those of a case, as many and with at most as many tokens.
BOUNDS = [(0, 1, 2, 3, 500), (0, 0, 0, 0, 0), (0, 64, 300, 301, 411)]


def train(mode, case, tensors):
    """o, the final state if there is one, and all gradients."""
    leaves = [tensors[name] for name in ('q', 'k', 'v', 'g', 'g_gamma', 'initial_state') if name in tensors]
    options = {'output_final_state': True} if case.output_final_state else {}
    named = {name: x for name, x in tensors.items() if name not in ('do', 'dht')}
    o, ht = MODES[mode](**named, **options)
    outputs, seeds = ([o], [tensors['do']]) if ht is None else ([o, ht], [tensors['do'], tensors['dht']])
    return [*outputs, *torch.autograd.grad(outputs, leaves, seeds)]


def training_inputs(case):
    tensors = {name: x for name, x in make_inputs(case).items() if x is not None}
    if case.cu_seqlens is not None:
        tensors['cu_seqlens'] = torch.tensor(case.cu_seqlens, device=DEVICE)
    for name, x in tensors.items():
        if name not in ('do', 'dht', 'cu_seqlens'):
            x.requires_grad_()
    return tensors


def change(n, case, tensors):
    with torch.no_grad():
        for name in ('q', 'v', 'do'):
            tensors[name].mul_(1 + n / 4)
        if case.cu_seqlens is not None:
            tensors['cu_seqlens'].copy_(torch.tensor(BOUNDS[n]))


@pytest.mark.parametrize(
    'mode, case', [pytest.param(mode, case.of(mode), id=f'{mode}-{case}') for mode, case in TRAINING]
)
def test_training_step(mode, case):
    """Replays of forward and backward give the bits of eager calls, for other lengths of packed sequences too."""
    tensors = training_inputs(case)
    train(mode, case, tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = train(mode, case, tensors)
    for n in range(len(BOUNDS)):
        change(n, case, tensors)
        expected = [x.detach().clone() for x in train(mode, case, tensors)]
        for x in results:
            x.detach().fill_(float('nan'))
        graph.replay()
        for a, b in zip(results, expected):
            assert torch.equal(a, b)


@pytest.mark.parametrize('mode', MODES)
def test_first_call_in_a_capture(mode):
    """Kernels are compiled, loaded and recorded during the capture. The graph launches them."""
    K = 72 + 8 * list(MODES).index(mode)  # no other test of the mode has this dimension
    case = Case(300, H=2, K=K, V=104, dtype=torch.bfloat16).of(mode)
    tensors = training_inputs(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = train(mode, case, tensors)
    graph.replay()
    for a, b in zip(results, train(mode, case, tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('mode', MODES)
def test_graphed_callable(mode):
    """PyTorch captures forward and backward of a module. Its results are those of naive."""
    case = Case(200, H=2, K=64, V=64, initial_state=False, output_final_state=False)

    class Layer(torch.nn.Module):
        def forward(self, q, k, v, g):
            return MODES[mode](q, k, v, g)[0]

    def leaves(seed):
        inputs = make_inputs(dataclasses.replace(case, seed=seed))
        return inputs, [inputs[name].requires_grad_() for name in ('q', 'k', 'v', 'g')]

    layer = torch.cuda.make_graphed_callables(Layer(), tuple(leaves(0)[1]))
    for seed in (1, 2):
        inputs, tensors = leaves(seed)
        o = layer(*tensors)
        found = [o.detach().clone(), *torch.autograd.grad(o, tensors, inputs['do'])]
        expected = reference(case, inputs)
        for name, x in zip(('o', 'dq', 'dk', 'dv', 'dg'), found):
            assert rms_error(x, expected[name]) <= 1e-5, name


def test_a_hundred_thousand_steps():
    """The memory stays the same to the byte, the states stay finite, and the last tokens agree with naive in fp64."""
    steps, last = 100_000, 64
    case = Case(1, B=8, H=4, K=64, V=64, dtype=torch.bfloat16)
    call, tensors = pooled('fused_recurrent', case)
    names = 'q', 'k', 'v', 'g'
    # Each step takes one of these tokens. Their number divides no other number here.
    banks = {
        name: make_inputs(Case(case.B * 97, H=4, K=64, V=64, dtype=torch.bfloat16, seed=1))[name] for name in names
    }
    banks = {name: x.view(97, case.B, 1, *x.shape[2:]) for name, x in banks.items()}
    tensors['state_indices'] = torch.tensor([3, 0, 7, -1, 1, 11, 9, 2], dtype=torch.int32, device=DEVICE)
    step = torch.zeros(1, dtype=torch.long, device=DEVICE)

    def go_on(**tensors):
        for name in names:
            torch.index_select(banks[name], 0, step % 97, out=tensors[name][None])
        step.add_(1)
        return call(**tensors)

    graph, o = captured(go_on, tensors)
    pool = tensors['initial_state']
    graph.replay()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    for _ in range(steps - last):
        graph.replay()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    for name in (
        'allocated_bytes.all.current',
        'allocated_bytes.all.peak',
        'reserved_bytes.all.current',
        'allocation.all.allocated',
    ):
        assert before[name] == after[name], name
    assert pool.isfinite().all()

    named = tensors['state_indices'] >= 0
    slots = tensors['state_indices'][named].long()
    taken = (step + torch.arange(last, device=DEVICE)) % 97
    states, outputs = pool[slots].double(), []
    for _ in range(last):
        graph.replay()
        outputs.append(o.clone())
    q, k, v, g = (banks[name][taken][:, named, 0].transpose(0, 1).double() for name in names)
    expected, ht = naive_recurrent_simple_gla(q, k, v, g, initial_state=states, output_final_state=True)
    o = torch.cat(outputs, 1)
    assert rms_error(o[named], expected) <= 4e-3
    assert (o[~named] == 0).all()
    assert rms_error(pool[slots], ht) <= 1e-5
