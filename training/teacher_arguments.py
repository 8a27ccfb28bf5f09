"""What a stage of a recipe may say of the teacher that it learns from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from training.errors import UserError

__all__ = ["TeacherArguments"]


@dataclass
class TeacherArguments:
    """The keys of a stage that are about distillation."""

    teacher: str | None = field(
        default=None,
        metadata={"help": "Folder, Hub name or earlier stage of the recipe whose embeddings the model learns."},
    )
    distillation_weight: float = field(default=1.0, metadata={"help": "Factor of the distillation term."})

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

    teacher_query_template: str | None = field(
        default=None,
        metadata={
            "help": "How a teacher of its own format is given a text with an instruction: {instruction} and {text} are "
            "filled in; the student's format if left out."
        },
    )
    teacher_document_template: str | None = field(
        default=None,
        metadata={"help": "The same for a text without instruction: {text} is filled in; the text alone if left out."},
    )

    def _check_teacher(self) -> None:
        for key in ("cache_dir", "projection", "query_template", "document_template"):
            if self.teacher is None and getattr(self, f"teacher_{key}"):
                raise UserError(f"key 'teacher_{key}' has no effect without 'teacher'; name one or take the key out")
        if not 0 <= self.distillation_weight < math.inf:
            raise UserError(f"key 'distillation_weight' must not be negative, got {self.distillation_weight}")
