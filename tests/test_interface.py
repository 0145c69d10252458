"""Arguments: a bad one is named before anything is computed. Signatures, and the package without triton."""

import inspect
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from harness import DEVICE, MODES, STATEFUL, D
from torch._subclasses.fake_tensor import FakeTensorMode

import fla_simple_gla
from fla_simple_gla._plans import plan_for
from fla_simple_gla._validation import Call

EMPTY = inspect.Parameter.empty


def zeros(*shape, dtype=torch.float32, device=DEVICE):
    return torch.zeros(*shape, dtype=dtype, device=device)


def arguments(**changes):
    B, T, H, K, V = 2, 5, 4, 8, 6
    return {'q': zeros(B, T, 2, K), 'k': zeros(B, T, 2, K), 'v': zeros(B, T, H, V), 'g': zeros(B, T, H)} | changes


STATE = zeros(2, 4, 8, 6)
CU = torch.tensor([0, 2, 5], device=DEVICE)
PACKED = {'q': zeros(1, 5, 2, 8), 'k': zeros(1, 5, 2, 8), 'v': zeros(1, 5, 4, 6), 'g': zeros(1, 5, 4), 'cu_seqlens': CU}

# Changed arguments, the error, and its message.
BAD = [
    ({'q': [[1.0]]}, TypeError, 'q must be a torch.Tensor, got list'),
    ({'v': zeros(2, 5, 4, 6, dtype=torch.int64)}, TypeError, 'v must be a floating-point tensor, got torch.int64'),
    ({'q': zeros(5, 2, 8)}, ValueError, r'q must have 4 dimensions .*\[5, 2, 8\]'),
    ({'k': zeros(2, 5, 2, 8, dtype=torch.float16)}, TypeError,
     "k must have q's dtype torch.float32, got torch.float16"),
    ({'k': zeros(2, 5, 2, 9)}, ValueError, r"k must have q's shape \[2, 5, 2, 8\], got \[2, 5, 2, 9\]"),
    ({'v': zeros(2, 6, 4, 6)}, ValueError, r'v must have .* \(2, 5\), got shape \[2, 6, 4, 6\]'),
    ({'v': zeros(2, 5, 3, 6)}, ValueError, 'multiple of q.s 2 heads, at least one, got 3'),
    ({'v': zeros(2, 5, 0, 6)}, ValueError, 'heads'),
    ({'v': zeros(2, 5, 4, 513)}, ValueError, 'head dimension of v must be 1 to 512, got 513'),
    ({'q': zeros(2, 5, 2, 0), 'k': zeros(2, 5, 2, 0)}, ValueError, 'head dimension of q must be 1 to 512, got 0'),
    ({'g': zeros(2, 5, 3)}, ValueError, r'g must have shape \[B, T, H\] = \[2, 5, 4\], got \[2, 5, 3\]'),
    ({'g': zeros(2, 5, 4, dtype=torch.int32)}, TypeError, 'g must be a floating-point tensor'),
    ({'g_gamma': zeros(4)}, ValueError, 'g and g_gamma are both given'),
    ({'g': None, 'g_gamma': zeros(2)}, ValueError, r'g_gamma must have shape \[H\] = \[4\], got \[2\]'),
    ({'scale': '1'}, TypeError, 'scale must be a number or None, got str'),
    ({'scale': complex(1)}, TypeError, 'scale must be a number or None, got complex'),
    ({'scale': [1.0]}, TypeError, 'scale must be a number or None, got list'),
    ({'scale': torch.ones(1)}, TypeError, 'scale must be a number or None, got Tensor'),
    ({'cu_seqlens': CU}, ValueError, 'q must have a batch of 1 with cu_seqlens, got 2'),
    (PACKED | {'cu_seqlens': [0, 5]}, TypeError, 'cu_seqlens must be a torch.Tensor, got list'),
    (PACKED | {'cu_seqlens': CU.float()}, TypeError, 'cu_seqlens must be int32 or int64, got torch.float32'),
    (PACKED | {'cu_seqlens': CU[:1]}, ValueError, r'cu_seqlens must have shape \[N \+ 1\] with N >= 1, got \[1\]'),
    (PACKED | {'cu_seqlens': CU[None]}, ValueError, 'cu_seqlens must have shape'),
    (PACKED | {'cu_seqlens': CU[::2]}, ValueError, 'cu_seqlens must be contiguous'),
    (PACKED | {'cu_seqlens': CU.to_sparse()}, TypeError,
     r'cu_seqlens must be a dense .* got one of layout torch.sparse_coo'),
    ({'g': None, 'g_gamma': 0.25}, TypeError, 'g_gamma must be a torch.Tensor, got float'),
    ({'g_gamma': 0.25}, TypeError, 'g_gamma must be a torch.Tensor, got float'),
    ({'scale': float('nan')}, ValueError, 'scale must be finite, got nan'),
    ({'scale': -float('inf')}, ValueError, 'scale must be finite, got -inf'),
    ({'scale': True}, TypeError, 'scale must be a number or None, got bool'),
    *(
        ({name: zeros(*arguments()[name].shape).to_sparse()}, TypeError, rf'{name} must be a dense \(strided\) tensor')
        for name in 'qkvg'
    ),
    *(
        ({name: torch.nested.nested_tensor([zeros(3, 2, 8), zeros(5, 2, 8)], layout=layout)}, TypeError,
         f'{name} is a nested.*cu_seqlens')
        for name in 'qkvg' for layout in (torch.strided, torch.jagged)
    ),
    ({'unknown': 1}, TypeError, 'unknown'),
]  # fmt: skip
BAD_STATES = [
    ({'initial_state': STATE.mT}, ValueError, r'initial_state .* \[N, H, K, V\] = \[2, 4, 8, 6\], got \[2, 4, 6, 8\]'),
    (
        {'initial_state': STATE, 'state_v_first': True},
        ValueError,
        r'initial_state must have shape \[N, H, V, K\] = \[2, 4, 6, 8\]',
    ),
    ({'initial_state': zeros(3, 4, 8, 6)}, ValueError, 'initial_state'),
    (PACKED | {'initial_state': STATE[:1]}, ValueError, r'= \[2, 4, 8, 6\], got \[1, 4, 8, 6\]'),
    ({'initial_state': STATE.to_sparse()}, TypeError, 'initial_state must be a dense'),
    ({'initial_state': 1.0}, TypeError, 'initial_state must be a torch.Tensor, got float'),
    ({'output_final_state': 'no'}, TypeError, 'output_final_state must be a bool, got str'),
    ({'output_final_state': 1}, TypeError, 'output_final_state must be a bool, got int'),
    ({'state_v_first': 'x'}, TypeError, 'state_v_first must be a bool, got str'),
    ({'state_v_first': CU}, TypeError, 'state_v_first must be a bool, got Tensor'),
]
BAD_COPIES = [
    (PACKED | {'cu_seqlens_cpu': [0, 2, 5]}, TypeError, 'cu_seqlens_cpu must be a torch.Tensor, got list'),
    (
        PACKED | {'cu_seqlens_cpu': CU.cpu()[:2]},
        ValueError,
        r'must be a copy of cu_seqlens \[3\] on the CPU, got shape \[2\]',
    ),
    ({'cu_seqlens_cpu': CU.cpu()}, ValueError, 'cu_seqlens_cpu is given without cu_seqlens'),
]
if DEVICE == 'cuda':
    BAD += [
        ({'k': zeros(2, 5, 2, 8, device='cpu')}, ValueError, "k must be on q's device cuda:0, got cpu"),
        ({'g': zeros(2, 5, 4, device='cpu')}, ValueError, "g must be on q's device"),
        ({name: zeros(2, 5, 2, 8, dtype=torch.float64) for name in 'qkv'}, TypeError,
         'q must be bfloat16, float16 or float32'),
        (PACKED | {'cu_seqlens': CU.cpu()}, ValueError, "cu_seqlens must be on q's device"),
    ]  # fmt: skip


