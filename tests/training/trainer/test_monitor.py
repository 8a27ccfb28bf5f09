"""The training log as people read it: aligned lines, and nothing but lines in a file."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from tests.training.recipes import write_single_stage
from training.run_stage import main
from training.trainer.monitor import Console, evaluation_line, step_line

LOGS = {"loss": 3.25, "loss_in_batch": 2.0, "loss_hard": 1.25, "loss_source/qa": 3.25, "learning_rate": 4e-3}
ARGS = SimpleNamespace(disable_tqdm=False)


def state(step, last=1000, first=True):
    return TrainerState(global_step=step, max_steps=last, is_world_process_zero=first)


def test_step_line(monkeypatch):
    monkeypatch.setattr("training.trainer.monitor.peak_memory", lambda: 3 * 2**29)
    line = step_line({**LOGS, "grad_norm": 2.5}, ["in_batch", "hard", "distillation"], state(25), 12345.6, 754.4)
    assert line == (
        "step    25/1,000  loss   3.2500  in-batch   2.0000  hard   1.2500  distillation        –  lr 4.00e-03  "
        "grad     2.5     12,346 tokens/s    1.50 GiB  0:12:34 left"
    )
    # Whatever the numbers are, the columns stay where they are.
    terms = ["in_batch", "hard", "distillation"]
    other = step_line({"loss": 123.4, "learning_rate": 0.0}, terms, state(1000), math.nan, 0)
    assert (other.index("lr"), len(other)) == (line.index("lr"), len(line))


def test_evaluation_line():
    logs = {"eval_retrieval": 0.5, "eval_loss": 0.75, "eval_source/qa": 0.5, "eval_pairs_accuracy": 0.25}
    line = evaluation_line({**logs, "eval_pairs_accuracy_dim8": 0.1, "epoch": 1.0}, state(25))
    assert line == "step    25/1,000  validation  loss   0.7500  retrieval   0.5000  pairs accuracy   0.2500"


def test_speed_counts_the_steps_and_their_loading_but_no_evaluation(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr("training.trainer.monitor.time.perf_counter", lambda: now[0])
    console = Console(["hard"])
    caplog.set_level(logging.INFO)
    with console:
        console.on_train_begin(ARGS, state(10), None)
        for step in (11, 12):
            now[0] += 2
            console.count(500)
            console.on_step_end(ARGS, state(step), None)
            # An evaluation and a checkpoint.
            now[0] += 10
            console.on_evaluate(ARGS, state(step), None)
        console.on_log(ARGS, state(12), None, LOGS)
        console.on_log(ARGS, state(12), None, {"train_runtime": 3.0, "train_loss": 1.0})
        console.on_log(ARGS, state(12, first=False), None, LOGS)
    (line,) = caplog.messages
    # 1,000 tokens in 4 s; 988 steps of the 12 s that each took.
    assert " 250 tokens/s" in line and "3:17:36 left" in line


def test_a_training_logs_lines_and_no_dicts(tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO)
    assert main([str(write_single_stage(tmp_path, disable_tqdm=None))]) == 0
    steps = [line for line in caplog.messages if line.startswith("step ")]
    logged = [line.split()[1] for line in steps if "loss" in line and "validation" not in line]
    assert logged == ["1/10", "5/10", "10/10"]
    assert all("in-batch" in line and "hard" in line and "tokens/s" in line for line in steps if "lr" in line)
    assert sum("validation" in line for line in steps) == 2
    written = capsys.readouterr()
    assert "{'loss'" not in written.out + written.err and "\r" not in written.out + written.err


@pytest.mark.parametrize(
    ("term", "tty", "bar"), [("xterm", True, True), ("dumb", True, False), ("xterm", False, False)]
)
def test_a_bar_on_a_terminal_that_can_show_one(monkeypatch, capsys, term, tty, bar):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("sys.stderr.isatty", lambda: tty, raising=False)
    console = Console(["hard"])
    with console:
        console.on_train_begin(ARGS, state(0, 3), None)
        for step in (1, 2, 3):
            console.on_step_end(ARGS, state(step, 3), None)
    assert ("\r" in capsys.readouterr().err) is bar
