"""States in a pool, on the CPU: `state_indices` for the naive functions. Kernels read and write the pool themselves."""

from collections.abc import Callable
from typing import Any

import torch


@torch.no_grad()
def in_pool(
    run: Callable,
    pool: torch.Tensor,
    indices: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    states: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first result of `run(initial_state)`, which returns o and the final states.

    The initial states are those in these slots of the pool, and the final states replace them there. `states`
    `[B, T, ...]` is a buffer that `run` writes. Where an index is -1, o is zero and the buffer keeps its contents.
    """
    padding = indices < 0
    rows: Any = padding  # index of the padding's rows in o and in states
    if cu_seqlens is not None:
        tokens = torch.repeat_interleave(padding, cu_seqlens.diff())
        rows = slice(None), tokens.nonzero().flatten()
    kept: Any = None if states is None else states[rows]
    initial_state = pool.new_zeros(len(indices), *pool.shape[1:])
    initial_state[~padding] = pool[indices[~padding].long()]
    o, final_state = run(initial_state)
    pool[indices[~padding].long()] = final_state[~padding].to(pool.dtype)
    o[rows] = 0
    if states is not None:
        states[rows] = kept
    return o
