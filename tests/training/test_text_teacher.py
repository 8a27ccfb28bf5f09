"""Teachers that are given texts: of another architecture, tokenizer and instruction format than the student."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase

from tests.training.foreign_teacher import save_foreign_teacher
from training.collator import PackedCollator, PreparedRows
from training.data.manifest import Source
from training.data.options import PreparationOptions
from training.data.prepare import prepare
from training.data.prepared import PreparedSource
from training.sampler import RowKey
from training.text_teacher import TextFormat, TextTeacher, load_text_teacher

Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_foreign_teacher(tmp_path_factory.mktemp("foreign") / "teacher", width=24)


@pytest.fixture
def source(
    write_source: Callable[..., Source],
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
) -> PreparedSource:
    kept = PreparationOptions(**{**vars(options), "keep_texts": True})
    return prepare([write_source("topics", symmetric=True)], small_tokenizer, tmp_path / "prepared", kept)[0]


def test_it_gives_what_comes_before_the_last_normalisation(folder: Path) -> None:
    texts = ["the red river", "größer 東京"]
    found = load_text_teacher(str(folder), TextFormat()).encode(texts)
    whole = SentenceTransformer(str(folder))
    lengths = found.norm(dim=1)
    assert (lengths - 1).abs().min() > 0.05
    np.testing.assert_allclose((found / lengths[:, None]).numpy(), whole.encode(texts), atol=1e-6)


def test_it_is_frozen(folder: Path) -> None:
    teacher = load_text_teacher(str(folder), TextFormat())
    assert teacher.width == 24 and not teacher.model.training
    assert not any(weights.requires_grad for weights in teacher.model.parameters())


def test_texts_are_put_into_its_templates() -> None:
    own = TextFormat("query: {instruction} | {text}", "passage: {text}")
    assert own.apply("Instruct: Find it.\nQuery: {where}?") == "query: Find it. | {where}?"
    assert own.apply("Here.") == "passage: Here."
    for text in ("Instruct: Find it.\nQuery: Where?", "Here."):
        assert TextFormat().apply(text) == text


def test_a_batch_is_embedded_by_its_texts(folder: Path, source: PreparedSource, num_hard_negatives: dict) -> None:
    teacher = load_text_teacher(str(folder), TextFormat("q: {text}"))
    teacher.use([source])
    rows = [PreparedRows([source])[RowKey(0, 0, row)] for row in range(6)]
    batch = PackedCollator([source], num_hard_negatives, max_tokens_per_forward=60)(rows)
    found = teacher.embed(batch, 16)
    texts = source.texts(batch["own_texts"])
    assert any(text.startswith("Instruct: ") for text in texts)
    asked = [TextFormat("q: {text}").apply(text) for text in texts]
    assert not any("Instruct" in text for text in asked)
    by_hand = torch.cat([teacher.model.encode([text], convert_to_tensor=True)[:, :16] for text in asked])
    torch.testing.assert_close(found, by_hand[batch["slots"]], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(teacher.embed_texts(source, batch["own_texts"])[:, :16], by_hand, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("key", "template"),
    [
        ("query_template", "query: {instruction}"),
        ("query_template", "{text} {language}"),
        ("query_template", "{text"),
        ("document_template", "passage"),
        ("document_template", "{instruction} {text}"),
        ("document_template", "{} {text}"),
    ],
)
def test_bad_templates_are_refused(refuses: Refuses, key: str, template: str) -> None:
    with refuses(f"key 'teacher_{key}'", repr(template)):
        TextFormat(**{key: template})


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, refuses: Refuses) -> None:
    with refuses("key 'teacher'", tmp_path):
        load_text_teacher(str(tmp_path), TextFormat())


def test_embeddings_that_are_not_finite_are_refused(folder: Path, refuses: Refuses) -> None:
    teacher: TextTeacher = load_text_teacher(str(folder), TextFormat())
    with torch.no_grad():
        next(teacher.model.parameters()).fill_(float("nan"))
    with refuses("key 'teacher'", "not all finite"):
        teacher.encode(["a"])
