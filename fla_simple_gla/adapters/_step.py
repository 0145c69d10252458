"""One token of a selective state space model, for decoding, under the name and with the parameters of mamba_ssm.

    dt  = softplus(dt + dt_bias)
    h   = exp(dt A) h + dt x B^T          h: [P, N], in place
    out = (h C + D x) * silu(z)

A program owns one head of one sequence and a tile of rows of the state, with the whole of N, so that out needs no sum
over programs. The tile stays in fp32 registers, and all arithmetic is in fp32. The state is nearly all that a step
moves.

With Mamba-2, A, dt and dt_bias are one number for each head, expanded to P and N: the tile then has one decay. With
Mamba-1, A is dense, and each number of the tile has its own. The strides tell which it is (`is_tied`).

What a call needs to know of its tensors follows from their types and layouts. The first call with such types and
layouts finds it out, and leaves a plan for later ones, which also holds the record of the pass (`_passes.py`).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import _validation
from .._blocks import state_slot
from .._cache import Cache
from .._launch import launcher
from .._layout import cdiv, next_power_of_2, strides
from .._passes import device_pass, empty, shared
from .._plans import PLAIN, PLAIN_OR_NONE, needs_operator
from .._private import none_is_active
from .._triton import jit, kernel_name, runs_kernels, tl
from ..fused_recurrent import state_offsets
from ._scan import step_size

MAX_PLANS = 2048

# How much of a state one program takes, in `step_config`. A warp takes 1024 numbers, 32 to a thread: with more, fewer
# warps fit on a multiprocessor. Microseconds at 128 heads, P 64, N 128 on one H200 (triton 3.6), in a CUDA graph:
#                          batch    1     16     64    256               1     16     64    256
#   1 warp,  8 rows   fp32       2.94   35.5    130    508    bf16    2.46   13.1   66.7    258
#   2 warps, 16 rows             2.77   35.7    129    506            2.31   13.0   65.5    253
#   4 warps, 32 rows             3.01   34.8    128    504
#   8 warps, 64 rows             3.32   34.9    129    506            2.48   12.7   65.8    255
WARP_NUMBERS = 1024
WARPS = 2
COLUMN_BYTES = 128  # where P is contiguous: so much of every column


@jit(do_not_specialize=['batch', 'slots'], repr=kernel_name('ssd_step'))
def step_kernel(
    state,  # [slots, H, P, N], any strides: read, and written
    x, dt,  # [batch, H, P], any strides; dt [batch, H, any] if TIED
    A,  # [H, P, N], any strides; [H, any, any] if TIED
    B, C,  # [batch, H // GROUP, N], any strides
    D,  # [H, P], any strides, or None
    z,  # [batch, H, P], any strides, or None
    dt_bias,  # [H, P], any strides, or None; [H, any] if TIED
    indices,  # [batch]: the slots of the states; or None
    out,  # [batch, H, P]
    batch, slots,
    s_b, s_h,
    x_b, x_h, x_p,
    dt_b, dt_h, dt_p,
    A_h,
    B_b, B_h, B_n,
    C_b, C_h, C_n,
    D_h,
    z_b, z_h, z_p,
    bias_h, bias_p,
    s_p: tl.constexpr, s_n: tl.constexpr,
    A_p: tl.constexpr, A_n: tl.constexpr,
    D_p: tl.constexpr,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    GROUP: tl.constexpr,  # heads that read the same B and C
    BP: tl.constexpr, BN: tl.constexpr,
    TIED: tl.constexpr,  # one step size for each head of a sequence, and one A for each head
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """The new state and out of one head of one sequence, in BP rows."""
    NP: tl.constexpr = (P + BP - 1) // BP
    i_b = (tl.program_id(0) // (NP * H)).to(tl.int64)
    i_h = (tl.program_id(0) // NP % H).to(tl.int64)
    o_p = tl.program_id(0) % NP * BP + tl.arange(0, BP)
    o_n = tl.arange(0, BN)
    m_p = o_p < P
    m_n = o_n < N
    m_s = m_p[:, None] & m_n[None, :]
    p_out = out + (i_b * H + i_h) * P + o_p
    i_s = state_slot(indices, i_b, batch, slots)
    if indices is not None:
        if i_s < 0:
            tl.store(p_out, tl.zeros([BP], tl.float32), mask=m_p)
            return

    # The state should stay in the L2 cache until it is written back.
    p_s = state + i_s * s_b + i_h * s_h + state_offsets(o_p, o_n, P, N, s_p, s_n)
    b_s = tl.load(p_s, mask=m_s, other=0.0, eviction_policy='evict_last')
    # All loads are issued before any is used: the compiler moves no load across a wait of warps for each other.
    l_p = o_p.to(tl.int64)
    l_n = o_n.to(tl.int64)
    b_x = tl.load(x + i_b * x_b + i_h * x_h + l_p * x_p, mask=m_p, other=0.0)
    b_B = tl.load(B + i_b * B_b + i_h // GROUP * B_h + l_n * B_n, mask=m_n, other=0.0)
    b_C = tl.load(C + i_b * C_b + i_h // GROUP * C_h + l_n * C_n, mask=m_n, other=0.0)
    dt += i_b * dt_b + i_h * dt_h
    A += i_h * A_h
    bias = 0.0
    if TIED:
        b_dt = tl.load(dt)
        b_A = tl.load(A)
        if dt_bias is not None:
            bias = tl.load(dt_bias + i_h * bias_h).to(tl.float32)
    else:
        b_dt = tl.load(dt + l_p * dt_p, mask=m_p, other=0.0)
        b_A = tl.load(A + state_offsets(o_p, o_n, P, N, A_p, A_n), mask=m_s, other=0.0)
        if dt_bias is not None:
            bias = tl.load(dt_bias + i_h * bias_h + l_p * bias_p, mask=m_p, other=0.0).to(tl.float32)
    if D is not None:
        if D_p == 0:
            b_D = tl.load(D + i_h * D_h)
        else:
            b_D = tl.load(D + i_h * D_h + l_p * D_p, mask=m_p, other=0.0)
    if z is not None:
        b_z = tl.load(z + i_b * z_b + i_h * z_h + l_p * z_p, mask=m_p, other=0.0)

    b_x = b_x.to(tl.float32)
    b_dt, _ = step_size(b_dt, bias, float('-inf'), float('inf'), SOFTPLUS)
    if TIED:
        decay = tl.exp(b_dt * b_A.to(tl.float32))
    else:
        decay = tl.exp(b_dt[:, None] * b_A.to(tl.float32))
    b_s = tl.fma((b_dt * b_x)[:, None], b_B.to(tl.float32)[None, :], b_s.to(tl.float32) * decay)
    # The state is stored before the sum over N, for which warps may wait for each other.
    tl.store(p_s, b_s, mask=m_s)
    b_out = tl.sum(b_s * b_C.to(tl.float32)[None, :], 1)
    if D is not None:
        b_out += b_D.to(tl.float32) * b_x
    if z is not None:
        b_z = b_z.to(tl.float32)
        b_out *= b_z * tl.sigmoid(b_z)
    tl.store(p_out, b_out, mask=m_p)


class Tensors(NamedTuple):
    """The arguments of a step that are tensors."""

    state: torch.Tensor
    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    dt_bias: torch.Tensor | None
    state_batch_indices: torch.Tensor | None

    def with_heads(self) -> 'Tensors':
        """The same, where tensors that lack the dimension of heads or groups have one, of size 1."""
        ranks = (4, 3, 3, 3, 3, 3, 2, 3, 2, 1)
        places = (1, 1, 1, 0, 1, 1, 0, 1, 0, 0)
        found: Any = (
            x if x is None or x.dim() == rank else x.unsqueeze(place) for x, rank, place in zip(self, ranks, places)
        )
        return Tensors(*found)


class Plan:
    """What calls with the same types and layouts have in common. A call has one only if its arguments are right."""

    cached = True  # later calls get the same plan: `device_pass` asks

    def __init__(self, takes_kernels: bool):
        self.takes_kernels = takes_kernels
        self.records: dict = {}  # of the pass (`_passes.py`)


plans = Cache(MAX_PLANS // 2)


def plan_for(given: Tensors, softplus: bool) -> Plan:
    """The plan for a call, whose arguments are checked where there is none yet."""
    key = plan_key(given, softplus)
    plan = None if key is None else plans.get(key)
    if plan is None:
        check(given, softplus)
        plan = Plan(key is not None and takes_kernels(given))
        if key is not None:
            plans[key] = plan
    return plan


def plan_key(given: Tensors, softplus: bool) -> tuple | None:
    """The option, and the layouts of all tensors; None where a tensor may have no memory of its own."""
    if not PLAIN_OR_NONE.issuperset(map(type, given)):
        return None
    tensors: tuple[Any, ...] = given
    addresses: list[Any] = [None if x is None else x.data_ptr() for x in tensors]
    if 0 in addresses:
        return None
    try:
        found = [
            None if x is None else (x.dtype, x.shape, x.stride(), x.device, x.is_neg(), address % 16)
            for x, address in zip(tensors, addresses)
        ]
    except RuntimeError:  # a tensor without strides
        return None
    # with the type of the option: 1 equals True, but is no bool
    return softplus, type(softplus), *found, shared(addresses)


def takes_kernels(given: Tensors) -> bool:
    """Whether kernels compute these tensors in an ordinary eager call."""
    floats = [x for x in given[:-1] if x is not None]
    return not any(map(needs_operator, floats)) and all(map(runs_kernels, floats))


class StepConfig(NamedTuple):
    """How a step is cut: BP rows of the state and `warps` to a program."""

    BP: int
    warps: int


def step_config(state: torch.Tensor) -> StepConfig:
    """Configuration of a step with this state.

    It does not depend on the batch: a sequence gets the same bits in any.
    """
    P, N = state.shape[2:]
    BP, BN = next_power_of_2(P), next_power_of_2(N)
    if state.stride(3) > state.stride(2) and N > 1:
        BP = min(BP, COLUMN_BYTES // state.itemsize)
    else:
        BP = min(BP, max(1, WARPS * WARP_NUMBERS // BN))
    return StepConfig(BP, max(1, BP * BN // WARP_NUMBERS))


def is_tied(dt: torch.Tensor, A: torch.Tensor, dt_bias: torch.Tensor | None) -> bool:
    """Whether there is one step size for each head of a sequence, and one A for each head: all else is expanded."""
    dims = [(dt, 2), (A, 1), (A, 2)] + ([] if dt_bias is None else [(dt_bias, 1)])
    return all(x.stride(dim) == 0 or x.shape[dim] == 1 for x, dim in dims)


@launcher
def launch_step(tensors, softplus: bool):
    state, x, dt, A, B, C, D, z, dt_bias, indices, _ = tensors
    slots, H, P, N = state.shape
    batch = x.shape[0]
    BP, warps = step_config(state)
    args = (
        *tensors, batch, slots,
        *strides(state, 2), *strides(x, 3), *strides(dt, 3), *strides(A, 1), *strides(B, 3), *strides(C, 3),
        *strides(D, 1), *strides(z, 3), *strides(dt_bias, 2),
    )  # fmt: skip
    constants = dict(
        s_p=state.stride(2), s_n=state.stride(3), A_p=A.stride(1), A_n=A.stride(2), D_p=0 if D is None else D.stride(1),
        H=H, P=P, N=N, GROUP=H // B.shape[1], BP=BP, BN=next_power_of_2(N),
        TIED=is_tied(dt, A, dt_bias), SOFTPLUS=softplus, num_warps=warps,
    )  # fmt: skip
    return step_kernel, (batch * H * cdiv(P, BP), 1, 1), args, constants


@device_pass
def forward_pass(tensors: tuple, softplus: bool) -> tuple:
    given = Tensors(*tensors)
    out = empty(given.x, *shape_of_out(given))
    launch_step((*given.with_heads(), out), softplus)
    return (out,)


def shape_of_out(given: Tensors) -> tuple[int, ...]:
    """`[batch, nheads, dim]`, or `[batch, dim]` if the states have no heads."""
    return given.x.shape[0], *given.state.shape[1:-1]


def composed(given: Tensors, softplus: bool) -> torch.Tensor:
    """out, by operations of PyTorch, which write the states."""
    shape = shape_of_out(given)
    if given.x.shape[0] == 0:
        return given.x.new_empty(shape)
    state, x, dt, A, B, C, D, z, dt_bias, indices = given.with_heads()
    dtype = torch.promote_types(torch.promote_types(state.dtype, x.dtype), torch.float32)
    old = state
    if indices is not None:
        # Padding reads and writes the slot of the first sequence that has one, and writes what that one does. If there
        # is none, it writes what it has read.
        has_slot = (indices >= 0) & (indices < state.shape[0])
        rows = torch.where(has_slot, torch.arange(len(indices), device=x.device), has_slot.int().argmax())
        slots = indices[rows].clamp(0, state.shape[0] - 1).long()
        old = state[slots]
    old, x, dt = (tensor.to(dtype) for tensor in (old, x, dt))
    B, C = (tensor.to(dtype).repeat_interleave(x.shape[1] // B.shape[1], 1)[:, :, None] for tensor in (B, C))
    if dt_bias is not None:
        dt = dt + dt_bias
    if softplus:
        dt = F.softplus(dt)
    new = old * (dt[..., None] * A).exp() + (dt * x)[..., None] * B
    out = (new * C).sum(-1)
    if D is not None:
        out = out + D * x
    if z is not None:
        out = out * F.silu(z.to(dtype))
    if indices is None:
        state.copy_(new)
    else:
        out = torch.where(has_slot[:, None, None], out, 0.0)
        new = torch.where(has_slot[rows][:, None, None, None], new[rows], old)
        state.index_put_((slots,), new.to(state.dtype))
    return out.to(given.x.dtype).view(shape)


def check(given: Tensors, softplus: bool) -> None:
    """Raise a `TypeError` or `ValueError` if an argument is wrong, which it names."""
    for name, tensor in zip(Tensors._fields, given):
        if tensor is None and name not in ('D', 'z', 'dt_bias', 'state_batch_indices'):
            raise TypeError(f'{name} must be a torch.Tensor, got NoneType')
        if tensor is not None and name != 'state_batch_indices':
            _validation._check_floats(name, tensor)
    state, x, B = given.state, given.x, given.B
    for name, tensor in zip(Tensors._fields, given):
        if isinstance(tensor, torch.Tensor) and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    if x.dtype not in _validation.FLOATS and not (x.dtype == torch.float64 and x.device.type == 'cpu'):
        raise TypeError(f'x must be bfloat16, float16 or float32 (on the CPU float64 too), got {x.dtype}')
    _validation._check_written('state', state, x)
    if state.dim() not in (3, 4):
        raise ValueError(
            f'state must have shape [batch, nheads, dim, dstate] or [batch, dim, dstate], got {list(state.shape)}'
        )
    heads = state.shape[1] if state.dim() == 4 else 1
    dim, size = state.shape[-2:]
    if min(heads, dim) == 0 or not 1 <= size <= _validation.MAX_DIM:
        raise ValueError(
            f'state must have at least one head and one row, and a dstate of 1 to {_validation.MAX_DIM}, got shape '
            f'{list(state.shape)}'
        )
    groups = B.shape[1] if B.dim() == 3 else 1
    if groups == 0 or heads % groups:
        raise ValueError(f'B must have a divisor of the {heads} heads as its number of groups, got {groups}')
    batch = x.shape[0] if x.dim() else 0
    slots = batch if given.state_batch_indices is None else state.shape[0]
    shapes = {
        'x': (batch, heads, dim), 'state': (slots, heads, dim, size), 'dt': (batch, heads, dim),
        'A': (heads, dim, size), 'B': (batch, groups, size), 'C': (batch, groups, size), 'D': (heads, dim),
        'z': (batch, heads, dim), 'dt_bias': (heads, dim),
    }  # fmt: skip
    for name, shape in shapes.items():
        if getattr(given, name) is not None:
            check_shape(name, getattr(given, name), shape)
    indices = given.state_batch_indices
    if indices is not None:
        _validation._check_integers('state_batch_indices', indices, x)
        _validation._check_shape('state_batch_indices', indices, '[batch]', [batch])
        if slots == 0:
            raise ValueError('state must have at least one slot with state_batch_indices, got none')
    if not isinstance(softplus, bool):
        raise TypeError(f'dt_softplus must be a bool, got {type(softplus).__name__}')


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Check a shape with the dimension of heads or groups, which may be left out where there is one of them."""
    dims = {
        'state': ['batch', 'nheads', 'dim', 'dstate'], 'A': ['nheads', 'dim', 'dstate'],
        'B': ['batch', 'ngroups', 'dstate'], 'C': ['batch', 'ngroups', 'dstate'],
        'D': ['nheads', 'dim'], 'dt_bias': ['nheads', 'dim'],
    }.get(name, ['batch', 'nheads', 'dim'])  # fmt: skip
    expected, place = [*shape], int(dims[0] == 'batch')
    if shape[place] == 1 and tensor.dim() == len(shape) - 1:
        del expected[place], dims[place]
    _validation._check_shape(name, tensor, f'[{", ".join(dims)}]', expected)


