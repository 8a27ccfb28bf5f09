"""Ends of a training before its last step: signals, and early stopping; a resumed run ends in the same weights."""

from __future__ import annotations

import logging
import shutil
import signal

import pytest

from tests.training.evaluation.watched_recipe import history, write_watched
from tests.training.processes import SignalAt, start
from tests.training.recipes import KilledError, error_of, grow_loss, killed, state_of, write_recipe, write_single_stage
from training.common.run_folder import STAGING, last_checkpoint, numbered_checkpoints, step_of
from training.run_stage import main
from training.trainer.trainer import F2LLMTrainer

BOTH = [signal.SIGTERM, signal.SIGINT]


def steps(run):
    return [step_of(path) for path in numbered_checkpoints(run)]


EPOCH = {"save_strategy": "epoch", "save_steps": None}


@pytest.mark.parametrize(
    ("keys", "signals", "step"),
    [
        # While the step after the fourth is computed; checkpoints are due after every third.
        ({}, [SignalAt("step", 4, signal.SIGTERM)], 5),
        ({}, [SignalAt("step", 4, signal.SIGINT)], 5),
        # A termination may arrive twice.
        ({}, [SignalAt("step", 4, signal.SIGTERM)] * 2, 5),
        # While a checkpoint is written.
        ({}, [SignalAt("checkpoint", 1, signal.SIGTERM)], 7),
        # It is not taken for the end of an epoch, even where it falls on one.
        (EPOCH, [SignalAt("step", 2, signal.SIGTERM)], 3),
        (EPOCH, [SignalAt("step", 4, signal.SIGTERM)], 5),
    ],
)
def test_a_signal_lets_the_step_finish_and_saves_it(tmp_path, resumes_exactly, keys, signals, step):
    recipe, run, number = write_single_stage(tmp_path, **keys), tmp_path / "run", signals[0].number
    stopped = start([recipe], tmp_path, signals)
    assert stopped.wait() == 128 + number
    assert last_checkpoint(run) == run / f"checkpoint-{step}" and not (run / STAGING).exists()
    assert stopped.line() == (
        f"stopped: {signal.Signals(number).name} at step {step} of 10; saved {run / f'checkpoint-{step}'}. "
        "To go on, run the same command with --resume"
    )
    assert not (run / "model").exists()
    # Nobody waits for an evaluation before the end.
    assert step > 5 or not [line for line in state_of(run)["log_history"] if "eval_loss" in line]
    resumes_exactly(recipe)


@pytest.mark.parametrize("number", BOTH)
def test_loader_workers_outlive_a_signal_to_the_whole_group(tmp_path, resumes_exactly, number):
    words = [write_single_stage(tmp_path), "--dataloader_num_workers", "2"]
    stopped = start(words, tmp_path, [SignalAt("step", 6, number, group=True)])
    assert stopped.wait() == 128 + number
    assert "at step 7 of 10" in stopped.line()
    resumes_exactly(*map(str, words))


def test_a_signal_too_late_for_its_stage_stops_before_the_next(tmp_path):
    stopped = start([write_recipe(tmp_path)], tmp_path, [SignalAt("step", 9, signal.SIGTERM)])
    assert stopped.wait() == 143 and "after the last step" in stopped.line()
    assert (tmp_path / "run/stage1/model/config.json").exists() and not (tmp_path / "run/stage2").exists()


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("signals", [[("setup", 0)], [("finish", 0)], [("step", 4), ("step", 4)]])
def test_a_signal_outside_of_the_training_or_a_second_interrupt_ends_at_once(
    tmp_path, resumes_exactly, signals, number
):
    recipe = write_single_stage(tmp_path)
    *first, last = [SignalAt(*at, number) for at in signals]
    # Of two signals, the second is an interrupt: a termination that is passed on may arrive twice.
    last = last._replace(number=signal.SIGINT) if first else last
    stopped = start([recipe], tmp_path, [*first, last])
    assert stopped.wait() == 128 + last.number
    assert stopped.line().endswith(": ended at once. To go on, run the same command with --resume")
    if number == signal.SIGTERM:
        resumes_exactly(recipe)


@pytest.mark.parametrize(("place", "nth"), [("step", 9), ("evaluation", 1)])
def test_a_signal_in_the_last_step_or_after_it_lets_the_run_finish(tmp_path, check_same_weights, place, nth):
    finished = start([write_single_stage(tmp_path)], tmp_path, [SignalAt(place, nth, signal.SIGTERM)])
    assert finished.wait() == 0, finished.output
    check_same_weights(tmp_path / "run")


