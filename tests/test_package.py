"""The wheel of the project: it has every module of the package, and works without the source tree."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = 'fla_simple_gla'
# What the build reads.
SOURCES = ['pyproject.toml', 'README.md', 'LICENSE', PACKAGE]
SETUPTOOLS = 77  # the version that pyproject.toml asks for

USES = """
import pathlib
import sys

import torch

import fla_simple_gla

q, k, v = (torch.randn(1, 20, 2, 8, requires_grad=True) for _ in range(3))
g = torch.nn.functional.logsigmoid(torch.randn(1, 20, 2)).requires_grad_()
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


def run(*arguments, **options) -> subprocess.CompletedProcess:
    """Run the interpreter of the tests in a process of its own, which takes the CPU path where there is no GPU."""
    environment = {name: x for name, x in os.environ.items() if name not in ('TRITON_INTERPRET', 'PYTHONPATH')}
    environment |= options.pop('environment', {})
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, **options)


def modules(package: pathlib.Path) -> set[str]:
    return {path.relative_to(package).as_posix() for path in package.rglob('*.py')}


def has_setuptools() -> bool:
    """Whether the build can use the setuptools of this environment."""
    try:
        return int(importlib.metadata.version('setuptools').split('.')[0]) >= SETUPTOOLS
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope='module')
def installed(tmp_path_factory) -> pathlib.Path:
    """A folder into which the wheel is installed. It is built from a copy, so that the source tree stays as it is."""
    if run('-m', 'pip', '--version').returncode:
        pytest.skip('needs pip')
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ('source', 'wheels', 'target'))
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy(ROOT / name, source)
    isolation = ['--no-build-isolation'] if has_setuptools() else []
    result = run('-m', 'pip', 'wheel', source, '--no-deps', *isolation, '-w', wheels, cwd=wheels)
    if not isolation and 'No matching distribution found for setuptools' in result.stdout + result.stderr:
        pytest.skip(f'needs setuptools>={SETUPTOOLS}, or an index to get it from')
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = wheels.iterdir()
    result = run('-m', 'pip', 'install', '--no-deps', '--no-index', '--target', target, wheel, cwd=wheels)
    assert result.returncode == 0, result.stdout + result.stderr
    return target


def test_the_wheel_has_every_module_and_nothing_else(installed):
    assert modules(installed / PACKAGE) == modules(ROOT / PACKAGE)
    assert {path.name.split('-')[0] for path in installed.iterdir()} == {PACKAGE}


def test_the_wheel_computes_in_another_folder(installed, tmp_path):
    """Only the installed package is on the path. It computes a forward and a backward pass."""
    result = run('-c', USES, installed, cwd=tmp_path, environment={'PYTHONPATH': str(installed)})
    assert result.returncode == 0, result.stderr
