"""Tensor subclasses that wrap a tensor: the results are right, or an error names the argument."""

import contextlib
import itertools

import pytest
import torch
from harness import DEVICE, GPU, MODES, STATEFUL, TOLERANCE, Case, make_inputs, mark_slow, rms_error
from torch.utils._pytree import tree_map

from fla_simple_gla._plans import needs_operator, plan_for
from fla_simple_gla._validation import Call

MODES_HERE = [mode for mode in MODES if mode != 'segments']


class Wrapped(torch.Tensor):
    """Holds a tensor. It has no memory of its own, and its address is 0."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            x.shape,
            strides=x.stride(),
            dtype=x.dtype,
            device=x.device,
            requires_grad=x.requires_grad,
        )

    def __init__(self, x):
        self.inner = x

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def wait_later(x):
    """A tensor of the class that collectives return."""
    collectives = pytest.importorskip('torch.distributed._functional_collectives')
    return collectives.AsyncCollectiveTensor(x)


@pytest.fixture(params=['kernels', 'CPU path'])
def device(request, monkeypatch):
    if request.param == 'kernels':
        return DEVICE
    monkeypatch.setattr('fla_simple_gla._triton.INTERPRET', False)
    return 'cpu'


def calls_of(mode, device):
    """A few calls of a mode: arguments that may be wrapped, and other options."""
    packed = Case(4, K=8, V=8, cu_seqlens=(0, 1, 4)).of(mode)
    inputs = {name: x for name, x in make_inputs(packed, device).items() if x is not None and name not in ('do', 'dht')}
    inputs['cu_seqlens'] = torch.tensor([0, 1, 4], device=device)
    yield inputs, {}
    gamma = Case(2, K=8, V=8, gate='gamma', initial_state=False, output_final_state=False)
    yield {name: x for name, x in make_inputs(gamma, device).items() if x is not None and name != 'do'}, {}
    if mode in STATEFUL:
        inputs = {name: make_inputs(Case(2, K=8, V=8), device)[name] for name in ('q', 'k', 'v', 'g')}
        inputs['initial_state'] = torch.ones(3, 2, 8, 8, device=device)
        inputs['state_indices'] = torch.tensor([1], device=device)
        if mode == 'fused_recurrent':
            inputs['intermediate_states_buffer'] = torch.zeros(1, 2, 2, 8, 8, device=device)
        yield inputs, {}


def results(mode, arguments):
    """o, and the tensors that the call writes."""
    pools = {name: arguments[name] for name in ('initial_state', 'intermediate_states_buffer') if name in arguments}
    plain = {
        name: x.inner if isinstance(x, Wrapped) else x.elem if hasattr(x, 'elem') else x for name, x in pools.items()
    }
    with torch.no_grad():
        o, _ = MODES[mode](**arguments)
    return [o + 0, *(x.clone() for x in plain.values())]


@pytest.mark.parametrize('wrap', mark_slow([Wrapped, wait_later], wait_later))
@pytest.mark.parametrize('mode', mark_slow(MODES_HERE, 'chunk', 'fused_chunk', 'parallel'))
def test_each_argument_may_be_wrapped(mode, wrap, device):
    """Plain calls with the same layouts come before and after."""
    for arguments, options in calls_of(mode, device):

        def copies(arguments=arguments, options=options):
            return {name: x.clone() for name, x in arguments.items()} | options

        expected = results(mode, copies())
        for name in arguments:
            for _ in range(3 if GPU else 2):
                given = copies()
                given[name] = wrap(given[name])
                for found in (results(mode, given), results(mode, copies())):
                    assert len(found) == len(expected)
                    for a, b in zip(found, expected):
                        assert rms_error(a, b) <= 1e-6, name


@pytest.mark.parametrize('mode', MODES_HERE)
def test_plain_calls_are_as_quick_after_wrapped_ones(mode):
    inputs = make_inputs(Case(7, K=16, V=16))
    q, k, v, g = (inputs[name] for name in ('q', 'k', 'v', 'g'))
    scale = 0.37  # no other call has it
    for name, x in (('q', q), ('g', g)):
        with torch.no_grad():
            MODES[mode](**{'q': q, 'k': k, 'v': v, 'g': g, 'scale': scale} | {name: Wrapped(x)})
    plan = plan_for(Call(q, k, v, g, scale=scale))
    assert plan.cached and not plan.needs_operator and plan_for(Call(q, k, v, g, scale=scale)) is plan
    assert needs_operator(Wrapped(q)) and not plan_for(Call(q, k, Wrapped(v), g, scale=scale)).cached


@pytest.mark.parametrize('mode', mark_slow(MODES_HERE, 'chunk', 'fused_recurrent'))
def test_incoming_gradients_may_be_wrapped(mode, device):
    case = Case(20, K=16, V=16).of(mode)
    inputs = make_inputs(case, device)
    names = [name for name in ('q', 'k', 'v', 'g', 'initial_state') if inputs[name] is not None]
    options = {'output_final_state': True} if mode in STATEFUL else {}

    def gradients(do, dht):
        leaves = [inputs[name].detach().requires_grad_() for name in names]
        o, ht = MODES[mode](**dict(zip(names, leaves)), **options)
        outputs, given = ([o], [do]) if ht is None else ([o, ht], [do, dht])
        return torch.autograd.grad(outputs, leaves, given)

    do, dht = inputs['do'], inputs['dht']
    expected = gradients(do, dht)
    for wrapped_o, wrapped_state in itertools.product((False, True), repeat=2):
        found = gradients(Wrapped(do) if wrapped_o else do, Wrapped(dht) if wrapped_state and dht is not None else dht)
        for a, b in zip(found, expected):
            assert rms_error(a + 0, b) <= TOLERANCE[torch.float32][0]


@pytest.fixture
def one_process(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip('needs torch.distributed with gloo')
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_what_a_collective_returns(one_process):
    collectives = pytest.importorskip('torch.distributed._functional_collectives')
    inputs = make_inputs(Case(5, K=16, V=16), 'cpu')
    tokens = [inputs[name] for name in ('q', 'k', 'v', 'g')]
    state = inputs['initial_state']
    expected, _ = MODES['chunk'](*tokens, initial_state=state)
    for _ in range(2):
        gathered = collectives.all_gather_tensor(state, 0, torch.distributed.group.WORLD)
        found, _ = MODES['chunk'](*tokens, initial_state=gathered)
        assert rms_error(found + 0, expected) <= 1e-6


@pytest.mark.parametrize('mode', MODES_HERE)
def test_sharded_tensors_are_refused_by_name(mode, one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh('cpu', (1,))
    for arguments, options in calls_of(mode, 'cpu'):
        with contextlib.suppress(ValueError), torch.no_grad():
            MODES[mode](**{name: x.clone() for name, x in arguments.items()}, **options)
        for name in arguments:
            for _ in range(2):
                given = dict(arguments)
                given[name] = distribute_tensor(given[name].clone(), mesh, [Replicate()])
                with pytest.raises(TypeError, match=f'{name} is a DTensor: .*to_local'):
                    MODES[mode](**given, **options)
