"""What a stage of a recipe may say that trains an adapter instead of the whole model."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.common.errors import UserError

# The linear layers of attention and MLP.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class LoraArguments:
    """The keys of a stage that are about adapters; one that has ``lora`` leaves the weights of its model as they are.

    Where ``model`` is an adapter itself, its training goes on, and the keys left out are what that adapter says.
    """

    lora: bool = field(
        default=False,
        metadata={
            "help": "Train a low-rank adapter of 'model' and nothing else; the result is a small folder that names its "
            "base."
        },
    )
    lora_rank: int | None = field(default=None, metadata={"help": "Rank of the adapter's updates; 16 if left out."})
    lora_alpha: int | None = field(
        default=None,
        metadata={"help": "The updates are scaled by it over the rank; twice the rank if left out."},
    )
    lora_dropout: float | None = field(
        default=None,
        metadata={
            "help": "Dropout on what the adapter reads; none if left out. Drawn by chunk: with it, "
            "max_tokens_per_forward and the number of processes change the draws."
        },
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the linear layers that are adapted; all of attention and MLP if left out."},
    )
    lora_dora: bool = field(
        default=False, metadata={"help": "DoRA: learn the length of each weight vector beside its direction."}
    )
    lora_rslora: bool = field(
        default=False, metadata={"help": "Scale by the square root of the rank, which large ranks need."}
    )

    def _check_lora(self) -> None:
        if not self.lora:
            for key in self.lora_keys:
                raise UserError(f"key {key!r} has no effect without 'lora: true'; add that or take the key out")
            return
        if self.prunes:
            raise UserError("keys 'prune_to' and 'trim_vocabulary' cut a model and train nothing; take 'lora' out")
        if self.model is None:
            raise UserError("key 'lora' trains an adapter of a model that is there; give it as 'model'")
        for key in ("lora_rank", "lora_alpha"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"key {key!r} must be at least 1, got {value}")
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise UserError(f"key 'lora_dropout' must lie between 0 and 1, got {self.lora_dropout}")
        if self.compile and self.lora_dropout:
            raise UserError("key 'lora_dropout' cannot be drawn twice the same in compiled layers; take 'compile' out")
        if self.compile and self.lora_dora:
            raise UserError("key 'compile': torch compiles DoRA again for every layer, up to its limit; take it out")

    @property
    def told_dropout(self) -> bool:
        """Whether the stage says that dropout is drawn in training; a model that it starts from may say so, too."""
        return bool(self.lora_dropout or self.model_config_fields().get("attention_dropout"))

    @property
    def lora_keys(self) -> list[str]:
        """The keys about the adapter that were given, ``lora`` itself left out."""
        keys = [name for name in LoraArguments.__dataclass_fields__ if name != "lora"]
        # False says as little as a key that was left out.
        return [key for key in keys if getattr(self, key) not in (None, False)]