BAD_OF_MODE = {
    'chunk': [
        *BAD, *BAD_STATES, *BAD_COPIES,
        ({'chunk_size': 48}, ValueError, 'chunk_size must be a power of two, got 48'),
        ({'chunk_size': 0}, ValueError, 'chunk_size must be a power of two, got 0'),
        ({'chunk_size': 64.0}, TypeError, 'chunk_size must be an int or None, got float'),
        ({'chunk_size': True}, TypeError, 'chunk_size must be an int or None, got bool'),
        ({'reverse': True}, TypeError, 'reverse'),
    ],
    'fused_chunk': [*BAD, *BAD_STATES, ({'reverse': True}, TypeError, 'reverse')],
    'fused_recurrent': [*BAD, *BAD_STATES, ({'reverse': 1}, TypeError, 'reverse must be a bool, got int')],
    'parallel': [
        *BAD, *BAD_COPIES,
        ({'output_attentions': 'x'}, TypeError, 'output_attentions must be a bool, got str'),
        (PACKED | {'output_attentions': True}, ValueError, 'output_attentions is not available with cu_seqlens'),
        ({'initial_state': STATE}, TypeError, 'initial_state'),
        ({'output_final_state': True}, TypeError, 'output_final_state'),
        ({'state_v_first': True}, TypeError, 'state_v_first'),
        ({'reverse': True}, TypeError, 'reverse'),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    'mode, changes, error, message',
    [pytest.param(mode, *row, id=f'{mode}-{row[2]}') for mode, rows in BAD_OF_MODE.items() for row in rows],
)
def test_bad_input(mode, changes, error, message):
    """It is refused the second time too, and after calls with good input."""
    good = arguments(g_gamma=None, scale=None, initial_state=None, cu_seqlens=None)
    for change in ({}, {'scale': 1.0}, {'initial_state': STATE}):
        assert plan_for(Call(**good | change)) is plan_for(Call(**good | change))
    for _ in range(2):
        with pytest.raises(error, match=message):
            MODES[mode](**arguments(**changes))


def test_arguments_in_the_place_of_others():
    """An error names the parameter that got the argument."""
    q, k, v, g = arguments().values()
    for mode in ('chunk', 'fused_chunk', 'fused_recurrent'):
        with pytest.raises(TypeError, match='g_gamma must be a torch.Tensor, got float'):
            MODES[mode](q, k, v, g, 0.25)
    with pytest.raises(TypeError, match='state_v_first must be a bool, got Tensor'):
        MODES['chunk'](*(PACKED[name] for name in 'qkvg'), None, None, None, False, CU)


@pytest.mark.parametrize('mode', STATEFUL)
def test_none_is_false(mode):
    """Some models pass None for a flag."""
    flags = dict.fromkeys(('output_final_state', 'state_v_first'))
    o, ht = MODES[mode](**arguments(), **flags)
    assert ht is None and torch.equal(o, MODES[mode](**arguments())[0])


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='needs MKL-DNN')
@pytest.mark.parametrize('name', ['q', 'k', 'v', 'g'])
def test_tensors_of_mkldnn(name):
    given = {key: x.cpu() for key, x in arguments().items()}
    with pytest.raises((TypeError, ValueError), match=f'{name} must be .*(dense|device)'):
        MODES['chunk'](**given | {name: given[name].to_mkldnn()})


