"""The example trains, generates, and refuses a text that it cannot use."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run(*options):
    command = [sys.executable, str(ROOT / 'examples' / 'train_lm.py'), *map(str, options)]
    # without a GPU, the CPU path and not the interpreter
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'} | {'PYTHONPATH': str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_trains_and_generates(tmp_path):
    text = tmp_path / 'text'
    text.write_text('to be, or not to be: that is the question.\n' * 400)
    small = ('--width', 64, '--layers', 2, '--heads', 2, '--batch', 4, '--length', 96)
    result = run('--text', text, '--steps', 30, *small, '--generate', 20)
    assert result.returncode == 0, result.stderr
    losses = [float(row.split()[-2]) for row in re.findall(r'^ +\d+ .*$', result.stdout, re.M)]
    assert losses[-1] < 0.7 * losses[0], result.stdout
    assert 'largest difference between the logits of training and of decoding' in result.stdout


@pytest.mark.parametrize('content', [None, ''])
def test_refuses_a_missing_or_empty_text(tmp_path, content):
    text = tmp_path / 'text'
    if content is not None:
        text.write_text(content)
    result = run('--text', text)
    assert result.returncode != 0
    assert str(text) in result.stderr and 'Traceback' not in result.stderr
