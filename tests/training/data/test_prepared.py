"""Prepared sources: mapped rather than read, and refused when damaged."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from training.data.manifest import Source
from training.data.options import PreparationOptions
from training.data.preparation.pipeline import prepare
from training.data.prepared import DESCRIPTION, OFFSETS, SPLITS, TOKENS, PreparedSource

Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def prepared(
    write_source: Callable[..., Source],
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
) -> PreparedSource:
    source = write_source("faq", rows=120, negatives=(2, 3), languages=["kor"])
    return prepare([source], small_tokenizer, tmp_path / "prepared", replace(options, validation_share=0.2))[0]


def test_opens_again_as_it_was(prepared: PreparedSource) -> None:
    again = PreparedSource(str(prepared.folder))
    assert (again.name, again.task_type, again.num_negatives) == ("faq", "retrieval", 3)
    assert again.description == prepared.description
    assert again.description["languages"] == ["kor"]
    assert again.description["rows"] == {split: len(rows) for split, rows in again.rows.items()}
    assert sum(again.description["rows"].values()) == 120
    for split, rows in prepared.rows.items():
        assert rows.tolist() == again.rows[split].tolist()


def test_arrays_are_mapped_read_only(prepared: PreparedSource) -> None:
    for array in (*prepared.rows.values(), prepared.tokens(0)):
        assert isinstance(array, np.memmap)
        assert array.dtype == np.dtype("<i4")
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_lengths_are_those_of_the_tokens(prepared: PreparedSource) -> None:
    texts = np.arange(prepared.description["texts"])
    assert prepared.lengths(texts).tolist() == [len(prepared.tokens(text)) for text in texts]
    assert prepared.lengths(texts[[3, 0, 3]]).tolist() == [len(prepared.tokens(text)) for text in (3, 0, 3)]
    assert prepared.lengths(prepared.rows["train"][:2]).shape == (2, 5)


def test_repr_says_what_is_in_it(prepared: PreparedSource) -> None:
    rows = {split: len(rows) for split, rows in prepared.rows.items()}
    texts = prepared.description["texts"]
    assert repr(prepared) == f"PreparedSource('faq', retrieval, rows={rows}, texts={texts})"


def test_split_without_rows_is_empty(
    write_source: Callable[..., Source],
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
) -> None:
    options = replace(options, validation_share=0.0)
    (prepared,) = prepare([write_source(rows=5, negatives=2)], small_tokenizer, tmp_path / "prepared", options)
    assert prepared.rows["validation"].shape == (0, 4)
    assert prepared.rows["validation"].dtype == np.dtype("<i4")


def test_pickle_holds_the_folder_only(prepared: PreparedSource) -> None:
    # A pickled memory map holds the whole array: each spawned loader worker would get a copy.
    pickled = pickle.dumps(prepared)
    assert len(pickled) < len(pickle.dumps(prepared.folder)) + 100
    again = pickle.loads(pickled)
    assert (again.folder, again.description) == (prepared.folder, prepared.description)
    assert again.tokens(7).tolist() == prepared.tokens(7).tolist()
    for split, rows in prepared.rows.items():
        assert isinstance(again.rows[split], np.memmap)
        assert again.rows[split].tolist() == rows.tolist()


def test_missing_folder(tmp_path: Path, refuses: Refuses) -> None:
    with refuses(tmp_path / "none", "not a whole prepared source", "prepare it again"):
        PreparedSource(tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_description_that_is_no_json(prepared: PreparedSource, refuses: Refuses, content: bytes) -> None:
    (prepared.folder / DESCRIPTION).write_bytes(content)
    with refuses(prepared.folder, "not a whole prepared source", "prepare it again"):
        PreparedSource(prepared.folder)


@pytest.mark.parametrize(
    "content", ["{}", "[]", "3", '"faq"', '{"name": "faq", "task_type": "retrieval", "negatives": 2}']
)
def test_description_of_another_format(prepared: PreparedSource, refuses: Refuses, content: str) -> None:
    (prepared.folder / DESCRIPTION).write_text(content)
    with refuses(prepared.folder, "not a whole prepared source", "prepare it again"):
        PreparedSource(prepared.folder)


@pytest.mark.parametrize("file", [TOKENS, OFFSETS, *SPLITS.values()])
def test_truncated_array(prepared: PreparedSource, refuses: Refuses, file: str) -> None:
    content = (prepared.folder / file).read_bytes()
    (prepared.folder / file).write_bytes(content[:-4])
    with refuses(prepared.folder, "not a whole prepared source", "prepare it again"):
        PreparedSource(prepared.folder)


@pytest.mark.parametrize("file", [TOKENS, OFFSETS, *SPLITS.values()])
def test_missing_array(prepared: PreparedSource, refuses: Refuses, file: str) -> None:
    (prepared.folder / file).unlink()
    with refuses(prepared.folder, "not a whole prepared source", file, "prepare it again"):
        PreparedSource(prepared.folder)


@pytest.mark.parametrize("rows", [2_000, 2_000_000])
def test_opening_costs_the_same_at_any_size(tmp_path: Path, rows: int) -> None:
    description = {"name": "large", "task_type": "retrieval", "negatives": 24, "texts": 2 * rows, "tokens": 100 * rows}
    description["rows"] = {"train": rows, "validation": 0}
    sizes = {TOKENS: 400 * rows, OFFSETS: 8 * (2 * rows + 1), SPLITS["train"]: 4 * 26 * rows, SPLITS["validation"]: 0}
    for name, size in sizes.items():
        with (tmp_path / name).open("wb") as file:
            # Holes take no room on the disk.
            file.truncate(size)
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    tracemalloc.start()
    large = PreparedSource(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(large.rows["train"]) == rows and len(large.tokens(0)) == 0
    assert peak < 100_000
