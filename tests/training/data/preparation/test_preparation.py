"""Preparation in tasks: how the work is divided, where it runs and how often it is killed change no byte."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_128_digest

from tests.training.data.prepared_rows import contents
from training.common.executor import Executor
from training.data.manifest import Source
from training.data.options import PreparationOptions
from training.data.preparation import pipeline as prepare_module
from training.data.preparation import plan, reading, runs
from training.data.preparation.pipeline import prepare
from training.data.prepared import QUARANTINE, PreparedSource

Refuses = Callable[..., AbstractContextManager[None]]
ROOT = Path(__file__).parents[4]


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a few hundred rows make many shards, partitions, batches and runs."""
    monkeypatch.setattr(plan, "_SHARD_ROWS", 20)
    monkeypatch.setattr(plan, "_PARTITION_CELLS", 64)
    monkeypatch.setattr(reading, "_BATCH_ROWS", 7)
    monkeypatch.setattr(runs, "_RUN_CHARACTERS", 2000)
    monkeypatch.setattr(runs, "_MOST_SEEN", 10)


@pytest.fixture
def source(write_source: Callable[..., Source]) -> Source:
    """400 rows in two files of many row groups."""
    source = write_source("many", rows=400, negatives=(3, 4), symmetric=True, cap=350)
    for file in source.files:
        pq.write_table(pq.read_table(file), file, row_group_size=15)
    return source


def rows_of(prepared: PreparedSource) -> dict[str, list[list[list[int]]]]:
    """The rows as tokens, which no order of the distinct texts changes."""
    return {
        split: [[prepared.tokens(text).tolist() if text >= 0 else [] for text in row] for row in rows]
        for split, rows in prepared.rows.items()
    }


