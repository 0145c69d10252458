"""How tensors lie in memory: rows that kernels read in place, transposed states."""

import functools

import torch

from ._triton import jit, tl


@jit
def open_rows(p, stride, L, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    """What `load_rows` and `store_rows` need of L rows of D numbers at p: a descriptor, or the pointer itself."""
    if TMA:
        return tl.make_tensor_descriptor(p, [tl.maximum(L, 1), D], [stride, 1], [BT, BD])
    else:
        return p


@jit
def load_rows(rows, stride, L, i_t, i_d, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    """Rows i_t to i_t + BT, columns i_d to i_d + BD; zero outside."""
    if TMA:
        return rows.load([i_t, i_d])
    else:
        o_t = i_t + tl.arange(0, BT)
        o_d = i_d + tl.arange(0, BD)
        p = rows + o_t.to(tl.int64)[:, None] * stride + o_d[None, :]
        return tl.load(p, mask=(o_t < L)[:, None] & (o_d < D)[None, :], other=0.0)


@jit
def store_rows(rows, stride, L, i_t, i_d, x, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        rows.store([i_t, i_d], x)
    else:
        o_t = i_t + tl.arange(0, BT)
        o_d = i_d + tl.arange(0, BD)
        p = rows + o_t.to(tl.int64)[:, None] * stride + o_d[None, :]
        tl.store(p, x, mask=(o_t < L)[:, None] & (o_d < D)[None, :])


def cdiv(n: int, d: int) -> int:
    """n / d, rounded up. Triton's own takes microseconds on the host."""
    return -(-n // d)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def exists(device: torch.device) -> bool:
    """Whether the device is a GPU of this machine. Fake tensors may be on one that is not."""
    return device.type == 'cuda' and torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return exists(device) and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def use_descriptors(*tensors: torch.Tensor | None) -> bool:
    """Whether a plain kernel takes these tensors through descriptors: on Hopper, if rows are aligned to 16 bytes."""
    given = [x for x in tensors if x is not None]
    return is_hopper(given[0].device) and all(
        x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3]) for x in given
    )


def strides(x: torch.Tensor | None, n: int) -> tuple[int, ...]:
    """The first n strides of x, or zeros where there is none."""
    return (0,) * n if x is None else x.stride()[:n]


def sizes(q: torch.Tensor, v: torch.Tensor) -> tuple[int, int, int, int, int]:
    """B, T, H, K, V of tensors in the roles of q and v. States have H heads; q and v have H or a divisor of it."""
    B, T, HQ, K = q.shape
    HV, V = v.shape[2:]
    return B, T, max(HQ, HV), K, V


def rows_in_place(x: torch.Tensor) -> torch.Tensor:
    """x itself if its last dimension is contiguous, whatever the others are; else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def transposed(state: torch.Tensor | None, when: bool = True) -> torch.Tensor | None:
    """A view of a state with its last two dimensions exchanged."""
    return state.mT if when and state is not None else state
