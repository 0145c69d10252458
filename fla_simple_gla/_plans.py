"""What is passed through a mode; and plans, which hold what calls with the same types and layouts have in common.

Whether the arguments are right, which kernels take them and how long segments are follows from the options and from the
types and layouts of the tensors. The first call with some options, types and layouts finds out, and leaves a plan for
later ones.

Memory: a plan and its key take some 3 KB, and the records of its passes some more (`_passes.py`). At most `MAX_PLANS`
plans are kept (`_cache.py`).
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

MAX_PLANS = 2048
# The types of tensors with memory of PyTorch's own. Other types may have no memory even if they have an address: they
# are checked at every call.
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
PLAIN_OR_NONE = PLAIN | {type(None)}


class Inputs(NamedTuple):
    """The tensors that a mode computes from. States are `[N, H, K, V]`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None
    initial_state: torch.Tensor | None  # with state_indices a pool, to which the final states are written
    cu_seqlens: torch.Tensor | None
    state_indices: torch.Tensor | None = None
    states: torch.Tensor | None = None  # a buffer that gets the state after every token

    def with_rows_in_place(self) -> 'Inputs':
        """The same inputs, with copies of q, k and v where kernels cannot read their layouts."""
        if self.q.stride(-1) == self.k.stride(-1) == self.v.stride(-1) == 1:
            return self
        q, k, v = map(rows_in_place, (self.q, self.k, self.v))
        return Inputs(q, k, v, *self[3:])


class Gradients(NamedTuple):
    """One item for each input: its gradient, or whether that is needed."""

    q: Any
    k: Any
    v: Any
    g: Any
    initial_state: Any


class Results(NamedTuple):
    """What the forward of a mode returns."""

    o: torch.Tensor
    second: torch.Tensor | None  # the final state or, of `parallel`, the attention map
    states: torch.Tensor | None = None  # for the backward: autograd saves it, and the operator returns it
    gates: Any = None  # for the backward too, but so little work that the operator computes it again


class Options(NamedTuple):
    """The arguments of a mode that are no tensors."""

    scale: float
    output: bool = False  # whether the second result is wanted
    reverse: bool = False
    chunk_size: int = 64  # of the naive functions
    precision: str | None = None  # of fp32 products, as `tl.dot` takes it


class Plan:
    """What calls with the same options, types and layouts have in common."""

    def __init__(self, options: Options, needs_operator: bool = False):
        self.options = options
        self.needs_operator = needs_operator  # whether the operators take the call (`_operators.py`)
        self.reads_in_place = False  # whether kernels can read q, k and v in their layouts
        self.cached = False  # whether later calls get this plan; then all their tensors are of types in PLAIN
        self.choices: dict[Callable, Any] = {}
        self.records: dict[Callable, Any] = {}  # by pass, for those that are called with this plan (`_passes.py`)

    def once(self, choose: Callable, *args: Any) -> Any:
        """What `choose(*args)` returned at the first call. It must depend on nothing but the plan's key."""
        if choose not in self.choices:
            self.choices[choose] = choose(*args)
        return self.choices[choose]


plans = Cache(MAX_PLANS // 2)


def plan_for(call: Call) -> Plan:
    """The plan for a call.

    The arguments are checked at the first call with their types and layouts. They are checked at every call if a tensor
    may have no memory of its own.
    """
    compiling = torch.compiler.is_compiling()
    key = plan = None
    if not compiling:
        try:
            key = plan_key(call)
            plan = None if key is None else plans.get(key)
        except (AttributeError, TypeError, RuntimeError, NotImplementedError):
            key = None  # an argument that is neither a tensor nor a number, or a tensor without strides
    if plan is None:
        options = Options(
            scale=check_call(call),
            output=bool(call.output_final_state or call.output_attentions),
            reverse=bool(call.reverse),
            chunk_size=call.chunk_size or 64,
            precision=None if compiling else fp32_precision(call.q.dtype),
        )
        plan = Plan(options, compiling or any(map(needs_operator, call.tensors())))
        if key is not None:
            plan.cached = True
            plan.reads_in_place = all(x.stride(-1) == 1 for x in (call.q, call.k, call.v))
            plans[key] = plan
    return plan


def plan_key(call: Call) -> tuple | None:
    """The options, and the layouts of all tensors; None where a tensor may have no memory of its own."""
    tensors: tuple[Any, ...] = call[:TENSORS]
    options = call[TENSORS:]
    if not PLAIN_OR_NONE.issuperset(map(type, tensors)):
        return None
    addresses: list[Any] = [None if x is None else x.data_ptr() for x in tensors]
    if 0 in addresses and any(address == 0 and x.numel() for x, address in zip(tensors, addresses)):
        return None
    found = [
        None if x is None else (x.dtype, x.shape, x.stride(), x.device, x.is_neg(), address % 16)
        for x, address in zip(tensors, addresses)
    ]
    precision = fp32_precision(torch.float32) if call.q.dtype is torch.float32 else None
    # with the types of the options: 1 + 0j equals 1.0, but is no scale
    return options, tuple(map(type, options)), tuple(found), shared(addresses), precision


def needs_operator(x: torch.Tensor) -> bool:
    """Whether x has no memory that kernels can read, or whether they would misread it.

    This is so if x is a subclass with its own `__torch_dispatch__`, if it has no memory, or if it is a lazily negated
    view: PyTorch negates the values of such a view when it reads them.
    """
    if type(x) not in PLAIN and type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return True
    if x.is_meta or is_zero_tensor(x):
        return True
    return x.is_neg() and runs_kernels(x)


def fp32_precision(dtype: torch.dtype) -> str | None:
    """The precision of fp32 products, as `tl.dot` takes it: fp32 accuracy, or tf32 where the user allows it in PyTorch.

    It is None for other dtypes.
    """
    if dtype != torch.float32:
        return None
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 there is a new setting. It follows the older ones; but once it was used, reading those raises.
    if matmul.fp32_precision == 'tf32' if hasattr(matmul, 'fp32_precision') else matmul.allow_tf32:
        return 'tf32'
    return 'ieee' if torch.version.hip else 'tf32x3'
