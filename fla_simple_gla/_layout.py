"""What the modes do with tensors around their kernels: rows read in place, head groups summed, states transposed."""

import torch


def rows_in_place(x: torch.Tensor) -> torch.Tensor:
    """x itself where its last dimension is contiguous, whatever the others are; else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def sum_heads(dx: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """The gradient of x, which several heads read, from a gradient for each of the heads."""
    if dx is None or dx.shape == x.shape:
        return dx
    return dx.unflatten(2, (x.shape[2], -1)).sum(3)


def transposed(state: torch.Tensor | None, when: bool = True) -> torch.Tensor | None:
    """A view of a state with its last two dimensions exchanged."""
    return state.mT if when and state is not None else state
