"""The shape that a model is cut to."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from modeling_f2llm.configuration_f2llm import FAMILY, F2LLMConfig
from training.common.errors import UserError
from training.common.yaml_file import unknown_key

# The three dimensions that are cut (arXiv 2603.19223, section 3.3).
PRUNED_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers")
# Pruning does not change these.
_KEPT_FIELDS = (
    *("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "attention_bias", "rms_norm_eps", "rope_parameters", "sliding_window"),
)


def pruned_config(source: F2LLMConfig, shape: Mapping[str, Any], where: str = "prune_to") -> F2LLMConfig:
    """Return the source's configuration with another width, MLP size or depth.

    ``layer_types`` and ``max_window_layers`` are cut to the new depth: loaders refuse a configuration that describes
    more layers than there are. The matryoshka dimensions that still fit stay, and the new width joins them.

    Args:
        source: Configuration of the model to be cut; not changed.
        shape: Any of ``hidden_size``, ``intermediate_size`` and ``num_hidden_layers``; or ``family``, the name of a
            published size, whose fields the others override. What is left out stays as in the source.
        where: What the shape is called in errors.

    Example:
        >>> source = F2LLMConfig.from_family("f2llm-v2-0.6b")
        >>> pruned_config(source, {"family": "f2llm-v2-80m"}).matryoshka_dimensions
        [320, 256, 128, 64, 32, 16, 8]
    """
    target = deepcopy(source)
    for name, value in _read_shape(source, shape, where).items():
        setattr(target, name, value)
    depth, width = target.num_hidden_layers, target.hidden_size
    # Too short if the source has too few layers, which check_shape reports below.
    target.layer_types = list(source.layer_types[:depth])
    target.max_window_layers = min(source.max_window_layers, depth)
    if source.matryoshka_dimensions is not None:
        target.matryoshka_dimensions = [width, *(dim for dim in source.matryoshka_dimensions if dim < width)]
    check_shape(source, target, where)
    target.validate()
    return target


def _read_shape(source: F2LLMConfig, shape: Mapping[str, Any], where: str) -> dict[str, int]:
    """Return the fields that a shape names, those of a family member included."""
    for key in shape:
        if key not in ("family", *PRUNED_FIELDS):
            raise unknown_key(where, key, ["family", *PRUNED_FIELDS])
    if not shape:
        raise UserError(f"{where}: names no shape; give {', '.join(PRUNED_FIELDS)}, or family")
    fields: dict[str, Any] = {}
    if "family" in shape:
        family = str(shape["family"])
        if family.lower() not in FAMILY:
            raise unknown_key(f"{where}, family", family, list(FAMILY))
        *sizes, heads = FAMILY[family.lower()]
        if heads != source.num_attention_heads:
            raise UserError(
                f"{where}: {family} has {heads} attention heads, the model {source.num_attention_heads}, and pruning "
                "does not change heads; take another family or give the sizes one by one"
            )
        fields = dict(zip(PRUNED_FIELDS, sizes, strict=True))
    fields |= {name: value for name, value in shape.items() if name != "family"}
    for name, value in fields.items():
        if type(value) is not int:
            raise UserError(f"{where}: {name} must be a whole number, got {value!r}")
    return fields


def check_shape(source: F2LLMConfig, target: F2LLMConfig, where: str = "the target") -> None:
    """Refuse a shape that cannot be cut out of another.

    A width must be a multiple of the number of attention heads. Qwen3 itself projects every width to heads of
    ``head_dim``, and transformers' ``Qwen3Config`` loads any; but its neighbours (``LlamaConfig``) and loaders that
    derive a missing ``head_dim`` refuse others, and all published widths are such multiples.
    """
    for name in PRUNED_FIELDS:
        has, wants = getattr(source, name), getattr(target, name)
        if wants < 1:
            raise UserError(f"{where}: {name} must be at least 1, got {wants}")
        if wants > has:
            raise UserError(f"{where}: {name} {wants} is more than the {has} of the model; pruning only takes away")
    for name in _KEPT_FIELDS:
        has, wants = getattr(source, name, None), getattr(target, name, None)
        if has != wants:
            raise UserError(f"{where}: {name} is {wants}, but {has} in the model, and pruning does not change it")
    heads, width = target.num_attention_heads, target.hidden_size
    if width % heads and width != source.hidden_size:
        raise UserError(
            f"{where}: hidden_size {width} is no multiple of the {heads} attention heads, which several loaders of "
            f"such models need; take {max(heads, width // heads * heads)}"
        )
