"""The shape that a model is cut to, and what of the model stays, chosen by importance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from modeling_f2llm.configuration_f2llm import FAMILY, F2LLMConfig
from training.common.errors import UserError
from training.common.outputs import write_whole
from training.common.yaml_file import unknown_key
from training.pruning.importance import Importance

# The three dimensions that are cut (arXiv 2603.19223, section 3.3).
PRUNED_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers")
# What says how large a model may be instead; see search.py.
BUDGET_KEYS = ("max_parameters", "max_megabytes", "dtype")
_HEADER = "# What of a model stays, by its own numbers; channels in the order of the cut model.\n"


def pruned_config(source: F2LLMConfig, shape: Mapping[str, Any], where: str = "prune_to") -> F2LLMConfig:
    """Return the source's configuration with another width, MLP size or depth.

    ``shape`` has any of ``hidden_size``, ``intermediate_size`` and ``num_hidden_layers``, or ``family``, the name of a
    published size, whose fields the others override; ``where`` is what errors call it. The matryoshka dimensions that
    still fit stay, and the new width joins them. A width must be a multiple of the number of attention heads, as all
    published ones are: loaders that derive a missing ``head_dim`` refuse others.

    Example:
        >>> source = F2LLMConfig.from_family("f2llm-v2-0.6b")
        >>> pruned_config(source, {"family": "f2llm-v2-80m"}).matryoshka_dimensions
        [320, 256, 128, 64, 32, 16, 8]
    """
    target, heads = deepcopy(source), source.num_attention_heads
    for name, wants in _fields(shape, heads, where).items():
        if type(wants) is not int or wants < 1:
            raise UserError(f"{where}: {name} must be a whole number of at least 1, got {wants!r}")
        if wants > (has := getattr(source, name)):
            raise UserError(f"{where}: {name} {wants} is more than the {has} of the model; pruning only takes away")
        setattr(target, name, wants)
    depth, width = target.num_hidden_layers, target.hidden_size
    if width % heads and width != source.hidden_size:
        raise UserError(
            f"{where}: hidden_size {width} is no multiple of the {heads} attention heads, which several loaders of "
            f"such models need; take {max(heads, width // heads * heads)}"
        )
    target.layer_types = list(source.layer_types[:depth])
    target.max_window_layers = min(source.max_window_layers, depth)
    # The first layers of a cut model embed nothing by themselves until they are trained.
    target.exit_layers = None
    if source.matryoshka_dimensions is not None:
        target.matryoshka_dimensions = [width, *(dim for dim in source.matryoshka_dimensions if dim < width)]
    target.validate()
    return target


def _fields(shape: Mapping[str, Any], heads: int, where: str) -> dict[str, Any]:
    """Return the fields that a shape names, those of a family member included."""
    if not shape:
        raise UserError(f"{where}: names no shape; give {', '.join(PRUNED_FIELDS)}, or family, or max_parameters")
    known = ["family", *PRUNED_FIELDS]
    if unknown := [key for key in shape if key not in known]:
        raise unknown_key(where, unknown[0], [*known, *BUDGET_KEYS])
    fields = dict(shape)
    if (family := str(fields.pop("family", "")).lower()) in FAMILY:
        *sizes, family_heads = FAMILY[family]
        if family_heads != heads:
            raise UserError(
                f"{where}: {family} has {family_heads} attention heads, the model {heads}, and pruning does not change "
                "heads; take another family or give the sizes one by one"
            )
        fields = {**dict(zip(PRUNED_FIELDS, sizes, strict=True)), **fields}
    elif "family" in shape:
        raise unknown_key(f"{where}, family", family, list(FAMILY))
    return fields


def as_ranges(numbers: Iterable[int]) -> str:
    """Write numbers in their order, and runs of them as ranges: ``0-2 7 4-5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


