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

    def _check_teacher(self) -> None:
        if not 0 <= self.distillation_weight < math.inf:
            raise UserError(f"key 'distillation_weight' must not be negative, got {self.distillation_weight}")
