"""A resumed run: accepted changes take effect at once and are recorded; what cannot take effect is refused."""

from __future__ import annotations

import json
import logging
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml

from tests.training.evaluation.watched_recipe import write_watched
from tests.training.recipes import NO_NEW_MODEL, error_of, killed, state_of, write_single_stage
from training.common.run_folder import step_of
from training.config.arguments import StageArguments
from training.config.recipe import Stage
from training.publish import main as publish
from training.publishing.record import load_release
from training.run_stage import main
from training.stages.continuation import check_keys, note_changes, read_changes
from training.trainer.trainer import F2LLMTrainer

LAST = 10


def watch_step(patch):
    """The weights before and after the first optimizer step that is done, its gradients and averages."""
    step = SimpleNamespace(weights={}, after={})
    norm, log = F2LLMTrainer._get_grad_norm, F2LLMTrainer.log

    def copies(tensors):
        return {name: torch.as_tensor(each).detach().clone() for name, each in tensors.items()}

    def before(self, *args, **kwargs):
        if not step.weights:
            named = dict(self.model.named_parameters())
            step.weights, step.gradients = copies(named), copies({name: each.grad for name, each in named.items()})
            step.states = {name: copies(self.optimizer.state[each]) for name, each in named.items()}
        return norm(self, *args, **kwargs)

    def after(self, logs, *args, **kwargs):
        if "loss" in logs and step.weights and not step.after:
            step.after = copies(dict(self.model.named_parameters()))
            step.rate, step.at = logs["learning_rate"], self.state.global_step
        log(self, logs, *args, **kwargs)

    patch.setattr(F2LLMTrainer, "_get_grad_norm", before)
    patch.setattr(F2LLMTrainer, "log", after)
    return step


def linear(step, warmup=2, last=LAST):
    return step / warmup if step < warmup else (last - step) / (last - warmup)


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({}, linear(4)),
        ({"learning_rate": 5e-4}, linear(4)),
        ({"weight_decay": 0.3}, linear(4)),
        ({"adam_beta1": 0.5, "adam_beta2": 0.7}, linear(4)),
        ({"adam_epsilon": 1e-2}, linear(4)),
        ({"warmup_steps": 8}, linear(4, warmup=8)),
        ({"lr_scheduler_type": "constant"}, 1.0),
        ({"lr_scheduler_type": "cosine", "learning_rate": 2e-3}, (1 + math.cos(math.pi * 2 / 8)) / 2),
        ({"max_steps": 20}, linear(4, last=20)),
        ({"num_train_epochs": 3}, linear(4, last=15)),
    ],
)
def test_the_next_step_is_that_of_the_changed_keys(write_stopped, tmp_path, monkeypatch, keys, factor):
    step = watch_step(monkeypatch)
    recipe = write_stopped(**keys, logging_steps=1)
    killed(recipe, 6, "--resume", *["--accept-changes"] * bool(keys))
    used = {"learning_rate": 1e-3, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    used = {key: keys.get(key, value) for key, value in used.items()}
    rate, weight_decay, beta1, beta2, epsilon = used.values()
    rate *= factor
    assert step.at == 5 and step.rate == pytest.approx(rate, rel=1e-6)
    decayed = 0
    for name, before in step.weights.items():
        state, gradient = step.states[name], step.gradients[name]
        assert int(state["step"]) == 4
        first = beta1 * state["exp_avg"] + (1 - beta1) * gradient
        second = beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient**2
        divisor = (second / (1 - beta2**5)).sqrt() + epsilon
        # Norms are not decayed.
        decay = 0.0 if "norm" in name else weight_decay
        decayed += decay > 0
        wanted = before * (1 - rate * decay) - rate * first / (1 - beta1**5) / divisor
        torch.testing.assert_close(step.after[name], wanted, rtol=1e-5, atol=1e-7, msg=name)
    assert bool(decayed) == bool(weight_decay)


def test_recipe_arguments_and_card_tell_what_was_used(write_stopped, tmp_path):
    keys = {"learning_rate": 5e-4, "weight_decay": 0.1}
    assert main([str(write_stopped(**keys)), "--resume", "--accept-changes"]) == 0
    run = tmp_path / "run"
    (note,) = read_changes(run)
    changed = {"learning_rate": [1e-3, 5e-4], "weight_decay": [None, 0.1]}
    assert note["step"] == 4 and changed.items() <= note["keys"].items()
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    arguments = json.loads((run / "model/training_arguments.json").read_text())
    assert {key: recipe[key] for key in keys} == {key: arguments[key] for key in keys} == keys
    packed = tmp_path / "packed"
    words = ["pack", str(run), "--name", "f2llm-tiny", "--output", str(packed), "--licence", "apache-2.0"]
    assert publish(words) == 0
    (stage,) = load_release(packed).stages
    assert stage.changes[0]["step"] == 4 and "manifest" not in stage.changes[0]["keys"]
    card = (packed / "README.md").read_text()
    assert "From step 4 on, `learning_rate` was `0.0005` instead of `0.001`." in card
    assert "From step 4 on, `weight_decay` was `0.1` instead of the default." in card


def test_notes_follow_the_checkpoint_that_is_gone_on_from(tmp_path):
    note_changes(tmp_path, {}, None)
    assert read_changes(tmp_path) == [] and not list(tmp_path.iterdir())
    for seed, step in ((1, 6), (2, 4)):
        note_changes(tmp_path, {"seed": (seed, seed + 1)}, tmp_path / f"checkpoint-{step}")
    assert read_changes(tmp_path) == [{"step": 4, "keys": {"seed": seeds}} for seeds in ([1, 2], [2, 3])]


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"optim": "sgd"}, "optim"),
        ({"model_config": {"hidden_size": 64}}, "model_config"),
        ({"model_config": None, "model": "some/model", "tokenizer": None}, "model"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type"),
    ],
)
def test_what_the_checkpoints_hold_cannot_change(write_stopped, tmp_path, capsys, keys, name):
    before = (tmp_path / "run/recipe.yaml").read_text()
    error = error_of([str(write_stopped(**keys)), "--resume", "--accept-changes"], capsys)
    assert error.startswith("error: ") and f"key '{name}' cannot change" in error
    assert f"'model: {tmp_path / 'run/checkpoint-4'}'" in error
    assert (tmp_path / "run/recipe.yaml").read_text() == before


