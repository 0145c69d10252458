"""The examples train, generate and serve, and refuse a file that they cannot use."""

import os
import pathlib
import random
import re
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent


def run(*options, script='train_lm.py'):
    command = [sys.executable, str(ROOT / 'examples' / script), *map(str, options)]
    # Without a GPU the examples take the CPU path, not the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'} | {
        'PYTHONPATH': str(ROOT)
    }
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_trains_and_generates(tmp_path):
    text, model = tmp_path / 'text', tmp_path / 'model'
    text.write_text('to be, or not to be: that is the question.\n' * 400)
    small = ('--width', 64, '--layers', 2, '--heads', 2, '--batch', 4, '--length', 96)
    result = run('--text', text, '--steps', 30, *small, '--generate', 20, '--save', model)
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
