"""One token of Mamba and Mamba-2 under mamba_ssm's name: against the formula in fp64."""

import dataclasses
import inspect
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, HALF, TOLERANCE, assert_same_bits, needs_gpu, poisoned_memory, rms_error, shown

from fla_simple_gla._cache import Cache
from fla_simple_gla.adapters import _step
from fla_simple_gla.adapters.mamba_ssm import mamba_chunk_scan_combined, selective_state_update

NAMES = ('state', 'x', 'dt', 'A', 'B', 'C', 'D', 'z', 'dt_bias')
SLOTS = 6


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int = 3
    H: int | None = 4  # None: no dimension of heads and groups
    G: int = 1
    P: int = 16
    N: int = 32
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    tied: bool = True
    D: str | None = 'rows'  # 'heads': expanded over dim
    z: bool = True
    bias: bool = True
    softplus: bool = True
    indices: tuple[int, ...] | None = None
    layout: str = 'contiguous'  # or 'projection', 'transposed', 'odd', 'expanded'

    def __str__(self):
        return shown(self) or 'all'


def make(case: Case, device=DEVICE) -> dict[str, torch.Tensor | None]:
    """The arguments that are tensors. Slots of a pool that no index names are NaN."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    b, H, G, P, N = case.batch, case.H or 1, case.G, case.P, case.N
    found = {
        'state': normal(b if case.indices is None else SLOTS, H, P, N, dtype=case.state_dtype),
        'x': normal(b, H, P, dtype=case.dtype), 'dt': normal(b, H, P, dtype=case.dtype), 'A': -normal(H, P, N).exp(),
        'B': normal(b, G, N, dtype=case.dtype), 'C': normal(b, G, N, dtype=case.dtype),
        'D': normal(H, P), 'z': normal(b, H, P, dtype=case.dtype), 'dt_bias': normal(H, P) - 1,
    }  # fmt: skip
    if case.tied:
        found['dt'], found['dt_bias'] = (found[name][..., :1].expand_as(found[name]) for name in ('dt', 'dt_bias'))
        found['A'] = found['A'][:, :1, :1].expand(H, P, N)
    if case.D == 'heads':
        found['D'] = found['D'][:, :1].expand(H, P)
    found |= {name: None for name, given in (('D', case.D), ('z', case.z), ('dt_bias', case.bias)) if not given}
    place(found, case)
    if case.indices is not None:
        found['state'][[i for i in range(SLOTS) if i not in case.indices]] = float('nan')
        found['state_batch_indices'] = torch.tensor(case.indices, device=device)
    if case.H is None:
        found = {
            name: x
            if x is None or name == 'state_batch_indices'
            else x.squeeze(0 if name in ('A', 'D', 'dt_bias') else 1)
            for name, x in found.items()
        }
    return found


def place(found: dict, case: Case) -> None:
    """Give the tensors the strides of a layout."""
    state = found['state']
    if case.layout == 'transposed':
        found['state'] = state.mT.contiguous().mT
        found['A'] = found['A'].permute(2, 0, 1).contiguous().permute(1, 2, 0)
        for name in ('x', 'B', 'D'):
            if found[name] is not None:
                found[name] = torch.stack([found[name], torch.full_like(found[name], float('nan'))], -1)[..., 0]
    elif case.layout == 'odd':  # rows of odd length, and slots with a gap
        wide = state.new_full((state.shape[0], state.shape[1] + 1, case.P, case.N + 1), float('nan'))
        wide[:, 1:, :, 1:] = state
        found['state'] = wide[:, 1:, :, 1:]
    elif case.layout == 'projection':
        names = [name for name in ('z', 'x', 'B', 'C', 'dt') if found[name] is not None]
        whole = torch.cat([found[name].flatten(1) for name in names], -1)
        for name, part in zip(names, whole.split([found[name][0].numel() for name in names], -1)):
            found[name] = part.unflatten(1, found[name].shape[1:])
        if case.tied:
            found['dt'] = found['dt'][..., :1].expand_as(found['x'])
        for name in ('z', 'dt'):  # the last of several tokens
            if found[name] is not None and not case.tied:
                found[name] = torch.stack([torch.zeros_like(found[name]), found[name]], -1)[..., 1]
    elif case.layout == 'expanded':  # dims that are expanded without being tied
        found['A'] = found['A'][:, :, :1].expand_as(found['A'])
        found['dt'], found['dt_bias'] = (found[name][..., :1].expand_as(found[name]) for name in ('dt', 'dt_bias'))
        found['x'] = found['x'][:, :1].expand_as(found['x'])
        found['B'] = found['B'][:1].expand_as(found['B'])
        found['C'] = found['C'][..., :1].expand_as(found['C'])


def formula(case: Case, given: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """out and the states in fp64, after the definition."""
    state, x, dt, A, B, C, D, z, bias = (
        given[name] if given[name] is None else given[name].detach().cpu().double() for name in NAMES
    )
    if case.H is None:
        state, x, dt, B, C = (y[:, None] for y in (state, x, dt, B, C))
        z = z if z is None else z[:, None]
    heads = x.shape[1] // case.G
    rows = range(case.batch) if case.indices is None else case.indices
    states, out = state.clone(), torch.zeros_like(x)
    for n, slot in enumerate(rows):
        if slot < 0:
            continue
        step = dt[n] if bias is None else dt[n] + bias
        step = torch.log1p(step.exp()) if case.softplus else step
        B_h, C_h = (y[n].repeat_interleave(heads, 0) for y in (B, C))
        h = torch.exp(step[..., None] * A) * state[slot] + torch.einsum('hp,hp,hn->hpn', step, x[n], B_h)
        y = torch.einsum('hpn,hn->hp', h, C_h)
        y = y if D is None else y + D * x[n]
        out[n] = y if z is None else y * z[n] * torch.sigmoid(z[n])
        states[slot] = h
    return (out, states) if case.H is not None else (out[:, 0], states[:, 0])


def update(case: Case, given: dict) -> torch.Tensor:
    return selective_state_update(**given, dt_softplus=case.softplus)


TOLERANCES = {dtype: tolerance[0] for dtype, tolerance in TOLERANCE.items()} | {torch.float64: 1e-14}


def close(x: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether x has an error that its dtype explains. NaN stands for what must not have been touched."""
    x = x.cpu()
    untouched = exact.isnan()
    return torch.equal(x.isnan(), untouched) and rms_error(x[~untouched], exact[~untouched]) < TOLERANCES[dtype]


