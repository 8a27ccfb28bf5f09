"""Duplicates: each planted one is found with the row that it repeats, and nothing else is."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.training.data.cleaning.planted import HERE, clean_rows, sentence, write_manifest
from training.data.cleaning.duplicates import DeduplicationOptions, find_duplicates
from training.data.manifest import load_manifest

ALL = DeduplicationOptions(exact=True, near=True, across=True)


def find(manifest, options=ALL):
    """File, row, first file, first row and whether inside, by kind."""
    sources = load_manifest(manifest)
    files = [path for source in sources for path in source.files]
    source_of = [number for number, source in enumerate(sources) for _ in source.files]
    found = find_duplicates(files, source_of, options, manifest.parent / "work", HERE)
    return {kind: list(repeats.itertuples(index=False, name=None)) for kind, repeats in found.items()}


@pytest.mark.parametrize(
    "form",
    [
        lambda query, passage: (query.upper(), passage.title()),
        lambda query, passage: (f"  {query}?", passage.replace(" ", "\n ") + "."),
        lambda query, passage: ("".join(chr(ord(c) + 0xFEE0) if c != " " else "　" for c in query), f"“{passage}”"),
    ],
)
def test_a_repeat_in_another_form_is_found(tmp_path, form):
    rows = clean_rows(0)
    repeat = list(form(*rows[20]))
    assert repeat != rows[20]
    manifest = write_manifest(tmp_path, {"a": [[*rows[:50], repeat, *rows[50:]]]})
    assert find(manifest) == {"exact": [(0, 50, 0, 20, True)], "near": []}


def test_the_first_row_of_the_own_source_is_named(tmp_path):
    """Rows of one pair in two files of ``b``, after one in ``a``."""
    pair, own = ["who", "somebody"], ["where", "here"]
    files = {"a": [[*clean_rows(0), pair]], "b": [[own, pair, *clean_rows(1)[:-2]], [pair, own]]}
    manifest, last = write_manifest(tmp_path, files), len(clean_rows(0))
    across = [(1, 1, 0, last, False), (2, 0, 1, 1, True), (2, 1, 1, 0, True)]
    assert find(manifest)["exact"] == across
    inside = [(2, 0, 1, 1, True), (2, 1, 1, 0, True)]
    assert find(manifest, DeduplicationOptions(exact=True))["exact"] == inside


@pytest.mark.parametrize("script", ["Latn", "Hani", "Thai"])
def test_a_changed_word_in_a_long_text_is_a_near_duplicate(tmp_path, script):
    rng = np.random.default_rng(5)
    rows = [["why", sentence(rng, 150, script)] for _ in range(5)]
    text = rows[2][1]
    words, space = (text.split(), " ") if script == "Latn" else (text, "")
    changed = space.join([*words[:70], "changed", *words[71:]])
    manifest = write_manifest(tmp_path, {"a": [[*rows, ["WHY?", changed]]]})
    assert find(manifest) == {"exact": [], "near": [(0, 5, 0, 2, True)]}


def test_a_changed_word_in_either_side_and_across_sources(tmp_path):
    rng = np.random.default_rng(5)
    long_query, long_both = [sentence(rng, 120), "sport"], [sentence(rng, 120), sentence(rng, 120)]
    one = [*clean_rows(0), long_query, long_both]
    start = len(clean_rows(0))
    other = [
        ["changed " + long_query[0], "sport"],
        [long_both[0] + " changed", "changed " + long_both[1]],
        # Another label, and another long question about one passage: other rows.
        [long_query[0], "politics"],
        [sentence(rng, 120), long_both[1]],
    ]
    manifest = write_manifest(tmp_path, {"a": [one], "b": [other]})
    assert find(manifest)["near"] == [(1, 0, 0, start, False), (1, 1, 0, start + 1, False)]
    assert find(manifest, DeduplicationOptions(exact=False, near=True)) == {"near": []}


def test_neither_exact_duplicates_nor_rows_half_alike_are_near_ones(tmp_path):
    rng = np.random.default_rng(5)
    row = ["why", sentence(rng, 120)]
    manifest = write_manifest(tmp_path, {"a": [[row, ["why", row[1] + " changed"], ["Why", row[1].upper()]]]})
    assert find(manifest) == {"exact": [(0, 2, 0, 0, True)], "near": [(0, 1, 0, 0, True)]}
    near = find(manifest, DeduplicationOptions(exact=False, near=True))["near"]
    assert near == [(0, 1, 0, 0, True), (0, 2, 0, 0, True)]
    # MinHash pairs some rows half alike; the comparison does not.
    rng = np.random.default_rng(6)
    shared = sentence(rng, 70)
    rows = [["why", f"{shared} {sentence(rng, 30)}"] for _ in range(40)]
    manifest = write_manifest(tmp_path, {"a": [rows]})
    assert find(manifest, DeduplicationOptions(exact=False, near=True))["near"] == []
    loose = DeduplicationOptions(exact=False, near=True, similarity=0.4)
    assert find(manifest, loose)["near"]


def test_rows_that_differ_in_a_further_positive_stay(tmp_path):
    further = ["one", "ONE!", "two", None, None]
    columns = {"query": ["a"] * 5, "passage": ["b"] * 5, "positive_2": further, "negative_1": ["c", "d", "e", "f", "g"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    found = find_duplicates([tmp_path / "a.parquet"], [0], DeduplicationOptions(), tmp_path / "work", HERE)["exact"]
    assert found[["row", "first_row"]].to_numpy().tolist() == [[1, 0], [4, 3]]
