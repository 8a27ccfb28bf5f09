"""Variable-length attention of torch and of flash-attn, with their signatures, by plain arithmetic.

They assert what the kernels demand: ``mha_varlen_fwd`` in ``csrc/flash_attn/flash_api.cpp`` of flash-attn 2.6.3, 2.7.4
and 2.8.3, and in torch's copy of it. The signatures are those of the three flash-attn versions, which have the same,
and of torch 2.10, 2.11, and 2.12 to 2.13.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout, pad

from tests.modeling_f2llm.elsewhere import Elsewhere


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert (softcap, alibi_slopes, deterministic, return_attn_probs, block_table) == (0.0, None, False, False, None)
    scale, size = softmax_scale or q.shape[-1] ** -0.5, q.shape[-1]
    # The package pads heads and makes their last dimension contiguous.
    states = [pad(each, (0, -size % 8)) for each in (q, k, v)]
    boundaries = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _attention(*states, *boundaries, scale, causal, window_size, dropout_p)[..., :size]


def varlen_attn_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert return_aux is None and query.shape[1:] == key.shape[1:]
    scale = query.shape[-1] ** -0.5
    return _attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, is_causal, (-1, -1))


def varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    # Its C++, like that of 2.12, takes fewer heads of keys, forward and backward; nothing in its Python looks.
    assert return_aux is None
    scale, causal = scale or query.shape[-1] ** -0.5, window_size == (-1, 0)
    return _attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, causal, window_size)


def varlen_attn_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert (return_aux, seqused_k, block_table, num_splits) == (None,) * 4
    assert enable_gqa or query.shape[1:] == key.shape[1:]
    scale, causal = scale or query.shape[-1] ** -0.5, window_size == (-1, 0)
    return _attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, causal, window_size)


def _attention(query, key, value, ends_q, ends_k, max_q, max_k, scale, causal, window, dropout_p=0.0):
    heads, lengths = query.shape[1], []
    _check_states(query, key, value)
    for states, ends, longest in ((query, ends_q, max_q), (key, ends_k, max_k)):
        assert ends.device == query.device and ends.dtype == torch.int32 and ends.is_contiguous() and ends.ndim == 1
        lengths.append([after - before for before, after in zip(ends.tolist(), ends.tolist()[1:], strict=False)])
        assert lengths[-1] and min(lengths[-1]) >= 0 and (ends.tolist()[0], ends.tolist()[-1]) == (0, len(states))
        assert type(longest) is int and longest >= max(lengths[-1])
    assert isinstance(window, tuple) and all(type(side) is int for side in window)
    assert type(scale) is float and type(dropout_p) is float and type(causal) is bool
    left, right = window[0], 0 if causal and max_q > 1 else window[1]
    # The kernel would fold the query heads of a group into the texts, which must then have a token each, and return
    # the logarithms of the softmax's sums in another order than its backward pass reads.
    assert not (max_q == 1 and heads > key.shape[1] and left < 0 and right < 0 and not dropout_p), "swapped"
    numbers = [each.here if isinstance(each, Elsewhere) else each for each in (query, key, value)]
    texts = zip(
        *(each.float().split(of) for each, of in zip(numbers, (lengths[0], lengths[1], lengths[1]), strict=True)),
        strict=True,
    )
    output = torch.cat([_one_text(*text, scale, left, right, dropout_p) for text in texts]).to(query.dtype)
    return Elsewhere(output, query.device) if isinstance(query, Elsewhere) else output


def _check_states(query: Tensor, key: Tensor, value: Tensor) -> None:
    (_, heads, size), shared = query.shape, key.shape[1]
    assert key.shape == value.shape == (len(key), shared, size) and heads % shared == 0
    assert query.dtype in (torch.float16, torch.bfloat16) and query.dtype == key.dtype == value.dtype
    assert query.device == key.device == value.device
    assert size <= 256 and size % 8 == 0
    assert all(states.stride(-1) == 1 for states in (query, key, value))


def _one_text(query: Tensor, key: Tensor, value: Tensor, scale: float, left: int, right: int, p: float) -> Tensor:
    """``(queries, heads, head_dim)``, the last of the keys → the same; a negative side of the window has no bound."""
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    at = torch.arange(len(key))
    ahead = at[None] - at[len(key) - len(query) :, None]
    hidden = ((ahead > right) & (right >= 0)) | ((-ahead > left) & (left >= 0))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    weights = dropout(scores.masked_fill(hidden, -torch.inf).softmax(dim=-1), p)
    return torch.einsum("hqk,khd->qhd", weights, value)