def compare(case: Case, given: dict | None = None) -> None:
    given = given or make(case)
    out, states = formula(case, given)
    with poisoned_memory():
        found = update(case, given)
    assert found.dtype == given['x'].dtype and found.shape == given['x'].shape and found.is_contiguous()
    assert close(found, out, given['x'].dtype)
    assert close(given['state'], states, given['state'].dtype)
    if case.layout == 'odd':
        around = given['state']._base
        assert around[:, :1].isnan().all() and around[:, 1:, :, :1].isnan().all()


CASES = [
    Case(),
    Case(tied=False),
    Case(D=None, z=False, bias=False, softplus=False),
    Case(D=None, z=False, bias=False, tied=False),
    Case(D='heads', z=False, G=2, layout='projection'),
    Case(H=6, G=3, tied=False, layout='projection', dtype=torch.float16),
    Case(P=5, N=7),
    Case(P=13, N=24, tied=False, G=4),
    Case(H=None, P=72, tied=False),
    Case(H=None, P=8, N=16, bias=False, D='heads', layout='transposed'),
    Case(H=None, P=40, N=3, tied=False, indices=(4, -1, 0)),
    Case(layout='transposed', tied=False),
    Case(P=11, N=17, layout='transposed', state_dtype=torch.float16, indices=(1, 5, -1)),
    Case(layout='odd', state_dtype=torch.float16),
    Case(layout='odd', tied=False, indices=(2, 3, 0)),
    Case(layout='expanded', tied=False),
    Case(state_dtype=torch.float16, dtype=torch.float16, indices=(-1, 3, -1)),
    Case(indices=(-1, -1, -1)),
    Case(state_dtype=torch.bfloat16),
    Case(H=1, P=1, N=1, tied=False),
    Case(H=2, P=20, N=300, batch=1),
]
HALF_CASES = [
    Case(dtype=HALF, state_dtype=HALF, P=64, N=128, H=8, G=2, D='heads'),
    Case(dtype=HALF, P=64, N=128, H=8, layout='projection', indices=(3, -1, 5)),
    Case(dtype=HALF, state_dtype=HALF, H=None, P=500, N=16, tied=False, layout='projection'),
    Case(dtype=HALF, state_dtype=HALF, P=80, N=200, layout='transposed'),
    Case(dtype=HALF, state_dtype=HALF, P=24, N=512, tied=False),
]


