"""A mode: its passes over kernels and its naive function, and the paths by which a call reaches them."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ._layout import rows_in_place, transposed
from ._operators import Operators, check_contents, final_state_like, refuse_tangents
from ._plans import PLAIN, Gradients, Inputs, Plan, needs_operator, plan_for
from ._pool import in_pool
from ._private import apply_without_transforms, dispatch_modes_are_active, none_is_active, transforms_are_active
from ._triton import runs_kernels
from ._validation import Call, check_no_gradients, under_autocast


class Mode:
    """One mode. A call, `mode(Call(...))`, returns o, and the second result or None.

    The second result is the final state or, in `parallel`, the attention map. Only a final state is differentiable.

    - `forward(inputs, plan)` returns `Results`. With `inputs.state_indices` the initial state is a pool, to which the
      final states are written.
    - `backward(inputs, kept, given, needs, plan)` returns the gradients in the order of `Gradients`. `kept` are the
      states and the gates that the forward has returned, or None; `given` are the gradients of the two results.
    - `naive(inputs, options)` returns o and the second result, for the CPU.
    - `second_like(inputs)` returns a tensor like the second result, for traces.
    - `count_states(inputs)` returns how many states the forward leaves for the backward, for traces: None if that
      cannot be computed from symbolic sizes.
    """

    def __init__(
        self,
        name: str,
        forward: Callable,
        backward: Callable,
        naive: Callable,
        second_like: Callable = final_state_like,
        count_states: Callable = lambda inputs: 0,
    ):
        self.name, self.forward, self.backward, self.naive = name, forward, backward, naive
        self.second_like, self.count_states = second_like, count_states
        self.has_states = second_like is final_state_like
        self.function: Any = type(name, (ModeFunction,), {})  # its name is that of the node in autograd's graph
        self.operators = Operators(self)

    @functools.cached_property
    def apply_without_transforms(self) -> Callable:
        """The same as `function.apply`, faster, for a call in no transform of torch.func."""
        return apply_without_transforms(self.function)

    def __call__(self, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
        call = under_autocast(call)
        plan = plan_for(call)
        path = dispatch_path(plan, call)
        indices, buffer = call.state_indices, call.intermediate_states_buffer
        writes = indices is not None or buffer is not None
        if writes:
            check_no_gradients(call)
        v_first = bool(call.state_v_first)
        g = call.g if call.g_gamma is None else call.g_gamma.expand(call.v.shape[:3])
        state = call.initial_state if writes or not v_first else transposed(call.initial_state)
        inputs = Inputs(call.q, call.k, call.v, g, state, call.cu_seqlens, indices, buffer)
        if (call.cu_seqlens is not None or indices is not None) and path != 'operators':
            check_contents(inputs, call.cu_seqlens_cpu)
        if writes:
            return self.write(inputs, v_first, plan, path)
        if path == 'kernels':
            apply = self.apply_without_transforms if plan.cached else self.function.apply
            o, second = apply(self, plan, *inputs[:6])
        elif path == 'operators':
            o, second = self.operators(inputs, plan.options)
        else:
            o, second = self.naive(inputs, plan.options)
        return o, transposed(second) if v_first else second

    def write(self, inputs: Inputs, v_first: bool, plan: Plan, path: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The results of a call that writes states in place: to a pool, to a buffer, or to both."""
        o, second = (self.operators.write if path == 'operators' else self.run_in_place)(inputs, v_first, plan)
        if inputs.state_indices is not None:
            return o, inputs.initial_state
        return o, transposed(second, v_first) if plan.options.output else None

    def run_in_place(self, inputs: Inputs, v_first: bool, plan: Plan) -> tuple[torch.Tensor, torch.Tensor | None]:
        """o, and the final state `[N, H, K, V]`, or None; with indices the final states are written to the pool."""
        if v_first:
            inputs = inputs._replace(initial_state=transposed(inputs.initial_state), states=transposed(inputs.states))
        pool: Any = inputs.initial_state
        indices, buffer = inputs.state_indices, inputs.states
        if runs_kernels(inputs.q):
            results = self.forward(inputs if plan.reads_in_place else inputs.with_rows_in_place(), plan)
            for written in (None if indices is None else pool, buffer):
                if written is not None:
                    torch.autograd.graph.increment_version(written)
            return results.o, None if indices is not None else results.second
        if indices is None:
            return self.naive(inputs, plan.options)

        def run(initial_state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.naive(inputs._replace(initial_state=initial_state), plan.options._replace(output=True))

        return in_pool(run, pool, indices, inputs.cu_seqlens, buffer), None

    def gradients(self, inputs: Inputs, kept: tuple, given: tuple, needs: Gradients, plan: Plan) -> tuple:
        """The gradients that are needed, computed by kernels, in the order of `Gradients`; None for the others.

        `kept` are the states and the gates that the forward has returned; `given` are the gradients of its two results.
        """
        do, dsecond = given
        do = torch.zeros_like(inputs.v) if do is None else rows_in_place(do)
        found = self.backward(inputs, kept, (do, dsecond), needs, plan)
        return tuple(x if need else None for x, need in zip(found, needs))


class ModeFunction(torch.autograd.Function):
    """A mode, computed by its kernels in an ordinary eager call."""

    @staticmethod
    def forward(ctx: Any, mode: Mode, plan: Plan, *tensors: Any) -> tuple:
        inputs = Inputs(*tensors)
        if not plan.reads_in_place:
            inputs = inputs.with_rows_in_place()
        o, second, states, gates = mode.forward(inputs, plan)
        ctx.save_for_backward(*inputs[:6], states)
        ctx.mode, ctx.plan, ctx.gates = mode, plan, gates
        if second is not None and not mode.has_states:
            ctx.mark_non_differentiable(second)
        ctx.set_materialize_grads(False)
        return o, second

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor | None) -> tuple:
        *tensors, states = ctx.saved_tensors
        inputs, needs = Inputs(*tensors), Gradients(*ctx.needs_input_grad[2:7])
        if backward_needs_operator(*given):
            found = ctx.mode.operators.gradients(inputs, states, given, needs, ctx.plan.options)
        else:
            found = ctx.mode.gradients(inputs, (states, ctx.gates), given, needs, ctx.plan)
        return None, None, *found, None


def dispatch_path(plan: Plan, call: Call) -> str:
    """What computes a call: 'operators', 'kernels' or, on the CPU, 'naive'."""
    if not plan.needs_operator:
        if not runs_kernels(call.q):
            return 'naive'
        if none_is_active():
            return 'kernels'
    refuse_tangents(call.optional_tensors())
    if plan.needs_operator:
        return 'operators'
    if transforms_are_active():
        raise NotImplementedError(
            'the kernels do not support the transforms of torch.func (grad, vjp, vmap, ...): take gradients with '
            'torch.autograd, and put what is to be mapped over into the batch, the first dimension of q, k, v and g'
        )
    return 'operators' if dispatch_modes_are_active() else 'kernels'


def backward_needs_operator(*gradients: torch.Tensor | None) -> bool:
    """Whether the operator must compute the backward.

    It must if the backward is traced (compiled autograd), if a gradient has no memory that kernels can read, or if the
    results might be differentiated again: those of the operator refuse that.
    """
    if not none_is_active():
        refuse_tangents(gradients)
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return True
    for x in gradients:
        if x is not None and (type(x) not in PLAIN or needs_operator(x)):
            return True
    return False
