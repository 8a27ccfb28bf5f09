"""Averages of models: exact, complete folders that name their parents, and nothing from models that do not match."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from modeling_f2llm import F2LLMModel
from tests.training.distributed_recipe import save_model
from tests.training.models.starts import edit_json
from training.merge import main
from training.models.merging import angle, find_parent, merge, slerp, weighted_mean

ROOT = Path(__file__).parents[3]
WEIGHTS = "model.safetensors"


@pytest.fixture
def save(tmp_path, tiny_config, tiny_tokenizer):
    """``save(name, seed=0, dtype=None, **config)``: a model's folder."""

    def save(name, seed=0, dtype=None, **config):
        save_model(tmp_path / name, tiny_config, tiny_tokenizer, seed, **{"matryoshka_dimensions": None, **config})
        if dtype is not None:
            _change(tmp_path / name, lambda weights: weights.update({k: each.to(dtype) for k, each in weights.items()}))
        return tmp_path / name

    return save


@pytest.fixture
def pair(save):
    return save("one"), save("two", seed=1)


def _merge(output, *folders, **options):
    return merge([str(folder) for folder in folders], output, **options)


def _weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _change(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def _content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_mean_is_that_of_fp64_and_of_equal_tensors_that_tensor():
    tensors, weights = [_random(7, 5, seed=seed) for seed in range(4)], [0.1, 0.2, 0.3, 0.4]
    expected = sum(weight * tensor.double() for weight, tensor in zip(weights, tensors, strict=True))
    before = [tensor.clone() for tensor in tensors]
    torch.testing.assert_close(weighted_mean(tensors, weights), expected.float(), rtol=0, atol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))
    for count in (1, 2, 3, 7):
        assert torch.equal(weighted_mean([_random(100, 100)] * count, [1 / count] * count), _random(100, 100))


def test_slerp_divides_the_angle_and_keeps_the_norm(refuses):
    start, end = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for t in (0.0, 0.25, 0.5, 1.0):
        expected = torch.tensor([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)])
        torch.testing.assert_close(slerp(start, end, t), expected)
    start, end = (torch.nn.functional.normalize(_random(9, 6, seed=seed).flatten(), dim=0) for seed in (0, 1))
    between = slerp(start, end, 0.3)
    assert between.norm().item() == pytest.approx(1, abs=1e-6)
    assert angle(start, between) == pytest.approx(0.3 * angle(start, end), abs=1e-6)
    # The angle of large tensors is summed in fp64.
    large = _random(3_000_000)
    near = large + 0.01 * _random(3_000_000, seed=1)
    expected = torch.nn.functional.cosine_similarity(large.double(), near.double(), dim=0).acos().item()
    assert angle(large, near) == pytest.approx(expected, rel=1e-7)
    with refuses("opposite", "use the mean"):
        slerp(start, -start, 0.5)
    # Where there is no angle it is the mean.
    assert torch.equal(slerp(start, start, 0.3), start)
    assert torch.equal(slerp(torch.zeros(3), torch.ones(3), 0.5), torch.full((3,), 0.5))


def test_a_soup_is_the_mean_of_its_parents_and_of_one_that_model(pair, save, tmp_path):
    _merge(tmp_path / "soup", *pair, weights=[1, 3])
    first, second, soup = map(_weights, (*pair, tmp_path / "soup"))
    assert soup.keys() == first.keys()
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, 0.25 * first[name] + 0.75 * second[name], rtol=0, atol=1e-7)
    for one in (pair[0], save("half", dtype=torch.bfloat16)):
        _merge(tmp_path / f"{one.name} soup", one)
        before, after = _content(one), _content(tmp_path / f"{one.name} soup")
        assert after.pop("merge.json") and json.loads(after.pop("config.json")).pop("merged_from")
        before.pop("config.json")
        assert after == before


