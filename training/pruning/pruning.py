"""From a model to a smaller one with the same vocabulary and heads: plan, slice, validate."""

from __future__ import annotations

import logging

import torch

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.modeling_f2llm import F2LLMModel
from training.common.errors import UserError
from training.models.model_size import count_parameters
from training.pruning.importance import Importance, weight_importance
from training.pruning.plan import PruningPlan, make_plan
from training.pruning.shape import check_shape
from training.pruning.slicing import slice_model

logger = logging.getLogger(__name__)


def prune(
    model: F2LLMModel,
    target_config: F2LLMConfig,
    importance: Importance | None = None,
    *,
    hidden: str = "activation_norm",
    layers: str = "first",
) -> F2LLMModel:
    """Cuts a model to a shape that fits into its own: width, MLP size and layers (arXiv 2603.19223, section 3.3).

    What comes out embeds poorly until it is trained on; the published models are then distilled from the model they
    were cut from.

    Args:
        model: The model to cut; unchanged.
        target_config: The shape wanted; :func:`~training.pruning.shape.pruned_config` makes it.
        importance: Activations measured by :func:`~training.pruning.importance.calibrate`. None estimates them
            from the weights, which knows nothing of any text: a stand-in, not the published way.
        hidden: Which channels stay; see :func:`~training.pruning.plan.make_plan`.
        layers: Which layers stay: ``first`` or ``change``, which needs activations.

    Returns:
        The smaller model, in the dtype and on the device of the larger one; it shares no tensor with it.

    Raises:
        UserError: If the shape does not fit into the model's, the importance is not this model's, a method is unknown,
            or the model's weights are not finite.

    Example:
        >>> smaller = prune(model, pruned_config(model.config, {"family": "f2llm-v2-80m"}))  # doctest: +SKIP
    """
    check_shape(model.config, target_config)
    if importance is None:
        importance = weight_importance(model)
    return apply_plan(model, target_config, make_plan(model.config, target_config, importance, hidden, layers))


def apply_plan(model: F2LLMModel, target_config: F2LLMConfig, plan: PruningPlan) -> F2LLMModel:
    """Cuts a model by a plan, made before or by hand, and checks the result.

    Raises:
        UserError: If the plan fits neither the model nor the shape, or the weights it keeps are not finite.
    """
    check_shape(model.config, target_config)
    pruned = slice_model(model, target_config, plan)
    validate(pruned)
    logger.info("cut %s parameters to %s", f"{model.num_parameters():,}", f"{pruned.num_parameters():,}")
    return pruned


def validate(model: F2LLMModel) -> None:
    """Checks a model that was put together: as many parameters as its shape has, all of them finite.

    Raises:
        UserError: If a weight is NaN or infinite; it was so before.
        RuntimeError: If parameters are too many or too few.
    """
    model.config.validate()
    expected = count_parameters(model.config)
    if model.num_parameters() != expected:
        raise RuntimeError(f"the cut model has {model.num_parameters():,} parameters, its shape {expected:,}")
    for name, weight in model.named_parameters():
        # Both are NaN if one weight is; isfinite itself would need a copy of the table of embeddings.
        if not torch.stack(weight.detach().aminmax()).isfinite().all():
            raise UserError(f"weight {name} of the cut model is NaN or infinite; check the model that was cut")
