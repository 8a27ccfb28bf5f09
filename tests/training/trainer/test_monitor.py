"""The training log as people read it, and the record of loss spikes and of values that are not finite."""

from __future__ import annotations

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from tests.training.recipes import error_of, write_single_stage
from training.common.run_folder import last_checkpoint
from training.run_stage import main
from training.trainer.monitor import NOTES, Console, StepWatch, evaluation_line, step_line
from training.trainer.step import Objective
from training.trainer.trainer import F2LLMTrainer

LOGS = {"loss": 3.25, "loss_in_batch": 2.0, "loss_hard": 1.25, "loss_source/qa": 3.25, "learning_rate": 4e-3}
ARGS = SimpleNamespace(disable_tqdm=False)


def state(step, last=1000, first=True):
    return TrainerState(global_step=step, max_steps=last, is_world_process_zero=first)


def test_lines(monkeypatch):
    monkeypatch.setattr("training.trainer.monitor.peak_memory", lambda: 3 * 2**29)
    line = step_line({**LOGS, "grad_norm": 2.5}, ["in_batch", "hard", "distillation"], state(25), 12345.6, 754.4)
    assert line == (
        "step    25/1,000  loss   3.2500  in-batch   2.0000  hard   1.2500  distillation        –  lr 4.00e-03  "
        "grad     2.5     12,346 tokens/s    1.50 GiB  0:12:34 left"
    )
    masked = step_line({**LOGS, "masked_candidates": 0.0425}, ["hard"], state(25), 12345.6, 754.4)
    assert "hard   1.2500  masked  4.25%  lr" in masked
    # Whatever the numbers are, the columns stay where they are.
    terms = ["in_batch", "hard", "distillation"]
    other = step_line({"loss": 123.4, "learning_rate": 0.0}, terms, state(1000), math.nan, 0)
    assert (other.index("lr"), len(other)) == (line.index("lr"), len(line))
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
    steps = [line for line in caplog.messages if line.startswith("step ") and "validation" not in line]
    assert [line.split()[1] for line in steps] == ["1/10", "5/10", "10/10"]
    assert all("in-batch" in line and "hard" in line and "tokens/s" in line for line in steps)
    assert sum("validation" in line for line in caplog.messages) >= 2
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


# The watch


@pytest.fixture
def watch(tmp_path, prepared_sources, small_tokenizer):
    return StepWatch(tmp_path, prepared_sources, small_tokenizer)


def _batch(source="qa"):
    """Rows 4, 7 and 1: texts 0 to 2 are the queries, 3 to 5 the passages, 6 to 8 the negatives."""
    query, positive, negatives = torch.arange(9).reshape(3, 3)
    return {"source": source, "rows": [4, 7, 1], "query": query, "positive": positive, "negatives": negatives[:, None]}


def _gradient(*norms):
    return torch.tensor([*norms, *[0.0] * (9 - len(norms))])


def _feed(watch, losses, source="qa"):
    for step, loss in enumerate(losses):
        watch.loss(step, _batch(source), loss, _gradient())


def _notes(folder):
    path = folder / NOTES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_spike_is_noted_with_its_source_and_rows(watch, tmp_path, prepared_sources, caplog):
    _feed(watch, [0.9, 1.1] * 20)
    # It is no spike of another source, which has had too few steps to know.
    _feed(watch, [9.0] * 19 + [90.0], "topics")
    assert not _notes(tmp_path)
    watch.loss(41, _batch(), 5.0, _gradient(0.5, 3.0, 1.0))
    (note,) = _notes(tmp_path)
    assert (note["kind"], note["step"], note["source"], note["rows"]) == ("loss spike", 41, "qa", [4, 7, 1])
    assert note["loss"] == 5.0 and note["mean"] == pytest.approx(1.0) and note["deviation"] == pytest.approx(0.1)
    assert [row["row"] for row in note["worst"]] == [7, 1, 4]
    assert [row["score"] for row in note["worst"]] == pytest.approx([3.0, 1.0, 0.5])
    # A query of the source "qa" under its instruction, and an answer of it.
    assert "Answer from qa." in note["worst"][0]["query"] and "qa question" in note["worst"][0]["query"]
    assert note["worst"][0]["passage"].startswith("qa answer")
    assert "loss spike at step 41 in source 'qa'" in caplog.text


