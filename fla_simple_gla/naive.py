"""Simple Gated Linear Attention in plain PyTorch: the specification that the kernels are checked against.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T          S: [K, V]
    o_t = scale * S_t^T q_t

The same function in three forms: token by token, chunk by chunk, and as one decay-masked attention map. Everything is
computed in fp32, or in fp64 for fp64 inputs, and is differentiable by autograd.

No form divides by a decay or subtracts two sums of gates: every decay is the exponential of the sum of just the gates
between two tokens. So `g = -inf` is an exact reset, in the gradients too.
"""

from collections.abc import Callable

import torch
from einops import rearrange, repeat

from . import _validation


def naive_recurrent_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = True,
    *,
    g_gamma: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    reverse: bool = False,
    intermediate_states_buffer: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The specification, token by token.

    For each sequence and head::

        S_t = exp(g_t) S_{t-1} + k_t v_t^T
        o_t = scale * S_t^T q_t

    Plain PyTorch, in fp32, or in fp64 for fp64 inputs; differentiable by autograd, any number of times.

    Args:
        q: queries `[B, T, HK, K]`, of any floating dtype.
        k: keys, of q's shape and dtype.
        v: values `[B, T, H, V]` in q's dtype, H a multiple of HK. Head h reads q and k of head `h // (H // HK)`.
        g: log decay of each token and head (natural logarithm) `[B, T, H]`. `-inf` resets the state.
        scale: factor of the products `q . k`. Default: `K ** -0.5`.
        initial_state: the state before the first token, `[N, H, K, V]`. N is the number of sequences: B, or with
            `cu_seqlens` the number of packed ones. Default: zeros.
        output_final_state: whether to return the state after the last token.
        g_gamma: log decay of each head `[H]`, in place of g. With neither, nothing decays.
        cu_seqlens: `[N + 1]`, the boundaries of N sequences packed in a batch of one. Tokens in no sequence get zeros.
            It is read on the host.
        reverse: go through each sequence from its last token to its first.
        intermediate_states_buffer: gets the state after every token, `[B, T, H, K, V]`.

    Returns:
        o `[B, T, H, V]` in q's dtype, and the final state `[N, H, K, V]` in fp32 (fp64 for fp64 inputs) or None.

    Raises:
        ValueError: g and g_gamma are both given, or cu_seqlens does not begin with 0, decreases, or ends beyond T.

    Source: Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv:2312.06635), with
    the scalar gate of Dao and Gu, Transformers are SSMs (arXiv:2405.21060).

    Example::

        >>> import torch
        >>> from fla_simple_gla import naive_recurrent_simple_gla
        >>> q, k, v = torch.ones(3, 1, 4, 1, 1)
        >>> g = torch.full((1, 4, 1), 0.5).log()  # half of the state stays at each token
        >>> o, state = naive_recurrent_simple_gla(q, k, v, g)
        >>> o.flatten().round(decimals=3).tolist()
        [1.0, 1.5, 1.75, 1.875]
    """

    states: list[torch.Tensor] = []

    def recurrence(q, k, v, g, S):
        steps = range(q.shape[2])
        o: list = [None] * len(steps)
        after: list = [None] * len(steps)
        for t in reversed(steps) if reverse else steps:
            S = S * g[:, :, t, None, None].exp() + k[:, :, t, :, None] * v[:, :, t, None, :]
            o[t] = torch.einsum('bhk,bhkv->bhv', q[:, :, t], S)
            if intermediate_states_buffer is not None:
                after[t] = S
        states.extend(after)
        return torch.stack(o, 2), S

    results = _by_sequence(recurrence, (q, k, v, g, g_gamma), scale, initial_state, output_final_state, cu_seqlens)
    if intermediate_states_buffer is not None and states:
        intermediate_states_buffer[:, : len(states)] = torch.stack(states, 1)
    return results


def naive_chunk_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
    scale: float | None = None,
    *,
    g_gamma: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The specification, chunk by chunk: within a chunk the parallel form, between chunks the state.

    With `D_ij = exp(g_{j+1} + ... + g_i)` inside a chunk of C tokens that starts after state S::

        o_i = scale * (sum_{j<=i} D_ij (q_i . k_j) v_j + exp(g_1 + ... + g_i) S^T q_i)
        S'  = exp(g_1 + ... + g_C) S + sum_j D_Cj k_j v_j^T

    Plain PyTorch, in fp32, or in fp64 for fp64 inputs; differentiable by autograd, any number of times.

    Args:
        q: queries `[B, T, HK, K]`, of any floating dtype.
        k: keys, of q's shape and dtype.
        v: values `[B, T, H, V]` in q's dtype, H a multiple of HK. Head h reads q and k of head `h // (H // HK)`.
        g: log decay of each token and head (natural logarithm) `[B, T, H]`. `-inf` resets the state.
        initial_state: the state before the first token, `[N, H, K, V]`. N is the number of sequences: B, or with
            `cu_seqlens` the number of packed ones. Default: zeros.
        output_final_state: whether to return the state after the last token.
        chunk_size: tokens to a chunk, any number from 1.
        scale: factor of the products `q . k`. Default: `K ** -0.5`.
        g_gamma: log decay of each head `[H]`, in place of g. With neither, nothing decays.
        cu_seqlens: `[N + 1]`, the boundaries of N sequences packed in a batch of one. Tokens in no sequence get zeros.
            It is read on the host.

    Returns:
        o `[B, T, H, V]` in q's dtype, and the final state `[N, H, K, V]` in fp32 (fp64 for fp64 inputs) or None.

    Raises:
        ValueError: g and g_gamma are both given, or cu_seqlens does not begin with 0, decreases, or ends beyond T.

    Source: Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv:2312.06635), with
    the scalar gate of Dao and Gu, Transformers are SSMs (arXiv:2405.21060).

    Example::

        >>> import torch
        >>> from fla_simple_gla import naive_chunk_simple_gla, naive_recurrent_simple_gla
        >>> q, k, v = torch.randn(3, 1, 100, 4, 16, dtype=torch.float64)
        >>> g = torch.nn.functional.logsigmoid(torch.randn(1, 100, 4, dtype=torch.float64))
        >>> o, state = naive_chunk_simple_gla(q, k, v, g, output_final_state=True, chunk_size=16)
        >>> expected, expected_state = naive_recurrent_simple_gla(q, k, v, g)
        >>> torch.allclose(o, expected), torch.allclose(state, expected_state)
        (True, True)
    """

    def chunks(q, k, v, g, S):
        o = []
        for q_c, k_c, v_c, g_c in zip(*(x.split(chunk_size, 2) for x in (q, k, v, g))):
            decay = _decay_mask(g_c)
            # exp(g_1 + ... + g_i) is what is left of the first token at token i, times that token's own gate
            from_start = decay[..., :, 0] * g_c[..., :1].exp()
            inter = from_start[..., None] * (q_c @ S)
            o.append((q_c @ k_c.mT * decay) @ v_c + inter)
            S = from_start[..., -1, None, None] * S + (k_c * decay[..., -1, :, None]).mT @ v_c
        return torch.cat(o, 2), S

    return _by_sequence(chunks, (q, k, v, g, g_gamma), scale, initial_state, output_final_state, cu_seqlens)