@pytest.mark.parametrize('case', CASES, ids=str)
def test_step(case):
    compare(case)


@needs_gpu
@pytest.mark.parametrize('case', HALF_CASES, ids=str)
def test_step_in_half_precision(case):
    compare(case)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    'case', [Case(G=2), Case(tied=False, indices=(2, -1, 5)), Case(H=None), Case(D=None, z=False)], ids=str
)
def test_step_composed_of_operations_of_pytorch(case, dtype):
    case = dataclasses.replace(case, dtype=dtype, state_dtype=dtype)
    given = make(case, 'cpu')
    out, states = formula(case, given)
    with mock.patch.object(_step, 'runs_kernels', lambda x: False), mock.patch.object(_step, 'plans', Cache(8)):
        found = update(case, given)
    for x, exact in ((found, out), (given['state'], states)):
        assert x.dtype == dtype and close(x, exact, dtype)


def test_states_in_fp64_on_the_cpu():
    """They are computed in fp64, though kernels in the interpreter take the dtype of x."""
    case = Case(state_dtype=torch.float64)
    given = make(case, 'cpu')
    _, states = formula(case, given)
    update(case, given)
    assert close(given['state'], states, torch.float64)


def test_states_of_padding_are_kept_by_operations_of_pytorch():
    # the slots that padding could be taken for: the first, the last, and that of another sequence
    for indices in ((-1, -1, -1), (-1, 0, SLOTS - 1), (SLOTS - 1, -1, -1)):
        case = Case(indices=indices)
        given = make(case, 'cpu')
        given['state'].nan_to_num_(1.0)
        before = given['state'].clone()
        out, states = formula(case, given)
        _step.composed(_step.Tensors(**given), True)
        others = [slot for slot in range(SLOTS) if slot not in indices]
        assert torch.equal(given['state'][others], before[others])
        assert close(given['state'], states, torch.float32)


def test_some_tensors_may_lack_the_only_head_or_group():
    full = make(Case(H=1))
    lacking = {name: x if x is None else x.clone() for name, x in full.items()}
    for name in ('x', 'dt', 'B', 'C', 'z'):
        lacking[name] = lacking[name][:, 0]
    for name in ('A', 'D', 'dt_bias'):
        lacking[name] = lacking[name][0]
    # A is cloned without its strides of zero: the decay of each number is computed on its own
    out = update(Case(), full)
    assert torch.allclose(update(Case(), lacking), out, rtol=1e-5, atol=1e-5)
    assert torch.allclose(lacking['state'], full['state'], rtol=1e-5, atol=1e-5)
    lacking['state'] = lacking['state'][:, 0]
    assert update(Case(), lacking).shape == (3, 16)  # as many dimensions as the states


@pytest.mark.parametrize('case', [Case(), Case(tied=False, indices=(4, 0, -1))], ids=str)
def test_steps_again_give_the_same_bits(case):
    """The first step of a layout, the one that is recorded, and replays; and a row of a larger batch."""
    results = []
    for _ in range(4):
        given = make(case)
        results.append({'out': update(case, given), 'state': given['state'].nan_to_num()})
    for found in results[1:]:
        assert_same_bits(found, results[0])
    given = make(case)
    for name in ('x', 'dt', 'B', 'C', 'z', 'state_batch_indices'):
        if name in given:
            given[name] = given[name][:1]
    if case.indices is None:
        given['state'] = given['state'][:1]
    assert torch.equal(update(case, given), results[0]['out'][:1])


def test_step_sizes_of_any_magnitude():
    """softplus of what overflows, and of what is lost beside 1."""
    case = Case(batch=1, H=1, P=6, N=2, tied=False, bias=False, z=False, D=None)
    given = make(case)
    given['dt'] = torch.tensor([[[-40.0, -20.0, -3.0, 0.0, 30.0, 200.0]]], device=DEVICE)
    given['A'].mul_(1e-3)
    given['state'].zero_()
    exact_given = {name: x if x is None else x.double().cpu() for name, x in given.items()}
    exact_given['dt'] = F.softplus(exact_given['dt'], threshold=50.0)
    out, states = formula(dataclasses.replace(case, softplus=False), exact_given)
    found = update(case, given).cpu().double()
    assert ((found - out) / out).abs().max() < 1e-5
    assert ((given['state'].cpu() - states) / states).abs().max() < 1e-5