@dataclass(frozen=True)
class PruningPlan:
    """What stays of a model, by the numbers of the larger model."""

    hidden: tuple[int, ...]  # channels of the residual stream, in the order of the cut model
    layers: tuple[int, ...]  # in the order of the cut model
    neurons: tuple[tuple[int, ...], ...]  # of the MLP of each of these layers
    source: Mapping[str, int]  # hidden_size, intermediate_size and num_hidden_layers of the larger model
    methods: Mapping[str, str]  # how hidden channels and layers were chosen, for the reader

    def save(self, path: Path) -> None:
        """Write YAML; long lists become ranges such as ``0-3 5 9-20``, in their order."""
        content = {
            "source": dict(self.source),
            "methods": dict(self.methods),
            "layers": as_ranges(self.layers),
            "hidden": as_ranges(self.hidden),
            "neurons": {layer: as_ranges(neurons) for layer, neurons in zip(self.layers, self.neurons, strict=True)},
        }
        write_whole(path, _HEADER + yaml.safe_dump(content, sort_keys=False, width=110))


def make_plan(
    config: F2LLMConfig,
    target_config: F2LLMConfig,
    importance: Importance,
    hidden: str = "published",
    layers: str = "first",
) -> PruningPlan:
    """Choose what stays; of each layer the MLP neurons of the largest activation norm, in their own order.

    ``hidden`` says which channels of the residual stream stay: ``published``, those of the largest norm, in their own
    order (arXiv 2603.19223, section 3.3, which leaves norm and order open); the ``leading`` ones, where matryoshka
    training has put what matters most, and which a teacher of the larger model's kind has at the same numbers; or
    ``reordered``, see :func:`_reordered`. ``layers``: the ``first`` ones, as published, or those of most ``change``,
    the block influence of ShortGPT (Men et al., arXiv 2403.03853), in their own order, which the authors found to be
    worse.
    """
    if layers == "change" and importance.change is None:
        raise UserError("layers='change' needs activations, and there are only weights; calibrate on texts")
    depth, neurons = target_config.num_hidden_layers, target_config.intermediate_size
    kept = {"first": _leading, "change": _largest}[layers](importance.change, depth)
    choose = {"published": _largest, "leading": _leading, "reordered": _reordered}[hidden]
    return PruningPlan(
        hidden=tuple(choose(importance.channels(kept), target_config.hidden_size)),
        layers=tuple(kept),
        neurons=tuple(tuple(_largest(importance.neurons[layer], neurons)) for layer in kept),
        source={name: getattr(config, name) for name in PRUNED_FIELDS},
        methods={"hidden": hidden, "layers": layers},
    )


def default_hidden(config: F2LLMConfig, written: Mapping[str, Any]) -> tuple[str, str]:
    """Return how the hidden channels that stay are chosen without a word of the user, and why, for the log.

    Distillation compares channel ``k`` of the student with channel ``k`` of the teacher, so what is kept should keep
    its number. After matryoshka training that costs nothing: the leading channels matter most. ``config`` assumes such
    training of any Qwen3; only a ``config.json``, here ``written``, that speaks of it is of a model that had it.
    """
    if "is_matryoshka" in written and any(dim < config.hidden_size for dim in config.matryoshka_dimensions or ()):
        return "leading", "it was trained with matryoshka, so these matter most and stay aligned with a teacher's"
    return "published", "those of the largest norm: it was not trained with matryoshka"


def _leading(importance: Tensor | None, count: int) -> list[int]:
    return list(range(count))


def _largest(importance: Tensor, count: int) -> list[int]:
    """Return the indices of the largest, ascending; of equal ones the first."""
    return importance.sort(descending=True, stable=True).indices[:count].sort().values.tolist()


def _reordered(importance: Tensor, count: int) -> list[int]:
    """Return the channels of the largest norm, ordered for matryoshka and for distillation.

    Matryoshka truncates embeddings, so the leading channels should matter most; distillation compares channel ``k`` of
    the cut model with channel ``k`` of a teacher of the larger model's kind. So a kept channel among the first
    ``count`` keeps its number. The numbers of dropped channels go to the kept ones from beyond ``count``, in falling
    importance, so that shorter embeddings get the most important of them.
    """
    kept = _largest(importance, count)
    beyond = sorted((channel for channel in kept if channel >= count), key=lambda channel: -importance[channel].item())
    fillers = iter(beyond)
    return [channel if channel in kept else next(fillers) for channel in range(count)]
