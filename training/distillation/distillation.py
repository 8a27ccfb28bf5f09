"""What a stage learns from its teacher: embeddings made in every step or read from a cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from training.common.errors import UserError, in_one_line
from training.common.run_folder import apply_options, options_of
from training.config.arguments import StageArguments
from training.data.prepared import PreparedSource
from training.distillation.teacher import KEY, Teacher, TextTeacher, load_teacher, load_text_teacher, reads_tokens_of
from training.distillation.teacher_cache import TeacherCache
from training.models.model_folder import user_error
from training.models.model_ref import ModelRef, resolve

logger = logging.getLogger("training")

# In a checkpoint: the map and its optimizer. In the folder of a finished run: the map alone.
PROJECTION_STATE, PROJECTION_WEIGHT = "projection.pt", "projection.safetensors"
# Of the mean square of a channel, added to each in the least squares that a projection starts from.
_RIDGE = 1e-3


@dataclass(frozen=True)
class TeacherChoice:
    """A teacher that fits the student, before its weights are needed."""

    ref: ModelRef
    width: int  # its dimensions, D
    by_text: TextTeacher | None = None  # already loaded, if it is given texts and not the student's token ids


def is_given_texts(args: StageArguments, teacher: ModelRef | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the stage's teacher is given texts and not the student's ids; None: not here, taken for Qwen3."""
    own_format = (args.teacher_query_template, args.teacher_document_template) != (None, None)
    return own_format or (teacher is not None and not reads_tokens_of(teacher, tokenizer))


def inspect_teacher(args: StageArguments, tokenizer: PreTrainedTokenizerBase, student_width: int) -> TeacherChoice:
    """Find out how the stage's teacher reads, and whether its width fits the student's.

    A Qwen3 model to which ids mean the same tokens is given the student's ids. Any other SentenceTransformer, and one
    with its own text format, is given the texts.
    """
    ref = resolve(args.teacher, KEY)
    if not is_given_texts(args, ref, tokenizer):
        choice = TeacherChoice(ref, _width_in_config(ref, args.max_length))
    else:
        teacher = load_text_teacher(ref, args.text_format, device="cpu")
        choice = TeacherChoice(ref, teacher.width, teacher)
        reads = teacher.model.max_seq_length
        if reads is not None and reads < args.max_length and args.process_index == 0:
            logger.warning(
                "key 'teacher': %s reads %d tokens of a text at most, the student %d ('max_length'): the teacher's "
                "embeddings of longer texts are of their beginnings",
                *(ref.name, reads, args.max_length),
            )
    # Scores compare whatever the widths.
    if not args.distillation_weight:
        return choice
    if choice.width < student_width and not args.teacher_projection:
        raise UserError(
            f"key 'teacher': its {choice.width} dimensions do not cover the student's {student_width}; choose a wider "
            "teacher, or add 'teacher_projection: true', which learns a map to them"
        )
    return choice


def _width_in_config(ref: ModelRef, max_length: int) -> int:
    with user_error(f"{KEY}: {ref.name!r} cannot be used"):
        config = AutoConfig.from_pretrained(ref.base.place, revision=ref.base.revision, trust_remote_code=False)
        width, positions = config.hidden_size, config.max_position_embeddings
    if max_length > positions:
        raise UserError(
            f"key 'max_length': {max_length} is more than the {positions} positions of the teacher {ref.name}, which "
            f"reads the student's tokens; write 'max_length: {positions}' or choose another teacher"
        )
    return width


