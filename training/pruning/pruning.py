"""Cut a model to a smaller shape with the same vocabulary and heads: plan, slice, validate."""

from __future__ import annotations

from copy import deepcopy

import torch
from accelerate import init_empty_weights
from torch import Tensor

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.modeling_f2llm import F2LLMModel
from training.common.errors import UserError
from training.models.model_folder import is_finite
from training.pruning.importance import Importance, weight_importance
from training.pruning.plan import PruningPlan, make_plan

# What the dimensions of each weight of a layer are indexed by; None stays whole. The heads do: q_norm and k_norm have
# one weight per head dimension. A bias has the rows of its weight.
_CUTS: dict[str, tuple[str | None, ...]] = {
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    **{f"self_attn.{name}_proj.weight": (None, "hidden") for name in "qkv"},
    **{f"self_attn.{name}_proj.bias": (None,) for name in "qkv"},
    **{f"self_attn.{name}_norm.weight": (None,) for name in "qk"},
    "self_attn.o_proj.weight": ("hidden", None),
    "self_attn.o_proj.bias": ("hidden",),
    "mlp.gate_proj.weight": ("neurons", "hidden"),
    "mlp.up_proj.weight": ("neurons", "hidden"),
    "mlp.down_proj.weight": ("hidden", "neurons"),
}


def prune(
    model: F2LLMModel,
    target_config: F2LLMConfig,
    importance: Importance | None = None,
    *,
    hidden: str = "published",
    layers: str = "first",
) -> F2LLMModel:
    """Cut a model to a shape that fits into its own: width, MLP size and layers (arXiv 2603.19223, section 3.3).

    The result embeds poorly until it is trained further; the published models are then distilled from the model they
    were cut from. Without ``importance``, weights decide, which is not the published way; for ``hidden`` and ``layers``
    see :func:`~training.pruning.plan.make_plan`. The smaller model shares no tensor with the larger one.

    Example:
        >>> smaller = prune(model, pruned_config(model.config, {"family": "f2llm-v2-80m"}))  # doctest: +SKIP
    """
    importance = weight_importance(model) if importance is None else importance
    return apply_plan(model, target_config, make_plan(model.config, target_config, importance, hidden, layers))


def apply_plan(model: F2LLMModel, target_config: F2LLMConfig, plan: PruningPlan) -> F2LLMModel:
    """Take the weights of a plan out of a model; a UserError if one is not finite.

    The residual stream runs from the embeddings to the final norm, so one set of hidden channels cuts every matrix that
    reads from it or writes to it. Nothing is rescaled: the norms bring the mean square of the remaining channels to
    one, as they did with all channels. The result shares no tensor with the larger model.
    """
    config = deepcopy(target_config)
    config.layer_types = [model.config.layer_types[layer] for layer in plan.layers]
    weights = dict(model.named_parameters())
    hidden = torch.tensor(plan.hidden, device=model.device)
    cut = {
        "embed_tokens.weight": _cut(weights["embed_tokens.weight"], None, hidden),
        "norm.weight": _cut(weights["norm.weight"], hidden),
    }
    for number, (layer, kept) in enumerate(zip(plan.layers, plan.neurons, strict=True)):
        indices = {"hidden": hidden, "neurons": torch.tensor(kept, device=model.device), None: None}
        for name, dimensions in _CUTS.items():
            # Only some models have biases.
            if (weight := weights.get(f"layers.{layer}.{name}")) is not None:
                cut[f"layers.{number}.{name}"] = _cut(weight, *(indices[each] for each in dimensions))
    for name, weight in cut.items():
        if not is_finite(weight):
            raise UserError(f"weight {name} of the cut model is NaN or infinite; check the model that was cut")
    pruned = build_model(model, config, cut)
    pruned.config.validate()
    return pruned


def build_model(model: F2LLMModel, config: F2LLMConfig, weights: dict[str, Tensor]) -> F2LLMModel:
    """Return a model of another shape that holds exactly the given weights, in dtype, device and mode of ``model``."""
    # Buffers that no weights hold (rotary frequencies) are made; weights are not.
    with init_empty_weights(include_buffers=False):
        built = F2LLMModel(config)
    built.load_state_dict(weights, strict=True, assign=True)
    built.config.dtype = model.dtype
    return built.to(model.device).train(model.training)


def _cut(weight: Tensor, *indices: Tensor | None) -> Tensor:
    """Return a copy of the rows and columns of these numbers; None takes all."""
    cut = weight.detach()
    for dim, index in enumerate(indices):
        if index is not None:
            cut = cut.index_select(dim, index)
    return cut.clone() if all(index is None for index in indices) else cut
