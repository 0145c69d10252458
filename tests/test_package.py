"""The archives of the project: what they have, and that the wheel works, and is typed, without the source tree."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import pytest

import fla_simple_gla

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = 'fla_simple_gla'
# What the archive of the sources has. An unpacked archive has more: files that its build writes.
FOLDERS = ['.ci', '.github', 'benchmarks', 'docs', 'examples', PACKAGE, 'tests']
FILES = [
    '.gitignore', '.pre-commit-config.yaml', 'ARCHITECTURE.md', 'CHANGELOG.md', 'CITATION.cff', 'CONTRIBUTING.md',
    'LICENSE', 'MANIFEST.in', 'README.md', 'README.zh-CN.md', 'pyproject.toml',
]  # fmt: skip
WRITTEN = {'PKG-INFO', 'setup.cfg', f'{PACKAGE}.egg-info'}
# What work leaves in a checkout.
LEFT = [
    f'{PACKAGE}/__pycache__/naive.cpython-311.pyc',
    'build/docs/index.html',
    'dist/fla_simple_gla-0.0.1.tar.gz',
    'docs/.DS_Store',
    'examples/.ipynb_checkpoints/simple_gla-checkpoint.ipynb',
    'losses.png',
    'tests/__pycache__/harness.cpython-311.pyc',
]
SETUPTOOLS = 77  # the version that pyproject.toml asks for
BUILD = 'import sys\nfrom setuptools import build_meta\ngetattr(build_meta, sys.argv[1])(sys.argv[2])'

USES = """
import pathlib
import sys

import torch

import fla_simple_gla

