"""Layouts of the inputs: which are read in place, which are copied, and that no input is changed."""

import pytest
import torch
from harness import MODES, Case, D, assert_same_bits, make_inputs, run

from fla_simple_gla._layout import rows_in_place


@pytest.mark.parametrize('layout', ['contiguous', 'qkv', 'heads_first', 'odd', 'wide'])
def test_no_layout_with_contiguous_rows_is_copied(layout):
    inputs = make_inputs(Case(20, B=2, layout=layout))
    for name in ('q', 'k', 'v', 'do'):
        assert rows_in_place(inputs[name]) is inputs[name], name


@pytest.mark.parametrize('mode', MODES)
def test_last_dimension_with_a_stride(mode):
    case = Case(20, K=D, V=D).of(mode)
    inputs = make_inputs(case)
    strided = {name: x if name not in 'qkv' else x.mT.contiguous().mT for name, x in inputs.items()}
    assert strided['q'].stride(-1) != 1
    assert_same_bits(run(MODES[mode], case, strided), run(MODES[mode], case, inputs))


@pytest.mark.parametrize('mode', MODES)
def test_inputs_are_left_alone(mode):
    case = Case(20, K=D, V=D, layout='qkv').of(mode)
    inputs = make_inputs(case)
    copies = {name: None if x is None else x.clone() for name, x in inputs.items()}
    run(MODES[mode], case, inputs)
    for name, x in inputs.items():
        assert x is None or torch.equal(x, copies[name]), name
