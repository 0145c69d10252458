"""The benchmarks: one command, rows in files, and tables and pictures that show what the result files have."""

import argparse
import copy
import csv
import json
import shutil
import subprocess
import sys

import pytest
import torch
from harness import DEVICE, GPU

from benchmarks import __main__ as command
from benchmarks import measuring, models, report, shapes, training
from benchmarks.measuring import Column, Report
from fla_simple_gla.adapters import patch

ROOT = report.ROOT
MACHINE = {'benchmark': 'run', 'commit': 'abc', 'gpu': 'NVIDIA H200', 'copy_tb_per_s': 4.0}
COLUMNS = [Column('name', 6, lambda row: row['name'], True), Column('ms', 6, lambda row: f'{row.get("ms", 0):.2f}')]
ROWS = [{'name': 'one', 'ms': 1.23456789}, {'name': 'refused'}, {'name': 'two', 'ms': 20.0}]


def call(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, 'argv', ['benchmarks', *map(str, arguments)])
    command.main()


@pytest.mark.parametrize('name', command.COMMANDS)
def test_help(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, name, '--help')
    assert stop.value.code == 0 and f'benchmarks {name}' in capsys.readouterr().out


@pytest.mark.skipif(GPU, reason='there is a GPU')
@pytest.mark.parametrize('name', [name for name in command.COMMANDS if name not in command.NEED_NO_GPU])
def test_what_measures_says_that_it_needs_a_gpu(name, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, name, *(['other'] if name == 'same_bits' else []))
    assert stop.value.code == 'needs a CUDA GPU'


def test_the_command_line_leaves_out_where_rows_go(monkeypatch):
    arguments = ['run', '--out', '/a/b.jsonl', '--fla', '--commit=abc', '--shape', '1', '2', '3', '4']
    monkeypatch.setattr(sys, 'argv', ['benchmarks', *arguments])
    assert measuring.command_line() == 'python -m benchmarks run --fla --shape 1 2 3 4'


@pytest.mark.parametrize('name', ['rows.txt', 'absent/rows.csv'])
def test_files_that_cannot_be_written_are_refused(name, tmp_path):
    with pytest.raises(argparse.ArgumentTypeError):
        measuring.out_file(str(tmp_path / name))


def written(path, monkeypatch) -> str:
    """What a report of ROWS prints. It writes them to the file too."""
    monkeypatch.setattr(measuring, 'machine', lambda options: dict(MACHINE))
    made = Report(argparse.Namespace(out=path), COLUMNS, len(ROWS))
    for row in ROWS:
        made.row(**row)
    made.failed('three', ValueError('first line\nsecond line'))
    made.close()


