"""How the work is divided, where it runs and how often it is killed change no byte; what is finished is reused."""

from __future__ import annotations

import copy
import multiprocessing
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.training.data.prepared_rows import contents, times
from training.common.executor import Executor
from training.data.manifest import Source
from training.data.preparation import pipeline, plan, reading, writing
from training.data.preparation.pipeline import prepare
from training.data.preparation.plan import PreparationOptions
from training.data.prepared import TEXTS, PreparedSource
from training.models.loading import load_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[4]
PHASES = ["read_shard", "tokenise_partition", "place_shard", "assemble"]
OPTIONS = PreparationOptions(max_length=48, validation_share=0.0, num_hard_negatives=(("retrieval", 2),))


def divide(set_to=setattr):
    """Sizes at which a few hundred rows make many shards, partitions, batches and runs."""
    for module, name, size in [(plan, "_SHARD_ROWS", 20), (plan, "_PARTITION_CELLS", 64), (reading, "_BATCH_ROWS", 7)]:
        set_to(module, name, size)
    set_to(reading, "_RUN_CHARACTERS", 2000)


@pytest.fixture
def many(write_source):
    """400 rows in two files of many row groups."""
    source = write_source("many", rows=400, negatives=(3, 4), symmetric=True, cap=350)
    for file in source.files:
        pq.write_table(pq.read_table(file), file, row_group_size=15)
    return source


@pytest.fixture
def two(write_source):
    return [write_source("first", rows=40), write_source("second", rows=30, symmetric=True)]


def test_division_changes_no_row(many, run, decode, monkeypatch):
    whole = run(many, "whole", validation_share=0.2)
    divide(monkeypatch.setattr)
    made = plan.make_plan(many, Path("plan"), OPTIONS)
    assert len(made.shards) > 10 and made.partitions >= 32
    writing._tokenizer.cache_clear()
    parts = run(many, "parts", validation_share=0.2)
    assert writing._tokenizer.cache_info().misses == 1
    assert [decode(parts, split) for split in parts.rows] == [decode(whole, split) for split in whole.rows]
    assert parts.description["texts"] == whole.description["texts"]


