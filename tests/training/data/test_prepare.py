"""Preparation: every row arrives as the tokens of its texts, each distinct text once, and the same bytes every time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from modeling_f2llm.prompts import instruct
from training.data.manifest import Source
from training.data.options import PreparationOptions
from training.data.prepare import prepare
from training.data.prepared import PreparedSource
from training.data.tokenizer import train_tokenizer

Refuses = Callable[..., AbstractContextManager[None]]
Row = tuple[str | None, ...]


def published_rows(source: Source) -> Iterator[Row]:
    for path in source.files:
        for row in pq.read_table(path).to_pylist():
            yield tuple(text for column, text in row.items() if column != "lang")


def prepared_rows(prepared: PreparedSource, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Row]]:
    """The texts of the rows by split, decoded, without the negatives that a row does not have."""
    texts = [tokenizer.decode(prepared.tokens(text)[:-1]) for text in range(prepared.description["texts"])]
    return {
        split: [tuple(texts[position] for position in row if position >= 0) for row in rows.tolist()]
        for split, rows in prepared.rows.items()
    }


def all_rows(prepared: PreparedSource, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    return list(chain(*prepared_rows(prepared, tokenizer).values()))


def distinct_documents(rows: list[Row]) -> set[str]:
    return {text for row in rows for text in row[1:]}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture
def long(options: PreparationOptions) -> PreparationOptions:
    """Long enough for every text to be whole, without validation rows: rows stay in the order of the file."""
    return replace(options, max_length=2048, validation_share=0.0)


@pytest.fixture
def run(
    tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, long: PreparationOptions
) -> Callable[..., PreparedSource]:
    """Prepares one source."""

    def run(source: Source, options: PreparationOptions = long, folder: str = "prepared") -> PreparedSource:
        (prepared,) = prepare([source], small_tokenizer, tmp_path / folder, options)
        return prepared

    return run


# Rows and texts


@pytest.mark.parametrize("negatives", [3, (2, 5), (5, 2, 3)])
def test_raw_rows_decode_to_the_published_rows(
    write_source: Callable[..., Source],
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    long: PreparationOptions,
    negatives: Any,
) -> None:
    source = write_source(rows=100, negatives=negatives, symmetric=True)
    prepared = run(source, replace(long, instructions=False))
    assert prepared_rows(prepared, small_tokenizer) == {"train": list(published_rows(source)), "validation": []}
    assert prepared.num_negatives == (negatives if isinstance(negatives, int) else max(negatives))
    assert prepared.description["instruction"] is None


def test_instruction_stands_before_queries_only(
    write_source: Callable[..., Source], run: Callable[..., PreparedSource], small_tokenizer: PreTrainedTokenizerBase
) -> None:
    source = write_source(rows=100, negatives=(2, 5))
    expected = [(instruct(source.instruction, query), *rest) for query, *rest in published_rows(source)]
    prepared = run(source)
    assert prepared_rows(prepared, small_tokenizer)["train"] == expected
    assert prepared.description["instruction"] == source.instruction


def test_rows_of_both_splits_in_many_batches(
    write_source: Callable[..., Source],
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    long: PreparationOptions,
) -> None:
    # More rows than a batch of reading (8192) and more texts than a call of the tokenizer (1024).
    source = write_source(rows=9000, negatives=2)
    rows = prepared_rows(run(source, replace(long, validation_share=0.1, instructions=False)), small_tokenizer)
    assert sorted(rows["train"] + rows["validation"]) == sorted(published_rows(source))


def test_null_negatives_are_missing_from_their_row_only(
    tmp_path: Path, run: Callable[..., PreparedSource], small_tokenizer: PreTrainedTokenizerBase
) -> None:
    columns = {"query": ["a", "b", "c"], "passage": ["d", "e", "f"], "negative_1": ["g", None, "h"]}
    columns |= {"negative_2": ["i", "j", "k"], "negative_3": [None, "l", "g"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    prepared = run(Source("a", [tmp_path / "a.parquet"], "retrieval", "Find."))
    assert (prepared.rows["train"] < 0).tolist() == [
        [False] * 4 + [True],
        [False] * 2 + [True] + [False] * 2,
        [False] * 5,
    ]
    rows = [row[1:] for row in all_rows(prepared, small_tokenizer)]
    assert rows == [("d", "g", "i"), ("e", "j", "l"), ("f", "h", "k", "g")]


@pytest.mark.parametrize("instructions", [False, True])
@pytest.mark.parametrize("max_length", [2048, 24, 1])
def test_tokens_are_those_of_the_tokenizer(
    write_source: Callable[..., Source],
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    long: PreparationOptions,
    max_length: int,
    instructions: bool,
) -> None:
    source = write_source(rows=60)
    prepared = run(source, replace(long, max_length=max_length, instructions=instructions))
    for row, (query, *documents) in zip(prepared.rows["train"], published_rows(source), strict=True):
        query = instruct(source.instruction, query) if instructions else query
        for position, text in zip(row, (query, *documents), strict=True):
            expected = small_tokenizer(text, truncation=True, max_length=max_length).input_ids
            assert prepared.tokens(position).tolist() == expected
            assert len(expected) <= max_length
            assert expected[-1] == small_tokenizer.eos_token_id
            assert small_tokenizer.eos_token_id not in expected[:-1]
    lengths = prepared.lengths(prepared.rows["train"])
    assert lengths.max() == max_length or max_length == 2048


def test_prompt_and_text_are_tokenised_together(
    write_source: Callable[..., Source], run: Callable[..., PreparedSource], small_tokenizer: PreTrainedTokenizerBase
) -> None:
    source = write_source(rows=20)
    prepared = run(source)
    prompt = small_tokenizer(instruct(source.instruction)).input_ids[:-1]
    apart = [prompt + small_tokenizer(row[0]).input_ids for row in published_rows(source)]
    together = [prepared.tokens(position).tolist() for position in prepared.rows["train"][:, 0]]
    assert all(a != b for a, b in zip(apart, together, strict=True)), "the example does not tell the two apart"
    assert together == [
        small_tokenizer(instruct(source.instruction, row[0])).input_ids for row in published_rows(source)
    ]


def test_each_distinct_text_is_stored_once(
    write_source: Callable[..., Source], run: Callable[..., PreparedSource], small_tokenizer: PreTrainedTokenizerBase
) -> None:
    prepared = run(write_source(rows=300, negatives=(3, 5)))
    rows = prepared.rows["train"]
    stored = [small_tokenizer.decode(prepared.tokens(text)) for text in range(prepared.description["texts"])]
    assert len(set(stored)) == len(stored) < rows.size / 2
    assert set(rows.ravel().tolist()) == {-1, *range(len(stored))}
    assert prepared.description["tokens"] == sum(len(prepared.tokens(text)) for text in range(len(stored)))


def test_text_that_is_query_and_passage_is_stored_once(
    tmp_path: Path, run: Callable[..., PreparedSource], long: PreparationOptions
) -> None:
    columns = {"query": ["a", "b"], "passage": ["b", "a"], "negative_1": ["c", "c"], "negative_2": ["d", "c"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    prepared = run(Source("a", [tmp_path / "a.parquet"], "retrieval", "Find."), replace(long, instructions=False))
    assert prepared.description["texts"] == 4


# Instructions


@pytest.mark.parametrize(("symmetric", "expected"), [(True, 0.3), (False, 0.0)])
def test_share_of_documents_under_the_instruction(
    tmp_path: Path,
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    symmetric: bool,
    expected: float,
) -> None:
    texts = [f"text {i}" for i in range(4000)]
    columns = ["query", "passage", "negative_1", "negative_2"]
    pq.write_table(pa.table([texts[i::4] for i in range(4)], names=columns), tmp_path / "a.parquet")
    source = Source("a", [tmp_path / "a.parquet"], "retrieval", "Find.", symmetric=symmetric)
    prepared = run(source)
    rows = all_rows(prepared, small_tokenizer)
    assert all(row[0].startswith(instruct("Find.")) for row in rows)
    for column in (1, 2, 3):
        share = sum(row[column].startswith(instruct("Find.")) for row in rows) / len(rows)
        assert (share > 0) == symmetric
        assert share == pytest.approx(expected, abs=0.05)  # 3.4 standard deviations of 1000 draws
    stripped = [tuple(text.removeprefix(instruct("Find.")) for text in row) for row in rows]
    assert stripped == list(published_rows(source))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_or_every_document_under_the_instruction(
    write_source: Callable[..., Source],
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    long: PreparationOptions,
    share: float,
) -> None:
    prepared = run(write_source(symmetric=True), replace(long, document_instruction_share=share))
    documents = distinct_documents(all_rows(prepared, small_tokenizer))
    assert {document.startswith("Instruct: ") for document in documents} == {bool(share)}


def test_raw_symmetric_source_has_no_instruction(
    write_source: Callable[..., Source],
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    long: PreparationOptions,
) -> None:
    prepared = run(write_source(symmetric=True), replace(long, instructions=False, document_instruction_share=1.0))
    assert not any("Instruct: " in text for row in all_rows(prepared, small_tokenizer) for text in row)


def test_document_keeps_one_form_in_all_rows(
    write_source: Callable[..., Source], run: Callable[..., PreparedSource], small_tokenizer: PreTrainedTokenizerBase
) -> None:
    source = write_source(rows=300, symmetric=True)
    documents = distinct_documents(all_rows(run(source), small_tokenizer))
    assert len(documents) == len(distinct_documents(list(published_rows(source))))


def test_instruction_that_a_text_brings_is_not_added_twice(
    tmp_path: Path,
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    long: PreparationOptions,
) -> None:
    own = instruct("Say the same.", "hello")
    columns = {"query": [own, "bye"], "passage": [own, "bye"], "negative_1": ["no", "yes"], "negative_2": ["a", "b"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = Source("a", [tmp_path / "a.parquet"], "retrieval", "Find.", symmetric=True)
    rows = all_rows(run(source, replace(long, document_instruction_share=1.0)), small_tokenizer)
    assert [row[:2] for row in rows] == [(own, own), (instruct("Find.", "bye"),) * 2]


@pytest.mark.parametrize("query", ["Instruct: the art of teaching", "What is\nQuery: for?"])
def test_text_that_only_looks_like_an_instruction_gets_one(
    tmp_path: Path, run: Callable[..., PreparedSource], small_tokenizer: PreTrainedTokenizerBase, query: str
) -> None:
    columns = {"query": [query], "passage": ["a"], "negative_1": ["b"], "negative_2": ["c"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    ((first, *_),) = all_rows(run(Source("a", [tmp_path / "a.parquet"], "retrieval", "Find.")), small_tokenizer)
    assert first == instruct("Find.", query)


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


# Reuse


@pytest.fixture
def two(write_source: Callable[..., Source]) -> list[Source]:
    return [write_source("first", rows=40), write_source("second", rows=30, symmetric=True)]


def test_two_runs_write_the_same_bytes(
    two: list[Source], tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, options: PreparationOptions
) -> None:
    options = replace(options, validation_share=0.2)
    two[0] = replace(two[0], cap=35)
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    reloaded = type(small_tokenizer).from_pretrained(tmp_path / "tokenizer")
    prepare(two, small_tokenizer, tmp_path / "one", options)
    prepare(two[::-1], reloaded, tmp_path / "two", options)
    assert len(contents(tmp_path / "one")) == 10
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_unchanged_sources_are_reused(
    two: list[Source], tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, options: PreparationOptions
) -> None:
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    before = [times(prepared.folder) for prepared in prepare(two, small_tokenizer, tmp_path / "prepared", options)]
    for sources in (two, two[::-1]):
        reloaded = type(small_tokenizer).from_pretrained(tmp_path / "tokenizer")
        after = prepare(sources, reloaded, str(tmp_path / "prepared"), options)
        assert [prepared.name for prepared in after] == [source.name for source in sources]
        assert [times(tmp_path / "prepared" / source.name) for source in two] == before


def test_reuse_does_not_depend_on_the_last_call_of_the_tokenizer(
    two: list[Source], tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, options: PreparationOptions
) -> None:
    # A fast tokenizer keeps the padding and truncation of its last call, and writes them to its JSON.
    before = [times(prepared.folder) for prepared in prepare(two, small_tokenizer, tmp_path / "prepared", options)]
    small_tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=7)
    after = [times(prepared.folder) for prepared in prepare(two, small_tokenizer, tmp_path / "prepared", options)]
    assert after == before


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 20},
        {"instructions": False},
        {"document_instruction_share": 0.9},
        {"validation_share": 0.5},
        {"num_hard_negatives": (("retrieval", 1),)},
        {"seed": 1},
    ],
)
def test_changed_option_prepares_anew(
    two: list[Source],
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    change: dict[str, Any],
) -> None:
    prepare(two, small_tokenizer, tmp_path / "reused", options)
    prepare(two, small_tokenizer, tmp_path / "reused", replace(options, **change))
    prepare(two, small_tokenizer, tmp_path / "fresh", replace(options, **change))
    assert contents(tmp_path / "reused") == contents(tmp_path / "fresh")


def test_negatives_of_another_task_type_do_not_matter(
    two: list[Source], tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, options: PreparationOptions
) -> None:
    before = [times(prepared.folder) for prepared in prepare(two, small_tokenizer, tmp_path / "prepared", options)]
    changed = replace(options, num_hard_negatives=(*options.num_hard_negatives, ("clustering", 9)))
    after = [times(prepared.folder) for prepared in prepare(two, small_tokenizer, tmp_path / "prepared", changed)]
    assert after == before


@pytest.mark.parametrize(
    "change",
    [
        {"instruction": "Another."},
        {"symmetric": True},
        {"cap": 10},
        {"task_type": "clustering"},
        {"languages": ["kor"]},
    ],
)
def test_changed_source_prepares_anew(
    two: list[Source],
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    change: dict[str, Any],
) -> None:
    prepare(two, small_tokenizer, tmp_path / "reused", options)
    changed = [replace(two[0], **change), two[1]]
    prepare(changed, small_tokenizer, tmp_path / "reused", options)
    prepare(changed, small_tokenizer, tmp_path / "fresh", options)
    assert contents(tmp_path / "reused") == contents(tmp_path / "fresh")


def test_changed_file_prepares_its_source_anew(
    two: list[Source],
    tmp_path: Path,
    write_source: Callable[..., Source],
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
) -> None:
    _, second = prepare(two, small_tokenizer, tmp_path / "prepared", options)
    before = times(second.folder)
    write_source("first", rows=41)
    first, second = prepare(two, small_tokenizer, tmp_path / "prepared", options)
    assert sum(first.description["rows"].values()) == 41
    assert times(second.folder) == before


def test_changed_tokenizer_prepares_anew(
    two: list[Source], tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, options: PreparationOptions
) -> None:
    other = train_tokenizer(iter(["another text entirely"] * 3), 300)
    prepare(two, small_tokenizer, tmp_path / "reused", options)
    prepare(two, other, tmp_path / "reused", options)
    prepare(two, other, tmp_path / "fresh", options)
    assert contents(tmp_path / "reused") == contents(tmp_path / "fresh")


# Faults


def test_fault_in_one_source_keeps_those_before_it(
    two: list[Source],
    tmp_path: Path,
    write_source: Callable[..., Source],
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    refuses: Refuses,
) -> None:
    faulty = write_source("faulty", rows=3)
    table = pq.read_table(faulty.files[0]).to_pydict()
    repaired = dict(table)
    table["passage"] = [*table["passage"][:2], None]
    pq.write_table(pa.table(table), faulty.files[0])
    sources, folder = [two[0], faulty, two[1]], tmp_path / "prepared"
    with refuses(faulty.files[0], "row 2,", "'passage'"):
        prepare(sources, small_tokenizer, folder, options)
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == ["first"]
    assert not any(path.is_dir() for path in folder.rglob("faulty"))
    before = times(folder / "first")
    PreparedSource(folder / "first")

    pq.write_table(pa.table(repaired), faulty.files[0])
    prepare(sources, small_tokenizer, folder, options)
    assert sorted(path.name for path in folder.iterdir()) == ["faulty", "first", "second"]
    assert times(folder / "first") == before


def test_fault_keeps_what_was_prepared_from_the_old_file(
    two: list[Source],
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    refuses: Refuses,
) -> None:
    prepare(two, small_tokenizer, tmp_path / "prepared", options)
    before = contents(tmp_path / "prepared" / "first")
    two[0].files[0].write_bytes(b"PAR1 no longer")
    with refuses(two[0].files[0], "not a readable parquet file"):
        prepare(two, small_tokenizer, tmp_path / "prepared", options)
    assert contents(tmp_path / "prepared" / "first") == before


def test_remains_of_an_interrupted_run_are_replaced(
    two: list[Source], tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, options: PreparationOptions
) -> None:
    # Killed before the folder was complete, and between the removal of the old folder and the naming of the new one.
    remains = tmp_path / "prepared" / ".first.partial"
    remains.mkdir(parents=True)
    (remains / "tokens.int32").write_bytes(b"12345")
    (tmp_path / "prepared" / "second").mkdir()
    (tmp_path / "prepared" / "second" / "tokens.int32").write_bytes(b"12345")
    prepare(two, small_tokenizer, tmp_path / "prepared", options)
    prepare(two, small_tokenizer, tmp_path / "fresh", options)
    assert contents(tmp_path / "prepared") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["source.json", "tokens.int32"])
def test_damaged_folder_is_prepared_anew(
    two: list[Source],
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    damage: str,
) -> None:
    prepare(two, small_tokenizer, tmp_path / "prepared", options)
    before = contents(tmp_path / "prepared")
    (tmp_path / "prepared" / "first" / damage).write_bytes(b"{")
    prepare(two, small_tokenizer, tmp_path / "prepared", options)
    assert contents(tmp_path / "prepared") == before


def test_row_with_too_few_negatives_for_its_task_type(
    write_source: Callable[..., Source], run: Callable[..., PreparedSource], refuses: Refuses
) -> None:
    source = write_source(negatives=(3, 2), task_type="clustering")
    with refuses(source.files[1], "2 negative columns", "3"):
        run(source)


def test_missing_file_of_a_source(
    write_source: Callable[..., Source], run: Callable[..., PreparedSource], refuses: Refuses
) -> None:
    source = write_source(negatives=(3, 2))
    source.files[1].unlink()
    with refuses(source.files[1], "no such file"):
        run(source)


def test_tokenizer_without_eos(
    two: list[Source],
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    refuses: Refuses,
) -> None:
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.eos_token = None
    with refuses("tokenizer", "EOS"):
        prepare(two, tokenizer, tmp_path / "prepared", options)
    assert not (tmp_path / "prepared").exists()