def test_what_plans_depend_on():
    good = arguments(g_gamma=None, scale=None, initial_state=None, cu_seqlens=None)
    memory = zeros(2 * 5 * 2 * 8 + 1)
    odd = memory[1:].view(2, 5, 2, 8)
    changes = [
        {}, {'q': odd}, {'q': zeros(2, 2, 5, 8).transpose(1, 2)}, {'g': None}, {'scale': 2.0},
        {'g': good['g'].double()}, {'initial_state': zeros(2, 4, 8, 6)}, {'g': None, 'g_gamma': zeros(4)},
    ]  # fmt: skip
    plans = [plan_for(Call(**good | change)) for change in changes]
    assert len({*plans}) == len(changes)
    assert plans == [plan_for(Call(**good | change)) for change in changes]
    choose = mock.Mock(return_value='choice')
    assert [plans[0].once(choose, 1) for _ in range(2)] == ['choice'] * 2
    choose.assert_called_once_with(1)


@pytest.mark.filterwarnings('error')
def test_fake_tensors_are_checked_each_time():
    """They have no memory that tells a layout, and PyTorch warns if code asks for it."""
    with FakeTensorMode():
        good = arguments(g_gamma=None, scale=None, initial_state=None, cu_seqlens=None)
        assert plan_for(Call(**good)) is not plan_for(Call(**good)) and not plan_for(Call(**good)).cached
        with pytest.raises(ValueError, match="k must have q's shape"):
            plan_for(Call(**good | {'k': zeros(2, 5, 2, 9)}))


@pytest.mark.parametrize('mode', MODES)
def test_good_input(mode):
    """The arguments that the bad ones are made from are accepted."""
    o, ht = MODES[mode](**arguments())
    assert o.shape == (2, 5, 4, 6) and ht is None
    assert MODES[mode](**arguments(**PACKED))[0].shape == (1, 5, 4, 6)
    if mode in STATEFUL:
        _, ht = MODES[mode](**arguments(), initial_state=STATE, output_final_state=True)
        assert ht.shape == STATE.shape
    if mode in ('chunk', 'parallel'):
        assert MODES[mode](**arguments(**PACKED), cu_seqlens_cpu=CU.cpu())[0].shape == (1, 5, 4, 6)


