"""`patch` and `unpatch`: with packages that the tests write in the place of the real ones, and with the real ones."""

import importlib
import pathlib
import sys
import textwrap
import types

import pytest
import torch
from harness import rms_error, run_python
from torch._dynamo.testing import CompileCounter

import fla_simple_gla
from fla_simple_gla.adapters import _patch, mamba_ssm, patch, unpatch
from fla_simple_gla.adapters import fla as ours_in_fla

SIMPLE_GLA = ('chunk_simple_gla', 'fused_chunk_simple_gla', 'fused_recurrent_simple_gla', 'parallel_simple_gla')
FUNCTION = 'def {name}({parameters}):\n    return "theirs"\n'

HUB_KERNELS = """
    import functools, importlib, inspect

    EXPORTING = False
    make = lambda function: function

    def use_kernel_func_from_hub_with_fallback(func_name, package, internal_path=None):
        def decorator(torch_function):
            try:
                module = 'selective_state_update' if func_name == 'selective_state_update' else 'ssd_combined'
                implementation = getattr(importlib.import_module(f'{package}.ops.triton.{module}'), func_name)
            except Exception:
                implementation = torch_function
            applicable_params = tuple(inspect.signature(implementation).parameters)
            is_new_implementation = implementation is not torch_function

            @functools.wraps(torch_function)
            def wrapped(*args, **kwargs):
                if is_new_implementation and EXPORTING:
                    return torch_function(*args, **kwargs)
                if not is_new_implementation:
                    print(func_name, package)
                return implementation(*args, **{k: x for k, x in kwargs.items() if k in applicable_params})

            return make(wrapped)

        return decorator
"""
# The package kernels makes modules of PyTorch of functions.
OF_KERNELS = """
    import torch

    def make(func):
        class Func(torch.nn.Module):
            kernel_layer_name = func.__name__

            def forward(self, *args, **kwargs):
                return func(*args, **kwargs)

        return Func()
"""
MODEL = """
    from ..integrations import use_kernel_func_from_hub_with_fallback

    @use_kernel_func_from_hub_with_fallback('mamba_chunk_scan_combined', 'mamba_ssm')
    def scan(hidden_states, dt, A, B, C, chunk_size, **kwargs):
        return 'torch'

    @use_kernel_func_from_hub_with_fallback(func_name='mamba_split_conv1d_scan_combined', package='mamba_ssm')
    def split(zxbcdt, **kwargs):
        return None

    @use_kernel_func_from_hub_with_fallback('selective_state_update', 'mamba_ssm')
    def step(state, hidden_states, dt, A, B, C, **kwargs):
        return 'torch'

    @use_kernel_func_from_hub_with_fallback('selective_scan_fn', 'mamba_ssm')
    def other_function(x):
        return 'torch'

    @use_kernel_func_from_hub_with_fallback('mamba_chunk_scan_combined', 'elsewhere')
    def other_package(x):
        return 'torch'
"""


