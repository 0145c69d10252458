"""A Mamba-2 layer between its projections, under mamba_ssm's name: against its formula in fp64, token by token."""

import dataclasses
import inspect
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, GPU, HALF, TOLERANCE, needs_gpu, poisoned_memory, rms_error, shown

from fla_simple_gla.adapters import _norm, _split
from fla_simple_gla.adapters._norm import NormOptions, gated_rms_norm
from fla_simple_gla.adapters.mamba_ssm import mamba_split_conv1d_scan_combined

NAMES = _split.Tensors._fields
# Their gradients are sums over tokens: that of D over those of x, the others over those of gates.
SUMS = ('dt_bias', 'A', 'D')


@dataclasses.dataclass(frozen=True)
class Case:
    T: int = 40
    batch: int = 2
    H: int = 4
    G: int = 2
    P: int = 16
    N: int = 16
    width: int = 4
    mlp: int = 0
    dtype: torch.dtype = torch.float32
    D: int = 1  # dimensions
    bias: bool = True
    activation: str | None = 'silu'
    states: bool = False
    starts: tuple[int, ...] = ()  # first tokens of the sequences in a row, but for the first one
    limit: tuple[float, float] = (0.0, math.inf)
    norm: str | None = 'before'  # 'before' or 'after' the gate
    outputs: int | None = None
    out_bias: bool = True

    def __str__(self):
        return shown(self) or 'plain'