@pytest.mark.parametrize("mean", [1.0, 1e-6, 300.0])
def test_falling_and_constant_losses_do_not_spike(watch, tmp_path, uninterrupted, mean):
    _feed(watch, [5.0 * 0.97**step for step in range(200)], "topics")
    _feed(watch, [mean] * 30 + [mean * (1 + 1e-6), mean * 1.05] + [mean] * 5)
    assert not _notes(tmp_path) and not _notes(uninterrupted)
    watch.loss(40, _batch(), mean * 1.5, _gradient())
    assert len(_notes(tmp_path)) == 1


def test_what_is_not_finite_is_the_worst_and_stays_json(watch, tmp_path):
    watch.record("non-finite gradient", 3, _batch(), _gradient(1.0, math.nan, 2.0), norm=math.inf)
    (note,) = _notes(tmp_path)
    assert note["norm"] == "inf"
    assert [(row["row"], row["score"]) for row in note["worst"]] == [(7, "inf"), (1, 2.0), (4, 1.0)]


def test_a_missing_negative_adds_nothing_to_its_row(watch, tmp_path):
    batch = {**_batch(), "negatives": torch.tensor([[-1], [7], [8]])}
    watch.record("loss spike", 3, batch, torch.tensor([*[0.0] * 8, 5.0]))
    (note,) = _notes(tmp_path)
    assert [(row["row"], row["score"]) for row in note["worst"]] == [(1, 5.0), (4, 0.0), (7, 0.0)]


def _poison(monkeypatch, at_step, what):
    """Makes the loss of a step NaN, or the gradient alone."""
    terms, calls = Objective.terms, []

    def poisoned(self, embeddings, *args, **kwargs):
        # Validation needs no gradient.
        if embeddings.requires_grad:
            calls.append(None)
        found = terms(self, embeddings, *args, **kwargs)
        if embeddings.requires_grad and len(calls) == at_step:
            if what == "loss":
                return {name: term * float("nan") for name, term in found.items()}
            for term in found.values():
                term.register_hook(lambda gradient: gradient * float("nan"))
        return found

    monkeypatch.setattr(Objective, "terms", poisoned)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_noted_and_not_taken(tmp_path, monkeypatch, capsys, resumes_exactly, what):
    recipe, run = write_single_stage(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        _poison(patch, 5, what)
        line = error_of([recipe], capsys, 1)
    assert line.startswith(f"stopped: the {what} became nan at step 5, on a batch of source 'tiny_retrieval'; ")
    assert f"last good checkpoint: {run / 'checkpoint-3'}" in line and str(run / NOTES) in line
    (note,) = _notes(run)
    assert (note["kind"], note["step"], note["source"]) == (f"non-finite {what}", 5, "tiny_retrieval")
    assert len(note["rows"]) > 5 == len(note["worst"]) and {row["row"] for row in note["worst"]} < set(note["rows"])
    assert all(row["query"].startswith("the ") for row in note["worst"])
    assert last_checkpoint(run) == run / "checkpoint-3"
    resumes_exactly(recipe)


def test_a_scaled_gradient_may_overflow(tmp_path, monkeypatch, capsys):
    get_grad_norm = F2LLMTrainer._get_grad_norm

    # The scaler of fp16 skips such a step and scales the next one less.
    def scaled(self, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(self.accelerator, "scaler", object())
            return get_grad_norm(self, *args, **kwargs)

    _poison(monkeypatch, 2, "gradient")
    monkeypatch.setattr(F2LLMTrainer, "_get_grad_norm", scaled)
    main([str(write_single_stage(tmp_path, max_steps=2, save_strategy="no", eval_strategy="no"))])
    assert "the gradient became" not in capsys.readouterr().err
    assert not (tmp_path / "run" / NOTES).exists()
