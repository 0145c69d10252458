"""Retention and Lightning Attention under the names and with the parameters of flash-linear-attention (fla) 0.6.

    S_t = gamma_h S_{t-1} + k_t v_t^T          S: [K, V], one for each head h
    o_t = scale * S_t^T q_t

Both are Simple GLA with a constant decay for each head, g_gamma = log(gamma_h):

    retention                g_gamma_h = log(1 - 2^(-5 - h))
    Lightning Attention      g_gamma_h = -(8 / H) (1 - layer_idx / num_layers) h

The functions of fla that are Simple GLA already are those of this library, with the same names.
"""

from collections.abc import Callable

import torch

from .. import chunk_simple_gla, fused_chunk_simple_gla, fused_recurrent_simple_gla, parallel_simple_gla
from .._cache import Cache
from .._private import none_is_active

__all__ = [
    'chunk_lightning_attn',
    'chunk_retention',
    'fused_chunk_retention',
    'fused_recurrent_lightning_attn',
    'fused_recurrent_retention',
    'parallel_retention',
]

# Decays of heads, one tensor for each number of heads, device, dtype and layer
decays = Cache(1024)


def retention_decays(heads: torch.Tensor) -> torch.Tensor:
    return torch.log1p(-torch.exp2(-5 - heads))


def lightning_decays(heads: torch.Tensor, layer_idx: int, num_layers: int) -> torch.Tensor:
    return -8 / heads.shape[0] * (1 - layer_idx / num_layers) * heads


def decays_for(v: torch.Tensor, formula: Callable, *layer: int) -> torch.Tensor | None:
    """g_gamma for the heads of v, made once; None for a v that no mode takes: the mode says what is wrong with it."""
    if not isinstance(v, torch.Tensor) or v.is_nested or v.dim() != 4 or v.shape[2] == 0:
        return None

    def make() -> torch.Tensor:
        heads = torch.arange(v.shape[2], device=v.device, dtype=torch.float64)
        return formula(heads, *layer).to(dtype)

    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    if torch.compiler.is_compiling() or not none_is_active():
        return make()
    key = formula, v.shape[2], v.device, dtype, *layer
    found = decays.get(key)
    if found is None:
        with torch.inference_mode(False):  # a call that trains may be the next to take it
            found = make()
        if v.is_cuda:
            if torch.cuda.is_current_stream_capturing():  # its memory is the graph's
                return found
            # the next call may be on another stream
            torch.cuda.current_stream(v.device).synchronize()
        decays[key] = found
    return found


def check_layer(layer_idx: int, num_layers: int) -> None:
    for name, value in (('layer_idx', layer_idx), ('num_layers', num_layers)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f'{name} must be an int, got {type(value).__name__}')
    if num_layers < 1:
        raise ValueError(f'num_layers must be at least 1, got {num_layers}')
    if not 0 <= layer_idx <= num_layers:
        raise ValueError(f'layer_idx must be 0 to num_layers = {num_layers}, got {layer_idx}')


