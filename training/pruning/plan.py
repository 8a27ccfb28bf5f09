"""What stays of a model: chosen by its importance, written as YAML that a person can read and change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.errors import UserError
from training.common.outputs import write_whole
from training.common.yaml_file import load_yaml
from training.config.arguments import HIDDEN_METHODS, LAYER_METHODS
from training.models.model_folder import user_error
from training.pruning.importance import Importance
from training.pruning.shape import PRUNED_FIELDS, check_shape

_HEADER = "# What of a model stays, by its own numbers; channels in the order of the cut model.\n"


def as_ranges(numbers: Iterable[int]) -> str:
    """Write numbers in their order, and runs of them as ranges.

    Example:
        >>> as_ranges([0, 1, 2, 7, 4, 5])
        '0-2 7 4-5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def from_ranges(text: Any) -> tuple[int, ...]:
    """Read what :func:`as_ranges` wrote; YAML makes an integer of a single number."""
    numbers: list[int] = []
    for word in str(text).split():
        first, _, last = word.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


@dataclass(frozen=True)
class PruningPlan:
    """What stays of a model, by the numbers of the larger model.

    Attributes:
        hidden: Channels of the residual stream, in the order of the cut model.
        layers: Layers, in the order of the cut model.
        neurons: For each of these layers, its MLP neurons.
        source: ``hidden_size``, ``intermediate_size`` and ``num_hidden_layers`` of the larger model.
        methods: How hidden channels and layers were chosen, for the reader.
    """

    hidden: tuple[int, ...]
    layers: tuple[int, ...]
    neurons: tuple[tuple[int, ...], ...]
    source: Mapping[str, int]
    methods: Mapping[str, str]

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

    @classmethod
    def load(cls, path: Path) -> PruningPlan:
        """Read what :meth:`save` wrote, edited or not."""
        content = load_yaml(path)
        with user_error(f"{path}: is not a plan", "write numbers as in '0-3 5 9-20', or make the plan again"):
            layers = from_ranges(content["layers"])
            return cls(
                hidden=from_ranges(content["hidden"]),
                layers=layers,
                neurons=tuple(from_ranges(content["neurons"][layer]) for layer in layers),
                source={name: content["source"][name] for name in PRUNED_FIELDS},
                methods=content["methods"],
            )

    def check(self, source: F2LLMConfig, target: F2LLMConfig) -> None:
        """Refuse a plan that does not fit the model or the target shape, or has a number twice or out of range."""
        for name in PRUNED_FIELDS:
            if self.source[name] != getattr(source, name):
                raise UserError(
                    f"plan: it is for a model of {name} {self.source[name]}, not {getattr(source, name)}; make a plan "
                    "for this model"
                )
        for what, kept, has, wants in [
            ("layers", self.layers, source.num_hidden_layers, target.num_hidden_layers),
            ("hidden", self.hidden, source.hidden_size, target.hidden_size),
            *(
                (f"neurons of layer {layer}", kept, source.intermediate_size, target.intermediate_size)
                for layer, kept in zip(self.layers, self.neurons, strict=True)
            ),
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
    """Choose what stays; of each layer the MLP neurons of the largest activation norm, in their own order.

    Args:
        config: Shape of the model that is cut.
        target_config: The shape wanted; see :func:`~training.pruning.shape.pruned_config`.
        importance: Statistics of the model.
        hidden: Which channels of the residual stream stay:

            * ``activation_norm``: those of the largest norm, in their own order. Published (arXiv 2603.19223, section
              3.3, which leaves the norm and the order open).
            * ``leading``: the first ones. Matryoshka training has put what matters most there.
            * ``reordered``: those of ``activation_norm`` in another order; see :func:`_reordered`.
        layers: Which layers stay: the ``first`` ones, as published, or those of most ``change``, the block influence of
            ShortGPT (Men et al., arXiv 2403.03853), in their own order, which the authors found to be worse.
    """
    for what, chosen, known in (("hidden", hidden, HIDDEN_METHODS), ("layers", layers, LAYER_METHODS)):
        if chosen not in known:
            raise UserError(f"{what} cannot be {chosen!r}; use one of {', '.join(known)}")
    if layers == "change" and importance.change is None:
        raise UserError(
            "layers='change' needs activations, and there are only weights; calibrate on texts, or use layers='first'"
        )
    check_shape(config, target_config)
    importance.check(config)
    depth, neurons = target_config.num_hidden_layers, target_config.intermediate_size
    kept = list(range(depth)) if layers == "first" else _largest(importance.change, depth)
    choose = {"activation_norm": _largest, "leading": lambda _, count: range(count), "reordered": _reordered}[hidden]
    return PruningPlan(
        hidden=tuple(choose(importance.channels(kept), target_config.hidden_size)),
        layers=tuple(kept),
        neurons=tuple(tuple(_largest(importance.neurons[layer], neurons)) for layer in kept),
        source={name: getattr(config, name) for name in PRUNED_FIELDS},
        methods={"hidden": hidden, "layers": layers},
    )


def _largest(importance: Tensor, count: int) -> list[int]:
    """Return the indices of the largest, ascending; of equal ones the first."""
    return importance.sort(descending=True, stable=True).indices[:count].sort().values.tolist()


def _reordered(importance: Tensor, count: int) -> list[int]:
    """Return the channels of the largest norm, ordered for matryoshka and for distillation.

    Matryoshka truncates embeddings, so the leading channels should matter most, and training the larger model that way
    has put what matters most there. Distillation compares channel ``k`` of the cut model with channel ``k`` of a
    teacher of the larger model's kind. In their own order, all kept channels after a gap would move away from it.

    So a kept channel among the first ``count`` keeps its number. The numbers of dropped channels go to the kept ones
    from beyond ``count``, in falling importance, so that shorter embeddings get the most important of them.
    """
    kept = _largest(importance, count)
    beyond = sorted((channel for channel in kept if channel >= count), key=lambda channel: -importance[channel].item())
    fillers = iter(beyond)
    return [channel if channel in kept else next(fillers) for channel in range(count)]
