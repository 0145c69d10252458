"""The modes as operators of PyTorch's dispatcher, for all that see operators and not Python.

A compiler traces a call without running it; fake and meta tensors have shapes and no memory; a `TorchDispatchMode` watches what is
computed. They get a mode as a few opaque operators `torch.ops.fla_simple_gla.<mode>`, with what a trace needs to know: the shapes of the
results, what is written in place, and the operator of the backward. An ordinary eager call goes past them, and past the dispatcher's time
on the host, through an `torch.autograd.Function` (`_mode.py`); both end in the same passes over the same kernels.

All modes have the same schemas. A result that is not asked for is an empty tensor, since an operator cannot return None. How many
tensors of states a forward leaves for its backward may be no formula of the length: where the length is a symbol so is their number, a
new one. The second result is the final state or, of `parallel`, the attention map.
"""

import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from . import _validation
from ._blocks import count_sequences
from ._plans import Gradients, Inputs, Options, Plan, fp32_precision
from ._private import has_tangent, new_symbolic_size
from ._triton import runs_kernels

INPUTS = 'Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? initial_state, Tensor? cu_seqlens'
FORWARD = f'({INPUTS}, float scale, bool output, bool reverse, str sources) -> (Tensor o, Tensor second, Tensor states)'
BACKWARD = (
    f'({INPUTS}, Tensor states, Tensor? do, Tensor? dht, float scale, bool reverse, bool[] needs) '
    '-> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dh0)'
)
IN_PLACE = (
    f'({INPUTS}, Tensor(a!)? pool, Tensor? state_indices, Tensor(b!)? intermediate_states_buffer, float scale, bool output, bool reverse, '
    'bool state_v_first) -> (Tensor o, Tensor final_state)'
)

# The number of those states depends on what is in these files and on this variable. It is an argument of the operators, so that PyTorch's
# caches on disk tell a graph of other ones apart.
SOURCES = hashlib.sha256(b''.join(path.read_bytes() for path in sorted(pathlib.Path(__file__).parent.rglob('*.py')))).hexdigest()[:16]
SOURCES += os.environ.get('FLA_SIMPLE_GLA_HOPPER', '')


def refuse_tangents(tensors: Iterable[torch.Tensor | None]) -> None:
    if has_tangent(tensors):
        raise NotImplementedError('the kernels have no forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad)')


@functools.cache
def checks_on_gpu() -> bool:
    return os.environ.get('FLA_SIMPLE_GLA_CHECK') == '1'


def check_contents(inputs: Inputs, cu_seqlens_cpu: torch.Tensor | None = None) -> None:
    """Check what boundaries and indices contain, where that takes no waiting for a GPU, or where the environment asks for it."""
    if inputs.cu_seqlens is None and inputs.state_indices is None:
        return
    if inputs.q.is_cpu or checks_on_gpu():
        slots = None if inputs.state_indices is None else inputs.initial_state.shape[0]
        _validation.check_contents(inputs.cu_seqlens, cu_seqlens_cpu, inputs.state_indices, inputs.q.shape[1], slots)


def final_state_like(inputs: Inputs) -> torch.Tensor:
    q, v = inputs.q, inputs.v
    N, dtype = count_sequences(q.shape[0], inputs.cu_seqlens), torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(N, v.shape[2], q.shape[3], v.shape[3], dtype=dtype)


def own(x: torch.Tensor | None) -> torch.Tensor | None:
    """A copy: where there are no tokens the naive functions return what they were given."""
    return None if x is None else x.clone(memory_format=torch.contiguous_format)


