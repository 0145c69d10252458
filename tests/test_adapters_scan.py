"""The scan of Mamba-2 under mamba_ssm's name: against its formula in fp64, token by token."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, GPU, HALF, PLANS, TOLERANCE, assert_same_bits, needs_gpu, rms_error, segments_of, shown

from fla_simple_gla.adapters import _scan
from fla_simple_gla.adapters.mamba_ssm import mamba_chunk_scan_combined

# the gradients of these are sums over tokens
SUMS = ('A', 'D', 'dt_bias')
NAMES = ('x', 'dt', 'A', 'B', 'C', 'D', 'z', 'dt_bias', 'initial_states')


@dataclasses.dataclass(frozen=True)
class Case:
    T: int = 150
    batch: int = 2
    H: int = 2
    G: int = 1
    P: int = 16
    N: int = 16
    dtype: torch.dtype = torch.float32
    D: int | None = 1  # dimensions
    z: bool = True
    z_dtype: torch.dtype | None = None  # if it is not x's
    bias: bool = True
    shift: float = -2.0  # of the bias
    states: bool = True
    softplus: bool = True
    limit: tuple[float, float] = (0.0, math.inf)
    starts: tuple[int, ...] = ()  # first tokens of the sequences in a row, but for the first one
    projection: bool = False  # x, B, C, z and dt are slices of one tensor

    def __str__(self):
        return shown(self) or 'all'


def make(case: Case, device=DEVICE) -> dict[str, torch.Tensor | None]:
    """The arguments that are tensors, as leaves, and the gradients of y and of the final states."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    b, T, H, G, P, N = case.batch, case.T, case.H, case.G, case.P, case.N
    found = {
        'x': normal(b, T, H, P, dtype=case.dtype), 'dt': normal(b, T, H, dtype=case.dtype), 'A': -normal(H).exp(),
        'B': normal(b, T, G, N, dtype=case.dtype), 'C': normal(b, T, G, N, dtype=case.dtype),
        'D': {None: None, 1: normal(H), 2: normal(H, P)}[case.D],
        'z': normal(b, T, H, P, dtype=case.z_dtype or case.dtype) if case.z else None,
        'dt_bias': normal(H) + case.shift if case.bias else None,
        'initial_states': normal(b, H, P, N) if case.states else None,
    }  # fmt: skip
    if case.projection:
        names = [name for name in ('z', 'x', 'B', 'C', 'dt') if found[name] is not None]
        sizes = [found[name][0, 0].numel() for name in names]
        whole = torch.cat([found[name].flatten(2) for name in names], -1)
        for name, part in zip(names, whole.split(sizes, -1)):
            found[name] = part.unflatten(2, found[name].shape[2:])
    found = {name: None if x is None else x.detach().requires_grad_() for name, x in found.items()}
    return found | {'dy': normal(b, T, H, P, dtype=case.dtype), 'dstates': normal(b, H, P, N)}


def number_of_sequence(case: Case) -> torch.Tensor | None:
    if not case.starts:
        return None
    found = torch.zeros(case.batch, case.T, dtype=torch.int32, device=DEVICE)
    for start in case.starts:
        found[:, start:] += 1
    return found