def test_division_changes_no_row(
    request: pytest.FixtureRequest,
    source: Source,
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
) -> None:
    options = replace(options, validation_share=0.2)
    (whole,) = prepare([source], small_tokenizer, tmp_path / "whole", options)
    request.getfixturevalue("divided")
    made = plan.make_plan(source, tmp_path / "plan", options)
    assert len(made.shards) > 10 and made.partitions >= 32
    (parts,) = prepare([source], small_tokenizer, tmp_path / "parts", options)
    assert rows_of(parts) == rows_of(whole)
    assert parts.description["texts"] == whole.description["texts"]


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_executors_write_the_same_bytes(
    source: Source,
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    monkeypatch: pytest.MonkeyPatch,
    executor: str,
) -> None:
    if executor == "ray":
        pytest.importorskip("ray")
    # Few tasks: each starts a process of its own on Ray.
    monkeypatch.setattr(plan, "_SHARD_ROWS", 150)
    monkeypatch.setattr(plan, "_PARTITION_CELLS", 1024)
    options = replace(options, validation_share=0.2)
    prepare([source], small_tokenizer, tmp_path / "one", options, Executor(workers=1))
    prepare([source], small_tokenizer, tmp_path / "many", options, Executor(executor, workers=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@pytest.mark.parametrize("phase", ["read_shard", "tokenise_partition", "place_shard", "assemble"])
def test_a_run_that_was_stopped_goes_on(
    source: Source,
    divided: None,
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
) -> None:
    prepare([source], small_tokenizer, tmp_path / "whole", options)
    done: list[int] = []
    work = getattr(prepare_module, phase)

    def stops(*arguments: Any) -> None:
        if len(done) == 2 or phase == "assemble":
            raise KeyboardInterrupt
        work(*arguments)
        done.append(arguments[1])

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, phase, stops)
        with pytest.raises(KeyboardInterrupt):
            prepare([source], small_tokenizer, tmp_path / "stopped", options)
    assert not (tmp_path / "stopped" / "many").exists()

    def counts(*arguments: Any) -> None:
        done.append(arguments[1])
        work(*arguments)

    monkeypatch.setattr(prepare_module, phase, counts)
    prepare([source], small_tokenizer, tmp_path / "stopped", options)
    assert len(done) == len(set(done)), "a task that was done is done again"
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_part_of_other_work_is_not_used(
    source: Source,
    divided: None,
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stops(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "assemble", stops)
        with pytest.raises(KeyboardInterrupt):
            prepare([source], small_tokenizer, tmp_path / "begun", options)
    changed = replace(options, max_length=9)
    prepare([source], small_tokenizer, tmp_path / "begun", changed)
    prepare([source], small_tokenizer, tmp_path / "fresh", changed)
    assert contents(tmp_path / "begun") == contents(tmp_path / "fresh")


_KILLED = """
import sys
from pathlib import Path
from tests.training.data.preparation.test_preparation import divide
from training.common.executor import Executor
from training.data.manifest import load_manifest
from training.data.options import PreparationOptions
from training.data.preparation.pipeline import prepare
from training.models.tokenizer import load_tokenizer
divide()
folder = Path(sys.argv[1])
options = PreparationOptions(max_length=48, num_hard_negatives=(("retrieval", 2),))
sources, tokenizer = load_manifest(folder / "manifest.yaml"), load_tokenizer(str(folder / "tokenizer"))
print("ready", flush=True)
prepare(sources, tokenizer, folder / sys.argv[2], options, Executor(workers=1))
"""


def divide() -> None:
    """Small sizes, in a process of its own."""
    plan._SHARD_ROWS, plan._PARTITION_CELLS, reading._BATCH_ROWS = 20, 64, 7


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(
    source: Source, tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase
) -> None:
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    entry = f"files: [{', '.join(file.name for file in source.files)}], task_type: retrieval, instruction: Find."
    (tmp_path / "manifest.yaml").write_text(f"sources:\n  - {{name: many, {entry}}}\n")
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    subprocess.run([*command, "whole"], cwd=ROOT, check=True)
    killed, status = 0, None
    while status != 0:
        with subprocess.Popen([*command, "killed"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            # Imports take most of the time.
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.04 * (killed + 1))
            if process.poll() is None:
                process.kill()
                killed += 1
            status = process.wait()
    assert killed > 2
    # A lock that was held when its process was killed is an empty file that holds nobody up.
    left = {name: content for name, content in contents(tmp_path / "killed").items() if not name.endswith(".lock")}
    assert left == contents(tmp_path / "whole")


@pytest.mark.parametrize("batch_rows", [1, 7, 2048])
def test_two_texts_of_one_hash_are_refused(
    source: Source,
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    refuses: Refuses,
    monkeypatch: pytest.MonkeyPatch,
    batch_rows: int,
) -> None:
    def same_for_two(text: bytes, seed: int) -> bytes:
        digest = xxh3_128_digest(text, seed=seed)
        return b"collided" + digest[8:] if b"question 7 " in text or b"question 8 " in text else digest

    monkeypatch.setattr(reading, "_BATCH_ROWS", batch_rows)
    monkeypatch.setattr(reading, "xxh3_128_digest", same_for_two)
    with refuses("'many'", "two texts have one 64-bit hash", "another seed"):
        prepare([replace(source, cap=None)], small_tokenizer, tmp_path / "prepared", options)


# Bad rows


@pytest.fixture
def faulty(source: Source) -> Source:
    """The same source with seven bad rows of as many kinds, in both files."""
    first, second = (pq.read_table(file).to_pydict() for file in source.files)
    first["query"][3] = None
    first["passage"][17] = "  "
    first["negative_2"][40] = first["passage"][40]
    first["negative_1"][41] = first["negative_2"][41] = None
    second["passage"][0] = "x" * 1_000_001
    second["query"][199] = ""
    second["query"][5] = "marked"
    for file, columns in zip(source.files, (first, second), strict=True):
        pq.write_table(pa.table(columns), file, row_group_size=15)
    binary = pa.array([(text or "").encode() for text in second["query"]])
    broken = [b"\xff\xfe" if value.as_py() == b"marked" else value.as_py() for value in binary]
    query = pa.Array.from_buffers(pa.string(), len(broken), pa.array(broken).buffers())
    table = pq.read_table(source.files[1])
    pq.write_table(table.set_column(0, "query", query), source.files[1], row_group_size=15)
    return replace(source, cap=None)


def test_bad_rows_are_errors_unless_told(
    faulty: Source,
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    refuses: Refuses,
) -> None:
    with refuses(faulty.files[0], "row 3,", "column 'query' is null", "quarantine"):
        prepare([faulty], small_tokenizer, tmp_path / "prepared", options)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_rows_are_put_aside_with_the_reason(
    faulty: Source,
    tmp_path: Path,
    small_tokenizer: PreTrainedTokenizerBase,
    options: PreparationOptions,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    monkeypatch.setattr(plan, "_SHARD_ROWS", 150)
    options = replace(options, on_bad_row="quarantine")
    (prepared,) = prepare([faulty], small_tokenizer, tmp_path / "prepared", options, Executor(workers=workers))
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
    assert sum(prepared.description["quarantined"].values()) == len(aside)
    assert json.loads((prepared.folder / "source.json").read_text())["quarantined"]["is empty"] == 2


def test_bad_rows_of_a_source_without_any_are_none(
    source: Source, tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, options: PreparationOptions
) -> None:
    options = replace(options, on_bad_row="quarantine")
    (prepared,) = prepare([source], small_tokenizer, tmp_path / "prepared", options)
    assert prepared.description["quarantined"] == {}
    assert not (prepared.folder / QUARANTINE).exists()


def test_what_to_do_with_bad_rows_must_be_known(refuses: Refuses) -> None:
    with refuses("on_bad_row", "'ignore'", "error, quarantine"):
        PreparationOptions(on_bad_row="ignore")
