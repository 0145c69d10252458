"""The modes as operators of PyTorch's dispatcher, for parts of PyTorch that see operators and not Python.

A compiler traces a call without running it. Fake and meta tensors have shapes but no memory. A `TorchDispatchMode`
watches what is computed. For these, a mode is a few opaque operators `torch.ops.fla_simple_gla.<mode>`, which tell what
a trace needs to know: the shapes of the results, what is written in place, and which operator is the backward. An
ordinary eager call does not use them, because the dispatcher takes time on the host: it goes through a
`torch.autograd.Function` (`_mode.py`). Both run the same passes over the same kernels.

All modes have the same schemas. An operator cannot return None, so a result that is not asked for is an empty tensor.
The second result is the final state or, in `parallel`, the attention map. The number of states that a forward leaves
for its backward cannot always be computed from a symbolic length: it is then a new symbol.
"""

import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from . import _validation
from ._blocks import count_sequences
from ._plans import Gradients, Inputs, Options, Plan, fp32_precision
from ._private import has_tangent, new_symbolic_size
from ._triton import runs_kernels

if TYPE_CHECKING:
    from ._mode import Mode

INPUTS = 'Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? initial_state, Tensor? cu_seqlens'
FORWARD = f'({INPUTS}, float scale, bool output, bool reverse, str sources) -> (Tensor o, Tensor second, Tensor states)'
BACKWARD = (
    f'({INPUTS}, Tensor states, Tensor? do, Tensor? dht, float scale, bool reverse, bool[] needs) '
    '-> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dh0)'
)
IN_PLACE = (
    f'({INPUTS}, Tensor(a!)? pool, Tensor? state_indices, Tensor(b!)? intermediate_states_buffer, '
    'float scale, bool output, bool reverse, bool state_v_first) -> (Tensor o, Tensor final_state)'
)

# Identifies the sources of this package. The number of states depends on them, and on the variable. `SOURCES` is an
# argument of the operators, so that PyTorch's caches on disk do not take a graph that was made with other sources.
FILES = sorted(pathlib.Path(__file__).parent.rglob('*.py'))
SOURCES = hashlib.sha256(b''.join(path.read_bytes() for path in FILES)).hexdigest()[:16]
SOURCES += os.environ.get('FLA_SIMPLE_GLA_HOPPER', '')


def refuse_tangents(tensors: Iterable[torch.Tensor | None]) -> None:
    """Raise a `NotImplementedError` if one of the tensors has a tangent of forward-mode differentiation."""
    if has_tangent(tensors):
        raise NotImplementedError(
            'the kernels have no forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad)'
        )


@functools.cache
def checks_on_gpu() -> bool:
    """Whether contents on a GPU are to be checked too, which waits for it."""
    return os.environ.get('FLA_SIMPLE_GLA_CHECK') == '1'


def check_contents(inputs: Inputs, cu_seqlens_cpu: torch.Tensor | None = None) -> None:
    """Check the contents of `cu_seqlens` and `state_indices`, on the CPU or where the environment asks for it.

    Elsewhere the check would have to wait for a GPU.
    """
    if inputs.cu_seqlens is None and inputs.state_indices is None:
        return
    if inputs.q.is_cpu or checks_on_gpu():
        pool: Any = inputs.initial_state
        slots = 0 if inputs.state_indices is None else pool.shape[0]
        _validation.check_contents(inputs.cu_seqlens, cu_seqlens_cpu, inputs.state_indices, inputs.q.shape[1], slots)


def final_state_like(inputs: Inputs) -> torch.Tensor:
    """A tensor like the final state."""
    q, v = inputs.q, inputs.v
    N, dtype = count_sequences(q.shape[0], inputs.cu_seqlens), torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(N, v.shape[2], q.shape[3], v.shape[3], dtype=dtype)


def own(x: torch.Tensor | None) -> torch.Tensor | None:
    """A copy of x. Without tokens the naive functions return tensors that they were given; an operator must not."""
    return None if x is None else x.clone(memory_format=torch.contiguous_format)


