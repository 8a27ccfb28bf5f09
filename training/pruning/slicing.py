"""The cut itself: weights of the smaller model, taken out of the larger one."""

from __future__ import annotations

from copy import deepcopy

import torch
from accelerate import init_empty_weights
from torch import Tensor

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.modeling_f2llm import F2LLMModel
from training.pruning.plan import PruningPlan

# What each weight of a layer is indexed by, rows and columns; None stays whole. The heads do: q_norm and k_norm are
# per head dimension. A bias has the rows of its weight.
_CUTS: dict[str, tuple[str | None, ...]] = {
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    "self_attn.q_proj.weight": (None, "hidden"),
    "self_attn.k_proj.weight": (None, "hidden"),
    "self_attn.v_proj.weight": (None, "hidden"),
    "self_attn.o_proj.weight": ("hidden", None),
    "self_attn.q_norm.weight": (None,),
    "self_attn.k_norm.weight": (None,),
    "self_attn.q_proj.bias": (None,),
    "self_attn.k_proj.bias": (None,),
    "self_attn.v_proj.bias": (None,),
    "self_attn.o_proj.bias": ("hidden",),
    "mlp.gate_proj.weight": ("neurons", "hidden"),
    "mlp.up_proj.weight": ("neurons", "hidden"),
    "mlp.down_proj.weight": ("hidden", "neurons"),
}


def slice_model(model: F2LLMModel, target_config: F2LLMConfig, plan: PruningPlan) -> F2LLMModel:
    """Takes the weights of a plan out of a model.

    The residual stream is one and the same from the embeddings to the final norm, so one set of hidden channels cuts
    every matrix that reads from it or writes to it. Nothing is rescaled: the norms bring the mean square of the
    channels that are left to one, as they did with all channels.

    Besides the model only the smaller one is in memory; no tensor is shared between them.

    Args:
        model: The larger model; unchanged.
        target_config: Shape of the smaller one.
        plan: What stays.

    Returns:
        The smaller model in the dtype, on the device and in the mode of the larger one.

    Raises:
        UserError: If the plan does not fit the model or the shape.
    """
    plan.check(model.config, target_config)
    config = deepcopy(target_config)
    config.layer_types = [model.config.layer_types[layer] for layer in plan.layers]
    weights = dict(model.named_parameters())
    hidden = _index(plan.hidden, model.device)
    cut = {
        "embed_tokens.weight": _cut(weights["embed_tokens.weight"], None, hidden),
        "norm.weight": _cut(weights["norm.weight"], hidden),
    }
    for number, (layer, kept) in enumerate(zip(plan.layers, plan.neurons, strict=True)):
        indices = {"hidden": hidden, "neurons": _index(kept, model.device), None: None}
        for name, places in _CUTS.items():
            weight = weights.get(f"layers.{layer}.{name}")
            if weight is not None:
                cut[f"layers.{number}.{name}"] = _cut(weight, *(indices[place] for place in places))
    return build_model(model, config, cut)


def build_model(model: F2LLMModel, config: F2LLMConfig, weights: dict[str, Tensor]) -> F2LLMModel:
    """A model of another shape that holds the given weights themselves, otherwise like ``model``.

    Raises:
        RuntimeError: If a weight is missing, left over or of another shape.
    """
    # Buffers that no weights hold (rotary frequencies) are made; weights are not.
    with init_empty_weights(include_buffers=False):
        built = F2LLMModel(config)
    built.load_state_dict(weights, strict=True, assign=True)
    built.config.dtype = model.dtype
    return built.to(model.device).train(model.training)


def _index(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)


def _cut(weight: Tensor, *indices: Tensor | None) -> Tensor:
    """A copy of the rows and columns of these numbers; None takes all."""
    cut = weight.detach()
    for dim, index in enumerate(indices):
        if index is not None:
            cut = cut.index_select(dim, index)
    return cut.clone() if all(index is None for index in indices) else cut
