"""What a stage of a recipe may say that cuts a model instead of training one."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.common.errors import UserError

# How the hidden channels and the layers that stay are chosen; see training/pruning/pruning.py.
HIDDEN_METHODS = ("activation_norm", "leading", "reordered")
LAYER_METHODS = ("first", "change")


@dataclass
class PruningArguments:
    """The keys of a stage that are about pruning; one that has ``prune_to`` or ``trim_vocabulary`` does not train."""

    prune_to: str | None = field(
        default=None,
        metadata={
            "help": "Cut 'model' to this shape instead of training it: hidden_size, intermediate_size and "
            "num_hidden_layers as JSON, or 'family' for those of a known size."
        },
    )
    prune_hidden: str = field(
        default="activation_norm",
        metadata={
            "help": "Hidden channels that stay: of the largest activation_norm, as published; the leading ones; or "
            "reordered, those of the largest norm with the others' places filled in order of importance."
        },
    )
    prune_layers: str = field(
        default="first", metadata={"help": "Layers that stay: the first ones, as published, or those of most change."}
    )
    calibration_texts: int = field(
        default=1024, metadata={"help": "Texts of the stage's sources whose activations are measured."}
    )
    importance: str | None = field(
        default=None,
        metadata={
            "help": "Activations measured before: importance.safetensors, its folder, or an earlier stage that pruned "
            "the same model; measured again if left out."
        },
    )
    trim_vocabulary: bool = field(
        default=False,
        metadata={"help": "Keep only the tokens that the stage's sources use, all bytes and special tokens."},
    )

    @property
    def prunes(self) -> bool:
        """Whether the stage cuts a model instead of training one."""
        return self.prune_to is not None or self.trim_vocabulary

    def _check_pruning(self) -> None:
        for key, known in (("prune_hidden", HIDDEN_METHODS), ("prune_layers", LAYER_METHODS)):
            if getattr(self, key) not in known:
                raise UserError(f"key {key!r} cannot be {getattr(self, key)!r}; use one of {', '.join(known)}")
        if self.prunes and self.model is None:
            raise UserError("keys 'prune_to' and 'trim_vocabulary' cut a model; give it as 'model'")
        if self.importance is not None and self.prune_to is None:
            raise UserError("key 'importance' has no effect without 'prune_to'; give the shape or take it out")
        if self.calibration_texts < 1:
            raise UserError(f"key 'calibration_texts' must be at least 1, got {self.calibration_texts}")
