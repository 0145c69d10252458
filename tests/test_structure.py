"""How the code is built: what modes know of each other, how much functions carry, and names of kernels."""

import ast
import pathlib
import re

import pytest
import torch
from harness import GPU, MODES, Case, make_inputs, run

from fla_simple_gla.hopper import sweeps_for

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'fla_simple_gla'
# Public functions, of this library and with the signatures of others.
PUBLIC = re.compile(r'.*_(simple_gla|retention|lightning_attn)|mamba_.*|selective_state_update')
MODE_FILES = ('naive', 'parallel', 'chunk', 'fused_chunk', 'fused_recurrent')


def trees(folder: pathlib.Path) -> list[tuple[pathlib.Path, ast.Module]]:
    return [(path, ast.parse(path.read_text())) for path in sorted(folder.rglob('*.py'))]


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def decorators(function: ast.FunctionDef) -> str:
    return ' '.join(ast.unparse(decorator) for decorator in function.decorator_list)


def test_tests_draw_the_same_numbers_in_each_run():
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


def test_modes_take_few_names_from_each_other():
    for path, tree in trees(PACKAGE):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in MODE_FILES and path.name != '__init__.py':
                assert len(node.names) <= 5, f'{path.name} takes {len(node.names)} names from {node.module}.py'


def test_functions_of_the_host_carry_few_arguments():
    for path, tree in trees(PACKAGE):
        for function in functions(tree):
            if 'jit' in decorators(function) or PUBLIC.fullmatch(function.name):
                continue
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            count = len(arguments) - bool(arguments and arguments[0].arg in ('self', 'cls'))
            assert count <= 8, f'{function.name} of {path.name} takes {count} arguments'


def test_test_functions_are_short():
    for path, tree in trees(ROOT / 'tests'):
        for function in functions(tree):
            lines = function.end_lineno - function.lineno + 1
            assert lines <= 60, f'{function.name} of {path.name} has {lines} lines'


def test_every_kernel_has_a_name_of_its_own():
    names = []
    for _, tree in trees(PACKAGE):
        for function in functions(tree):
            if function.name.endswith('_kernel'):
                found = re.search(r"repr=kernel_name\('(\w+)'\)", decorators(function))
                assert found is not None, function.name
                names.append(found[1])
    assert len(names) == len({*names}) >= 13


@pytest.mark.skipif(not GPU, reason='profiles a GPU')
@pytest.mark.parametrize('mode', [mode for mode in MODES if mode != 'segments'])
def test_a_profile_tells_kernels_apart(mode):
    case = Case(100, K=64, V=64, dtype=torch.bfloat16, initial_state=False).of(mode)
    inputs = make_inputs(case)
    for _ in range(3):  # run, recorded, replayed
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run(MODES[mode], case, inputs)
            torch.cuda.synchronize()
        names = {event.name for event in profile.events() if event.name.startswith('simple_gla')}
        assert names == expected_names(mode, inputs)


def expected_names(mode: str, inputs: dict) -> set[str]:
    on_hopper = sweeps_for(inputs['q'], inputs['k'], inputs['v']) is not None
    if mode == 'fused_recurrent':
        names = ['recurrent_o_K64_V64', 'recurrent_dq_K64_V64', 'recurrent_dk_K64_V64', 'recurrent_dv_K64_V64']
    elif mode == 'parallel':
        kernel, dims = ('hopper_attention', 'BK64') if on_hopper else ('attention', 'K64_V64')
        names = [f'{kernel}_{role}_{dims}' for role in ('o', 'dq', 'dk', 'dv')]
        names += ['chunk_gates', 'block_sums', 'attention_gate_gradient']
    elif on_hopper:
        names = [
            'hopper_sweep_o_K64_V64',
            'hopper_sweep_dq_K64_V64',
            'hopper_gradients_dk_dv_K64_V64',
            'gate_gradient',
        ]
    else:
        names = [f'sweep_{role}_K64_V64' for role in ('o', 'dq', 'dk', 'dv')] + ['chunk_gates', 'gate_gradient']
    return {f'simple_gla_{name}' for name in names}
