"""Commands that prepare at the same time, that were killed, or whose files changed since: nothing half is ever used."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from tests.training.data.prepared_rows import contents
from training.common.checksums import write_checksums
from training.common.executor import SubmittedError
from training.common.outputs import locked
from training.data import storage
from training.data.manifest import Source
from training.data.options import PreparationOptions
from training.data.preparation import pipeline as prepare_module
from training.data.preparation import plan
from training.data.preparation.pipeline import prepare
from training.data.prepared import PreparedSource

Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def source(write_source: Callable[..., Source]) -> Source:
    return write_source("source", rows=100)


@pytest.fixture
def run(
    source: Source, tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, options: PreparationOptions
) -> Callable[..., PreparedSource]:
    def run(folder: str = "prepared", **changes: Any) -> PreparedSource:
        return prepare([source], small_tokenizer, tmp_path / folder, replace(options, **changes))[0]

    return run


@pytest.mark.parametrize("changes", [{}, {"max_length": 9}, {"keep_texts": True}])
def test_two_commands_prepare_at_once(
    run: Callable[..., PreparedSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    for each in ({}, changes):
        run("fresh", **each)
    monkeypatch.setattr(plan, "_SHARD_ROWS", 20)
    # Slow enough for the commands to overlap, however busy the machine is.
    for name in ("read_shard", "tokenise_partition", "place_shard", "assemble"):
        work = getattr(prepare_module, name)
        monkeypatch.setattr(prepare_module, name, lambda *given, work=work: (time.sleep(0.05), work(*given)))
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=run, kwargs=each) for each in ({}, changes)]
    for command in both:
        command.start()
    for command in both:
        command.join(60)
    assert [command.exitcode for command in both] == [0, 0]
    assert contents(tmp_path / "prepared").keys() == contents(tmp_path / "fresh").keys()
    # The division into shards changes the order of nothing here.
    assert contents(tmp_path / "prepared") == contents(tmp_path / "fresh")
    assert not [path for path in (tmp_path / "prepared").glob(".*") if path.name != ".hashes"]


def test_what_another_run_reads_stays(run: Callable[..., PreparedSource]) -> None:
    first = run()
    texts = np.arange(first.description["texts"])
    tokens = [first.tokens(text).tolist() for text in texts]
    run(max_length=9)
    # As a loader worker opens it.
    again = pickle.loads(pickle.dumps(first))
    assert [again.tokens(text).tolist() for text in texts] == tokens


def test_finished_data_needs_no_lock(run: Callable[..., PreparedSource], monkeypatch: pytest.MonkeyPatch) -> None:
    finished = run()

    def fails(*_: object, **__: object) -> None:
        raise AssertionError("the disk may be read-only")

    monkeypatch.setattr(prepare_module, "locked", fails)
    monkeypatch.setattr(storage, "locked", fails)
    assert run().folder == finished.folder


def test_work_of_a_live_command_is_not_cleared(run: Callable[..., PreparedSource], tmp_path: Path) -> None:
    begun = tmp_path / "prepared" / "source-0123456789abcdef"
    work = begun.with_name(f".{begun.name}.partial")
    work.mkdir(parents=True)
    with locked(begun):
        run()
        assert work.exists()
    run()
    assert not work.exists()


def test_submitted_work_is_not_cleared(
    run: Callable[..., PreparedSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(*_: object) -> None:
        raise SubmittedError("submitted")

    with monkeypatch.context() as patch, pytest.raises(SubmittedError):
        patch.setattr(prepare_module, "run_phases", submit)
        run()
    (work,) = (tmp_path / "prepared").glob(".*.partial")
    run(max_length=9)
    assert work.exists()
    run()
    assert not work.exists()


# What changed


def test_the_same_content_with_another_time_is_not_prepared_again(
    run: Callable[..., PreparedSource], source: Source
) -> None:
    before = run()
    os.utime(source.files[0], ns=(1, 1))
    assert run().folder == before.folder


def test_other_content_of_the_same_size_and_time_is_prepared_again(
    run: Callable[..., PreparedSource], source: Source
) -> None:
    pq.write_table(pq.read_table(source.files[0]), source.files[0], compression="none", use_dictionary=False)
    before, stat = run(), source.files[0].stat()
    content = source.files[0].read_bytes()
    changed = content.replace(b"source answer 7 ", b"source answer X ")
    assert changed != content
    source.files[0].write_bytes(changed)
    os.utime(source.files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run().folder != before.folder


@pytest.mark.parametrize(
    "name",
    [
        *("tokens.int32", "offsets.int64", "train.int32", "validation.int32", "texts.utf8", "text_offsets.int64"),
        "tokens.int32.xxh3",
    ],
)
def test_flipped_bytes_are_noticed(run: Callable[..., PreparedSource], refuses: Refuses, name: str) -> None:
    prepared = run(keep_texts=True, validation_share=0.2)
    path = prepared.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with refuses(prepared.folder / name.removesuffix(".xxh3"), "is damaged", f"delete {prepared.folder}"):
        run(keep_texts=True, validation_share=0.2)


@pytest.mark.parametrize("damage", ["zeros", "empty texts"])
def test_texts_that_are_not_whole_are_noticed(
    run: Callable[..., PreparedSource], refuses: Refuses, damage: str
) -> None:
    prepared = run()
    path = prepared.folder / ("tokens.int32" if damage == "zeros" else "offsets.int64")
    values = np.fromfile(path, "<i4" if damage == "zeros" else "<i8")
    if damage == "zeros":
        values[:] = 0
    else:
        values[2] = values[1]
    values.tofile(path)
    # As if they had been written so.
    write_checksums(path)
    with refuses(path.parent, "text", "delete"):
        run()
