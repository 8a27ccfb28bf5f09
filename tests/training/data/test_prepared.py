"""Prepared sources: mapped rather than read, and refused when damaged."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from training.data.prepared import (
    DESCRIPTION,
    SPLITS,
    TEXT_OFFSETS,
    TOKENS,
    PreparedSource,
    find_prepared,
    sources_table,
)


@pytest.fixture
def prepared(write_source, run):
    source = write_source("faq", rows=120, negatives=(2, 3), languages=["kor"])
    return run(source, validation_share=0.2, keep_texts=True)


def test_opens_and_unpickles_with_its_arrays_mapped_read_only(prepared):
    again = PreparedSource(str(prepared.folder))
    assert (again.name, again.task_type, again.num_negatives) == ("faq", "retrieval", 3)
    assert again.description["languages"] == ["kor"]
    assert again.description["rows"] == {split: len(rows) for split, rows in again.rows.items()}
    assert sum(again.description["rows"].values()) == 120
    texts = np.arange(again.description["texts"])
    assert again.lengths(texts[[3, 0, 3]]).tolist() == [len(again.tokens(text)) for text in (3, 0, 3)]
    assert again.lengths(again.rows["train"][:2]).shape == (2, 5)
    tokens = np.concatenate([again.tokens(text) for text in texts])
    assert np.concatenate(list(again.token_blocks(1000))).tolist() == tokens.tolist()
    for array in (*again.rows.values(), again.tokens(0)):
        assert isinstance(array, np.memmap) and array.dtype == np.dtype("<i4")
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    # A pickled memory map holds the whole array: each spawned loader worker would get a copy.
    pickled = pickle.dumps(prepared)
    assert len(pickled) < len(pickle.dumps(prepared.folder)) + 100
    again = pickle.loads(pickled)
    assert (again.folder, again.description) == (prepared.folder, prepared.description)
    assert again.texts(np.arange(9)) == prepared.texts(np.arange(9))
    for split, rows in prepared.rows.items():
        assert isinstance(again.rows[split], np.memmap) and again.rows[split].tolist() == rows.tolist()


def test_faulty_description_and_truncated_or_missing_array(prepared, refuses):
    for file in (TOKENS, SPLITS["train"], TEXT_OFFSETS):
        content = (prepared.folder / file).read_bytes()
        (prepared.folder / file).write_bytes(content[:-4])
        with refuses(prepared.folder, "not a whole prepared source"):
            PreparedSource(prepared.folder)
        (prepared.folder / file).unlink()
        with refuses(prepared.folder, "not a whole prepared source", file):
            PreparedSource(prepared.folder)
        (prepared.folder / file).write_bytes(content)
    for content in (b"{", b"\xff", b"[]", b'{"name": "faq"}'):
        (prepared.folder / DESCRIPTION).write_bytes(content)
        with refuses(prepared.folder, "not a whole prepared source", "prepare it again"):
            PreparedSource(prepared.folder)


def test_the_table_has_aligned_columns_and_a_sum(prepared, write_source, run):
    other = run(write_source("a_longer_name", rows=2000, task_type="clustering"))
    head, first, second, total = sources_table([prepared, other]).splitlines()
    texts, tokens = ((prepared.description[key], other.description[key]) for key in ("texts", "tokens"))
    assert first.split() == ["faq", "retrieval", "96", "24", f"{texts[0]:,}", f"{tokens[0]:,}", "0"]
    assert second.split()[:4] == ["a_longer_name", "clustering", "2,000", "0"]
    assert total.split() == ["all", "2,096", "24", f"{sum(texts):,}", f"{sum(tokens):,}", "0"]
    assert len({len(line) for line in (head, first, second, total)}) == 1
    assert first.index("retrieval") == second.index("clustering") == head.index("task")


def test_folders_are_found_by_their_fingerprints(prepared, write_source, run):
    fingerprints = {"other": "0", "faq": prepared.description["fingerprint"]}
    run(write_source("faq", rows=7))
    (prepared.folder.parent / "broken").mkdir()
    (prepared.folder.parent / "broken" / DESCRIPTION).write_text("{")
    assert find_prepared(prepared.folder.parent, fingerprints) == [prepared.folder]