def naive_parallel_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    *,
    g_gamma: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification as attention without a softmax.

    For each sequence and head::

        o_i = sum_{j<=i} A_ij v_j
        A_ij = scale * exp(g_{j+1} + ... + g_i) (q_i . k_j)

    Plain PyTorch, in fp32, or in fp64 for fp64 inputs; differentiable by autograd, any number of times.

    Args:
        q: queries `[B, T, HK, K]`, of any floating dtype.
        k: keys, of q's shape and dtype.
        v: values `[B, T, H, V]` in q's dtype, H a multiple of HK. Head h reads q and k of head `h // (H // HK)`.
        g: log decay of each token and head (natural logarithm) `[B, T, H]`. `-inf` resets the state.
        scale: factor of the products `q . k`. Default: `K ** -0.5`.
        g_gamma: log decay of each head `[H]`, in place of g. With neither, nothing decays.
        cu_seqlens: `[N + 1]`, the boundaries of N sequences packed in a batch of one. Tokens in no sequence get zeros.
            It is read on the host.

    Returns:
        o `[B, T, H, V]` in q's dtype, and A `[B, H, T, T]` in fp32 (fp64 for fp64 inputs). A is zero above the diagonal
        and between tokens of different sequences.

    Raises:
        ValueError: g and g_gamma are both given, or cu_seqlens does not begin with 0, decreases, or ends beyond T.

    Source: Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv:2312.06635), with
    the scalar gate of Dao and Gu, Transformers are SSMs (arXiv:2405.21060).

    Example::

        >>> import torch
        >>> from fla_simple_gla import naive_parallel_simple_gla
        >>> q, k, v = torch.ones(3, 1, 3, 1, 1)
        >>> g = torch.full((1, 3, 1), 0.5).log()  # half of what is there stays at each token
        >>> o, attention = naive_parallel_simple_gla(q, k, v, g)
        >>> attention[0, 0].round(decimals=2).tolist()
        [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]]
    """
    T = q.shape[1]
    maps = []

    def attention(q, k, v, g, S):
        A = q @ k.mT * _decay_mask(g)
        maps.append(A)
        return A @ v, S

    o, _ = _by_sequence(attention, (q, k, v, g, g_gamma), scale, None, False, cu_seqlens)
    if cu_seqlens is None and maps:
        return o, maps[0]
    A = q.new_zeros(q.shape[0], v.shape[2], T, T, dtype=torch.promote_types(q.dtype, torch.float32))
    bounds = [] if cu_seqlens is None else cu_seqlens.tolist()
    starts = [start for start, end in zip(bounds, bounds[1:]) if end > start]
    for A_n, start in zip(maps, starts):
        end = start + A_n.shape[-1]
        A[:, :, start:end, start:end] = A_n
    return o, A


def _decay_mask(g: torch.Tensor) -> torch.Tensor:
    """`D_ij = exp(g_{j+1} + ... + g_i)` for j <= i, else 0: `[..., T]` -> `[..., T, T]`."""
    T = g.shape[-1]
    ones = torch.ones(T, T, dtype=torch.bool, device=g.device)
    # column j holds g_i for i > j: its running sum down the rows is the sum of the gates after j, without subtraction
    gates = repeat(g, '... i -> ... i j', j=T).masked_fill(~ones.tril(-1), 0)
    return gates.cumsum(-2).masked_fill(~ones.tril(), -torch.inf).exp()


def _by_sequence(
    form: Callable,
    inputs: tuple,
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run `form(q, k, v, g, S) -> o, S` on head-first tensors, one packed sequence at a time.

    The inputs are `(q, k, v, g, g_gamma)`. Returns o, and the final state or None.
    """
    q, k, v, g, g_gamma = inputs
    (B, T, HK, K), (H, V), dtype = q.shape, v.shape[2:], q.dtype
    if cu_seqlens is not None:
        _validation.check_contents(cu_seqlens, None, None, T)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    if g is not None and g_gamma is not None:
        raise ValueError('g and g_gamma are both given: pass one of them, or neither')
    if g is None:
        g = v.new_zeros(B, T, H) if g_gamma is None else repeat(g_gamma, 'h -> b t h', b=B, t=T)
    q, k = (repeat(x.to(precise), 'b t h d -> b (h n) t d', n=H // HK) for x in (q, k))
    v, g = rearrange(v.to(precise), 'b t h d -> b h t d'), rearrange(g.to(precise), 'b t h -> b h t')
    q = q * (K**-0.5 if scale is None else scale)

    # an enclosing autocast would compute the products in its own dtype
    with torch.autocast(q.device.type, enabled=False):
        bounds = None if cu_seqlens is None else cu_seqlens.tolist()
        N = B if bounds is None else len(bounds) - 1
        S = v.new_zeros(N, H, K, V) if initial_state is None else initial_state.to(precise)
        if bounds is None:
            o, S = form(q, k, v, g, S) if T else (v, S.clone())  # never return the given state itself
        else:
            outputs, states = [], []
            for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
                q_n, k_n, v_n, g_n = (x[:, :, start:end] for x in (q, k, v, g))
                o_n, S_n = form(q_n, k_n, v_n, g_n, S[n : n + 1]) if end > start else (v_n, S[n : n + 1])
                outputs.append(o_n)
                states.append(S_n)
            # tokens after the last sequence belong to none
            o = torch.cat([*outputs, v.new_zeros(1, H, T - bounds[-1], V)], 2)
            S = torch.cat(states)
    return rearrange(o, 'b h t d -> b t h d').to(dtype), S if output_final_state else None
