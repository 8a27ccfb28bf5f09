from __future__ import annotations

from copy import deepcopy

import psutil
import pytest
import torch

from modeling_f2llm import F2LLMConfig, F2LLMModel
from training.models.model_size import count_parameters
from training.planning.memory import estimate_memory, estimate_pruning_memory


def _kept_for_backward(config: F2LLMConfig, tokens: int) -> int:
    """Bytes that autograd keeps of a whole model's forward pass, weights left out."""
    model = F2LLMModel(deepcopy(config)).train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=torch.ones(1, tokens, dtype=torch.long), sequence_lengths=[tokens // 2, tokens // 2])
    counted = sum(size for address, size in kept.items() if address not in weights)
    del output
    return counted


@pytest.mark.parametrize(("heads", "layers"), [(2, 2), (4, 5)])
def test_activations_are_those_that_autograd_keeps(heads: int, layers: int) -> None:
    config = F2LLMConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=2 * heads,
        num_key_value_heads=heads,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    estimate = estimate_memory(config, chunk_tokens=512, batch_texts=0)
    assert estimate.activations == pytest.approx(_kept_for_backward(config, 512), rel=0.05)


def test_parameters_are_the_published_ones() -> None:
    assert count_parameters(F2LLMConfig.from_family("f2llm-v2-80m")) == 80_084_288
    assert count_parameters(F2LLMConfig.from_family("f2llm-v2-14b")) == 13_990_394_880


def test_what_saves_memory_saves_it_in_the_estimate(tiny_config: F2LLMConfig) -> None:
    whole = estimate_memory(tiny_config, 10_000, 1_000)
    assert whole.state == 16 * count_parameters(tiny_config)
    assert whole.total == whole.state + whole.activations + whole.loss + whole.program
    chunked = estimate_memory(tiny_config, 1_000, 1_000)
    assert chunked.activations == pytest.approx(whole.activations / 10, rel=1e-3)
    several, shared = (estimate_memory(tiny_config, 1, 1, processes=4, sharded=sharded) for sharded in (False, True))
    assert several.state == 20 * count_parameters(tiny_config) and shared.state == whole.state // 4
    deep = F2LLMConfig.from_family("f2llm-v2-0.6b")
    plain = estimate_memory(deep, 8_192, 4_000).activations
    assert estimate_memory(deep, 8_192, 4_000, gradient_checkpointing=True).activations < plain / 5
    assert plain / 2 < estimate_memory(deep, 8_192, 4_000, bf16=True).activations < plain


def test_an_estimate_leaves_nothing_behind() -> None:
    config = F2LLMConfig.from_family("f2llm-v2-14b")
    estimate_memory(config, 1, 1, bf16=True)
    before = psutil.Process().memory_info().rss
    for _ in range(2):
        estimate_memory(config, 1, 1, bf16=True)
    assert psutil.Process().memory_info().rss - before < 50 * 2**20


def test_cutting_holds_both_models(tiny_config: F2LLMConfig) -> None:
    measured, known = (estimate_pruning_memory(tiny_config, tiny_config, tokens) for tokens in (1_000, 0))
    assert measured.state == known.state == 8 * count_parameters(tiny_config)
    assert measured.activations > known.activations == 0


def test_a_teacher_takes_its_weights(tiny_config: F2LLMConfig) -> None:
    estimate = estimate_memory(tiny_config, 100, 10, teacher=tiny_config)
    assert estimate.teacher == 4 * count_parameters(tiny_config)
    # No second model was made on the way that would share or change the config.
    assert F2LLMModel(deepcopy(tiny_config)).config._attn_implementation == "packed"
