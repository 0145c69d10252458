import torch

from ._triton import runs_kernels
from ._validation import check_inputs, under_autocast
from .naive import naive_recurrent_simple_gla


def fused_recurrent_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    g_gamma: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    q, k, v = under_autocast(q, k, v)
    scale = check_inputs(q, k, v, g, g_gamma, scale, initial_state, cu_seqlens, state_v_first)
    h0 = initial_state.mT if state_v_first and initial_state is not None else initial_state
    o, ht = naive_recurrent_simple_gla(q, k, v, g, scale, h0, output_final_state, g_gamma=g_gamma, cu_seqlens=cu_seqlens, reverse=reverse)
    return o, ht.mT if state_v_first and ht is not None else ht
