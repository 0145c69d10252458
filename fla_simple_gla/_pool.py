"""States in a pool, on the CPU: what kernels do with `state_indices` in place."""

from collections.abc import Callable

import torch


@torch.no_grad()
def in_pool(
    run: Callable, pool: torch.Tensor, indices: torch.Tensor, cu_seqlens: torch.Tensor | None, states: torch.Tensor | None = None,
) -> torch.Tensor:
    """`o` of `run(initial_state)`, which returns the final states too, from the states in these slots of the pool, where the final ones
    replace them.

    Where an index is -1, o is zero, and states `[B, T, ...]`, which run writes, is as before.
    """
    padding = indices < 0
    rows = padding  # of o and states
    if cu_seqlens is not None:
        tokens = torch.repeat_interleave(padding, cu_seqlens.diff())
        rows = slice(None), tokens.nonzero().flatten()
    kept = None if states is None else states[rows]
    initial_state = pool.new_zeros(len(indices), *pool.shape[1:])
    initial_state[~padding] = pool[indices[~padding].long()]
    o, final_state = run(initial_state)
    pool[indices[~padding].long()] = final_state[~padding].to(pool.dtype)
    o[rows] = 0
    if states is not None:
        states[rows] = kept
    return o
