"""Floating-point operations of a stage, by formula: multiplications and additions of matrices, nothing else.

The forward pass of a token takes two operations for each weight outside the embeddings (Kaplan et al., "Scaling Laws
for Neural Language Models", 2020, section 2.1) and, in each layer, ``4 * heads * head_dim`` for each token of its text
(Chowdhery et al., "PaLM", 2022, appendix B: scores and their sum over values, without a discount for causality, which
kernels may or may not take). The backward pass takes twice as many as the forward pass: 6 operations per weight and
token for both. Where an adapter is trained it takes only as many: frozen weights have no gradient; the adapter's own
operations, some percent of the model's, are left out. Above that a stage has

- the gradient cache's first pass over all chunks but the last (see :mod:`training.trainer.gradient_cache`);
- with gradient checkpointing, another forward pass within the backward pass; PyTorch may leave out the last operations
  of each layer, so this is an upper bound;
- the teacher's forward pass over the same tokens, unless a cache keeps its embeddings;
- the forward passes of evaluations.
"""

from __future__ import annotations

from typing import NamedTuple

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.config.arguments import StageArguments
from training.models.model_size import forward_flops
from training.planning.counting import Batches


class StageFlops(NamedTuple):
    """Operations of a stage: those of its steps, of the teacher in them, and of its evaluations."""

    steps: float = 0.0
    teacher: float = 0.0
    evaluations: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def step_flops(config: F2LLMConfig, batches: Batches, gradient_checkpointing: bool, adapter: bool = False) -> float:
    """Operations of a step of the mean size over all processes, without those of a teacher."""
    forward = forward_flops(config, batches.tokens, batches.squared_tokens)
    repeated = batches.repeated_tokens / batches.tokens if batches.tokens else 0.0
    return forward * ((2 if adapter else 3) + repeated + gradient_checkpointing)


def stage_flops(
    args: StageArguments,
    config: F2LLMConfig,
    teacher: F2LLMConfig | None,
    steps: int,
    training: Batches,
    validation: Batches,
    evaluations: int,
) -> StageFlops:
    """Operations of a training stage.

    Args:
        args: The stage.
        config: The model's shape.
        teacher: The teacher's, if there is one and it is known.
        steps: Optimizer steps of the whole stage.
        training: The batches of an epoch.
        validation: Those of an evaluation.
        evaluations: Evaluations of the whole stage.
    """
    taught = 0 if teacher is None else _teacher_passes(args, steps)
    evaluated = evaluations * validation.count
    return StageFlops(
        steps=steps * step_flops(config, training, args.activation_checkpointing, args.lora),
        teacher=taught * forward_flops(teacher, training.tokens, training.squared_tokens) if taught else 0.0,
        evaluations=evaluated * forward_flops(config, validation.tokens, validation.squared_tokens),
    )


def _teacher_passes(args: StageArguments, steps: int) -> int:
    """Batches that the teacher encodes; none where it has encoded every text beforehand, once for all students."""
    return steps if args.teacher_cache_dir is None else 0
