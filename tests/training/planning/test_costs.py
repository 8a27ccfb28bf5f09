"""Costs by formula against what PyTorch counts, keeps and holds in real steps."""

from __future__ import annotations

import dataclasses
import json
import sys
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modeling_f2llm import F2LLMConfig, F2LLMModel
from modeling_f2llm.losses import matryoshka_dims
from tests.training.processes import ROOT, run_bounded
from tests.training.recipes import ONE_STAGE
from tests.training.trainer.test_step import cached_step
from training.config.arguments import StageArguments
from training.models.encoding import embed_chunk, lay_out
from training.models.model_folder import count_parameters, forward_flops
from training.planning.batches import Batches
from training.planning.costs import estimate_memory, estimate_pruning_memory, loss_bytes, stage_flops, step_flops
from training.trainer.step import Objective


def _config(layers, heads):
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 160, "head_dim": 16}
    shape |= {"num_hidden_layers": layers, "num_attention_heads": 2 * heads, "num_key_value_heads": heads}
    return F2LLMConfig(**shape, pad_token_id=0, bos_token_id=0, eos_token_id=1)


CONFIG = _config(layers=3, heads=2)
LENGTHS = np.sort(np.random.default_rng(0).integers(20, 120, 16))


def _batches(max_tokens=None):
    """What the plan says of a batch, and the batch."""
    layout = lay_out(LENGTHS, max_tokens=max_tokens)
    tokens = int(LENGTHS.sum())
    batch = {"input_ids": torch.ones(1, tokens, dtype=torch.long), **layout.of_batch(LENGTHS)}
    squared, repeated = float((LENGTHS**2).sum()), float(tokens - LENGTHS[layout.chunks[-1]].sum())
    return Batches(count=1, texts=len(LENGTHS), tokens=tokens, squared_tokens=squared, repeated_tokens=repeated), batch


