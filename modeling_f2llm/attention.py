"""Attention that keeps the texts of a packed batch apart, by the kernel that fits the device.

The names of its implementations are registered with transformers. This file travels with every released model as remote
code: it imports torch, transformers and its neighbours only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from .layers import records_graph
from .packing import FewShapes

__all__ = ["PACKED_ATTENTION", "check_available"]


def _equal_length_runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(number of sequences, length) for each run of neighbours of equal length."""
    return [(sum(1 for _ in run), length) for length, run in groupby(lengths)]


def _sliding_mask(queries: int, length: int, window: int, device: torch.device) -> Tensor:
    """``(queries, length)`` boolean mask of the last tokens: each sees itself and the ``window - 1`` before it."""
    mask = torch.ones(queries, length, dtype=torch.bool, device=device)
    return mask.tril(length - queries).triu(length - queries + 1 - window)


class _ShortAttention(torch.autograd.Function):
    """Causal attention over ``(n, heads, L, head_dim)`` texts of one length as matrix products, in bf16 on a CPU.

    Exact as torch's kernel, and for short texts faster, most of all its backward pass: scores and their gradients are
    fp32, only their products with other states bf16 (Dao, "FlashAttention-2", 2023, section 3.1). It keeps the
    probabilities, ``heads * L ** 2`` for each text.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        length = key.shape[2]
        # Query heads that share keys lie one below the other.
        q, k, v = (states.reshape(key.shape[0] * key.shape[1], -1, key.shape[3]) for states in (query, key, value))
        scores = torch.bmm(q.float() * scale, k.float().mT)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        probabilities = scores.view(-1, length, length).masked_fill_(later, -torch.inf).softmax(-1).to(v.dtype)
        probabilities = probabilities.view_as(scores)
        output = torch.bmm(probabilities, v)
        ctx.save_for_backward(q, k, v, probabilities, output)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape)
        return output.view(query.shape)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("attention in bf16 has no second derivative: set attn_implementation='eager'")
        q, k, v, probabilities, output = ctx.saved_tensors
        gradient = gradient.reshape(output.shape)
        mean = (gradient.float() * output).sum(-1, keepdim=True)
        of_scores = torch.bmm(gradient.float(), v.float().mT).sub_(mean).mul_(probabilities).mul_(ctx.scale).to(q.dtype)
        shape_of_queries, shape_of_keys = ctx.shapes
        return (
            torch.bmm(of_scores, k).view(shape_of_queries),
            torch.bmm(of_scores.mT, q).view(shape_of_keys),
            torch.bmm(probabilities.mT, gradient).view(shape_of_keys),
            None,
        )


# Where it was measured (tests/benchmarks/README.md): on processors that multiply bf16, but have no AMX.
_CPU = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
_MOST_SHORT_TOKENS = 256 if _CPU.get("avx512_bf16") and not _CPU.get("amx_tile") else 0
# Of one call: more of them leave the cache, and make the forward pass slower than torch's.
_MOST_SCORES = 2**21


def _sdpa(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """Causal attention per sequence, one call for each run of equal lengths; works on every device and dtype.

    Queries are those of all tokens, or of the last token of each sequence.
    """
    few: FewShapes | None = options.get("few_shapes")
    if few is None:
        runs = [run for run in _equal_length_runs(options["sequence_lengths"]) if run[1]]
        tokens = [count * length for count, length in runs]
        asking = tokens if len(query) == len(key) else [count for count, _ in runs]
        # Split, not sliced: the gradient of a slice is a tensor of zeros as large as the whole batch.
        parts = [query.split(asking), key.split(tokens), value.split(tokens)]
    else:
        runs = few.runs
        parts = [[states.index_select(0, index) for index in few.index] for states in (query, key, value)]
    pieces = zip(*parts, strict=True)
    window, outputs = options["sliding_window"], []
    for (count, length), states in zip(runs, pieces, strict=True):
        q, k, v = (piece.unflatten(0, (count, -1)).transpose(1, 2) for piece in states)
        bounded = window is not None and window < length
        # Of fewer tokens the forward pass alone, as of `encode`, is faster by torch's kernel.
        least = 13 if torch.is_inference_mode_enabled() else 2
        short = least <= q.shape[2] <= _MOST_SHORT_TOKENS and q.device.type == "cpu" and q.dtype == torch.bfloat16
        if short and not (bounded or options["dropout"] or records_graph()):
            at_once = max(1, _MOST_SCORES // (q.shape[1] * length**2))
            for some in zip(*(each.split(at_once) for each in (q, k, v)), strict=True):
                outputs.append(_ShortAttention.apply(*some, options["scaling"]).transpose(1, 2).flatten(0, 1))
            continue
        mask = _sliding_mask(q.shape[2], length, window, query.device) if bounded else None
        output = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=options["dropout"],
            is_causal=mask is None and q.shape[2] > 1,
            scale=options["scaling"],
            enable_gqa=True,
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    if few is not None and outputs:
        return torch.cat(outputs).index_select(0, few.back)
    if len(outputs) == 1:
        # Texts of one length are not copied, which would make them slower than a padded batch, unless attention
        # returned another memory layout: the next function is compiled for contiguous input.
        return outputs[0].contiguous()
    return torch.cat(outputs) if outputs else torch.empty_like(query)


def _flash_obstacle(query: Tensor) -> str | None:
    """What keeps flash attention, torch's or the package's, from ``(T, heads, head_dim)`` states; None if nothing."""
    if not query.is_cuda:
        return f"runs on CUDA devices, not on {query.device.type!r}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"runs in bf16 or fp16, not in {query.dtype}: load the model with dtype=torch.bfloat16, or use autocast"
    if query.shape[-1] > 256:
        return f"takes a head_dim of at most 256, not {query.shape[-1]}"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 (Ampere) or newer"
    return None


def _boundaries(options: dict[str, Any]) -> tuple[Tensor, Tensor, int, int]:
    """Where texts end among queries and among keys, and the longest of both, as flash attention takes them."""
    # Where no text has two queries, the kernel swaps heads for queries, and its backward pass gets the sums of the
    # softmax in another order than it expects (``seqlenq_ngroups_swapped`` in ``mha_varlen_fwd``).
    longest = (max(options[name], 2) for name in ("max_length_q", "max_length_k"))
    return options["cu_seq_lens_q"], options["cu_seq_lens_k"], *longest


@cache
def _parameters(function: Callable[..., Tensor]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _torch_varlen_obstacle(query: Tensor, options: dict[str, Any]) -> str | None:
    """What keeps torch's variable-length attention from this call; None if nothing does."""
    from torch.nn.attention.varlen import varlen_attn

    if obstacle := _flash_obstacle(query):
        return obstacle
    if options["dropout"]:
        return "has no dropout: set attention_dropout to 0 in the config"
    # The flash-attn package pads heads, torch does not.
    if query.shape[-1] % 8:
        return f"takes a head_dim that is a multiple of 8, not {query.shape[-1]}"
    if options["sliding_window"] is not None and "window_size" not in _parameters(varlen_attn):
        return f"has sliding windows from torch 2.11 on (found torch {torch.__version__})"
    return None