def test_bf16_parents_are_averaged_in_fp32_and_rounded_to_bf16(save, tmp_path):
    folders = [save(f"m{seed}", seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    _merge(tmp_path / "soup", *folders)
    parents, soup = [_weights(folder) for folder in folders], _weights(tmp_path / "soup")
    for name, tensor in soup.items():
        expected = torch.stack([parent[name].double() for parent in parents]).mean(dim=0)
        assert tensor.dtype == torch.bfloat16
        # Only the result is rounded to bf16: fp32's own rounding decides between neighbours at ties alone.
        assert (tensor == expected.bfloat16()).float().mean() > 0.99


def test_slerp_of_models(pair, tmp_path):
    _merge(tmp_path / "start", *pair, slerp=0.0)
    _merge(tmp_path / "between", *pair, slerp=0.5)
    first, second, between = map(_weights, (*pair, tmp_path / "between"))
    for name, tensor in _weights(tmp_path / "start").items():
        torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-7)
    # Random matrices are nearly orthogonal: their mean is shorter by the root of two.
    name = "layers.0.mlp.up_proj.weight"
    assert between[name].norm().item() == pytest.approx(first[name].norm().item(), rel=0.05)
    assert ((first[name] + second[name]) / 2).norm().item() < 0.8 * first[name].norm().item()


def test_a_soup_loads_everywhere_and_names_its_ancestors(save, tmp_path, sentences):
    folders = [save(f"m{seed}", seed=seed) for seed in range(2)]
    for folder in folders:
        edit_json(folder / "config_sentence_transformers.json", prompts={"query": "Q: ", "document": ""})
    _merge(tmp_path / "soup", *folders)
    record = {"method": "mean", "parents": [{"name": "m0", "weight": 0.5}, {"name": "m1", "weight": 0.5}]}
    for loader in (F2LLMModel, AutoModel):
        assert loader.from_pretrained(tmp_path / "soup").config.merged_from == record
    stock, own = (SentenceTransformer(str(tmp_path / "soup"), trust_remote_code=each) for each in (False, True))
    assert stock.prompts["query"] == "Q: "
    assert stock.encode(sentences) == pytest.approx(own.encode(sentences), abs=1e-5)
    _merge(tmp_path / "stew", tmp_path / "soup", folders[0])
    written = {name: (tmp_path / "stew" / name).read_text() for name in ("config.json", "merge.json")}
    assert json.loads(written["config.json"])["merged_from"]["parents"][0]["merged_from"] == record
    # No private path.
    assert not [name for name, text in written.items() if str(tmp_path) in text]


def test_merging_again_changes_nothing_and_repeats_bit_for_bit_also_in_shards(pair, tmp_path, sentences):
    _merge(tmp_path / "soup", *pair)
    written = (tmp_path / "soup" / WEIGHTS).stat().st_mtime_ns
    _merge(tmp_path / "soup", *pair)
    assert (tmp_path / "soup" / WEIGHTS).stat().st_mtime_ns == written
    _merge(tmp_path / "other", *pair)
    assert _content(tmp_path / "other") == _content(tmp_path / "soup")
    _merge(tmp_path / "shards", *pair, max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    # Sharded parents, too.
    _merge(tmp_path / "of shards", tmp_path / "shards")
    whole = _weights(tmp_path / "soup")
    for folder in ("shards", "of shards"):
        weights = _weights(tmp_path / folder)
        assert whole.keys() == weights.keys() and all(torch.equal(whole[name], weights[name]) for name in whole)
    loaded = SentenceTransformer(str(tmp_path / "shards")).encode(sentences)
    assert (loaded == SentenceTransformer(str(tmp_path / "soup")).encode(sentences)).all()


def test_dtypes_are_chosen_where_they_differ(save, tmp_path, refuses):
    folders = save("one"), save("two", seed=1, dtype=torch.bfloat16)
    with refuses("one", "float32", "two", "bfloat16", "--dtype"):
        _merge(tmp_path / "soup", *folders)
    _merge(tmp_path / "soup", *folders, dtype="bfloat16")
    assert {tensor.dtype for tensor in _weights(tmp_path / "soup").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "soup" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("config", "file", "keys", "part"),
    [
        ({"hidden_size": 48}, "", {}, "config.json, hidden_size: 48 is not 32"),
        ({"matryoshka_dimensions": [32, 16]}, "", {}, "config.json, matryoshka_dimensions"),
        ({}, "config_sentence_transformers.json", {"prompts": {"query": "Q: "}}, "transformers.json, prompts"),
        ({}, "tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "tokenizer.json"),
        ({}, "1_Pooling/config.json", {"pooling_mode": "mean"}, "pooling, pooling_mode"),
    ],
)
def test_models_that_do_not_match_are_refused(save, tmp_path, refuses, config, file, keys, part):
    folders = save("one"), save("two", **config)
    if file:
        edit_json(folders[1] / file, **keys)
    with refuses("two cannot be merged with one", part):
        _merge(tmp_path / "soup", *folders)
    assert not (tmp_path / "soup").exists()


def test_faulty_weights_modules_with_weights_and_other_models_are_refused(pair, tmp_path, refuses):
    for value, part in ((torch.full((32,), 1e6), "float16"), (torch.ones(3), "two: weight norm.weight is (3,)")):
        _change(pair[1], lambda weights, value=value: weights.update({"norm.weight": value}))
        with refuses("norm.weight", part):
            _merge(tmp_path / "soup", *pair, dtype="float16")
    assert not (tmp_path / "soup").exists()
    save_file({"linear.weight": torch.ones(2, 2)}, pair[0] / "2_Normalize" / WEIGHTS)
    with refuses("module 2_Normalize has weights"):
        _merge(tmp_path / "soup", pair[0])
    edit_json(pair[1] / "config.json", model_type="bert")
    with refuses("two", "'bert'", "qwen3"):
        _merge(tmp_path / "soup", pair[1])


def test_settings_without_effect_on_embeddings_may_differ(pair, tmp_path):
    edit_json(pair[1] / "config.json", transformers_version="4.57.0", use_cache=True, auto_map={})
    tokenizer = json.loads((pair[1] / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    (pair[1] / "tokenizer.json").write_text(json.dumps(tokenizer))
    _merge(tmp_path / "soup", *pair)


def test_a_revision_on_the_hub_is_found_in_the_cache(save, tmp_path, monkeypatch, refuses):
    commit, repository = "a" * 40, tmp_path / "hub" / "models--some--model"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "step-7").write_text(commit)
    shutil.copytree(save("model"), repository / "snapshots" / commit)
    parent = find_parent("some/model@step-7")
    assert (parent.name, parent.revision) == ("some/model", commit)
    with refuses("some/model@step-8", "not to be had from the Hub"):
        find_parent("some/model@step-8")


def test_checkpoints_of_a_run_are_averaged(uninterrupted, tmp_path, capsys):
    checkpoints = sorted(map(str, uninterrupted.glob("checkpoint-*")))[-2:]
    words = [*checkpoints, "--output", str(tmp_path / "soup"), "--weights", "1", "3"]
    assert main(words) == 0 and "mean of 0.25 run/checkpoint-" in capsys.readouterr().out
    # No state of the training.
    assert not {path.suffix for path in (tmp_path / "soup").iterdir()} & {".pt", ".pth", ".bin"}
    assert main([str(uninterrupted), "--output", str(tmp_path / "model")]) == 0
    assert "1 run/model" in capsys.readouterr().out
    run, merged = _weights(uninterrupted / "model"), _weights(tmp_path / "model")
    assert all(torch.equal(tensor, merged[name]) for name, tensor in run.items())


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("{run} {run} --weights 0.5 0.3 0.2", "--weights: 3 weights for 2 models"),
        ("{run} {run} --weights 1 -1", "--weights: -1.0 is not a positive number"),
        ("{run} {run} --weights 1 nan", "--weights: nan is not a positive number"),
        ("{run} {run} {run} --slerp", "--slerp goes from one model to another, not 3"),
        ("{run} {run} --slerp 1.5", "--slerp: 1.5 does not lie between 0"),
        ("{run} --max-shard-size large", "--max-shard-size: 'large' is not a size"),
        ("{run} no/such/model", "no/such/model: no such folder"),
        ("{run} {empty}", "holds no model"),
    ],
)
def test_faulty_input_is_reported_in_one_line(uninterrupted, tmp_path, capsys, words, part):
    (tmp_path / "empty").mkdir()
    words = words.format(run=uninterrupted, empty=tmp_path / "empty").split()
    assert main([*words, "--output", str(tmp_path / "soup")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and part in error
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can reset the peak")
def test_a_merge_holds_one_shard(save, tmp_path):
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16, "head_dim": 64}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 8, "layer_types": ["full_attention"] * 16}
    small, parents = save("small"), [save(f"m{seed}", seed=seed, **shape) for seed in range(3)]
    size = (parents[0] / WEIGHTS).stat().st_size / 2**20
    assert size > 200

    def growth(name, limit):
        words = [Path(__file__).with_name("merging_worker.py"), tmp_path / name, limit, small, *parents]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return float(subprocess.check_output([sys.executable, *map(str, words)], timeout=300, env=environment))

    whole, sharded = growth("whole", "5GB"), growth("sharded", "20MB")
    assert len(list((tmp_path / "sharded").glob("model-*"))) > 10
    # A shard of the average, and a tensor of it and of a parent.
    assert sharded < 60 < 0.9 * size < whole
