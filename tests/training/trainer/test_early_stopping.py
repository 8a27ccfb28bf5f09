"""The best checkpoint and early stopping by pairs: what the stage ends in, and that a resumed run ends in the same."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.evaluation.watched_recipe import history, write_watched
from tests.training.forked import SignalAt, start
from training.run_stage import main
from training.trainer.trainer import F2LLMTrainer

BEST = {"load_best_model_at_end": True, "metric_for_best_model": "pairs_accuracy"}
# No change of an accuracy is greater than 1: the first evaluation is the best that counts.
STOPPED = {**BEST, "early_stopping_patience": 2, "early_stopping_threshold": 1.0}
SameWeights = Callable[..., None]


class _KilledError(BaseException):
    """Ends a training the way a killed process ends it."""


def killed(recipe: Path, monkeypatch: pytest.MonkeyPatch, at_step: int) -> None:
    training_step = F2LLMTrainer.training_step

    def dying(self: F2LLMTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == at_step:
            raise _KilledError
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(_KilledError):
        patch.setattr(F2LLMTrainer, "training_step", dying)
        main([str(recipe)])


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))


def best_checkpoint(run: Path) -> Path:
    return Path(
        json.loads((run / f"checkpoint-{steps(run)[-1]}/trainer_state.json").read_text())["best_model_checkpoint"]
    )


def as_run(checkpoint: Path, folder: Path) -> Path:
    """A folder whose finished model is a checkpoint."""
    folder.mkdir()
    (folder / "model").symlink_to(checkpoint)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    assert main([str(write_watched(folder, **STOPPED))]) == 0
    return folder


def test_the_stage_ends_in_its_best_checkpoint(tmp_path: Path, check_same_weights: SameWeights) -> None:
    # A learning rate that grows until the model gets worse: it is not the last one that is the best.
    grows = {"learning_rate": 0.02, "warmup_steps": 10}
    keys = {**grows, "save_steps": 10, "save_total_limit": 1}
    assert main([str(write_watched(tmp_path, **BEST, **keys))]) == 0
    run = tmp_path / "run"
    found = {step: metrics["eval_pairs_accuracy"] for step, metrics in history(run).items()}
    wanted = max(found, key=lambda step: found[step])
    # No checkpoint was due before the end: the best one is written when it is found.
    assert list(found) == [2, 4, 6, 8, 10] and wanted < 10
    assert best_checkpoint(run) == run / f"checkpoint-{wanted}"
    assert steps(run) == sorted({wanted, 10})
    check_same_weights(run, as_run(best_checkpoint(run), tmp_path / "best"))


def test_the_log_says_why_the_training_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert main([str(write_watched(tmp_path, **STOPPED))]) == 0
    assert steps(tmp_path / "run") == [2, 4, 6] and list(history(tmp_path / "run")) == [2, 4, 6]
    (line,) = [line for line in caplog.messages if "early stopping" in line]
    assert line.startswith("early stopping at step 6 of 10: 2 evaluations in a row did not improve pairs_accuracy")


def test_a_stage_that_was_stopped_early_is_finished(stopped: Path, check_same_weights: SameWeights) -> None:
    run, recipe = stopped / "run", str(stopped / "single.yaml")
    assert (run / "model/config.json").exists() and (run / "evaluation.json").exists()
    # The finished model is evaluated again.
    again = {run / "evaluation.json", run / "report", *(run / "report").iterdir()}
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path not in again}
    assert main([recipe, "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files
    check_same_weights(run, as_run(best_checkpoint(run), stopped / "best"))


def test_one_whose_model_was_not_written_trains_no_further(
    stopped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    check_same_weights: SameWeights,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Paths of checkpoints are absolute in their states, so the run stays where it is.
    run = stopped / "run"
    shutil.move(run / "model", tmp_path / "model")
    monkeypatch.setattr(F2LLMTrainer, "training_step", None)
    with caplog.at_level(logging.INFO):
        assert main([str(stopped / "single.yaml"), "--resume"]) == 0
    assert steps(run) == [2, 4, 6] and "early stopping at step 6 of 10" in caplog.text
    check_same_weights(run, tmp_path)


@pytest.mark.parametrize("at_step", [3, 5])
def test_what_was_counted_outlives_a_kill(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check_same_weights: SameWeights, at_step: int
) -> None:
    recipe = write_watched(tmp_path, **STOPPED)
    killed(recipe, monkeypatch, at_step)
    assert steps(tmp_path / "run") == list(range(2, at_step, 2))
    assert main([str(recipe), "--resume"]) == 0
    assert steps(tmp_path / "run") == [2, 4, 6]
    check_same_weights(tmp_path / "run", stopped / "run")


@pytest.mark.parametrize("step", [4, 5])
def test_every_evaluation_is_counted_where_a_signal_ends_the_training(
    tmp_path: Path, check_same_weights: SameWeights, step: int
) -> None:
    # Epochs of five steps: the third evaluation is that of step 15.
    keys = {**STOPPED, "load_best_model_at_end": False, "eval_strategy": "epoch", "num_train_epochs": 4}
    whole = write_watched(tmp_path / "whole", **keys, save_steps=5)
    assert main([str(whole)]) == 0 and steps(tmp_path / "whole/run") == [5, 10, 15]
    recipe = write_watched(tmp_path, **keys, save_steps=5)
    assert start([recipe], tmp_path, [SignalAt("step", step - 1, signal.SIGTERM)]).wait() == 143
    assert steps(tmp_path / "run") == [step]
    assert main([str(recipe), "--resume"]) == 0
    check_same_weights(tmp_path / "run", tmp_path / "whole/run")


def test_a_resumed_run_may_be_more_or_newly_patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_watched(tmp_path, **BEST)
    killed(recipe, monkeypatch, 5)
    words = [str(recipe), "--resume", "--early_stopping_threshold", "1"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(_KilledError):
        # The model cannot be written.
        patch.setattr(F2LLMTrainer, "save_model", _refuse_final(F2LLMTrainer.save_model))
        main([*words, "--early_stopping_patience", "1"])
    assert steps(tmp_path / "run") == [2, 4, 6]
    assert main([*words, "--early_stopping_patience", "2"]) == 0
    assert steps(tmp_path / "run") == [2, 4, 6, 8]


def _refuse_final(save_model: Callable[..., None]) -> Callable[..., None]:
    def save(self: F2LLMTrainer, output_dir: str, **kwargs: Any) -> None:
        if Path(output_dir).name == ".model.partial":
            raise _KilledError
        save_model(self, output_dir, **kwargs)

    return save


def test_an_evaluation_on_start_is_not_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_watched(tmp_path, **STOPPED, eval_on_start=True)
    killed(recipe, monkeypatch, 5)
    assert main([str(recipe), "--resume"]) == 0
    assert steps(tmp_path / "run") == [2, 4, 6]


@pytest.mark.parametrize("metric", ["pairs_accuracy_dim7", "eval_pairs_recall", "accuracy"])
def test_a_metric_that_nothing_measures(tmp_path: Path, capsys: pytest.CaptureFixture, metric: str) -> None:
    assert main([str(write_watched(tmp_path, **{**BEST, "metric_for_best_model": metric}))]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"not '{metric.removeprefix('eval_')}'" in error
    assert "measure retrieval, loss, pairs_accuracy, pairs_ndcg_at_10, pairs_accuracy_dim16" in error


def test_a_loss_that_no_row_is_left_to_measure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    keys = {"metric_for_best_model": "loss", "evaluation_sample": None, "validation_share": 0.0}
    assert main([str(write_watched(tmp_path, **{**BEST, **keys}))]) == 2
    assert "measure nothing, not 'loss'" in capsys.readouterr().err


def test_a_sample_may_change_unless_the_best_model_is_chosen_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe = write_watched(tmp_path)
    killed(recipe, monkeypatch, 5)
    assert main([str(recipe), "--resume", "--evaluation_sample", "10"]) == 0
    chosen = write_watched(tmp_path / "chosen", **BEST)
    killed(chosen, monkeypatch, 5)
    assert main([str(chosen), "--resume", "--evaluation_sample", "10"]) == 2
    assert "evaluation_sample: 30 → '10'" in capsys.readouterr().err