def chunk_retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Retention, chunk by chunk: for training, and for reading prompts. As fla's function of this name.

    For each sequence and head h = 0, 1, ...::

        S_t = (1 - 2^(-5 - h)) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    Computed by `fla_simple_gla.chunk_simple_gla`. Differentiable in q, k, v and initial_state, once.

    Args:
        q: queries `[B, T, HK, K]` in bfloat16, float16 or float32 (on the CPU float64 too), K from 1 to 512.
        k: keys, of q's shape and dtype.
        v: values `[B, T, H, V]` in q's dtype, V from 1 to 512, H a multiple of HK. Head h reads q and k of head
            `h // (H // HK)`. fla takes H = HK only.
        scale: factor of the products `q . k`. Default: `K ** -0.5`.
        initial_state: the state before the first token, `[N, H, K, V]`, of any floating dtype. N is the number of
            sequences: B, or with `cu_seqlens` the number of packed ones. Default: zeros.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: `[N + 1]`, int32 or int64: sequence n is the tokens from `cu_seqlens[n]` to `cu_seqlens[n + 1]` of a
            batch of one. It starts at 0, never decreases, and stays on the device.
        chunk_size: tokens to a chunk, a power of two. It changes no more than rounding. The kernels have chunks of
            their own.

    Returns:
        o `[B, T, H, V]` in q's dtype, and the final state in fp32 (fp64 for fp64 inputs) or None.

    Raises:
        TypeError: an argument has a wrong type or dtype, or is unknown.
        ValueError: an argument has a wrong shape, device, value or contents.

    Source: Sun et al., Retentive Network: A Successor to Transformer for Large Language Models (arXiv:2307.08621).

    Example::

        >>> import torch
        >>> from fla_simple_gla.adapters.fla import chunk_retention
        >>> q, k, v = torch.randn(3, 1, 100, 4, 64)
        >>> o, state = chunk_retention(q, k, v, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 4, 64]), torch.Size([1, 4, 64, 64]))
    """
    return chunk_simple_gla(
        q, k, v, g_gamma=decays_for(v, retention_decays), scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, chunk_size=chunk_size,
    )  # fmt: skip


def fused_chunk_retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Retention in one sweep over each sequence: for training, and for reading prompts. As fla's function of this name.

    For each sequence and head h = 0, 1, ...::

        S_t = (1 - 2^(-5 - h)) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    Computed by `fla_simple_gla.fused_chunk_simple_gla`: a sequence's results do not depend on what else is in the
    batch. Differentiable in q, k, v and initial_state, once.

    Args:
        q: queries `[B, T, HK, K]` in bfloat16, float16 or float32 (on the CPU float64 too), K from 1 to 512.
        k: keys, of q's shape and dtype.
        v: values `[B, T, H, V]` in q's dtype, V from 1 to 512, H a multiple of HK. Head h reads q and k of head
            `h // (H // HK)`. fla takes H = HK only.
        scale: factor of the products `q . k`. Default: `K ** -0.5`.
        initial_state: the state before the first token, `[N, H, K, V]`, of any floating dtype. N is the number of
            sequences: B, or with `cu_seqlens` the number of packed ones. Default: zeros.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: `[N + 1]`, int32 or int64: sequence n is the tokens from `cu_seqlens[n]` to `cu_seqlens[n + 1]` of a
            batch of one. It starts at 0, never decreases, and stays on the device.

    Returns:
        o `[B, T, H, V]` in q's dtype, and the final state in fp32 (fp64 for fp64 inputs) or None.

    Raises:
        TypeError: an argument has a wrong type or dtype, or is unknown.
        ValueError: an argument has a wrong shape, device, value or contents.

    Source: Sun et al., Retentive Network: A Successor to Transformer for Large Language Models (arXiv:2307.08621).

    Example::

        >>> import torch
        >>> from fla_simple_gla.adapters.fla import fused_chunk_retention
        >>> q, k, v = torch.randn(3, 1, 100, 4, 64)
        >>> o, state = fused_chunk_retention(q, k, v, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 4, 64]), torch.Size([1, 4, 64, 64]))
    """
    return fused_chunk_simple_gla(
        q, k, v, g_gamma=decays_for(v, retention_decays), scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def fused_recurrent_retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Retention, token by token: for decoding, with constant memory for each sequence. As fla's function of this name.

    For each sequence and head h = 0, 1, ...::

        S_t = (1 - 2^(-5 - h)) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    Computed by `fla_simple_gla.fused_recurrent_simple_gla`, in fp32. Differentiable in q, k, v and initial_state, once.

    Args:
        q: queries `[B, T, HK, K]` in bfloat16, float16 or float32 (on the CPU float64 too), K from 1 to 512.
        k: keys, of q's shape and dtype.
        v: values `[B, T, H, V]` in q's dtype, V from 1 to 512, H a multiple of HK. Head h reads q and k of head
            `h // (H // HK)`. fla takes H = HK only.
        scale: factor of the products `q . k`. Default: `K ** -0.5`.
        initial_state: the state before the first token, `[N, H, K, V]`, of any floating dtype. N is the number of
            sequences: B, or with `cu_seqlens` the number of packed ones. Default: zeros.
        output_final_state: whether to return the state after the last token.
        reverse: go through each sequence from its last token to its first.
        state_v_first: states are `[N, H, V, K]`.
        cu_seqlens: `[N + 1]`, int32 or int64: sequence n is the tokens from `cu_seqlens[n]` to `cu_seqlens[n + 1]` of a
            batch of one. It starts at 0, never decreases, and stays on the device.
        transpose_state_layout: deprecated name of state_v_first.

    Returns:
        o `[B, T, H, V]` in q's dtype, and the final state in fp32 (fp64 for fp64 inputs) or None.

    Raises:
        TypeError: an argument has a wrong type or dtype, or is unknown.
        ValueError: an argument has a wrong shape, device, value or contents, or excludes another.

    Source: Sun et al., Retentive Network: A Successor to Transformer for Large Language Models (arXiv:2307.08621).

    Example::

        >>> import torch
        >>> from fla_simple_gla.adapters.fla import chunk_retention, fused_recurrent_retention
        >>> q, k, v = torch.randn(3, 1, 10, 4, 64)
        >>> # read nine tokens at once, then the tenth on its own
        >>> _, state = chunk_retention(q[:, :9], k[:, :9], v[:, :9], output_final_state=True)
        >>> o, state = fused_recurrent_retention(
        ...     q[:, 9:], k[:, 9:], v[:, 9:], initial_state=state, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 1, 4, 64]), torch.Size([1, 4, 64, 64]))
    """
    return fused_recurrent_simple_gla(
        q, k, v, g_gamma=decays_for(v, retention_decays), scale=scale, initial_state=initial_state,
        output_final_state=output_final_state, reverse=reverse, state_v_first=state_v_first, cu_seqlens=cu_seqlens,
        transpose_state_layout=transpose_state_layout,
    )  # fmt: skip


def parallel_retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Retention as attention without a softmax: for short sequences, and for the attention map. As fla's function.

    For each sequence and head h = 0, 1, ...::

        o_i = sum_{j<=i} A_ij v_j
        A_ij = scale * (1 - 2^(-5 - h))^(i - j) (q_i . k_j)

    Computed by `fla_simple_gla.parallel_simple_gla`. The work is quadratic in T. Differentiable in q, k and v, once,
    through o alone.

    Args:
        q: queries `[B, T, HK, K]` in bfloat16, float16 or float32 (on the CPU float64 too), K from 1 to 512.
        k: keys, of q's shape and dtype.
        v: values `[B, T, H, V]` in q's dtype, V from 1 to 512, H a multiple of HK. Head h reads q and k of head
            `h // (H // HK)`. fla takes H = HK only.
        scale: factor of the products `q . k`. Default: `K ** -0.5`.
        output_attentions: whether to return the attention map. Not with `cu_seqlens`.
        cu_seqlens: `[N + 1]`, int32 or int64: sequence n is the tokens from `cu_seqlens[n]` to `cu_seqlens[n + 1]` of a
            batch of one. It starts at 0, never decreases, and stays on the device.

    Returns:
        o `[B, T, H, V]` in q's dtype, and the attention map `[B, H, T, T]` in q's dtype, zero above the diagonal, or
        None.

    Raises:
        TypeError: an argument has a wrong type or dtype, or is unknown.
        ValueError: an argument has a wrong shape, device, value or contents, or excludes another.

    Source: Sun et al., Retentive Network: A Successor to Transformer for Large Language Models (arXiv:2307.08621).

    Example::

        >>> import torch
        >>> from fla_simple_gla.adapters.fla import parallel_retention
        >>> q, k, v = torch.randn(3, 1, 100, 4, 64)
        >>> o, attention = parallel_retention(q, k, v, output_attentions=True)
        >>> o.shape, attention.shape
        (torch.Size([1, 100, 4, 64]), torch.Size([1, 4, 100, 100]))
    """
    return parallel_simple_gla(
        q, k, v, scale=scale, output_attentions=output_attentions, cu_seqlens=cu_seqlens,
        g_gamma=decays_for(v, retention_decays),
    )  # fmt: skip


