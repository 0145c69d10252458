"""The modes as operators of PyTorch's dispatcher, for all that see operators and not Python.

A compiler traces a call without running it; fake and meta tensors have shapes and no memory; a `TorchDispatchMode` watches what is
computed. They get a mode as a few opaque operators `torch.ops.fla_simple_gla.<mode>`, with what a trace needs to know: the shapes of the
results, what is written in place, and the operator of the backward. An ordinary eager call goes past them, and past the dispatcher's time
on the host, through the mode's `torch.autograd.Function`; both end in the same passes over the same kernels.

All modes have the same schemas. A result that is not asked for is an empty tensor, since an operator cannot return None. How many
tensors of states a forward leaves for its backward can depend on the length in a way that no formula of symbols has: where the length is a
symbol so is their number, a new one. The second result is the final state or, of `parallel`, the attention map.
"""

import hashlib
import os
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch._library.fake_impl import allocate_size
from torch.autograd import forward_ad

from ._blocks import count_sequences
from ._launch import Plan
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
SOURCES = hashlib.sha256(b''.join(path.read_bytes() for path in sorted(pathlib.Path(__file__).parent.glob('*.py')))).hexdigest()[:16]
SOURCES += os.environ.get('FLA_SIMPLE_GLA_HOPPER', '')


def way_of(plan: Plan, *tensors: torch.Tensor | None) -> str:
    """By what a call with such tensors, the first of which is q, is computed: 'operators', 'kernels' or, on the CPU, 'naive'."""
    by_operators = plan.operator or torch.compiler.is_compiling()
    if not by_operators and not runs_kernels(tensors[0]):
        return 'naive'
    refuse_tangents(*tensors)
    if by_operators:
        return 'operators'
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            'the kernels do not support the transforms of torch.func (grad, vjp, vmap, ...): take gradients with torch.autograd, and '
            'put what is to be mapped over into the batch, the first dimension of q, k, v and g'
        )
    return 'operators' if torch._C._len_torch_dispatch_stack() else 'kernels'


def apply(function: type[torch.autograd.Function], plan: Plan, *arguments):
    """`function.apply`, without what PyTorch does there for the transforms that `way_of` refuses, at every call."""
    return (super(torch.autograd.Function, function) if plan.kept else function).apply(*arguments)


def goes_by_operator(*gradients: torch.Tensor | None) -> bool:
    """Whether the backward of a mode's autograd.Function is for the operator: it is traced (compiled autograd), what it returns may be
    differentiated again, which the operator's results refuse, or a gradient has its sign to come.
    """
    refuse_tangents(*gradients)
    return torch.compiler.is_compiling() or torch.is_grad_enabled() or any(x is not None and x.is_neg() for x in gradients)


def refuse_tangents(*tensors: torch.Tensor | None) -> None:
    if forward_ad._current_level >= 0 and any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError('the kernels have no forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad)')


def operator(name: str, schema: str, compute: Callable, describe: Callable, written: tuple[str, ...] = ()):
    defined = torch.library.custom_op(name, compute, mutates_args=written, schema=schema)
    defined.register_fake(describe)
    return defined


def final_state_like(q, v, cu_seqlens):
    N, dtype = count_sequences(q.shape[0], cu_seqlens), torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(N, v.shape[2], q.shape[3], v.shape[3], dtype=dtype)


def own(x: torch.Tensor | None) -> torch.Tensor | None:
    """A copy: where there are no tokens the naive functions return what they were given."""
    return None if x is None else x.clone(memory_format=torch.contiguous_format)


