"""Rows and texts: every row arrives as the tokens of its texts, each distinct text once, bad rows apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from xxhash import xxh3_128_digest

from modeling_f2llm.prompts import instruct
from tests.training.data.prepared_rows import published_rows
from training.common.executor import Executor
from training.data.preparation import plan, reading
from training.data.preparation.plan import PreparationOptions, least_negatives
from training.data.prepared import QUARANTINE, put_aside

QWEN = "Instruct: {}\nQuery:{}".format


@pytest.mark.parametrize("negatives", [3, (5, 2, 3)])
def test_raw_rows_decode_to_the_published_rows(write_source, run, decode, negatives):
    source = write_source(rows=100, negatives=negatives, symmetric=True)
    prepared = run(source, instructions=False, document_instruction_share=1.0)
    assert decode(prepared) == published_rows(source) and decode(prepared, "validation") == []
    assert prepared.num_negatives == np.max(negatives)
    assert prepared.description["instruction"] is None


def test_null_negatives_and_sources_without_negative_columns(write_columns, run, decode, write_source, refuses):
    columns = {"query": ["a", "b", "c"], "passage": ["d", "e", "f"], "negative_1": ["g", None, "h"]}
    columns |= {"negative_2": ["i", "j", "k"], "negative_3": [None, "l", "g"]}
    prepared = run(write_columns(columns))
    assert np.argwhere(prepared.rows["train"] < 0).tolist() == [[0, 4], [1, 2]]
    assert [row[1:] for row in decode(prepared)] == [("d", "g", "i"), ("e", "j", "l"), ("f", "h", "k", "g")]
    source = write_source(rows=20, negatives=0)
    prepared = run(source, instructions=False)
    assert prepared.num_negatives == 0 and decode(prepared) == published_rows(source)
    # A file without, among files with, and types that learn from nothing else, are errors.
    with refuses("0 negative columns", "'num_hard_negatives_retrieval: 0'"):
        run(write_source("mixed", rows=20, negatives=(4, 0)))
    with refuses("0 negative columns", "clustering learns from nothing else", "mine.py"):
        run(write_source("topics", rows=20, negatives=0, task_type="clustering"))
    few = write_source("few", negatives=(3, 2), task_type="clustering")
    with refuses(few.files[1], "2 negative columns", "3"):
        run(few)


def test_rows_of_fewer_negatives_than_are_drawn(write_columns, run, refuses):
    drawn = {"retrieval": 2, "clustering": 3, "classification": 0}
    assert least_negatives(drawn, None) == tuple(drawn.items())
    assert dict(least_negatives(drawn, 2)) == {"retrieval": 2, "clustering": 2, "classification": 0}
    counts = {"num_hard_negatives": least_negatives(drawn, 0)}
    columns = {"query": ["a", "b", "c"], "passage": ["d", "e", "f"], "negative_1": ["g", None, "h"]}
    columns["negative_2"] = [None, None, "i"]
    with refuses("row 0", "fewer than 2", "min_hard_negatives"):
        run(write_columns(columns))
    prepared = run(write_columns(columns), **counts)
    assert (prepared.rows["train"][:, 2:] >= 0).tolist() == [[True, False], [False, False], [True, True]]
    # Without in-batch negatives, a row without hard ones teaches nothing.
    with refuses("row 1", "fewer than 1"):
        run(write_columns(columns, "topics", task_type="clustering"), **counts)


def test_further_positives_follow_the_negatives(write_columns, run, decode):
    first = {"query": ["a", "b"], "passage": ["c", "d"], "negative_1": ["e", "f"], "negative_2": ["g", "h"]}
    second = {"query": ["q"], "passage": ["r"], "positive_2": ["s"], "negative_1": ["t"], "positive_3": ["u"]}
    source = write_columns(first)
    source = replace(source, files=[*source.files, *write_columns(second, "b").files])
    prepared = run(source, instructions=False, num_hard_negatives=(("retrieval", 1),))
    assert (prepared.num_positives, prepared.num_negatives, prepared.has_ids) == (3, 2, False)
    assert decode(prepared) == [("a", "c", "e", "g"), ("b", "d", "f", "h"), ("q", "r", "t", "s", "u")]
    rows = prepared.rows["train"]
    assert (prepared.positives(rows) >= 0).tolist() == [[True, False, False]] * 2 + [[True] * 3]
    assert (prepared.negatives(rows) >= 0).tolist() == [[True, True]] * 2 + [[True, False]]


def test_texts_of_one_document_share_a_number(write_columns, run, small_tokenizer):
    columns = {"query": list("abcd"), "passage": ["one", "One!", "two", "six"], "negative_1": ["x", "y", "z", "w"]}
    columns |= {"passage_id": ["1", None, "2", None], "positive_2": ["uno", None, "eins", "x"]}
    columns |= {"positive_2_id": ["1", None, "1", None], "negative_1_id": ["7", "8", None, "8"]}
    prepared = run(write_columns(columns), instructions=False, num_hard_negatives=(("retrieval", 1),))
    positions = range(prepared.description["texts"])
    texts = [small_tokenizer.decode(prepared.tokens(text)[:-1]) for text in positions]
    number = dict(zip(texts, prepared.forms(np.array(positions)).tolist(), strict=True))
    groups = {frozenset(text for text in texts if number[text] == each) for each in number.values()}
    # An id joins different texts, and a spelling all of its documents.
    assert {group for group in groups if len(group) > 1} == {frozenset({"one", "One!", "uno", "eins"}), frozenset("yw")}


def test_scores_of_documents_are_kept_if_they_are_asked_for(write_columns, run, decode, refuses):
    rows = range(20)
    columns = {"query": [f"q {row}" for row in rows]}
    for name in ("passage", "positive_2", "negative_1", "negative_2"):
        columns[name] = [None if row == 3 and name == "positive_2" else f"{name} {row}" for row in rows]
    scores = {"negative_1_score": [row / 8 for row in rows], "passage_score": [*rows]}
    scores["positive_2_score"] = [None, np.inf, np.nan, *(row / 4 for row in rows)][:20]
    few = {"validation_share": 0.25, "instructions": False}
    prepared = run(write_columns({**columns, **scores}), **few, document_scores=True)
    plain = run(write_columns({**columns, **scores}), **few)
    assert prepared.has_document_scores and not plain.has_document_scores and not plain.scores
    for split, found in prepared.scores.items():
        assert decode(prepared, split) == decode(plain, split)
        for (query, *_), row in zip(decode(prepared, split), found, strict=True):
            number = int(query.removeprefix("q "))
            further = np.nan if number < 3 else (number - 3) / 4
            np.testing.assert_array_equal(row, [number, number / 8, np.nan, further])
    # A source without them has none, and texts are refused.
    assert not run(write_columns(columns, "none"), document_scores=True).scores
    with refuses("column 'passage_score' holds string, not numbers"):
        run(write_columns({**columns, "passage_score": ["a"] * 20}, "text"), document_scores=True)


def test_graded_pairs_keep_their_scores(write_columns, run, decode, refuses, caplog):
    rows = range(40)
    columns = {"query": [f"one {row}" for row in rows], "passage": [f"other {row}" for row in rows[:-1]] + ["one 39"]}
    source = write_columns({**columns, "score": [row / 8 for row in rows]}, task_type="similarity")
    prepared = run(source, validation_share=0.25, instructions=False)
    # A pair of equal texts is compared with others.
    assert prepared.description["query_is_passage"] == 1 and "next to nothing" not in caplog.text
    assert prepared.num_negatives == 0 and len(prepared.rows["validation"]) == 10
    for split, scores in prepared.scores.items():
        assert [f"one {score * 8:.0f}" for score in scores] == [query for query, _ in decode(prepared, split)]
        assert scores.dtype == np.float32
    path = prepared.folder / "train_scores.float32"
    path.write_bytes(path.read_bytes()[::-1])
    with refuses(path, "delete"):
        prepared.check()
    with refuses("source 'equal'", "the score 2", "teaches nothing"):
        run(write_columns({**columns, "score": [2] * 40}, "equal", task_type="similarity"))


@pytest.mark.parametrize("instructions", [False, True])
@pytest.mark.parametrize("max_length", [2048, 24, 1])
def test_tokens_are_those_of_the_tokenizer(write_source, run, small_tokenizer, max_length, instructions):
    source = write_source(rows=60)
    prepared = run(source, max_length=max_length, instructions=instructions)
    for row, (query, *rest) in zip(prepared.rows["train"], published_rows(source), strict=True):
        query = instruct(source.instruction, query) if instructions else query
        for position, text in zip(row, (query, *rest), strict=True):
            expected = small_tokenizer(text, truncation=True, max_length=max_length).input_ids
            assert prepared.tokens(position).tolist() == expected
            assert len(expected) <= max_length
            assert expected[-1] == small_tokenizer.eos_token_id
            assert small_tokenizer.eos_token_id not in expected[:-1]
    assert prepared.lengths(prepared.rows["train"]).max() == max_length or max_length == 2048


def test_each_distinct_text_is_stored_once(write_source, write_columns, run, small_tokenizer):
    prepared = run(write_source(rows=300, negatives=(3, 5)))
    rows = prepared.rows["train"]
    stored = [small_tokenizer.decode(prepared.tokens(text)) for text in range(prepared.description["texts"])]
    assert len(set(stored)) == len(stored) < rows.size / 2
    assert set(rows.ravel().tolist()) == {-1, *range(len(stored))}
    assert prepared.description["tokens"] == sum(len(prepared.tokens(text)) for text in range(len(stored)))
    columns = {"query": ["a", "b"], "passage": ["b", "a"], "negative_1": ["c", "c"], "negative_2": ["d", "c"]}
    assert run(write_columns(columns), instructions=False).description["texts"] == 4


@pytest.mark.parametrize(("symmetric", "expected"), [(True, 0.3), (False, 0.0)])
def test_share_of_documents_under_the_instruction(write_columns, run, decode, symmetric, expected):
    texts = [f"text {i}" for i in range(4000)]
    names = ["query", "passage", "negative_1", "negative_2"]
    source = write_columns({name: texts[i::4] for i, name in enumerate(names)}, symmetric=symmetric)
    rows = decode(run(source))
    shares = [sum(text.startswith(instruct("Find.")) for text in column) / 1000 for column in zip(*rows, strict=True)]
    assert shares == [1, *[pytest.approx(expected, abs=0.05 * symmetric)] * 3]  # 3.4 standard deviations of 1000 draws
    assert [tuple(text.removeprefix(instruct("Find.")) for text in row) for row in rows] == published_rows(source)


def test_a_source_without_an_instruction_gets_the_prompt_of_the_model(write_columns, run, decode):
    own = instruct("Say the same.", "hello")
    columns = {"query": [own, "bye"], "passage": ["hi", "ciao"], "negative_1": ["no", "yes"], "negative_2": ["a", "b"]}
    source = replace(write_columns(columns, symmetric=True), instruction=None)
    prepared = run(source, query_prompt="find: ", document_instruction_share=1.0)
    assert decode(prepared) == [
        tuple(instruct("Say the same.", text) for text in ("hello", "hi", "no", "a")),
        ("find: bye", "find: ciao", "find: yes", "find: b"),
    ]
    assert prepared.description["prompt"] == "find: "
    named = write_columns(columns)
    assert run(named, query_prompt="find: ").folder == run(named).folder


def test_instruction_that_a_text_brings_is_not_added_twice(write_columns, run, decode):
    own = instruct("Say the same.", "hello")
    columns = {"query": [own, "bye"], "passage": [own, "bye"], "negative_1": ["no", "yes"], "negative_2": ["a", "b"]}
    rows = decode(run(write_columns(columns, symmetric=True), document_instruction_share=1.0))
    assert [row[:2] for row in rows] == [(own, own), (instruct("Find.", "bye"),) * 2]
    columns = {"query": [QWEN("Say it.", "hello")], "passage": ["hi"], "negative_1": ["no"], "negative_2": ["a"]}
    assert decode(run(write_columns(columns))) == [(QWEN("Say it.", "hello"), "hi", "no", "a")]
    assert decode(run(write_columns(columns), instructions=False)) == [("hello", "hi", "no", "a")]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_documents_carry_the_instruction_of_their_row(write_columns, run, decode, share):
    queries = [QWEN("One.", "q0"), instruct("Two.", "q1"), "q2", instruct("One.", "q3")] * 10
    passages = [f"p{row // 4}" for row in range(40)]
    columns = {"query": queries, "passage": passages, "negative_1": ["n", None] * 20, "negative_2": ["m"] * 40}
    changes = {"document_instruction_share": share, "num_hard_negatives": (("retrieval", 1),)}
    rows = decode(run(write_columns(columns, symmetric=True), **changes))
    own = dict(zip(queries, ["One.", "Two.", "Find.", "One."], strict=False))
    drawn = {text.split("Query: ")[1] for row in rows for text in row[1:] if text.startswith("Instruct: ")}
    for row, written in zip(rows, zip(*columns.values(), strict=True), strict=True):
        query, *rest = (text for text in written if text is not None)
        assert row[0] == (instruct("Find.", "q2") if query == "q2" else query)
        # Drawn by the text alone: the same in every row.
        assert row[1:] == tuple(instruct(own[query], text) if text in drawn else text for text in rest)
    everything = {*passages, "n", "m"}
    assert drawn == everything if share == 1 else drawn and drawn < everything


@pytest.fixture
def faulty(write_source):
    """A source with seven bad rows of as many kinds, in both of its files."""
    source = write_source("many", rows=400, negatives=(3, 4), symmetric=True)
    first, second = (pq.read_table(file).to_pydict() for file in source.files)
    first["query"][3] = None
    first["passage"][17] = "  "
    first["negative_2"][40] = first["passage"][40]
    first["negative_1"][41] = first["negative_2"][41] = None
    second["passage"][0] = "x" * 1_000_001
    second["query"][199] = ""
    query = pa.array([b"\xff\xfe" if row == 5 else text.encode() for row, text in enumerate(second["query"])])
    second["query"] = pa.Array.from_buffers(pa.string(), len(query), query.buffers())
    for file, columns in zip(source.files, (first, second), strict=True):
        pq.write_table(pa.table(columns), file, row_group_size=15)
    return source


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_rows_are_errors_or_put_aside_with_the_reason(faulty, run, refuses, monkeypatch, workers):
    with refuses(faulty.files[0], "row 3,", "column 'query' is null", "quarantine"):
        run(faulty)
    monkeypatch.setattr(plan, "_SHARD_ROWS", 150)
    prepared = run(faulty, executor=Executor(workers=workers), on_bad_row="quarantine")
    aside = pq.read_table(prepared.folder / QUARANTINE).to_pylist()
    first, second = (file.name for file in faulty.files)
    assert [(row["file"], row["row"], row["column"], row["reason"]) for row in aside] == [
        (first, 3, "query", "is null"),
        (first, 17, "passage", "is empty"),
        (first, 40, "negative_2", "equals column 'passage'"),
        (first, 41, "negative_*", "has fewer than 2 texts"),
        (second, 0, "passage", "has more than 1,000,000 characters"),
        (second, 5, "query", "is not UTF-8"),
        (second, 199, "query", "is empty"),
    ]
    assert aside[1]["query"] == pq.read_table(faulty.files[0]).column("query")[17].as_py()
    assert sum(prepared.description["rows"].values()) == 400 - len(aside)
    assert put_aside(prepared).startswith("source 'many': 7 of 400 rows (1.8%) were put aside (1 equals column")
    assert "2 is empty" in put_aside(prepared) and put_aside(prepared).endswith(f"see {prepared.folder / QUARANTINE}")


@pytest.mark.parametrize("batch_rows", [7, 2048])
def test_two_texts_of_one_hash_are_refused(write_source, run, refuses, monkeypatch, batch_rows):
    def same_for_two(text, seed):
        digest = xxh3_128_digest(text, seed=seed)
        return b"collided" + digest[8:] if b"question 7 " in text or b"question 8 " in text else digest

    monkeypatch.setattr(reading, "_BATCH_ROWS", batch_rows)
    monkeypatch.setattr(reading, "xxh3_128_digest", same_for_two)
    with refuses("'many'", "two texts have one 64-bit hash", "another seed"):
        run(write_source("many"))


def test_options_out_of_range_are_refused(options, refuses):
    faulty = {"on_bad_row": "ignore", "max_length": 0, "seed": -1, "validation_share": 1.5}
    for key, value in {**faulty, "document_instruction_share": -0.1}.items():
        with refuses(key, value):
            replace(options, **{key: value})
    with refuses("num_hard_negatives_retrieval", -1):
        PreparationOptions(num_hard_negatives=(("retrieval", -1),))