def test_other_intervals_hold_from_the_next_step_on(write_stopped, tmp_path):
    keys = {"eval_strategy": "steps", "eval_steps": 7, "logging_steps": 7, "save_steps": 7}
    assert main([str(write_stopped(**keys)), "--resume", "--accept-changes"]) == 0
    assert sorted(step_of(path) for path in (tmp_path / "run").glob("checkpoint-*")) == [2, 4, 7, 10]
    history = state_of(tmp_path / "run")["log_history"]
    for kind, at in (("eval_loss", [7, 10]), ("loss", [7])):
        assert [line["step"] for line in history if kind in line and line["step"] > 4] == at


def test_another_metric_is_followed_from_then_on(tmp_path, caplog):
    best = {"load_best_model_at_end": True, "early_stopping_patience": 9}
    killed(write_watched(tmp_path, **best, metric_for_best_model="pairs_accuracy"), 5)
    recipe = write_watched(tmp_path, **best, metric_for_best_model="loss")
    with caplog.at_level(logging.WARNING):
        assert main([str(recipe), "--resume", "--accept-changes"]) == 0
    assert "another metric chooses the best model" in caplog.text
    state = state_of(tmp_path / "run")
    losses = {line["step"]: line["eval_loss"] for line in state["log_history"] if "eval_loss" in line}
    assert state["best_metric"] == min(losses[step] for step in (6, 8, 10))


@pytest.mark.parametrize(
    ("key", "before", "now", "changes"),
    [
        ("learning_rate", 2e-5, "2e-5", False),
        ("learning_rate", 2e-5, "2.1e-5", True),
        ("matryoshka_dimensions", [8], "8", False),
        ("source_caps", {"river": 5}, '{"river":5}', False),
        ("eval_strategy", False, "no", False),
        ("seed", None, "42", False),
        ("seed", None, "43", True),
        ("lr_scheduler_type", None, "linear", False),
        ("manifest_stage", "1", "01", True),
        ("sources", ["a"], "A", True),
    ],
)
def test_a_key_changes_with_its_meaning_and_not_with_its_spelling(tmp_path, refuses, key, before, now, changes):
    keys = {"output_dir": str(tmp_path), "model": "m/n"}
    given = {} if before is None else {key: before}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**keys, **given}))
    stage = Stage("x", {**keys, key: now}, StageArguments(**keys, use_cpu=True))
    if not changes:
        assert check_keys(tmp_path, stage, accept_changes=False) == {}
        return
    with refuses("with other keys", f"{key}: {before!r} → {now!r}"):
        check_keys(tmp_path, stage, accept_changes=False)


