"""The claims: every arm is a stage of the recipe, scores are what they say, and what comes out is judged by seed."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch.nn.functional import normalize as unit

from tests.training.recipes import write_recipe
from training.common.errors import UserError
from training.common.keyed import text_key
from training.config.recipe import load_recipe
from training.data.cleaning.normalise import normalise
from training.data.instructions import without_instruction
from training.data.manifest import Source
from training.data.preparation.pipeline import prepare
from training.data.preparation.plan import PreparationOptions
from training.evaluation.pairs import load_pairs
from training.examples import claims
from training.examples.claims import (
    CLAIMS,
    RECIPE,
    depths,
    main,
    own_hits,
    run_arm,
    score,
    shared_hits,
    steps_of,
    table,
    verdict,
)
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
    # Where prepared data lies changes nothing.
    assert found - {"output_dir", "prepared_dir"} == differs
    # A random start has the shape of the pruned one.
    stages = {stage.name: stage.arguments for stage in load_recipe(RECIPE).stages}
    shape, whole = stages["pruned"].mapping("prune_to"), stages["stage1"].mapping("model_config")
    assert stages["student_random"].mapping("model_config") == {**whole, **shape}


def test_a_stage_runs_after_those_whose_model_data_or_steps_it_needs():
    found = depths(load_recipe(RECIPE).stages)
    levels = [sorted(name for name in found if found[name] == depth) for depth in range(3)]
    assert levels == [
        ["stage1"],
        ["pruned", "stage1_plain", "stage2", "stage2_raw"],
        ["stage2_alone", "student", "student_random", "student_undistilled"],
    ]


def _embedded(model, source, text):
    with torch.no_grad():
        tokens = torch.from_numpy(source.tokens(text).astype(np.int64))[None]
        return unit(embed_chunk(model, tokens, [tokens.shape[1]])[0], dim=0)


def test_hits_among_own_candidates_are_those_of_a_loop_over_rows(prepared_sources, tiny_model):
    torch.manual_seed(0)
    tiny_model.resize_token_embeddings(400)
    expected = []
    for source in prepared_sources:
        wins = []
        for row in np.asarray(source.rows["validation"]):
            query, passage, *negatives = (_embedded(tiny_model, source, text) for text in row if text >= 0)
            wins.append(all(query @ passage > query @ negative for negative in negatives))
        expected += [wins] if wins else []
    found = own_hits(tiny_model, prepared_sources)
    assert expected and [hits.tolist() for hits in found] == expected
    with pytest.raises(UserError, match="raise 'validation_share'"):
        own_hits(tiny_model, [])


def test_hits_among_shared_candidates_are_those_of_a_loop_over_texts(tmp_path, small_tokenizer, tiny_model):
    torch.manual_seed(0)
    tiny_model.resize_token_embeddings(400)
    sources, answers = [], {"english": lambda i: f"river {i}", "money": lambda i: f"River {i % 7}"}
    for name, answer in answers.items():
        # Every query has two passages, and all sources have the same queries.
        rows = {"query": [f"name {i // 2}" for i in range(40)], "passage": [answer(i) for i in range(40)]}
        pq.write_table(pa.table({**rows, "negative_1": ["orbit"] * 40}), tmp_path / f"{name}.parquet")
        sources.append(Source(name, [tmp_path / f"{name}.parquet"], "retrieval", f"Retrieve {name}.", symmetric=True))
    negatives = (("retrieval", 1), ("clustering", 1), ("classification", 1))
    options = PreparationOptions(validation_share=0.5, num_hard_negatives=negatives, text_forms=True, keep_texts=True)
    prepared = prepare(sources, small_tokenizer, tmp_path / "prepared", options)
    # Of each text, in lower case and without its instruction, the shortest spelling.
    candidates = {}
    for source in prepared:
        for text in np.unique(np.concatenate([rows[:, 1] for rows in source.rows.values()])):
            (words,), length = source.texts(np.array([text])), len(source.tokens(text))
            key = normalise(without_instruction(words))
            if key not in candidates or length < candidates[key][0]:
                candidates[key] = length, _embedded(tiny_model, source, text)
    assert len(candidates) == 40
    for source, found in zip(prepared, shared_hits(tiny_model, prepared), strict=True):
        right, vectors = defaultdict(set), {}
        for query, passage in np.asarray(source.rows["validation"])[:, :2]:
            words = source.texts(np.array([query, passage]))
            asked, answer = (normalise(without_instruction(each)) for each in words)
            right[asked].add(answer)
            vectors[asked] = _embedded(tiny_model, source, query)
        best = {asked: max(candidates, key=lambda each: vectors[asked] @ candidates[each][1]) for asked in right}
        # In an order that instructions do not change.
        assert found.tolist() == [best[asked] in right[asked] for asked in sorted(right, key=text_key)]


def test_tasks_are_compared_by_texts_in_any_spelling(prepared_sources, tiny_model, refuses):
    for sources in ([], prepared_sources):
        with refuses("cldr_territory_currency", "mask_duplicates: true"):
            shared_hits(tiny_model, sources)


def test_a_claim_is_shown_where_examples_and_seeds_agree():
    gain = np.array([0.02, 0.03, 0.025])
    assert verdict(0.001, gain) == (pytest.approx(0.0124, abs=1e-4), "shown")
    assert verdict(0.001, -gain)[1] == "contradicted"
    assert verdict(0.2, gain)[1] == verdict(0.001, gain - 0.02)[1] == "not shown"
    # One seed says nothing of others.
    assert verdict(0.001, gain[:1]) == (np.inf, "not shown")


def test_the_table_gives_means_deviations_both_intervals_and_the_verdict():
    arms = {name for claim in CLAIMS for name in (claim.better, claim.worse)}
    rng = np.random.default_rng(0)

    def hits(share):
        return [rng.permutation(400) < 400 * share, np.array([True, False])]

    found = {
        seed: {
            arm: {"held_out": hits(0.6 if arm in ("student", "stage2_alone") else 0.2), "narrow": hits(0.5)}
            | dict.fromkeys(("shared", "own"), hits(0.5))
            for arm in arms
        }
        for seed in range(3)
    }
    lines = table(found).splitlines()
    assert len(lines) == 2 + len(CLAIMS) and "95 % over 3 seeds" in lines[0]
    # Two groups of equal weight: 60 and 50 percent, 20 and 50.
    cells = lines[2].strip("| ").split(" | ")
    assert cells[1:4] == ["55.0 ± 0.0", "35.0 ± 0.0", "+20.0 ± 0.0"] and cells[5:] == ["+20.0 to +20.0", "shown"]
    low, high = map(float, cells[4].split(" to "))
    assert 10 < low < 20 < high < 30
    assert [line.rsplit("| ", 1)[1] for line in lines[4:6]] == ["contradicted |", "not shown |"]
    one = table({0: found[0]})
    assert "| – | not shown |" in one and "±" in one


def test_every_arm_is_trained_and_scored_and_a_recipe_without_them_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(claims, "TASKS", ("tiny_retrieval",))
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
    tiny |= {"save_strategy": "no", "eval_strategy": "no", "mask_duplicates": True, "global_batch_size": 40}
    recipe = tmp_path / "claims.yaml"
    recipe.write_text(yaml.safe_dump({**tiny, "stages": content["stages"]}, sort_keys=False))
    pairs = load_pairs(tmp_path / "data/pairs.parquet")
    work = (tmp_path / "out", Path(tiny["manifest"]), pairs)
    # Whatever runs beside a stage, it finds what it needs.
    order = depths(load_recipe(recipe).stages)
    names = sorted(content["stages"], key=lambda name: (order[name], name), reverse=True)
    found = {name: run_arm(recipe, 3, name, *work) for name in sorted(names, key=order.get)}
    assert len(table({3: found}).splitlines()) == 2 + len(CLAIMS)
    again = {name: run_arm(recipe, 3, name, *work) for name in found}
    for claim in CLAIMS:
        hits = found[claim.better][claim.metric]
        assert 0 <= score(hits) <= 100 and all(map(np.array_equal, hits, again[claim.better][claim.metric]))
    # Stage 2 alone has the steps of both stages.
    steps = yaml.safe_load((tmp_path / "out/seed-3/stage2_alone/recipe.yaml").read_text())["max_steps"]
    stages = {stage.name: stage for stage in load_recipe(recipe, {"output_dir": str(tmp_path / "out/seed-3")}).stages}
    assert steps == sum(steps_of(stages[name]) for name in ("stage1", "stage2")) == 2 * 2 + 2 * 6
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