def make(case: Case, device=DEVICE) -> dict[str, torch.Tensor | None]:
    """The arguments that are tensors, and the gradients of out and of the final states."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    b, T, H, P, N, outputs = case.batch, case.T, case.H, case.P, case.N, case.outputs
    dim, dtype = H * P, case.dtype
    channels = dim + 2 * case.G * N
    seq_idx = None
    if case.starts:
        seq_idx = torch.zeros(b, T, dtype=torch.int32, device=device)
        for start in case.starts:
            seq_idx[:, start:] += 1
    return {
        'zxbcdt': normal(b, T, 2 * case.mlp + dim + channels + H, dtype=dtype),
        'conv1d_weight': normal(channels, case.width, dtype=dtype) / case.width**0.5,
        'conv1d_bias': normal(channels, dtype=dtype) if case.bias else None,
        'dt_bias': normal(H) - 2, 'A': -normal(H).exp(), 'D': normal(H) if case.D == 1 else normal(H, P),
        'initial_states': normal(b, H, P, N) if case.states else None, 'seq_idx': seq_idx,
        'rmsnorm_weight': normal(dim) if case.norm else None,
        'outproj_weight': normal(outputs, dim + case.mlp, dtype=dtype) / dim**0.5 if outputs else None,
        'outproj_bias': normal(outputs, dtype=dtype) if outputs and case.out_bias else None,
        'dout': normal(b, T, outputs or dim + case.mlp, dtype=dtype), 'dstates': normal(b, H, P, N),
    }  # fmt: skip


def call(case: Case, given: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return mamba_split_conv1d_scan_combined(
        *(given[name] for name in NAMES[:6]), 256, **{name: given[name] for name in NAMES[6:]}, dt_limit=case.limit,
        return_final_states=True, activation=case.activation, rmsnorm_eps=1e-5, headdim=case.P if case.D == 1 else None,
        ngroups=case.G, norm_before_gate=case.norm != 'after',
    )  # fmt: skip


def formula(case: Case, given: dict, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """out and the final states, token by token. dt_bias, A and D are given for each token.

    Each step's result, and its gradient, is rounded to the dtype.
    """

    def rounded(x):
        return x.to(dtype).double()

    zxbcdt, weight, bias, dt_bias, A, D, h, _, norm, projection, out_bias = (given[name] for name in NAMES)
    H, P, N, G = case.H, case.P, case.N, case.G
    m0, m1, z, xBC, dt = zxbcdt.split([case.mlp, case.mlp, H * P, len(weight), H], -1)
    dt = F.softplus(dt + dt_bias).clamp(*case.limit)
    D = D[..., None] if case.D == 1 else D
    h = xBC.new_zeros(case.batch, H, P, N) if h is None else h
    start, rows = 0, []
    for t in range(case.T):
        if t in case.starts:
            start, h = t, torch.zeros_like(h)
        mixed = 0.0 if bias is None else bias
        for i in range(min(case.width, t - start + 1)):
            mixed = mixed + xBC[:, t - i] * weight[:, case.width - 1 - i]
        mixed = rounded(mixed if case.activation is None else F.silu(mixed))
        x, B, C = mixed.split([H * P, G * N, G * N], -1)
        x = x.unflatten(1, (H, P))
        B, C = (y.unflatten(1, (G, N)).repeat_interleave(H // G, 1) for y in (B, C))
        h = h * (dt[:, t] * A[:, t]).exp()[..., None, None] + (dt[:, t, :, None] * x)[..., None] * B[:, :, None]
        rows.append(((h * C[:, :, None]).sum(-1) + D[:, t] * x).flatten(1))
    y = rounded(torch.stack(rows, 1))
    if case.norm is None:
        y = y * F.silu(z)
    else:
        y = norm_formula(y, z, norm, NormOptions(1e-5, H * P // G, case.norm == 'before'))
    out = rounded(torch.cat([F.silu(m0) * m1, y], -1))
    return out if projection is None else rounded(F.linear(out, projection, out_bias)), h


def norm_formula(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, options: NormOptions) -> torch.Tensor:
    rows = []
    for group in range(y.shape[2] // options.group):
        part = slice(group * options.group, (group + 1) * options.group)
        x = y[..., part] if options.norm_first else y[..., part] * F.silu(z[..., part])
        n = x / (x.square().mean(-1, keepdim=True) + options.eps).sqrt() * weight[part]
        rows.append(n * F.silu(z[..., part]) if options.norm_first else n)
    return torch.cat(rows, -1)


def results(fn, case: Case, given: dict, *options) -> dict[str, torch.Tensor]:
    """out, the final states, and all gradients."""
    leaves = {
        name: given[name].detach().requires_grad_() for name in NAMES if name != 'seq_idx' and given[name] is not None
    }
    with poisoned_memory():
        out, states = fn(case, given | leaves, *options)
        dys = [given['dout'].to(out.dtype), given['dstates'].to(states.dtype)]
        gradients = torch.autograd.grad([out, states], list(leaves.values()), dys)
    return {'out': out.detach(), 'states': states.detach()} | dict(zip(leaves, gradients))


def reference(case: Case, given: dict, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """The results of the formula. Gradients that are sums over tokens are left for each token.

    It is computed on the CPU, where many small operations take less time.
    """
    given = {name: x if x is None or not x.is_floating_point() else x.double().cpu() for name, x in given.items()}
    for name in SUMS:
        given[name] = given[name].expand(case.batch, case.T, *given[name].shape).clone()
    return results(formula, case, given, dtype)


def errors(case: Case, found: dict, expected: dict) -> dict[str, float]:
    """The errors against a reference: of a sum such that it is at most that of its terms.

    The terms may cancel, and then the sum says little about the size of rounding. Errors of gates' gradients of
    neighbours have much in common: if those of n tokens have an error e, their sum's is up to `sqrt(n) |terms| e`.
    """
    assert found.keys() == expected.keys()
    result = {}
    for name, x in found.items():
        x, right = x.double().cpu(), expected[name]
        if name in SUMS and x.shape != right.shape:
            total, size = right.sum((0, 1)), right.norm() * (1 if name == 'D' else case.T**0.5)
            result[name] = ((x - total).norm() / max(total.norm(), size)).item()
        else:
            result[name] = rms_error(x, right)
    return result


CASES = [
    Case(),
    Case(norm='after', states=True, D=2, outputs=24),
    Case(norm=None, states=True, starts=(1, 3, 20)),
    Case(starts=(1, 3, 20), outputs=24, out_bias=False),
    Case(mlp=8, outputs=24, activation='swish'),
    Case(mlp=8, activation=None, bias=False, norm='after'),
    Case(limit=(0.05, 0.2), bias=False, starts=(30,)),
    Case(T=2, width=3),
    Case(T=1, norm=None, states=True),
    Case(H=3, G=1, P=24, N=40, width=1),
]


@pytest.mark.parametrize('case', CASES, ids=str)
def test_against_the_formula(case):
    given = make(case)
    found = results(call, case, given)
    for name, x in found.items():
        if name in NAMES:
            assert x.dtype == given[name].dtype and x.shape == given[name].shape, name
    for name, error in errors(case, found, reference(case, given)).items():
        assert error < TOLERANCE[torch.float32][name in ('dt_bias', 'A')], f'{name}: {error:.1e}'


@pytest.mark.parametrize('case', CASES[1:4], ids=str)
def test_fp64_on_the_cpu(case):
    case = dataclasses.replace(case, dtype=torch.float64)
    given = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in make(case, 'cpu').items()
    }
    for name, error in errors(case, results(call, case, given), reference(case, given)).items():
        assert error < 1e-13, f'{name}: {error:.1e}'


@pytest.mark.parametrize('dtype', [torch.bfloat16, HALF] if HALF != torch.bfloat16 else [HALF, torch.float16])
@pytest.mark.parametrize('case', [CASES[1], CASES[3]], ids=str)
def test_16_bits(case, dtype):
    """The error is at most what the operator may have, plus twice that of the formula with each step's result rounded.

    On the CPU, operations of PyTorch compute bf16, and kernels fp16.
    """
    case = dataclasses.replace(case, dtype=dtype, T=100)
    given = make(case)
    expected = reference(case, given)
    found = errors(case, results(call, case, given), expected)
    allowed = errors(case, reference(case, given, dtype), expected)
    for name, error in found.items():
        assert error < 2 * allowed[name] + TOLERANCE[dtype][0], f'{name}: {error:.1e}, {allowed[name]:.1e}'


def test_signature():
    """The parameters of mamba_ssm 2.3.2."""
    expected = (
        'zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size initial_states=None seq_idx=None dt_limit=(0.0, inf) '
        "return_final_states=False activation='silu' rmsnorm_weight=None rmsnorm_eps=1e-06 outproj_weight=None "
        'outproj_bias=None headdim=None ngroups=1 norm_before_gate=True state_dtype=None'
    )
    parameters = inspect.signature(mamba_split_conv1d_scan_combined).parameters.values()
    found = [p.name if p.default is p.empty else f'{p.name}={p.default!r}' for p in parameters]
    assert ' '.join(found) == expected


def test_what_is_returned():
    given = make(Case(T=3))
    arguments = *(given[name] for name in NAMES[:6]), 256
    options = dict(headdim=16, ngroups=2)
    out = mamba_split_conv1d_scan_combined(*arguments, **options)
    assert isinstance(out, torch.Tensor) and out.shape == (2, 3, 64)
    options |= dict(return_final_states=True, state_dtype=torch.float16)
    again, states = mamba_split_conv1d_scan_combined(*arguments, **options)
    assert torch.equal(again, out) and states.shape == (2, 4, 16, 16) and states.dtype == torch.float16


@pytest.mark.parametrize('sizes', [{'T': 0}, {'batch': 0}], ids=str)
@pytest.mark.parametrize('norm', [None, 'after'])
def test_no_tokens(sizes, norm):
    case = Case(norm=norm, outputs=24, **sizes)
    given = make(case)
    found = results(call, case, given)
    assert found['out'].shape == given['dout'].shape
    assert all(x.count_nonzero() == 0 for name, x in found.items() if name != 'out' and x is not None)


NORMS = [
    # channels, group, tokens
    (48, 48, 7), (60, 20, 5), (33, 11, 9), (1030, 1030, 3), (16, 1, 4), (3000, 1500, 2),
]  # fmt: skip


def norm_inputs(channels: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """y, a tensor with z in it, weight, and the gradient of the result."""
    shapes = (2, tokens, channels), (2, tokens, 2 * channels + 8), (channels,), (2, tokens, channels)
    return tuple(torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)


def norm_results(fn, given: tuple, options: NormOptions) -> list[torch.Tensor]:
    """The result, and the gradients of y, of what z is a slice of, and of weight."""
    y, whole, weight = leaves = [x.detach().requires_grad_() for x in given[:3]]
    z = whole[:, :, 8 : 8 + y.shape[2]]
    with poisoned_memory():
        out = fn(y, z, weight, options)
        return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]


@pytest.mark.parametrize('norm_first', [True, False])
@pytest.mark.parametrize('channels, group, tokens', NORMS)
def test_norm(channels, group, tokens, norm_first):
    given, options = norm_inputs(channels, tokens, torch.float32), NormOptions(1e-5, group, norm_first)
    found = norm_results(gated_rms_norm, given, options)
    expected = norm_results(norm_formula, tuple(x.double() for x in given), options)
    # of one channel to a group the gradient of y is what is left where two equal terms cancel
    in_pytorch = norm_results(norm_formula, given, options)
    for x, other, right in zip(found, in_pytorch, expected, strict=True):
        assert x.dtype == torch.float32 and rms_error(x, right) < max(1e-6, 2 * rms_error(other, right))
    with torch.no_grad():
        z = given[1][:, :, 8 : 8 + channels]
        assert torch.equal(gated_rms_norm(given[0], z, given[2], options), found[0])


@pytest.mark.parametrize('norm_first', [True, False])
def test_norm_in_pytorch_is_the_same(norm_first):
    given, options = norm_inputs(24, 5, torch.float32), NormOptions(1e-5, 8, norm_first)
    for x, right in zip(
        norm_results(_norm.composed, given, options), norm_results(gated_rms_norm, given, options), strict=True
    ):
        assert rms_error(x, right) < 1e-6


@pytest.mark.parametrize('needed', [0, 1, 2])
def test_norm_with_one_gradient(needed):
    y, whole, weight, dout = norm_inputs(24, 5, torch.float32)
    options, leaves = NormOptions(1e-5, 8, False), [y, whole[:, :, :24], weight]
    expected = norm_results(
        gated_rms_norm, (y, torch.cat([y[:, :, :8], leaves[1], y[:, :, :8]], -1), weight, dout), options
    )
    leaves[needed] = leaves[needed].detach().requires_grad_()
    (found,) = torch.autograd.grad(gated_rms_norm(*leaves, options), leaves[needed], dout)
    right = expected[1 + needed]
    assert torch.equal(found, right[:, :, 8:32] if needed == 1 else right)


def test_norm_takes_any_layout():
    """Rows that are not contiguous are copied, others are read in place, also where a gradient is expanded."""
    y, z, dout = torch.randn(3, 2, 5, 24, device=DEVICE)
    weight, options = torch.randn(24, device=DEVICE), NormOptions(1e-5, 12, True)
    expected = norm_results(gated_rms_norm, (y, F.pad(z, (8, 24)), weight, torch.ones_like(dout)), options)
    for layout in (lambda x: x.mT.contiguous().mT, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        leaf = layout(y).detach().requires_grad_()
        out = gated_rms_norm(leaf, layout(z), weight, options)
        out.sum().backward()
        assert torch.equal(out, expected[0]) and torch.equal(leaf.grad, expected[1])


@needs_gpu
@pytest.mark.parametrize('norm_first', [True, False])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    'channels, group, tokens',
    [(5120, 5120, 300), (8192, 1024, 300), (4096, 2048, 70), (1536, 1536, 1000), (3000, 1500, 30), (100, 100, 2000),
     (16384, 16384, 40), (20000, 20000, 7)],
)  # fmt: skip
def test_norm_on_the_gpu(channels, group, tokens, dtype, norm_first):
    """Several times, since the first calls are recorded, and later ones replayed."""
    given, options = norm_inputs(channels, tokens, dtype), NormOptions(1e-5, group, norm_first)
    expected = norm_results(norm_formula, tuple(x.double() for x in given), options)
    first = norm_results(gated_rms_norm, given, options)
    for x, right in zip(first, expected, strict=True):
        assert rms_error(x, right) < max(1e-6, torch.finfo(dtype).eps / 2)
    for _ in range(4):
        assert all(map(torch.equal, first, norm_results(gated_rms_norm, given, options)))


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, **options):
    """Stands in for the package, and checks what that asks for."""
    assert x.stride(1) == 1 and all(stride % 8 == 0 for stride in (x.stride(0), x.stride(2)))
    assert x.data_ptr() % 16 == 0 and weight.is_contiguous() and options.keys() == {'activation'}
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32 and seq_idx.is_contiguous()
    given = _split.Tensors(x, weight, bias, *[None] * 4, seq_idx, *[None] * 3)
    y = _split.convolve_sequences(x.mT, given)
    return (y if options['activation'] is None else F.silu(y)).to(x.dtype).mT


@pytest.fixture
def package(monkeypatch):
    """The package is installed, and on the CPU it is taken for one that computes there."""
    calls = []

    def fn(*args, **kwargs):
        calls.append(args)
        return causal_conv1d_fn(*args, **kwargs)

    monkeypatch.setitem(sys.modules, 'causal_conv1d', SimpleNamespace(causal_conv1d_fn=fn))
    _split.causal_conv1d.cache_clear()
    if not GPU:
        monkeypatch.setattr(_split, 'package_for', lambda *_: _split.causal_conv1d())
    yield calls
    _split.causal_conv1d.cache_clear()


@pytest.mark.parametrize(
    'case', [Case(), Case(mlp=1), Case(starts=(1, 3, 20), activation=None), Case(bias=False, H=7, G=1)], ids=str
)
def test_convolution_of_the_package(package, case):
    given = make(case)
    if given['seq_idx'] is not None:
        given['seq_idx'] = given['seq_idx'].long()
    found = results(call, case, given)
    assert len(package) == 1
    for name, error in errors(case, found, reference(case, given)).items():
        assert error < TOLERANCE[torch.float32][name in ('dt_bias', 'A')], f'{name}: {error:.1e}'


def test_numbers_of_sequences_are_a_slice():
    case = Case(starts=(1, 20))
    given = make(case)
    numbers = given['seq_idx']
    slice_of = torch.stack([numbers, torch.full_like(numbers, 5)], -1)[..., 0]
    assert not slice_of.is_contiguous()
    expected, found = (call(case, given | {'seq_idx': x}) for x in (numbers, slice_of))
    assert all(map(torch.equal, found, expected))


def test_package_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'causal_conv1d', None)
    _split.causal_conv1d.cache_clear()
    assert _split.causal_conv1d() is None
    _split.causal_conv1d.cache_clear()


def test_autocast():
    """The last projection is computed in autocast's dtype, and nothing else."""
    case = Case(outputs=24, starts=(10,))
    given = make(case)
    for numbers in (given, given | {'seq_idx': None}):
        tensors = _split.Tensors(*(numbers[name] for name in NAMES))
        xBC = given['zxbcdt'][:, :, 64:192]
        expected = _split.convolve(xBC, tensors, 'silu')
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(_split.convolve(xBC, tensors, 'silu'), expected)
            assert call(case, numbers)[0].dtype == torch.bfloat16