def or_empty(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if x is None else x


def states_like(inputs: Inputs, n=0) -> torch.Tensor:
    """Memory for n states of the backward."""
    q, v = inputs.q, inputs.v
    return q.new_empty(n, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


class Operators:
    """The operators of one mode (`_mode.Mode`).

    A forward saves the tensors that the mode's Function saves, in the same order: checkpointing compares them, and may call the one at
    first and the other when it computes again.
    """

    def __init__(self, mode):
        self.mode = mode
        name = f'fla_simple_gla::{mode.name}'
        self.forward = define(name, FORWARD, self.compute, self.describe)
        self.forward.register_autograd(self.differentiate, setup_context=self.save)
        self.backward = define(f'{name}_backward', BACKWARD, self.compute_backward, self.describe_backward)
        if mode.has_states:
            written = 'pool', 'intermediate_states_buffer'
            self.in_place = define(f'{name}_in_place', IN_PLACE, self.compute_in_place, self.describe_in_place, written)

    def __call__(self, inputs: Inputs, options: Options) -> tuple[torch.Tensor, torch.Tensor | None]:
        """o, and the second result or None."""
        o, second, _ = self.forward(*inputs[:6], options.scale, options.output, options.reverse, SOURCES)
        if not options.output:
            return o, None
        return o, second if self.mode.has_states else second.detach()

    def compute(self, *arguments):
        inputs, (scale, output, reverse, _) = Inputs(*arguments[:6]), arguments[6:]
        refuse_tangents(inputs)
        check_contents(inputs)
        plan = new_plan(inputs.q, scale, output, reverse)
        if runs_kernels(inputs.q):
            o, second, states, _ = self.mode.forward(inputs.with_rows_in_place(), plan)
        else:
            o, second = map(own, self.mode.naive(inputs, plan.options))
            states = None
        return o, or_empty(second, inputs.q), states_like(inputs) if states is None else states

    def describe(self, *arguments):
        inputs, (_, output, *_) = Inputs(*arguments[:6]), arguments[6:]
        second = self.mode.second_like(inputs) if output else inputs.q.new_empty(0)
        n = self.mode.count_states(inputs)
        return inputs.q.new_empty(inputs.v.shape), second, states_like(inputs, new_symbolic_size() if n is None else n)

    @staticmethod
    def save(ctx, inputs, output):
        *tensors, ctx.scale, _, ctx.reverse, _ = inputs
        states = output[2]
        n = states.shape[0]
        ctx.save_for_backward(*tensors, None if isinstance(n, int) and n == 0 else states)
        ctx.set_materialize_grads(False)

    def differentiate(self, ctx, do, dht, _):
        refuse_tangents((do, dht))
        *tensors, states = ctx.saved_tensors
        options = Options(ctx.scale, reverse=ctx.reverse)
        found = self.gradients(Inputs(*tensors), states, (do, dht), Gradients(*ctx.needs_input_grad[:5]), options)
        return *found, *(None,) * 5

    def gradients(self, inputs: Inputs, states, given: tuple, needs: Gradients, options: Options) -> Gradients:
        """By the operator of the backward, where autograd and traces see it: None where none is needed."""
        states = states_like(inputs) if states is None else states
        found = self.backward(*inputs[:6], states, *given, options.scale, options.reverse, [*needs])
        return Gradients(*(x if need else None for x, need in zip(found, needs)))

    def compute_backward(self, *arguments):
        inputs, (states, do, dht, scale, reverse, needs) = Inputs(*arguments[:6]), arguments[6:]
        needs = Gradients(*needs)
        plan = new_plan(inputs.q, scale, reverse=reverse)
        if runs_kernels(inputs.q):
            found = self.mode.gradients(inputs.with_rows_in_place(), (states, None), (do, dht), needs, plan)
        else:
            # in a thread of its own: in the one that an operator runs in, autograd sees nothing
            with ThreadPoolExecutor(1) as thread:
                found = thread.submit(self.naive_gradients, inputs, (do, dht), needs, plan.options).result()
        return tuple(or_empty(x, inputs.q).contiguous() for x in found)

    def naive_gradients(self, inputs: Inputs, given: tuple, needs: Gradients, options: Options) -> list[torch.Tensor | None]:
        leaves = [x.detach().requires_grad_(need) if x is not None else None for x, need in zip(inputs, needs)]
        results = self.mode.naive(Inputs(*leaves, inputs.cu_seqlens), options._replace(output=given[1] is not None))
        given = [(x, dx) for x, dx in zip(results, given) if dx is not None and x.requires_grad]
        wanted = [x for x, need in zip(leaves, needs) if need]
        if not given:  # a final state does not depend on q
            return [torch.zeros_like(x) if need else None for x, need in zip(leaves, needs)]
        outputs, gradients = zip(*given)
        found = iter(torch.autograd.grad(outputs, wanted, gradients, materialize_grads=True))
        return [own(next(found)) if need else None for need in needs]

    @staticmethod
    def describe_backward(*arguments):
        inputs, needs = Inputs(*arguments[:6]), arguments[-1]
        return tuple(x.new_empty(x.shape) if need else inputs.q.new_empty(0) for x, need in zip(inputs, needs))

    def write(self, inputs: Inputs, v_first: bool, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        """o, and the final state, if it is asked for and not in a pool."""
        *tensors, state, cu_seqlens, indices, buffer = inputs
        # with indices it is a pool, which is written
        state, pool = (state, None) if indices is None else (None, state)
        options = plan.options
        return self.in_place(
            *tensors, state, cu_seqlens, pool, indices, buffer, options.scale, options.output, options.reverse, v_first,
        )

    def compute_in_place(self, *arguments):
        inputs, (pool, indices, buffer, scale, output, reverse, v_first) = Inputs(*arguments[:6]), arguments[6:]
        refuse_tangents((*inputs, pool))
        inputs = inputs._replace(initial_state=inputs.initial_state if pool is None else pool, state_indices=indices, states=buffer)
        check_contents(inputs)
        o, final_state = self.mode.run_in_place(inputs, v_first, new_plan(inputs.q, scale, output, reverse))
        if not runs_kernels(inputs.q):
            o, final_state = own(o), own(final_state)
        return o, or_empty(final_state, inputs.q)

    @staticmethod
    def describe_in_place(*arguments):
        inputs, (_, indices, _, _, output, *_) = Inputs(*arguments[:6]), arguments[6:]
        final_state = final_state_like(inputs) if output and indices is None else inputs.q.new_empty(0)
        return inputs.q.new_empty(inputs.v.shape), final_state


def define(name: str, schema: str, compute: Callable, describe: Callable, written: tuple[str, ...] = ()):
    defined = torch.library.custom_op(name, compute, mutates_args=written, schema=schema)
    defined.register_fake(describe)
    return defined


def new_plan(q: torch.Tensor, scale: float, output: bool = False, reverse: bool = False) -> Plan:
    return Plan(Options(scale, output, reverse, precision=fp32_precision(q.dtype)))
