"""What is prepared again and what is not: the same bytes every time, and faults that lose nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from tests.training.data.prepared_rows import (
    contents,
    times,
)
from training.data.manifest import Source
from training.data.options import PreparationOptions
from training.data.preparation.pipeline import prepare
from training.data.prepared import PreparedSource
from training.models.tokenizer import train_tokenizer

Refuses = Callable[..., AbstractContextManager[None]]


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
    # Two sources of four arrays, their checksums and a description.
    assert len(contents(tmp_path / "one")) == 18
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_unchanged_sources_are_reused(
    two: list[Source], tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, options: PreparationOptions
) -> None:
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    prepared = prepare(two, small_tokenizer, tmp_path / "prepared", options)
    before = {each.name: times(each.folder) for each in prepared}
    for sources in (two, two[::-1]):
        reloaded = type(small_tokenizer).from_pretrained(tmp_path / "tokenizer")
        after = prepare(sources, reloaded, str(tmp_path / "prepared"), options)
        assert [prepared.name for prepared in after] == [source.name for source in sources]
        assert {prepared.name: times(prepared.folder) for prepared in after} == before


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
    before = contents(tmp_path / "reused")
    prepare(two, small_tokenizer, tmp_path / "reused", replace(options, **change))
    prepare(two, small_tokenizer, tmp_path / "fresh", replace(options, **change))
    # What a run with the other options may be reading stays as it is.
    assert contents(tmp_path / "reused") == before | contents(tmp_path / "fresh")
    assert len(contents(tmp_path / "reused")) == 2 * len(before)


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
    before = contents(tmp_path / "reused")
    changed = [replace(two[0], **change), two[1]]
    prepare(changed, small_tokenizer, tmp_path / "reused", options)
    prepare(changed, small_tokenizer, tmp_path / "fresh", options)
    assert contents(tmp_path / "reused") == before | contents(tmp_path / "fresh")
    assert len(contents(tmp_path / "reused")) == 1.5 * len(before)


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
    before = contents(tmp_path / "reused")
    prepare(two, other, tmp_path / "reused", options)
    prepare(two, other, tmp_path / "fresh", options)
    assert contents(tmp_path / "reused") == before | contents(tmp_path / "fresh")
    assert len(contents(tmp_path / "reused")) == 2 * len(before)


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
    (first,) = folder.glob("[!.]*")
    assert PreparedSource(first).name == "first"
    before = times(first)

    pq.write_table(pa.table(repaired), faulty.files[0])
    prepared = prepare(sources, small_tokenizer, folder, options)
    # What was begun of the faulty file is gone.
    assert {path.name for path in folder.iterdir()} - {".hashes"} == {each.folder.name for each in prepared}
    assert times(first) == before


def test_fault_keeps_what_was_prepared_from_the_old_file(
    two: list[Source],
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    refuses: Refuses,
) -> None:
    first, _ = prepare(two, small_tokenizer, tmp_path / "prepared", options)
    before = contents(first.folder)
    two[0].files[0].write_bytes(b"PAR1 no longer")
    with refuses(two[0].files[0], "not a readable parquet file"):
        prepare(two, small_tokenizer, tmp_path / "prepared", options)
    assert contents(first.folder) == before


def test_remains_of_an_interrupted_run_are_replaced(
    two: list[Source], tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, options: PreparationOptions
) -> None:
    prepared = prepare(two, small_tokenizer, tmp_path / "fresh", options)
    first, second = (tmp_path / "prepared" / each.folder.name for each in prepared)
    # Killed at the same work, at that of other settings, and while it cleared up; a half folder.
    for begun in (first, first.with_name("first-0123456789abcdef"), first.with_name("second-0123456789abcdef-texts")):
        remains = begun.with_name(f".{begun.name}.partial")
        remains.mkdir(parents=True)
        (remains / "tokens.int32").write_bytes(b"12345")
    second.mkdir()
    (second / "tokens.int32").write_bytes(b"12345")
    prepare(two, small_tokenizer, tmp_path / "prepared", options)
    assert contents(tmp_path / "prepared") == contents(tmp_path / "fresh")
    assert {path.name for path in (tmp_path / "prepared").iterdir()} - {".hashes"} == {first.name, second.name}


@pytest.mark.parametrize("damage", ["source.json", "tokens.int32"])
def test_damaged_folder_is_prepared_anew(
    two: list[Source],
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    damage: str,
) -> None:
    first, _ = prepare(two, small_tokenizer, tmp_path / "prepared", options)
    before = contents(tmp_path / "prepared")
    (first.folder / damage).write_bytes(b"{")
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


def test_a_source_with_forms_lies_beside_one_without(
    two: list[Source], tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, options: PreparationOptions
) -> None:
    plain = prepare(two, small_tokenizer, tmp_path / "prepared", options)
    assert not plain[0].has_forms
    with_forms = prepare(two, small_tokenizer, tmp_path / "prepared", replace(options, text_forms=True))
    assert all(source.has_forms for source in with_forms)
    before = [times(source.folder) for source in (*plain, *with_forms)]
    for each in (options, replace(options, text_forms=True)):
        prepare(two, small_tokenizer, tmp_path / "prepared", each)
    assert [times(source.folder) for source in (*plain, *with_forms)] == before