@pytest.mark.parametrize('mode', MODES)
def test_no_tokens_and_no_batch(mode):
    options = {'output_final_state': True} if mode in STATEFUL else {}
    for B, T in ((0, 5), (0, 300), (2, 0)):
        q = torch.zeros(B, T, 2, D, device=DEVICE, requires_grad=True)
        g = torch.zeros(B, T, 2, device=DEVICE, requires_grad=True)
        o, ht = MODES[mode](q, q, q, g, **options)
        assert o.shape == q.shape
        if mode in STATEFUL:
            assert ht.shape == (B, 2, D, D) and (ht == 0).all()
        torch.autograd.grad(o.sum(), [q, g])


@pytest.mark.parametrize('interpret', [True, False], ids=['kernels', 'CPU path'])
def test_chunk_size_changes_only_rounding(interpret, monkeypatch):
    if not interpret:
        monkeypatch.setattr('fla_simple_gla._triton.INTERPRET', False)
    q, k, v = torch.randn(3, 1, 70, 2, 8, device=DEVICE if interpret else 'cpu')
    o, _ = fla_simple_gla.chunk_simple_gla(q, k, v)
    for chunk_size in (1, 16, 128):
        other, _ = fla_simple_gla.chunk_simple_gla(q, k, v, chunk_size=chunk_size)
        torch.testing.assert_close(other, o, rtol=1e-4, atol=1e-4)


def test_signatures():
    """Names, order, kinds and defaults are those of fla-core 0.6.0. Our own parameters come after them."""
    states = {'initial_state': None, 'output_final_state': False}
    common = {'q': EMPTY, 'k': EMPTY, 'v': EMPTY, 'g': None}
    packed = {'cu_seqlens': None, 'cu_seqlens_cpu': None}
    expected = {
        'chunk': common | {'g_gamma': None, 'scale': None} | states | {'state_v_first': False} | packed,
        'fused_chunk': common | {'g_gamma': None, 'scale': None} | states | {'cu_seqlens': None},
        'fused_recurrent': common
        | {'g_gamma': None, 'scale': None} | states | {'reverse': False, 'state_v_first': False, 'cu_seqlens': None},
        'parallel': common | {'scale': None, 'output_attentions': False} | packed,
    }  # fmt: skip
    ours = {
        'chunk': {'chunk_size', 'state_indices'}, 'fused_chunk': {'state_v_first', 'state_indices'},
        'fused_recurrent': {'state_indices', 'intermediate_states_buffer', 'transpose_state_layout'},
        'parallel': {'g_gamma'},
    }  # fmt: skip
    for mode, theirs in expected.items():
        parameters = inspect.signature(getattr(fla_simple_gla, f'{mode}_simple_gla')).parameters
        positional = {name: p.default for name, p in parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD}
        assert list(positional.items())[: len(theirs)] == list(theirs.items()), mode
        assert parameters.keys() - theirs.keys() == ours[mode], mode


def test_deprecated_name_of_state_v_first():
    given = arguments(initial_state=zeros(2, 4, 6, 8), output_final_state=True)
    with pytest.warns(DeprecationWarning, match='state_v_first'):
        _, ht = fla_simple_gla.fused_recurrent_simple_gla(**given, transpose_state_layout=True)
    assert ht.shape == (2, 4, 6, 8)
    with pytest.raises(ValueError, match='transpose_state_layout'):
        fla_simple_gla.fused_recurrent_simple_gla(**given, state_v_first=True, transpose_state_layout=True)


def test_without_triton():
    """The package imports and computes CPU tensors. A tensor on an accelerator gets a clear error."""
    code = """
import sys
sys.modules['triton'] = None
import torch
import fla_simple_gla
from fla_simple_gla._triton import runs_kernels
q = torch.randn(1, 5, 2, 8, requires_grad=True)
for mode in fla_simple_gla.__all__:
    getattr(fla_simple_gla, mode)(q, q, q, -q[..., 0].abs())[0].sum().backward()
try:
    runs_kernels(q.to('meta'))
except RuntimeError as error:
    assert 'triton' in str(error)
    print('refused')
"""
    environment = {'PYTHONPATH': ':'.join(sys.path)}
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)
    assert result.stdout == 'refused\n', result.stderr


@pytest.mark.slow
def test_report():
    """`python -m fla_simple_gla` prints what a bug report needs, and that every mode is right."""
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'} | {
        'PYTHONPATH': ':'.join(sys.path)
    }
    result = subprocess.run([sys.executable, '-m', 'fla_simple_gla'], capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and result.stdout.endswith('all modes are right\n'), result.stdout + result.stderr
    for expected in (f'fla_simple_gla {fla_simple_gla.__version__}', f'torch {torch.__version__}', 'GPU: ', *MODES):
        assert expected in result.stdout or expected == 'segments'
