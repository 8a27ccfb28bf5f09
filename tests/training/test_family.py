"""The published family as one recipe: its order, its numbers, and its plan without data, network or models."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from modeling_f2llm import F2LLMConfig, F2LLMModel
from tests.training.recipes import write_recipe
from training.counting import estimate_batches
from training.data_sizes import SourceSizes
from training.flops import forward_flops, step_flops
from training.inputs import inputs_of
from training.plan import Batches
from training.recipe import load_recipe
from training.run_stage import main

RECIPES = Path(__file__).parents[2] / "training/recipes/f2llm-v2"
# arXiv 2603.19223, Table 1: parameters, learning rate, epochs, teacher.
PUBLISHED = {
    "80m": (80_084_288, 4e-5, 4, "0.6b"),
    "160m": (159_185_024, 3e-5, 3, "0.6b"),
    "330m": (334_349_184, 2e-5, 3, "0.6b"),
    "0.6b": (596_049_920, 1e-5, 2, "1.7b"),
    "1.7b": (1_720_574_976, 9e-6, 2, "4b"),
    "4b": (4_022_468_096, 7e-6, 2, None),
    "8b": (7_568_405_504, 6e-6, 2, None),
    "14b": (13_990_394_880, 5e-6, 2, None),
}


@pytest.fixture(scope="module")
def stages() -> dict[str, Any]:
    return {stage.name: stage for stage in load_recipe(RECIPES / "family.yaml", {"use_cpu": True}).stages}


def test_everything_a_stage_starts_from_is_made_before_it_or_on_the_hub(stages: dict[str, Any]) -> None:
    order = list(stages.values())
    states = {
        (stage.name, each.key): each.state for i, stage in enumerate(order) for each in inputs_of(stage, order[:i])
    }
    assert {state for (_, key), state in states.items() if key != "data"} == {
        "on the Hub",
        *(f"made by stage {name}" for name in ("stage1-0.6b", "stage1-1.7b", "stage1-4b", "stage1-8b", "stage1-14b")),
        *(f"made by stage {name}" for name in ("pruned-80m", "pruned-160m", "pruned-330m")),
        *(f"made by stage {name}" for name in ("stage2-0.6b", "stage2-1.7b", "stage2-4b")),
    }
    assert states["pruned-80m", "model"] == "made by stage stage1-0.6b"


@pytest.mark.parametrize("size", PUBLISHED)
def test_stage_two_has_the_published_numbers(stages: dict[str, Any], size: str) -> None:
    _, rate, epochs, teacher = PUBLISHED[size]
    args = stages[f"stage2-{size}"].arguments
    assert (args.learning_rate, args.num_train_epochs, args.global_batch_size) == (rate, epochs, 512)
    assert args.teacher == (teacher and f"runs/f2llm-v2/stage2-{teacher}/model")
    assert args.distillation_weight == 1.0


def test_each_stage_is_the_recipe_of_its_own(stages: dict[str, Any]) -> None:
    for name, stage in stages.items():
        alone = load_recipe(RECIPES / f"{name}.yaml", {"use_cpu": True}).stages[0]
        assert {**alone.keys} == {**stage.keys}


def test_the_plan_needs_no_data_no_network_and_no_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refused(*args: Any) -> None:
        raise AssertionError("the plan reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    assert main([str(RECIPES / "family.yaml"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    parameters = dict(re.findall(r"^stage stage2-(\S+): .* sources, ([\d,]+) parameters$", printed, re.MULTILINE))
    assert {size: int(count.replace(",", "")) for size, count in parameters.items()} == {
        size: published[0] for size, published in PUBLISHED.items()
    }
    assert "stage pruned-80m: cut from 596,049,920 to 80,084,288 parameters" in printed
    # 26,693,280 rows of stage 1 as published, 99 % of them in batches of 512: 51.6k steps an epoch, and the rests.
    assert re.search(r"steps +about 103,\d{3} \(51,\d{3} an epoch\)", printed)
    assert "is remote: rows as published, texts of 128 tokens" in printed
    assert re.search(r"^all 16 stages: \d\.\d\de\+22 FLOPs$", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("recipe", "words", "missing", "maker"),
    [
        ("family.yaml", ["--stage", "stage2-80m"], "model runs/f2llm-v2/pruned-80m/model", "pruned-80m"),
        ("family.yaml", ["--stage", "pruned-160m"], "model runs/f2llm-v2/stage1-0.6b/model", "stage1-0.6b"),
        ("stage2-80m.yaml", [], "model runs/f2llm-v2/pruned-80m/model", "pruned-80m"),
        ("stage2-14b.yaml", [], "model runs/f2llm-v2/stage1-14b/model", "stage1-14b"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_a_missing_input_names_the_stage_that_makes_it(
    capsys: pytest.CaptureFixture, recipe: str, words: list[str], missing: str, maker: str, dry: bool
) -> None:
    more = ["--dry-run"] if dry else ["--use_cpu", "true"]
    assert main([str(RECIPES / recipe), *words, *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{missing} is missing; stage {maker!r} makes it" in error and "run_stage.py" in error


def test_teachers_and_importance_are_looked_for_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = write_recipe(tmp_path)
    content = yaml.safe_load(recipe.read_text())
    content["stages"]["stage2"]["teacher"] = str(tmp_path / "nowhere/model")
    content["stages"]["cut"] = {"model": "stage1", "prune_to": {"hidden_size": 8}, "importance": str(tmp_path / "no")}
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    for stage, what in (("stage2", "teacher"), ("cut", "importance")):
        assert main([str(recipe), "--stage", "stage1", "--stage", stage]) == 2
        error = capsys.readouterr().err
        assert f"stage {stage!r}: {what} {tmp_path}" in error and "no stage of the recipes in" in error
    assert not (tmp_path / "run/stage1/model").exists()


def test_a_model_of_another_shape_than_its_family_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = write_recipe(tmp_path, max_steps=1, save_strategy="no", eval_strategy="no")
    assert main([str(recipe), "--stage", "stage1"]) == 0
    content = yaml.safe_load(recipe.read_text())
    content["stages"]["stage2"]["model_family"] = "f2llm-v2-80m"
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    assert main([str(recipe), "--stage", "stage2"]) == 2
    assert "is no f2llm-v2-80m: its" in capsys.readouterr().err


def test_operations_of_a_forward_pass_are_those_that_are_counted(tiny_config: F2LLMConfig) -> None:
    model, length = F2LLMModel(tiny_config).eval(), 24
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(input_ids=torch.ones(1, length, dtype=torch.long), sequence_lengths=[length])
    products = (
        2 * length * sum(weights.numel() for name, weights in model.named_parameters() if name.endswith("_proj.weight"))
    )
    formula = forward_flops(tiny_config, length, 0.0)
    # Norms are weights too, and take no product.
    assert products <= counted.get_total_flops() and products <= formula <= 1.02 * products
    attention = forward_flops(tiny_config, length, float(length**2)) - formula
    heads = tiny_config.num_attention_heads * tiny_config.head_dim
    assert attention == 4 * tiny_config.num_hidden_layers * heads * length**2


def test_a_step_costs_three_forward_passes_and_what_is_computed_again(tiny_config: F2LLMConfig) -> None:
    batches = Batches(count=1, tokens=100.0, squared_tokens=1000.0, repeated_tokens=50.0)
    forward = forward_flops(tiny_config, 100.0, 1000.0)
    assert step_flops(tiny_config, batches, False) == pytest.approx(3.5 * forward)
    assert step_flops(tiny_config, batches, True) == pytest.approx(4.5 * forward)


def test_batches_are_estimated_from_rows() -> None:
    args = (
        load_recipe(RECIPES / "stage2-80m.yaml", {"use_cpu": True, "max_tokens_per_forward": 32768}).stages[0].arguments
    )
    batches = estimate_batches(args, [SourceSizes("a", "retrieval", [1024.0], True)], 1.0)
    assert (batches.count, batches.texts, batches.tokens) == (2, 512 * 9, 512 * 9 * 128)
    assert batches.chunks == 18 and batches.most_chunk_tokens <= 32768
