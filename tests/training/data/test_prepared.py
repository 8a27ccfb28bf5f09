"""Prepared sources: mapped rather than read, and refused when damaged."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.training.data.prepared_rows import Refuses, Run, Write
from training.data.prepared import (
    DESCRIPTION,
    OFFSETS,
    SPLITS,
    TEXT_OFFSETS,
    TEXTS,
    TOKENS,
    PreparedSource,
    find_prepared,
    sources_table,
)


@pytest.fixture
def prepared(write_source: Write, run: Run) -> PreparedSource:
    source = write_source("faq", rows=120, negatives=(2, 3), languages=["kor"])
    return run(source, validation_share=0.2, keep_texts=True)


def test_opens_again_as_it_was(prepared: PreparedSource) -> None:
    again = PreparedSource(str(prepared.folder))
    assert (again.name, again.task_type, again.num_negatives) == ("faq", "retrieval", 3)
    assert again.description == prepared.description
    assert again.description["languages"] == ["kor"]
    assert again.description["rows"] == {split: len(rows) for split, rows in again.rows.items()}
    assert sum(again.description["rows"].values()) == 120
    for split, rows in prepared.rows.items():
        assert rows.tolist() == again.rows[split].tolist()
    texts = again.description["texts"]
    assert repr(again) == f"PreparedSource('faq', retrieval, rows={again.description['rows']}, texts={texts})"


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
    tokens = np.concatenate([prepared.tokens(text) for text in texts])
    assert np.concatenate(list(prepared.token_blocks(1000))).tolist() == tokens.tolist()


def test_split_without_rows_is_empty(write_source: Write, run: Run) -> None:
    rows = run(write_source(rows=5, negatives=2)).rows["validation"]
    assert rows.shape == (0, 4) and rows.dtype == np.dtype("<i4")


def test_pickle_holds_the_folder_only(prepared: PreparedSource) -> None:
    # A pickled memory map holds the whole array: each spawned loader worker would get a copy.
    pickled = pickle.dumps(prepared)
    assert len(pickled) < len(pickle.dumps(prepared.folder)) + 100
    again = pickle.loads(pickled)
    assert (again.folder, again.description) == (prepared.folder, prepared.description)
    assert again.tokens(7).tolist() == prepared.tokens(7).tolist()
    assert again.texts(np.arange(9)) == prepared.texts(np.arange(9))
    for split, rows in prepared.rows.items():
        assert isinstance(again.rows[split], np.memmap)
        assert again.rows[split].tolist() == rows.tolist()


def test_missing_folder(tmp_path: Path, refuses: Refuses) -> None:
    with refuses(tmp_path / "none", "not a whole prepared source", "prepare it again"):
        PreparedSource(tmp_path / "none")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff", b"{}", b"[]", b"3", b'"faq"'),
        b'{"name": "faq", "task_type": "retrieval", "negatives": 2}',
    ],
)
def test_description_that_is_faulty(prepared: PreparedSource, refuses: Refuses, content: bytes) -> None:
    (prepared.folder / DESCRIPTION).write_bytes(content)
    with refuses(prepared.folder, "not a whole prepared source", "prepare it again"):
        PreparedSource(prepared.folder)


@pytest.mark.parametrize("file", [TOKENS, OFFSETS, *SPLITS.values(), TEXTS, TEXT_OFFSETS])
def test_truncated_or_missing_array(prepared: PreparedSource, refuses: Refuses, file: str) -> None:
    content = (prepared.folder / file).read_bytes()
    (prepared.folder / file).write_bytes(content[:-4])
    with refuses(prepared.folder, "not a whole prepared source", "prepare it again"):
        PreparedSource(prepared.folder)
    (prepared.folder / file).unlink()
    with refuses(prepared.folder, "not a whole prepared source", file, "prepare it again"):
        PreparedSource(prepared.folder)


@pytest.mark.parametrize("rows", [2_000, 2_000_000])
def test_opening_costs_the_same_at_any_size(tmp_path: Path, rows: int) -> None:
    description = {"name": "large", "task_type": "retrieval", "negatives": 24, "texts": 2 * rows, "tokens": 100 * rows}
    description |= {"rows": {"train": rows, "validation": 0}, "text_bytes": 500 * rows}
    sizes = {TOKENS: 400 * rows, OFFSETS: 8 * (2 * rows + 1), SPLITS["train"]: 4 * 26 * rows, SPLITS["validation"]: 0}
    for name, size in {**sizes, TEXTS: 500 * rows, TEXT_OFFSETS: 8 * (2 * rows + 1)}.items():
        with (tmp_path / name).open("wb") as file:
            # Holes take no room on the disk.
            file.truncate(size)
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    tracemalloc.start()
    large = PreparedSource(tmp_path)
    assert large.texts(np.array([rows, 0])) == ["", ""]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(large.rows["train"]) == rows and len(large.tokens(0)) == 0
    assert peak < 100_000


def test_the_table_has_aligned_columns_and_a_sum(prepared: PreparedSource, write_source: Write, run: Run) -> None:
    other = run(write_source("a_longer_name", rows=2000, task_type="clustering"))
    head, first, second, total = sources_table([prepared, other]).splitlines()
    assert head.split() == ["source", "task", "rows", "validation", "texts", "tokens", "put", "aside"]
    texts, tokens = ((prepared.description[key], other.description[key]) for key in ("texts", "tokens"))
    assert first.split() == ["faq", "retrieval", "96", "24", f"{texts[0]:,}", f"{tokens[0]:,}", "0"]
    assert second.split()[:4] == ["a_longer_name", "clustering", "2,000", "0"]
    assert total.split() == ["all", "2,096", "24", f"{sum(texts):,}", f"{sum(tokens):,}", "0"]
    assert len({len(line) for line in (head, first, second, total)}) == 1
    assert first.index("retrieval") == second.index("clustering") == head.index("task")


def test_folders_are_found_by_their_fingerprints(prepared: PreparedSource, write_source: Write, run: Run) -> None:
    fingerprints = {"other": "0", "faq": prepared.description["fingerprint"]}
    run(write_source("faq", rows=7))
    (prepared.folder.parent / "broken").mkdir()
    (prepared.folder.parent / "broken" / DESCRIPTION).write_text("{")
    assert find_prepared(prepared.folder.parent, fingerprints) == [prepared.folder]
