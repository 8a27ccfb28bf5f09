"""The claims: every arm is a stage of the recipe, scores are what they say, and what comes out is judged by seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.training.recipes import write_recipe
from training.common.errors import UserError
from training.config.recipe import load_recipe
from training.evaluation.pairs import load_pairs
from training.examples.claims import CLAIMS, RECIPE, Outcome, compare, main, mixed_accuracy, run_seed, table
from training.models.encoding import embed_chunk


@pytest.mark.parametrize(
    ("better", "worse", "differs"),
    [
        ("student", "student_undistilled", {"teacher"}),
        ("student", "student_random", {"model", "model_config", "tokenizer"}),
        ("stage2", "stage2_alone", {"model", "model_config", "tokenizer"}),
        ("stage1", "stage1_plain", {"matryoshka", "tokenizer", "tokenizer_vocab_size"}),
        ("stage2", "stage2_raw", {"instructions", "query_instruction"}),
    ],
)
def test_the_arms_of_a_claim_differ_in_nothing_else(better, worse, differs):
    keys = {stage.name: stage.keys for stage in load_recipe(RECIPE).stages}
    found = {key for key in {*keys[better], *keys[worse]} if keys[better].get(key) != keys[worse].get(key)}
    assert found == differs | {"output_dir"}


def test_every_arm_is_a_stage_and_a_random_start_has_the_shape_of_the_pruned_one():
    stages = {stage.name: stage.arguments for stage in load_recipe(RECIPE).stages}
    assert all({claim.better, claim.worse} <= stages.keys() for claim in CLAIMS)
    shape, whole = stages["pruned"].mapping("prune_to"), stages["stage1"].mapping("model_config")
    assert stages["student_random"].mapping("model_config") == {**whole, **shape}


def test_mixed_accuracy_is_that_of_a_loop_over_rows(prepared_sources, tiny_model, tiny_config):
    torch.manual_seed(0)
    tiny_model.resize_token_embeddings(400)
    by_source = []
    for source in prepared_sources:
        wins = []
        for row in np.asarray(source.rows["validation"]):
            texts = [row[0], *(text for text in row[1:] if text >= 0)]
            with torch.no_grad():
                tokens = [torch.from_numpy(source.tokens(text).astype(np.int64))[None] for text in texts]
                vectors = torch.cat([embed_chunk(tiny_model, each, [each.shape[1]]) for each in tokens])
            cosines = torch.nn.functional.cosine_similarity(vectors[:1], vectors[1:])
            wins.append(bool((cosines[0] > cosines[1:]).all()))
        if wins:
            by_source.append(np.mean(wins))
    assert by_source and mixed_accuracy(tiny_model, prepared_sources) == pytest.approx(np.mean(by_source))
    with pytest.raises(UserError, match="raise 'validation_share'"):
        mixed_accuracy(tiny_model, [])


def test_verdicts_by_seed():
    claim = CLAIMS[0]
    assert Outcome(claim, [2.0, 3.0], [1.0, 1.0]).verdict == "shows (2 of 2 seeds)"
    assert Outcome(claim, [2.0, 0.0], [1.0, 1.0]).verdict == "undecided (1 of 2 seeds)"
    assert Outcome(claim, [0.0, 1.0], [1.0, 1.0]).verdict == "does not show (0 of 2 seeds)"


def test_the_table_gives_mean_and_deviation_of_scores_and_differences():
    arms = {name for claim in CLAIMS for name in (claim.better, claim.worse)}
    scores = {
        seed: {arm: {"held_out": seed + 10.0 * (arm == "student"), "narrow": 1.0, "mixed": 2.0} for arm in arms}
        for seed in range(3)
    }
    lines = table(compare(scores)).splitlines()
    assert len(lines) == 2 + len(CLAIMS)
    assert "| 11.0 ± 1.0 | 1.0 ± 1.0 | +10.0 ± 0.0 | shows (3 of 3 seeds) |" in lines[2]
    assert "| +0.0 ± 0.0 | does not show (0 of 3 seeds) |" in lines[4]


def test_every_arm_is_trained_and_scored(tmp_path):
    content = yaml.safe_load(RECIPE.read_text())
    tiny = yaml.safe_load(write_recipe(tmp_path).read_text())
    first = tiny["stages"]["stage1"]
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    for keys in content["stages"].values():
        for key in ("cap", "source_caps", "tokenizer_vocab_size"):
            keys.pop(key, None)
        if "prune_to" in keys:
            keys["prune_to"] = small
        if "model_config" in keys:
            keys["model_config"] = {**first["model_config"], **(small if "teacher" in keys else {})}
        if keys.get("tokenizer") == "train":
            keys["tokenizer_vocab_size"] = 400
    tiny |= {"max_steps": 2, "save_strategy": "no", "eval_strategy": "no"}
    recipe = tmp_path / "claims.yaml"
    recipe.write_text(yaml.safe_dump({**tiny, "stages": content["stages"]}, sort_keys=False))
    pairs = load_pairs(tmp_path / "data/pairs.parquet")
    scores = run_seed(recipe, 3, tmp_path / "out", Path(tiny["manifest"]), pairs)
    assert scores.keys() == content["stages"].keys()
    for claim in CLAIMS:
        assert 0 <= scores[claim.better][claim.metric] <= 100
    assert run_seed(recipe, 3, tmp_path / "out", Path(tiny["manifest"]), pairs) == scores


def test_no_seed_is_refused(capsys):
    assert main(["--seeds", "0"]) == 2
    assert "--seeds and --processes must be at least 1" in capsys.readouterr().err


def test_a_recipe_without_the_arms_is_refused_before_anything_is_trained(tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["--recipe", str(write_recipe(tmp_path)), "--output", str(output)]) == 2
    assert "lacks the stages stage1_plain, stage2_alone" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.slow
def test_all_claims_are_reported_on_real_data(tmp_path):
    assert main(["--seeds", "1", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "claims.json").read_text())
    assert [each["claim"]["statement"] for each in result["claims"]] == [claim.statement for claim in CLAIMS]
