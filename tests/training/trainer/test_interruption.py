from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from tests.training.forked import SignalAt, start
from tests.training.recipes import grow_loss, write_recipe, write_single_stage
from training.common.run_folder import STAGING, last_checkpoint
from training.run_stage import main
from training.trainer.interruption import outlive_signals

ROOT = Path(__file__).parents[3]
BOTH = [signal.SIGTERM, signal.SIGINT]


def _state(run: Path) -> dict:
    return json.loads((last_checkpoint(run) / "trainer_state.json").read_text())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_finish_and_saves_it(
    tmp_path: Path, check_same_weights, number: int, status: int
) -> None:
    words = [write_single_stage(tmp_path)]
    # While the step after the fourth is computed; checkpoints are due after every third.
    stopped = start(words, tmp_path, [SignalAt("step", 4, number)])
    assert stopped.wait() == status
    run = tmp_path / "run"
    assert last_checkpoint(run) == run / "checkpoint-5" and not (run / STAGING).exists()
    assert stopped.line() == (
        f"stopped: {signal.Signals(number).name} at step 5 of 10; saved {run / 'checkpoint-5'}. "
        "To go on, run the same command with --resume"
    )
    assert not (run / "model").exists()
    assert main([str(words[0]), "--resume"]) == 0
    check_same_weights(run)


@pytest.mark.parametrize("number", BOTH)
def test_loader_workers_outlive_a_signal_to_the_whole_group(tmp_path: Path, check_same_weights, number: int) -> None:
    words = [write_single_stage(tmp_path), "--dataloader_num_workers", "2"]
    stopped = start(words, tmp_path, [SignalAt("step", 6, number, group=True)])
    assert stopped.wait() == 128 + number
    assert "at step 7 of 10" in stopped.line()
    resumed = start([*words, "--resume"], tmp_path)
    assert resumed.wait() == 0, resumed.output
    check_same_weights(tmp_path / "run")


