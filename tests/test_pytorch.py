"""Calls in the rest of PyTorch: compilation, operators, transforms, autocast, checkpointing, streams and threads."""

import contextlib
import copy
import dataclasses
import itertools
import pickle
import threading
from unittest import mock

import pytest
import torch
from harness import (
    DEVICE,
    GPU,
    HALF,
    MODES,
    STATEFUL,
    Case,
    D,
    check,
    make_inputs,
    mark_slow,
    needs_gpu,
    reference,
    rms_error,
    run,
    segments_of,
    slow_rows,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fla_simple_gla
from fla_simple_gla import chunk, fused_chunk, fused_recurrent, fused_recurrent_simple_gla, parallel
from fla_simple_gla._cache import Cache
from fla_simple_gla._operators import SOURCES
from fla_simple_gla._plans import Inputs, Options

MODULES = {'chunk': chunk, 'fused_chunk': fused_chunk, 'fused_recurrent': fused_recurrent, 'parallel': parallel}
OPERATORS = {name: module.mode.operators for name, module in MODULES.items()}
BACKEND = 'inductor' if GPU else 'aot_eager'
# One graph serves these lengths. The interpreter is slow where a mode goes token by token.
LENGTHS = dict.fromkeys(MODES, (17, 40, 300) if GPU else (17, 25)) | {
    'segments': (300, 1000, 129) if GPU else (130, 140)
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def cpu_path(monkeypatch):
    monkeypatch.setattr('fla_simple_gla._triton.INTERPRET', False)


def function_of(mode):
    """The public function of a mode, and a context for its calls. 'segments' is the chunk mode that cuts sequences."""
    if mode == 'segments':
        return MODES['chunk'], segments_of(128, Cache(1000))
    return MODES[mode], contextlib.nullcontext()


class Block(nn.Module):
    """A norm, projections, a mode and a projection. After them an MLP."""

    def __init__(self, mode, width=32, heads=2, **options):
        super().__init__()
        self.fn, self.heads, self.options = mode, heads, options
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.gate = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, heads)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, **options):
        y = self.norm1(x)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).unbind(2)
        o, state = self.fn(q, k, v, logsigmoid(self.gate(y).float() + 3), **self.options, **options)
        x = x + self.out(o.flatten(2))
        x = x + self.mlp(self.norm2(x))
        return x if state is None else x + state.mean()


def block(mode, seed=0, device=DEVICE, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    return Block(mode, **options).to(device, dtype)


def gradients(call, module, x):
    """The result of a call, and the gradients of the parameters."""
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y.square().mean(), [*module.parameters()])]


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert rms_error(a, b) <= tolerance


