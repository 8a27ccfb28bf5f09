"""The decoder layer of F2LLM: Qwen3's, with a fused norm and, if the user so chooses, compiled around its attention.

Attention over texts of many lengths is a loop that no compiler gains from. What comes before and after it works token
by token, so one compiled function each serves every layer of a model and every number of tokens.

This file travels with every released model as remote code: it imports torch and transformers only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from transformers import AttentionInterface
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, rotate_half

__all__ = [
    "CompiledHalves",
    "F2LLMDecoderLayer",
    "F2LLMRMSNorm",
    "LowRankEmbedding",
    "adopt_layers",
    "records_graph",
]

logger = logging.getLogger(__name__)


def records_graph() -> bool:
    """Whether the graph is being traced, compiled or transformed by torch.func.

    Then nothing may depend on the lengths of these texts, and autograd functions may not save intermediate results.
    """
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class F2LLMRMSNorm(Qwen3RMSNorm):
    """Qwen3's norm, computed in fp32, by ways that are faster and as exact."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``(…, size)`` → ``(…, size)``, each vector scaled to a root mean square of one and then by the weight."""
        dtype = hidden_states.dtype
        # torch has a kernel for CUDA only, and none for the mixed dtypes of autocast.
        if dtype == self.weight.dtype and hidden_states.is_cuda:
            return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        if records_graph():
            return super().forward(hidden_states)
        normed = _RMSNorm.apply(hidden_states.float(), self.weight.float(), self.variance_epsilon)
        return normed.to(torch.promote_types(dtype, self.weight.dtype))