def formula(case: Case, given: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the final states, token by token, in fp64. A, D and dt_bias are given for each token."""
    x, dt, A, B, C, D, z, bias, states = (given[name] for name in NAMES)
    dt = dt if bias is None else dt + bias
    dt = (F.softplus(dt) if case.softplus else dt).clamp(*case.limit)
    B, C = (y.repeat_interleave(case.H // case.G, 2) for y in (B, C))
    h = x.new_zeros(case.batch, case.H, case.P, case.N) if states is None else states
    rows = []
    for t in range(case.T):
        if t in case.starts:
            h = torch.zeros_like(h)
        v = dt[:, t, :, None] * x[:, t]
        h = h * (dt[:, t] * A[:, t]).exp()[..., None, None] + v[..., None] * B[:, t, :, None]
        rows.append((h * C[:, t, :, None]).sum(-1))
    y = torch.stack(rows, 1)
    if D is not None:
        y = y + D * x
    return y if z is None else y * F.silu(z), h


def gradients(results: tuple, given: dict) -> dict[str, torch.Tensor]:
    leaves = {name: given[name] for name in NAMES if given[name] is not None}
    dys = [given[name].to(y.dtype) for name, y in zip(('dy', 'dstates'), results)]
    return dict(zip(leaves, torch.autograd.grad(results, list(leaves.values()), dys)))


def scan(case: Case, given: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return mamba_chunk_scan_combined(
        *(given[name] for name in 'x dt A B C'.split()), 256, dt_softplus=case.softplus, dt_limit=case.limit,
        seq_idx=number_of_sequence(case), return_final_states=True,
        **{name: given[name] for name in ('D', 'z', 'dt_bias', 'initial_states')},
    )  # fmt: skip


def compare(case: Case, rounded: int = 0) -> None:
    """Results and gradients. `rounded` operands of the operator are rounded to x's dtype after they are made."""
    given = make(case)
    results = scan(case, given)
    found = dict(zip(('y', 'states'), results)) | gradients(results, given)
    exact_given = {name: None if x is None else x.detach().double() for name, x in given.items()}
    for name in SUMS:
        x = exact_given[name]
        if x is not None:
            x = x[:, None].expand(case.H, case.P) if name == 'D' and case.D == 1 else x
            exact_given[name] = x.expand(case.batch, case.T, *x.shape).clone()
    for name in NAMES:
        if exact_given[name] is not None:
            exact_given[name].requires_grad_()
    exact_results = formula(case, exact_given)
    exact = dict(zip(('y', 'states'), exact_results)) | gradients(exact_results, exact_given)
    tolerance, gate_tolerance = TOLERANCE[case.dtype]
    # the RMS of a rounding is a fifth of eps
    tolerance = math.hypot(tolerance, math.sqrt(rounded) * torch.finfo(case.dtype).eps / 5)
    for name, x in found.items():
        assert name in ('y', 'states') or x.dtype == given[name].dtype and x.shape == given[name].shape
        if name in SUMS:
            # neighbours' errors of the gates' gradients have much in common, so those of their sums cancel less. dt has
            # a part that is not the gates'.
            factors = {'A': math.sqrt(case.T), 'dt_bias': 1.0 if case.dtype == torch.float32 else 3.0}
            error = sum_error(x, exact[name], factors.get(name, 1.0))
        else:
            error = rms_error(x, exact[name])
        assert error < (gate_tolerance if name in ('dt', 'A', 'dt_bias') else tolerance), f'{name}: {error:.1e}'
    if case.bias:  # no token is left out
        error = sum_error(found['dt_bias'], found['dt'].double(), 1.0)
        assert error < max(torch.finfo(case.dtype).eps / 2, 2e-6), f'dt_bias: {error:.1e}'


def sum_error(x: torch.Tensor, terms: torch.Tensor, factor: float) -> float:
    """The error of a gradient that is a sum over tokens, relative to the sum or to its terms times a factor, whichever
    is larger: where the terms cancel, their rounding does not.
    """
    total = terms.sum((0, 1))
    if x.dim() < total.dim():  # D is one for all channels of a head
        total = total.sum(-1)
    return ((x - total).norm() / max(total.norm(), factor * terms.norm())).item()


CASES = [
    Case(),
    Case(D=2, projection=True),
    Case(D=None, z=False, bias=False, states=False),
    Case(z=False),
    Case(softplus=False),
    Case(softplus=False, limit=(-0.02, 1.0)),
    Case(limit=(0.05, 0.2)),
    Case(shift=-8.0),  # step sizes of 1e-5 to 1e-2
    Case(starts=(1, 64, 100)),
    Case(T=90, H=6, G=3, P=24, N=40),
    Case(T=1),
]
# Where heads share B and C in pairs, and P and N are those of most models, the sweeps for Hopper take dt and D.
PAIRS = Case(H=8, P=64, N=128, T=300 if GPU else 70)


@pytest.mark.parametrize('case', CASES, ids=str)
def test_against_the_formula(case):
    compare(case)


def test_tiles_of_whole_tokens(monkeypatch):
    """The tiles of GPUs, in the interpreter too: of 128 heads 48 are none."""
    monkeypatch.setattr(_scan, 'exists', lambda device: True)
    case = Case(batch=1, T=3, H=80, G=1, P=64, D=2)
    assert _scan.rows_tile(case.H, case.P, torch.device(DEVICE), backward=True)['BH'] == 128
    compare(case)


@pytest.mark.parametrize('dtype', [HALF] + [torch.float16] * GPU)
@pytest.mark.parametrize('case', [Case(), Case(D=2, z=False, projection=True), Case(z_dtype=torch.float32)], ids=str)
def test_16_bits(case, dtype):
    compare(dataclasses.replace(case, dtype=dtype), rounded=1 + case.z)  # v, and with z the gradient of o


@needs_gpu
@pytest.mark.parametrize(
    'change',
    [
        {}, {'D': 2, 'projection': True}, {'D': None}, {'z': False}, {'z': False, 'D': None, 'states': False},
        {'limit': (0.05, 0.2)}, {'shift': -8.0}, {'starts': (1, 64, 200)}, {'P': 40, 'N': 72},
        {'z_dtype': torch.float32}, {'H': 16, 'G': 2, 'batch': 3}, {'softplus': False},
        {'H': 160, 'T': 70, 'batch': 4}, {'dtype': torch.float16}, {'N': 256}, {'G': 8},
    ],
    ids=str,
)  # fmt: skip
def test_pairs_of_heads(change):
    compare(dataclasses.replace(PAIRS, **{'dtype': torch.bfloat16} | change))


@needs_gpu
@pytest.mark.parametrize('change', [{}, {'starts': (100, 130, 400)}, {'N': 64}], ids=str)
def test_pairs_of_heads_in_segments(change):
    with segments_of(256, PLANS):
        compare(dataclasses.replace(PAIRS, T=600, dtype=torch.bfloat16, **change))


@pytest.mark.parametrize('case', [Case(dtype=torch.float64), Case(dtype=torch.float64, D=2, starts=(5,), G=2)], ids=str)
def test_in_pytorch(case):
    """CPU tensors that no kernel computes."""
    given = make(case, 'cpu')
    exact = {name: x if x is None else x.detach().double() for name, x in given.items()}
    for name in SUMS:
        x = exact[name]
        x = x[:, None].expand(case.H, case.P) if name == 'D' and case.D == 1 else x
        exact[name] = x.expand(case.batch, case.T, *x.shape)
    y, states = mamba_chunk_scan_combined(
        *(given[name] for name in 'x dt A B C'.split()), 64, dt_softplus=True, return_final_states=True,
        seq_idx=None if not case.starts else number_of_sequence(case).cpu(), state_dtype=torch.float64,
        **{name: given[name] for name in ('D', 'z', 'dt_bias', 'initial_states')},
    )  # fmt: skip
    for found, expected in zip((y, states), formula(case, exact)):
        assert rms_error(found, expected) < 1e-6  # step sizes of fp32 gates


def test_step_sizes():
    """To fp32 accuracy, however small. NaN stays NaN, and -inf, which some set for padding, is no step."""
    dt = torch.cat([torch.linspace(-80, 80, 1601), torch.tensor([-math.inf, math.inf, math.nan])]).to(DEVICE)
    x, A = torch.ones(1, len(dt), 1, 16, device=DEVICE), torch.ones(1, device=DEVICE)
    given = _scan.Tensors(x, dt[None, :, None], A, x, x)
    found, gates, _ = _scan.prepare_pass(given, _scan.ScanOptions(True, 0.0, math.inf, False, None))
    exact = torch.nn.functional.softplus(dt.double(), threshold=100.0)
    assert torch.equal(found[..., :-1], gates[..., :-1])  # A is one
    error = ((found.flatten() - exact) / exact)[:-3].abs()
    assert (error < 1e-7 * (10 + dt[:-3].abs())).all()  # the exponential of a GPU rounds its argument
    assert found[0, 0, -3] == 0 and found[0, 0, -2] == math.inf and found[0, 0, -1].isnan()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(
    'case', [Case(T=70, dtype=HALF)] + [dataclasses.replace(PAIRS, T=70, dtype=HALF)] * GPU, ids=str
)
def test_gradient_of_one_argument(case, name):
    """What is not needed is left out, and the rest is the same."""
    given = make(case)
    whole = gradients(scan(case, given), given)[name]
    for other, x in given.items():
        if other in NAMES and other != name:
            given[other] = x.detach()
    y, states = scan(case, given)
    found = torch.autograd.grad([y, states], given[name], [given['dy'], given['dstates']])[0]
    # without what else a kernel makes, its sums may go in another order
    assert rms_error(found, whole) < 1e-6 if name in SUMS else torch.equal(found, whole)


@pytest.mark.parametrize('case', [Case(T=70)] + [dataclasses.replace(PAIRS, dtype=HALF)] * GPU, ids=str)
def test_same_bits_again(case):
    given = make(case)
    runs = []
    for _ in range(3):  # the first, the recorded and the replayed one
        y, states = scan(case, given)
        runs.append({'y': y, 'states': states} | gradients((y, states), given))
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


def test_states_of_sequences():
    """Those of `cu_seqlens` begin with zeros, whatever `seq_idx` and the initial states are."""
    case = Case(batch=1, T=90, starts=(20, 64))
    given = make(case)
    tensors = [given[name] for name in 'x dt A B C'.split()]
    options = dict(dt_softplus=True, seq_idx=number_of_sequence(case), dt_bias=given['dt_bias'], D=given['D'])
    bounds = torch.tensor([0, 20, 64, 90], device=DEVICE)
    y, final, found = mamba_chunk_scan_combined(
        *tensors, 256, return_final_states=True, return_varlen_states=True, cu_seqlens=bounds, **options
    )
    plain = mamba_chunk_scan_combined(*tensors, 256, **options)
    assert torch.equal(y, plain) and not found.requires_grad
    assert rms_error(found[-1:], final) < 1e-5
    for i, (start, end) in enumerate(zip((0, 20, 64), (20, 64, 90))):
        part = [x[:, start:end] if x.dim() > 1 else x for x in tensors]
        _, state = mamba_chunk_scan_combined(
            *part, 256, dt_softplus=True, dt_bias=given['dt_bias'], return_final_states=True
        )
        assert rms_error(found[i : i + 1], state) < 1e-5


@pytest.mark.parametrize('name', ['seq_idx', 'cu_seqlens'])
def test_numbers_of_sequences_are_a_slice(name):
    case = Case(batch=1, T=70, starts=(1, 64))
    given = make(case)
    tensors = [given[name] for name in 'x dt A B C'.split()]
    numbers = {'seq_idx': number_of_sequence(case), 'cu_seqlens': torch.tensor([0, 1, 64, 70], device=DEVICE)}
    slice_of = torch.stack([numbers[name], torch.full_like(numbers[name], 5)], -1)[..., 0]
    assert not slice_of.is_contiguous()
    expected, found = (
        mamba_chunk_scan_combined(*tensors, 256, dt_softplus=True, return_varlen_states=True, **numbers | change)
        for change in ({}, {name: slice_of})
    )
    assert all(map(torch.equal, found, expected))


def test_results_that_are_asked_for():
    case = Case(T=20)
    given = make(case)
    tensors = [given[name] for name in 'x dt A B C'.split()]
    assert mamba_chunk_scan_combined(*tensors, 256).shape == given['x'].shape
    y, states = mamba_chunk_scan_combined(*tensors, 256, return_final_states=True, state_dtype=torch.bfloat16)
    assert states.shape == given['dstates'].shape and states.dtype == torch.bfloat16 and states.is_contiguous()


@pytest.mark.parametrize('T', [0, 40])
def test_under_a_compiler(T):
    case = Case(T=T)
    given = make(case, 'cpu')

    def run(x, z):
        return mamba_chunk_scan_combined(
            x, *(given[name].detach() for name in 'dt A B C'.split()), 256, given['D'].detach(), z, dt_softplus=True
        )

    x, z = given['x'].detach().bfloat16(), given['z'].detach().bfloat16()
    given = {name: x if x is None or name == 'A' else x.detach().bfloat16() for name, x in given.items()}
    expected = run(x, z)
    found = torch.compile(run, backend='aot_eager', fullgraph=True)(x, z)
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_under_autocast(dtype):
    """It has no part in this, as in mamba_ssm: by kernels or by PyTorch."""
    case = Case(T=30, dtype=dtype)
    given = make(case, DEVICE if dtype == torch.float32 else 'cpu')
    tensors = [given[name] for name in 'x dt A B C'.split()]
    expected = mamba_chunk_scan_combined(*tensors, 256, given['D'], given['z'], dt_softplus=True)
    with torch.autocast(given['x'].device.type, torch.bfloat16):
        found = mamba_chunk_scan_combined(*tensors, 256, given['D'], given['z'], dt_softplus=True)
    assert found.dtype == dtype and torch.equal(found, expected)


WRONG = [
    ({'x': lambda x: x[0]}, ValueError, 'x must have 4 dimensions'),
    ({'x': lambda x: x.double()}, TypeError, '(?:x|B) must'),
    ({'dt': lambda x: x[:, :-1]}, ValueError, 'dt must have shape'),
    ({'A': lambda x: x[:, None]}, ValueError, 'A must have shape'),
    ({'B': lambda x: x.expand(-1, -1, 3, -1)}, ValueError, 'B must have shape'),
    ({'C': lambda x: x[..., :-1]}, ValueError, 'C must have shape'),
    ({'C': lambda x: x.half()}, TypeError, "C must have x's dtype"),
    ({'D': lambda x: x[:-1]}, ValueError, 'D must have shape'),
    ({'z': lambda x: x[..., None]}, ValueError, 'z must have shape'),
    ({'dt_bias': lambda x: x.int()}, TypeError, 'dt_bias must be a floating'),
    ({'initial_states': lambda x: x.mT[..., :-1]}, ValueError, 'initial_states must have shape'),
    ({'A': lambda x: x.to('meta')}, ValueError, "A must be on x's device"),
    ({'chunk_size': 0}, ValueError, 'chunk_size must be positive'),
    ({'chunk_size': 1.0}, TypeError, 'chunk_size must be an int'),
    ({'dt_limit': 1.0}, TypeError, 'dt_limit must be a tuple'),
    ({'dt_limit': (1.0, 0.0)}, ValueError, 'dt_limit must be'),
    ({'state_dtype': torch.int32}, TypeError, 'state_dtype must be'),
    ({'seq_idx': torch.zeros(2, 20)}, TypeError, 'seq_idx must be int32 or int64'),
    ({'seq_idx': torch.zeros(2, 21, dtype=torch.int32)}, ValueError, 'seq_idx must have shape'),
    ({'cu_seqlens': torch.tensor([0, 20])}, ValueError, 'cu_seqlens must have shape'),
    ({'return_varlen_states': True}, ValueError, 'cu_seqlens must be given'),
]


@pytest.mark.parametrize('change, error, message', WRONG, ids=lambda x: next(iter(x)) if isinstance(x, dict) else '')
def test_wrong_arguments(change, error, message):
    given = make(Case(T=20))
    arguments = {name: given[name] for name in NAMES} | {'chunk_size': 256, 'dt_softplus': True}
    for name, value in change.items():
        value = value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        arguments[name] = value(arguments[name].detach()) if callable(value) else value
    with pytest.raises(error, match=message):
        mamba_chunk_scan_combined(**arguments)


@needs_gpu
@pytest.mark.parametrize('D', [1, 2])
def test_as_mamba_ssm(D):
    """The numbers of mamba_ssm's own kernels."""
    theirs = pytest.importorskip('mamba_ssm.ops.triton.ssd_combined', reason='mamba_ssm is not installed')
    case = dataclasses.replace(PAIRS, dtype=torch.bfloat16, D=D)
    given = make(case)
    expected = theirs.mamba_chunk_scan_combined(
        *(given[name] for name in 'x dt A B C'.split()), 256, dt_softplus=True, return_final_states=True,
        **{name: given[name] for name in ('D', 'z', 'dt_bias', 'initial_states')},
    )  # fmt: skip
    for found, other in zip(scan(case, given), expected):
        assert rms_error(found, other) < 1e-2