class TestCompile:
    @pytest.mark.parametrize('mode, final_state', [*slow_rows((mode, False) for mode in MODES), ('chunk', True)])
    def test_one_graph_serves_many_lengths(self, mode, final_state):
        """The graph has the whole forward and backward."""
        fn, context = function_of(mode)
        module = block(fn, **({'output_final_state': True} if final_state else {}))
        counter = CompileCounterWithBackend(BACKEND)
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
        with context:
            for T in LENGTHS[mode]:
                x = torch.randn(1, T, 32, device=DEVICE)
                assert_close(gradients(compiled, module, x), gradients(module, module, x), 1e-5)
        assert counter.frame_count == 1

    @pytest.mark.parametrize('mode', mark_slow(OPERATORS, 'chunk', 'fused_chunk', 'fused_recurrent'))
    def test_no_graph_breaks_where_it_might(self, mode, cpu_path):
        """`fullgraph` is not set. Some operators are traced in another way then."""
        module = block(MODES[mode], device='cpu')
        counter = CompileCounterWithBackend('aot_eager')
        compiled = torch.compile(module, dynamic=True, backend=counter)
        for T in (17, 40, 33):
            x = torch.randn(2, T, 32)
            assert_close(gradients(compiled, module, x), gradients(module, module, x), 1e-5)
        assert counter.frame_count == 1

    @pytest.mark.parametrize('mode', mark_slow(['chunk', 'segments'], 'segments'))
    def test_static_shapes(self, mode):
        fn, context = function_of(mode)
        module = block(fn)
        compiled = torch.compile(module, fullgraph=True, dynamic=False, backend=BACKEND)
        with context:
            x = torch.randn(1, LENGTHS[mode][0], 32, device=DEVICE)
            assert_close(gradients(compiled, module, x), gradients(module, module, x), 1e-5)

    @pytest.mark.parametrize('case', [
        Case(20, H=4, HK=2, K=16, V=8, initial_state=True, state_v_first=True, state_dtype=torch.float16),
        *slow_rows([[Case(20, gate='gamma', cu_seqlens=(0, 7, 7, 18), scale=2)]]),
        Case(20, gate=None, initial_state=False, output_final_state=False, dtype=HALF, layout='qkv'),
        Case(20, reverse=True),
    ], ids=str)  # fmt: skip
    @pytest.mark.parametrize('mode', mark_slow(['chunk', 'fused_recurrent', 'parallel'], 'chunk', 'fused_recurrent'))
    def test_every_argument(self, mode, case):
        """The bits are those of eager calls. PyTorch sums dg to dg_gamma, in an order that depends on strides."""
        if case.reverse and mode != 'fused_recurrent':
            pytest.skip('only fused_recurrent has reverse')
        case = case.of(mode)
        compiled = torch.compile(MODES[mode], fullgraph=True, backend='aot_eager')
        expected, found = run(MODES[mode], case), run(compiled, case)
        check(case, found, reference(case))
        assert expected.keys() == found.keys()
        for name in expected:
            assert rms_error(found[name], expected[name]) <= (1e-6 if name == 'dg_gamma' else 0), name

    @pytest.mark.parametrize('mode', mark_slow(OPERATORS, 'chunk', 'fused_chunk', 'fused_recurrent'))
    def test_cpu_path(self, mode, cpu_path):
        """The lengths of packed sequences are no constants of a graph on the CPU path either."""
        module = block(MODES[mode], device='cpu')
        counter = CompileCounterWithBackend('aot_eager')
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
        for T in (17, 40, 33):
            x = torch.randn(2, T, 32)
            assert_close(gradients(compiled, module, x), gradients(module, module, x), 1e-5)
        for bounds in ((0, 5, 20), (0, 13, 19)):
            x, cu_seqlens = torch.randn(1, 20, 32), torch.tensor(bounds)
            found = gradients(lambda x: compiled(x, cu_seqlens=cu_seqlens), module, x)  # noqa: B023
            assert_close(found, gradients(lambda x: module(x, cu_seqlens=cu_seqlens), module, x), 1e-5)  # noqa: B023
        assert counter.frame_count == 2  # one without and one with cu_seqlens

    def test_attention_map(self):
        inputs = make_inputs(Case(20))
        tensors = [inputs[name].requires_grad_() for name in ('q', 'k', 'v', 'g')]
        compiled = torch.compile(fla_simple_gla.parallel_simple_gla, fullgraph=True, backend='aot_eager')
        results = compiled(*tensors, output_attentions=True)
        for found, expected in zip(results, fla_simple_gla.parallel_simple_gla(*tensors, output_attentions=True)):
            assert torch.equal(found, expected) and found.requires_grad == expected.requires_grad

    @pytest.mark.parametrize('v_first', mark_slow([False, True], True))
    @pytest.mark.parametrize('path', ['kernels', 'CPU path'])
    @pytest.mark.parametrize('mode', ['chunk', 'fused_chunk', 'fused_recurrent'])
    def test_states_in_a_pool_are_written_in_place(self, mode, path, v_first, monkeypatch):
        device = DEVICE
        if path == 'CPU path':
            monkeypatch.setattr('fla_simple_gla._triton.INTERPRET', False)
            device = 'cpu'
        inputs = make_inputs(Case(4, B=3, K=16, V=8), device)
        tensors = [inputs[name] for name in ('q', 'k', 'v', 'g')]
        slots = torch.tensor([3, -1, 0], device=device)
        pool = torch.randn((5, 2, 8, 16) if v_first else (5, 2, 16, 8), device=device)

        def step(pool):
            # Each sum must see the pool as it is at this point.
            before = pool.sum((1, 2, 3))
            o, same = MODES[mode](*tensors, initial_state=pool, state_indices=slots, state_v_first=v_first)
            return o * 2, before, same.sum((1, 2, 3))

        pools = pool.clone(), pool.clone()
        with torch.no_grad():
            expected = step(pools[0])
            found = torch.compile(step, fullgraph=True, backend=BACKEND if path == 'kernels' else 'aot_eager')(pools[1])
        assert torch.equal(*pools) and not torch.equal(pools[0], pool)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)

    def test_states_that_are_only_read(self):
        """With a buffer and no indices the states may be expanded, saved by autograd, or made in inference mode."""
        inputs = make_inputs(Case(4, B=3, K=16, V=8))
        tensors = [inputs[name] for name in ('q', 'k', 'v', 'g')]
        state = inputs['initial_state'][:1]
        x = torch.ones(1, device=DEVICE, requires_grad=True)
        y = (x * state).sum()
        with torch.inference_mode():
            inferred = state.clone()
        compiled = torch.compile(fused_recurrent_simple_gla, fullgraph=True, backend='aot_eager')
        for given in (state, inferred):
            buffers = torch.zeros(2, 3, 4, 2, 16, 8, device=DEVICE)
            with torch.no_grad():
                for fn, buffer in zip((fused_recurrent_simple_gla, compiled), buffers):
                    fn(*tensors, initial_state=given.expand(3, -1, -1, -1), intermediate_states_buffer=buffer)
            assert torch.equal(*buffers) and buffers.any()
        y.backward()

    @pytest.mark.parametrize('indexed', [False, True])
    def test_states_of_draft_tokens(self, indexed):
        inputs = make_inputs(Case(4, B=3, K=16, V=8))
        tensors = [inputs[name] for name in ('q', 'k', 'v', 'g')]
        options = (
            {'state_indices': torch.tensor([1, 2, -1], device=DEVICE)} if indexed else {'output_final_state': True}
        )
        results = []
        with torch.no_grad():
            for fn in (
                fused_recurrent_simple_gla,
                torch.compile(fused_recurrent_simple_gla, fullgraph=True, backend='aot_eager'),
            ):
                state, buffer = inputs['initial_state'].clone(), torch.zeros(3, 4, 2, 16, 8, device=DEVICE)
                results.append(
                    (*fn(*tensors, initial_state=state, intermediate_states_buffer=buffer, **options), state, buffer)
                )
        for a, b in zip(*results):
            assert torch.equal(a, b)

    def test_graphs_tell_of_which_sources_they_are(self):
        """A graph in a cache on disk may be of another version, which saves other states. It must not be used."""
        graphs = []

        def backend(module, _):
            graphs.append(module.graph)
            return module

        q = torch.zeros(1, 5, 2, 8, device=DEVICE)
        torch.compile(fla_simple_gla.chunk_simple_gla, backend=backend)(q, q, q)
        (call,) = (node for node in graphs[0].nodes if 'fla_simple_gla' in str(node.target))
        assert len(SOURCES) >= 16 and SOURCES in call.args

    def test_deprecated_name_of_state_v_first(self):
        inputs = make_inputs(Case(4, state_v_first=True))
        tensors = [inputs[name] for name in ('q', 'k', 'v', 'g')]
        options = {'initial_state': inputs['initial_state'], 'output_final_state': True}
        found = torch.compile(fused_recurrent_simple_gla, fullgraph=True, backend='eager')(
            *tensors, **options, transpose_state_layout=True
        )
        for a, b in zip(found, fused_recurrent_simple_gla(*tensors, **options, state_v_first=True)):
            assert torch.equal(a, b)

    def test_bad_input_is_named(self):
        q = torch.zeros(1, 5, 2, 8, device=DEVICE)
        for fullgraph, error in ((False, ValueError), (True, torch._dynamo.exc.Unsupported)):
            torch.compiler.reset()
            message = r"k must have q's shape \[1, 5, 2, 8\], got \[1, 5, 2, 4\]"
            # For a full graph torch 2.8 tells only the type of the error.
            with pytest.raises(error, match=f"{message}|<class 'ValueError'>" if fullgraph else message):
                torch.compile(fla_simple_gla.chunk_simple_gla, fullgraph=fullgraph, backend='eager')(q, q[..., :4], q)

    @pytest.mark.parametrize('mode', OPERATORS)
    def test_under_autocast(self, mode, cpu_path):
        """fp32 inputs are cast as in an eager call. The bits and dtypes are the same."""
        device, dtype = ('cuda', torch.float16) if GPU else ('cpu', torch.bfloat16)
        case = Case(20).of(mode)

        def cast(fn):
            def call(**arguments):
                with torch.autocast(device, dtype):
                    return fn(**arguments)

            return call

        inputs = make_inputs(case, device)
        expected = run(cast(MODES[mode]), case, inputs)
        found = run(torch.compile(cast(MODES[mode]), fullgraph=True, backend='aot_eager'), case, inputs)
        assert expected['o'].dtype == dtype
        for name in expected:
            assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name

    @pytest.mark.parametrize('mode', mark_slow(OPERATORS, 'chunk', 'fused_recurrent', 'parallel'))
    def test_any_size_may_be_a_symbol(self, mode, cpu_path):
        """Heads and dimensions may change from call to call too. There may be one token of one sequence."""
        compiled = torch.compile(MODES[mode], fullgraph=True, backend='aot_eager')
        changes = [{}, {'H': 4}, {'K': 24}, {'V': 8}, {'B': 2}, {'T': 30}]
        cases = [Case(**dict(T=20, initial_state=False, output_final_state=False) | change) for change in changes]
        for case in cases:
            inputs = make_inputs(case, 'cpu')
            assert_close(run(compiled, case, inputs).values(), run(MODES[mode], case, inputs).values(), 1e-6)
        case = dataclasses.replace(cases[0], T=1)
        inputs = make_inputs(case, 'cpu')
        compiled = torch.compile(MODES[mode], fullgraph=True, backend='aot_eager', dynamic=True)
        assert_close(run(compiled, case, inputs).values(), run(MODES[mode], case, inputs).values(), 1e-6)

    @pytest.mark.parametrize('mode', mark_slow(OPERATORS, 'fused_chunk', 'fused_recurrent', 'parallel'))
    def test_gradients_of_some_inputs_only(self, mode, cpu_path):
        inputs = make_inputs(Case(10), 'cpu')
        names = ['q', 'k', 'v', 'g', *(['initial_state'] if mode in STATEFUL else [])]
        options = {'output_final_state': True} if mode in STATEFUL else {}
        compiled = torch.compile(MODES[mode], fullgraph=True, backend='aot_eager')
        for wanted in (['q'], ['v'], ['g'], ['k', 'g'], names[-1:]):
            results = []
            for fn in (MODES[mode], compiled):
                leaves = {name: inputs[name].detach().requires_grad_(name in wanted) for name in names}
                o, ht = fn(**leaves, **options)
                loss = o.sum() if ht is None else ht.square().sum() + (0 if wanted == ['v'] else o.square().sum())
                results.append(torch.autograd.grad(loss, [leaves[name] for name in wanted]))
            assert_close(*results, 1e-6)

    @pytest.mark.parametrize('mode', mark_slow(OPERATORS, 'chunk', 'fused_recurrent'))
    def test_no_tokens_and_no_batch(self, mode):
        for B, T in ((0, 5), (2, 0)):
            case = Case(T, B=B).of(mode)
            inputs = make_inputs(case)
            expected = run(MODES[mode], case, inputs, allow_unused=True)
            found = run(
                torch.compile(MODES[mode], fullgraph=True, backend='aot_eager'), case, inputs, allow_unused=True
            )
            assert all(torch.equal(found[name], expected[name]) for name in expected)

    @pytest.mark.parametrize('mode', mark_slow(MODES, 'segments', 'fused_chunk', 'fused_recurrent', 'parallel'))
    def test_compiled_autograd(self, mode):
        """PyTorch traces the backward of an eager forward when it runs."""
        fn, context = function_of(mode)
        inputs = make_inputs(Case(LENGTHS[mode][0], gate='gamma').of(mode))
        names = [name for name in ('q', 'k', 'v', 'g_gamma', 'initial_state') if inputs[name] is not None]

        def go_back(o):
            o.backward(inputs['do'])

        with context:
            results = []
            for backward in (go_back, torch.compile(go_back, backend='aot_eager')):
                leaves = {name: inputs[name].detach().requires_grad_() for name in names}
                o, _ = fn(**leaves)
                with torch._dynamo.config.patch(compiled_autograd=backward is not go_back):
                    backward(o)
                results.append([x.grad for x in leaves.values()])
        assert_close(*results, 1e-6)

    def test_export(self):
        module = block(fla_simple_gla.chunk_simple_gla)
        T = torch.export.Dim('T', min=2, max=1000)
        x = torch.randn(2, 20, 32, device=DEVICE)
        exported = torch.export.export(module, (x,), dynamic_shapes=({1: T},))
        for length in (20, 33):
            x = torch.randn(2, length, 32, device=DEVICE)
            torch.testing.assert_close(exported.module()(x), module(x))


