"""How the work is divided, where it runs and how often it is killed change no byte; what is finished is reused."""

from __future__ import annotations

import copy
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from tests.training.data.prepared_rows import Decode, Refuses, Run, Write, contents, times
from training.common.executor import Executor, SubmittedError
from training.common.outputs import locked, write_checksums
from training.data import storage
from training.data.manifest import Source
from training.data.preparation import pipeline, plan, reading
from training.data.preparation.pipeline import prepare
from training.data.preparation.plan import PreparationOptions
from training.data.prepared import TEXT_OFFSETS, TEXTS, PreparedSource
from training.models.loading import train_tokenizer

ROOT = Path(__file__).parents[4]
PHASES = ["read_shard", "tokenise_partition", "place_shard", "assemble"]


def divide() -> None:
    """Sizes at which a few hundred rows make many shards, partitions, batches and runs."""
    plan._SHARD_ROWS, plan._PARTITION_CELLS, reading._BATCH_ROWS, reading._RUN_CHARACTERS = 20, 64, 7, 2000


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in [(plan, "_SHARD_ROWS"), (plan, "_PARTITION_CELLS"), (reading, "_BATCH_ROWS")]:
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(reading, "_RUN_CHARACTERS", reading._RUN_CHARACTERS)
    divide()


@pytest.fixture
def many(write_source: Write) -> Source:
    """400 rows in two files of many row groups."""
    source = write_source("many", rows=400, negatives=(3, 4), symmetric=True, cap=350)
    for file in source.files:
        pq.write_table(pq.read_table(file), file, row_group_size=15)
    return source


@pytest.fixture
def two(write_source: Write) -> list[Source]:
    return [write_source("first", rows=40), write_source("second", rows=30, symmetric=True)]


def stop_in(monkeypatch: pytest.MonkeyPatch, phase: str, run: Callable[[], Any]) -> list[int]:
    """Runs until a phase has done two of its tasks; returns a list that is filled with all tasks that are done."""
    work, done = getattr(pipeline, phase), []

    def stops(*given: Any) -> None:
        if len(done) == 2 or phase == "assemble":
            raise KeyboardInterrupt
        work(*given)
        done.append(given[1])

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, phase, stops)
        with pytest.raises(KeyboardInterrupt):
            run()
    monkeypatch.setattr(pipeline, phase, lambda *given: (done.append(given[1]), work(*given)))
    return done


# Division and interruption


def test_division_changes_no_row(request: pytest.FixtureRequest, many: Source, run: Run, decode: Decode) -> None:
    whole = run(many, "whole", validation_share=0.2)
    request.getfixturevalue("divided")
    made = plan.make_plan(many, Path("plan"), PreparationOptions(num_hard_negatives=(("retrieval", 2),)))
    assert len(made.shards) > 10 and made.partitions >= 32
    parts = run(many, "parts", validation_share=0.2)
    assert [decode(parts, split) for split in parts.rows] == [decode(whole, split) for split in whole.rows]
    assert parts.description["texts"] == whole.description["texts"]


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.slow)])
@pytest.mark.parametrize("keep_texts", [False, True])
def test_executors_write_the_same_bytes(
    many: Source, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str, keep_texts: bool
) -> None:
    if executor == "ray":
        pytest.importorskip("ray")
    # Few tasks: each starts a process on Ray.
    monkeypatch.setattr(plan, "_SHARD_ROWS", 150)
    monkeypatch.setattr(plan, "_PARTITION_CELLS", 1024)
    run(many, "one", Executor(workers=1), validation_share=0.2, keep_texts=keep_texts)
    run(many, "many", Executor(executor, workers=2), validation_share=0.2, keep_texts=keep_texts)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("keep_texts", [False, True])