@pytest.mark.parametrize("key", ["max_steps", "num_train_epochs", "learning_rate"])
def test_a_finished_run_says_how_to_train_on(uninterrupted, capsys, caplog, key):
    words = [uninterrupted.parent / "single.yaml", "--resume", "--accept-changes", f"--{key}", "20"]
    error = error_of(words, capsys)
    assert "stage 'single' is finished" in error and key in error and "going on" not in caplog.text
    assert f"'model: {uninterrupted / 'model'}'" in error and "--accept-changes" not in error


def test_a_finished_run_may_be_evaluated_on_other_pairs(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    recipe = write_single_stage(tmp_path, manifest=str(uninterrupted.parent / "data/manifest.yaml"))
    pairs = str(tmp_path / "data/pairs.parquet")
    assert main([str(recipe), "--resume", "--accept-changes", "--evaluation_pairs", pairs]) == 0
    assert (tmp_path / "run/evaluation.json").exists()


@pytest.mark.parametrize("keys", [{"max_steps": 7}, {"num_train_epochs": 1.5}, {"num_train_epochs": 2}])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_checkpoint_at_its_end_is_only_saved(tmp_path, check_same_weights, keys, strategy):
    recipe, run = write_single_stage(tmp_path, **keys, save_strategy=strategy), tmp_path / "run"
    assert main([str(recipe)]) == 0
    shutil.move(run / "model", tmp_path / "model")
    before = {path.name for path in run.glob("checkpoint-*")}
    with pytest.MonkeyPatch.context() as patch:
        # Any step would fail.
        patch.setattr(F2LLMTrainer, "training_step", None)
        assert main([str(recipe), "--resume"]) == 0
    check_same_weights(run, tmp_path)
    assert {path.name for path in run.glob("checkpoint-*")} == before


@pytest.mark.parametrize("keys", [{"max_steps": 3}, {"global_batch_size": 1000}])
def test_a_checkpoint_beyond_the_end_is_refused(write_stopped, tmp_path, capsys, keys):
    error = error_of([str(write_stopped(**keys)), "--resume", "--accept-changes"], capsys)
    assert f"{tmp_path / 'run/checkpoint-4'}: is of step 4, but the stage now ends at step" in error
    assert not (tmp_path / "run/model").exists()


def test_how_texts_are_divided_may_change_unless_dropout_is_drawn(write_stopped, tmp_path, capsys, caplog):
    assert main([str(write_stopped(max_tokens_per_forward=100)), "--resume"]) == 0
    assert "dropout" not in caplog.text
    keys = {"lora": True, "lora_rank": 2, "lora_dropout": 0.5, "save_steps": 2}
    recipe = write_single_stage(tmp_path / "dropping", model=str(tmp_path / "run/model"), **NO_NEW_MODEL, **keys)
    killed(recipe, 4)
    assert "dropout is drawn per chunk" in caplog.text
    words = [recipe, "--resume", "--max_tokens_per_forward", "100"]
    assert "max_tokens_per_forward: None → '100'" in error_of(words, capsys)
    assert main([*map(str, words), "--accept-changes"]) == 0
    assert "max_tokens_per_forward: None → '100'" in caplog.text and "going on regardless" in caplog.text


def test_a_sample_may_change_unless_the_best_model_is_chosen_by_it(tmp_path, capsys):
    chooses = {"load_best_model_at_end": True, "metric_for_best_model": "pairs_accuracy"}
    plain, chosen = write_watched(tmp_path / "plain"), write_watched(tmp_path / "chosen", **chooses)
    killed(plain, 5)
    killed(chosen, 5)
    words = ["--resume", "--evaluation_sample", "10"]
    assert main([str(plain), *words]) == 0
    assert "evaluation_sample: 30 → '10'" in error_of([chosen, *words], capsys)
