"""Versions of triton and PyTorch: none, what is off with unknown ones, switches, hooks, allocators, private names."""

import re
import sys
import types
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from fake_gpu import Kernel
from harness import GPU, MODES, Case, check, make_inputs, mark_slow, reference, run, run_python

from fla_simple_gla import _driver, _launch, _passes, _private, _triton, hopper
from fla_simple_gla._private import private

# No triton

# The code that follows is in a process that has no triton. `None` makes its import an ImportError.
WITHOUT_TRITON = "import sys\nsys.modules['triton'] = None\n"
COMPUTES = """
import torch

import fla_simple_gla
from fla_simple_gla._triton import runs_kernels

torch.manual_seed(0)
x = torch.randn(1, 5, 2, 8, dtype=torch.float64, requires_grad=True)
modes = [getattr(fla_simple_gla, name) for name in fla_simple_gla.__all__]
results = []
for fn in modes:
    o, _ = fn(x, x, x, -x[..., 0].abs())
    results.append((o, *torch.autograd.grad(o.square().sum(), x)))
for found in results:
    torch.testing.assert_close(found, results[0])
pool = torch.zeros(3, 2, 8, 8)
fla_simple_gla.chunk_simple_gla(*[x.detach().float()] * 3, initial_state=pool, state_indices=torch.tensor([1]))
assert pool[1].any() and not pool[[0, 2]].any()

calls = [lambda: runs_kernels(x.to('meta'))]
if torch.cuda.is_available():
    calls += [lambda fn=fn: fn(*[x.float().cuda()] * 3) for fn in modes if 'naive' not in fn.__name__]
for call in calls:
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
NEEDS_TRITON = (
    r'(meta|cuda:0) are computed by kernels that need triton 3\.4 or newer, which is not installed\. '
    r'CUDA builds of PyTorch bring triton; with another build, install it: pip install triton'
)


def test_without_triton_cpu_tensors_are_computed():
    """Forward and backward. A tensor elsewhere gets an error that says what to install."""
    result = run_python(WITHOUT_TRITON + COMPUTES, TRITON_INTERPRET=None)
    assert result.returncode == 0, result.stderr
    errors = result.stdout.splitlines()
    assert len(errors) == (5 if GPU else 1)
    assert all(re.fullmatch(f'tensors on {NEEDS_TRITON}', error) for error in errors), errors


@pytest.mark.slow
def test_without_triton_the_report_is_printed():
    code = "import runpy\nrunpy.run_module('fla_simple_gla', run_name='__main__')"
    result = run_python(WITHOUT_TRITON + code, TRITON_INTERPRET=None, CUDA_VISIBLE_DEVICES='')
    assert result.returncode == 0 and result.stdout.endswith('all modes are right\n'), result.stdout + result.stderr
    assert 'triton not installed\n' in result.stdout
    assert 'CPU tensors are computed by the naive functions\n' in result.stdout


# Versions of triton, and switches in the environment


@pytest.fixture
def reasons(monkeypatch):
    """Clears the caches of decisions, before and after the test too. CUDA and its driver seem to be there."""
    caches = _driver.why_not_direct, _triton.warn_once, hopper.sweeps_of
    monkeypatch.delenv('FLA_SIMPLE_GLA_DIRECT', raising=False)
    monkeypatch.delenv('FLA_SIMPLE_GLA_HOPPER', raising=False)
    monkeypatch.setattr(torch.version, 'cuda', '12.8')
    monkeypatch.setattr(_driver, 'cuda_driver', lambda: 'a driver')

    def clear():
        for cache in caches:
            cache.cache_clear()

    clear()
    yield clear
    clear()


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('version', _triton.KNOWN)
def test_known_versions_of_triton(version, reasons, monkeypatch):
    monkeypatch.setattr(_triton.triton, '__version__', f'{version}.1+git')
    for feature in _triton.WHAT:
        assert (_triton.why_not(feature) is None) == (feature in _triton.KNOWN[version])
    assert (_driver.why_not_direct() is None) == ('direct' in _triton.KNOWN[version])


@pytest.mark.parametrize('version', ['3.10.0', '3.5.1', '4.0.0'])
def test_what_another_version_of_triton_lacks_is_told_once(version, reasons, monkeypatch):
    monkeypatch.setattr(_triton.triton, '__version__', version)
    with pytest.warns(UserWarning) as warned:
        for _ in range(2):
            assert version in _driver.why_not_direct()
            for feature in _triton.WHAT:
                _triton.warn_once(feature)
            _driver.why_not_direct.cache_clear()
    texts = {str(found.message) for found in warned}
    assert len(warned) == len(texts) == len(_triton.WHAT) == 3
    for feature, what in _triton.WHAT.items():
        tested = [known for known, features in _triton.KNOWN.items() if feature in features]
        reason = f'triton {version} is not one of the versions that this was made for ({", ".join(tested)})'
        assert f'fla_simple_gla: {what}: {reason}. The results are the same.' in texts


def test_kernels_for_hopper_are_off_with_another_version_of_triton(reasons, monkeypatch):
    monkeypatch.setattr(hopper, 'is_hopper', lambda device: True)
    device = torch.device('cuda', 0)
    monkeypatch.setattr(_triton.triton, '__version__', '3.9.0')
    assert hopper.why_no_sweeps(64, 128, torch.bfloat16, device) is None
    with pytest.warns(UserWarning, match='off for K or V over 128.*triton 3.9.0'):
        assert '3.9.0' in hopper.why_no_sweeps(64, 256, torch.bfloat16, device)
    monkeypatch.setattr(_triton.triton, '__version__', '3.10.0')
    with pytest.warns(UserWarning, match='the kernels for Hopper are off.*triton 3.10.0') as warned:
        for K in (64, 128, 256):
            assert '3.10.0' in hopper.why_no_sweeps(K, K, torch.bfloat16, device)
            assert hopper.sweeps_of(K, K, torch.bfloat16, device) is None
    assert len(warned) == 1
    monkeypatch.setenv('FLA_SIMPLE_GLA_HOPPER', '0')
    assert 'FLA_SIMPLE_GLA_HOPPER=0' in hopper.why_no_sweeps(64, 64, torch.bfloat16, device)


@pytest.mark.filterwarnings('error')
def test_why_the_driver_is_not_called(reasons, monkeypatch):
    monkeypatch.setattr(_triton.triton, '__version__', '3.9.0')
    assert _driver.why_not_direct() is None

    def reason():
        _driver.why_not_direct.cache_clear()
        return _driver.why_not_direct()

    with monkeypatch.context() as patch:
        patch.setenv('FLA_SIMPLE_GLA_DIRECT', '0')
        assert 'FLA_SIMPLE_GLA_DIRECT=0' in reason()
        patch.setenv('FLA_SIMPLE_GLA_DIRECT', '1')
        assert reason() is None
    with monkeypatch.context() as patch:
        patch.setattr(_driver, 'cuda_driver', lambda: None)
        assert 'libcuda.so.1' in reason()
    with monkeypatch.context() as patch:
        patch.setattr(_driver, 'private', lambda name: None)
        assert 'CompiledKernel' in reason()
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, 'cuda', None)
        assert 'not built for CUDA' in reason()
    assert reason() is None


@pytest.mark.slow
@pytest.mark.parametrize('before, after, message', [
    (None, '1', 'triton was imported without TRITON_INTERPRET=1, and fla_simple_gla otherwise'),
    ('1', None, 'triton was imported with TRITON_INTERPRET=1, and fla_simple_gla otherwise'),
], ids=['set', 'unset'])  # fmt: skip
def test_the_interpreter_must_be_asked_for_before_triton_is_imported(before, after, message):
    change = "os.environ['TRITON_INTERPRET'] = '1'" if after else "del os.environ['TRITON_INTERPRET']"
    result = run_python(f'import os, triton\n{change}\nimport fla_simple_gla', TRITON_INTERPRET=before)
    assert result.returncode == 1 and f'ImportError: {message}' in result.stderr
    assert 'set the variable before the first import of triton' in result.stderr


# Hooks and options of triton


def test_hooks_and_options_of_triton_are_seen():
    knobs = pytest.importorskip('triton.knobs')
    if _triton.why_not('direct'):
        pytest.skip(_triton.why_not('direct'))
    assert not _private.launches_are_observed()
    for scope, name, value in (
        (knobs.runtime, 'debug', True), (knobs.compilation, 'instrumentation_mode', 'consan'),
        (knobs.runtime, 'add_stages_inspection_hook', lambda *args: None),
    ):  # fmt: skip
        with scope.scope():
            setattr(scope, name, value)
            assert _private.launches_are_observed(), name
        assert not _private.launches_are_observed()
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        hook.add(print)
        assert _private.launches_are_observed()
        hook.remove(print)
    assert not _private.launches_are_observed()


def test_a_triton_with_other_hooks_counts_as_observed(monkeypatch):
    for knobs in (None, SimpleNamespace(), SimpleNamespace(runtime=SimpleNamespace(debug=False))):
        monkeypatch.setattr(_private, 'private', lambda name, knobs=knobs: knobs)
        assert _private.launches_are_observed()


# The allocator that triton asks for memory


def ours(size, alignment, stream):
    """An allocator of a test."""


@pytest.fixture(params=['the version that is installed', 'a global, as in 3.4'])
def allocator_of_user(request, monkeypatch):
    """A function that returns the allocator triton has, and the allocator that the user has set."""
    triton = pytest.importorskip('triton')
    allocation = sys.modules['triton.runtime._allocation']
    if request.param != 'a global, as in 3.4':
        before = current = lambda: getattr(allocation._allocator, 'get', lambda: allocation._allocator)()
        user, before = lambda size, alignment, stream: None, before()
        triton.set_allocator(user)
        yield current, user
        triton.set_allocator(before)
        return
    user = lambda size, alignment, stream: None  # noqa: E731
    allocation = types.ModuleType('_allocation')
    allocation._allocator = user
    monkeypatch.setattr(triton, 'set_allocator', lambda allocator: setattr(allocation, '_allocator', allocator))
    monkeypatch.setattr(_private, 'private', {'triton.runtime._allocation': allocation}.get)
    yield lambda: allocation._allocator, user


def test_the_allocator_of_the_user_is_in_place_after_a_call(allocator_of_user):
    current, user = allocator_of_user
    assert current() is user
    assert _private.with_allocator(ours, lambda: (current(), 'result')) == (ours, 'result')
    assert current() is user


def test_the_allocator_of_the_user_is_in_place_after_an_error(allocator_of_user):
    current, user = allocator_of_user

    def call():
        assert current() is ours
        raise KeyError('a test')

    with pytest.raises(KeyError, match='a test'):
        _private.with_allocator(ours, call)
    assert current() is user


def test_memory_is_for_kernels_that_make_descriptors(monkeypatch):
    with_allocator = mock.Mock(side_effect=lambda allocator, call: call())
    monkeypatch.setattr(_launch, 'with_allocator', with_allocator)
    kernel = Kernel()
    for constants, calls in (({}, 0), ({'TMA': False}, 0), ({'TMA': True}, 1)):
        _launch.launch_by_triton(_launch.Prepared(kernel, (1, 1, 1), ('x', 2), constants))
        assert kernel.launches[-1] == ((1, 1, 1), ('x', 2), constants) and with_allocator.call_count == calls
    assert with_allocator.call_args.args[0] is _triton.scratch


# Names that PyTorch and triton do not promise to keep


def without(monkeypatch, *names: str) -> None:
    """The private names cannot be found."""

    def found(name):
        return None if name in names else private(name)

    for module in (_private, _launch, _driver):
        monkeypatch.setattr(module, 'private', found)
    monkeypatch.setattr(_passes, 'why_not_direct', _driver.why_not_direct.__wrapped__)  # without its cache
    # This name is read at each call.
    if 'torch.autograd.forward_ad._current_level' in names:
        monkeypatch.setattr(_private, 'forward_ad', SimpleNamespace(unpack_dual=torch.autograd.forward_ad.unpack_dual))
    for mode in MODES.values():
        mode_object = getattr(sys.modules[mode.__module__], 'mode', None)
        if mode_object is not None:
            monkeypatch.setattr(
                mode_object, 'apply_without_transforms', _private.apply_without_transforms(mode_object.function)
            )


@pytest.mark.parametrize('name', _private.NAMES)
def test_to_look_for_a_private_name_is_no_error(name):
    """It is no error without a driver of triton either, as where there is no GPU."""
    private.__wrapped__(name)


@pytest.mark.parametrize('name', [None, *_private.NAMES])
@pytest.mark.parametrize(
    'mode', mark_slow([mode for mode in MODES if mode != 'segments'], 'fused_chunk', 'fused_recurrent', 'parallel')
)
def test_modes_are_right_without_a_private_name(mode, name, monkeypatch):
    without(monkeypatch, name)
    case = Case(3, K=16, V=16).of(mode)
    inputs = make_inputs(case)
    check(case, run(MODES[mode], case, inputs), reference(case, inputs))
    with torch.no_grad():
        o, _ = MODES[mode](*(inputs[x] for x in ('q', 'k', 'v', 'g')))
    assert o.isfinite().all()


DELETES = """
import torch
import torch._library.fake_impl

