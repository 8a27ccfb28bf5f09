"""Operations by formula against those that PyTorch counts in a real step."""

from __future__ import annotations

import dataclasses
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modeling_f2llm import F2LLMConfig, F2LLMModel
from tests.training.recipes import write_single_stage
from tests.training.trainer.test_gradient_cache import cached_step
from training.config.recipe import load_recipe
from training.models.layout import lay_out
from training.models.model_size import forward_flops
from training.planning.counting import Batches
from training.planning.flops import stage_flops, step_flops

CONFIG = F2LLMConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=1,
)
LENGTHS = np.sort(np.random.default_rng(0).integers(20, 120, 16))


def _batches(max_tokens: int | None) -> tuple[Batches, dict]:
    """What the plan says of a batch, and the batch."""
    layout = lay_out(LENGTHS, max_tokens=max_tokens)
    tokens = int(LENGTHS.sum())
    batch = {"input_ids": torch.ones(1, tokens, dtype=torch.long), **layout.of_batch(LENGTHS)}
    return Batches(
        count=1,
        tokens=tokens,
        squared_tokens=float((LENGTHS**2).sum()),
        repeated_tokens=float(tokens - LENGTHS[layout.chunks[-1]].sum()),
    ), batch


def _counted(max_tokens: int | None, checkpointing: bool) -> int:
    model = F2LLMModel(deepcopy(CONFIG)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    _, batch = _batches(max_tokens)
    # The formula knows matrices only, as the plain backend of attention uses them.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cached_step(model).run(batch, lambda embeddings: embeddings.pow(2).sum())
    return counter.get_total_flops()


@pytest.mark.parametrize("max_tokens", [None, 400])
def test_a_step_takes_the_operations_that_pytorch_counts(max_tokens: int | None) -> None:
    batches, _ = _batches(max_tokens)
    assert (batches.repeated_tokens > 0) == (max_tokens is not None)
    assert step_flops(CONFIG, batches, False) == pytest.approx(_counted(max_tokens, False), rel=0.03)


def test_checkpointing_takes_another_forward_pass_at_most() -> None:
    batches, _ = _batches(None)
    without, estimate = step_flops(CONFIG, batches, False), step_flops(CONFIG, batches, True)
    counted = _counted(None, True)
    assert counted <= 1.01 * estimate
    # All but the last operations of each layer, which PyTorch leaves out.
    assert counted - without > 0.7 * (estimate - without)


def test_attention_counts_texts_by_themselves() -> None:
    whole, halves = forward_flops(CONFIG, 200, 200**2), forward_flops(CONFIG, 200, 2 * 100**2)
    assert whole - halves == 4 * 3 * (4 * 16) * (200**2 - 2 * 100**2)


def test_a_teacher_counts_in_every_step_unless_it_is_cached(tmp_path) -> None:
    args = load_recipe(write_single_stage(tmp_path, teacher="some/model")).stages[0].arguments
    batches, _ = _batches(None)
    validation = dataclasses.replace(batches, count=3)
    flops = stage_flops(args, CONFIG, CONFIG, 7, batches, validation, 2)
    forward = forward_flops(CONFIG, batches.tokens, batches.squared_tokens)
    assert (flops.steps, flops.teacher, flops.evaluations) == (7 * 3 * forward, 7 * forward, 6 * forward)
    assert flops.total == 34 * forward
    args.teacher_cache_dir = "cache"
    assert stage_flops(args, CONFIG, CONFIG, 7, batches, validation, 2).teacher == 0
    assert stage_flops(args, CONFIG, None, 7, batches, Batches(), 2) == (7 * 3 * forward, 0, 0)


def test_a_step_costs_three_forward_passes_and_what_is_computed_again(tiny_config: F2LLMConfig) -> None:
    batches = Batches(count=1, tokens=100.0, squared_tokens=1000.0, repeated_tokens=50.0)
    forward = forward_flops(tiny_config, 100.0, 1000.0)
    assert step_flops(tiny_config, batches, False) == pytest.approx(3.5 * forward)
    assert step_flops(tiny_config, batches, True) == pytest.approx(4.5 * forward)
