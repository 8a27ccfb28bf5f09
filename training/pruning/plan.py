"""What of a model stays: made from its importance, written as YAML that a person can read and change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.errors import UserError
from training.common.yaml_file import load_yaml, unknown_key
from training.config.pruning_arguments import HIDDEN_METHODS, LAYER_METHODS
from training.pruning.importance import Importance
from training.pruning.ranges import as_ranges, from_ranges
from training.pruning.shape import PRUNED_FIELDS, check_shape

_HEADER = "# What of a model stays, by its own numbers; channels in the order of the cut model.\n"


@dataclass(frozen=True)
class PruningPlan:
    """What stays of a model, by the numbers of the model that is cut.

    Attributes:
        hidden: Channels of the residual stream; their order is that of the cut model.
        layers: Layers, in the order of the cut model.
        neurons: For each of these layers, its MLP neurons.
        source: ``hidden_size``, ``intermediate_size`` and ``num_hidden_layers`` of the model that is cut.
        methods: How hidden channels and layers were chosen, for the reader.
    """

    hidden: tuple[int, ...]
    layers: tuple[int, ...]
    neurons: tuple[tuple[int, ...], ...]
    source: Mapping[str, int]
    methods: Mapping[str, str]

    def save(self, path: Path) -> None:
        """Writes YAML; long lists become ranges such as ``0-3 5 9-20``, in their order."""
        content = {
            "source": dict(self.source),
            "methods": dict(self.methods),
            "layers": as_ranges(self.layers),
            "hidden": as_ranges(self.hidden),
            "neurons": {layer: as_ranges(neurons) for layer, neurons in zip(self.layers, self.neurons, strict=True)},
        }
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(_HEADER + yaml.safe_dump(content, sort_keys=False, width=110), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> PruningPlan:
        """Reads what :meth:`save` wrote, or what somebody made of it.

        Raises:
            UserError: If the file is missing or does not hold a plan.
        """
        content = load_yaml(path)
        known = ("source", "methods", "layers", "hidden", "neurons")
        for key in content:
            if key not in known:
                raise unknown_key(str(path), key, known)
        missing = [key for key in known if key not in content]
        if missing:
            raise UserError(f"{path}: key {missing[0]!r} is missing; write the plan anew, or add it")
        layers = from_ranges(content["layers"], f"{path}: layers")
        source = _sizes(content["source"], path)
        if not isinstance(content["methods"], dict):
            raise UserError(f"{path}: methods must say how hidden channels and layers were chosen, by 'key: value'")
        neurons = content["neurons"]
        if not isinstance(neurons, dict) or set(neurons) != set(layers):
            raise UserError(f"{path}: neurons must have one entry for each of the layers {as_ranges(layers)}")
        return cls(
            hidden=from_ranges(content["hidden"], f"{path}: hidden"),
            layers=layers,
            neurons=tuple(from_ranges(neurons[layer], f"{path}: neurons of layer {layer}") for layer in layers),
            source=source,
            methods=content["methods"],
        )

    def check(self, source: F2LLMConfig, target: F2LLMConfig) -> None:
        """Compares the plan with the model that is cut and the shape that comes out.

        Raises:
            UserError: If they differ, a number stands twice or lies outside of the model.
        """
        for name in PRUNED_FIELDS:
            if self.source[name] != getattr(source, name):
                raise UserError(
                    f"plan: it is for a model of {name} {self.source[name]}, not {getattr(source, name)}; make a plan "
                    "for this model"
                )
        if len(self.neurons) != len(self.layers):
            raise UserError(
                f"plan: neurons are given for {len(self.neurons)} layers, layers keeps {len(self.layers)}; they must "
                "be as many"
            )
        neurons = [
            (f"neurons of layer {layer}", kept, source.intermediate_size, target.intermediate_size)
            for layer, kept in zip(self.layers, self.neurons, strict=True)
        ]
        for what, kept, has, wants in [
            ("layers", self.layers, source.num_hidden_layers, target.num_hidden_layers),
            ("hidden", self.hidden, source.hidden_size, target.hidden_size),
            *neurons,
        ]:
            if len(kept) != wants:
                raise UserError(f"plan: {what} keeps {len(kept)}, the target has {wants}; they must be as many")
            if len(set(kept)) != len(kept) or not all(0 <= number < has for number in kept):
                raise UserError(f"plan: {what} must be distinct numbers from 0 to {has - 1}")


def make_plan(
    config: F2LLMConfig,
    target_config: F2LLMConfig,
    importance: Importance,
    hidden: str = "activation_norm",
    layers: str = "first",
) -> PruningPlan:
    """Chooses what stays.

    The MLP neurons of a layer that stay are those of the largest activation norm, in their own order.

    Args:
        config: Shape of the model that is cut.
        target_config: The shape wanted; see :func:`~training.pruning.shape.pruned_config`.
        importance: Statistics of the model.
        hidden: Which channels of the residual stream stay:

            * ``activation_norm``: those of the largest norm, in their own order. Published (arXiv 2603.19223, section
              3.3, which leaves the norm and the order open).
            * ``leading``: the first ones. Matryoshka training has put what matters most there.
            * ``reordered``: those of ``activation_norm`` in another order; see :func:`_reordered`.
        layers: Which layers stay: the ``first`` ones, as published, or those of most ``change``, in their own order,
            which the authors found to be worse.

    Raises:
        UserError: If a method is unknown, the shapes do not fit, or layers are chosen by a change never measured.
    """
    _check_methods(hidden, layers, importance)
    check_shape(config, target_config)
    importance.check(config)
    kept_layers = _LAYERS[layers](importance, target_config.num_hidden_layers)
    return PruningPlan(
        hidden=tuple(_HIDDEN[hidden](importance.channels(kept_layers), target_config.hidden_size)),
        layers=tuple(kept_layers),
        neurons=tuple(
            tuple(_largest(importance.neurons[layer], target_config.intermediate_size)) for layer in kept_layers
        ),
        source={name: getattr(config, name) for name in PRUNED_FIELDS},
        methods={"hidden": hidden, "layers": layers},
    )


def _check_methods(hidden: str, layers: str, importance: Importance) -> None:
    for what, chosen, known in (("hidden", hidden, HIDDEN_METHODS), ("layers", layers, LAYER_METHODS)):
        if chosen not in known:
            raise UserError(f"{what} cannot be {chosen!r}; use one of {', '.join(known)}")
    if layers == "change" and importance.change is None:
        raise UserError(
            "layers='change' needs activations, and there are only weights; calibrate on texts, or use layers='first'"
        )


def _largest(importance: Tensor, count: int) -> list[int]:
    """Indices of the largest, ascending; of equals the first."""
    order = importance.sort(descending=True, stable=True).indices[:count]
    return order.sort().values.tolist()


def _leading(importance: Tensor, count: int) -> list[int]:
    return list(range(count))


def _reordered(importance: Tensor, count: int) -> list[int]:
    """The channels of the largest norm, ordered for matryoshka and for distillation.

    Two orders meet in the first ``d`` channels of the cut model. Matryoshka truncates embeddings: the leading channels
    should matter most, and training the larger model that way has put what matters most there. Distillation compares
    the cut model's channel ``k`` with the teacher's channel ``k``, for all ``k < d``, and the teacher is of the line of
    the model that was cut. Keeping the kept channels in their own order serves neither: each gap moves all that follow
    to the left, away from the teacher's.

    So a kept channel among the first ``d`` stays at its own number: aligned with the teacher, and as far ahead as
    matryoshka training had put it. The places left over belong to channels that were dropped, where nothing is aligned
    whatever comes there; the kept channels from beyond ``d`` fill them in falling importance, so that the shorter
    embeddings get the most important of them.
    """
    kept = _largest(importance, count)
    order = [None] * count
    for channel in kept:
        if channel < count:
            order[channel] = channel
    beyond = sorted((channel for channel in kept if channel >= count), key=lambda channel: -importance[channel].item())
    fillers = iter(beyond)
    return [next(fillers) if channel is None else channel for channel in order]


_HIDDEN = {"activation_norm": _largest, "leading": _leading, "reordered": _reordered}


def _first_layers(importance: Importance, count: int) -> list[int]:
    return list(range(count))


def _changing_layers(importance: Importance, count: int) -> list[int]:
    """Those of the largest block influence (ShortGPT, Men et al., arXiv 2403.03853)."""
    return _largest(importance.change, count)


_LAYERS = {"first": _first_layers, "change": _changing_layers}


def _sizes(source: Any, path: Path) -> dict[str, int]:
    """The shape of the model that a plan is for."""
    if not isinstance(source, dict) or set(source) != set(PRUNED_FIELDS):
        raise UserError(f"{path}: source must say {', '.join(PRUNED_FIELDS)} of the model that is cut")
    if not all(isinstance(size, int) and size > 0 for size in source.values()):
        raise UserError(f"{path}: source must give positive whole numbers, got {source}")
    return {name: source[name] for name in PRUNED_FIELDS}
