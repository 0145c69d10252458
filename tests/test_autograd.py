"""Gradients of some inputs only, through the state alone, from expanded gradients, and what hooks of autograd see."""

import pytest
import torch
from harness import (
    LENGTH,
    MODES,
    STATEFUL,
    Case,
    D,
    check,
    make_inputs,
    mark_slow,
    poisoned_memory,
    reference,
    rms_error,
    run,
    tensors,
)


@pytest.mark.parametrize('mode', mark_slow(MODES, 'chunk', 'segments', 'fused_recurrent', 'parallel'))
def test_gradients_of_some_inputs_only(mode):
    case = Case(LENGTH[mode], K=D, V=D).of(mode)
    inputs = make_inputs(case)
    expected = run(MODES[mode], case, inputs)
    names = ('q', 'k', 'v', 'g', 'initial_state') if mode in STATEFUL else ('q', 'k', 'v', 'g')
    options = {'output_final_state': True} if mode in STATEFUL else {}
    for name in names:
        arguments = {n: inputs[n].detach() for n in names}
        arguments[name].requires_grad_()
        with poisoned_memory():
            o, ht = MODES[mode](**arguments, **options)
            outputs, grads = ([o, ht], [inputs['do'], inputs['dht']]) if mode in STATEFUL else ([o], [inputs['do']])
            (grad,) = torch.autograd.grad(outputs, [arguments[name]], grads)
        arguments[name].requires_grad_(False)
        assert torch.equal(grad, expected[f'd{name}']), name


@pytest.mark.parametrize('mode', mark_slow(STATEFUL, 'segments'))
def test_gradient_through_the_state_alone(mode):
    case = Case(LENGTH[mode], K=D, V=D)
    inputs = make_inputs(case)
    q, k, v, g = (x.requires_grad_() for x in tensors(inputs))
    _, ht = MODES[mode](q, k, v, g, output_final_state=True)
    ht.backward(inputs['dht'])
    expected = reference(case, inputs | {'do': torch.zeros_like(v), 'initial_state': None})
    for name, x in (('dk', k), ('dv', v), ('dg', g)):
        assert rms_error(x.grad, expected[name]) < 1e-5, name
    assert (q.grad == 0).all()


@pytest.mark.parametrize('mode', MODES)
def test_expanded_gradient(mode):
    """`.sum().backward()` passes a gradient whose strides are zero."""
    case = Case(20, K=D, V=D, initial_state=False, output_final_state=False)
    inputs = make_inputs(case)
    q, k, v, g = (x.requires_grad_() for x in tensors(inputs))
    MODES[mode](q, k, v, g)[0].sum().backward()
    expected = reference(case, inputs | {'do': torch.ones_like(v)})
    for name, x in (('dq', q), ('dk', k), ('dv', v), ('dg', g)):
        assert rms_error(x.grad, expected[name]) < 1e-5, name


@pytest.mark.parametrize('mode', mark_slow(MODES, 'segments', 'parallel'))
def test_saved_tensors_that_come_back_otherwise(mode):
    """Hooks may move the tensors that are saved for the backward, and return them with other strides."""
    case = Case(LENGTH[mode], K=D, V=D, layout='wide').of(mode)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: x, lambda x: x.clone(memory_format=torch.contiguous_format)
    )
    with hooks:
        results = run(MODES[mode], case)
    check(case, results, reference(case))


@pytest.mark.parametrize('mode', MODES)
def test_second_derivatives_are_refused(mode):
    case = Case(8)
    q, k, v, g = (x.requires_grad_() for x in tensors(make_inputs(case)))
    o, _ = MODES[mode](q, k, v, g)
    expected = torch.autograd.grad(o.square().sum(), q, retain_graph=True)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    assert torch.equal(dq, *expected)
    # So is a penalty on a gradient in a loss that has first derivatives too.
    for loss in (dq.sum(), o.sum() + dq.square().sum()):
        with pytest.raises(RuntimeError, match=r'_backward.* no autograd formula'):
            torch.autograd.grad(loss, q, retain_graph=True)