def _counted(max_tokens=None, checkpointing=False):
    model = F2LLMModel(deepcopy(CONFIG)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # The formula knows matrices only, as the plain backend of attention uses them.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cached_step(model).run(_batches(max_tokens)[1], lambda embeddings: embeddings.pow(2).sum())
    return counter.get_total_flops()


@pytest.mark.parametrize("max_tokens", [None, 400])
def test_a_step_takes_the_operations_that_pytorch_counts(max_tokens):
    batches, _ = _batches(max_tokens)
    assert (batches.repeated_tokens > 0) == (max_tokens is not None)
    without, estimate = step_flops(CONFIG, batches, False), step_flops(CONFIG, batches, True)
    assert without == pytest.approx(_counted(max_tokens), rel=0.03)
    # Checkpointing: all but the last operations of each layer, which PyTorch leaves out, are done again.
    counted = _counted(max_tokens, checkpointing=True)
    assert counted <= 1.01 * estimate and counted - without > 0.7 * (estimate - without)


def test_only_the_second_factor_of_token_embeddings_is_multiplied():
    factored, rank = deepcopy(CONFIG), 8
    factored.embedding_ranks = [4, rank]
    assert forward_flops(factored, 1, 3, 5) - forward_flops(CONFIG, 1, 3, 5) == 3 * 2 * rank * CONFIG.hidden_size
    fewer = rank * (CONFIG.vocab_size + CONFIG.hidden_size) - CONFIG.vocab_size * CONFIG.hidden_size
    plain, small = (estimate_memory(config, 0, 0, bf16=True).state for config in (CONFIG, factored))
    assert small - plain == 16 * fewer + 2 * rank * CONFIG.hidden_size


def test_a_teacher_and_evaluations_count():
    args, (batches, _) = SimpleNamespace(activation_checkpointing=False, lora=False), _batches()
    validation = dataclasses.replace(batches, count=3)
    forward = forward_flops(CONFIG, batches.texts, batches.tokens, batches.squared_tokens)
    assert stage_flops(args, CONFIG, CONFIG, 7, batches, validation, 2) == (7 * (3 + 1) + 6) * forward
    assert stage_flops(args, CONFIG, None, 7, batches, Batches(), 2) == 7 * 3 * forward


def _kept_for_backward(config, tokens):
    """Bytes that autograd keeps of a whole model's forward pass, weights left out."""
    model = F2LLMModel(deepcopy(config)).train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = embed_chunk(model, torch.ones(1, tokens, dtype=torch.long), [tokens // 2, tokens // 2])
    counted = sum(size for address, size in kept.items() if address not in weights)
    del output
    return counted


@pytest.mark.parametrize(("heads", "layers"), [(2, 2), (4, 5)])
def test_activations_are_those_that_autograd_keeps(heads, layers):
    config = _config(layers, heads)
    estimate = estimate_memory(config, chunk_tokens=512, loss=0)
    assert estimate.activations == pytest.approx(_kept_for_backward(config, 512), rel=0.05)


def test_what_takes_and_saves_memory_is_in_the_estimate(tiny_config):
    parameters, whole = count_parameters(tiny_config), estimate_memory(tiny_config, 10_000, 1_000)
    assert whole.state == 16 * parameters and whole.total == whole.state + whole.activations + whole.loss
    assert estimate_memory(tiny_config, 1_000, 0).activations == pytest.approx(whole.activations / 10, rel=1e-3)
    several, shared = (estimate_memory(tiny_config, 1, 1, processes=4, sharded=sharded) for sharded in (False, True))
    assert several.state == 20 * parameters and shared.state == whole.state // 4
    assert estimate_memory(tiny_config, 100, 10, teacher=parameters).teacher == 4 * parameters
    deep = F2LLMConfig.from_family("f2llm-v2-0.6b")
    plain, recomputed, half = (
        estimate_memory(deep, 8_192, 4_000, **keys).activations
        for keys in ({}, {"gradient_checkpointing": True}, {"bf16": True})
    )
    assert recomputed < plain / 5 and plain / 2 < half < plain
    # Pruning holds both models.
    measured, known = (estimate_pruning_memory(tiny_config, tiny_config, tokens) for tokens in (1_000, 0))
    assert measured.state == known.state == 8 * parameters and measured.activations > known.activations == 0


def _kept_of_the_loss(rows, width, **keys):
    """Bytes that autograd keeps of the objective on a retrieval batch."""
    teacher, exits, negatives = keys.pop("teacher", None), 1 + len(keys.pop("exit_layers", ())), 3
    texts = rows * (2 + negatives)
    index = torch.arange(texts).view(rows, 2 + negatives)
    batch = {"query": index[:, 0], "positive": index[:, 1], "negatives": index[:, 2:], "task_type": "retrieval"}
    embeddings, kept = torch.randn(texts, exits * width, requires_grad=True), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    of_teacher = None if teacher is None else torch.randn(texts, teacher)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective = Objective(dims=matryoshka_dims(width), **keys)
        terms = [objective.terms(each, batch, of_teacher) for each in embeddings.chunk(exits, dim=1)]
    assert all(terms)
    return sum(kept.values())


@pytest.mark.parametrize(
    ("keys", "teacher"),
    [
        ({}, 0),
        ({"mask_duplicates": True}, 0),
        ({"spread_weight": 1.0}, 0),
        ({"quantized": {"int8": 1.0, "binary": 1.0}}, 0),
        ({"score_distillation_weight": 1.0}, 16),
        ({"exit_layers": ["1"], "mask_duplicates": True}, 0),
    ],
)
def test_matrices_of_the_loss_are_those_that_autograd_keeps(keys, teacher):
    width, sizes = 16, (256, 512)
    args = StageArguments(**ONE_STAGE, **{**keys, "quantized": json.dumps(keys.get("quantized", {}))})
    config = SimpleNamespace(hidden_size=width, num_hidden_layers=2)
    few, many = (_kept_of_the_loss(rows, width, **keys, **({"teacher": teacher} if teacher else {})) for rows in sizes)
    estimates = [loss_bytes(args, config, rows, 0, teacher) for rows in sizes]
    # What grows with the square: twice the rows have four times the matrices, and twice all else.
    assert estimates[1] - 2 * estimates[0] == pytest.approx(many - 2 * few, rel=0.05)


def test_the_loss_of_a_large_batch_does_not_grow_with_the_square(tiny_config):
    args = StageArguments(**ONE_STAGE)
    small, large = (loss_bytes(args, tiny_config, rows, 0) for rows in (2**12, 2**15))
    assert small == large == 3 * 3 * 4 * 2**24


def test_of_frozen_weights_only_the_layer_that_is_recomputed_has_a_copy():
    peft = pytest.importorskip("peft")
    keys = {"bf16": True, "adapter": peft.LoraConfig(r=2, target_modules=["q_proj"])}
    kept, recomputed = (estimate_memory(CONFIG, 1, 0, gradient_checkpointing=each, **keys).state for each in (0, 1))
    layers = count_parameters(CONFIG) - CONFIG.vocab_size * CONFIG.hidden_size
    assert kept - recomputed == pytest.approx(2 * layers * 2 / 3, abs=2)


def test_shards_are_gathered_layer_by_layer():
    config = F2LLMConfig.from_family("f2llm-v2-0.6b")
    one, eight = (estimate_memory(config, 4096, 0, processes=count, sharded=True) for count in (1, 8))
    layer = (count_parameters(config) - config.vocab_size * config.hidden_size) / config.num_hidden_layers
    assert one.gathered == 0 and eight.gathered == pytest.approx(4 * 4 * layer, rel=0.01)
    # At the ends of a step the table of embeddings is whole instead.
    few = estimate_memory(config, 1, 0, processes=8, sharded=True)
    assert few.gathered == pytest.approx(3 * 4 * config.vocab_size * config.hidden_size, rel=0.01)


def _chunks_and_peak(rows, max_tokens):
    # Blocks that are freed go back to the system at once: what is measured is what the step holds, not how the C
    # library keeps holes of odd sizes for later.
    worker = str(ROOT / "tests/training/peak_memory_worker.py")
    command = ["env", "MALLOC_MMAP_THRESHOLD_=65536", sys.executable, worker, str(rows), str(max_tokens)]
    ended = run_bounded(command, seconds=900)
    assert ended.returncode == 0, ended.stdout
    chunks, peak = ended.stdout.split()[-2:]
    return int(chunks), float(peak)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_batch_512_needs_the_memory_of_batch_32():
    few, small = _chunks_and_peak(32, 1024)
    many, large = _chunks_and_peak(512, 1024)
    assert (few, many) == (4, 60) and large <= 1.1 * small
