"""What a stage of a recipe may say of the teacher that it learns from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from training.common.errors import UserError
from training.data.text_format import TextFormat


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

    teacher_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps the teacher's embeddings of every text: computed once, read in every epoch and "
            "by every student. Computed in every step if left out."
        },
    )
    teacher_projection: bool = field(
        default=False,
        metadata={
            "help": "Learn a linear map from the student to a narrower teacher; kept with the run, not with the model."
        },
    )

    @property
    def text_format(self) -> TextFormat:
        """The templates of a teacher with a tokenizer of its own."""
        given = {key: getattr(self, f"teacher_{key}") for key in ("query_template", "document_template")}
        return TextFormat(**{key: template for key, template in given.items() if template is not None})

    def _check_teacher(self) -> None:
        for key in ("cache_dir", "projection", "query_template", "document_template"):
            if self.teacher is None and getattr(self, f"teacher_{key}"):
                raise UserError(f"key 'teacher_{key}' has no effect without 'teacher'; name one or take the key out")
        if not 0 <= self.distillation_weight < math.inf:
            raise UserError(f"key 'distillation_weight' must not be negative, got {self.distillation_weight}")
        # Its own checks are those of the two keys.
        _ = self.text_format
