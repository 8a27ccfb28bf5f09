"""Several devices, and all processes of a launch, encode what one process does, for both commands that use them."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from functools import partial

import numpy as np
import pytest

pytest.importorskip("mteb")

import sentence_transformers.base.model as st
from sentence_transformers import SentenceTransformer

from tests.training.data.mining.mining_helpers import read_output, write_pairs
from tests.training.distributed_recipe import save_model
from tests.training.processes import launch
from training import evaluate, mine
from training.common.command import run_command
from training.common.errors import UserError
from training.data.manifest import write_manifest
from training.evaluation.records import load_evaluation
from training.models.devices import LAUNCHED, SharedEncoder, choose_devices, with_all_processes

_WORDS = "panda bear forest bamboo mountain river rain stone leaf light a of the"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config, tiny_tokenizer):
    """A model, pairs of texts of many lengths, and their manifest."""
    folder, drawn = tmp_path_factory.mktemp("shared"), random.Random(0)
    save_model(folder / "model", tiny_config, tiny_tokenizer)
    # The number keeps texts distinct; many have the same length.
    texts = [" ".join([*drawn.choices(_WORDS.split(), k=drawn.randint(1, 12)), str(n)]) for n in range(280)]
    source = write_pairs(folder, list(zip(texts[::2], texts[1::2], strict=True)))
    write_manifest(folder / "manifest.yaml", [{**vars(source), "files": source.files}])
    return folder


@pytest.fixture(scope="module")
def words(folder):
    """The words of each command but for its output."""
    mined = ["--manifest", folder / "manifest.yaml", "--top", "20", "--skip", "0", "--negatives", "3", "--keep-short"]
    return {
        evaluate: [folder / "model", "--local", folder / "pairs.parquet", "--dims", "32", "8"],
        mine: [*mined, "--model", folder / "model", "--max-score", "1.01", "--relative", "2"],
    }


def results(command, output):
    """All numbers and texts that a command has written, and the embeddings bit for bit."""
    if command is evaluate:
        found = load_evaluation(output)
        assert not found.failures and found.scores
        return [(score.key, score.value) for score in found.scores]
    vectors = [np.load(path)["vectors"].tobytes() for path in sorted(output.glob("embeddings/*/*.npz"))]
    refused = json.loads((output / "mining.json").read_text())["sources"]["pairs"]["refused"]
    assert len(vectors) == 2
    return vectors, refused, read_output(output)


@pytest.fixture(scope="module")
def single(words, tmp_path_factory):
    """The results of one process."""
    output = tmp_path_factory.mktemp("single")
    for command, given in words.items():
        assert command.main([*map(str, given), "--output", str(output / command.__name__)]) == 0
    return {command: results(command, output / command.__name__) for command in words}


@pytest.mark.parametrize(
    ("command", "method"),
    # Forked workers need not import everything again.
    [(evaluate, "fork"), (mine, "fork"), pytest.param(evaluate, "spawn", marks=pytest.mark.slow)],
)
def test_workers_of_a_pool_do_what_one_process_does_and_end(command, method, words, single, tmp_path, monkeypatch):
    monkeypatch.setattr(st.mp, "get_context", lambda _: multiprocessing.get_context(method))
    given = [*words[command], "--output", tmp_path / "out", "--devices", "cpu", "cpu"]
    assert command.main(list(map(str, given))) == 0
    assert results(command, tmp_path / "out") == single[command] and not multiprocessing.active_children()


@pytest.mark.parametrize("command", [evaluate, mine])
def test_processes_of_a_launch_do_what_one_does_and_only_the_first_writes(command, words, single, tmp_path):
    statuses, logs = launch(command.main, [*words[command], "--output", tmp_path / "out"], tmp_path)
    assert statuses == [0, 0], logs
    assert results(command, tmp_path / "out") == single[command] and logs[1] == ""


def test_an_error_ends_all_processes_with_one_line(words, folder, tmp_path):
    given = ["no/such-model" if each == folder / "model" else each for each in words[mine]]
    statuses, logs = launch(mine.main, [*given, "--output", tmp_path / "out"], tmp_path)
    assert statuses == [2, 2] and logs[0].startswith("error: no model") and logs[0].count("\n") == 1 and logs[1] == ""


@pytest.mark.parametrize(
    ("fault", "statuses", "line"),
    [("error", [2, 2], "error: only the first loads it"), ("death", [1, -signal.SIGKILL], "stopped: lost contact")],
)
def test_a_fault_of_another_process_ends_the_first(folder, tmp_path, fault, statuses, line):
    load = partial(_load, str(folder / "model"), fault)
    command = partial(with_all_processes, lambda: run_command(SharedEncoder(load, LAUNCHED).start))
    found, logs = launch(lambda _: command(), [], tmp_path)
    assert found == statuses and logs[0].startswith(line) and logs[0].count("\n") == 1 and logs[1] == ""


def _load(path, fault):
    if os.environ["RANK"] != "0" and fault == "death":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ["RANK"] != "0":
        raise UserError("only the first loads it")
    return SentenceTransformer(path, trust_remote_code=True, device="cpu")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--devices", "cpu", "cdua:0"], "--devices cdua:0: this machine has no such device; choose from cpu"),
        (["--devices", "cpu", "cuda:99"], "--devices cuda:99"),
        (["--devices", "cpu", "meta"], "--devices meta"),
        (["--devices", "cpu", "--executor", '{"workers": 2}'], "--devices: is for one worker"),
    ],
)
def test_unknown_devices_are_refused_in_one_line(words, tmp_path, capsys, more, message):
    for command in [evaluate, mine] if "--executor" not in more else [mine]:
        given = [*map(str, words[command]), "--output", str(tmp_path / "out"), *more]
        assert command.main(given) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_several_cuda_devices_are_the_default(monkeypatch, refuses):
    assert choose_devices(None) == () or choose_devices(None)[0] == "cuda:0"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert choose_devices(None) == ("cuda:0", "cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refuses("--devices", "each process of a launch"):
        choose_devices(["cpu"])


@pytest.mark.slow
def test_workers_end_when_the_command_is_killed(folder):
    def command(pids):
        load = partial(SentenceTransformer, str(folder / "model"), trust_remote_code=True, device="cpu")
        encoder = SharedEncoder(load, ["cpu", "cpu"])
        encoder.start()
        pids.send([process.pid for process in encoder._pool["processes"]])
        time.sleep(60)

    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=command, args=(sender,))
    process.start()
    workers = receiver.recv()
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(map(_is_alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
