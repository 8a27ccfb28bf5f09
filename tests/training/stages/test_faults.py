"""Kills, full disks, lost data, dead workers, two commands at once: a resumed run ends in the same weights."""

from __future__ import annotations

import os
import random
import shutil
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer

from tests.training.processes import ROOT, SignalAt, run_bounded, start, torchrun
from tests.training.recipes import at_step, error_of, write_single_stage
from training.common.outputs import locked
from training.common.run_folder import STAGING, last_checkpoint, step_of
from training.run_stage import main
from training.stages.continuation import read_changes

# Config, tokenizer and random states fit in; weights (109 kB) do not, or the optimizer's state (234 kB) does not.
NO_ROOM_FOR_WEIGHTS, NO_ROOM_FOR_OPTIMIZER = 50_000, 150_000
KILL = 9


def _assert_whole(checkpoint):
    assert checkpoint is not None
    assert SentenceTransformer(str(checkpoint), device="cpu").encode("a text").shape == (32,)
    for name in ("optimizer.pt", "scheduler.pt"):
        assert torch.load(checkpoint / name, weights_only=True)


@pytest.fixture
def stopped(tmp_path):
    """The recipe of a run that was killed in its fifth step, with one checkpoint, of its third."""
    recipe = write_single_stage(tmp_path)
    assert start([recipe], tmp_path, [SignalAt("step", 4, KILL)]).wait() == -KILL
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-3"
    return recipe


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_while_a_checkpoint_is_written(tmp_path, resumes_exactly, workers):
    run = tmp_path / "run"
    words = [write_single_stage(tmp_path), "--dataloader_num_workers", workers]
    training = start(words, tmp_path)
    assert training.wait_for(lambda: (run / "checkpoint-3").exists() and (run / STAGING / "checkpoint-6").exists())
    training.kill()
    assert (run / STAGING).exists() and not (run / "model").exists()
    _assert_whole(last_checkpoint(run))
    resumes_exactly(*map(str, words))
    assert not (run / STAGING).exists()


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path, check_same_weights, resumes_exactly):
    recipe, run, draws = write_single_stage(tmp_path, save_steps=1), tmp_path / "run", random.Random(7)

    def step():
        checkpoint = last_checkpoint(run)
        return step_of(checkpoint) if checkpoint else 0

    kills = saving = runs = 0
    while kills < 20:
        # How far an attempt gets is up to chance: up to six checkpoints further, and then some milliseconds.
        workers, saves, delay = runs % 2 * 2, draws.randrange(6), draws.uniform(0, 0.3)
        goal = step() + saves
        training = start([recipe, "--resume", "--dataloader_num_workers", workers], tmp_path)
        runs += 1
        if not training.wait_for(lambda goal=goal: step() >= goal):
            assert training.wait() == 0, training.output
        else:
            time.sleep(delay)
            training.kill()
            kills += 1
            saving += (run / STAGING).exists()
            if last_checkpoint(run) is not None:
                _assert_whole(last_checkpoint(run))
        if (run / "model").exists():
            check_same_weights(run)
            shutil.rmtree(run)
    resumes_exactly(recipe)
    assert saving, "no kill fell into the writing of a checkpoint"


@pytest.mark.parametrize(
    ("at", "room", "name"),
    [
        (("step", 4), NO_ROOM_FOR_WEIGHTS, "checkpoint-6: the checkpoint"),
        (("step", 4), NO_ROOM_FOR_OPTIMIZER, "checkpoint-6: the checkpoint"),
        (("finish", 0), NO_ROOM_FOR_WEIGHTS, "model: the finished model"),
    ],
)
def test_a_full_disk_stops_with_the_last_checkpoint_whole(tmp_path, resumes_exactly, at, room, name):
    recipe, run = write_single_stage(tmp_path), tmp_path / "run"
    assert start([recipe], tmp_path, [SignalAt(*at, KILL)]).wait() == -KILL
    last = last_checkpoint(run)
    full = start([recipe, "--resume"], tmp_path, file_size=room)
    assert full.wait() == 1, full.output
    assert full.line().startswith(f"stopped: {run}/{name} could not be written (")
    assert str(last) in full.line() and "--resume" in full.line()
    assert not (run / name.split(":")[0]).exists() and not list(run.glob(".*"))
    _assert_whole(last)
    resumes_exactly(recipe)


