"""The projection takes the steps of AdamW with the model: rate, decay, clipping, skipped steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from training.distillation.projection import Projection

RATES = [0.1, 0.05, 0.2]


class _Trainer:
    """What a projection asks of a trainer."""

    def __init__(self) -> None:
        self.accelerator = SimpleNamespace(optimizer_step_was_skipped=False)
        self.lr_scheduler = SimpleNamespace(get_last_lr=lambda: [self.rate])
        self.rate = 0.0

    def add_callback(self, callback: object) -> None:
        pass


def stage(**keys: Any) -> TrainingArguments:
    keys = {"adam_beta1": 0.8, "adam_beta2": 0.95, "weight_decay": 0.3, "max_grad_norm": 0.5, **keys}
    return TrainingArguments(output_dir="unused", use_cpu=True, report_to=[], **keys)


def attached(args: TrainingArguments) -> tuple[Projection, _Trainer]:
    projection, trainer = Projection(6, 4, args), _Trainer()
    projection.attach(trainer)
    return projection, trainer


def step(projection: Projection, gradient: torch.Tensor) -> None:
    projection.weight.grad = gradient.clone()
    projection.on_optimizer_step(None, None, None)


def gradients() -> list[torch.Tensor]:
    return list(torch.randn(len(RATES), 4, 6, generator=torch.Generator().manual_seed(0)))


def test_at_first_it_takes_the_leading_dimensions():
    embeddings = torch.randn(3, 6)
    torch.testing.assert_close(Projection(6, 4, stage())(embeddings), embeddings[:, :4])


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_it_steps_as_adamw_with_the_stages_numbers(clip):
    projection, trainer = attached(stage(max_grad_norm=clip))
    weight = nn.Parameter(torch.eye(4, 6))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(0.8, 0.95), weight_decay=0.3)
    for rate, gradient in zip(RATES, gradients(), strict=True):
        trainer.rate = optimizer.param_groups[0]["lr"] = rate
        assert gradient.norm() > 0.5
        step(projection, gradient)
        weight.grad = gradient * (0.5 / gradient.norm() if clip else 1.0)
        optimizer.step()
        torch.testing.assert_close(projection.weight, weight, rtol=1e-5, atol=1e-6)
        assert projection.weight.grad is None


def test_a_step_that_fp16_skipped_or_without_gradient_changes_nothing():
    projection, trainer = attached(stage())
    trainer.rate = 0.1
    projection.on_optimizer_step(None, None, None)
    trainer.accelerator.optimizer_step_was_skipped = True
    step(projection, gradients()[0])
    assert torch.equal(projection.weight, torch.eye(4, 6))
    assert projection.weight.grad is None
