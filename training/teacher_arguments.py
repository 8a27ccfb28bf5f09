"""What a stage of a recipe may say of the teacher that it learns from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from training.errors import UserError
from training.text_format import TextFormat

__all__ = ["TeacherArguments"]


@dataclass
class TeacherArguments:
    """The keys of a stage that are about distillation."""

    teacher: str | None = field(
        default=None,
        metadata={"help": "Folder, Hub name or earlier stage of the recipe whose embeddings the model learns."},
    )
    distillation_weight: float = field(default=1.0, metadata={"help": "Factor of the distillation term."})
    teacher_query_template: str | None = field(
        default=None,
        metadata={
            "help": "How a teacher with a tokenizer of its own reads texts that carry an instruction, with {text} and, "
            "if it wants it, {instruction}; as the student reads them if left out."
        },
    )
    teacher_document_template: str | None = field(
        default=None, metadata={"help": "How it reads texts that carry none, with {text}; unchanged if left out."}
    )

    @property
    def text_format(self) -> TextFormat:
        """The templates of a teacher with a tokenizer of its own."""
        given = {key: getattr(self, f"teacher_{key}") for key in ("query_template", "document_template")}
        return TextFormat(**{key: template for key, template in given.items() if template is not None})

    def _check_teacher(self) -> None:
        if not 0 <= self.distillation_weight < math.inf:
            raise UserError(f"key 'distillation_weight' must not be negative, got {self.distillation_weight}")
        for key in ("teacher_query_template", "teacher_document_template"):
            if getattr(self, key) is not None and self.teacher is None:
                raise UserError(f"key {key!r} has no effect without 'teacher'; name the teacher or take it out")
        # Its own checks are those of the two keys.
        _ = self.text_format