class _Slow(Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        time.sleep(0.02)
        return index


@pytest.mark.parametrize("number", BOTH)
def test_a_loader_still_delivers_after_a_signal_to_its_workers(number: int) -> None:
    batches = iter(DataLoader(_Slow(), num_workers=2, worker_init_fn=outlive_signals))
    delivered = [int(next(batches))]
    for worker in batches._workers:
        # By another process: a SIGTERM of the trainer's own ends a worker.
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    delivered += [int(batch) for batch in batches]
    assert delivered == list(range(20))


def test_a_run_interrupted_again_and_again_ends_in_the_same_weights(tmp_path: Path, check_same_weights) -> None:
    words = [write_single_stage(tmp_path), "--resume"]
    for step, resumed_from in ((1, 0), (4, 1), (5, 4), (8, 5)):
        stopped = start(words, tmp_path, [SignalAt("step", step - resumed_from - 1, signal.SIGTERM)])
        assert stopped.wait() == 143
        assert f"at step {step} of 10" in stopped.line()
    last = start(words, tmp_path)
    assert last.wait() == 0, last.output
    check_same_weights(tmp_path / "run")


@pytest.mark.parametrize("first", BOTH)
def test_a_second_interrupt_ends_at_once(tmp_path: Path, first: int) -> None:
    signals = [SignalAt("step", 4, first), SignalAt("step", 4, signal.SIGINT)]
    stopped = start([write_single_stage(tmp_path)], tmp_path, signals)
    assert stopped.wait() == 130
    assert stopped.line() == "stopped: SIGINT: ended at once. To go on, run the same command with --resume"
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-3"


def test_a_termination_that_is_passed_on_twice_is_one(tmp_path: Path) -> None:
    signals = [SignalAt("step", 4, signal.SIGTERM), SignalAt("step", 4, signal.SIGTERM)]
    stopped = start([write_single_stage(tmp_path)], tmp_path, signals)
    assert stopped.wait() == 143
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-5"


def test_a_signal_too_late_for_its_stage_stops_before_the_next(tmp_path: Path) -> None:
    words = [write_recipe(tmp_path)]
    stopped = start(words, tmp_path, [SignalAt("step", 9, signal.SIGTERM)])
    assert stopped.wait() == 143
    assert "after the last step" in stopped.line()
    assert (tmp_path / "run/stage1/model/config.json").exists() and not (tmp_path / "run/stage2").exists()
    resumed = start([*words, "--resume"], tmp_path)
    assert resumed.wait() == 0, resumed.output


@pytest.mark.parametrize("place", ["setup", "finish"])
@pytest.mark.parametrize("number", BOTH)
def test_a_signal_outside_of_the_training_is_one_line(
    tmp_path: Path, check_same_weights, place: str, number: int
) -> None:
    words = [write_single_stage(tmp_path)]
    stopped = start(words, tmp_path, [SignalAt(place, 0, number)])
    assert stopped.wait() == 128 + number
    assert stopped.line().endswith("ended at once. To go on, run the same command with --resume")
    if number == signal.SIGTERM:
        assert main([str(words[0]), "--resume"]) == 0
        check_same_weights(tmp_path / "run")


@pytest.mark.parametrize(("place", "nth"), [("step", 9), ("evaluation", 1)])
def test_a_signal_in_the_last_step_or_after_it_lets_the_run_finish(
    tmp_path: Path, check_same_weights, place: str, nth: int
) -> None:
    finished = start([write_single_stage(tmp_path)], tmp_path, [SignalAt(place, nth, signal.SIGTERM)])
    assert finished.wait() == 0, finished.output
    check_same_weights(tmp_path / "run")


def test_a_signal_while_a_checkpoint_is_written_lets_it_be_finished(tmp_path: Path, check_same_weights) -> None:
    words = [write_single_stage(tmp_path)]
    stopped = start(words, tmp_path, [SignalAt("checkpoint", 1, signal.SIGTERM)])
    assert stopped.wait() == 143
    assert (tmp_path / "run/checkpoint-6").exists()
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-7"
    assert main([str(words[0]), "--resume"]) == 0
    check_same_weights(tmp_path / "run")


@pytest.mark.parametrize("step", [3, 5])
def test_an_interruption_is_not_taken_for_the_end_of_an_epoch(tmp_path: Path, check_same_weights, step: int) -> None:
    words = [write_single_stage(tmp_path, save_strategy="epoch", save_steps=None)]
    stopped = start(words, tmp_path, [SignalAt("step", step - 1, signal.SIGTERM)])
    assert stopped.wait() == 143
    assert last_checkpoint(tmp_path / "run") == tmp_path / f"run/checkpoint-{step}"
    # Nobody waits for an evaluation before the end.
    assert not [line for line in _state(tmp_path / "run")["log_history"] if "eval_loss" in line]
    assert main([str(words[0]), "--resume"]) == 0
    check_same_weights(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} >= {"checkpoint-10"}


@pytest.fixture(scope="module", params=["steps", "epoch"])
def choosing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict, Path]]:
    """Keys of a stage that keeps the best model, that of the first evaluation, and the folder of its whole run."""
    keys = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "eval_strategy": request.param,
        "eval_steps": 3,
        "save_strategy": request.param,
    }
    folder = tmp_path_factory.mktemp(f"choosing-{request.param}")
    with pytest.MonkeyPatch.context() as patch:
        grow_loss(patch)
        assert main([str(write_single_stage(folder, **keys))]) == 0
        yield keys, folder / "run"


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_checkpoint_is_chosen_as_without_interruption(
    tmp_path: Path, choosing: tuple[dict, Path], check_same_weights, limit: int
) -> None:
    keys, expected = choosing
    first = 3 if keys["save_strategy"] == "steps" else 5
    words = [write_single_stage(tmp_path, **keys, save_total_limit=limit)]
    run = tmp_path / "run"
    # First at a step whose evaluation decides, then in between: the newest checkpoint must outlive the best one's rule.
    for resumed_from, step in ((0, first), (first, 8)):
        resume = ["--resume"] if resumed_from else []
        stopped = start([*words, *resume], tmp_path, [SignalAt("step", step - resumed_from - 1, signal.SIGTERM)])
        assert stopped.wait() == 143
        assert f"saved {run / f'checkpoint-{step}'}." in stopped.line()
        assert last_checkpoint(run) == run / f"checkpoint-{step}"
        assert _state(run)["best_model_checkpoint"] == str(run / f"checkpoint-{first}")
    resumed = start([*words, "--resume"], tmp_path)
    assert resumed.wait() == 0, resumed.output
    check_same_weights(run, expected)
    check_same_weights(run, _as_model(run / f"checkpoint-{first}", tmp_path / "best"))


def _as_model(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "model").symlink_to(checkpoint)
    return folder


@pytest.mark.slow
def test_the_script_itself_ends_with_the_status_of_the_signal(tmp_path: Path) -> None:
    recipe = write_single_stage(tmp_path, num_train_epochs=400)
    command = [sys.executable, str(ROOT / "training/run_stage.py"), str(recipe)]
    with (tmp_path / "log").open("w") as log:
        script = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            while last_checkpoint(tmp_path / "run") is None:
                assert script.poll() is None
            script.send_signal(signal.SIGTERM)
            assert script.wait(timeout=60) == 143
        finally:
            script.kill()
    output = (tmp_path / "log").read_text()
    assert "Traceback" not in output and "--resume" in output.splitlines()[-1]
