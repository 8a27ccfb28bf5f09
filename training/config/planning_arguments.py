"""What a stage of a recipe may say so that it can be planned where neither its model nor its data is at hand."""

from __future__ import annotations

from dataclasses import dataclass, field

from modeling_f2llm.configuration_f2llm import FAMILY, F2LLMConfig
from training.common.errors import UserError
from training.common.yaml_file import unknown_key

SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)


@dataclass
class PlanningArguments:
    """The keys of a stage that are about its plan; none of them changes what is learnt."""

    model_family: str | None = field(
        default=None,
        metadata={
            "help": "Published shape of 'model', such as f2llm-v2-0.6b: a plan uses it where the model is not at hand, "
            "and a model of another shape is refused."
        },
    )
    planned_text_tokens: int = field(
        default=128,
        metadata={"help": "Mean tokens of a text that a plan assumes where the data is not at hand to be counted."},
    )

    def _check_planning(self) -> None:
        if self.model_family is not None and self.model_family.lower() not in FAMILY:
            raise unknown_key("key 'model_family'", self.model_family, list(FAMILY))
        if self.model_family is not None and self.model is None:
            raise UserError("key 'model_family' has no effect without 'model'; name the family in 'model_config'")
        if self.planned_text_tokens < 1:
            raise UserError(f"key 'planned_text_tokens' must be at least 1, got {self.planned_text_tokens}")

    def check_family(self, config: F2LLMConfig) -> None:
        """Makes sure that the stage's model has the shape that ``model_family`` names.

        Raises:
            UserError: If it has another one.
        """
        if self.model_family is None:
            return
        published = F2LLMConfig.from_family(self.model_family)
        for name in SHAPE:
            has, wants = getattr(config, name), getattr(published, name)
            if has != wants:
                raise UserError(
                    f"model {self.model!r} is no {self.model_family}: its {name} is {has}, not {wants}; give another "
                    "'model', or correct 'model_family' or take it out"
                )
