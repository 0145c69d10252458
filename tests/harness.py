"""Shared by the tests: the inputs of a case, a run of a mode with its gradients, and errors against naive in fp64."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

from fla_simple_gla import (
    chunk_simple_gla,
    fused_chunk_simple_gla,
    fused_recurrent_simple_gla,
    naive_chunk_simple_gla,
    naive_recurrent_simple_gla,
    parallel_simple_gla,
)
from fla_simple_gla._cache import Cache

GPU = torch.cuda.is_available()
DEVICE = 'cuda' if GPU else 'cpu'
needs_gpu = pytest.mark.skipif(not GPU, reason='needs a GPU')
# The interpreter multiplies bfloat16 wrongly, and it takes long for large heads.
HALF = torch.bfloat16 if GPU else torch.float16
D = 64 if GPU else 16


@contextlib.contextmanager
def segments_of(tokens: int, plans: Cache):
    """The chunk mode cuts sequences of any length into segments of this many tokens. `plans` keeps its plans."""
    choice = mock.patch('fla_simple_gla.chunk.segment_tokens', lambda rows, T, *_: tokens if rows and T else None)
    with choice, mock.patch('fla_simple_gla._plans.plans', plans):
        yield


PLANS = Cache(1000)


def launch_by_triton(monkeypatch) -> None:
    """Passes are not replayed, and triton launches their kernels. The calls then see what else a test patches."""
    monkeypatch.setattr('fla_simple_gla._passes.why_not_direct', lambda: 'it is switched off by a test')


def chunk_in_segments(*args, **kwargs):
    """The chunk mode with segments of 128 tokens, into which it cuts long sequences only."""
    with segments_of(128, PLANS):
        return chunk_simple_gla(*args, **kwargs)


MODES = {
    'chunk': chunk_simple_gla,
    'segments': chunk_in_segments,
    'fused_chunk': fused_chunk_simple_gla,
    'fused_recurrent': fused_recurrent_simple_gla,
    'parallel': parallel_simple_gla,
}
# The modes that take and return states.
STATEFUL = [mode for mode in MODES if mode != 'parallel']
# The modes in which the bits of a sequence do not depend on the rest of the batch.
INVARIANT = [mode for mode in MODES if mode != 'chunk']
# The modes that multiply in the dtype of the inputs.
CHUNKED = [mode for mode in MODES if mode != 'fused_recurrent']
# Tokens that make several chunks, blocks and segments. The interpreter is slow where a mode goes token by token.
LENGTH = dict.fromkeys(MODES, 600 if GPU else 150)
LENGTH |= {'segments': 600 if GPU else 280, 'fused_recurrent': 100 if GPU else 20}

# The tolerances of outputs and states, and of gate gradients. The recurrent mode rounds only its output.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (6e-4, 1e-3), torch.bfloat16: (4e-3, 6e-3)}


def shown(case) -> str:
    """The fields of a case, a dataclass, that are not at their defaults."""
    fields = [
        f'{f.name}={getattr(case, f.name)}' for f in dataclasses.fields(case) if getattr(case, f.name) != f.default
    ]
    return ','.join(fields).replace('torch.', '').replace(' ', '')


@dataclasses.dataclass(frozen=True)
class Case:
    T: int
    B: int = 1
    H: int = 2
    HK: int | None = None  # heads of q and k
    K: int = 16
    V: int = 16
    dtype: torch.dtype = torch.float32
    gate: str | None = 'g'  # 'g', 'gamma' or None
    memory: float = 30.0  # tokens after which a gate has decayed by e
    gate_dtype: torch.dtype = torch.float32
    resets: tuple[tuple[int, float], ...] = ()  # tokens with another gate
    cu_seqlens: tuple[int, ...] | None = None
    cu_dtype: torch.dtype = torch.int64
    initial_state: bool = True
    state_dtype: torch.dtype = torch.float32
    output_final_state: bool = True
    state_v_first: bool = False
    reverse: bool = False
    scale: float | None = None
    # 'contiguous'; 'qkv': slices of one projection; 'heads_first'; 'odd': rows that are not aligned to 16 bytes;
    # 'wide': rows that are parts of wider, aligned rows
    layout: str = 'contiguous'
    seed: int = 0

    def __str__(self):
        return shown(self)

    def of(self, mode: str) -> 'Case':
        """The case, without states where the mode has none."""
        if mode in STATEFUL:
            return self
        return dataclasses.replace(
            self, initial_state=False, output_final_state=False, state_v_first=False, state_dtype=torch.float32
        )


def make_inputs(case: Case, device=DEVICE) -> dict[str, torch.Tensor | None]:
    """q, k, v, g, g_gamma, initial_state, do and dht of a case. A tensor that the case does not have is None."""
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    B, T, H, HK, K, V = case.B, case.T, case.H, case.HK or case.H, case.K, case.V
    N = B if case.cu_seqlens is None else len(case.cu_seqlens) - 1
    x = {'q': random(B, T, HK, K), 'k': random(B, T, HK, K), 'v': random(B, T, H, V), 'do': random(B, T, H, V)}
    x = {name: place(t.to(device, case.dtype), case.layout) for name, t in x.items()}
    if case.layout == 'qkv':
        qkv = torch.cat([x[name].flatten(2) for name in 'qkv'], -1)
        for name, part in zip('qkv', qkv.split([HK * K, HK * K, H * V], -1)):
            x[name] = part.unflatten(2, (-1, x[name].shape[-1]))
    uniform = torch.rand(B, T, H, generator=generator) if case.gate == 'g' else torch.rand(H, generator=generator)
    g = -2 * uniform / case.memory
    for t, value in case.resets:
        g[:, t] = value
    g = g.to(device, case.gate_dtype)
    x['g'] = g if case.gate == 'g' else None
    x['g_gamma'] = g if case.gate == 'gamma' else None
    x['initial_state'] = x['dht'] = None
    shape = (N, H, V, K) if case.state_v_first else (N, H, K, V)
    if case.initial_state:
        x['initial_state'] = random(*shape).to(device, case.state_dtype)
    if case.output_final_state:
        x['dht'] = random(*shape).to(device)
    return x


def tensors(inputs: dict, *names: str) -> list[torch.Tensor]:
    """The inputs of these names, by default q, k, v and g."""
    return [inputs[name] for name in names or ('q', 'k', 'v', 'g')]


def place(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x with other strides. Its last dimension stays contiguous."""
    if layout == 'heads_first':
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == 'odd':
        return torch.cat([x[..., :1], x], -1)[..., 1:]
    if layout == 'wide':
        D = x.shape[-1]
        return torch.nn.functional.pad(x, (0, 16 - D % 8), value=float('nan'))[..., :D]
    return x


