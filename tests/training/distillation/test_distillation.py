"""Distillation end to end: cached as online, teachers of any kind, and a projection that the model does not keep."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from tests.training.distributed_recipe import save_model
from tests.training.foreign_teacher import save_foreign_teacher
from tests.training.recipes import grow_loss, write_single_stage, write_sources
from training.config.recipe import load_recipe
from training.distillation import distillation
from training.distillation.distillation import choose_teacher
from training.distillation.teacher import Teacher, load_teacher
from training.run_stage import main

WIDTHS = {"wide": 48, "equal": 32, "narrow": 16}
NARROW = {"teacher": "narrow", "teacher_projection": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_config, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student", tiny_config, tiny_tokenizer)
    for seed, (name, width) in enumerate(WIDTHS.items(), start=1):
        save_model(
            folder / name, tiny_config, tiny_tokenizer, seed=seed, hidden_size=width, matryoshka_dimensions=[width]
        )
    save_foreign_teacher(folder / "foreign", width=40)
    # One set of files for all runs: other files have other texts.
    write_sources(folder / "data")
    return folder


def write(folder: Path, models: Path, teacher: str | None = "wide", **keys: Any) -> Path:
    own = {"tokenizer": None, "tokenizer_vocab_size": None, "model_config": None, "task_types": None}
    own |= {"model": str(models / "student"), "manifest": str(models / "data/manifest.yaml"), "instructions": True}
    own |= {
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_steps": 4,
        "global_batch_size": 36,
        "teacher": teacher and str(models / teacher),
    }
    return write_single_stage(folder, **{**own, **keys})


def train(folder: Path, models: Path, *words: str, **keys: Any) -> Path:
    assert main([str(write(folder, models, **keys)), *words]) == 0
    return folder / "run"


def losses(run: Path) -> list[float]:
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return [
        line["loss_distillation"]
        for line in json.loads((last / "trainer_state.json").read_text())["log_history"]
        if "loss_distillation" in line
    ]


def rewind(run: Path, folder: Path, step: int) -> None:
    """Copy a finished run as if it had been killed after ``step``."""
    shutil.copytree(run, folder / "run")
    shutil.rmtree(folder / "run/model")
    for checkpoint in (folder / "run").glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{step}":
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize(("teacher", "workers"), [("wide", 0), ("wide", 2), ("foreign", 0)])
def test_cached_is_online(tmp_path, models, teacher, workers):
    online = train(tmp_path / "online", models, teacher=teacher)
    cached = train(
        tmp_path / "cached",
        models,
        teacher=teacher,
        teacher_cache_dir=str(tmp_path / "embeddings"),
        dataloader_num_workers=workers,
    )
    assert len(losses(online)) == 12
    assert losses(cached) == pytest.approx(losses(online), rel=1e-3)


def test_a_whole_cache_needs_no_teacher_and_serves_another_student(
    tmp_path, models, tiny_config, tiny_tokenizer, monkeypatch
):
    cache, prepared = str(tmp_path / "embeddings"), str(tmp_path / "prepared")
    first = train(tmp_path / "first", models, teacher_cache_dir=cache, prepared_dir=prepared)

    def never(*args: Any) -> None:
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(Teacher, "__init__", never)
    again = train(tmp_path / "again", models, teacher_cache_dir=cache, prepared_dir=prepared)
    assert losses(again) == losses(first)
    save_model(tmp_path / "small", tiny_config, tiny_tokenizer, hidden_size=16, matryoshka_dimensions=[16])
    small = str(tmp_path / "small")
    train(tmp_path / "other", models, model=small, teacher_cache_dir=cache, prepared_dir=prepared)


def test_embeddings_of_another_precision_are_others(tmp_path, models):
    cache, prepared = tmp_path / "embeddings", str(tmp_path / "prepared")
    found = {}
    for name, keys in {"fp32": {}, "bf16": {"bf16": True}}.items():
        train(tmp_path / name, models, teacher_cache_dir=str(cache), prepared_dir=prepared, max_steps=1, **keys)
        for shard in cache.rglob("*.float16"):
            precision = json.loads((shard.parent / "cache.json").read_text())["precision"]
            found[precision, shard.parent.name.rsplit("-", 1)[0]] = np.fromfile(shard, "<f2").astype(np.float32)
    assert len(found) == 6
    for (precision, source), embeddings in found.items():
        if precision == "bf16":
            difference = np.abs(embeddings - found["fp32", source]).max()
            # The cache is computed in the precision of the steps: bf16 keeps 8 bits.
            assert 1e-3 < difference / np.abs(embeddings).max() < 5e-2


def test_a_teacher_with_its_own_format_reads_texts(tmp_path, models, tiny_tokenizer):
    for keys, by_text in (({}, False), ({"teacher_document_template": "passage: {text}"}, True)):
        arguments = load_recipe(write(tmp_path, models, **keys)).stages[0].arguments
        choice = choose_teacher(arguments, tiny_tokenizer, 32)
        assert choice.width == 48
        assert (choice.by_text is not None) == by_text


@pytest.mark.parametrize("keys", [{}, {"teacher_cache_dir": "CACHE"}, {"teacher": "foreign"}])
def test_without_negatives(tmp_path, models, keys):
    keys = {key: str(tmp_path / "cache") if value == "CACHE" else value for key, value in keys.items()}
    none = {f"num_hard_negatives_{kind}": 0 for kind in ("retrieval", "clustering", "classification")}
    assert all(loss > 0 for loss in losses(train(tmp_path, models, **none, **keys)))


@pytest.fixture(scope="module")
def projected(tmp_path_factory, models):
    return train(tmp_path_factory.mktemp("projected"), models, **NARROW)


def test_a_projection_is_learned_and_kept_with_the_run_only(tmp_path, models, projected):
    run = projected
    weight = load_file(run / "projection.safetensors")["weight"]
    assert weight.shape == (16, 32)
    assert not torch.allclose(weight, torch.eye(16, 32), atol=1e-3)
    assert not list((run / "model").rglob("projection*"))
    assert not [name for name in load_file(run / "model/model.safetensors") if "projection" in name]
    # Its cost can be measured beforehand.
    assert main([str(write(tmp_path / "dry", models, **NARROW)), "--dry-run", "--measure"]) == 0


@pytest.mark.parametrize(
    ("keys", "workers"),
    [(NARROW, 0), ({"teacher_cache_dir": "CACHE"}, 2)],
)
def test_a_resumed_distillation_ends_in_the_same_weights(tmp_path, models, keys, workers):
    keys = {key: str(tmp_path / "cache") if value == "CACHE" else value for key, value in keys.items()}
    whole = train(tmp_path / "whole", models, **keys)
    if "teacher_cache_dir" in keys:
        # The cache may move.
        keys["teacher_cache_dir"] = str(shutil.move(tmp_path / "cache", tmp_path / "elsewhere"))
    # In the middle of the first and of the second epoch.
    for step in (4, 8):
        folder = tmp_path / f"resumed{step}"
        rewind(whole, folder, step)
        resumed = train(folder, models, "--resume", dataloader_num_workers=workers, **keys)
        for part in ("model/model.safetensors", "projection.safetensors"):
            if (whole / part).exists():
                expected, found = load_file(whole / part), load_file(resumed / part)
                assert not [name for name in expected if not torch.equal(expected[name], found[name])]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"teacher": "narrow"}, "16 dimensions do not cover the student's 32; choose a wider teacher, or add"),
        ({"teacher": "wide", "teacher_projection": True}, "take the key out"),
        ({"teacher": "equal", "teacher_projection": True}, "take the key out"),
        ({"teacher": "nowhere"}, "is missing, and no stage here or in a recipe beside it makes it"),
        ({"teacher": None, "teacher_projection": True}, "'teacher_projection' has no effect without 'teacher'"),
        ({"teacher": None, "teacher_cache_dir": "x"}, "'teacher_cache_dir' has no effect without 'teacher'"),
        ({"teacher": "foreign", "teacher_query_template": "q"}, "key 'teacher_query_template'"),
        ({"distillation_weight": -1.0}, "'distillation_weight' must be at least 0"),
    ],
)
def test_bad_keys_are_named(tmp_path, models, capsys, keys, message):
    assert main([str(write(tmp_path, models, **keys))]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and message in error


def test_embeddings_on_a_full_disk_stop_in_one_line(tmp_path, models, monkeypatch, capsys):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.distillation.teacher_cache.TeacherCache._write", full)
    assert main([str(write(tmp_path, models, teacher_cache_dir=str(tmp_path / "cache")))]) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "--resume" in error and "Traceback" not in error


def test_a_trimmed_student_learns_from_the_whole_model(tmp_path, models):
    # Long enough for whole texts: a teacher that is given texts reads what the student's length cuts off.
    few = {"cap": 8, "validation_share": 0.0, "eval_strategy": "no", "max_length": 200}
    trimmed = tmp_path / "trimmed"
    recipe = write(trimmed, models, teacher=None, trim_vocabulary=True, model=str(models / "wide"), **few)
    assert main([str(recipe)]) == 0
    before, after = (AutoTokenizer.from_pretrained(each) for each in (models / "wide", trimmed / "run/model"))
    assert len(after) < len(before)
    # All texts keep their pieces: student and teacher embed them the same.
    run = train(tmp_path / "student", models, model=str(trimmed / "run/model"), learning_rate=0.0, **few)
    assert max(losses(run)) < 1e-9
    assert load_recipe(recipe).stages[0].arguments.prunes


def test_another_teacher_in_the_folder_is_never_served_and_refused_on_resume(tmp_path, models, capsys):
    teacher = shutil.copytree(models / "wide", tmp_path / "teacher")
    keys = {"teacher": str(teacher), "teacher_cache_dir": str(tmp_path / "cache")}
    first = train(tmp_path / "first", models, **keys)
    weights = load_file(teacher / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, teacher / "model.safetensors", {"format": "pt"})
    second = train(tmp_path / "second", models, **keys)
    assert losses(second)[0] != pytest.approx(losses(first)[0], rel=1e-2)
    rewind(first, tmp_path / "resumed", 8)
    recipe = str(write(tmp_path / "resumed", models, **keys))
    assert main([recipe, "--resume"]) == 2
    assert "the teacher" in capsys.readouterr().err
    assert main([recipe, "--resume", "--accept-changes"]) == 0


def test_the_projection_of_the_best_model_goes_with_it(tmp_path, models, monkeypatch):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    # The first evaluation is the best.
    grow_loss(monkeypatch)
    steps = {"eval_strategy": "steps", "eval_steps": 4}
    run = train(tmp_path, models, **NARROW, **best, **steps)
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    chosen = Path(json.loads((last / "trainer_state.json").read_text())["best_model_checkpoint"])
    assert chosen.name == "checkpoint-4" != last.name
    kept = torch.load(chosen / "projection.pt", weights_only=True)["weight"]
    assert torch.equal(load_file(run / "projection.safetensors")["weight"], kept)


def test_a_damaged_projection_is_refused(tmp_path, models, projected, capsys):
    rewind(projected, tmp_path, 4)
    (tmp_path / "run/checkpoint-4/projection.pt").write_bytes(b"broken")
    assert main([str(write(tmp_path, models, **NARROW)), "--resume"]) == 2
    error = capsys.readouterr().err
    assert "projection.pt cannot be read" in error and "no other checkpoint is before it" in error


def test_a_teacher_from_the_hub_is_loaded_at_the_commit_that_its_cache_is_named_after(tmp_path, models, monkeypatch):
    arguments = load_recipe(write(tmp_path, models)).stages[0].arguments
    arguments.teacher, loaded, local = "org/teacher", {}, str(models / "wide")

    def load(name: str, **options: Any) -> PreTrainedModel:
        loaded.update(options, name=name)
        return load_teacher(local)

    monkeypatch.setattr(distillation, "model_revision", lambda *_: "abc123")
    monkeypatch.setattr(distillation, "load_teacher", load)
    made = distillation.make_distillation(distillation.TeacherChoice("org/teacher", 48), arguments, [], 32, {})
    assert loaded == {"name": "org/teacher", "revision": "abc123"}
    assert made.identity == "abc123"
