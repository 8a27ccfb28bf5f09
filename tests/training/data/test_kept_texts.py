"""Texts beside their tokens: the whole text of every position, at no cost to sets that do without."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from modeling_f2llm.prompts import instruct
from tests.training.data.prepared_rows import contents, published_rows, times
from training.common.executor import Executor
from training.data.manifest import Source
from training.data.options import PreparationOptions
from training.data.preparation import pipeline as prepare_module
from training.data.preparation import plan, reading
from training.data.preparation.pipeline import prepare
from training.data.preparation.tokenising import tokenise_partition
from training.data.prepared import DESCRIPTION, OFFSETS, SPLITS, TEXT_OFFSETS, TEXTS, TOKENS, PreparedSource
from training.prepare import main

Refuses = Callable[..., AbstractContextManager[None]]
Run = Callable[..., PreparedSource]


@pytest.fixture
def keeping(long: PreparationOptions) -> PreparationOptions:
    return replace(long, keep_texts=True)


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a hundred rows make several shards and partitions."""
    monkeypatch.setattr(plan, "_SHARD_ROWS", 20)
    monkeypatch.setattr(plan, "_PARTITION_CELLS", 64)
    monkeypatch.setattr(reading, "_BATCH_ROWS", 7)


def texts_of_rows(prepared: PreparedSource) -> list[tuple[str, ...]]:
    """The texts of the training rows, without the negatives that a row does not have."""
    return [tuple(prepared.texts(row[row >= 0])) for row in prepared.rows["train"]]


def stop_in(monkeypatch: pytest.MonkeyPatch, phase: str, after: int, run: Callable[[], Any]) -> None:
    """Runs until a phase has done some of its tasks."""
    work, done = getattr(prepare_module, phase), []

    def stops(*arguments: Any) -> None:
        if len(done) == after:
            raise KeyboardInterrupt
        work(*arguments)
        done.append(arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, phase, stops)
        with pytest.raises(KeyboardInterrupt):
            run()


# What is kept


def test_texts_are_those_that_the_model_reads(
    write_source: Callable[..., Source], run: Run, keeping: PreparationOptions
) -> None:
    source = write_source(rows=100, negatives=(2, 5))
    expected = [(instruct(source.instruction, query), *rest) for query, *rest in published_rows(source)]
    prepared = run(source, keeping)
    assert prepared.has_texts and texts_of_rows(prepared) == expected
    assert texts_of_rows(run(source, replace(keeping, instructions=False))) == list(published_rows(source))


def test_texts_are_whole_where_tokens_are_cut(
    write_source: Callable[..., Source], run: Run, keeping: PreparationOptions
) -> None:
    source = write_source(rows=40, symmetric=True)
    cut = run(source, replace(keeping, max_length=3), "cut")
    assert cut.lengths(np.arange(cut.description["texts"])).max() == 3
    assert texts_of_rows(cut) == texts_of_rows(run(source, keeping))


def test_texts_tokenise_to_the_tokens_beside_them(
    write_source: Callable[..., Source],
    run: Run,
    keeping: PreparationOptions,
    small_tokenizer: PreTrainedTokenizerBase,
    divided: None,
) -> None:
    prepared = run(write_source(rows=90, symmetric=True), keeping)
    positions = np.arange(prepared.description["texts"])
    texts = prepared.texts(positions)
    assert [small_tokenizer(text).input_ids for text in texts] == [prepared.tokens(i).tolist() for i in positions]
    assert prepared.texts(positions[[5, 0, 5]]) == [texts[5], texts[0], texts[5]]
    assert prepared.texts(positions[:0]) == []
    assert prepared.description["text_bytes"] == sum(len(text.encode()) for text in texts)


