"""The teacher: a frozen model over the student's tokens, refused in one line where it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from modeling_f2llm import F2LLMConfig
from tests.training.distributed_recipe import save_model
from training.collator import PackedCollator, PreparedRows
from training.data.prepared import PreparedSource
from training.gradient_cache import embed_batch
from training.sampler import RowKey
from training.teacher import load_teacher

Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def teacher_folder(tmp_path: Path, tiny_config: F2LLMConfig, small_tokenizer: PreTrainedTokenizerBase) -> Path:
    save_model(tmp_path / "teacher", tiny_config, small_tokenizer, hidden_size=48, vocab_size=400)
    return tmp_path / "teacher"


def test_it_gives_the_leading_dimensions_of_its_embeddings(
    teacher_folder: Path,
    tiny_config: F2LLMConfig,
    small_tokenizer: PreTrainedTokenizerBase,
    prepared_sources: list[PreparedSource],
    num_hard_negatives: dict[str, int],
) -> None:
    model = save_model(teacher_folder, tiny_config, small_tokenizer, hidden_size=48, vocab_size=400)
    rows = [PreparedRows(prepared_sources)[RowKey(0, 1, row)] for row in range(5)]
    batch = PackedCollator(prepared_sources, num_hard_negatives, max_tokens_per_forward=60)(rows)
    found = load_teacher(str(teacher_folder), small_tokenizer, 32).embed(batch)
    assert found.shape[1] == 32 and not found.requires_grad and found.dtype == torch.float32
    torch.testing.assert_close(found, embed_batch(model.eval(), batch)[:, :32])


def test_it_is_frozen(teacher_folder: Path, small_tokenizer: PreTrainedTokenizerBase) -> None:
    model = load_teacher(str(teacher_folder), small_tokenizer, 48).model
    assert not model.training
    assert not any(weights.requires_grad for weights in model.parameters())


def test_a_narrower_teacher_is_refused(
    teacher_folder: Path, small_tokenizer: PreTrainedTokenizerBase, refuses: Refuses
) -> None:
    with refuses("key 'teacher'", "48", "64", "choose a wider teacher"):
        load_teacher(str(teacher_folder), small_tokenizer, 64)


def test_a_teacher_of_another_tokenizer_is_refused(
    teacher_folder: Path, tiny_tokenizer: PreTrainedTokenizerBase, refuses: Refuses
) -> None:
    with refuses("key 'teacher'", teacher_folder, "other tokens"):
        load_teacher(str(teacher_folder), tiny_tokenizer, 32)


@pytest.mark.parametrize("damage", ["missing", "no weights", "broken weights", "no tokenizer"])
def test_an_unusable_folder_is_refused(
    teacher_folder: Path, small_tokenizer: PreTrainedTokenizerBase, refuses: Refuses, damage: str
) -> None:
    name = str(teacher_folder)
    if damage == "missing":
        name += "-elsewhere"
    elif damage == "no weights":
        (teacher_folder / "model.safetensors").unlink()
    elif damage == "broken weights":
        (teacher_folder / "model.safetensors").write_bytes(b"broken")
    else:
        for path in teacher_folder.glob("tokenizer*"):
            path.unlink()
    with refuses("key 'teacher'", name):
        load_teacher(name, small_tokenizer, 32)


def test_a_teacher_that_lacks_weights_is_refused(
    teacher_folder: Path, small_tokenizer: PreTrainedTokenizerBase, refuses: Refuses
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(teacher_folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("layers.1.")}
    save_file(kept, teacher_folder / "model.safetensors", metadata={"format": "pt"})
    with refuses("key 'teacher'", "layers.1."):
        load_teacher(str(teacher_folder), small_tokenizer, 32)