def test_compiles():
    """Compilers see operations of PyTorch."""
    case = Case(T=20, outputs=24, mlp=8)
    given = make(case)
    compiled = torch.compile(call, backend='aot_eager', fullgraph=True)
    for name, error in errors(case, results(compiled, case, given), reference(case, given)).items():
        assert error < TOLERANCE[torch.float32][name in ('dt_bias', 'A')], f'{name}: {error:.1e}'


def test_meta_tensors():
    out, states = call(Case(outputs=24), make(Case(outputs=24), 'meta'))
    assert out.is_meta and out.shape == (2, 40, 24) and states.shape == (2, 4, 16, 16)


WRONG = [
    ({'zxbcdt': torch.zeros(2, 40)}, ValueError, 'zxbcdt must have 3 dimensions'),
    ({'zxbcdt': torch.zeros(2, 40, 195)}, ValueError, 'zxbcdt must have .* channels, got 195'),
    ({'zxbcdt': torch.zeros(2, 40, 197)}, ValueError, 'zxbcdt must have .* 196 channels, got 197'),
    ({'zxbcdt': torch.zeros(2, 40, 196, dtype=torch.int32)}, TypeError, 'zxbcdt must be a floating-point'),
    ({'zxbcdt': None}, TypeError, 'zxbcdt must be a torch.Tensor'),
    ({'conv1d_weight': torch.zeros(128, 1, 4)}, ValueError, 'conv1d_weight must have shape'),
    ({'conv1d_weight': torch.zeros(126, 4)}, ValueError, 'conv1d_weight must have .* got 126'),
    ({'conv1d_weight': torch.zeros(64, 4)}, ValueError, 'conv1d_weight must have .* got 64'),
    ({'conv1d_bias': torch.zeros(4)}, ValueError, 'conv1d_bias must have shape'),
    ({'dt_bias': None}, TypeError, 'dt_bias must be a torch.Tensor'),
    ({'dt_bias': torch.zeros(5)}, ValueError, 'dt_bias must have shape'),
    ({'A': torch.zeros(4, 1)}, ValueError, 'A must have shape'),
    ({'D': None}, TypeError, 'D must be a torch.Tensor'),
    ({'D': torch.zeros(4, 16, 1)}, ValueError, 'D must have shape'),
    ({'D': torch.zeros(4, 8)}, ValueError, 'headdim must be'),
    ({'D': torch.zeros(4, device='meta')}, ValueError, "D must be on zxbcdt's device"),
    ({'initial_states': torch.zeros(2, 4, 16, 8)}, ValueError, 'initial_states must have shape'),
    ({'seq_idx': torch.zeros(2, 40)}, TypeError, 'seq_idx must be int32 or int64'),
    ({'seq_idx': torch.zeros(2, 40, dtype=torch.int32, device='meta')}, ValueError, "seq_idx must be on zxbcdt's"),
    ({'seq_idx': torch.zeros(2, 41, dtype=torch.int32)}, ValueError, 'seq_idx must have shape'),
    ({'rmsnorm_weight': torch.zeros(32)}, ValueError, 'rmsnorm_weight must have shape'),
    ({'outproj_weight': torch.zeros(24, 32)}, ValueError, 'outproj_weight must have shape'),
    ({'outproj_weight': torch.zeros(64)}, ValueError, 'outproj_weight must have shape'),
    ({'outproj_weight': torch.zeros(24, 64).half()}, TypeError, "outproj_weight must have zxbcdt's dtype"),
    ({'outproj_bias': torch.zeros(24)}, ValueError, 'outproj_bias is given without outproj_weight'),
    ({'headdim': None}, ValueError, 'headdim must be given'),
    ({'headdim': 16.0}, TypeError, 'headdim must be an int'),
    ({'headdim': 513}, ValueError, 'headdim must be 1 to 512'),
    ({'ngroups': 3}, ValueError, 'ngroups must be a divisor'),
    ({'ngroups': 0}, ValueError, 'ngroups must be positive'),
    ({'chunk_size': 0}, ValueError, 'chunk_size must be positive'),
    ({'chunk_size': None}, TypeError, 'chunk_size must be an int'),
    ({'dt_limit': (1.0, 0.5)}, ValueError, 'dt_limit must be'),
    ({'dt_limit': 1.0}, TypeError, 'dt_limit must be'),
    ({'activation': 'gelu'}, ValueError, 'activation must be'),
    ({'rmsnorm_weight': torch.ones(64), 'rmsnorm_eps': -1.0}, ValueError, 'rmsnorm_eps must be finite'),
    ({'rmsnorm_weight': torch.ones(64), 'rmsnorm_eps': '1'}, TypeError, 'rmsnorm_eps must be a number'),
    ({'rmsnorm_weight': torch.ones(64), 'rmsnorm_eps': None}, TypeError, 'rmsnorm_eps must be a number'),
    ({'norm_before_gate': 1}, TypeError, 'norm_before_gate must be a bool'),
    ({'return_final_states': None}, TypeError, 'return_final_states must be a bool'),
    ({'state_dtype': torch.int32}, TypeError, 'state_dtype must be a floating dtype'),
]


@pytest.mark.parametrize('change, error, message', WRONG, ids=lambda x: x if isinstance(x, str) else None)
def test_errors(change, error, message):
    given = make(Case(norm=None))
    arguments = {name: given[name] for name in NAMES} | dict(chunk_size=256, headdim=16, ngroups=2)
    change = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) and not x.is_meta else x for name, x in change.items()}
    with pytest.raises(error, match=f'^{message}'):
        mamba_split_conv1d_scan_combined(**arguments | change)


def test_eps_is_not_used_without_a_norm():
    """Falcon-H1 passes None."""
    given = make(Case(norm=None))
    arguments = {name: given[name] for name in NAMES} | dict(chunk_size=256, headdim=16, ngroups=2)
    found = [mamba_split_conv1d_scan_combined(**arguments, rmsnorm_eps=eps) for eps in (None, 1e-6)]
    assert torch.equal(*found)