class Packages:
    """Packages in a folder that is searched for modules."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        for parent in path.relative_to(self.folder).parents:
            init = self.folder / parent / '__init__.py'
            init.parent.mkdir(parents=True, exist_ok=True)
            if parent != pathlib.Path('.') and not init.exists():
                init.touch()
        path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()

    def write_fla(self, version: str = '0.6.0', **parameters: str) -> None:
        """`parameters` are those of functions by their names, where they are not the usual ones; '' for none."""
        self.write('fla/__init__.py', f'__version__ = {version!r}')
        for name in SIMPLE_GLA:
            taken = parameters.get(name, 'q, k, v, g=None, **kwargs')
            file = name.removesuffix('_simple_gla')
            self.write(f'fla/ops/simple_gla/{file}.py', FUNCTION.format(name=name, parameters=taken) if taken else '')
        exports = [f'from .{x.removesuffix("_simple_gla")} import {x}' for x in SIMPLE_GLA if parameters.get(x) != '']
        self.write('fla/ops/simple_gla/__init__.py', '\n'.join(exports))
        for module in ('retention', 'lightning_attn'):
            names = [name for name in ours_in_fla.__all__ if module in name]
            start = 'q, k, v, ' + ('' if module == 'retention' else 'layer_idx, num_layers, ')
            text = [FUNCTION.format(name=name, parameters=parameters.get(name, f'{start}scale=None')) for name in names]
            self.write(f'fla/ops/{module}/__init__.py', '\n'.join(text))
        layer = 'from fla.ops.simple_gla import chunk_simple_gla as mode, parallel_simple_gla'
        self.write('fla/layers/simple_gla.py', layer)

    def write_mamba_ssm(self, version: str = '2.3.2.post1') -> None:
        self.write('mamba_ssm/__init__.py', f'__version__ = {version!r}')
        parameters = {
            'mamba_chunk_scan_combined': 'x, dt, A, B, C, chunk_size, D=None',
            'mamba_split_conv1d_scan_combined': 'zxbcdt, conv1d_weight, conv1d_bias',
            'selective_state_update': 'state, x, dt, A, B, C',
        }
        text = [FUNCTION.format(name=name, parameters=taken) for name, taken in parameters.items()]
        self.write('mamba_ssm/ops/triton/ssd_combined.py', '\n'.join(text[:2]))
        self.write('mamba_ssm/ops/triton/selective_state_update.py', text[2])
        self.write('mamba_ssm/modules/mamba2.py', 'from mamba_ssm.ops.triton.ssd_combined import *')

    def write_transformers(self, version: str = '5.24.0', hub_kernels: str = HUB_KERNELS) -> None:
        self.write('transformers/__init__.py', f'__version__ = {version!r}')
        self.write('transformers/integrations/hub_kernels.py', hub_kernels)
        if 'def use_kernel_func_from_hub_with_fallback' in hub_kernels:
            text = 'from .hub_kernels import use_kernel_func_from_hub_with_fallback'
            self.write('transformers/integrations/__init__.py', text)
        for name in ('before', 'during'):
            self.write(f'transformers/models/{name}.py', MODEL)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """No target is installed but those that the test writes."""

    def loaded():
        return [name for name in sys.modules if name.split('.')[0] in _patch.TARGETS]

    assert not _patch.patched
    for name in loaded():
        monkeypatch.delitem(sys.modules, name)
    others = [path for path in sys.path if not any((pathlib.Path(path) / x).exists() for x in _patch.TARGETS)]
    monkeypatch.setattr(sys, 'path', [str(tmp_path), *others])
    yield Packages(tmp_path)
    unpatch()
    for name in loaded():
        del sys.modules[name]


@pytest.fixture
def as_modules(monkeypatch):
    """Puts objects among the modules."""

    def add(**objects):
        for name, x in objects.items():
            monkeypatch.setitem(sys.modules, name, x)

    return add


def load(name: str) -> types.ModuleType:
    return importlib.import_module(name)


def snapshot() -> dict[tuple[str, str], object]:
    """What each name of each module of the targets is."""
    return {
        (module, name): value
        for module, x in sys.modules.items()
        if module.split('.')[0] in _patch.TARGETS
        for name, value in vars(x).items()
        if callable(value)
    }


def assert_same(found: dict, expected: dict) -> None:
    """Those in `expected` are the same. There may be others, of modules that were imported later."""
    assert [key for key, value in expected.items() if found.get(key) is not value] == []


class Shy(types.ModuleType):
    """A module that must not be asked for what it has not loaded."""

    def __getattr__(self, name):
        raise AssertionError(f'asked for {name}')

    @property
    def __dict__(self):
        raise AssertionError('asked for all')


def test_every_module_that_holds_a_function_gets_ours(packages, as_modules):
    packages.write_fla()
    modes, layer = load('fla.ops.simple_gla'), load('fla.layers.simple_gla')
    original = modes.chunk_simple_gla
    mine, own, shy = types.ModuleType('mine'), types.ModuleType('own'), Shy('shy')
    mine.attend = own.theirs = original
    mine.kept = {'in a dict': original}
    types.ModuleType.__setattr__(shy, 'attend', original)
    as_modules(mine=mine, shy=shy, none=None, no_module=types.SimpleNamespace(attend=original))
    as_modules(**{'fla_simple_gla.own': own})
    expected = snapshot()
    report = patch('fla')
    names = _patch.names_of(shy)
    for holder in (modes.chunk_simple_gla, load('fla.ops.simple_gla.chunk').chunk_simple_gla, layer.mode, mine.attend):
        assert holder is fla_simple_gla.chunk_simple_gla
    assert names['attend'] is fla_simple_gla.chunk_simple_gla
    assert mine.kept['in a dict'] is original and sys.modules['no_module'].attend is original
    assert own.theirs is original
    for name in SIMPLE_GLA:
        assert getattr(modes, name) is getattr(fla_simple_gla, name)
    for name in ours_in_fla.__all__:
        module = load('fla.ops.retention' if 'retention' in name else 'fla.ops.lightning_attn')
        assert getattr(module, name) is getattr(ours_in_fla, name)
    modules = {'fla.ops.simple_gla', 'fla.ops.simple_gla.chunk', 'fla.layers.simple_gla', 'mine', 'shy'}
    assert set(report.replaced['fla']['chunk_simple_gla']) == modules
    assert report.replaced.keys() == {'fla'} and not report.skipped and not report.notes
    unpatch('fla')
    assert_same(snapshot(), expected)
    assert mine.attend is original and names['attend'] is original


def test_modules_imported_in_between(packages, as_modules):
    """Those of the target get the original. Those that have ours from this library keep it."""
    packages.write_fla()
    original = load('fla.ops.simple_gla.parallel').parallel_simple_gla
    mixed = load('fla.ops.simple_gla.chunk')
    mixed.set_by_hand = fla_simple_gla.parallel_simple_gla
    mine, mine_too = types.ModuleType('mine'), types.ModuleType('mine_too')
    mine.attend = mine_too.attend = fla_simple_gla.chunk_simple_gla
    as_modules(mine=mine)
    patch('fla')
    as_modules(mine_too=mine_too)
    layer = load('fla.layers.simple_gla')
    assert layer.parallel_simple_gla is fla_simple_gla.parallel_simple_gla
    unpatch('fla')
    assert layer.parallel_simple_gla is original is load('fla.ops.simple_gla').parallel_simple_gla
    assert layer.mode is mixed.chunk_simple_gla is not fla_simple_gla.chunk_simple_gla
    assert mine.attend is mine_too.attend is fla_simple_gla.chunk_simple_gla
    assert mixed.set_by_hand is fla_simple_gla.parallel_simple_gla
    # what was set in between stays, too
    patch('fla')
    layer.mode = original
    unpatch('fla')
    assert layer.mode is original


def test_this_library_is_not_patched(packages):
    """Also where a module of a target exports a function of this library."""
    packages.write_fla()
    packages.write('fla/ops/simple_gla/__init__.py', 'from fla_simple_gla import *')
    report = patch('fla')
    assert report.skipped['fla.ops.simple_gla.chunk_simple_gla'].endswith("is this library's without a patch")
    assert 'chunk_retention' in report.replaced['fla']
    unpatch()
    assert load('fla.ops.simple_gla').chunk_simple_gla is fla_simple_gla.chunk_simple_gla


def test_twice(packages):
    packages.write_fla()
    modes = load('fla.ops.simple_gla')
    expected = snapshot()
    unpatch()
    patch()
    during = snapshot()
    report = patch('fla', 'fla')
    assert str(report) == 'fla is patched already' and not report.replaced
    assert_same(snapshot(), during)
    unpatch('mamba_ssm', 'transformers')
    assert_same(snapshot(), during)
    unpatch('fla', 'fla')
    assert_same(snapshot(), expected)
    unpatch()
    assert_same(snapshot(), expected)
    patch('fla')
    assert modes.chunk_simple_gla is fla_simple_gla.chunk_simple_gla


def test_context(packages):
    """It takes out what it has put in, and no more; also after an error."""
    packages.write_fla()
    packages.write_mamba_ssm()
    modes, scan = load('fla.ops.simple_gla'), load('mamba_ssm.ops.triton.ssd_combined')
    expected = snapshot()
    with pytest.raises(KeyError):
        with patch('fla', 'mamba_ssm') as report:
            assert report.replaced.keys() == {'fla', 'mamba_ssm'}
            raise KeyError
    assert_same(snapshot(), expected)
    patch('fla')
    with patch():
        assert scan.mamba_chunk_scan_combined is mamba_ssm.mamba_chunk_scan_combined
    assert modes.chunk_simple_gla is fla_simple_gla.chunk_simple_gla
    assert scan.mamba_chunk_scan_combined is not mamba_ssm.mamba_chunk_scan_combined
    with patch('fla'), patch('transformers'):
        pass
    assert modes.chunk_simple_gla is fla_simple_gla.chunk_simple_gla


@pytest.mark.parametrize('function', [patch, unpatch])
def test_unknown_targets(function, packages):
    packages.write_fla()
    modes = load('fla.ops.simple_gla')
    message = "targets must be among 'fla', 'mamba_ssm', 'transformers', got 'flash'"
    with pytest.raises(ValueError, match=message):
        function('fla', 'flash')
    assert modes.chunk_simple_gla is not fla_simple_gla.chunk_simple_gla


def test_mamba_ssm(packages):
    packages.write_mamba_ssm()
    module = load('mamba_ssm.modules.mamba2')
    expected = snapshot()
    report = patch('mamba_ssm')
    for name in ('mamba_chunk_scan_combined', 'mamba_split_conv1d_scan_combined'):
        assert getattr(module, name) is getattr(mamba_ssm, name)
        assert report.replaced['mamba_ssm'][name] == ['mamba_ssm.ops.triton.ssd_combined', 'mamba_ssm.modules.mamba2']
    step = load('mamba_ssm.ops.triton.selective_state_update')
    assert step.selective_state_update is mamba_ssm.selective_state_update
    unpatch('mamba_ssm')
    assert_same(snapshot(), expected)
    assert step.selective_state_update is not mamba_ssm.selective_state_update


def test_what_is_not_installed_is_not_imported(packages):
    sys.modules['mamba_ssm'] = None  # imports of it are refused
    report = patch()
    del sys.modules['mamba_ssm']
    assert report.skipped == {name: f'{name} is not installed' for name in _patch.TARGETS}
    assert not any(name.split('.')[0] in _patch.TARGETS for name in sys.modules)
    assert not report.replaced and not _patch.patched
    assert str(report).splitlines() == [f'skipped: {name} is not installed' for name in _patch.TARGETS]


@pytest.mark.parametrize(
    'file, text, why',
    [
        ('__init__.py', 'import selective_scan_cuda', "ModuleNotFoundError: No module named 'selective_scan_cuda'"),
        ('ops/triton/ssd_combined.py', 'raise OSError("undefined symbol")', 'OSError: undefined symbol'),
        ('ops/triton/selective_state_update.py', 'import no.such', "ModuleNotFoundError: No module named 'no'"),
        ('ops/triton/selective_state_update.py', '1 / 0', 'ZeroDivisionError: division by zero'),
    ],
)
def test_what_cannot_be_imported(file, text, why, packages):
    """Nothing of it is replaced."""
    packages.write_mamba_ssm()
    packages.write(f'mamba_ssm/{file}', text)
    packages.write_fla()
    report = patch('mamba_ssm', 'fla')
    assert report.skipped == {'mamba_ssm': f'mamba_ssm cannot be imported: {why}'}
    assert report.replaced.keys() == _patch.patched.keys() == {'fla'}
    ours = [getattr(mamba_ssm, name) for name in mamba_ssm.__all__]
    assert not [place for place, value in snapshot().items() if value in ours]


@pytest.mark.parametrize(
    'version, note',
    [
        ('0.6.3', None),
        ('0.7.0', 'fla 0.7.0 has not been tested with this library, 0.6 has'),
        ('0.5', 'fla 0.5 has not been tested with this library, 0.6 has'),
        ('main', 'fla main has not been tested with this library, 0.6 has'),
    ],
)
def test_versions(version, note, packages):
    packages.write_fla(version)
    report = patch('fla')
    assert report.replaced.keys() == {'fla'} and report.notes.get('fla') == note
    assert note is None or note in str(report)


def test_functions_with_other_parameters(packages):
    """They are left as they are. Those with fewer parameters than ours are replaced."""
    packages.write_fla(
        '0.5.0',
        chunk_simple_gla='q, k, v, g=None, head_first=True, offsets=None',
        fused_chunk_simple_gla='q, k, g, v',
        fused_recurrent_simple_gla='*args, **kwargs',
        parallel_simple_gla='',
        fused_chunk_retention='q, k, v',
    )
    packages.write('fla/ops/lightning_attn/__init__.py', '')
    (packages.folder / 'fla/ops/lightning_attn/__init__.py').unlink()
    (packages.folder / 'fla/ops/lightning_attn').rmdir()
    report = patch('fla')
    of_version = {
        'simple_gla.chunk_simple_gla': 'has parameters that this library does not know: head_first, offsets',
        'simple_gla.fused_chunk_simple_gla': 'has its parameters in another order',
        'simple_gla.fused_recurrent_simple_gla': 'has a signature that does not tell its parameters',
    }
    expected = {f'fla.ops.{name}': f'fla.ops.{name} of fla 0.5.0 {why}' for name, why in of_version.items()}
    missing = 'simple_gla.parallel_simple_gla', *(f'lightning_attn.{x}' for x in ours_in_fla.__all__ if 'ning' in x)
    expected |= {f'fla.ops.{name}': f'fla 0.5.0 has no fla.ops.{name}' for name in missing}
    assert report.skipped == expected
    assert {*report.replaced['fla']} == {name for name in ours_in_fla.__all__ if 'retention' in name}
    assert load('fla.ops.simple_gla').chunk_simple_gla(1, 2, 3) == 'theirs'
    for line in expected.values():
        assert f'skipped: {line}' in str(report)


def test_nothing_to_replace(packages):
    packages.write('fla/__init__.py', '__version__ = "0.1"')
    assert patch('fla').skipped['fla'] == 'fla 0.1 has none of the functions that this library replaces'
    assert not _patch.patched


WRAPPERS = {'scan': 'mamba_chunk_scan_combined', 'split': 'mamba_split_conv1d_scan_combined'}
WRAPPERS['step'] = 'selective_state_update'


def implementations(model: types.ModuleType) -> list[str]:
    """What the scan, the split and the step of a model call: 'ours', 'mamba_ssm' or 'torch'."""
    found = []
    for name, function in WRAPPERS.items():
        implementation = _patch.wrapper_of(getattr(model, name)).get().implementation
        if implementation is getattr(mamba_ssm, function):
            found.append('ours')
        else:
            found.append('mamba_ssm' if implementation.__module__.startswith('mamba_ssm') else 'torch')
    return found


@pytest.mark.parametrize('hub_kernels', [HUB_KERNELS, HUB_KERNELS + OF_KERNELS], ids=['functions', 'modules'])
def test_transformers(hub_kernels, packages):
    """Models have ours while patched, whether they were imported before or not."""
    packages.write_transformers(hub_kernels=hub_kernels)
    before = load('transformers.models.before')
    decorator = load('transformers.integrations').use_kernel_func_from_hub_with_fallback
    expected = snapshot()
    report = patch('transformers')
    during = load('transformers.models.during')
    assert implementations(before) == implementations(during) == ['ours'] * 3
    assert report.replaced == {'transformers': {name: ['transformers.models.before'] for name in mamba_ssm.__all__}}
    assert 'selective_state_update in transformers.models.before, every model that is imported from now on' in str(
        report
    )
    for model in (before, during):
        assert model.other_function(1) == model.other_package(1) == 'torch'
    unpatch('transformers')
    assert implementations(before) == implementations(during) == ['torch'] * 3
    assert_same(snapshot(), expected)
    for module in ('integrations', 'integrations.hub_kernels', 'models.during', 'models.before'):
        assert load(f'transformers.{module}').use_kernel_func_from_hub_with_fallback is decorator
    patch('transformers')
    assert implementations(before) == implementations(during) == ['ours'] * 3


@pytest.mark.parametrize('hub_kernels', [HUB_KERNELS, HUB_KERNELS + OF_KERNELS], ids=['functions', 'modules'])
def test_calls_of_wrappers(hub_kernels, packages):
    """Keywords that ours lack are dropped. Exports take the function in PyTorch."""
    packages.write_transformers(hub_kernels=hub_kernels)
    model, hub = load('transformers.models.before'), load('transformers.integrations.hub_kernels')
    held = model.scan
    x, dt, A, B = torch.randn(1, 3, 2, 4), torch.rand(1, 3, 2), -torch.rand(2), torch.randn(1, 3, 1, 4)
    assert held(x, dt, A, B, B, chunk_size=4, use_cache=True) == 'torch'
    with patch('transformers'):
        expected = mamba_ssm.mamba_chunk_scan_combined(x, dt, A, B, B, 4, dt_softplus=True)
        assert torch.equal(held(x, dt, A, B, B, chunk_size=4, dt_softplus=True, use_cache=True), expected)
        hub.EXPORTING = True
        assert held(x, dt, A, B, B, chunk_size=4, use_cache=True) == 'torch'
        hub.EXPORTING = False
    assert held(x, dt, A, B, B, chunk_size=4) == 'torch'


@pytest.mark.parametrize('first', ['mamba_ssm', 'transformers'])
def test_transformers_with_mamba_ssm(first, packages):
    """Models get back the functions of mamba_ssm, also if they were imported while these were patched."""
    packages.write_transformers()
    packages.write_mamba_ssm()
    before = load('transformers.models.before')
    assert implementations(before) == ['mamba_ssm'] * 3
    patch('mamba_ssm')
    during = load('transformers.models.during')
    assert implementations(during) == ['ours'] * 3
    patch('transformers')
    assert implementations(before) == implementations(during) == ['ours'] * 3
    unpatch(first)
    if first == 'mamba_ssm':
        assert implementations(before) == implementations(during) == ['ours'] * 3
    unpatch()
    assert implementations(before) == implementations(during) == ['mamba_ssm'] * 3


def test_models_that_found_ours_in_mamba_ssm(packages):
    packages.write_transformers()
    packages.write_mamba_ssm()
    with patch('mamba_ssm'):
        during = load('transformers.models.during')
        assert implementations(during) == ['ours'] * 3
    assert implementations(during) == ['mamba_ssm'] * 3
    assert 'dt_limit' not in _patch.wrapper_of(during.scan).get().applicable_params


OLD = 'transformers {} has no use_kernel_func_from_hub_with_fallback: 5.17 or newer is needed'
UNKNOWN = 'transformers {} has another use_kernel_func_from_hub_with_fallback than those that are known here'


@pytest.mark.parametrize(
    'version, hub_kernels, why',
    [
        ('4.57.1', 'def use_kernel_forward_from_hub(name): pass', OLD),
        ('5.30.0', HUB_KERNELS.replace('is_new_implementation', 'is_other'), UNKNOWN),
        ('5.30.0', HUB_KERNELS.replace('make(wrapped)', 'torch_function'), UNKNOWN),
        ('5.30.0', HUB_KERNELS.replace('func_name, package, internal_path=None', 'func_name'), UNKNOWN),
        ('5.30.0', 'import no_such', "transformers cannot be imported: ModuleNotFoundError: No module named 'no_such'"),
    ],
)
def test_transformers_of_other_versions(version, hub_kernels, why, packages):
    packages.write_transformers(version, hub_kernels)
    report = patch('transformers')
    assert report.skipped == {'transformers': why.format(version)} and not report.replaced and not _patch.patched


def test_transformers_without_hub_kernels(packages):
    packages.write('transformers/__init__.py', '__version__ = "4.30.0"')
    assert patch('transformers').skipped == {'transformers': OLD.format('4.30.0')}


def test_installed_transformers():
    """Its models, its module that loads names when asked, and a model that is imported in between."""
    models = pytest.importorskip('transformers.models.mamba2.modeling_mamba2', reason='transformers is not installed')
    if not hasattr(models, 'use_kernel_func_from_hub_with_fallback'):
        pytest.skip(f'transformers {sys.modules["transformers"].__version__} is older than 5.17')
    hub, integrations = load('transformers.integrations.hub_kernels'), load('transformers.integrations')
    decorator = hub.use_kernel_func_from_hub_with_fallback
    vars(integrations).pop('use_kernel_func_from_hub_with_fallback', None)
    before = [wrapper.get() for _, wrapper in _patch.wrappers()]
    assert len(before) >= 3
    with patch('transformers') as report:
        assert integrations.use_kernel_func_from_hub_with_fallback is not decorator
        for name, modules in report.replaced['transformers'].items():
            assert 'transformers.models.mamba2.modeling_mamba2' in modules
            assert _patch.WRAPPED[name] is getattr(mamba_ssm, name)
        for _, wrapper in _patch.wrappers():
            assert wrapper.get().implementation is getattr(mamba_ssm, wrapper.name)
    assert [wrapper.get() for _, wrapper in _patch.wrappers()] == before
    assert integrations.use_kernel_func_from_hub_with_fallback is decorator
    assert hub.use_kernel_func_from_hub_with_fallback is models.use_kernel_func_from_hub_with_fallback is decorator


def test_compiled_and_exported(monkeypatch):
    """A compiled model is compiled anew when it is patched. An export is the same, patched or not."""
    models = pytest.importorskip('transformers.models.mamba2.modeling_mamba2', reason='transformers is not installed')
    if not hasattr(models, 'use_kernel_func_from_hub_with_fallback'):
        pytest.skip(f'transformers {sys.modules["transformers"].__version__} is older than 5.17')

    class Scan(torch.nn.Module):
        def forward(self, *args):
            return models.mamba2_chunk_scan(*args, chunk_size=4)

    args = (
        torch.randn(1, 5, 2, 4),
        torch.rand(1, 5, 2),
        -torch.rand(2),
        torch.randn(1, 5, 1, 4),
        torch.randn(1, 5, 1, 4),
    )
    # mamba_ssm, where it is installed, does not compute CPU tensors
    wrapper = _patch.wrapper_of(models.mamba2_chunk_scan)
    in_pytorch = _patch.implementation_of(models.mamba2_chunk_scan.__wrapped__)
    monkeypatch.setattr(wrapper.cells[0], 'cell_contents', in_pytorch.implementation)
    monkeypatch.setattr(wrapper.cells[1], 'cell_contents', in_pytorch.applicable_params)
    monkeypatch.setattr(wrapper.cells[2], 'cell_contents', False)
    graphs = CompileCounter()
    compiled = torch.compile(Scan(), backend=graphs, fullgraph=True)
    before, graph = compiled(*args), torch.export.export(Scan(), args).graph
    with patch('transformers'):
        assert rms_error(compiled(*args), before) < 1e-6 and graphs.frame_count == 2
        assert str(torch.export.export(Scan(), args).graph) == str(graph)
    assert torch.equal(compiled(*args), before) and graphs.frame_count == 2


def test_installed_fla():
    pytest.importorskip('fla.ops.retention', reason='fla-core is not installed')
    expected = {key: value for key, value in snapshot().items() if key[0].startswith('fla')}
    with patch('fla') as report:
        assert not report.skipped, str(report)
        for name, modules in report.replaced['fla'].items():
            assert 'fla.ops' in modules and getattr(load('fla.ops'), name).__module__.startswith('fla_simple_gla')
    assert_same(snapshot(), expected)


def test_imports_change_nothing():
    """The package does not import the adapters, and the adapters import and change none of the targets."""
    code = """
import sys
import fla_simple_gla
assert 'fla_simple_gla.adapters' not in sys.modules
import fla_simple_gla.adapters.fla, fla_simple_gla.adapters.mamba_ssm
targets = 'fla', 'mamba_ssm', 'transformers', 'causal_conv1d'
assert not [name for name in sys.modules if name.split('.')[0] in targets]
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    code = """
import importlib, sys
for name in ('transformers.models.mamba2.modeling_mamba2', 'transformers.integrations', 'fla.ops', 'mamba_ssm'):
    try:
        importlib.import_module(name)
    except Exception:
        pass
def snapshot():
    return {
        (module, name): id(value)
        for module, x in [*sys.modules.items()] if module.split('.')[0] in ('fla', 'mamba_ssm', 'transformers')
        for name, value in vars(x).items()
    }
before = snapshot()
import fla_simple_gla.adapters
assert snapshot() == before
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