class Projection(TrainerCallback):
    """A learned map from a student's embeddings to a teacher's dimensions, used in training only.

    ``(…, d)`` → ``(…, D)``, linear, without bias. That to a narrower teacher starts as the leading dimensions, that to
    the ``d`` leading ones of another at the least-squares map of the first batch (``fits``): a student that was cut
    from a model of the teacher's kind knows much of them, in other directions. It is not part of the model and
    has its own AdamW, with the stage's options and schedule: every process computes the loss of the whole batch over
    gathered embeddings, so its gradient is the same everywhere, however the model is sharded. It is clipped to
    ``max_grad_norm`` apart from the model's.
    """

    def __init__(self, student_width: int, teacher_width: int, args: TrainingArguments, fits: bool = False) -> None:
        self._fits = fits
        self.weight = nn.Parameter(torch.eye(teacher_width, student_width, device=args.device))
        betas = (args.adam_beta1, args.adam_beta2)
        options = {"betas": betas, "eps": args.adam_epsilon, "weight_decay": args.weight_decay}
        self._optimizer = torch.optim.AdamW([self.weight], lr=0.0, **options)

    def __call__(self, embeddings: Tensor) -> Tensor:
        """``(…, d)`` student embeddings → ``(…, D)``."""
        return nn.functional.linear(embeddings, self.weight)

    @torch.no_grad()
    def start(self, student: Tensor, teacher: Tensor) -> None:
        """Fit the map to ``(n, d)`` and ``(n, ≥ D)`` embeddings of the first batch; do nothing at later ones.

        Ridge regression of what the leading dimensions leave: directions of which the texts say nothing stay.
        """
        if not self._fits:
            return
        self._fits = False
        # In fp64, or rounding would be enlarged by the square of the batch's condition; not every GPU has it.
        student, teacher, weight = (each.cpu().double() for each in (student, teacher, self.weight))
        squares = student.T @ student
        squares.diagonal().add_(_RIDGE * squares.diagonal().mean())
        left = teacher[:, : len(weight)] - student @ weight.T
        self.weight += torch.linalg.solve(squares, student.T @ left).T.to(self.weight)

    def on_optimizer_step(
        self, args: TrainingArguments, state: Any, control: Any, optimizer: Any, lr_scheduler: Any, **kwargs: Any
    ) -> None:
        """Step with the learning rate of the model's own step, unless fp16 skipped that one."""
        if self.weight.grad is None:
            return
        if not optimizer.step_was_skipped:
            if args.max_grad_norm:
                nn.utils.clip_grad_norm_([self.weight], args.max_grad_norm)
            for group in self._optimizer.param_groups:
                group["lr"] = lr_scheduler.get_last_lr()[0]
            self._optimizer.step()
        self._optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        """Write map and optimizer into a checkpoint."""
        state = {"weight": self.weight.detach(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, folder / PROJECTION_STATE)

    def load(self, folder: Path) -> None:
        """Resume from a checkpoint; ValueError if it has no projection of this shape."""
        try:
            state = torch.load(folder / PROJECTION_STATE, map_location=self.weight.device, weights_only=True)
            if state["weight"].shape != self.weight.shape:
                raise ValueError(f"it is of shape {tuple(state['weight'].shape)}, not {tuple(self.weight.shape)}")
            self.weight.data.copy_(state["weight"])
            options = options_of(self._optimizer)
            self._optimizer.load_state_dict(state["optimizer"])
            apply_options(self._optimizer, options)
            self._fits = False
        # The unpickler can raise any exception on a damaged file.
        except Exception as error:
            raise ValueError(f"{PROJECTION_STATE} cannot be read ({in_one_line(error)})") from None

    def export(self, folder: Path) -> None:
        """Write the finished map, to train further with it; no released model needs it."""
        save_file({"weight": self.weight.detach().cpu().contiguous()}, folder / PROJECTION_WEIGHT)


@dataclass(eq=False)
class Distillation:
    """A teacher for texts that are not in the cache, the cache, and what the student learns from them."""

    width: int  # leading dimensions of the teacher that are read; see read_width
    teacher: Teacher | TextTeacher | None = None
    cache: TeacherCache | None = None
    projection: Projection | None = None
    identity: str = ""  # changes with the teacher's weights and how it is given texts

    def fill_cache(self, device: torch.device, rank: int, world_size: int) -> None:
        """Embed what the cache misses, each process its share, and free the teacher's weights."""
        if self.cache is not None and self.teacher is not None:
            self.teacher.model.to(device)
            self.cache.fill(self.teacher.embed_texts, rank, world_size)
            self.teacher = None

    def targets(self, batch: dict[str, Any]) -> Tensor:
        """``(n, width)`` unnormalised teacher embeddings of the batch's distinct texts."""
        if self.cache is not None:
            return batch["teacher"].float()
        return self.teacher.embed(batch, self.width)


def read_width(args: StageArguments, student_width: int, teacher_width: int) -> int:
    """Return the teacher's leading dimensions that are read: those to learn, or all where its scores matter."""
    return teacher_width if args.compares_scores else min(student_width, teacher_width)


def make_projection(args: StageArguments, student_width: int, teacher_width: int) -> Projection | None:
    """Return the map that the stage learns, if it does."""
    learns = args.teacher_projection and args.distillation_weight > 0
    narrower = teacher_width < student_width
    return Projection(student_width, min(teacher_width, student_width), args, fits=not narrower) if learns else None


def cache_share(args: StageArguments) -> tuple[int, int]:
    """Return the process's rank among those that share a cache, and their number: every node may have its own."""
    if args.save_on_each_node:
        return args.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return args.process_index, args.world_size


def make_distillation(
    choice: TeacherChoice,
    args: StageArguments,
    sources: Sequence[PreparedSource],
    student_width: int,
    model_options: dict[str, Any],
) -> Distillation:
    """Load the teacher, unless a cache holds all its embeddings."""
    teacher, cache = choice.by_text, None
    identity = choice.ref.identity if teacher is None else teacher.identity
    if args.teacher_cache_dir is not None:
        made_by = {
            "teacher": identity,
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
            "reads": "tokens" if teacher is None else "texts",
        }
        cache = TeacherCache(args.teacher_cache_dir, sources, made_by, choice.width)
        cache.check(*cache_share(args))
    if cache is not None and cache.whole:
        teacher = None
    elif teacher is not None:
        teacher.use(sources)
    else:
        teacher = Teacher(load_teacher(choice.ref, **model_options), args.max_tokens_per_forward)
    projection = make_projection(args, student_width, choice.width)
    return Distillation(read_width(args, student_width, choice.width), teacher, cache, projection, identity)