def test_steps_equal_the_scan():
    T, b, H, G, P, N = 7, 2, 4, 2, 16, 16
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    x, z, dt = normal(b, T, H, P), normal(b, T, H, P), normal(b, T, H)
    A, D, bias = -normal(H).exp(), normal(H), normal(H)
    B, C, state = normal(b, T, G, N), normal(b, T, G, N), normal(b, H, P, N)
    y, last = mamba_chunk_scan_combined(
        x, dt, A, B, C, 64, D, z, bias, initial_states=state, dt_softplus=True, return_final_states=True
    )
    for t in range(T):
        out = selective_state_update(
            state, x[:, t], dt[:, t, :, None].expand(b, H, P), A[:, None, None].expand(H, P, N), B[:, t], C[:, t],
            D[:, None].expand(H, P), z[:, t], bias[:, None].expand(H, P), True,
        )  # fmt: skip
        assert rms_error(out, y[:, t]) < 1e-5
    assert rms_error(state, last) < 1e-5


def test_only_heads_with_one_step_size_and_one_decay_are_tied():
    dt, A, bias = torch.zeros(2, 3, 1), torch.zeros(3, 1, 1), torch.zeros(3, 1)
    expanded = dt.expand(2, 3, 4), A.expand(3, 4, 5), bias.expand(3, 4)
    assert _step.is_tied(*expanded) and _step.is_tied(*expanded[:2], None) and _step.is_tied(dt, A, bias)
    for i, dense in enumerate((torch.zeros(2, 3, 4), torch.zeros(3, 1, 5).expand(3, 4, 5), torch.zeros(3, 4))):
        assert not _step.is_tied(*expanded[:i], dense, *expanded[i + 1 :])
    assert not _step.is_tied(expanded[0], torch.zeros(3, 4, 1).expand(3, 4, 5), None)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_no_gradients(dtype):
    """Also where grad mode is on: by kernels, and by operations of PyTorch."""
    case = Case(dtype=dtype)
    given, again = make(case, 'cpu'), make(case, 'cpu')
    for name in ('state', 'x', 'dt', 'A', 'D', 'dt_bias'):
        given[name] = given[name].detach().requires_grad_()
    version = given['state']._version
    out = update(case, given)
    assert not out.requires_grad and given['state'].is_leaf and given['state']._version > version
    assert torch.equal(out, update(case, again)) and torch.equal(given['state'], again['state'])


def test_compiled_and_fake():
    case = Case(indices=(4, -1, 1), tied=False)
    given, again = make(case), make(case)
    compiled = torch.compile(lambda given: update(case, given), backend='aot_eager', fullgraph=True)
    out, wanted = compiled(given), update(case, again)
    assert rms_error(out, wanted) < 1e-6
    assert rms_error(given['state'].nan_to_num(), again['state'].nan_to_num()) < 1e-6
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in make(case).items()}
        assert update(case, fake).shape == (3, 4, 16)
    meta = {name: x.to('meta') for name, x in make(Case(H=None)).items()}
    assert update(Case(), meta).shape == (3, 16)