@contextlib.contextmanager
def poisoned_memory():
    """Memory from `torch.empty` holds NaN, which shows what a kernel does not write, or reads before it writes it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def run(fn, case: Case, inputs: dict | None = None, allow_unused: bool = False) -> dict[str, torch.Tensor]:
    """o, ht and the gradients of all inputs that have one."""
    inputs = inputs or make_inputs(case)
    leaves = {
        name: inputs[name].detach().requires_grad_()
        for name in ('q', 'k', 'v', 'g', 'g_gamma', 'initial_state')
        if inputs[name] is not None
    }
    options = {'scale': case.scale}
    if case.output_final_state:
        options['output_final_state'] = True
    if case.cu_seqlens is not None:
        options['cu_seqlens'] = torch.tensor(case.cu_seqlens, dtype=case.cu_dtype, device=inputs['q'].device)
    if case.state_v_first:
        options['state_v_first'] = True
    if case.reverse:
        options['reverse'] = True
    with poisoned_memory():
        o, ht = fn(**leaves, **options)
        assert (ht is not None) == case.output_final_state
        outputs, grads = [o], [inputs['do'].to(o.dtype)]
        if ht is not None:
            outputs.append(ht)
            grads.append(inputs['dht'].to(ht.dtype))
        gradients = torch.autograd.grad(outputs, list(leaves.values()), grads, materialize_grads=allow_unused)
    results = {'o': o, 'ht': ht} if ht is not None else {'o': o}
    return {name: t.detach() for name, t in (results | {f'd{n}': g for n, g in zip(leaves, gradients)}).items()}


def reference(case: Case, inputs: dict | None = None) -> dict[str, torch.Tensor]:
    """The results of naive in fp64. It goes chunk by chunk, and token by token back in time.

    With dg_gamma comes dg, of the same gate for each token: dg_gamma is its sum.
    """
    of_tokens = []

    def naive(
        q, k, v, g=None, g_gamma=None, initial_state=None, output_final_state=False, state_v_first=False, reverse=False,
        **options,
    ):  # fmt: skip
        if g_gamma is not None:
            g = g_gamma.expand(v.shape[:3])
            g.register_hook(of_tokens.append)
        form, options = (
            (naive_recurrent_simple_gla, options | {'reverse': True}) if reverse else (naive_chunk_simple_gla, options)
        )
        h0 = initial_state.mT if state_v_first and initial_state is not None else initial_state
        o, ht = form(q, k, v, g, initial_state=h0, output_final_state=output_final_state, **options)
        return o, ht.mT if state_v_first and ht is not None else ht

    inputs = inputs or make_inputs(case)
    inputs = {name: None if t is None else t.double() for name, t in inputs.items()}
    # Autograd does not see that inputs of length zero are used.
    results = run(naive, case, inputs, allow_unused=True)
    return results | {'dg': of_tokens[0]} if of_tokens else results


def rms_error(x: torch.Tensor, expected: torch.Tensor) -> float:
    """`|x - expected| / |expected|`. It is NaN if x has a NaN."""
    if expected.numel() == 0:
        return 0.0
    return ((x.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def errors(results: dict, expected: dict) -> dict[str, float]:
    """The errors of the results: of dg_gamma such that it is at most that of dg, whose sum it is.

    The terms of the sum may cancel, and then |dg_gamma| says little. If dg is of n tokens and has an error e, the sum's
    is at most `sqrt(n) |dg| e`. `test_modes.py` checks dg itself, too.
    """
    assert results.keys() == expected.keys() - ({'dg'} if 'dg_gamma' in expected else set())
    for name, x in results.items():
        assert x.shape == expected[name].shape, name
    found = {name: rms_error(x, expected[name]) for name, x in results.items()}
    if 'dg_gamma' in found:
        dg, sums = expected['dg'], expected['dg_gamma']
        tokens = dg.shape[0] * dg.shape[1]
        found['dg_gamma'] *= (sums.norm() / (tokens**0.5 * dg.norm())).item()
    return found


def check(case: Case, results: dict, expected: dict) -> None:
    found = errors(results, expected)
    for name, error in found.items():
        tolerance = TOLERANCE[case.dtype][name in ('dg', 'dg_gamma')]
        # A gradient is rounded to the dtype of its input.
        tolerance = max(tolerance, torch.finfo(results[name].dtype).eps / 2)
        assert error <= tolerance, f'{name} of {found}'


def mark_slow(values, *slow) -> list:
    """Values of a parameter. Those in `slow` are marked: they take long in the interpreter on two cores."""
    return [pytest.param(value, marks=pytest.mark.slow) if value in slow else value for value in values]


def slow_rows(rows) -> list:
    """Values of several parameters, all of which are marked as slow."""
    return [pytest.param(*row, marks=pytest.mark.slow) for row in rows]


def assert_same_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def run_python(code: str, **environment: str | None) -> subprocess.CompletedProcess:
    """Run code in a process of its own. Its environment is this one with these variables; None removes a variable."""
    merged = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)} | environment
    merged = {name: value for name, value in merged.items() if value is not None}
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, env=merged)