class _RMSNorm(torch.autograd.Function):
    """``x / sqrt(mean(x ** 2) + eps) * weight`` over the last dimension, in as few passes over memory as torch allows.

    With ``g`` the gradient times the weight, that of ``x`` is ``(g - x * mean(g * x) / rms ** 2) / rms``
    (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, appendix).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            # For a second derivative, of which `inverse` is no constant.
            inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
        product = gradient * x
        with torch.autocast(gradient.device.type, enabled=False):
            of_weight = inverse.flatten() @ product.flatten(0, -2) if ctx.needs_input_grad[1] else None
            mean = (product @ weight)[..., None] * inverse.square() / len(weight)
        return (gradient * weight).addcmul_(x, mean, value=-1).mul_(inverse), of_weight, None


class LowRankEmbedding(nn.Module):
    """Token embeddings that are the product of ``left``, ``(vocabulary, r)``, and ``right``, ``(width, r)`` transposed.

    Nested as ML-Embed's (arXiv 2605.15081): the leading ``rank`` columns of both are token embeddings, too.
    """

    def __init__(self, vocabulary: int, rank: int, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(vocabulary, rank), nn.Linear(rank, width, bias=False)
        self.rank = rank

    @classmethod
    def nearest(cls, weight: Tensor, rank: int) -> LowRankEmbedding:
        """Returns the best approximation of ``(vocabulary, width)`` by its truncated singular value decomposition."""
        made = cls(*weight.shape[:1], rank, weight.shape[1]).to(weight.device, weight.dtype)
        # Right singular vectors are the eigenvectors of this small matrix; the left ones, scaled, follow from them.
        wide = weight.double()
        directions = torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(1)[:, :rank]
        made.left.weight.data.copy_(wide @ directions)
        made.right.weight.data.copy_(directions)
        return made

    @property
    def weight(self) -> Tensor:
        """The product at ``rank``, ``(vocabulary, width)``."""
        return self.left.weight[:, : self.rank] @ self.right.weight[:, : self.rank].T

    def forward(self, input_ids: Tensor) -> Tensor:
        """``(…)`` token ids → ``(…, width)``."""
        return linear(self.left(input_ids)[..., : self.rank], self.right.weight[:, : self.rank])


class F2LLMDecoderLayer(Qwen3DecoderLayer):
    """Qwen3's decoder layer; with ``compiled`` set, packed batches take the compiled way around attention."""

    compiled = False
    halves: CompiledHalves

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        sequence_lengths: list[int] | None = None,
        last_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``(1, T, hidden_size)`` packed, or ``(batch, width, hidden_size)`` → the same shape.

        Args:
            hidden_states: What the layer before put out.
            position_embeddings: Cosines and sines of the rotary embedding, ``(…, T, head_dim)`` each.
            sequence_lengths: Lengths of the texts of a packed batch. Without them the layer is stock.
            last_tokens: ``(n,)`` places of the texts' last tokens. The model's last layer returns the states of these
                alone, ``(1, n, hidden_size)``, and computes keys and values of all other tokens only.
            **kwargs: Further arguments of Qwen3DecoderLayer and of the attention function.

        Raises:
            RuntimeError: If the layer is to be compiled and the machine cannot.
        """
        if sequence_lengths is None:
            return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)
        kwargs.pop("past_key_values", None)
        attention = self.self_attn
        before, after = (
            (self.halves.before, self.halves.after) if self.compiled else (_before_attention, _after_attention)
        )
        if last_tokens is None or attention.layer_idx < attention.config.num_hidden_layers - 1:
            states = before(self, hidden_states, *position_embeddings)
        else:
            before = self.halves.before_last if self.compiled else _before_attention
            states = before(self, hidden_states, *position_embeddings, last_tokens)
            hidden_states = hidden_states[:, last_tokens]
            ends = torch.arange(len(last_tokens) + 1, dtype=torch.int32, device=last_tokens.device)
            kwargs |= {"cu_seq_lens_q": ends, "max_length_q": 1}
        attend = AttentionInterface()[attention.config._attn_implementation]
        attended, _ = attend(
            attention,
            *states,
            dropout=attention.attention_dropout if self.training else 0.0,
            scaling=attention.scaling,
            sliding_window=attention.sliding_window,
            sequence_lengths=sequence_lengths,
            **kwargs,
        )
        # Not a view any more: a graph is kept for each shape that what it views may have.
        attended = torch.ops.aten._unsafe_view(attended, attended.shape)
        after = self.halves.after if self.compiled else _after_attention
        return after(self, hidden_states, attended)


def adopt_layers(model: nn.Module, compile: bool) -> None:
    """Gives the layers and norms of a Qwen3Model the classes of this file; parameters and their names stay.

    Args:
        model: Changed in place.
        compile: Whether its layers are compiled around attention.
    """
    halves = CompiledHalves()
    for module in model.modules():
        if type(module) is Qwen3RMSNorm:
            module.__class__ = F2LLMRMSNorm
        elif type(module) is Qwen3DecoderLayer:
            module.__class__ = F2LLMDecoderLayer
            module.compiled, module.halves = compile, halves


def _before_attention(
    layer: nn.Module, hidden_states: Tensor, cos: Tensor, sin: Tensor, last_tokens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, ``(1, heads, T, head_dim)`` each, in one dtype; queries of ``(n,)`` tokens, if given."""
    # True while torch compiles this function, and so in all that it compiled.
    if layer.compiled and not torch.compiler.is_compiling():
        layer.halves.warn_uncompiled()
    attention = layer.self_attn
    hidden_states = layer.input_layernorm(hidden_states)
    asking = hidden_states if last_tokens is None else hidden_states[:, last_tokens]
    query, key, value = (
        project(states).unflatten(-1, (-1, attention.head_dim))
        for project, states in (
            (attention.q_proj, asking),
            (attention.k_proj, hidden_states),
            (attention.v_proj, hidden_states),
        )
    )
    query, key, value = (states.transpose(1, 2) for states in (attention.q_norm(query), attention.k_norm(key), value))
    key = _rotated(key, cos, sin)
    if last_tokens is not None:
        cos, sin = cos[:, last_tokens], sin[:, last_tokens]
    # Under autocast the rotary embedding leaves fp32.
    return _rotated(query, cos, sin).to(value.dtype), key.to(value.dtype), value


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``(1, heads, T, head_dim)`` with their positions, given ``(1, T, head_dim)`` cosines and sines."""
    cos, sin = cos[:, None], sin[:, None]
    return states * cos + rotate_half(states) * sin if records_graph() else _Rotation.apply(states, cos, sin)


class _Rotation(torch.autograd.Function):
    """The rotary embedding in two passes over memory instead of five; its gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half, rotated = states.shape[-1] // 2, states * cos
        rotated[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
        rotated[..., half:].addcmul_(states[..., :half], sin[..., half:])
        return rotated

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(gradient, cos, -sin), None, None


def _after_attention(layer: nn.Module, hidden_states: Tensor, attended: Tensor) -> Tensor:
    """Adds attention's output ``(1, T, heads, head_dim)`` and the MLP's to the residual stream."""
    hidden_states = hidden_states + layer.self_attn.o_proj(attended.flatten(2))
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


class CompiledHalves:
    """The functions before and after attention, compiled once for all layers of a model when it first runs.

    A copied or pickled model compiles its own functions when it first runs.
    """

    _warned = False

    @cached_property
    def before(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        """:func:`_before_attention`, compiled."""
        return _compiled(_before_attention)

    @cached_property
    def before_last(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        """:func:`_before_attention` with queries of some tokens, compiled apart."""
        return _compiled(_before_attention)

    @cached_property
    def after(self) -> Callable[..., Tensor]:
        """:func:`_after_attention`, compiled."""
        return _compiled(_after_attention)

    def warn_uncompiled(self) -> None:
        """Warn, once per model, that its layers run uncompiled."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "compile=True, but layers run uncompiled (slower, with the same numbers): torch has compiled them as "
                f"often as torch._dynamo.config.recompile_limit ({torch._dynamo.config.recompile_limit}) allows, once "
                "for each precision, device and way of keeping gradients, or compiling is switched off"
            )

    def __reduce__(self) -> tuple[type[CompiledHalves], tuple[()]]:
        return CompiledHalves, ()


def _compiled(half: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled half of a layer, with an error that says what is missing."""
    # torch caches compiled code per code object and limits its number: a copy per model keeps their limits apart.
    copied = FunctionType(half.__code__.replace(), half.__globals__, half.__name__, half.__defaults__)
    compiled = torch.compile(copied, dynamic=True)
    from torch._dynamo.exc import BackendCompilerFailed

    def run(*arguments: Any) -> Any:
        try:
            return compiled(*arguments)
        except BackendCompilerFailed as error:
            raise RuntimeError(
                "compile=True failed: torch.compile needs a C++ compiler on a CPU (on Debian and Ubuntu: "
                "`apt install g++`; or name one in the environment variable CXX) and Triton on a GPU. Install it, or "
                f"leave compile out. torch says: {error}"
            ) from error

    return run