WRONG = [
    (TypeError, 'state must be a torch.Tensor', lambda given: dict(state=None)),
    (TypeError, 'x must be a torch.Tensor', lambda given: dict(x=[1.0])),
    (TypeError, 'dt must be a floating-point', lambda given: dict(dt=given['dt'].int())),
    (TypeError, 'state is written in place', lambda given: dict(state=given['state'].to(torch.float8_e5m2))),
    (TypeError, 'dt_softplus must be a bool', lambda given: dict(dt_softplus=1)),
    (TypeError, 'state_batch_indices must be int32', lambda given: dict(state_batch_indices=given['x'][:, 0, 0])),
    (TypeError, 'state_batch_indices must be a torch.Tensor', lambda given: dict(state_batch_indices=[0, 1, 2])),
    (ValueError, r'state must have shape \[batch, nheads', lambda given: dict(state=given['state'][None])),
    (ValueError, 'state must have at least one', lambda given: dict(state=given['state'][..., :0])),
    (ValueError, 'dstate of 1 to 512', lambda given: dict(state=torch.zeros(3, 4, 16, 513, device=DEVICE))),
    (ValueError, 'state must have shape', lambda given: dict(state=given['state'][:2])),
    (ValueError, 'overlap', lambda given: dict(state=given['state'][:1].expand(3, 4, 16, 32))),
    (ValueError, r'x must have shape \[batch, nheads, dim\]', lambda given: dict(x=given['x'][..., :8])),
    (ValueError, 'x must have shape', lambda given: dict(x=given['x'][:, 0])),
    (ValueError, 'dt must have shape', lambda given: dict(dt=given['dt'][..., 0])),
    (ValueError, r'A must have shape \[nheads, dim, dstate\]', lambda given: dict(A=given['A'][..., 0])),
    (ValueError, 'B must have a divisor', lambda given: dict(B=given['B'].expand(3, 3, 32))),
    (ValueError, r'B must have shape \[batch, dstate\]', lambda given: dict(B=given['B'][:, 0, :8])),
    (ValueError, r'C must have shape \[batch, ngroups', lambda given: dict(C=given['C'].expand(3, 2, 32))),
    (ValueError, 'D must have shape', lambda given: dict(D=given['D'][:, 0])),
    (ValueError, 'z must have shape', lambda given: dict(z=given['z'][:1])),
    (ValueError, 'dt_bias must have shape', lambda given: dict(dt_bias=given['dt_bias'][:, :3])),
    (
        ValueError,
        'state_batch_indices must have',
        lambda given: dict(state_batch_indices=torch.arange(2, device=DEVICE)),
    ),
    (ValueError, "z must be on x's device", lambda given: dict(z=given['z'].to('meta'))),
]


@pytest.mark.parametrize('kind, text, change', WRONG, ids=[row[1][:40] for row in WRONG])
def test_wrong_arguments(kind, text, change):
    given = make(Case()) | {'dt_softplus': True}
    before = given['state'].clone()
    for _ in range(2):  # an error leaves no plan
        with pytest.raises(kind, match=text):
            selective_state_update(**given | change(given))
    assert torch.equal(given['state'], before)


@pytest.mark.parametrize('indices, text', [((0, 1, SLOTS), 'below the 6 slots'), ((2, -1, 2), 'a slot twice')])
def test_wrong_indices_on_the_cpu(indices, text):
    given = make(Case(indices=indices), 'cpu')
    with pytest.raises(ValueError, match=f'state_batch_indices must .*{text}'):
        update(Case(), given)


@needs_gpu
def test_indices_of_no_slot_on_the_gpu():
    case = Case(indices=(0, -1, 2))
    given, again = make(case), make(case)
    given['state_batch_indices'][1] = SLOTS
    assert torch.equal(update(case, given), update(case, again))
    assert torch.equal(given['state'].nan_to_num(), again['state'].nan_to_num())


def test_an_empty_batch():
    given = make(Case(batch=0))
    assert update(Case(), given).shape == (0, 4, 16)


def test_parameters():
    names = [*inspect.signature(selective_state_update).parameters]
    assert names == [*NAMES, 'dt_softplus', 'state_batch_indices']


@needs_gpu
@pytest.mark.parametrize('case', [Case(), HALF_CASES[0], HALF_CASES[2], Case(indices=(5, 0, 3))], ids=str)
def test_results_of_mamba_ssm(case):
    module = pytest.importorskip('mamba_ssm.ops.triton.selective_state_update')
    ours, theirs = make(case), make(case)
    out = module.selective_state_update(**theirs, dt_softplus=case.softplus)
    dtype = torch.float32 if case.dtype == case.state_dtype == torch.float32 else HALF
    assert rms_error(update(case, ours), out) < TOLERANCES[dtype]
    assert rms_error(ours['state'].nan_to_num(), theirs['state'].nan_to_num()) < TOLERANCES[dtype]


@needs_gpu
def test_in_a_graph():
    case = Case(dtype=HALF, P=64, N=128)
    given, again = make(case), make(case)
    for _ in range(3):
        update(case, given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = update(case, given)
    given['state'].copy_(again['state'])
    graph.replay()
    assert torch.equal(out, update(case, again)) and torch.equal(given['state'], again['state'])
