"""Distillation end to end: cached as online, teachers of any kind, and a projection that the model does not keep."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, TrainingArguments

from modeling_f2llm import F2LLMModel
from tests.training.distributed_recipe import save_model
from tests.training.foreign_teacher import save_foreign_teacher
from tests.training.recipes import NO_NEW_MODEL, error_of, grow_loss, rewind, state_of, write_single_stage
from training.config.recipe import load_recipe
from training.distillation.distillation import (
    Projection,
    TeacherChoice,
    inspect_teacher,
    make_distillation,
    make_projection,
    read_width,
)
from training.distillation.teacher import Teacher
from training.models.model_ref import ModelRef
from training.run_stage import main

NARROW = {"teacher": "narrow", "teacher_projection": True}
MAPPED = {"teacher": "wide", "teacher_projection": True}
SCORES = {"score_distillation_weight": 1.0, "mask_false_negatives": 0.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_config, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student", tiny_config, tiny_tokenizer)
    for seed, (name, width) in enumerate({"wide": 48, "narrow": 16}.items(), start=1):
        sizes = {"hidden_size": width, "matryoshka_dimensions": [width]}
        save_model(folder / name, tiny_config, tiny_tokenizer, seed=seed, **sizes)
    save_foreign_teacher(folder / "foreign", width=40)
    # One set of files for all runs: other files have other texts.
    write_single_stage(folder)
    return folder


def write(folder, models, teacher="wide", **keys):
    own = {**NO_NEW_MODEL, "model": str(models / "student"), "teacher": teacher and str(models / teacher)}
    own |= {"manifest": str(models / "data/manifest.yaml"), "task_types": None, "instructions": True}
    own |= {"num_train_epochs": 2, "logging_steps": 1, "save_steps": 4, "global_batch_size": 36}
    keys = {key: str(folder / "cache") if value == "CACHE" else value for key, value in keys.items()}
    return write_single_stage(folder, **{**own, **keys})


def train(folder, models, *words, **keys):
    assert main([str(write(folder, models, **keys)), *words]) == 0
    return folder / "run"


def losses(run, name="loss_distillation"):
    return [line[name] for line in state_of(run)["log_history"] if name in line]


@pytest.mark.parametrize(("teacher", "workers"), [("wide", 0), ("wide", 2), ("foreign", 0)])
def test_cached_is_online(tmp_path, models, teacher, workers):
    online = train(tmp_path / "online", models, teacher=teacher)
    keys = {"teacher_cache_dir": "CACHE", "dataloader_num_workers": workers}
    cached = train(tmp_path / "cached", models, teacher=teacher, **keys)
    assert len(losses(online)) == 12
    assert losses(cached) == pytest.approx(losses(online), rel=1e-3)


def test_a_whole_cache_needs_no_teacher_and_serves_another_student(
    tmp_path, models, tiny_config, tiny_tokenizer, monkeypatch
):
    shared = {"teacher_cache_dir": str(tmp_path / "embeddings"), "prepared_dir": str(tmp_path / "prepared")}
    first = train(tmp_path / "first", models, **shared)
    monkeypatch.setattr(Teacher, "__init__", lambda *_: pytest.fail("the teacher was asked"))
    assert losses(train(tmp_path / "again", models, **shared)) == losses(first)
    save_model(tmp_path / "small", tiny_config, tiny_tokenizer, hidden_size=16, matryoshka_dimensions=[16])
    train(tmp_path / "other", models, model=str(tmp_path / "small"), **shared)
    # Nor does a stage that learns nothing from it, even if there is none.
    keys = {"distillation_weight": 0.0, "teacher_projection": True}
    assert not losses(train(tmp_path / "weightless", models, **keys))


def test_scores_teach_from_all_dimensions_of_any_teacher(tmp_path, models):
    few = {**SCORES, "distillation_weight": 0.0, "max_steps": 2, "prepared_dir": str(tmp_path / "prepared")}
    for teacher in ("narrow", "foreign"):
        online = train(tmp_path / teacher, models, teacher=teacher, **few)
        cached = train(tmp_path / f"{teacher} cached", models, teacher=teacher, teacher_cache_dir="CACHE", **few)
        for name in ("loss_score_distillation", "masked_candidates"):
            assert len(losses(online, name)) == 2 and losses(online, name)[0] > 0
            assert losses(cached, name) == pytest.approx(losses(online, name), rel=1e-3)
        assert not losses(online) and not (online / "projection.safetensors").exists()
    # A wider one is read whole.
    stages = load_recipe(write(tmp_path, models, **few)).stages
    assert read_width(stages[0].arguments, 32, 48) == 48


def test_without_a_teacher_the_scores_of_the_data_teach(tmp_path, models, capsys):
    keys = {"teacher": None, "score_distillation_weight": 1.0, "teacher_temperature": 0.5, "max_steps": 2}
    assert "add columns 'passage_score'" in error_of([write(tmp_path, models, **keys)], capsys)
    data = shutil.copytree(models / "data", tmp_path / "scored")
    for path in data.glob("*.parquet"):
        table = pq.read_table(path)
        for name in [name for name in table.column_names if name.startswith(("passage", "negative"))]:
            table = table.append_column(f"{name}_score", pa.array([float(len(name))] * len(table)))
        pq.write_table(table, path)
    keys |= {"manifest": str(data / "manifest.yaml"), "prepared_dir": str(tmp_path / "prepared")}
    whole = train(tmp_path / "whole", models, **keys)
    chunked = train(tmp_path / "chunked", models, **keys, max_tokens_per_forward=64)
    found = losses(whole, "loss_score_distillation")
    assert len(found) == 2 and min(found) > 0
    assert losses(chunked, "loss_score_distillation") == pytest.approx(found, rel=1e-4)


def test_a_teacher_may_only_find_false_negatives(tmp_path, models):
    keys = {"distillation_weight": 0.0, "mask_false_negatives": 0.0, "max_steps": 2}
    guided = train(tmp_path / "guided", models, **keys)
    assert not losses(guided) and not losses(guided, "loss_score_distillation")
    alone = train(tmp_path / "alone", models, teacher=None, **keys)
    masked = [losses(run, "masked_candidates") for run in (guided, alone)]
    assert len(masked[0]) == len(masked[1]) == 2 and masked[0] != masked[1]


def test_embeddings_of_another_precision_are_others(tmp_path, models):
    cache, prepared = tmp_path / "embeddings", str(tmp_path / "prepared")
    found = {}
    for bf16 in (False, True):
        train(tmp_path / str(bf16), models, teacher_cache_dir=str(cache), prepared_dir=prepared, max_steps=1, bf16=bf16)
    for shard in cache.rglob("*.float16"):
        precision = json.loads((shard.parent / "cache.json").read_text())["precision"]
        source = shard.parent.name.rsplit("-", 1)[0]
        found.setdefault(source, {})[precision] = np.fromfile(shard, "<f2").astype(np.float32)
    assert len(found) == 3
    for each in found.values():
        # The cache is computed in the precision of the steps: bf16 keeps 8 bits.
        assert 1e-3 < np.abs(each["bf16"] - each["fp32"]).max() / np.abs(each["bf16"]).max() < 5e-2


def test_a_teacher_with_its_own_format_reads_texts(tmp_path, models, tiny_tokenizer):
    for keys, by_text in (({}, False), ({"teacher_document_template": "passage: {text}"}, True)):
        choice = inspect_teacher(load_recipe(write(tmp_path, models, **keys)).stages[0].arguments, tiny_tokenizer, 32)
        assert choice.width == 48 and (choice.by_text is not None) == by_text


@pytest.mark.parametrize("keys", [{"teacher_cache_dir": "CACHE"}, {"teacher": "foreign"}])
def test_without_negatives(tmp_path, models, keys):
    none = {f"num_hard_negatives_{kind}": 0 for kind in ("retrieval", "clustering", "classification")}
    assert min(losses(train(tmp_path, models, **none, **keys))) > 0


def test_a_projection_is_learned_and_kept_with_the_run_only(tmp_path, models, capsys):
    run = train(tmp_path / "whole", models, **NARROW)
    weight = load_file(run / "projection.safetensors")["weight"]
    assert weight.shape == (16, 32)
    assert not torch.allclose(weight, torch.eye(16, 32), atol=1e-3)
    assert not list((run / "model").rglob("projection*"))
    assert not [name for name in load_file(run / "model/model.safetensors") if "projection" in name]
    # Its cost can be measured beforehand.
    assert main([str(write(tmp_path / "dry", models, **NARROW)), "--dry-run", "--measure"]) == 0
    # A damaged one is refused.
    rewind(run, tmp_path / "run", 4)
    (tmp_path / "run/checkpoint-4/projection.pt").write_bytes(b"broken")
    error = error_of([write(tmp_path, models, **NARROW), "--resume"], capsys)
    assert "projection.pt cannot be read" in error and "no other checkpoint is before it" in error


@pytest.mark.parametrize(("keys", "workers"), [(NARROW, 0), ({**MAPPED, "teacher_cache_dir": "CACHE", **SCORES}, 2)])
def test_a_resumed_distillation_ends_in_the_same_weights(tmp_path, models, keys, workers):
    whole = train(tmp_path / "whole", models, **keys)
    if "teacher_cache_dir" in keys:
        # The cache may move.
        keys = {**keys, "teacher_cache_dir": str(shutil.move(tmp_path / "whole/cache", tmp_path / "elsewhere"))}
    # In the middle of the first and of the second epoch.
    for step in (4, 8):
        folder = tmp_path / f"resumed{step}"
        rewind(whole, folder / "run", step)
        resumed = train(folder, models, "--resume", dataloader_num_workers=workers, **keys)
        for part in ("model/model.safetensors", "projection.safetensors"):
            if (whole / part).exists():
                expected, found = load_file(whole / part), load_file(resumed / part)
                assert not [name for name in expected if not torch.equal(expected[name], found[name])]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"teacher": "narrow"}, "16 dimensions do not cover the student's 32; choose a wider teacher, or add"),
        ({"teacher": "nowhere"}, "is missing, and no stage here or in a recipe beside it makes it"),
    ],
)
def test_bad_keys_are_named(tmp_path, models, capsys, keys, message):
    assert message in error_of([write(tmp_path, models, **keys)], capsys)


def test_embeddings_on_a_full_disk_stop_in_one_line(tmp_path, models, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.distillation.teacher_cache.TeacherCache._write", full)
    error = error_of([write(tmp_path, models, teacher_cache_dir="CACHE")], capsys, 1)
    assert "No space left on device" in error and "--resume" in error


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
    rewind(first, tmp_path / "resumed/run", 8)
    recipe = str(write(tmp_path / "resumed", models, **keys))
    assert "the teacher" in error_of([recipe, "--resume"], capsys)
    assert main([recipe, "--resume", "--accept-changes"]) == 0


def test_the_projection_of_the_best_model_goes_with_it(tmp_path, models, monkeypatch):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    # The first evaluation is the best.
    grow_loss(monkeypatch)
    steps = {"eval_strategy": "steps", "eval_steps": 4}
    run = train(tmp_path, models, **NARROW, **best, **steps)
    chosen = Path(state_of(run)["best_model_checkpoint"])
    assert chosen.name == "checkpoint-4" and (run / "checkpoint-8").exists()
    kept = torch.load(chosen / "projection.pt", weights_only=True)["weight"]
    assert torch.equal(load_file(run / "projection.safetensors")["weight"], kept)


def test_a_teacher_from_the_hub_is_loaded_at_the_commit_that_its_cache_is_named_after(tmp_path, models, monkeypatch):
    arguments = load_recipe(write(tmp_path, models)).stages[0].arguments
    ref, loaded = ModelRef("org/teacher", "org/teacher", revision="abc123", identity="abc123"), {}

    def load(name, **options):
        loaded.update(options, name=name)
        return F2LLMModel.from_pretrained(models / "wide")

    monkeypatch.setattr("training.distillation.teacher.load_whole_model", load)
    made = make_distillation(TeacherChoice(ref, 48), arguments, [], 32, {})
    assert loaded == {"name": "org/teacher", "revision": "abc123"}
    assert made.identity == "abc123"


# The projection's steps


def stage(**keys):
    keys = {"adam_beta1": 0.8, "adam_beta2": 0.95, "weight_decay": 0.3, **keys}
    return TrainingArguments(output_dir="unused", use_cpu=True, report_to=[], **keys)


def step(projection, args, gradient, rate=0.1, skipped=False):
    projection.weight.grad = gradient
    model_optimizer = SimpleNamespace(step_was_skipped=skipped)
    scheduler = SimpleNamespace(get_last_lr=lambda: [rate])
    projection.on_optimizer_step(args, None, None, optimizer=model_optimizer, lr_scheduler=scheduler)


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_a_projection_steps_as_adamw_with_the_stages_numbers(clip):
    args = stage(max_grad_norm=clip)
    projection, weight = Projection(6, 4, args), torch.nn.Parameter(torch.eye(4, 6))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(0.8, 0.95), weight_decay=0.3)
    gradients = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    for rate, gradient in zip([0.1, 0.05, 0.2], gradients, strict=True):
        assert gradient.norm() > 0.5
        step(projection, args, gradient.clone(), rate)
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = gradient * (0.5 / gradient.norm() if clip else 1.0)
        optimizer.step()
        torch.testing.assert_close(projection.weight, weight, rtol=1e-5, atol=1e-6)
        assert projection.weight.grad is None


def test_a_map_to_a_wide_teacher_starts_at_the_least_squares_of_the_first_batch():
    args = stage()
    args.teacher_projection, args.distillation_weight = True, 1.0
    projection = make_projection(args, 6, 9)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(200, width, generator=generator) for width in (6, 9))
    teacher[:, :6] += student @ torch.randn(6, 6, generator=generator)
    projection.start(student, teacher)
    expected = torch.linalg.lstsq(student, teacher[:, :6]).solution
    torch.testing.assert_close(projection(student), student @ expected, rtol=0, atol=5e-2)
    # Once only, and never after a resume.
    before = projection.weight.clone()
    projection.start(student, -teacher)
    assert torch.equal(projection.weight, before)
    # A batch of one text, or of a channel that is zero, says nothing of other directions.
    few = make_projection(args, 6, 6)
    few.start(torch.eye(6)[:1], torch.full((1, 6), 2.0))
    torch.testing.assert_close(few.weight[:, 1:], torch.eye(6)[:, 1:])
    torch.testing.assert_close(few.weight[:, 0], torch.full((6,), 2.0), rtol=0, atol=1e-2)
    narrow = make_projection(args, 6, 4)
    narrow.start(student, teacher)
    assert torch.equal(narrow.weight, torch.eye(4, 6))


@pytest.mark.parametrize(("gradient", "skipped"), [(None, False), (torch.ones(4, 6), True)])
def test_a_step_that_fp16_skipped_or_without_gradient_changes_no_projection(gradient, skipped):
    projection = Projection(6, 4, stage())
    step(projection, stage(), gradient, skipped=skipped)
    # As at first, it takes the leading dimensions.
    embeddings = torch.randn(3, 6)
    assert torch.equal(projection(embeddings), embeddings[:, :4])
    assert projection.weight.grad is None