def operator_arguments(case: Case):
    inputs = make_inputs(case, 'cuda' if GPU else 'cpu')
    cu_seqlens = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens, device=inputs['q'].device)
    tensors = [inputs[name] for name in ('q', 'k', 'v', 'g', 'initial_state')]
    return inputs, [*(x if x is None else x.requires_grad_() for x in tensors), cu_seqlens]


class TestOperators:
    @pytest.mark.parametrize(
        'case',
        [Case(20, B=2, K=16, V=8), *slow_rows([[Case(30, H=4, HK=2, gate=None, cu_seqlens=(0, 7, 25))]])],
        ids=str,
    )
    @pytest.mark.parametrize('mode', OPERATORS)
    def test_opcheck(self, mode, case, cpu_path):
        """Schemas, fake implementations, autograd and tracing are right. Without a GPU the CPU path runs."""
        case = case.of(mode)
        inputs, arguments = operator_arguments(case)
        output = mode in STATEFUL or case.cu_seqlens is None
        torch.library.opcheck(OPERATORS[mode].forward, (*arguments, 0.5, output, False, ''))

        arguments = [x if x is None else x.detach() for x in arguments]
        states = OPERATORS[mode].forward(*arguments, 0.5, False, False, '')[2]
        needs = [x is not None for x in arguments[:5]]
        torch.library.opcheck(
            OPERATORS[mode].backward, (*arguments, states, inputs['do'], inputs['dht'], 0.5, False, needs)
        )
        if inputs['dht'] is not None:  # gradients of the state only, and of some inputs only
            torch.library.opcheck(
                OPERATORS[mode].backward, (*arguments, states, None, inputs['dht'], 0.5, False, [True] + [False] * 4)
            )

    @pytest.mark.parametrize(
        'layout', ['contiguous', *slow_rows([['qkv'], ['heads_first'], ['one gradient for all tokens']])]
    )
    @pytest.mark.parametrize('path', mark_slow(['kernels', 'CPU path'], 'kernels'))
    @pytest.mark.parametrize('mode', OPERATORS)
    def test_opcheck_of_gradients_of_some_inputs(self, mode, path, layout, monkeypatch):
        """For every subset: a gradient that is not needed is empty, in the fake implementation too."""
        if path == 'CPU path':
            monkeypatch.setattr('fla_simple_gla._triton.INTERPRET', False)
        device = 'cpu' if path == 'CPU path' else DEVICE
        case = Case(4, H=4, HK=2, K=8, V=8, layout=layout if 'one' not in layout else 'contiguous').of(mode)
        inputs = make_inputs(case, device)
        do = inputs['do'][:, :1].expand(inputs['do'].shape) if 'one' in layout else inputs['do']
        tensors = [inputs[name] for name in ('q', 'k', 'v', 'g', 'initial_state')]
        states = OPERATORS[mode].forward(*tensors, None, 0.5, False, False, '')[2]
        subsets = [*itertools.product((False, True), repeat=5)]
        if path == 'kernels' and not GPU:  # the interpreter is slow
            subsets = [needs for needs in subsets if sum(needs) in ((1, 4, 5) if layout == 'contiguous' else (4,))]
        for needs in subsets:
            if any(needs) and not (needs[4] and tensors[4] is None):
                arguments = *tensors, None, states, do, inputs['dht'], 0.5, False, [*needs]
                torch.library.opcheck(
                    OPERATORS[mode].backward, arguments, test_utils=('test_schema', 'test_faketensor')
                )
                for x, need, given in zip(OPERATORS[mode].backward(*arguments), needs, tensors):
                    assert x.shape == (given.shape if need else (0,))

    @pytest.mark.parametrize('layout', mark_slow(['contiguous', 'qkv', 'heads_first'], 'contiguous', 'heads_first'))
    @pytest.mark.parametrize('mode', mark_slow(OPERATORS, 'fused_recurrent'))
    def test_gradients_of_eager_calls_lie_as_those_of_the_operators(self, mode, layout):
        case = Case(33, H=4, HK=2, K=16, V=8, layout=layout).of(mode)
        inputs = make_inputs(case)
        results = run(MODES[mode], case, inputs)
        for name in ('q', 'k', 'v', 'g', 'initial_state'):
            if inputs[name] is not None:
                assert results[f'd{name}'].stride() == inputs[name].new_empty(inputs[name].shape).stride(), name

    @pytest.mark.parametrize('mode', [mode for mode in OPERATORS if mode in STATEFUL])
    def test_opcheck_in_place(self, mode, cpu_path):
        _, arguments = operator_arguments(Case(6, B=2, K=16, V=8, state_v_first=True))
        *tokens, _, _ = (x if x is None else x.detach() for x in arguments)
        device = tokens[0].device
        pool, slots = torch.randn(4, 2, 8, 16, device=device), torch.tensor([2, -1], device=device)
        torch.library.opcheck(
            OPERATORS[mode].in_place, (*tokens, None, None, pool, slots, None, 0.5, True, False, True)
        )
        if mode == 'fused_recurrent':
            buffer = torch.randn(2, 6, 2, 8, 16, device=device)
            torch.library.opcheck(
                OPERATORS[mode].in_place, (*tokens, pool[:2], None, None, None, buffer, 0.5, True, True, True)
            )

    @pytest.mark.parametrize('mode', mark_slow(MODES, 'segments', 'fused_recurrent'))
    def test_of_what_a_mode_sees(self, mode):
        """A dispatch mode sees one operator forward and one backward. The bits are the same as without it."""

        class Watch(TorchDispatchMode):
            seen = []

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                self.seen.append(str(func))
                return func(*args, **kwargs or {})

        fn, context = function_of(mode)
        case = Case(LENGTHS[mode][0]).of(mode)
        with context:
            expected = run(fn, case)
            with Watch():
                found = run(fn, case)
        name = f'fla_simple_gla.{"chunk" if mode == "segments" else mode}'
        assert [x for x in Watch.seen if 'gla' in x] == [f'{name}.default', f'{name}_backward.default']
        assert all(torch.equal(found[x], expected[x]) for x in expected)

    @pytest.mark.parametrize('device', ['cpu', 'cuda', 'meta'])
    @pytest.mark.parametrize('mode', OPERATORS)
    def test_fake_and_meta_tensors(self, mode, device):
        """They have the right shapes, dtypes and devices. Fake tensors may be on a GPU that does not exist."""
        options = {'output_final_state': True} if mode in STATEFUL else {'output_attentions': True}
        with FakeTensorMode() if device != 'meta' else contextlib.nullcontext():
            # A CPU build of PyTorch has no backward on fake GPUs.
            differentiable = device != 'cuda' or GPU
            q = torch.empty(2, 20, 2, 16, dtype=HALF, device=device, requires_grad=differentiable)
            v = torch.empty(2, 20, 4, 8, dtype=HALF, device=device)
            g = torch.empty(2, 20, 4, device=device, requires_grad=differentiable)
            o, second = MODES[mode](q, q, v, g, **options)
            assert (o.shape, o.dtype, o.device) == (v.shape, v.dtype, v.device)
            assert second.shape == ((2, 4, 16, 8) if mode in STATEFUL else (2, 4, 20, 20))
            assert second.dtype == (torch.float32 if mode in STATEFUL else HALF)
            if differentiable:
                dq, dg = torch.autograd.grad(o.sum(), [q, g])
                assert (dq.shape, dq.dtype, dg.shape, dg.dtype) == (q.shape, HALF, g.shape, torch.float32)
            if mode in STATEFUL:
                pool, slots = torch.empty(7, 4, 16, 8, device=device), torch.empty(2, dtype=torch.int32, device=device)
                with torch.no_grad():
                    o, same = MODES[mode](q, q, v, g, initial_state=pool, state_indices=slots)
                assert same is pool and o.shape == v.shape


