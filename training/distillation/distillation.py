"""What a stage learns from its teacher: embeddings made in every step or read from a cache."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from training.common.errors import UserError
from training.config.arguments import StageArguments
from training.data.prepared import PreparedSource
from training.distillation.projection import Projection
from training.distillation.teacher import Teacher, TextTeacher, load_teacher, load_text_teacher, reads_tokens_of
from training.distillation.teacher_cache import TeacherCache
from training.models.model_folder import user_error
from training.models.model_ref import base_of, find_model, model_revision

logger = logging.getLogger("training")


@dataclass(frozen=True)
class TeacherChoice:
    """A teacher that fits the student, before its weights are needed.

    Attributes:
        place: Its folder or Hub name.
        width: Its dimensions ``D``.
        by_text: The loaded teacher, if it is given texts; None if it is given the student's token ids.
    """

    place: str
    width: int
    by_text: TextTeacher | None = None


def choose_teacher(args: StageArguments, tokenizer: PreTrainedTokenizerBase, student_width: int) -> TeacherChoice:
    """Find out how the stage's teacher reads, and whether its width fits the student's.

    A Qwen3 model to which ids mean the same tokens is given the student's ids. Any other SentenceTransformer, and one
    with its own text format, is given the texts.
    """
    place = find_model(args.teacher, None, "key 'teacher'")[0]
    own_format = args.teacher_query_template is not None or args.teacher_document_template is not None
    if not own_format and reads_tokens_of(place, tokenizer):
        choice = TeacherChoice(place, _width_in_config(place, args.max_length))
    else:
        teacher = load_text_teacher(place, args.text_format, device="cpu")
        choice = TeacherChoice(place, teacher.width, teacher)
        reads = teacher.model.max_seq_length
        if reads is not None and reads < args.max_length and args.process_index == 0:
            logger.warning(
                "key 'teacher': %s reads %d tokens of a text at most, the student %d ('max_length'): the teacher's "
                "embeddings of longer texts are of their beginnings",
                *(place, reads, args.max_length),
            )
    if choice.width < student_width and not args.teacher_projection:
        raise UserError(
            f"key 'teacher': its {choice.width} dimensions do not cover the student's {student_width}; choose a wider "
            "teacher, or add 'teacher_projection: true', which learns a map to them"
        )
    if choice.width >= student_width and args.teacher_projection:
        raise UserError(
            f"key 'teacher_projection': the teacher's {choice.width} dimensions cover the student's {student_width}, "
            "which learns them without a projection; take the key out"
        )
    return choice


def _width_in_config(name: str, max_length: int) -> int:
    with user_error(f"key 'teacher': {name!r} cannot be used"):
        config = AutoConfig.from_pretrained(base_of(name), trust_remote_code=False)
        width, positions = config.hidden_size, config.max_position_embeddings
    if max_length > positions:
        raise UserError(
            f"key 'max_length': {max_length} is more than the {positions} positions of the teacher {name}, which reads "
            f"the student's tokens; write 'max_length: {positions}' or choose another teacher"
        )
    return width


@dataclass(eq=False)
class Distillation:
    """A teacher for texts that are not in the cache, the cache, and what the student learns from them.

    Attributes:
        identity: Changes with the teacher's weights and how it is given texts; a resumed run must have the same.
    """

    student_width: int
    teacher: Teacher | TextTeacher | None = None
    cache: TeacherCache | None = None
    projection: Projection | None = None
    identity: str = ""

    @property
    def width(self) -> int:
        """Leading dimensions of the teacher that are learned: the student's width, or all of a narrower teacher."""
        return self.student_width if self.projection is None else len(self.projection.weight)

    def fill_cache(self, device: torch.device, rank: int, world_size: int) -> None:
        """Embed what the cache misses, each process its share, and free the teacher's weights."""
        if self.cache is None or self.teacher is None:
            return
        self.teacher.to(device)
        self.cache.fill(self.teacher.embed_texts, rank, world_size)
        self.teacher = None

    def targets(self, batch: dict[str, Any]) -> Tensor:
        """``(n, width)`` unnormalised teacher embeddings of the batch's distinct texts."""
        if self.cache is not None:
            return batch["teacher"].float()
        return self.teacher.embed(batch, self.width)


def make_distillation(
    choice: TeacherChoice,
    args: StageArguments,
    sources: Sequence[PreparedSource],
    student_width: int,
    model_options: dict[str, Any],
) -> Distillation:
    """Load the teacher, unless a cache holds all its embeddings."""
    identity = choice.by_text.identity if choice.by_text else model_revision(choice.place, "key 'teacher'")
    cache = None
    if args.teacher_cache_dir is not None:
        made_by = {
            "teacher": identity,
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
            "reads": "texts" if choice.by_text else "tokens",
        }
        cache = TeacherCache(args.teacher_cache_dir, sources, made_by, choice.width)
        cache.check()
    teacher: Teacher | TextTeacher | None = choice.by_text
    if cache is not None and cache.whole:
        teacher = None
    elif choice.by_text is not None:
        choice.by_text.use(sources)
    else:
        # The commit in the cache's name, for the Hub may have another by now.
        commit = {} if Path(choice.place).is_dir() else {"revision": identity}
        teacher = Teacher(load_teacher(choice.place, **commit, **model_options), args.max_tokens_per_forward)
    projection = Projection(student_width, choice.width, args) if args.teacher_projection else None
    return Distillation(student_width, teacher, cache, projection, identity)
