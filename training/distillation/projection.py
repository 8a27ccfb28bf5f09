"""A learned map from a student's embeddings to those of a narrower teacher, used in training only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.common.errors import in_one_line
from training.common.run_folder import apply_options, options_of

# In a checkpoint: the map and its optimizer. In the folder of a finished run: the map alone.
PROJECTION_STATE, PROJECTION_WEIGHT = "projection.pt", "projection.safetensors"


class Projection(TrainerCallback):
    """``(…, d)`` → ``(…, D)``, linear, without bias; it starts as the leading dimensions.

    It is not part of the model and has its own AdamW, with the stage's betas, weight decay and learning-rate schedule:
    every process computes the loss of the whole batch over gathered embeddings, so its gradient is the same everywhere,
    however the model is sharded. The gradient is clipped to ``max_grad_norm`` apart from the model's.
    """

    def __init__(self, student_width: int, teacher_width: int, args: TrainingArguments) -> None:
        self.weight = nn.Parameter(torch.eye(teacher_width, student_width, device=args.device))
        self._clip = args.max_grad_norm
        self._optimizer = torch.optim.AdamW(
            [self.weight],
            lr=0.0,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> None:
        """Step with a trainer's optimizer from now on."""
        self._trainer = trainer
        trainer.add_callback(self)

    def __call__(self, embeddings: Tensor) -> Tensor:
        """``(…, d)`` student embeddings → ``(…, D)``."""
        return nn.functional.linear(embeddings, self.weight)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step with the learning rate of the model's own step, unless fp16 skipped that one."""
        if self.weight.grad is None:
            return
        if not self._trainer.accelerator.optimizer_step_was_skipped:
            if self._clip:
                nn.utils.clip_grad_norm_([self.weight], self._clip)
            for group in self._optimizer.param_groups:
                group["lr"] = self._trainer.lr_scheduler.get_last_lr()[0]
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
        # The unpickler can raise any exception on a damaged file.
        except Exception as error:
            raise ValueError(f"{PROJECTION_STATE} cannot be read ({in_one_line(error)})") from None

    def export(self, folder: Path) -> None:
        """Write the finished map, to train further with it; no released model needs it."""
        save_file({"weight": self.weight.detach().cpu().contiguous()}, folder / PROJECTION_WEIGHT)
