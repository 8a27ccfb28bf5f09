"""The teacher over the student's own tokens: frozen, its leading dimensions, refused in one line where unusable."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from modeling_f2llm import F2LLMConfig
from tests.training.distributed_recipe import save_model
from training.data.prepared import PreparedSource
from training.distillation.teacher import Teacher, load_teacher, reads_tokens_of
from training.models.encoding import embed_batch
from training.trainer.batches import PackedCollator, PreparedRows, RowKey

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
    teacher = Teacher(load_teacher(str(teacher_folder)))
    assert not teacher.model.training and not any(weights.requires_grad for weights in teacher.model.parameters())
    found = teacher.embed(batch, 32)
    assert found.shape[1] == 32 and not found.requires_grad and found.dtype == torch.float32
    torch.testing.assert_close(found, embed_batch(model.eval(), batch)[:, :32])


def test_texts_of_a_source_are_embedded_in_the_order_asked_for(
    teacher_folder: Path, prepared_sources: list[PreparedSource], num_hard_negatives: dict[str, int]
) -> None:
    teacher = Teacher(load_teacher(str(teacher_folder)), max_tokens=100)
    source = prepared_sources[1]
    rows = [PreparedRows(prepared_sources)[RowKey(0, 1, row)] for row in range(5)]
    batch = PackedCollator(prepared_sources, num_hard_negatives)(rows)
    positions = np.sort(batch["own_texts"])
    found = teacher.embed_texts(source, positions)
    torch.testing.assert_close(found[np.searchsorted(positions, batch["own_texts"])], teacher.embed(batch))


def test_it_reads_the_tokens_of_a_student_with_the_same_vocabulary(
    teacher_folder: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    tiny_tokenizer: PreTrainedTokenizerBase,
    refuses: Refuses,
) -> None:
    assert reads_tokens_of(str(teacher_folder), small_tokenizer)
    assert not reads_tokens_of(str(teacher_folder), tiny_tokenizer)
    elsewhere = f"{teacher_folder}-elsewhere"
    assert not reads_tokens_of(elsewhere, small_tokenizer)
    with refuses("key 'teacher'", elsewhere):
        load_teacher(elsewhere)


@pytest.mark.parametrize("change", ["eos", "mean pooling", "dense", "plain", "other kind"])
def test_it_reads_tokens_only_with_last_token_pooling_and_eos(
    teacher_folder: Path, small_tokenizer: PreTrainedTokenizerBase, change: str
) -> None:
    def rewrite(file: str, **fields: object) -> None:
        path = teacher_folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    if change == "eos":
        tokenizer = deepcopy(small_tokenizer)
        pad = tokenizer.pad_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {pad}", special_tokens=[(pad, tokenizer.pad_token_id)]
        )
        tokenizer.save_pretrained(teacher_folder)
    elif change == "mean pooling":
        rewrite("1_Pooling/config.json", pooling_mode="mean")
    elif change == "dense":
        path = teacher_folder / "modules.json"
        dense = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
        path.write_text(json.dumps([*json.loads(path.read_text()), dense]))
    elif change == "plain":
        (teacher_folder / "modules.json").unlink()
    else:
        rewrite("config.json", model_type="llama")
    assert reads_tokens_of(str(teacher_folder), small_tokenizer) == (change == "plain")