class TestTransforms:
    @pytest.mark.parametrize('mode', OPERATORS)
    def test_those_of_torch_func_are_refused(self, mode):
        inputs = make_inputs(Case(8))
        q, k, v, g = (inputs[name] for name in ('q', 'k', 'v', 'g'))

        def f(q):
            return MODES[mode](q, k, v, g)[0].sum()

        for call in (
            lambda: torch.func.grad(f)(q), lambda: torch.func.vjp(f, q), lambda: torch.func.vmap(f)(q[None]),
            lambda: torch.func.vmap(lambda v: MODES[mode](q, k, v, g)[0])(v[None]),
            lambda: torch.func.vmap(lambda x: x + MODES[mode](q, k, v, g)[0])(v[None]),
        ):  # fmt: skip
            with pytest.raises(NotImplementedError, match='torch.func'):
                call()

        def dual():
            with forward_ad.dual_level():
                f(forward_ad.make_dual(q, q))

        def dual_gradient():
            x = q.detach().requires_grad_()
            o, _ = MODES[mode](x, k, v, g)
            with forward_ad.dual_level():
                torch.autograd.grad(o, x, forward_ad.make_dual(inputs['do'], inputs['do']))

        def dual_of_operator():
            with forward_ad.dual_level():
                OPERATORS[mode](Inputs(forward_ad.make_dual(q, q), k, v, g, None, None), Options(1.0))

        for call in (lambda: torch.func.jvp(f, (q,), (q,)), dual, dual_gradient, dual_of_operator):
            with pytest.raises(NotImplementedError, match='forward-mode'):
                call()
        if mode in STATEFUL:
            with pytest.raises(NotImplementedError, match='forward-mode'), forward_ad.dual_level():
                slots = torch.zeros(1, dtype=torch.int32, device=DEVICE)
                MODES[mode](
                    q, k, forward_ad.make_dual(v, v), g, initial_state=inputs['initial_state'], state_indices=slots
                )

    @pytest.mark.parametrize('mode', OPERATORS)
    def test_cpu_path(self, mode, cpu_path):
        """The CPU path is plain PyTorch, and has all derivatives."""
        inputs = make_inputs(Case(3, H=1, K=3, V=2), 'cpu')
        q, k, v, g = (inputs[name].double() for name in ('q', 'k', 'v', 'g'))

        def f(q, g):
            return MODES[mode](q, k, v, g)[0]

        assert torch.autograd.gradcheck(f, (q.requires_grad_(), g.requires_grad_()), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, (q, g))
        batched = torch.func.vmap(f)(torch.stack([q, 2 * q]), torch.stack([g, g]))
        torch.testing.assert_close(batched, torch.stack([f(q, g), f(2 * q, g)]))

    @pytest.mark.parametrize('mode', OPERATORS)
    def test_second_derivatives_of_operators_are_refused(self, mode):
        inputs = make_inputs(Case(8).of(mode))
        q = inputs['q'].requires_grad_()
        o, *_ = OPERATORS[mode].forward(
            q, *(inputs[name] for name in ('k', 'v', 'g')), None, None, 1.0, False, False, ''
        )
        (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match=f'{mode}_backward.* no autograd formula'):
            dq.sum().backward()