def test_any_character_is_kept(tmp_path: Path, run: Run, keeping: PreparationOptions) -> None:
    row = ("日本語\r\n", "ö\x00ü", "😀 ", "\ufeffq")
    columns = dict(zip(("query", "passage", "negative_1", "negative_2"), ([text] for text in row), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = Source("a", [tmp_path / "a.parquet"], "retrieval", "Find.")
    assert texts_of_rows(run(source, replace(keeping, instructions=False))) == [row]


def test_nothing_else_changes(
    write_source: Callable[..., Source], tmp_path: Path, run: Run, long: PreparationOptions, keeping: PreparationOptions
) -> None:
    source = write_source(rows=60)
    without, kept = run(source, long, "without"), run(source, keeping, "kept")
    assert not without.has_texts and without.description["fingerprint"] == kept.description["fingerprint"]
    described = dict(kept.description)
    assert described.pop("text_bytes") > 0 and described == without.description
    plain, more = contents(without.folder), contents(kept.folder)
    assert more.keys() - plain.keys() == {TEXTS, TEXT_OFFSETS, f"{TEXTS}.xxh3", f"{TEXT_OFFSETS}.xxh3"}
    assert all(more[name] == content for name, content in plain.items() if name != DESCRIPTION)


def test_a_source_without_texts_says_so(
    write_source: Callable[..., Source], run: Run, long: PreparationOptions, refuses: Refuses
) -> None:
    prepared = run(write_source(rows=5), long)
    with refuses(prepared.folder, "not kept", "--keep-texts"):
        prepared.texts(np.arange(2))


def test_bytes_do_not_depend_on_who_does_the_work(
    write_source: Callable[..., Source],
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    keeping: PreparationOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "_PARTITION_CELLS", 256)
    source = write_source(rows=300, negatives=(2, 5), symmetric=True)
    prepare([source], small_tokenizer, tmp_path / "one", keeping, Executor(workers=1))
    prepare([source], small_tokenizer, tmp_path / "many", keeping, Executor(workers=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


# When they are kept


def test_texts_that_are_missing_are_prepared(
    write_source: Callable[..., Source], run: Run, long: PreparationOptions, keeping: PreparationOptions
) -> None:
    source = write_source(rows=60)
    run(source, long)
    again = run(source, keeping)
    assert again.has_texts
    assert contents(again.folder) == contents(run(source, keeping, "fresh").folder)


def test_texts_that_nobody_needs_stay(
    write_source: Callable[..., Source], run: Run, long: PreparationOptions, keeping: PreparationOptions
) -> None:
    source = write_source(rows=60)
    before = times(run(source, keeping).folder)
    for options in (long, keeping):
        found = run(source, options)
        assert found.has_texts and times(found.folder) == before


@pytest.mark.parametrize("phase", ["tokenise_partition", "assemble"])
@pytest.mark.parametrize("first", [False, True])
def test_a_part_without_texts_is_no_part_of_one_with_texts(
    write_source: Callable[..., Source],
    run: Run,
    long: PreparationOptions,
    divided: None,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    first: bool,
) -> None:
    source = write_source(rows=90)
    after = 2 if phase == "tokenise_partition" else 0
    stop_in(monkeypatch, phase, after, lambda: run(source, replace(long, keep_texts=first)))
    then = replace(long, keep_texts=not first)
    assert contents(run(source, then).folder) == contents(run(source, then, "fresh").folder)


def test_a_part_with_texts_goes_on(
    write_source: Callable[..., Source],
    run: Run,
    keeping: PreparationOptions,
    divided: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = write_source(rows=90)
    whole = contents(run(source, keeping, "whole").folder)
    stop_in(monkeypatch, "tokenise_partition", 2, lambda: run(source, keeping))
    done: list[int] = []
    work = prepare_module.tokenise_partition
    monkeypatch.setattr(prepare_module, "tokenise_partition", lambda *given: (done.append(given[1]), work(*given)))
    assert contents(run(source, keeping).folder) == whole
    assert done and not {0, 1} & {*done}


# Files


@pytest.mark.parametrize("file", [TEXTS, TEXT_OFFSETS])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_texts_are_prepared_anew(
    write_source: Callable[..., Source],
    run: Run,
    keeping: PreparationOptions,
    refuses: Refuses,
    file: str,
    damage: str,
) -> None:
    source = write_source(rows=20)
    folder = run(source, keeping).folder
    before = contents(folder)
    (folder / file).unlink()
    if damage == "cut":
        (folder / file).write_bytes(before[file][:-1])
    with refuses(folder, "not a whole prepared source", "prepare it again"):
        PreparedSource(folder)
    run(source, keeping)
    assert contents(folder) == before


def test_pickle_opens_the_texts_again(
    write_source: Callable[..., Source], run: Run, keeping: PreparationOptions
) -> None:
    prepared = run(write_source(rows=20), keeping)
    pickled = pickle.dumps(prepared)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).texts(np.arange(9)) == prepared.texts(np.arange(9))


@pytest.mark.parametrize("rows", [2_000, 2_000_000])
def test_opening_costs_the_same_at_any_size(tmp_path: Path, rows: int) -> None:
    description = {"name": "large", "task_type": "retrieval", "negatives": 0, "texts": 2 * rows, "tokens": rows}
    description |= {"rows": {"train": rows, "validation": 0}, "text_bytes": 500 * rows}
    sizes = {TOKENS: 4 * rows, OFFSETS: 8 * (2 * rows + 1), SPLITS["train"]: 8 * rows, SPLITS["validation"]: 0}
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
    assert peak < 100_000


def test_writing_texts_takes_no_memory_of_their_size(
    tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, keeping: PreparationOptions
) -> None:
    # A partition's texts are in memory anyway; their bytes are not, beside them.
    texts = [[f"{column} {row} " + "word " * 1000 for row in range(50)] for column in "qpno"]
    pq.write_table(pa.table(texts, names=["query", "passage", "negative_1", "negative_2"]), tmp_path / "a.parquet")
    source = Source("a", [tmp_path / "a.parquet"], "retrieval", "Find.")
    peaks = []
    for options in (replace(keeping, keep_texts=False, max_length=9), replace(keeping, max_length=9)):
        folder = tmp_path / f"work_{options.keep_texts}"
        made = plan.make_plan(source, folder, options)
        made.make_folders()
        made.tokenizer_file.write_text(small_tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
        reading.read_shard(made, 0)
        tracemalloc.start()
        tokenise_partition(made, 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    written = (tmp_path / "work_True/texts/00000.utf8").stat().st_size
    assert written > 1_000_000 and peaks[1] - peaks[0] < written / 8


def test_command_line(
    write_source: Callable[..., Source], tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase
) -> None:
    source = write_source(rows=20, negatives=7)
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    entry = f"name: a, files: [{source.files[0].name}], task_type: retrieval, instruction: Find."
    (tmp_path / "manifest.yaml").write_text(f"sources:\n  - {{{entry}}}\n")
    words = ["--manifest", str(tmp_path / "manifest.yaml"), "--tokenizer", str(tmp_path / "tokenizer")]
    words += ["--output", str(tmp_path / "out")]
    for more, kept in ((["--keep-texts"], True), ([], True)):
        assert main([*words, *more]) == 0
        (folder,) = (tmp_path / "out").glob("[!.]*")
        assert PreparedSource(folder).has_texts == kept