def test_rows_are_written_as_json_lines(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'rows.jsonl'
    written(path, monkeypatch)
    machine, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert machine == MACHINE and rows == [{'name': 'one', 'ms': 1.2346}, *ROWS[1:]]
    shown = capsys.readouterr().out
    assert '| one    |   1.23 |' in shown and 'three failed: ValueError: first line\n' in shown


def test_rows_are_written_as_csv(tmp_path, monkeypatch):
    path = tmp_path / 'rows.csv'
    written(path, monkeypatch)
    lines = path.read_text().splitlines()
    assert lines[: len(MACHINE)] == [f'# {key}: {value}' for key, value in MACHINE.items()]
    rows = list(csv.DictReader(lines[len(MACHINE) :]))
    assert rows == [{'name': 'one', 'ms': '1.2346'}, {'name': 'refused', 'ms': ''}, {'name': 'two', 'ms': '20.0'}]


def test_cliffs_are_found():
    def row(T, cost):
        other = {'series': 'dims', 'pass': 'forward', 'implementation': 'chunk', 'B': 1, 'H': 1, 'D': 8}
        return other | {'T': T, 'ns_per_kib': cost}

    assert shapes.cliffs([row(1, 1.0), row(2, 1.4), row(3, 1.0)]) == []
    assert shapes.cliffs([row(1, 1.0), row(2, 1.6), row(3, 1.2)]) == ['B1 T2 H1 D8 forward: 1.60 times a neighbour']


@pytest.mark.parametrize('page', report.PAGES)
def test_tables_show_the_result_files(page):
    """If not: python -m benchmarks report"""
    text = (ROOT / page).read_text()
    assert report.BLOCK.search(text)
    assert report.filled(text, report.Files()) == text


def test_a_table_that_differs_is_filled_anew():
    files = report.Files()
    files['h200/compiled'] = report.Results(
        MACHINE | {'command': 'python -m benchmarks compiled', 'torch': '1', 'triton': '2', 'driver': '3', 'date': '4'},
        [dict(B=1, T=2, H=3, D=4, eager_ms=1.234, compiled_ms=0.5, graphs_ms=20.0, difference=1e-6)],
    )
    page = 'a\n<!-- table: compiled-h200 -->\nold\n<!-- end of table -->\nb\n'
    new = report.filled(page, files)
    assert '| B1 T2 H3 D4 | 1.23 | 0.500 | 20.0 | 1e-06 |' in new and 'old' not in new
    assert report.filled(new, files) == new


def results_of(command: str, *rows: dict) -> report.Results:
    machine = dict.fromkeys(('torch', 'triton', 'driver', 'date'), '1')
    return report.Results(MACHINE | machine | {'command': f'python -m benchmarks {command}'}, [*rows])


def test_the_table_of_models():
    model = dict(model='one', B=1, T=2, H=4, HK=1, K=16, V=8)
    times = dict(forward_limit_ms=0.05, both_limit_ms=0.5, memory_mib=1234.0, error=0.003)
    ours = model | times | dict(implementation='chunk', forward_ms=0.1, both_ms=2.0)
    theirs = model | times | dict(implementation='mamba_ssm', forward_ms=0.3, both_ms=5.0, memory_mib=2000.0)
    others = [row | dict(model=name) for name in ('K 16, V 8', 'Kimi') for row in (ours, theirs)]
    files = report.Files({'h200/models': results_of('models', ours, theirs, *others)})
    expected = '| one: B1 T2 H4 HK1 K16 V8 | 0.100 | 0.050 (50%) | 0.300 (mamba_ssm) | 2.00 | 0.500 (25%) | '
    assert expected + '5.00 (mamba_ssm) | 1,234 / 2,000 | 3.0e-03 |' in report.TABLES['models-h200'](files)
    expected = '| one: B1 T2 H4 HK1 K16 V8 | 2.00 | 5.00 (mamba_ssm) | 2.5 | 1,234 | 2,000 |'
    assert expected in report.TABLES['layers'](files) and expected in report.TABLES['layers-zh'](files)
    assert 'K 16, V 8:' in report.TABLES['models-h200'](files) and 'K 16, V 8:' not in report.TABLES['layers'](files)
    assert 'Kimi:' in report.TABLES['layers'](files)


def test_the_tables_of_adapters():
    model = dict(model='one', B=1, T=2, H=4, HK=1, K=16, V=8)
    times = dict(forward_limit_ms=0.05, both_limit_ms=0.5, memory_mib=1234.0, error=0.003)
    ours = model | times | dict(implementation='fla_simple_gla', forward_ms=0.1, both_ms=2.0)
    theirs = model | times | dict(implementation='mamba_ssm', forward_ms=0.3, both_ms=5.0)
    step = model | dict(states='bfloat16', batch=1, implementation='fla_simple_gla', device_us=4.0, floor_us=1.0)
    other_step = step | dict(batch=64, implementation='mamba_ssm', device_us=50.0)
    both = dict(layers=2, transformers='5')
    training = both | dict(B=1, T=2, function='scan', implementation='PyTorch', step_ms=1.5, memory_mib=7.0)
    generation = both | dict(batch=3, implementation='mamba_ssm', eager_us=30.0, device_us=None)
    rows = {'scan': [ours, theirs], 'step': [step, other_step]}
    rows |= {'training': [training | dict(difference=2e-3)], 'generation': [generation]}
    files = report.Files({f'h200/{name}': results_of(name, *found) for name, found in rows.items()})
    expected = {
        'scan': '| 0.100 | 0.050 (50%) | 0.300 (mamba_ssm) | 2.00 | 0.500 (25%) | 5.00 (mamba_ssm) |',
        'step': '| one: H4 HK1 K16 V8, states in bfloat16 | 4.00 (25%) |  |  | 50.0 |',
        'training': "| `mamba_chunk_scan_combined`, transformers' own code in PyTorch | 1.50 | 7 | 2e-03 |",
        'generation': '| batch 3, mamba_ssm 2.3.2, its kernels in Triton | 30.0 | - |',
    }
    for name, line in expected.items():
        assert line in report.TABLES[f'{name}-h200'](files)


def test_the_limits_of_a_model():
    """Of bytes where heads share q and k and the state is small, and of products where it is large."""
    small, large = models.Model('', 1, 1000, 80, 1, 128, 64), models.Model('', 1, 1000, 4, 4, 512, 512)
    forward, both = small.limits(1e12)
    bytes_of_q, bytes_of_v, bytes_of_g = 2 * 1000 * 128, 2 * 1000 * 80 * 64, 4 * 1000 * 80
    assert forward == pytest.approx((2 * bytes_of_q + 2 * bytes_of_v + bytes_of_g) / 1e9)
    assert both == pytest.approx(forward + (4 * bytes_of_q + 3 * bytes_of_v + 2 * bytes_of_g) / 1e9)
    forward, both = large.limits(1e15)
    assert forward == pytest.approx(4000 * (4 * 512**2 + 128 * 1024) / 7e11)
    assert both == pytest.approx(forward + 4000 * (10 * 512**2 + 128 * 5 * 512) / 7e11)


def test_the_limits_of_the_scan_of_a_model():
    small, large = models.Model('', 1, 1000, 80, 1, 128, 64), models.Model('', 1, 1000, 4, 4, 512, 512)
    forward, both = small.limits(1e12, of_scan=True)
    bytes_of_B, bytes_of_x, bytes_of_dt = 2 * 1000 * 128, 2 * 1000 * 80 * 64, 2 * 1000 * 80
    assert forward == pytest.approx((2 * bytes_of_B + 3 * bytes_of_x + bytes_of_dt) / 1e9)
    assert both == pytest.approx(forward + (4 * bytes_of_B + 5 * bytes_of_x + 2 * bytes_of_dt) / 1e9)
    assert large.limits(1e15, of_scan=True) == large.limits(1e15)


def test_the_formula_of_the_scan_is_that_of_the_function(monkeypatch):
    """In fp64. The formula sees the last tokens alone, of which those count that its first ones have no part in."""
    monkeypatch.setattr(models, 'COMPARED', 600)
    leaves, dy = models.scan_inputs(models.Model('', 2, 1300, 4, 2, 8, 4), 'cpu')
    exact = models.exact_scan(leaves, dy)
    leaves = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    steps = torch.nn.functional.softplus(leaves['dt'] + leaves['dt_bias']).mean((0, 1))
    assert 0.015 < steps.min() and steps.max() < 0.055
    _, both = models.calls(models.scan_of('fla_simple_gla'), leaves, dy.double())
    found = both()
    assert len(found) == len(exact) == 9 and models.scan_error(found, exact) < 1e-5
    for i in (0, 1, 2, 4, 5, 7):  # y and the gradients that tokens have
        wrong = [*found]
        wrong[i] = 1.01 * wrong[i]
        assert models.scan_error(tuple(wrong), exact) > 0.009


def test_the_formula_of_the_step_is_that_of_the_function():
    tensors, size = models.step_inputs(models.Model('', 1, 1, 4, 2, 8, 6), 3, torch.bfloat16, 'cpu')
    assert size == 2 * 2 * 3 * 4 * 6 * 8 + 2 * 3 * 3 * 4 * 6 + 2 * 3 * 4 + 2 * 2 * 3 * 2 * 8 + 3 * 4 * 4
    tensors = {name: x.double() for name, x in tensors.items()}
    step, state = models.step_of('fla_simple_gla', tensors)
    for found, exact in zip((step(), state), models.exact_step(tensors), strict=True):
        assert models.relative_error(found, exact) < 1e-12
    assert models.relative_error(tensors['state'], state) > 0.01


def small_model():
    pytest.importorskip('transformers', reason='transformers is not installed')
    with patch('transformers') as report:
        if report.skipped:
            pytest.skip(report.skipped['transformers'])
    return training.make_model(
        hidden_size=32, num_heads=4, head_dim=16, state_size=8, vocab_size=40, chunk_size=8, initializer_range=0.3
    ).to(DEVICE)


def test_training_steps_of_a_model_of_transformers():
    model, ids, losses = small_model(), torch.randint(40, (2, 20), device=DEVICE), []
    for patched in (True, False):
        for function in ('split', 'scan'):
            with training.transformers_is(patched):
                name = training.implementation_of(function)
                if name == 'mamba_ssm':  # it tunes itself for seconds, and needs a GPU
                    continue
                assert name == ('fla_simple_gla' if patched else 'PyTorch')
                step = training.make_step(copy.deepcopy(model).train(function == 'split'), ids)
                losses.append(torch.stack([step() for _ in range(3)]))
    assert all(x[0] > x[-1] and torch.allclose(x, losses[0], rtol=1e-2) for x in losses)


@torch.no_grad()
def test_decoding_of_a_model_of_transformers():
    model, ids = small_model().eval(), torch.randint(40, (2, 20), device=DEVICE)
    with training.transformers_is(patched=True):
        assert training.implementation_of('step') == 'fla_simple_gla'
        decoder = training.Decoder(model, ids[:, :15])
        found = torch.stack([decoder.logits(ids[:, i : i + 1]) for i in range(15, 19)], 1)
        tokens = ids[:, 19:].clone()
        decoder.make_step(tokens)()
        expected = model(input_ids=ids).logits[:, 15:]
    assert models.relative_error(found, expected[:, :-1].double()) < 1e-5
    assert torch.equal(tokens[:, 0], expected[:, -1].argmax(-1))


def test_other_dims_have_rows_of_their_own_in_the_table_of_errors():
    row = dict(mode='chunk', dtype='bf16', T=64, states=False, result='o', memory_tokens=1)
    rows = [
        row | dict(error=0.001),
        row | dict(K=128, V=128, HK=8, error=0.002),
        row | dict(K=128, V=64, HK=1, error=0.003),
    ]
    files = report.Files({f'{card}/accuracy': results_of('accuracy', *rows) for card in report.CARDS})
    text = report.TABLES['accuracy'](files)
    assert '| `chunk`, bf16 | 2.0e-03 |' in text
    assert '| `chunk`, bf16, K 128 V 64, heads share q and k | 3.0e-03 |' in text


def test_every_table_of_a_page_has_a_maker():
    assert {'README.md', 'README.zh-CN.md', 'docs/performance.md', 'docs/numerics.md'} <= {*report.PAGES}
    for page in report.PAGES:
        names = [found[2] for found in report.BLOCK.finditer((ROOT / page).read_text())]
        assert names and {*names} <= {*report.TABLES}


def test_pictures_show_the_result_files():
    """If not: python -m benchmarks report"""
    assert report.stale_pictures() == []


def test_result_files_name_the_machine_and_the_commit():
    files = sorted(report.FOLDER.glob('*/*.jsonl'))
    assert files
    for file in files:
        machine = json.loads(file.read_text().splitlines()[0])
        for name in ('gpu', 'driver', 'torch', 'triton', 'commit', 'date', 'command'):
            assert machine[name] not in ('', 'unknown'), file
        assert file.parent.name.upper() in machine['gpu'] and 'dirty' not in machine['commit']


def git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(['git', '-C', ROOT, *arguments], capture_output=True, text=True)


def test_result_files_name_commits_of_this_history():
    """They are given by hand where what is measured is a copy without its history."""
    if not (ROOT / '.git').exists() or shutil.which('git') is None:
        pytest.skip('needs a checkout, and git')
    if git('rev-parse', '--is-shallow-repository').stdout != 'false\n':
        pytest.skip('needs a checkout with its history')
    commits = {json.loads(file.read_text().splitlines()[0])['commit'] for file in report.FOLDER.glob('*/*.jsonl')}
    strangers = [x for x in commits if git('merge-base', '--is-ancestor', x, 'HEAD').returncode]
    assert commits and not strangers


@pytest.mark.skipif(not GPU, reason='measures on a GPU')
@pytest.mark.parametrize('arguments', [
    ('run', '--shape', 1, 256, 2, 64, '--mode', 'chunk', '--attention'),
    ('decode', '--batch', 2, '--heads', 2, '--dim', 64),
    ('host', '--shape', 1, 256, 2, 64, '--calls', 50, '--lengths', 2),
    ('compiled', '--shape', 1, 128, 2, 64),
    ('models', '--model', 'Mamba-2, N 64'),
    ('models', '--model', 'Mamba-2, N 64', '--whole'),
    ('models', '--model', 'Mamba-2, N 64', '--step'),
    ('training', '--batch', 1, '--length', 256),
    ('training', '--decode', '--batch', 2),
], ids=lambda x: x[0])  # fmt: skip
def test_what_is_measured_on_a_gpu(arguments, tmp_path, monkeypatch):
    if arguments[0] == 'training':
        pytest.importorskip('transformers', reason='transformers is not installed')
    path = tmp_path / 'rows.jsonl'
    call(monkeypatch, *arguments, '--out', path, '--commit', 'abc')
    machine, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert machine['gpu'] == torch.cuda.get_device_name() and machine['commit'] == 'abc'
    times = [
        value for row in rows for name, value in row.items() if name.endswith(('_ms', '_us')) and value is not None
    ]
    assert times and all(value > 0 for value in times)