class Operators:
    """The operators of one mode.

    - `forward(q, k, v, g, initial_state, cu_seqlens, scale, output, reverse)` returns o, the final state (of `parallel` the attention map)
      or None, and states for the backward or None; `naive`, for the CPU, the first two.
    - `backward(q, k, v, g, initial_state, cu_seqlens, states, do, dht, scale, reverse, needs)` returns five gradients, or None for those
      that are not needed.
    - `count_states(q, v, cu_seqlens)` is the number of those states, or None where it takes more than symbols to tell.
    - `in_place(...)`, with the arguments of `write`, returns o and the final state or None.

    A forward saves the tensors that the mode's Function saves, in the same order: checkpointing compares them, and may call the one at
    first and the other when it computes again.
    """

    def __init__(self, mode, forward, backward, naive, in_place=None, second_like=final_state_like, count_states=lambda *_: 0):
        self.naive, self.second_like, self.count_states = naive, second_like, count_states
        self.run_forward, self.run_backward, self.run_in_place = forward, backward, in_place
        name = f'fla_simple_gla::{mode}'
        self.forward = operator(name, FORWARD, self.compute, self.describe)
        self.forward.register_autograd(self.differentiate, setup_context=self.save)
        self.backward = operator(f'{name}_backward', BACKWARD, self.compute_backward, self.describe_backward)
        if in_place is not None:
            self.in_place = operator(
                f'{name}_in_place', IN_PLACE, self.compute_in_place, self.describe_in_place,
                ('pool', 'intermediate_states_buffer'),
            )

    def __call__(self, q, k, v, g, initial_state, cu_seqlens, scale, output, reverse=False):
        """o, and the second result or None."""
        o, second, _ = self.forward(q, k, v, g, initial_state, cu_seqlens, scale, output, reverse, SOURCES)
        return o, second if output else None

    def compute(self, q, k, v, g, initial_state, cu_seqlens, scale, output, reverse, sources):
        refuse_tangents(q, k, v, g, initial_state)
        if runs_kernels(q):
            results = self.run_forward(q, k, v, g, initial_state, cu_seqlens, scale, output, reverse)
        else:
            results = self.naive(q, k, v, g, initial_state, cu_seqlens, scale, output, reverse)
            results = *map(own, results), None
        o, second, states = results
        return o, q.new_empty(0) if second is None else second, self.states(q, v) if states is None else states

    def describe(self, q, k, v, g, initial_state, cu_seqlens, scale, output, reverse, sources):
        second = self.second_like(q, v, cu_seqlens) if output else q.new_empty(0)
        n = self.count_states(q, v, cu_seqlens)
        if n is None:
            # Not `new_dynamic_size`, which ends in this: it refuses where graphs may break, and with torch 2.8 and 2.9 everywhere, unless
            # `capture_dynamic_output_shape_ops` is set. That is for sizes that depend on data.
            n = allocate_size(torch.library.get_ctx()._shape_env)
        return q.new_empty(v.shape), second, self.states(q, v, n)

    @staticmethod
    def states(q, v, n=0):
        return q.new_empty(n, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)

    @staticmethod
    def save(ctx, inputs, output):
        *tensors, ctx.scale, _, ctx.reverse, _ = inputs
        states = output[2]
        n = states.shape[0]
        ctx.save_for_backward(*tensors, None if isinstance(n, int) and n == 0 else states)
        ctx.set_materialize_grads(False)

    def differentiate(self, ctx, do, dht, _):
        refuse_tangents(do, dht)
        *tensors, states = ctx.saved_tensors
        return *self.gradients(*tensors, states, do, dht, ctx.scale, ctx.reverse, ctx.needs_input_grad[:5]), *(None,) * 5

    def gradients(self, q, k, v, g, initial_state, cu_seqlens, states, do, dht, scale, reverse, needs):
        """By the operator of the backward, where autograd and traces see it: None where none is needed."""
        states = self.states(q, v) if states is None else states
        found = self.backward(q, k, v, g, initial_state, cu_seqlens, states, do, dht, scale, reverse, needs)
        return tuple(x if need else None for x, need in zip(found, needs))

    def compute_backward(self, q, k, v, g, initial_state, cu_seqlens, states, do, dht, scale, reverse, needs):
        if runs_kernels(q):
            gradients = self.run_backward(q, k, v, g, initial_state, cu_seqlens, states, do, dht, scale, reverse, needs)
        else:
            inputs = q, k, v, g, initial_state

            def differentiate():
                leaves = [x.detach().requires_grad_(need) if x is not None else None for x, need in zip(inputs, needs)]
                results = self.naive(*leaves, cu_seqlens, scale, dht is not None, reverse)
                given = [(x, dx) for x, dx in zip(results, (do, dht)) if dx is not None and x.requires_grad]
                wanted = [x for x, need in zip(leaves, needs) if need]
                if not given:  # a final state does not depend on q
                    return [torch.zeros_like(x) if need else None for x, need in zip(leaves, needs)]
                outputs, gradients = zip(*given)
                found = iter(torch.autograd.grad(outputs, wanted, gradients, materialize_grads=True))
                return [next(found) if need else None for need in needs]

            # in a thread of its own: in the one that an operator runs in, autograd sees nothing
            with ThreadPoolExecutor(1) as thread:
                gradients = [own(x) for x in thread.submit(differentiate).result()]
        return tuple(x.contiguous() if x is not None else q.new_empty(0) for x in gradients)

    @staticmethod
    def describe_backward(q, k, v, g, initial_state, cu_seqlens, states, do, dht, scale, reverse, needs):
        return tuple(x.new_empty(x.shape) if need else q.new_empty(0) for x, need in zip((q, k, v, g, initial_state), needs))

    def write(self, q, k, v, g, initial_state, cu_seqlens, state_indices, *others):
        """o, and the final state, if it is asked for and not in a pool."""
        # with indices it is a pool, which is written
        states = (initial_state, None) if state_indices is None else (None, initial_state)
        return self.in_place(q, k, v, g, states[0], cu_seqlens, states[1], state_indices, *others)

    def compute_in_place(self, q, k, v, g, initial_state, cu_seqlens, pool, *others):
        refuse_tangents(q, k, v, g, initial_state, pool)
        results = self.run_in_place(q, k, v, g, initial_state if pool is None else pool, cu_seqlens, *others)
        o, final_state = results if runs_kernels(q) else map(own, results)
        return o, q.new_empty(0) if final_state is None else final_state

    @staticmethod
    def describe_in_place(q, k, v, g, initial_state, cu_seqlens, pool, state_indices, buffer, scale, output, reverse, state_v_first):
        return q.new_empty(v.shape), final_state_like(q, v, cu_seqlens) if output and state_indices is None else q.new_empty(0)
