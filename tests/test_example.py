"""The examples train, generate, serve and plot, and refuse a file that they cannot use; the notebook runs."""

import importlib.util
import json
import os
import pathlib
import random
import re
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / 'examples'
SMALL = ('--width', 64, '--layers', 2, '--heads', 2, '--batch', 4, '--length', 96)


def run(*options, script='train_lm.py', path=ROOT):
    return run_python(EXAMPLES / script, *options, path=path)


def run_python(*arguments, path=ROOT):
    """A process that imports from `path`."""
    command = [sys.executable, *map(str, arguments)]
    # Without a GPU the examples take the CPU path, not the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    environment |= {'PYTHONPATH': str(path), 'MPLBACKEND': 'agg'}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def notebook_cells():
    cells = json.loads((EXAMPLES / 'simple_gla.ipynb').read_text())['cells']
    return [cell for cell in cells if cell['cell_type'] == 'code']


@pytest.mark.slow
def test_trains_and_generates(tmp_path):
    text, model = tmp_path / 'text', tmp_path / 'model'
    text.write_text('to be, or not to be: that is the question.\n' * 400)
    result = run('--text', text, '--steps', 30, *SMALL, '--generate', 20, '--save', model)
    assert result.returncode == 0, result.stderr
    losses = [float(row.split()[-2]) for row in re.findall(r'^ +\d+ .*$', result.stdout, re.M)]
    assert losses[-1] < 0.7 * losses[0], result.stdout
    assert 'largest difference between the logits of training and of decoding' in result.stdout

    # There are more conversations than slots, and more slots than rows in a step.
    # The example compares each conversation with the same one alone.
    counts = ('--conversations', 5, '--slots', 3, '--batch', 2, '--generate', 12)
    result = run('--model', model, *counts, script='generate.py')
    assert result.returncode == 0, result.stderr
    assert re.search(r'^5 conversations, 44 bytes in (2\d|3\d) steps of 2', result.stdout, re.M), result.stdout
    assert 'each writes the same when it is alone' in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize('content', [None, b''])
def test_refuses_a_missing_or_empty_file(tmp_path, content):
    file = tmp_path / 'file'
    if content is not None:
        file.write_bytes(content)
    for result in (run('--text', file), run('--model', file, script='generate.py')):
        assert result.returncode != 0
        assert str(file) in result.stderr and 'Traceback' not in result.stderr


def test_refuses_a_file_that_is_no_model(tmp_path):
    """Any bytes are refused."""
    generator = random.Random(0)
    contents = [generator.randbytes(n) for n in (1, 10, 1000)]
    contents += [b'\x80\x04' + generator.randbytes(50), b'PK\x03\x04' + bytes(30), b'text\n']
    files = [tmp_path / f'file{i}' for i in range(len(contents))]
    for file, content in zip(files, contents):
        file.write_bytes(content)
    code = 'import sys, generate, pathlib\nfor file in sys.argv[1:]:\n    try:\n'
    code += '        generate.load(pathlib.Path(file), "cpu")\n    except SystemExit as error:\n        print(error)\n'
    environment = os.environ | {'PYTHONPATH': f'{ROOT}:{ROOT / "examples"}'}
    command = [sys.executable, '-c', code, *map(str, [*files, tmp_path])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    lines = result.stdout.splitlines()
    assert len(lines) == len(files) + 1, result.stdout + result.stderr
    for file, line in zip([*files, tmp_path], lines):
        assert line.startswith('generate.py: ') and str(file) in line


@pytest.mark.slow
def test_plot_draws_the_losses(tmp_path):
    pytest.importorskip('matplotlib', reason='--plot needs matplotlib')
    text, picture = tmp_path / 'text', tmp_path / 'losses.svg'
    text.write_text('to be, or not to be: that is the question.\n' * 400)
    result = run('--text', text, '--steps', 3, *SMALL, '--generate', 1, '--plot', picture)
    assert result.returncode == 0, result.stderr
    assert '</svg>' in picture.read_text()


@pytest.mark.slow
def test_plot_is_refused_before_training(tmp_path):
    """With a folder that is not there, with a name that says no format, and without matplotlib."""
    (tmp_path / 'matplotlib.py').write_text('raise ImportError')
    reasons = [(tmp_path / 'missing' / 'losses.png', ROOT, f'there is no directory {tmp_path / "missing"}')]
    reasons.append((tmp_path / 'losses.png', f'{tmp_path}:{ROOT}', 'needs matplotlib: pip install matplotlib'))
    if importlib.util.find_spec('matplotlib') is not None:
        reasons.append((tmp_path / 'losses.none', ROOT, 'must end in the name of a format'))
    for file, path, reason in reasons:
        result = run('--plot', file, path=path)
        assert result.returncode == 2 and not result.stdout
        assert f'argument --plot: {reason}' in result.stderr and 'Traceback' not in result.stderr


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    """All cells in one process. Where there is no matplotlib, its calls do nothing."""
    stub = 'import sys, unittest.mock\ntry:\n    import matplotlib.pyplot\nexcept ImportError:\n'
    stub += "    sys.modules['matplotlib'] = sys.modules['matplotlib.pyplot'] = unittest.mock.MagicMock()\n"
    script = tmp_path / 'notebook.py'
    script.write_text('\n'.join([stub, *(''.join(cell['source']) for cell in notebook_cells())]))
    result = run_python(script, path=f'{ROOT}:{EXAMPLES}')
    assert result.returncode == 0, result.stderr
    assert re.search(r'^> Who am I\? +Grace\. ', result.stdout, re.M), result.stdout
    sizes = re.findall(r'the states take ([\d,]+) bytes', result.stdout)
    assert len(sizes) == 6 and len({*sizes}) == 1, result.stdout


def test_notebook_is_kept_executed():
    cells = notebook_cells()
    assert [cell['execution_count'] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell['outputs']]
    assert not [output for output in outputs if output['output_type'] == 'error' or output.get('name') == 'stderr']
    assert [output for output in outputs if 'image/png' in output.get('data', {})]
    assert (EXAMPLES / 'simple_gla.ipynb').stat().st_size < 400_000


@pytest.mark.slow
def test_a_model_of_transformers_is_patched():
    """The losses and the bytes are those of the model without the patch, but for rounding."""
    pytest.importorskip('transformers', minversion='5.17', reason='transformers 5.17 or newer is not installed')
    sizes = ('--width', 32, '--layers', 2, '--state', 8, '--length', 32, '--batch', 2, '--steps', 5, '--generate', 8)
    result = run(*sizes, script='patch_mamba2.py')
    assert result.returncode == 0, result.stderr
    losses = [(float(a), float(b)) for a, b in re.findall(r'^loss of step \d+ +(\S+) +(\S+)$', result.stdout, re.M)]
    bound = 0.05 if torch.cuda.is_available() else 1e-3  # in bfloat16 there
    assert len(losses) == 5 and all(abs(a - b) < bound for a, b in losses), result.stdout
    assert 'a byte that is written' in result.stdout