def check_slots(indices: torch.Tensor, slots: int) -> None:
    """Raise a `ValueError` if indices on the CPU name no slot or one slot twice."""
    named: dict[int, int] = {}
    for i, slot in enumerate(indices.tolist()):
        if slot >= slots:
            raise ValueError(f'state_batch_indices must be below the {slots} slots of state, got {slot} at index {i}')
        if slot >= 0 and named.setdefault(slot, i) != i:
            raise ValueError(
                f'state_batch_indices must not name a slot twice, got {slot} at index {named[slot]} and at index {i}'
            )


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token of Mamba or Mamba-2 for each sequence, as mamba_ssm's function of this name.

    For each sequence and head::

        dt  = softplus(dt + dt_bias)
        h   = exp(dt A) h + dt x B^T
        out = (h C + D x) * silu(z)

    h is read from `state` and written there, in place. All arithmetic is in fp32 (on the CPU in fp64 where state or x
    is). A sequence's results do not depend on what else is in the batch. Tensors are read in place, whatever their
    strides. If A, dt and dt_bias are one number for each head, expanded to dim and dstate, as models of Mamba-2 pass
    them, the step takes less work: that is seen from their strides.

    There are no gradients, as in mamba_ssm: out never requires one, even if the arguments do.

    Args:
        state: `[batch, nheads, dim, dstate]` or `[batch, dim, dstate]` in bfloat16, float16 or float32 (on the CPU
            float64 too), dstate up to 512. Of the other tensors, those with nheads or ngroups may lack that dimension
            too where it is 1.
        x: `[batch, nheads, dim]` in bfloat16, float16 or float32 (on the CPU float64 too). The others below are of any
            floating dtype.
        dt: step sizes before the bias, `[batch, nheads, dim]`.
        A: `[nheads, dim, dstate]`, negative where the state is to decay.
        B: `[batch, ngroups, dstate]`. nheads is a multiple of ngroups: head h reads group
            `h // (nheads // ngroups)`.
        C: like B.
        D: `[nheads, dim]`. Default: zeros.
        z: `[batch, nheads, dim]`. Default: out is not gated.
        dt_bias: `[nheads, dim]`. Default: zeros.
        dt_softplus: whether softplus is applied to dt.
        state_batch_indices: `[batch]`, int32 or int64. `state` is then a pool `[slots, nheads, dim, dstate]`, and
            sequence n has its state in slot `state_batch_indices[n]`. No other slot is touched. -1 marks padding: a
            sequence without a state, whose out is zero. An index of slots and above is padding too; on the CPU it is an
            error. What two equal indices do is undefined; on the CPU they are an error.

    Returns:
        out `[batch, nheads, dim]`, or `[batch, dim]` if state has no heads, in x's dtype.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.

    Source: Gu and Dao, Mamba (arXiv:2312.00752); Dao and Gu, Transformers are SSMs (arXiv:2405.21060).

    Example::

        >>> import torch
        >>> from fla_simple_gla.adapters.mamba_ssm import selective_state_update
        >>> state, x, A = torch.zeros(2, 4, 64, 128), torch.randn(2, 4, 64), -torch.rand(4)
        >>> dt, (B, C) = torch.randn(2, 4), torch.randn(2, 2, 1, 128)
        >>> dt, A = dt[:, :, None].expand(2, 4, 64), A[:, None, None].expand(4, 64, 128)
        >>> selective_state_update(state, x, dt, A, B, C, dt_softplus=True).shape
        torch.Size([2, 4, 64])
    """
    given = Tensors(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    if torch.compiler.is_compiling():
        check(given, dt_softplus)
    else:
        plan = plan_for(given, dt_softplus)
        if none_is_active():
            if state_batch_indices is not None and state_batch_indices.is_cpu and type(state_batch_indices) in PLAIN:
                check_slots(state_batch_indices, state.shape[0])
            if plan.takes_kernels:
                out = forward_pass(given, dt_softplus, plan=plan)[0]
                torch.autograd.graph.increment_version(state)
                return out
    with torch.no_grad():
        return composed(given, dt_softplus)
