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
from training.examples.claims import CLAIMS, RECIPE, main, mixed_accuracy, run_seed, table
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
    # A random start has the shape of the pruned one.
    stages = {stage.name: stage.arguments for stage in load_recipe(RECIPE).stages}
    shape, whole = stages["pruned"].mapping("prune_to"), stages["stage1"].mapping("model_config")
    assert stages["student_random"].mapping("model_config") == {**whole, **shape}


def test_mixed_accuracy_is_that_of_a_loop_over_rows(prepared_sources, tiny_model):
    torch.manual_seed(0)
    tiny_model.resize_token_embeddings(400)
    by_source = []
    for source in prepared_sources:
        wins = []
        for row in np.asarray(source.rows["validation"]):
            tokens = [torch.from_numpy(source.tokens(text).astype(np.int64))[None] for text in row if text >= 0]
            with torch.no_grad():
                vectors = torch.cat([embed_chunk(tiny_model, each, [each.shape[1]]) for each in tokens])
            cosines = torch.nn.functional.cosine_similarity(vectors[:1], vectors[1:])
            wins.append(bool((cosines[0] > cosines[1:]).all()))
        by_source += [np.mean(wins)] if wins else []
    assert by_source and mixed_accuracy(tiny_model, prepared_sources) == pytest.approx(np.mean(by_source))
    with pytest.raises(UserError, match="raise 'validation_share'"):
        mixed_accuracy(tiny_model, [])


def test_the_table_gives_means_deviations_and_whether_a_claim_holds_in_every_seed():
    arms = {name for claim in CLAIMS for name in (claim.better, claim.worse)}
    scores = {
        seed: {arm: {"held_out": seed + 10.0 * (arm == "student"), "narrow": 1.0, "mixed": 2.0} for arm in arms}
        for seed in range(3)
    }
    scores[2]["stage1"]["narrow"] = 1.5
    lines = table(scores).splitlines()
    assert len(lines) == 2 + len(CLAIMS)
    assert lines[2].endswith("| 11.0 ± 1.0 | 1.0 ± 1.0 | +10.0 ± 0.0 | yes (3 of 3 seeds) |")
    assert lines[4].endswith("| +0.0 ± 0.0 | no (0 of 3 seeds) |")
    assert lines[5].endswith("| +0.2 ± 0.3 | undecided (1 of 3 seeds) |")


def test_every_arm_is_trained_and_scored_and_a_recipe_without_them_refused(tmp_path, capsys):
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
    capsys.readouterr()
    output = tmp_path / "other"
    assert main(["--seeds", "0"]) == 2 and "--seeds must be at least 1" in capsys.readouterr().err
    assert main(["--recipe", str(write_recipe(tmp_path)), "--output", str(output)]) == 2
    assert "lacks the stages stage1_plain, stage2_alone" in capsys.readouterr().err and not output.exists()


@pytest.mark.slow
def test_all_claims_are_reported_on_real_data(tmp_path):
    assert main(["--seeds", "1", "--output", str(tmp_path)]) == 0
    scores, table = json.loads((tmp_path / "claims.json").read_text()), (tmp_path / "claims.md").read_text()
    assert scores.keys() == {"0"} and all(claim.statement in table for claim in CLAIMS)
