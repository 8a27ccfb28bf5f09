"""Preparation: every row arrives as the tokens of its texts, each distinct text once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from modeling_f2llm.prompts import instruct
from tests.training.data.prepared_rows import (
    all_rows,
    distinct_documents,
    prepared_rows,
    published_rows,
)
from training.data.manifest import Source
from training.data.options import PreparationOptions
from training.data.prepared import PreparedSource

Refuses = Callable[..., AbstractContextManager[None]]


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


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_text_types_make_no_difference(
    write_source: Callable[..., Source],
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    kind: pa.DataType,
) -> None:
    source = write_source(rows=50)
    expected = all_rows(run(source), small_tokenizer)
    for path in source.files:
        table = pq.read_table(path)
        pq.write_table(pa.table({name: table[name].cast(pa.string()).cast(kind) for name in table.column_names}), path)
        assert pq.read_schema(path).field("query").type == kind
    assert all_rows(run(source), small_tokenizer) == expected


QWEN = "Instruct: {}\nQuery:{}".format


def test_template_of_another_model_is_not_added_to(
    tmp_path: Path,
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    long: PreparationOptions,
) -> None:
    columns = {"query": [QWEN("Say it.", "hello")], "passage": ["hi"], "negative_1": ["no"], "negative_2": ["a"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = Source("a", [tmp_path / "a.parquet"], "retrieval", "Find.")
    assert all_rows(run(source, long), small_tokenizer) == [(QWEN("Say it.", "hello"), "hi", "no", "a")]
    raw = run(source, replace(long, instructions=False))
    assert all_rows(raw, small_tokenizer) == [("hello", "hi", "no", "a")]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_documents_carry_the_instruction_of_their_row(
    tmp_path: Path,
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    long: PreparationOptions,
    share: float,
) -> None:
    queries = [QWEN("One.", "q0"), instruct("Two.", "q1"), "q2", instruct("One.", "q3")] * 10
    passages = [f"p{row // 4}" for row in range(40)]
    columns = {"query": queries, "passage": passages, "negative_1": ["n", None] * 20, "negative_2": ["m"] * 40}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = Source("a", [tmp_path / "a.parquet"], "retrieval", "Find.", symmetric=True)
    options = replace(long, document_instruction_share=share, num_hard_negatives=(("retrieval", 1),))
    rows = all_rows(run(source, options), small_tokenizer)
    own = dict(zip(queries, ["One.", "Two.", "Find.", "One."], strict=False))
    under = {text for row in rows for text in row[1:] if text.startswith("Instruct: ")}
    drawn = {text.split("Query: ")[1] for text in under}
    for row, written in zip(rows, zip(*columns.values(), strict=True), strict=True):
        query, *documents = (text for text in written if text is not None)
        assert row[0] == (instruct("Find.", "q2") if query == "q2" else query)
        # Drawn by the text alone: the same in every row.
        assert row[1:] == tuple(instruct(own[query], text) if text in drawn else text for text in documents)
    everything = {*passages, "n", "m"}
    assert drawn == everything if share == 1 else drawn and drawn < everything


def test_a_retrieval_source_without_negative_columns_has_none(
    write_source: Callable[..., Source],
    run: Callable[..., PreparedSource],
    small_tokenizer: PreTrainedTokenizerBase,
    long: PreparationOptions,
    caplog: pytest.LogCaptureFixture,
    refuses: Refuses,
) -> None:
    caplog.set_level("INFO")
    source = write_source(rows=20, negatives=0)
    prepared = run(source, replace(long, instructions=False))
    assert prepared.num_negatives == 0
    assert all_rows(prepared, small_tokenizer) == list(published_rows(source))
    assert f"{source.name}: no negative columns" in caplog.text
    # A file without, among files with, and types that learn from nothing else, are errors.
    with refuses("0 negative columns", "'num_hard_negatives_retrieval: 0'"):
        run(write_source("mixed", rows=20, negatives=(4, 0)))
    with refuses("0 negative columns", "clustering learns from nothing else", "mine.py"):
        run(write_source("topics", rows=20, negatives=0, task_type="clustering"))