@pytest.mark.parametrize("room", [300, 5_000, None])
def test_a_full_disk_or_a_kill_before_the_first_step(tmp_path, resumes_exactly, room):
    recipe = write_single_stage(tmp_path)
    if room is None:
        assert start([recipe], tmp_path, [SignalAt("setup", 0, KILL)]).wait() == -KILL
    else:
        full = start([recipe], tmp_path, file_size=room)
        assert full.wait() == 2, full.output
        assert full.line().startswith(f"error: {tmp_path / 'run/tokenizer'}: cannot be written (")
    resumes_exactly(recipe)


def test_an_output_folder_that_cannot_be_made_or_vanishes(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    recipe = write_single_stage(tmp_path, output_dir=str(tmp_path / "file/run"))
    assert "cannot be written" in error_of([recipe], capsys)
    recipe = write_single_stage(tmp_path)
    at_step(monkeypatch, 4, lambda: shutil.rmtree(tmp_path / "run"))
    line = error_of([recipe], capsys, 1)
    assert line.startswith("stopped: ") and "checkpoint-6: the checkpoint could not be written" in line
    assert "last good checkpoint: none yet" in line and not (tmp_path / "run").exists()


def test_a_loader_worker_that_dies_stops_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.trainer.trainer.outlive_signals", lambda worker: os._exit(7))
    line = error_of([write_single_stage(tmp_path, dataloader_num_workers=2)], capsys, 1)
    assert line.startswith("stopped: ") and "DataLoader worker" in line and "--resume" in line


def test_truncated_prepared_data_is_prepared_again(tmp_path, stopped, resumes_exactly):
    (path,) = tmp_path.glob("run/prepared/tiny_retrieval-*/tokens.int32")
    path.write_bytes(path.read_bytes()[:-4])
    resumes_exactly(stopped)


def test_changed_data_is_refused_unless_accepted(tmp_path, stopped, capsys, caplog):
    source = tmp_path / "data/retrieval.parquet"
    table = pq.read_table(source).to_pydict()
    table["passage"][7] = "another passage"
    pq.write_table(pa.table(table), source)
    line = error_of([stopped, "--resume"], capsys)
    assert "the data changed since the run started (tiny_retrieval)" in line and "--accept-changes" in line
    _assert_whole(last_checkpoint(tmp_path / "run"))
    assert main([str(stopped), "--resume", "--accept-changes"]) == 0
    assert "the data changed since the run started (tiny_retrieval); going on regardless" in caplog.text
    (note,) = read_changes(tmp_path / "run")
    assert [list(each) for each in note["keys"]["data"]] == [["tiny_retrieval"]] * 2


def test_checkpoints_without_the_optimizer_are_neither_resumed_from_nor_replaced(tmp_path, stopped, capsys):
    (tmp_path / "run/checkpoint-3/scheduler.pt").unlink()
    for words in ([], ["--resume"]):
        line = error_of([stopped, *words], capsys)
        assert "none of the checkpoints can be resumed from" in line and "run/checkpoint-3'" in line
    assert (tmp_path / "run/checkpoint-3").exists() and not (tmp_path / "run/model").exists()


def test_too_little_memory_names_the_key_and_the_checkpoint(tmp_path, capsys, monkeypatch):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    at_step(monkeypatch, 4, full)
    line = error_of([write_single_stage(tmp_path)], capsys, 1)
    assert line.startswith("stopped: CUDA out of memory.")
    assert f"last good checkpoint: {tmp_path / 'run/checkpoint-3'}." in line
    assert "Lower 'max_tokens_per_forward', now without limit, and run the same command with --resume" in line


@pytest.mark.slow
def test_all_processes_of_a_launch_are_refused(tmp_path):
    recipe = write_single_stage(tmp_path)
    with locked(tmp_path / "run/model"):
        ended = run_bounded(torchrun(2, ROOT / "training/run_stage.py", recipe), seconds=120)
    assert ended.returncode
    said = [line for line in ended.stdout.splitlines() if "another process trains there" in line]
    assert sorted(line.split("error")[0] for line in said) == ["", "[process 1] "]