class TestModules:
    @pytest.mark.parametrize('mode', mark_slow(MODES, 'chunk', 'segments', 'fused_recurrent'))
    def test_negated_views(self, mode):
        """Inputs and gradients may be views whose sign their reader must apply, as imaginary parts of conjugates."""
        fn, context = function_of(mode)
        case = Case(LENGTHS[mode][0]).of(mode)
        inputs = make_inputs(case)
        negated = {name: x if x is None else torch.complex(x, -x).conj().imag for name, x in inputs.items()}
        assert all(x is None or x.is_neg() and torch.equal(x, inputs[name]) for name, x in negated.items())
        with context:
            expected = run(fn, case, inputs)
            for names in (['q'], ['g'], ['do'], ['dht', 'initial_state'], [*negated]):
                found = run(fn, case, inputs | {name: negated[name] for name in names})
                for name in expected:
                    torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
        if mode in STATEFUL and mode != 'segments':
            slots = torch.zeros(1, dtype=torch.int32, device=DEVICE)
            with pytest.raises(ValueError, match='initial_state is written in place, and must not be a negated view'):
                MODES[mode](
                    inputs['q'], inputs['k'], inputs['v'], initial_state=negated['initial_state'], state_indices=slots
                )

    def test_subclasses_without_a_dispatch_of_their_own(self, cpu_path):
        """They are treated as other tensors are, with all derivatives on the CPU."""

        class Plain(torch.Tensor):
            pass

        q, k, v = (torch.randn(1, 3, 1, 2, dtype=torch.float64).as_subclass(Plain).requires_grad_() for _ in range(3))
        o, _ = fla_simple_gla.chunk_simple_gla(q, k, v)
        assert isinstance(o, Plain)
        (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
        torch.autograd.grad(dq.sum(), q)

    @pytest.mark.parametrize('reentrant', mark_slow([False, True], True))
    @pytest.mark.parametrize('mode', mark_slow(MODES, 'segments', 'fused_recurrent'))
    def test_checkpoint(self, mode, reentrant):
        fn, context = function_of(mode)
        module = block(fn)
        x = torch.randn(1, LENGTHS[mode][0], 32, device=DEVICE, requires_grad=True)
        with context:
            expected, found = (
                [*torch.autograd.grad(y.square().mean(), [*module.parameters()])]
                if not reentrant
                else backward(module, x, y)
                for y in (module(x), checkpoint(module, x, use_reentrant=reentrant))
            )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    @pytest.mark.parametrize('around_forward', mark_slow([False, True], True))
    @pytest.mark.parametrize('mode', mark_slow(MODES, 'segments', 'fused_recurrent'))
    def test_checkpoint_in_part_under_a_mode(self, mode, around_forward):
        """The operator and the Function save the same. Either may run first, and the other in the recomputation."""
        fn, context = function_of(mode)
        module, x = block(fn), torch.randn(1, LENGTHS[mode][0], 32, device=DEVICE)
        modes = [FlopCounterMode(display=False), contextlib.nullcontext()]
        first, second = modes if around_forward else reversed(modes)
        with context:
            with first:
                loss = checkpoint(module, x, use_reentrant=False).square().mean()
            with second:
                found = torch.autograd.grad(loss, [*module.parameters()])
            # Under that mode PyTorch computes linear layers in another way.
            assert_close(found, gradients(module, module, x)[1:], 1e-5)

    def test_checkpoint_that_saves_the_operator(self, monkeypatch):
        """A policy of selective checkpointing can name the operator. Then the operator runs once."""
        operator = torch.ops.fla_simple_gla.chunk.default
        seen = []

        def policy(ctx, func, *args, **kwargs):
            if func is operator:
                seen.append(func)
                return CheckpointPolicy.MUST_SAVE
            return CheckpointPolicy.PREFER_RECOMPUTE

        module = block(fla_simple_gla.chunk_simple_gla)
        x = torch.randn(1, 20, 32, device=DEVICE)
        forward = mock.Mock(wraps=chunk.mode.forward)
        monkeypatch.setattr(chunk.mode, 'forward', forward)
        y = checkpoint(module, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
        found = torch.autograd.grad(y.square().mean(), [*module.parameters()])
        assert seen and forward.call_count == 1
        expected = torch.autograd.grad(module(x).square().mean(), [*module.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(found, expected))

    @pytest.mark.parametrize('mode', mark_slow(OPERATORS, 'chunk', 'fused_chunk', 'parallel'))
    def test_checkpoint_in_a_compiled_module(self, mode):
        module = block(MODES[mode])
        x = torch.randn(1, 20, 32, device=DEVICE)
        compiled = torch.compile(
            lambda x: checkpoint(module, x, use_reentrant=False), fullgraph=True, backend='aot_eager'
        )
        assert_close(gradients(compiled, module, x), gradients(module, module, x), 1e-5)

    @pytest.mark.parametrize('mode', mark_slow(OPERATORS, 'chunk', 'fused_recurrent'))
    def test_functional_call(self, mode):
        module, other = block(MODES[mode]), block(MODES[mode], seed=1)
        x = torch.randn(1, 20, 32, device=DEVICE)
        parameters = dict(other.named_parameters())
        y = torch.func.functional_call(module, parameters, (x,))
        assert torch.equal(y, other(x))
        found = torch.autograd.grad(y.square().mean(), [*parameters.values()])
        assert all(torch.equal(a, b) for a, b in zip(found, gradients(other, other, x)[1:]))

    @pytest.mark.parametrize('mode', mark_slow(MODES, 'segments', 'fused_recurrent'))
    def test_without_gradients(self, mode):
        """Calls without gradients may come before and after calls with them. Inference tensors may be inputs."""
        fn, context = function_of(mode)
        case = Case(LENGTHS[mode][0]).of(mode)
        inputs = make_inputs(case)
        leaves = [inputs[name].requires_grad_() for name in ('q', 'k', 'v', 'g')]
        with context:
            o, _ = fn(*leaves)
            with torch.no_grad():
                without, _ = fn(*leaves)
            with torch.inference_mode():
                inferred, _ = fn(*leaves)
                again, _ = fn(*[x.clone() for x in leaves])
            other, _ = fn(*leaves)
            assert not without.requires_grad and inferred.is_inference() and other.requires_grad
            for x in (without, inferred, again, other):
                assert torch.equal(x, o)
            torch.autograd.grad(other.sum(), leaves)
            with torch.no_grad():
                assert torch.equal(fn(*leaves[:2], inferred, leaves[3])[0], fn(*leaves[:2], o, leaves[3])[0])

    def test_compiled_modules_can_be_copied_and_pickled(self):
        module, x = block(fla_simple_gla.chunk_simple_gla), torch.randn(1, 20, 32, device=DEVICE)
        expected = module(x)
        wrapped = torch.compile(module, fullgraph=True, backend='aot_eager')
        in_place = block(fla_simple_gla.chunk_simple_gla)
        in_place.compile(fullgraph=True, backend='aot_eager')
        for compiled in (wrapped, in_place):
            assert_close([compiled(x)], [expected], 1e-6)
            for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
                assert_close([other(x)], [expected], 1e-6)

    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16] if GPU else [torch.bfloat16], ids=str)
    @pytest.mark.parametrize('mode', OPERATORS)
    def test_autocast(self, mode, dtype, cpu_path):
        """Gradients are those of casting q, k and v by hand. Gates, states and their gradients stay in fp32."""
        inputs = make_inputs(Case(20))
        names = ('q', 'k', 'v', 'g', 'initial_state') if mode in STATEFUL else ('q', 'k', 'v', 'g')
        options = {'output_final_state': True} if mode in STATEFUL else {}
        results = []
        for by_hand in (False, True):
            leaves = {name: inputs[name].detach().requires_grad_() for name in names}
            with contextlib.nullcontext() if by_hand else torch.autocast(DEVICE, dtype):
                cast = {name: x.to(dtype) if by_hand and name in 'qkv' else x for name, x in leaves.items()}
                o, ht = MODES[mode](**cast, **options)
            outputs = [o, ht] if mode in STATEFUL else [o]
            seeds = [inputs['do'].to(dtype), inputs['dht']][: len(outputs)]
            results.append([*outputs, *torch.autograd.grad(outputs, [*leaves.values()], seeds)])
        assert results[0][0].dtype == dtype and all(x.dtype == torch.float32 for x in results[0][1:])
        for a, b in zip(*results):
            assert a.dtype == b.dtype and torch.equal(a, b)

    @pytest.mark.parametrize('mode', MODES)
    @pytest.mark.parametrize('dtype', [HALF] if GPU else [torch.bfloat16], ids=str)
    def test_autocast_casts_q_k_and_v_only(self, mode, dtype, monkeypatch):
        """Gates and states are not cast. The outputs are those of inputs that are cast by hand."""
        if not GPU:
            # The CPU path runs: the interpreter multiplies bfloat16 wrongly, and autocast on a CPU may lack float16.
            monkeypatch.setattr('fla_simple_gla._triton.INTERPRET', False)
        case = Case(20, K=D, V=D)
        inputs = make_inputs(case)
        q, k, v, g = (inputs[name] for name in ('q', 'k', 'v', 'g'))
        options = {'initial_state': inputs['initial_state'], 'output_final_state': True} if mode in STATEFUL else {}
        with torch.autocast(DEVICE, dtype):
            o, ht = MODES[mode](q, k.to(dtype), v, g, **options)
        by_hand = MODES[mode](q.to(dtype), k.to(dtype), v.to(dtype), g, **options)
        assert o.dtype == dtype and torch.equal(o, by_hand[0])
        if mode in STATEFUL:
            assert ht.dtype == torch.float32 and torch.equal(ht, by_hand[1])

    @pytest.mark.parametrize('mode', [mode for mode in OPERATORS if mode in STATEFUL])
    def test_autograd_notices_what_is_written_in_place(self, mode):
        inputs = make_inputs(Case(3))
        tensors = [inputs[name] for name in ('q', 'k', 'v', 'g')]
        pool = torch.randn(2, 2, 16, 16, device=DEVICE)
        x = torch.ones(1, device=DEVICE, requires_grad=True)
        y = (x * pool).sum()
        with torch.no_grad():
            MODES[mode](*tensors, initial_state=pool, state_indices=torch.zeros(1, dtype=torch.int32, device=DEVICE))
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            y.backward()
        if mode == 'fused_recurrent':
            buffer = torch.zeros(1, 3, 2, 16, 16, device=DEVICE)
            y = (x * buffer).sum()
            with torch.no_grad():
                fused_recurrent_simple_gla(*tensors, intermediate_states_buffer=buffer)
            with pytest.raises(RuntimeError, match='modified by an inplace operation'):
                y.backward()


def backward(module, x, y):
    """The gradients by `backward`, which reentrant checkpointing needs."""
    module.zero_grad()
    y.square().mean().backward()
    return [p.grad.clone() for p in module.parameters()]


@needs_gpu
class TestGPU:
    @pytest.mark.parametrize('mode', OPERATORS)
    def test_two_compiled_layers_learn_what_eager_ones_do(self, mode):
        """They have the same losses within the rounding of bf16, in one graph."""
        x, target = torch.randn(2, 4, 256, 256, device='cuda', dtype=torch.bfloat16)
        losses = []
        for compiled in (False, True):
            layers = [block(MODES[mode], seed, dtype=torch.bfloat16, width=256, heads=4) for seed in (1, 2)]
            model = nn.Sequential(*layers)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            call = torch.compile(model, fullgraph=True) if compiled else model
            losses.append([])
            for _ in range(30):
                loss = (call(x) - target).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[-1].append(loss.item())
        assert losses[0][-1] < 0.9 * losses[0][0]
        torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-2, atol=0)

    def test_compiled_into_cuda_graphs(self):
        """`mode='reduce-overhead'` replays the whole forward and backward."""
        counters.clear()
        module = block(MODES['chunk'], width=128)
        compiled = torch.compile(module, fullgraph=True, mode='reduce-overhead')
        for _ in range(4):
            x = torch.randn(1, 5000, 128, device='cuda')
            torch.compiler.cudagraph_mark_step_begin()
            assert_close(gradients(compiled, module, x), gradients(module, module, x), 1e-5)
        assert counters['inductor']['cudagraph_skips'] == 0

    def test_compiled_calls_do_not_wait_for_the_gpu(self):
        module = block(MODES['chunk'], dtype=torch.bfloat16, width=128)
        compiled = torch.compile(module, fullgraph=True)
        x = torch.randn(1, 600, 128, device='cuda', dtype=torch.bfloat16)
        cu_seqlens = torch.tensor([0, 100, 600], device='cuda')
        gradients(lambda x: compiled(x, cu_seqlens=cu_seqlens), module, x)
        torch.cuda.set_sync_debug_mode('error')
        try:
            gradients(lambda x: compiled(x, cu_seqlens=cu_seqlens), module, x)
        finally:
            torch.cuda.set_sync_debug_mode('default')

    @pytest.mark.parametrize('mode', MODES)
    def test_current_stream(self, mode):
        """Forward and backward on another stream end while the default stream is still busy."""
        case = Case(400, B=2, K=64, V=64, dtype=HALF).of(mode)
        inputs = make_inputs(case)
        expected = run(MODES[mode], case, inputs)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        for _ in range(2):  # the first run allocates memory of that stream
            with torch.cuda.stream(stream):
                found = run(MODES[mode], case, inputs)
            stream.synchronize()
            torch.cuda.synchronize()
            torch.cuda._sleep(2 * 10**9)  # cycles, about a second
        with torch.cuda.stream(stream):
            found = run(MODES[mode], case, inputs)
        stream.synchronize()
        assert not torch.cuda.default_stream().query()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        torch.cuda.synchronize()

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
    @pytest.mark.parametrize('mode', MODES)
    def test_device_of_the_tensors(self, mode):
        """Calls run on the device of their tensors. The current device stays the same, in compiled calls too."""
        case = Case(400, B=2, K=64, V=64, dtype=HALF).of(mode)
        inputs = make_inputs(case)
        others = {name: None if x is None else x.to('cuda:1') for name, x in inputs.items()}
        calls = [MODES[mode]]
        if mode != 'segments':
            calls.append(torch.compile(MODES[mode], fullgraph=True, backend='aot_eager'))
        expected = run(MODES[mode], case, inputs)
        for call in calls:
            for _ in range(2):
                found = run(call, case, others)
                assert torch.cuda.current_device() == 0
                assert all(
                    x.device.index == 1 and torch.equal(x.to('cuda:0'), expected[name]) for name, x in found.items()
                )

    def test_threads(self):
        """Many threads make the same and other calls, first calls among them. They get the bits of one thread."""
        cases = [
            (mode, Case(T, B=B, K=40, V=56, dtype=HALF).of(mode))
            for mode in OPERATORS
            for T, B in ((100, 1), (300, 2), (301, 2))
        ]
        made = [make_inputs(case) for _, case in cases]
        results, failures = {}, []

        def work(number):
            try:
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):
                    for i in range(3 * len(cases)):
                        which = (i * 5 + number) % len(cases)
                        mode, case = cases[which]
                        found = run(MODES[mode], case, made[which])
                        results.setdefault(which, []).append(found)
                stream.synchronize()
            except BaseException as error:
                failures.append(error)

        torch.cuda.synchronize()
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        for which, (mode, case) in enumerate(cases):
            expected = run(MODES[mode], case, made[which])
            assert len(results[which]) == 24
            for found in results[which]:
                assert all(torch.equal(found[name], expected[name]) for name in expected)