del {name}

from harness import MODES, Case, check, make_inputs, reference, run

from fla_simple_gla._private import private

assert private('{name}') is None
for mode in MODES:
    case = Case(3, K=16, V=16).of(mode)
    inputs = make_inputs(case)
    check(case, run(MODES[mode], case, inputs), reference(case, inputs))
"""


@pytest.mark.slow
@pytest.mark.parametrize('name', [
    'torch._library.fake_impl.allocate_size', 'torch._C._len_torch_dispatch_stack',
    'torch._C._are_functorch_transforms_active',
])  # fmt: skip
def test_modes_are_right_with_a_pytorch_that_lacks_a_name(name):
    result = run_python(DELETES.format(name=name))
    assert result.returncode == 0, result.stderr


@pytest.mark.filterwarnings('ignore:.*torch.jit.script.*:DeprecationWarning')
def test_what_stands_in_for_private_names(monkeypatch):
    without(monkeypatch, *_private.NAMES)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: SimpleNamespace(cuda_stream=100 + device))
    assert _private.current_stream(3) == 103
    context = SimpleNamespace(new_dynamic_size=lambda: 'a size', _shape_env='shapes')
    monkeypatch.setattr(torch.library, 'get_ctx', lambda: context)
    assert _private.new_symbolic_size() == 'a size'
    assert _private.launches_are_observed()
    assert not _private.transforms_are_active() and not _private.dispatch_modes_are_active()
    assert not _private.is_zero_tensor(SimpleNamespace())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(1), torch.ones(1))
        assert _private.has_tangent([None, dual]) and not _private.has_tangent([torch.ones(1), None])


def test_a_name_that_is_not_there_is_none(monkeypatch):
    names = (
        'torch._C._there_is_no_such_name',
        'torch.there.is.no.such.module',
        'there_is_no_such_package.name',
        'torch.Tensor.no.such',
    )
    monkeypatch.setattr(
        _private, 'NAMES', dict.fromkeys([*names, 'torch.autograd.forward_ad', 'torch.Tensor.new_empty'], '')
    )
    assert [private(name) for name in names] == [None] * 4
    assert private('torch.autograd.forward_ad') is torch.autograd.forward_ad
    assert private('torch.Tensor.new_empty') == torch.Tensor.new_empty
    private.cache_clear()


@pytest.mark.parametrize('name', _private.NAMES)
def test_private_names_are_where_they_are_looked_for(name):
    """In the installed versions. `_private.NAMES` tells what is lost without a name."""
    if not GPU and ('cuda' in name or 'driver.active' in name):
        pytest.skip('needs a GPU')
    if name.startswith('triton') and (reason := _triton.why_not('direct')):
        pytest.skip(reason)
    assert private(name) is not None