torch.manual_seed(0)
q, k, v = (torch.randn(1, 20, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
g = torch.nn.functional.logsigmoid(torch.randn(1, 20, 2, dtype=torch.float64)).requires_grad_()
o, _ = fla_simple_gla.chunk_simple_gla(q, k, v, g)
expected, _ = fla_simple_gla.naive_recurrent_simple_gla(q, k, v, g)
torch.testing.assert_close(o, expected)
weight = torch.randn_like(o)
for found, right in zip(*(torch.autograd.grad((x * weight).sum(), [q, k, v, g]) for x in (o, expected))):
    torch.testing.assert_close(found, right)

for name, module in [*sys.modules.items()]:
    if name.split('.')[0] == 'fla_simple_gla' and getattr(module, '__file__', None):
        assert pathlib.Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__
"""

# Two programs of a user, of which one is right, for mypy. They are not run.
PROGRAMS = {
    'right.py': """
from typing_extensions import assert_type
from torch import Tensor
from fla_simple_gla import chunk_simple_gla, fused_recurrent_simple_gla, parallel_simple_gla

def step(x: Tensor, g: Tensor) -> Tensor:
    _, state = chunk_simple_gla(x, x, x, g, scale=1.0, output_final_state=True)
    assert_type(state, Tensor | None)
    o, attention = parallel_simple_gla(x, x, x, -g, output_attentions=True)
    assert_type(attention, Tensor | None)
    return fused_recurrent_simple_gla(x, x, o, initial_state=state)[0]
""",
    'wrong.py': """
from fla_simple_gla import chunk_simple_gla

chunk_simple_gla(1, 2, 3)
""",
}


def run(*arguments, **options) -> subprocess.CompletedProcess:
    """Run the interpreter of the tests in a process of its own, which takes the CPU path where there is no GPU."""
    environment = {name: x for name, x in os.environ.items() if name not in ('TRITON_INTERPRET', 'PYTHONPATH')}
    environment |= options.pop('environment', {})
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, **options)


def files(folder: pathlib.Path) -> set[str]:
    """The files below a folder, but for those that Python and others keep there."""
    found = [path.relative_to(folder) for path in folder.rglob('*') if path.is_file()]
    return {
        path.as_posix()
        for path in found
        if not {'__pycache__', '.ipynb_checkpoints'} & {*path.parts} and path.name != '.DS_Store'
    }


def has_setuptools() -> bool:
    """Whether the setuptools of this environment can build the project."""
    try:
        return int(importlib.metadata.version('setuptools').split('.')[0]) >= SETUPTOOLS
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope='module')
def build(tmp_path_factory):
    """A function that builds an archive and returns its path, with setuptools from an index if there is none here."""
    environment = {}
    if not has_setuptools():
        target = tmp_path_factory.mktemp('setuptools')
        result = run('-m', 'pip', 'install', '--target', target, f'setuptools>={SETUPTOOLS}', cwd=target)
        if result.returncode:
            pytest.skip(f'needs setuptools>={SETUPTOOLS}, or pip and an index to get it from')
        environment['PYTHONPATH'] = str(target)

    def call(hook: str, source: pathlib.Path) -> pathlib.Path:
        target = tmp_path_factory.mktemp(hook)
        result = run('-c', BUILD, hook, target, cwd=source, environment=environment)
        assert result.returncode == 0, result.stdout + result.stderr
        (archive,) = target.iterdir()
        return archive

    return call


@pytest.fixture(scope='module')
def unpacked(build, tmp_path_factory) -> pathlib.Path:
    """The archive of the sources, unpacked. It is built from a copy, so that the source tree stays as it is."""
    source, target = (tmp_path_factory.mktemp(name) for name in ('source', 'unpacked'))
    for name in LEFT:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    for name in [*FILES, *(f'{folder}/{file}' for folder in FOLDERS for file in files(ROOT / folder))]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    with tarfile.open(build('build_sdist', source)) as archive:
        archive.extractall(target, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
    (folder,) = target.iterdir()
    assert folder.name == f'{PACKAGE}-{fla_simple_gla.__version__}'
    return folder


@pytest.fixture(scope='module')
def installed(build, unpacked, tmp_path_factory) -> pathlib.Path:
    """A folder into which the wheel is installed, which is built from the archive of the sources."""
    wheel, target = build('build_wheel', unpacked), tmp_path_factory.mktemp('target')
    result = run('-m', 'pip', 'install', '--no-deps', '--no-index', '--target', target, wheel, cwd=target)
    if 'No module named pip' in result.stderr:
        pytest.skip('needs pip')
    assert result.returncode == 0, result.stdout + result.stderr
    return target


@pytest.mark.slow
def test_the_archive_has_every_file_and_nothing_else(unpacked):
    """`.ci/run` compares with what git tracks."""
    assert {path.name for path in unpacked.iterdir()} - WRITTEN == {*FOLDERS, *FILES}
    for folder in FOLDERS:
        assert files(unpacked / folder) == files(ROOT / folder)
    assert not [name for name in LEFT if (unpacked / name).exists()]


@pytest.mark.slow
def test_the_wheel_has_every_module_and_nothing_else(installed):
    assert files(installed / PACKAGE) == files(ROOT / PACKAGE)
    assert (installed / PACKAGE / 'py.typed').exists()
    assert {path.name.split('-')[0] for path in installed.iterdir()} == {PACKAGE}


@pytest.mark.slow
def test_the_wheel_requires_no_triton(installed):
    """The torch that it requires brings the triton that belongs to it, or none."""
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    required = [x for x in distribution.requires if 'extra ==' not in x]
    assert {re.match(r'[\w-]+', x)[0] for x in required} == {'torch', 'einops'}


@pytest.mark.slow
def test_the_wheel_computes_in_another_folder(installed, tmp_path):
    """Only the installed package is on the path. It computes a forward and a backward pass."""
    result = run('-c', USES, installed, cwd=tmp_path, environment={'PYTHONPATH': str(installed)})
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_wheel_is_typed(installed, tmp_path):
    """mypy reads the types of the package where it is installed. Without `py.typed` it would not."""
    pytest.importorskip('mypy')
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text)
    command = ['-m', 'mypy', '--strict', *PROGRAMS]
    result = run(*command, cwd=tmp_path, environment={'PYTHONPATH': str(installed)})
    errors = [line for line in result.stdout.splitlines() if ': error: ' in line]
    assert len(errors) == 3, result.stdout + result.stderr
    assert all('wrong.py:4: error: Argument' in line and 'incompatible type "int"' in line for line in errors)


def test_versions_agree():
    """CITATION.cff and CHANGELOG.md have the version of the package."""
    citation = (ROOT / 'CITATION.cff').read_text(encoding='utf-8')
    assert re.findall(r'^version: (.*)$', citation, re.MULTILINE) == [fla_simple_gla.__version__]
    changes = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert re.search(rf'^#+ .*\b{re.escape(fla_simple_gla.__version__)}\b', changes, re.MULTILINE)