def chunk_lightning_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Lightning Attention, chunk by chunk: for training, and for reading prompts. As fla's function of this name.

    For each sequence and head h of 0, ..., H - 1::

        S_t = exp(-(8 / H) (1 - layer_idx / num_layers) h) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    Computed by `fla_simple_gla.chunk_simple_gla`. Differentiable in q, k, v and initial_state, once.

    Args:
        q: queries `[B, T, HK, K]` in bfloat16, float16 or float32 (on the CPU float64 too), K from 1 to 512.
        k: keys, of q's shape and dtype.
        v: values `[B, T, H, V]` in q's dtype, V from 1 to 512, H a multiple of HK. Head h reads q and k of head
            `h // (H // HK)`. fla takes H = HK only.
        layer_idx: number of the layer, from 0 to num_layers. Higher layers remember longer.
        num_layers: number of layers, at least 1.
        scale: factor of the products `q . k`. Default: `K ** -0.5`.
        initial_state: the state before the first token, `[N, H, K, V]`, of any floating dtype. N is the number of
            sequences: B, or with `cu_seqlens` the number of packed ones. Default: zeros.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: `[N + 1]`, int32 or int64: sequence n is the tokens from `cu_seqlens[n]` to `cu_seqlens[n + 1]` of a
            batch of one. It starts at 0, never decreases, and stays on the device.
        chunk_size: tokens to a chunk, a power of two. It changes no more than rounding. The kernels have chunks of
            their own.

    Returns:
        o `[B, T, H, V]` in q's dtype, and the final state in fp32 (fp64 for fp64 inputs) or None.

    Raises:
        TypeError: an argument has a wrong type or dtype, or is unknown.
        ValueError: an argument has a wrong shape, device, value or contents.

    Source: Qin et al., Lightning Attention-2 (arXiv:2401.04658), with the decays of Qin et al., TransNormerLLM
    (arXiv:2307.14995).

    Example::

        >>> import torch
        >>> from fla_simple_gla.adapters.fla import chunk_lightning_attn
        >>> q, k, v = torch.randn(3, 1, 100, 4, 64)
        >>> o, state = chunk_lightning_attn(q, k, v, layer_idx=2, num_layers=12, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 4, 64]), torch.Size([1, 4, 64, 64]))
    """
    check_layer(layer_idx, num_layers)
    return chunk_simple_gla(
        q, k, v, g_gamma=decays_for(v, lightning_decays, layer_idx, num_layers), scale=scale,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
    )  # fmt: skip


def fused_recurrent_lightning_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Lightning Attention, token by token: for decoding, with constant memory. As fla's function of this name.

    For each sequence and head h of 0, ..., H - 1::

        S_t = exp(-(8 / H) (1 - layer_idx / num_layers) h) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    Computed by `fla_simple_gla.fused_recurrent_simple_gla`, in fp32. Differentiable in q, k, v and initial_state, once.

    Args:
        q: queries `[B, T, HK, K]` in bfloat16, float16 or float32 (on the CPU float64 too), K from 1 to 512.
        k: keys, of q's shape and dtype.
        v: values `[B, T, H, V]` in q's dtype, V from 1 to 512, H a multiple of HK. Head h reads q and k of head
            `h // (H // HK)`. fla takes H = HK only.
        layer_idx: number of the layer, from 0 to num_layers. Higher layers remember longer.
        num_layers: number of layers, at least 1.
        scale: factor of the products `q . k`. Default: `K ** -0.5`.
        initial_state: the state before the first token, `[N, H, K, V]`, of any floating dtype. N is the number of
            sequences: B, or with `cu_seqlens` the number of packed ones. Default: zeros.
        output_final_state: whether to return the state after the last token.
        reverse: go through each sequence from its last token to its first.
        cu_seqlens: `[N + 1]`, int32 or int64: sequence n is the tokens from `cu_seqlens[n]` to `cu_seqlens[n + 1]` of a
            batch of one. It starts at 0, never decreases, and stays on the device.

    Returns:
        o `[B, T, H, V]` in q's dtype, and the final state in fp32 (fp64 for fp64 inputs) or None.

    Raises:
        TypeError: an argument has a wrong type or dtype, or is unknown.
        ValueError: an argument has a wrong shape, device, value or contents.

    Source: Qin et al., Lightning Attention-2 (arXiv:2401.04658), with the decays of Qin et al., TransNormerLLM
    (arXiv:2307.14995).

    Example::

        >>> import torch
        >>> from fla_simple_gla.adapters.fla import fused_recurrent_lightning_attn
        >>> q, k, v = torch.randn(3, 1, 10, 4, 64)
        >>> o, state = fused_recurrent_lightning_attn(q, k, v, layer_idx=2, num_layers=12, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 10, 4, 64]), torch.Size([1, 4, 64, 64]))
    """
    check_layer(layer_idx, num_layers)
    return fused_recurrent_simple_gla(
        q, k, v, g_gamma=decays_for(v, lightning_decays, layer_idx, num_layers), scale=scale,
        initial_state=initial_state, output_final_state=output_final_state, reverse=reverse, cu_seqlens=cu_seqlens,
    )  # fmt: skip