def _torch_varlen(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """torch's own variable-length attention (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn

    if obstacle := _torch_varlen_obstacle(query, options):
        raise ValueError(f"torch's variable-length attention {obstacle}; or choose another attn_implementation")
    window = options["sliding_window"]
    # torch 2.10 has is_causal, later versions a scale and a window whose right end is zero. Keys may be shared between
    # heads in all kernels, if 2.12 is told so; 2.11 does not ask. 2.10 documents one number of heads.
    parameters = _parameters(varlen_attn)
    if "window_size" in parameters:
        arguments = {"scale": options["scaling"], "window_size": (-1 if window is None else window - 1, 0)}
        if "enable_gqa" in parameters:
            arguments["enable_gqa"] = True
    else:
        arguments, groups = {"is_causal": True}, query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    return varlen_attn(query, key, value, *_boundaries(options), **arguments)


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """The variable-length kernel of the flash-attn package (CUDA, half precision)."""
    # Without the try, transformers would refuse this file, as remote code from the Hub, where the package is missing.
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise ImportError("flash-attn cannot be imported; install it, or choose another attn_implementation") from error

    window = options["sliding_window"]
    return flash_attn_varlen_func(
        query,
        key,
        value,
        *_boundaries(options),
        dropout_p=options["dropout"],
        softmax_scale=options["scaling"],
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )


def _has_torch_varlen() -> bool:
    try:
        import torch.nn.attention.varlen
    except ImportError:
        return False
    return torch.cuda.is_available() and torch.backends.cuda.is_flash_attention_available()


def _automatic(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """The fastest backend that can run these tensors."""
    if _flash_obstacle(query) is None and is_flash_attn_2_available():
        return _flash_attn(query, key, value, options)
    if _has_torch_varlen() and _torch_varlen_obstacle(query, options) is None:
        return _torch_varlen(query, key, value, options)
    return _sdpa(query, key, value, options)


def _as_attention_interface(kernel: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """Wraps a kernel over ``(T, heads, head_dim)`` states as a transformers attention function."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        sequence_lengths: list[int] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if sequence_lengths is None:
            stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
            return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        options = {
            "dropout": dropout,
            "scaling": scaling,
            "sliding_window": sliding_window,
            "sequence_lengths": sequence_lengths,
            **kwargs,
        }
        # (1, heads, T, head_dim) → (T, heads, head_dim); rotary embeddings under autocast leave q and k in fp32.
        states = [tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value)]
        return kernel(*states, options)[None], None

    return attention


def _stock_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of a call that is not packed, by the name under which exporters put their own."""
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


# A released folder brings this file along as remote code: its functions must not replace the installed package's.
_OWNER = "" if __name__ == "modeling_f2llm.attention" else f"_{__name__.rsplit('.', 2)[-2]}"
_KERNELS = {"packed": _automatic, "packed_sdpa": _sdpa, "packed_torch_varlen": _torch_varlen}

# The implementation name in the config, by the name that users ask for (None: nothing was asked for).
PACKED_ATTENTION: dict[str | None, str] = {
    None: f"packed{_OWNER}",
    "sdpa": f"packed_sdpa{_OWNER}",
    "torch_varlen": f"packed_torch_varlen{_OWNER}",
    **{name: f"{name}{_OWNER}" for name in _KERNELS},
    **{f"{name}{_OWNER}": f"{name}{_OWNER}" for name in _KERNELS},
}

for _name, _kernel in _KERNELS.items():
    AttentionInterface.register(PACKED_ATTENTION[_name], _as_attention_interface(_kernel))
    AttentionMaskInterface.register(PACKED_ATTENTION[_name], _stock_mask)


def check_available(implementation: str) -> None:
    """Raises ImportError, saying what to install, if a packed implementation cannot run on this machine."""
    if implementation == PACKED_ATTENTION["torch_varlen"] and not _has_torch_varlen():
        raise ImportError(
            "attn_implementation='torch_varlen' needs torch >= 2.10 built for CUDA and a CUDA device "
            f"(found torch {torch.__version__}, CUDA {'present' if torch.cuda.is_available() else 'absent'}): "
            "install a CUDA build of torch, or leave attn_implementation out"
        )
