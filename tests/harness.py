"""One way to make inputs, to run a mode with its gradients, and to judge it: root-mean-square error against naive in fp64."""

import contextlib
import dataclasses
from unittest import mock

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


@contextlib.contextmanager
def segments_of(tokens: int, plans: Cache):
    """The chunk mode cuts sequences into segments of so many tokens, however few they are; those plans are for calls here alone."""
    choice = mock.patch('fla_simple_gla.chunk.segment_tokens', lambda rows, T, *_: tokens if rows and T else None)
    with choice, mock.patch('fla_simple_gla._plans.plans', plans):
        yield


PLANS = Cache(1000)


def launch_by_triton(monkeypatch) -> None:
    """Passes run each time, and their launches are triton's: what else is patched is seen."""
    monkeypatch.setattr('fla_simple_gla._passes.why_not_direct', lambda: 'it is switched off by a test')


def chunk_in_segments(*args, **kwargs):
    """The chunk mode with segments of 128 tokens: what it does to long sequences."""
    with segments_of(128, PLANS):
        return chunk_simple_gla(*args, **kwargs)


MODES = {
    'chunk': chunk_simple_gla,
    'segments': chunk_in_segments,
    'fused_chunk': fused_chunk_simple_gla,
    'fused_recurrent': fused_recurrent_simple_gla,
    'parallel': parallel_simple_gla,
}
# those that states go into and come out of
STATEFUL = [mode for mode in MODES if mode != 'parallel']
# those that give a sequence the same bits whatever else is in the batch
INVARIANT = [mode for mode in MODES if mode != 'chunk']
# those that multiply in the inputs' dtype
CHUNKED = [mode for mode in MODES if mode != 'fused_recurrent']

# Of outputs and states; of gate gradients. The recurrent mode rounds nothing but its output.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (6e-4, 1e-3), torch.bfloat16: (4e-3, 6e-3)}


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
    # or 'qkv': slices of one projection; 'heads_first'; 'odd': rows not aligned to 16 bytes; 'wide': rows of aligned, wider ones
    layout: str = 'contiguous'
    seed: int = 0

    def __str__(self):
        shown = [f'{f.name}={getattr(self, f.name)}' for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return ','.join(shown).replace('torch.', '').replace(' ', '')

    def of(self, mode: str) -> 'Case':
        """The case, without states where the mode has none."""
        if mode in STATEFUL:
            return self
        return dataclasses.replace(self, initial_state=False, output_final_state=False, state_v_first=False, state_dtype=torch.float32)


def make_inputs(case: Case, device=DEVICE) -> dict[str, torch.Tensor | None]:
    """q, k, v, g, g_gamma, initial_state, do, dht of a case; the tensors that it does not have are None."""
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


def place(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x with other strides; its last dimension stays contiguous."""
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
    """Memory from `torch.empty` holds NaN: what a kernel leaves unwritten, or reads before it writes, shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def run(fn, case: Case, inputs: dict | None = None, allow_unused: bool = False) -> dict[str, torch.Tensor]:
    """o, ht and the gradients of everything that has one."""
    inputs = inputs or make_inputs(case)
    leaves = {
        name: inputs[name].detach().requires_grad_()
        for name in ('q', 'k', 'v', 'g', 'g_gamma', 'initial_state') if inputs[name] is not None
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
    """The same from naive in fp64: chunk by chunk, or token by token where the direction asks for it."""

    def naive(q, k, v, g=None, initial_state=None, output_final_state=False, state_v_first=False, reverse=False, **options):
        form, options = (naive_recurrent_simple_gla, options | {'reverse': True}) if reverse else (naive_chunk_simple_gla, options)
        h0 = initial_state.mT if state_v_first and initial_state is not None else initial_state
        o, ht = form(q, k, v, g, initial_state=h0, output_final_state=output_final_state, **options)
        return o, ht.mT if state_v_first and ht is not None else ht

    inputs = inputs or make_inputs(case)
    inputs = {name: None if t is None else t.double() for name, t in inputs.items()}
    # autograd does not see inputs of length zero used
    return run(naive, case, inputs, allow_unused=True)


def rms_error(x: torch.Tensor, expected: torch.Tensor) -> float:
    """`|x - expected| / |expected|`; NaN where x has one."""
    if expected.numel() == 0:
        return 0.0
    return ((x.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def errors(results: dict, expected: dict) -> dict[str, float]:
    assert results.keys() == expected.keys()
    for name, x in results.items():
        assert x.shape == expected[name].shape, name
    return {name: rms_error(x, expected[name]) for name, x in results.items()}


def check(case: Case, results: dict, expected: dict) -> None:
    found = errors(results, expected)
    for name, error in found.items():
        tolerance = TOLERANCE[case.dtype][name in ('dg', 'dg_gamma')]
        # a gradient has its input's dtype, and is no better than its rounding
        tolerance = max(tolerance, torch.finfo(results[name].dtype).eps / 2)
        assert error <= tolerance, f'{name} of {found}'
