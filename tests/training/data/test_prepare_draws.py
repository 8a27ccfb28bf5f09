"""Which rows of a source are prepared, and on which side of the split: exact, by key, and in order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerBase

from tests.training.data.prepared_rows import (
    Row,
    all_rows,
    prepared_rows,
    published_rows,
)
from training.data.manifest import Source
from training.data.options import PreparationOptions
from training.data.prepared import PreparedSource

Refuses = Callable[..., AbstractContextManager[None]]


# Cap and split


@pytest.mark.parametrize("cap", [1, 30, 99])
@pytest.mark.parametrize("validation_share", [0.0, 0.2])
def test_cap_is_exact(
    write_source: Callable[..., Source],
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    long: PreparationOptions,
    cap: int,
    validation_share: float,
) -> None:
    source = write_source(rows=100, negatives=(2, 3, 2), cap=cap)
    prepared = run(source, replace(long, validation_share=validation_share, instructions=False))
    rows = all_rows(prepared, small_tokenizer)
    assert len(rows) == len(set(rows)) == cap
    assert set(rows) <= set(published_rows(source))
    used = {position for part in prepared.rows.values() for position in part.ravel().tolist()}
    assert used - {-1} == set(range(prepared.description["texts"])), "texts of rows above the cap are stored"


@pytest.mark.parametrize("cap", [100, 1000])
def test_cap_that_all_rows_fit_under_keeps_them_in_order(
    write_source: Callable[..., Source],
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    long: PreparationOptions,
    cap: int,
) -> None:
    source = write_source(rows=100, cap=cap)
    assert all_rows(run(source, replace(long, instructions=False)), small_tokenizer) == list(published_rows(source))


def test_cap_draws_rows_by_seed_and_source(
    write_source: Callable[..., Source],
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    long: PreparationOptions,
) -> None:
    source, raw = write_source(rows=200, cap=50), replace(long, instructions=False)

    def rows(options: PreparationOptions = raw, source: Source = source) -> set[Row]:
        return set(all_rows(run(source, options), small_tokenizer))

    drawn = rows()
    published = list(published_rows(source))
    assert {published.index(row) for row in drawn} != set(range(50))
    assert rows(replace(raw, num_hard_negatives=(("retrieval", 1),))) == drawn  # whatever else changes
    assert len(rows(replace(raw, seed=1)) & drawn) < 30  # 12.5 expected
    assert len(rows(source=replace(source, name="other")) & drawn) < 30
    assert rows(source=replace(source, cap=80)) > drawn  # a larger cap adds rows


def test_split_is_disjoint_complete_and_of_the_share_asked_for(
    write_source: Callable[..., Source],
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    long: PreparationOptions,
) -> None:
    source, raw = write_source(rows=4000, negatives=2), replace(long, instructions=False, validation_share=0.01)
    published = list(published_rows(source))
    rows = prepared_rows(run(source, raw), small_tokenizer)
    train, validation = set(rows["train"]), set(rows["validation"])
    assert train.isdisjoint(validation)
    assert train | validation == set(published)
    assert len(rows["train"]) + len(rows["validation"]) == 4000
    assert 20 <= len(validation) <= 60  # 40 expected
    positions = sorted(published.index(row) for row in validation)
    assert positions[0] < 1000 < 3000 < positions[-1]
    # The published order is kept within a split.
    assert [published.index(row) for row in rows["validation"]] == positions
    # A row stays on its side under a cap, and changes it with the seed.
    capped = prepared_rows(run(replace(source, cap=2000), raw), small_tokenizer)
    assert set(capped["validation"]) < validation
    assert set(capped["train"]) < train
    assert set(prepared_rows(run(source, replace(raw, seed=1)), small_tokenizer)["validation"]) != validation


def test_files_and_batches_do_not_change_what_is_drawn(
    write_source: Callable[..., Source],
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    long: PreparationOptions,
) -> None:
    # 9000 rows: more than a batch of reading in the one file.
    raw = replace(long, instructions=False, validation_share=0.1)
    rows = []
    for number, negatives in enumerate([2, (2, 2, 2)]):
        source = write_source(rows=9000, negatives=negatives, cap=4000)
        rows.append(prepared_rows(run(source, raw, f"prepared {number}"), small_tokenizer))
    assert rows[0] == rows[1]


@pytest.mark.parametrize(("share", "train"), [(0.0, 50), (1.0, 0)])
def test_split_of_one_side_only(
    write_source: Callable[..., Source],
    run: Callable[..., PreparedSource],
    long: PreparationOptions,
    share: float,
    train: int,
) -> None:
    prepared = run(write_source(rows=50), replace(long, validation_share=share))
    assert {split: len(rows) for split, rows in prepared.rows.items()} == {"train": train, "validation": 50 - train}