def test_a_run_that_was_stopped_goes_on(
    many: Source,
    divided: None,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    keep_texts: bool,
) -> None:
    run(many, "whole", keep_texts=keep_texts)
    done = stop_in(monkeypatch, phase, lambda: run(many, keep_texts=keep_texts))
    assert not list((tmp_path / "prepared").glob("[!.]*"))
    run(many, keep_texts=keep_texts)
    assert len(done) == len(set(map(str, done))), "a task that was done is done again"
    assert contents(tmp_path / "prepared") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("phase", "first", "then"),
    [
        ("assemble", {}, {"max_length": 9}),
        ("assemble", {}, {"keep_texts": True}),
        ("tokenise_partition", {"keep_texts": True}, {}),
    ],
)
def test_a_part_of_other_work_is_not_used(
    many: Source,
    divided: None,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    first: dict[str, Any],
    then: dict[str, Any],
) -> None:
    stop_in(monkeypatch, phase, lambda: run(many, **first))
    assert contents(run(many, **then).folder) == contents(run(many, "fresh", **then).folder)


_KILLED = """
import sys
from pathlib import Path
from tests.training.data.preparation.test_pipeline import divide
import training.common.executor, training.data.manifest, training.data.preparation.pipeline as pipeline
import training.data.preparation.plan as plan, training.models.tokenizer as tokenizer
divide()
folder = Path(sys.argv[1])
options = plan.PreparationOptions(max_length=48, num_hard_negatives=(("retrieval", 2),))
sources = training.data.manifest.load_manifest(folder / "manifest.yaml")
given = sources, tokenizer.load_tokenizer(str(folder / "tokenizer")), folder / sys.argv[2], options
print("ready", flush=True)
pipeline.prepare(*given, training.common.executor.Executor(workers=1))
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(
    many: Source, tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase
) -> None:
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    entry = f"files: [{', '.join(file.name for file in many.files)}], task_type: retrieval, instruction: Find."
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


# Reuse


def test_two_runs_write_the_same_bytes(
    two: list[Source], run: Run, tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, options: PreparationOptions
) -> None:
    options = replace(options, validation_share=0.2)
    two[0] = replace(two[0], cap=35)
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    reloaded = type(small_tokenizer).from_pretrained(tmp_path / "tokenizer")
    first = prepare(two, small_tokenizer, tmp_path / "one", options)
    before = {each.name: times(each.folder) for each in first}
    prepare(two[::-1], reloaded, tmp_path / "two", options)
    # Two sources of four arrays, their checksums and a description.
    assert len(contents(tmp_path / "one")) == 18
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    # A fast tokenizer keeps the padding and truncation of its last call, and writes them to its JSON.
    small_tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=7)
    for tokenizer, sources in ((small_tokenizer, two), (reloaded, two[::-1])):
        again = prepare(sources, tokenizer, str(tmp_path / "one"), options)
        assert [each.name for each in again] == [source.name for source in sources]
        assert {each.name: times(each.folder) for each in again} == before


@pytest.mark.parametrize(
    ("keys", "changes", "more"),
    [
        ({}, {"max_length": 20}, 2),
        ({}, {"instructions": False}, 2),
        ({}, {"document_instruction_share": 0.9}, 2),
        ({}, {"validation_share": 0.5}, 2),
        ({}, {"num_hard_negatives": (("retrieval", 1),)}, 2),
        ({}, {"seed": 1}, 2),
        ({}, {"text_forms": True}, 2),
        ({"instruction": "Another."}, {}, 1),
        ({"symmetric": True}, {}, 1),
        ({"cap": 10}, {}, 1),
        ({"task_type": "clustering"}, {}, 1),
        ({"languages": ["kor"]}, {}, 1),
        # No prepared byte depends on these, nor on the negatives of another task type.
        ({"licence": "MIT", "category": "QA"}, {}, 0),
        ({}, {"num_hard_negatives": (("retrieval", 2), ("clustering", 4))}, 0),
    ],
)
def test_what_changed_is_prepared_again(
    two: list[Source], run: Run, tmp_path: Path, keys: dict[str, Any], changes: dict[str, Any], more: int
) -> None:
    first = run(two, "reused")
    before, written = contents(tmp_path / "reused"), [times(prepared.folder) for prepared in first]
    changed = [replace(two[0], **keys), two[1]]
    for folder in ("reused", "fresh"):
        run(changed, folder, **changes)
    # What a run with the old settings may be reading stays unchanged.
    assert contents(tmp_path / "reused") == before | contents(tmp_path / "fresh")
    assert len(list((tmp_path / "reused").glob("[!.]*"))) == 2 + more
    assert [times(prepared.folder) for prepared in first] == written


def test_a_changed_tokenizer_prepares_again(two: list[Source], run: Run, tmp_path: Path) -> None:
    run(two, max_length=1024)
    options = PreparationOptions(validation_share=0.0, num_hard_negatives=(("retrieval", 2),))
    prepare(two, train_tokenizer(iter(["another text entirely"] * 3), 300), tmp_path / "prepared", options)
    assert len(list((tmp_path / "prepared").glob("[!.]*"))) == 4


def test_files_are_known_by_their_content(two: list[Source], write_source: Write, run: Run) -> None:
    path = two[0].files[0]
    pq.write_table(pq.read_table(path), path, compression="none", use_dictionary=False)
    first, second = run(two)
    stat, content, before = path.stat(), path.read_bytes(), times(second.folder)
    os.utime(path, ns=(1, 1))
    assert run(two)[0].folder == first.folder
    # Other content of the same size and time.
    changed = content.replace(b"first answer 7 ", b"first answer X ")
    assert changed != content
    path.write_bytes(changed)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run(two)[0].folder != first.folder
    write_source("first", rows=41)
    longer, second = run(two)
    assert len(longer.rows["train"]) == 41 and times(second.folder) == before


def test_texts_that_are_missing_are_prepared_and_those_that_nobody_needs_stay(two: list[Source], run: Run) -> None:
    source = two[0]
    run(source)
    kept = run(source, keep_texts=True)
    assert kept.has_texts and contents(kept.folder) == contents(run(source, "fresh", keep_texts=True).folder)
    before = times(run(source, "fresh", keep_texts=True).folder)
    for keep_texts in (False, True):
        found = run(source, "fresh", keep_texts=keep_texts)
        assert found.has_texts and times(found.folder) == before


# Faults


def test_a_fault_keeps_what_was_prepared_before(
    two: list[Source], run: Run, tmp_path: Path, write_source: Write, refuses: Refuses
) -> None:
    faulty = write_source("faulty", rows=3)
    good = pq.read_table(faulty.files[0])
    passages = [*good["passage"].to_pylist()[:2], None]
    pq.write_table(good.set_column(1, "passage", pa.array(passages)), faulty.files[0])
    sources, folder = [two[0], faulty, two[1]], tmp_path / "prepared"
    with refuses(faulty.files[0], "row 2,", "'passage'"):
        run(sources)
    (first,) = folder.glob("[!.]*")
    assert PreparedSource(first).name == "first"
    before = times(first)
    pq.write_table(good, faulty.files[0])
    prepared = run(sources)
    # What was begun of the faulty file is gone.
    assert {path.name for path in folder.iterdir()} - {".hashes"} == {each.folder.name for each in prepared}
    two[0].files[0].write_bytes(b"PAR1 no longer")
    with refuses(two[0].files[0], "not a readable parquet file"):
        run(sources)
    assert times(first) == before


def test_remains_of_an_interrupted_run_are_replaced(two: list[Source], run: Run, tmp_path: Path) -> None:
    first, second = (tmp_path / "prepared" / each.folder.name for each in run(two, "fresh"))
    # Killed at the same work, at that of other settings, and while it cleared up; a half folder.
    for begun in (first, first.with_name("first-0123456789abcdef"), first.with_name("second-0123456789abcdef-texts")):
        remains = begun.with_name(f".{begun.name}.partial")
        remains.mkdir(parents=True)
        (remains / "tokens.int32").write_bytes(b"12345")
    second.mkdir()
    (second / "tokens.int32").write_bytes(b"12345")
    run(two)
    assert contents(tmp_path / "prepared") == contents(tmp_path / "fresh")
    assert {path.name for path in (tmp_path / "prepared").iterdir()} - {".hashes"} == {first.name, second.name}


@pytest.mark.parametrize("name", ["source.json", "tokens.int32", "tokens.int32.xxh3", TEXTS, TEXT_OFFSETS])
def test_a_folder_that_lacks_something_is_prepared_again(two: list[Source], run: Run, name: str) -> None:
    folder = run(two[0], keep_texts=True).folder
    before = contents(folder)
    (folder / name).unlink()
    if not name.endswith(".xxh3"):
        (folder / name).write_bytes(before[name][:-1])
    run(two[0], keep_texts=True)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "name",
    [
        *("tokens.int32", "offsets.int64", "train.int32", "validation.int32", "texts.utf8", "text_offsets.int64"),
        "tokens.int32.xxh3",
    ],
)
def test_flipped_bytes_are_noticed(two: list[Source], run: Run, refuses: Refuses, name: str) -> None:
    prepared = run(two[0], keep_texts=True, validation_share=0.2)
    path = prepared.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with refuses(prepared.folder / name.removesuffix(".xxh3"), "is damaged", f"delete {prepared.folder}"):
        run(two[0], keep_texts=True, validation_share=0.2)


@pytest.mark.parametrize(("name", "dtype"), [("tokens.int32", "<i4"), ("offsets.int64", "<i8")])
def test_texts_that_are_not_whole_are_noticed(
    two: list[Source], run: Run, refuses: Refuses, name: str, dtype: str
) -> None:
    path = run(two[0]).folder / name
    values = np.fromfile(path, dtype)
    # No end token, or an empty text.
    values[:] = 0 if dtype == "<i4" else np.append(values[:2], [values[1], *values[3:]])
    values.tofile(path)
    # As if they had been written so.
    write_checksums(path)
    with refuses(path.parent, "text", "delete"):
        run(two[0])


def test_tokenizer_without_eos(
    two: list[Source], tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, refuses: Refuses
) -> None:
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.eos_token = None
    with refuses("tokenizer", "EOS"):
        prepare(two, tokenizer, tmp_path / "prepared", PreparationOptions())
    assert not (tmp_path / "prepared").exists()


# Several commands


@pytest.mark.parametrize("changes", [{}, {"max_length": 9}, {"keep_texts": True}])
def test_two_commands_prepare_at_once(
    two: list[Source], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    for each in ({}, changes):
        run(two[0], "fresh", **each)
    monkeypatch.setattr(plan, "_SHARD_ROWS", 20)
    # Slow enough for the commands to overlap, however busy the machine is.
    for name in PHASES:
        work = getattr(pipeline, name)
        monkeypatch.setattr(pipeline, name, lambda *given, work=work: (time.sleep(0.05), work(*given)))
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=run, args=(two[0],), kwargs=each) for each in ({}, changes)]
    for command in both:
        command.start()
    for command in both:
        command.join(60)
    assert [command.exitcode for command in both] == [0, 0]
    # The division into shards changes the order of nothing here.
    assert contents(tmp_path / "prepared") == contents(tmp_path / "fresh")
    assert not [path for path in (tmp_path / "prepared").glob(".*") if path.name != ".hashes"]


def test_finished_data_needs_no_lock(two: list[Source], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = run(two[0])

    def fails(*_: object, **__: object) -> None:
        raise AssertionError("the disk may be read-only")

    monkeypatch.setattr(pipeline, "locked", fails)
    monkeypatch.setattr(storage, "locked", fails)
    assert run(two[0]).folder == finished.folder


def test_work_of_a_live_command_is_not_cleared(two: list[Source], run: Run, tmp_path: Path) -> None:
    begun = tmp_path / "prepared" / "first-0123456789abcdef"
    work = begun.with_name(f".{begun.name}.partial")
    work.mkdir(parents=True)
    with locked(begun):
        run(two[0])
        assert work.exists()
    run(two[0])
    assert not work.exists()


def test_submitted_work_is_not_cleared(
    two: list[Source], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(*_: object) -> None:
        raise SubmittedError("submitted")

    with monkeypatch.context() as patch, pytest.raises(SubmittedError):
        patch.setattr(pipeline, "run_phases", submit)
        run(two[0])
    (work,) = (tmp_path / "prepared").glob(".*.partial")
    run(two[0], max_length=9)
    assert work.exists()
    run(two[0])
    assert not work.exists()
