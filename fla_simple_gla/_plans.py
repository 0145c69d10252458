"""What travels through a mode, and plans: what calls with arguments of the same types and layouts have in common.

Whether arguments are right, which kernels suit them and how long segments are follows from the types and layouts of the tensors and from
the options: the first call with some finds out, and leaves a plan for the others.

Memory: a plan and its key have some 3 KB beside the records of its passes (`_passes.py`), and at most 2,048 plans are kept
(`_cache.py`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ._cache import Cache
from ._layout import rows_in_place
from ._passes import shared
from ._private import is_zero_tensor
from ._triton import runs_kernels
from ._validation import TENSORS, Call, check_call

# What PyTorch hands out for memory of its own. Others may have none, though they tell an address: they are checked at every call.
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
PLAIN_OR_NONE = PLAIN | {type(None)}


class Inputs(NamedTuple):
    """The tensors that a mode computes from; states are `[N, H, K, V]`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None
    initial_state: torch.Tensor | None  # with state_indices a pool, which is written
    cu_seqlens: torch.Tensor | None
    state_indices: torch.Tensor | None = None
    states: torch.Tensor | None = None  # a buffer that gets the state after every token

    def with_rows_in_place(self) -> 'Inputs':
        """These, with copies of q, k and v where kernels cannot read them as they lie."""
        if self.q.stride(-1) == self.k.stride(-1) == self.v.stride(-1) == 1:
            return self
        return Inputs(*map(rows_in_place, self[:3]), *self[3:])


class Gradients(NamedTuple):
    """Of each input its gradient, or whether it is needed."""

    q: Any
    k: Any
    v: Any
    g: Any
    initial_state: Any


class Results(NamedTuple):
    """What the forward of a mode leaves."""

    o: torch.Tensor
    second: torch.Tensor | None  # the final state or, of `parallel`, the attention map
    states: torch.Tensor | None = None  # for the backward: saved by autograd, and a result of the operator
    gates: Any = None  # for the backward too, but so small that the operator computes it again


class Options(NamedTuple):
    """What a mode is to compute, as far as it is no tensor."""

    scale: float
    output: bool = False  # whether the second result is wanted
    reverse: bool = False
    chunk_size: int = 64  # of the naive functions
    precision: str | None = None  # of fp32 products, as `tl.dot` takes it


class Plan:
    def __init__(self, options: Options, needs_operator: bool = False):
        self.options = options
        self.needs_operator = needs_operator  # such tensors are for the operators (`_operators.py`)
        self.reads_in_place = False  # kernels read q, k and v as they lie
        self.cached = False  # for later calls, all of whose tensors are plain ones
        self.choices = {}
        self.records = {}  # of the passes that are called with it (`_passes.py`)

    def once(self, choose: Callable, *args):
        """What `choose(*args)` returned the first time, which depends on nothing but the layouts."""
        if choose not in self.choices:
            self.choices[choose] = choose(*args)
        return self.choices[choose]


plans = Cache(1024)


def plan_for(call: Call) -> Plan:
    """The plan of a call, whose arguments are checked if they are the first ones of their kind, or have no memory of their own."""
    compiling = torch.compiler.is_compiling()
    key = plan = None
    if not compiling:
        try:
            key = plan_key(call)
            plan = None if key is None else plans.get(key)
        except (AttributeError, TypeError, RuntimeError, NotImplementedError):
            key = None  # something else than a tensor or a number, or without strides
    if plan is None:
        options = Options(
            scale=check_call(call), output=bool(call.output_final_state or call.output_attentions), reverse=bool(call.reverse),
            chunk_size=call.chunk_size or 64, precision=None if compiling else fp32_precision(call.q.dtype),
        )
        plan = Plan(options, compiling or any(map(needs_operator, call.tensors())))
        if key is not None:
            plan.cached = True
            plan.reads_in_place = all(x.stride(-1) == 1 for x in (call.q, call.k, call.v))
            plans[key] = plan
    return plan


def plan_key(call: Call) -> tuple | None:
    """The options, and the types and layouts of all tensors; None where a tensor may have no memory of its own."""
    tensors, options = call[:TENSORS], call[TENSORS:]
    if not PLAIN_OR_NONE.issuperset(map(type, tensors)):
        return None
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    if 0 in addresses and any(address == 0 and x.numel() for x, address in zip(tensors, addresses)):
        return None
    found = [
        None if x is None else (x.dtype, x.shape, x.stride(), x.device, x.is_neg(), address % 16) for x, address in zip(tensors, addresses)
    ]
    precision = fp32_precision(torch.float32) if call.q.dtype is torch.float32 else None
    # the types of the options, too: 1 + 0j equals 1.0, but is no scale
    return options, tuple(map(type, options)), tuple(found), shared(addresses), precision


def needs_operator(x: torch.Tensor) -> bool:
    """Whether there is no memory to read, or kernels would misread it.

    Such an x is a subclass with its own `__torch_dispatch__`, has no memory, or is a view whose values PyTorch negates when they are read.
    """
    if type(x) not in PLAIN and type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return True
    if x.is_meta or is_zero_tensor(x):
        return True
    return x.is_neg() and runs_kernels(x)


def fp32_precision(dtype: torch.dtype) -> str | None:
    """How fp32 products are computed: to fp32 accuracy, or in tf32 where the user has allowed it in PyTorch."""
    if dtype != torch.float32:
        return None
    matmul = torch.backends.cuda.matmul
    # since torch 2.9 there is a new setting, which follows the older ones, while these raise once it was used
    if matmul.fp32_precision == 'tf32' if hasattr(matmul, 'fp32_precision') else matmul.allow_tf32:
        return 'tf32'
    return 'ieee' if torch.version.hip else 'tf32x3'