def or_empty(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """x, or an empty tensor in place of None."""
    return like.new_empty(0) if x is None else x


def states_like(inputs: Inputs, n: Any = 0) -> torch.Tensor:
    """A tensor like n of the states that a forward leaves for its backward."""
    q, v = inputs.q, inputs.v
    return q.new_empty(n, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


class Operators:
    """The operators of one mode.

    The forward saves the tensors that the mode's Function saves, in the same order. Checkpointing compares what is
    saved by the first forward and by the recomputation, and one of the two may call the Function and the other the
    operator.
    """

    def __init__(self, mode: 'Mode'):
        self.mode = mode
        name = f'fla_simple_gla::{mode.name}'
        self.forward = define(name, FORWARD, self.compute, self.describe)
        self.forward.register_autograd(self.differentiate, setup_context=self.save)
        self.backward = define(f'{name}_backward', BACKWARD, self.compute_backward, self.describe_backward)
        if mode.has_states:
            written = 'pool', 'intermediate_states_buffer'
            name += '_in_place'
            self.in_place = define(name, IN_PLACE, self.compute_in_place, self.describe_in_place, written)

    def __call__(self, inputs: Inputs, options: Options) -> tuple[torch.Tensor, torch.Tensor | None]:
        """o, and the second result or None."""
        o, second, _ = self.forward(*inputs[:6], options.scale, options.output, options.reverse, SOURCES)
        if not options.output:
            return o, None
        return o, second if self.mode.has_states else second.detach()

    def compute(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The forward operator."""
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

    def describe(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tensors like the results of the forward operator, for traces."""
        inputs, (_, output, *_) = Inputs(*arguments[:6]), arguments[6:]
        second = self.mode.second_like(inputs) if output else inputs.q.new_empty(0)
        n = self.mode.count_states(inputs)
        return inputs.q.new_empty(inputs.v.shape), second, states_like(inputs, new_symbolic_size() if n is None else n)

    @staticmethod
    def save(ctx: Any, inputs: tuple, output: tuple) -> None:
        """Save for the backward what the forward operator was given and has returned."""
        *tensors, ctx.scale, _, ctx.reverse, _ = inputs
        states = output[2]
        n = states.shape[0]
        ctx.save_for_backward(*tensors, None if isinstance(n, int) and n == 0 else states)
        ctx.set_materialize_grads(False)

    def differentiate(self, ctx: Any, do: torch.Tensor | None, dht: torch.Tensor | None, _: Any) -> tuple:
        """The gradients of all arguments of the forward operator."""
        refuse_tangents((do, dht))
        *tensors, states = ctx.saved_tensors
        options = Options(ctx.scale, reverse=ctx.reverse)
        found = self.gradients(Inputs(*tensors), states, (do, dht), Gradients(*ctx.needs_input_grad[:5]), options)
        return *found, *(None,) * 5

    def gradients(
        self, inputs: Inputs, states: torch.Tensor | None, given: tuple, needs: Gradients, options: Options
    ) -> Gradients:
        """The gradients that are needed, by the backward operator: autograd and traces see it. None for the others."""
        states = states_like(inputs) if states is None else states
        found = self.backward(*inputs[:6], states, *given, options.scale, options.reverse, [*needs])
        return Gradients(*(x if need else None for x, need in zip(found, needs)))

    def compute_backward(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """The backward operator."""
        inputs, (states, do, dht, scale, reverse, needs) = Inputs(*arguments[:6]), arguments[6:]
        needs = Gradients(*needs)
        plan = new_plan(inputs.q, scale, reverse=reverse)
        found: Iterable[torch.Tensor | None]
        if runs_kernels(inputs.q):
            found = self.mode.gradients(inputs.with_rows_in_place(), (states, None), (do, dht), needs, plan)
        else:
            # in another thread: autograd is off in the thread in which an operator runs
            with ThreadPoolExecutor(1) as thread:
                found = thread.submit(self.naive_gradients, inputs, (do, dht), needs, plan.options).result()
        return tuple(or_empty(x, inputs.q).contiguous() for x in found)

    def naive_gradients(
        self, inputs: Inputs, given: tuple, needs: Gradients, options: Options
    ) -> list[torch.Tensor | None]:
        """The gradients that are needed, by autograd from the naive function; None for the others."""
        leaves: list[Any] = [None if x is None else x.detach().requires_grad_(need) for x, need in zip(inputs, needs)]
        q, k, v, g, initial_state = leaves
        inputs = Inputs(q, k, v, g, initial_state, inputs.cu_seqlens)
        results = self.mode.naive(inputs, options._replace(output=given[1] is not None))
        pairs = [(x, dx) for x, dx in zip(results, given) if dx is not None and x.requires_grad]
        wanted = [x for x, need in zip(leaves, needs) if need]
        if not pairs:  # a final state does not depend on q
            return [torch.zeros_like(x) if need else None for x, need in zip(leaves, needs)]
        outputs, gradients = zip(*pairs)
        found = iter(torch.autograd.grad(outputs, wanted, gradients, materialize_grads=True))
        return [own(next(found)) if need else None for need in needs]

    @staticmethod
    def describe_backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
        """Tensors like the results of the backward operator, for traces."""
        inputs: Any = Inputs(*arguments[:6])
        needs = arguments[-1]
        return tuple(x.new_empty(x.shape) if need else inputs.q.new_empty(0) for x, need in zip(inputs, needs))

    def write(self, inputs: Inputs, v_first: bool, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        """o, and the final state: an empty tensor if it is not asked for, or is written to a pool."""
        *tensors, state, cu_seqlens, indices, buffer = inputs
        # with indices the state is a pool, which is written
        state, pool = (state, None) if indices is None else (None, state)
        options = plan.options
        written = pool, indices, buffer
        return self.in_place(
            *tensors, state, cu_seqlens, *written, options.scale, options.output, options.reverse, v_first
        )

    def compute_in_place(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The operator that writes states in place."""
        inputs, (pool, indices, buffer, scale, output, reverse, v_first) = Inputs(*arguments[:6]), arguments[6:]
        refuse_tangents((*inputs, pool))
        state = inputs.initial_state if pool is None else pool
        inputs = inputs._replace(initial_state=state, state_indices=indices, states=buffer)
        check_contents(inputs)
        results: Any = self.mode.run_in_place(inputs, v_first, new_plan(inputs.q, scale, output, reverse))
        if not runs_kernels(inputs.q):
            results = map(own, results)
        o, final_state = results
        return o, or_empty(final_state, inputs.q)

    @staticmethod
    def describe_in_place(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Tensors like the results of the operator that writes in place, for traces."""
        inputs, (_, indices, _, _, output, *_) = Inputs(*arguments[:6]), arguments[6:]
        final_state = final_state_like(inputs) if output and indices is None else inputs.q.new_empty(0)
        return inputs.q.new_empty(inputs.v.shape), final_state


def define(name: str, schema: str, compute: Callable, describe: Callable, written: tuple[str, ...] = ()) -> Any:
    """A new operator, and what a trace needs to know of it."""
    defined = torch.library.custom_op(name, compute, mutates_args=written, schema=schema)
    defined.register_fake(describe)
    return defined


def new_plan(q: torch.Tensor, scale: float, output: bool = False, reverse: bool = False) -> Plan:
    """A plan for one run of an operator."""
    return Plan(Options(scale, output, reverse, precision=fp32_precision(q.dtype)))