@pytest.fixture(scope="module", params=["steps", "epoch"])
def choosing(request, tmp_path_factory):
    """Keys of a stage that keeps the best model, that of the first evaluation, and the folder of its whole run."""
    keys = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_steps": 3}
    keys |= dict.fromkeys(("eval_strategy", "save_strategy"), request.param)
    folder = tmp_path_factory.mktemp(f"choosing-{request.param}")
    with pytest.MonkeyPatch.context() as patch:
        grow_loss(patch)
        assert main([str(write_single_stage(folder, **keys))]) == 0
    return keys, folder / "run"


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_checkpoint_outlives_interruptions(tmp_path, monkeypatch, choosing, check_same_weights, limit):
    grow_loss(monkeypatch)
    keys, expected = choosing
    first = 3 if keys["save_strategy"] == "steps" else 5
    words = [write_single_stage(tmp_path, **keys, save_total_limit=limit)]
    run = tmp_path / "run"
    # First at a step whose evaluation decides, then in between: the newest checkpoint must outlive the best one's rule.
    for resume, step, steps_before in (([], first, first - 1), (["--resume"], 8, 7 - first)):
        stopped = start([*words, *resume], tmp_path, [SignalAt("step", steps_before, signal.SIGTERM)])
        assert stopped.wait() == 143
        assert f"saved {run / f'checkpoint-{step}'}." in stopped.line()
        assert last_checkpoint(run) == run / f"checkpoint-{step}"
        assert state_of(run)["best_model_checkpoint"] == str(run / f"checkpoint-{first}")
    assert main([str(words[0]), "--resume"]) == 0
    check_same_weights(run, expected)
    check_same_weights(run, model=run / f"checkpoint-{first}")


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "pairs_accuracy"}
# No change of an accuracy is greater than 1: the first evaluation is the best that counts.
STOPPED = {**BEST, "early_stopping_patience": 2, "early_stopping_threshold": 1.0}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    assert main([str(write_watched(folder, **STOPPED))]) == 0
    return folder


def test_the_stage_ends_in_its_best_checkpoint(tmp_path, check_same_weights):
    # A learning rate that grows until the model gets worse: it is not the last one that is the best.
    grows = {"learning_rate": 0.02, "warmup_steps": 10}
    keys = {**grows, "save_steps": 10, "save_total_limit": 1}
    assert main([str(write_watched(tmp_path, **BEST, **keys))]) == 0
    run = tmp_path / "run"
    found = {step: metrics["eval_pairs_accuracy"] for step, metrics in history(run).items()}
    wanted = max(found, key=lambda step: found[step])
    # No checkpoint was due before the end: the best one is written when it is found.
    assert list(found) == [2, 4, 6, 8, 10] and wanted < 10
    best = run / f"checkpoint-{wanted}"
    assert state_of(run)["best_model_checkpoint"] == str(best)
    assert steps(run) == sorted({wanted, 10})
    check_same_weights(run, model=best)


def test_one_whose_model_was_not_written_trains_no_further(stopped, tmp_path, monkeypatch, check_same_weights, caplog):
    # Paths of checkpoints are absolute in their states, so the run stays where it is.
    run = stopped / "run"
    shutil.move(run / "model", tmp_path / "model")
    monkeypatch.setattr(F2LLMTrainer, "training_step", None)
    with caplog.at_level(logging.INFO):
        assert main([str(stopped / "single.yaml"), "--resume"]) == 0
    assert steps(run) == [2, 4, 6] and "early stopping at step 6 of 10" in caplog.text
    check_same_weights(run, tmp_path)


@pytest.mark.parametrize(("at_step", "on_start"), [(3, False), (5, False), (5, True)])
def test_what_was_counted_outlives_a_kill(stopped, tmp_path, check_same_weights, at_step, on_start):
    # The evaluation with which a resumed run may start is not counted again.
    recipe = write_watched(tmp_path, **STOPPED, eval_on_start=on_start)
    killed(recipe, at_step)
    assert steps(tmp_path / "run") == list(range(2, at_step, 2))
    assert main([str(recipe), "--resume"]) == 0
    assert steps(tmp_path / "run") == [2, 4, 6]
    check_same_weights(tmp_path / "run", stopped / "run")


@pytest.mark.parametrize("step", [4, 5])
def test_every_evaluation_is_counted_where_a_signal_ends_the_training(tmp_path, check_same_weights, step):
    # Epochs of five steps: the third evaluation is that of step 15.
    keys = {**STOPPED, "load_best_model_at_end": False, "eval_strategy": "epoch", "num_train_epochs": 4}
    whole = write_watched(tmp_path / "whole", **keys, save_steps=5)
    assert main([str(whole)]) == 0 and steps(tmp_path / "whole/run") == [5, 10, 15]
    recipe = write_watched(tmp_path, **keys, save_steps=5)
    assert start([recipe], tmp_path, [SignalAt("step", step - 1, signal.SIGTERM)]).wait() == 143
    assert steps(tmp_path / "run") == [step]
    assert main([str(recipe), "--resume"]) == 0
    check_same_weights(tmp_path / "run", tmp_path / "whole/run")


def test_a_resumed_run_may_be_given_patience_or_more_of_it(tmp_path, monkeypatch):
    recipe = write_watched(tmp_path, **BEST)
    killed(recipe, 5)
    words = [str(recipe), "--resume", "--early_stopping_threshold", "1"]

    def die(*args):
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr("training.stages.stage._save", die)
        main([*words, "--early_stopping_patience", "1"])
    assert steps(tmp_path / "run") == [2, 4, 6]
    assert main([*words, "--early_stopping_patience", "2"]) == 0
    assert steps(tmp_path / "run") == [2, 4, 6, 8]


def test_a_metric_that_nothing_measures(tmp_path, capsys):
    error = error_of([write_watched(tmp_path, **{**BEST, "metric_for_best_model": "eval_pairs_recall"})], capsys)
    assert "measure retrieval, loss, pairs_accuracy, pairs_ndcg_at_10, pairs_accuracy_dim16" in error
    assert "not 'pairs_recall'" in error
