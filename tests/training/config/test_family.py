"""The published family as recipes: its order, its numbers, and its plan without data, models or network."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import yaml

from tests.training.processes import ROOT
from tests.training.recipes import error_of, write_recipe
from training.config.recipe import find_inputs, load_recipe
from training.data.manifest import read_manifest
from training.run_stage import main

FAMILY = ROOT / "training/recipes/f2llm-v2/family.yaml"
# Learning rate, epochs and parameters of Table 1 (arXiv 2603.19223), and the teacher.
PUBLISHED = {
    "80m": (4e-5, 4, 80_084_288, "0.6b"),
    "160m": (3e-5, 3, 159_185_024, "0.6b"),
    "330m": (2e-5, 3, 334_349_184, "0.6b"),
    "0.6b": (1e-5, 2, 596_049_920, "1.7b"),
    "1.7b": (9e-6, 2, 1_720_574_976, "4b"),
    "4b": (7e-6, 2, 4_022_468_096, None),
    "8b": (6e-6, 2, 7_568_405_504, None),
    "14b": (5e-6, 2, 13_990_394_880, None),
}
SMALL = ("80m", "160m", "330m")


@pytest.fixture(scope="module")
def family():
    return load_recipe(FAMILY, {"use_cpu": True})


def test_every_input_is_made_by_an_earlier_stage_or_lies_on_the_hub(family):
    made: list[str] = []
    for stage in family.stages:
        for each in find_inputs(family, stage):
            if each.on_hub:
                assert stage.name.startswith("stage1-") and each.name.startswith("Qwen/Qwen3-")
            else:
                assert each.maker.name in made
        made.append(stage.name)
    assert made[-6:] == [f"{kind}-{size}" for kind in ("pruned", "stage2") for size in SMALL]
    assert {name for name in made if name.startswith("stage2-")} == {f"stage2-{size}" for size in PUBLISHED}


def test_every_stage_has_its_published_numbers(family):
    for stage in family.stages:
        kind, size = stage.name.split("-")
        args = stage.arguments
        rate, epochs, _, teacher = PUBLISHED[size]
        if kind == "pruned":
            assert args.mapping("prune_to") == {"family": f"f2llm-v2-{size}"} and args.model_family == "f2llm-v2-0.6b"
            assert args.model == "runs/f2llm-v2/stage1-0.6b/model"
            continue
        assert (args.learning_rate, args.num_train_epochs, args.global_batch_size) == (rate, epochs, 512)
        assert args.model_family == f"f2llm-v2-{size}" and args.matryoshka and args.matryoshka_min_dim == 8
        expected = f"runs/f2llm-v2/stage2-{teacher}/model" if kind == "stage2" and teacher else None
        assert args.teacher == expected
        assert (args.instructions, args.manifest_stage) == (kind == "stage2", kind)


@pytest.mark.parametrize("path", sorted(FAMILY.parent.glob("stage?-*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_a_stage_is_complete(path):
    # The recipes compute in bf16 on a GPU; their keys must hold on any machine.
    arguments = load_recipe(path, {"bf16": False, "use_cpu": True}).stages[0].arguments
    assert arguments.global_batch_size == 512 and arguments.warmup_steps == 500
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.weight_decay) == (0.9, 0.98, 0.01)
    assert arguments.num_hard_negatives == {"retrieval": 7, "clustering": 9, "classification": 1}
    assert arguments.lr_scheduler_kwargs == {"min_lr": 1e-7}
    published = yaml.safe_load((path.parent / "published.yaml").read_text())
    # A blank text among 60 million rows does not end a run.
    assert published["bf16"] is True and published["on_bad_row"] == "quarantine"
    manifest = read_manifest(Path(arguments.manifest))
    entries = manifest.of_stage(arguments.manifest_stage)
    if path.stem.startswith("stage1"):
        assert not arguments.instructions and arguments.cap is None and len(entries) == 7
    else:
        assert arguments.instructions and arguments.cap == 80000 and len(entries) == len(manifest.entries)


def test_a_stage_of_the_family_is_the_recipe_beside_it(family):
    # Whichever way a stage is run, it reads and writes the same folders.
    alone = {path.stem for path in FAMILY.parent.glob("*-*.yaml")}
    assert {stage.name for stage in family.stages} == alone
    for stage in family.stages:
        (single,) = load_recipe(FAMILY.with_name(f"{stage.name}.yaml"), {"use_cpu": True}).stages
        assert single.keys == stage.keys


def test_the_family_is_planned_without_network(family, monkeypatch, capsys, tmp_path):
    # None of them can be called.
    monkeypatch.setattr(socket.socket, "connect", None)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    # Not what the checkout may hold of earlier runs.
    assert main([str(FAMILY), "--dry-run", "--output_dir", str(tmp_path / "family")]) == 0
    text = capsys.readouterr().out
    plans = dict(re.findall(r"^stage (\S+): (.*?)(?=^stage |^all )", text, re.MULTILINE | re.DOTALL))
    assert list(plans) == [stage.name for stage in family.stages]
    operations = []
    for name, plan in plans.items():
        kind, size = name.split("-")
        *_, parameters = re.findall(r"([\d,]+) parameters", plan.splitlines()[0])
        assert int(parameters.replace(",", "")) == PUBLISHED[size][2]
        assert f"output       {tmp_path}/family/{name}/model" in plan
        assert re.search(r"memory +(about )?[\d.]+ GiB", plan)
        operations.append(float(re.search(r"FLOPs +about (\S+)", plan)[1]))
        if kind == "pruned":
            continue
        assert "is remote: estimated from" in plan and "128 tokens (planned_text_tokens)" in plan
        steps, an_epoch = map(int, re.search(r"steps +about (\S+) \((\S+) an epoch", plan.replace(",", "")).groups())
        assert steps == PUBLISHED[size][1] * an_epoch
        # Rows over batch size, as published: 26,693,280 and 18 million, of which 99 % are trained on.
        assert an_epoch == pytest.approx(51_614 if kind == "stage1" else 34_805, rel=0.01)
    assert "model        Qwen/Qwen3-14B, on the Hub" in plans["stage1-14b"]
    assert "pruned-80m/model, made by stage pruned-80m" in plans["stage2-80m"]
    assert "stage2-0.6b/model, made by stage stage2-0.6b" in plans["stage2-80m"]
    assert "pruned-80m, made by stage pruned-80m" in plans["pruned-330m"]
    total = float(re.search(r"^all stages: about (\S+) FLOPs", text, re.MULTILINE)[1])
    assert total == pytest.approx(sum(operations), rel=0.01)
    # So is a single recipe, though nothing is there.
    assert main([str(FAMILY.with_name("stage2-80m.yaml")), "--dry-run", "--planned_text_tokens", "64"]) == 0
    text = capsys.readouterr().out
    assert "80,084,288 parameters" in text and "has 64 tokens" in text
    assert "teacher      runs/f2llm-v2/stage2-0.6b/model" in text and "GiB teacher" in text


def test_a_model_of_another_shape_is_refused(capsys, tmp_path):
    recipe = write_recipe(tmp_path, {"stage2": {"model_family": "f2llm-v2-80m"}})
    assert main([str(recipe), "--stage", "stage1", "--max_steps", "1"]) == 0
    of_a_plan = ["--dry-run", "--output_dir", tmp_path / "new"]
    for words in (["--stage", "stage2"], ["--stage", "stage2", "--dry-run"], of_a_plan):
        error = error_of([recipe, *words], capsys)
        assert error.startswith("error: model ") and "is not f2llm-v2-80m: its vocab_size is 348, not 151936" in error
    assert not (tmp_path / "run/stage2/model").exists()
