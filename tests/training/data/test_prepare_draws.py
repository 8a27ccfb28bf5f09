"""Which rows of a source are prepared, and on which side of the split: exact, by key, and in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from modeling_f2llm.prompts import instruct
from tests.training.data.prepared_rows import (
    Row,
    all_rows,
    prepared_rows,
    published_rows,
)
from training.common.keyed import keyed_bits
from training.data.manifest import Source
from training.data.options import PreparationOptions
from training.data.preparation import plan, splitting
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
    assert len(validation) == 40
    positions = sorted(published.index(row) for row in validation)
    assert positions[0] < 1000 < 3000 < positions[-1]
    # The published order is kept within a split.
    assert [published.index(row) for row in rows["validation"]] == positions
    # The share is as exact under a cap, and takes the same queries first; other draws would share 1 of 40.
    capped = prepared_rows(run(replace(source, cap=2000), raw), small_tokenizer)
    assert (len(capped["train"]), len(capped["validation"])) == (1980, 20)
    assert len(set(capped["validation"]) & validation) >= 15
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


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Source]:
    """Writes a source of the given queries, each with a passage and negatives of its own."""

    def write(queries: Sequence[str], name: str = "rows", task_type: str = "retrieval") -> Source:
        rows = range(len(queries))
        columns = {"query": queries, "passage": [f"passage {row}" for row in rows]}
        columns |= {f"negative_{k}": [f"negative {row} {k}" for row in rows] for k in (1, 2, 3)}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet", row_group_size=50)
        return Source(name, [tmp_path / f"{name}.parquet"], task_type, "Find.")

    return write


@pytest.mark.parametrize("task_type", ["retrieval", "clustering", "classification"])
def test_rows_of_a_query_are_on_one_side(
    write_rows: Callable[..., Source],
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    long: PreparationOptions,
    monkeypatch: pytest.MonkeyPatch,
    task_type: str,
) -> None:
    monkeypatch.setattr(plan, "_SHARD_ROWS", 50)
    queries = [f"question {row % 100}" for row in range(1000)]
    raw = replace(long, instructions=False, validation_share=0.1)
    rows = prepared_rows(run(write_rows(queries, task_type=task_type), raw), small_tokenizer)
    held_out = {row[0] for row in rows["validation"]}
    assert (len(rows["validation"]), len(held_out)) == (100, 10)
    assert held_out.isdisjoint(row[0] for row in rows["train"])


def test_a_query_is_drawn_by_its_text_alone(
    write_rows: Callable[..., Source],
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    long: PreparationOptions,
) -> None:
    queries = [f"question {row % 150}" for row in range(300)]
    sources = [write_rows(queries), write_rows(queries[::-1], "reversed", "clustering")]
    sources.append(write_rows([instruct("Another.", query) for query in queries], "instructed"))
    held_out = []
    for source, instructions in [(sources[0], False), (sources[1], False), (sources[0], True), (sources[2], True)]:
        options = replace(long, instructions=instructions, validation_share=0.2)
        rows = prepared_rows(run(source, options), small_tokenizer)["validation"]
        held_out.append({row[0].rsplit("Query: ", 1)[-1] for row in rows})
    assert len(held_out[0]) == 30
    assert all(each == held_out[0] for each in held_out)


def test_a_query_of_most_rows_does_not_leave_too_few_to_train_on(
    write_rows: Callable[..., Source], run: Callable[..., PreparedSource], long: PreparationOptions
) -> None:
    queries = ["the same"] * 900 + [f"question {row}" for row in range(100)]
    prepared = run(write_rows(queries), replace(long, validation_share=0.05))
    assert {split: len(rows) for split, rows in prepared.rows.items()} == {"train": 950, "validation": 50}


@pytest.mark.parametrize(
    ("queries", "share", "validation"), [(["a"], 0.9, 0), (["a"] * 9, 0.9, 0), (["a", "b"], 0.9, 1)]
)
def test_a_source_is_never_held_out_whole(
    write_rows: Callable[..., Source],
    run: Callable[..., PreparedSource],
    long: PreparationOptions,
    queries: list[str],
    share: float,
    validation: int,
) -> None:
    prepared = run(write_rows(queries), replace(long, validation_share=share))
    assert len(prepared.rows["validation"]) == validation


@pytest.mark.parametrize("rows_of_a_query", [1, 3, 1000])
def test_a_large_source_has_the_same_share(
    tmp_path: Path, long: PreparationOptions, monkeypatch: pytest.MonkeyPatch, rows_of_a_query: int
) -> None:
    # More rows than are looked at first.
    monkeypatch.setattr(splitting, "_LEAST_ROWS", 1000)
    numbers = np.arange(200_000) // rows_of_a_query
    work = plan.PreparationPlan(
        Source("large", [], "retrieval", "Find."),
        replace(long, validation_share=0.01),
        tmp_path,
        0,
        (plan.Shard(0, (0, 1), 0, 0, 150_000), plan.Shard(0, (1, 2), 150_000, 0, 50_000)),
    )
    work.make_folders()
    draws = keyed_bits(7, numbers)
    for shard, part in enumerate(np.split(draws, [150_000])):
        part.tofile(work.draws_file(shard))
    splitting.choose_validation(work)
    held_out = np.fromfile(work.held_out_file, dtype="<u8")
    assert np.isin(draws, held_out).sum() == pytest.approx(2000, abs=2)
    # The lowest draws there are, wherever they stand.
    assert held_out.tolist() == np.unique(draws)[: len(held_out)].tolist()


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