@pytest.mark.parametrize(("row_group", "shards"), [(90, 18), (1000, 16)])
def test_a_large_row_group_is_read_in_parts(many, run, monkeypatch, row_group, shards):
    whole = run(many, "whole", keep_texts=True)
    divide(monkeypatch.setattr)
    for file in many.files:
        pq.write_table(pq.read_table(file), file, row_group_size=row_group)
    made = plan.make_plan(many, Path("plan"), OPTIONS).shards
    assert len(made) == shards and max(shard.skipped for shard in made) > 0
    assert sum(shard.rows for shard in made) == 400 and min(shard.rows for shard in made) >= 20
    parts = run(many, "parts", keep_texts=True)
    # The files have another fingerprint.
    assert {**parts.description, "fingerprint": ""} == {**whole.description, "fingerprint": ""}
    for name in whole.mapped_files:
        assert (parts.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_executors_write_the_same_bytes(many, run, tmp_path, monkeypatch, executor):
    if executor == "ray":
        pytest.importorskip("ray")
    # Few tasks: each starts a process on Ray.
    monkeypatch.setattr(plan, "_SHARD_ROWS", 150)
    monkeypatch.setattr(plan, "_PARTITION_CELLS", 1024)
    run(many, "one", Executor(workers=1), validation_share=0.2, keep_texts=True)
    run(many, "many", Executor(executor, workers=2), validation_share=0.2, keep_texts=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_was_stopped_goes_on(many, run, tmp_path, monkeypatch, phase):
    divide(monkeypatch.setattr)
    run(many, "whole", keep_texts=True)
    work, done = getattr(pipeline, phase), []

    def stops(*given):
        if len(done) == 2 or phase == "assemble":
            raise KeyboardInterrupt
        work(*given)
        done.append(given[1])

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, phase, stops)
        with pytest.raises(KeyboardInterrupt):
            run(many, keep_texts=True)
    assert not list((tmp_path / "prepared").glob("[!.]*"))
    # Work with other settings does not use a part of it.
    assert contents(run(many, max_length=9).folder) == contents(run(many, "fresh", max_length=9).folder)
    monkeypatch.setattr(pipeline, phase, lambda *given: (done.append(given[1]), work(*given)))
    run(many, keep_texts=True)
    assert len(done) == len(set(map(str, done))), "a task that was done is done again"
    (folder,) = (tmp_path / "prepared").glob("*-texts")
    assert contents(folder) == contents(tmp_path / "whole" / folder.name)


def prepare_many(folder, output, *files):
    """The command that is killed, in a process of its own."""
    divide()
    source, tokenizer = Source("many", list(map(Path, files)), "retrieval", "Find."), load_tokenizer(folder)
    print("ready", flush=True)  # noqa: T201
    prepare([source], tokenizer, Path(folder) / output, OPTIONS, Executor(workers=1))


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(many, tmp_path, small_tokenizer):
    small_tokenizer.save_pretrained(tmp_path)
    words = f"import sys; from {__name__} import prepare_many; prepare_many(*sys.argv[1:])"
    command = [sys.executable, "-c", words, str(tmp_path)]
    subprocess.run([*command, "whole", *many.files], cwd=ROOT, check=True)
    killed, status = 0, None
    while status != 0:
        words = [*command, "killed", *many.files]
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
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


def test_two_runs_write_the_same_bytes(two, tmp_path, small_tokenizer, options):
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


OTHER_OPTIONS = {"max_length": 20, "instructions": False, "document_instruction_share": 0.9, "validation_share": 0.5}
OTHER_OPTIONS |= {"num_hard_negatives": (("retrieval", 1),), "seed": 1, "text_forms": True, "keep_texts": True}
OTHER_KEYS = {"instruction": "Another.", "symmetric": True, "cap": 10, "task_type": "clustering", "languages": ["kor"]}


@pytest.mark.parametrize(
    ("keys", "changes", "more"),
    [
        *(({}, {key: value}, 2) for key, value in OTHER_OPTIONS.items()),
        *(({key: value}, {}, 1) for key, value in OTHER_KEYS.items()),
        # No prepared byte depends on these, nor on the negatives of another task type.
        ({"licence": "MIT", "category": "QA", "stages": ["one"], "instruction_from": "v1"}, {}, 0),
        ({}, {"num_hard_negatives": (("retrieval", 2), ("clustering", 4))}, 0),
    ],
)
def test_what_changed_is_prepared_again(two, run, tmp_path, keys, changes, more):
    first = run(two, "reused")
    before, written = contents(tmp_path / "reused"), [times(prepared.folder) for prepared in first]
    changed = [replace(two[0], **keys), two[1]]
    for folder in ("reused", "fresh"):
        run(changed, folder, **changes)
    # What a run with the old settings may be reading stays unchanged.
    assert contents(tmp_path / "reused") == before | contents(tmp_path / "fresh")
    assert len(list((tmp_path / "reused").glob("[!.]*"))) == 2 + more
    assert [times(prepared.folder) for prepared in first] == written


def test_a_changed_tokenizer_or_file_prepares_again(two, run, write_source, tmp_path):
    _, second = run(two)
    before = times(second.folder)
    prepare(two, train_tokenizer(iter(["another text entirely"] * 3), 300), tmp_path / "prepared", OPTIONS)
    assert len(list((tmp_path / "prepared").glob("[!.]*"))) == 4
    write_source("first", rows=41)
    longer, second = run(two)
    assert len(longer.rows["train"]) == 41 and times(second.folder) == before


def test_a_fault_keeps_what_was_prepared_before(two, run, tmp_path, write_source, refuses, small_tokenizer):
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
    assert {path.name for path in folder.glob("[!.]*")} < {each.folder.name for each in run(sources)}
    two[0].files[0].write_bytes(b"PAR1 no longer")
    with refuses(two[0].files[0], "not a readable parquet file"):
        run(sources)
    assert times(first) == before
    # A tokenizer without EOS is refused before anything is written.
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.eos_token = None
    with refuses("tokenizer", "EOS"):
        prepare(two, tokenizer, tmp_path / "none", PreparationOptions())
    assert not (tmp_path / "none").exists()


def test_what_is_missing_is_prepared_again_and_flipped_bytes_are_noticed(two, run, refuses):
    folder = run(two[0], keep_texts=True, validation_share=0.2).folder
    before = contents(folder)
    for name in ("source.json", "tokens.int32", "tokens.int32.xxh3", TEXTS):
        (folder / name).unlink()
        if not name.endswith(".xxh3"):
            (folder / name).write_bytes(before[name][:-1])
        run(two[0], keep_texts=True, validation_share=0.2)
        assert contents(folder) == before, name
    for name in ("tokens.int32", "validation.int32", "text_offsets.int64", "tokens.int32.xxh3"):
        content = bytearray(before[name])
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        with refuses(folder / name.removesuffix(".xxh3"), "is damaged", f"delete {folder}"):
            run(two[0], keep_texts=True, validation_share=0.2)
        (folder / name).write_bytes(before[name])


@pytest.mark.parametrize("changes", [{}, {"max_length": 9}])
def test_two_commands_prepare_at_once(two, run, tmp_path, monkeypatch, changes):
    for each in ({}, changes):
        finished = run(two[0], "fresh", **each)
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
    # Finished data may be on a read-only disk.
    monkeypatch.setattr(pipeline, "locked", None)
    assert run(two[0], "fresh", **changes).folder == finished.folder
