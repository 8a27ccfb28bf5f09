from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from modeling_f2llm import F2LLMModel
from training.models.merging import merging
from training.models.merging.merging import merge
from training.models.merging.method import mean_of, slerp_of
from training.models.merging.parents import find_parent
from training.models.tokenizer import train_tokenizer


def _merge(output: Path, *folders: Path, method=None, **options) -> dict:
    return merge([find_parent(str(folder)) for folder in folders], method or mean_of(len(folders)), output, **options)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_soup_is_the_mean_of_its_parents(save_model, tmp_path):
    one, two = save_model("one", seed=0), save_model("two", seed=1)
    _merge(tmp_path / "soup", one, two, method=mean_of(2, [1, 3]))
    first, second, soup = _weights(one), _weights(two), _weights(tmp_path / "soup")
    assert soup.keys() == first.keys()
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, 0.25 * first[name] + 0.75 * second[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_soup_of_one_is_the_identity(save_model, tmp_path, dtype):
    one = save_model("one", dtype=dtype)
    _merge(tmp_path / "soup", one)
    before, after = _content(one), _content(tmp_path / "soup")
    assert after.pop("merge.json")
    assert json.loads(after.pop("config.json")).pop("merged_from")
    before.pop("config.json")
    assert after == before


def test_bf16_parents_are_averaged_in_fp32_and_rounded_to_bf16(save_model, tmp_path):
    folders = [save_model(f"m{seed}", seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    _merge(tmp_path / "soup", *folders)
    parents, soup = [_weights(folder) for folder in folders], _weights(tmp_path / "soup")
    for name, tensor in soup.items():
        expected = torch.stack([parent[name].double() for parent in parents]).mean(dim=0)
        assert tensor.dtype == torch.bfloat16
        # Nothing is rounded to bf16 but the result: fp32's own rounding decides between neighbours at ties alone.
        assert (tensor == expected.bfloat16()).float().mean() > 0.99


def test_slerp_of_models(save_model, tmp_path):
    one, two = save_model("one", seed=0), save_model("two", seed=1)
    _merge(tmp_path / "start", one, two, method=slerp_of(2, 0.0))
    _merge(tmp_path / "between", one, two, method=slerp_of(2, 0.5))
    first, second, between = _weights(one), _weights(two), _weights(tmp_path / "between")
    for name, tensor in _weights(tmp_path / "start").items():
        torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-7)
    # Random matrices are nearly orthogonal: their mean is shorter by the root of two.
    name = "layers.0.mlp.up_proj.weight"
    assert between[name].norm().item() == pytest.approx(first[name].norm().item(), rel=0.05)
    assert ((first[name] + second[name]) / 2).norm().item() < 0.8 * first[name].norm().item()


def test_a_soup_loads_everywhere_and_says_where_it_comes_from(save_model, tmp_path, sentences):
    folders = [save_model(f"m{seed}", seed=seed, prompts={"query": "Q: ", "document": ""}) for seed in range(2)]
    _merge(tmp_path / "soup", *folders)
    expected = F2LLMModel.from_pretrained(tmp_path / "soup")
    told = {"method": "mean", "parents": [{"name": "m0", "weight": 0.5}, {"name": "m1", "weight": 0.5}]}
    assert expected.config.merged_from == told
    assert AutoModel.from_pretrained(tmp_path / "soup").config.merged_from == told
    stock = SentenceTransformer(str(tmp_path / "soup"))
    own = SentenceTransformer(str(tmp_path / "soup"), trust_remote_code=True)
    assert stock.prompts["query"] == "Q: "
    torch.testing.assert_close(
        torch.tensor(stock.encode(sentences)), torch.tensor(own.encode(sentences)), rtol=0, atol=1e-5
    )
    stock.save_pretrained(str(tmp_path / "again"), create_model_card=False)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["merged_from"] == told


def test_a_soup_of_soups_names_all_ancestors(save_model, tmp_path):
    _merge(tmp_path / "soup", save_model("one"), save_model("two", seed=1))
    _merge(tmp_path / "stew", tmp_path / "soup", save_model("three", seed=2))
    parents = json.loads((tmp_path / "stew" / "config.json").read_text())["merged_from"]["parents"]
    assert [each["name"] for each in parents[0]["merged_from"]["parents"]] == ["one", "two"]


def test_no_private_path_is_told(save_model, tmp_path):
    _merge(tmp_path / "soup", save_model("one"), save_model("two", seed=1))
    for name in ("config.json", "merge.json"):
        assert str(tmp_path) not in (tmp_path / "soup" / name).read_text()


def test_the_same_again_changes_nothing_and_anew_gives_the_same_bytes(save_model, tmp_path):
    folders = save_model("one"), save_model("two", seed=1)
    _merge(tmp_path / "soup", *folders)
    written = (tmp_path / "soup" / "model.safetensors").stat().st_mtime_ns
    _merge(tmp_path / "soup", *folders)
    assert (tmp_path / "soup" / "model.safetensors").stat().st_mtime_ns == written
    _merge(tmp_path / "other", *folders)
    assert _content(tmp_path / "other") == _content(tmp_path / "soup")


def test_shards_hold_the_same_weights(save_model, tmp_path, sentences):
    folders = save_model("one"), save_model("two", seed=1)
    _merge(tmp_path / "soup", *folders)
    _merge(tmp_path / "shards", *folders, max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    whole, shards = _weights(tmp_path / "soup"), _weights(tmp_path / "shards")
    assert whole.keys() == shards.keys() and all(torch.equal(whole[name], shards[name]) for name in whole)
    # Sharded parents, too.
    _merge(tmp_path / "of shards", tmp_path / "shards")
    assert all(torch.equal(tensor, shards[name]) for name, tensor in _weights(tmp_path / "of shards").items())
    loaded = SentenceTransformer(str(tmp_path / "shards")).encode(sentences)
    assert (loaded == SentenceTransformer(str(tmp_path / "soup")).encode(sentences)).all()


def test_an_interrupted_merge_leaves_nothing_and_the_next_one_completes(save_model, tmp_path, monkeypatch):
    folders = save_model("one"), save_model("two", seed=1)

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(merging, "write_average", full_disk)
        _merge(tmp_path / "soup", *folders)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    # A killed process tidies nothing up.
    (tmp_path / ".soup.partial").mkdir()
    (tmp_path / ".soup.partial" / "stale").touch()
    _merge(tmp_path / "soup", *folders)
    assert not (tmp_path / ".soup.partial").exists() and not (tmp_path / "soup" / "stale").exists()


def test_an_output_that_holds_something_else_is_refused(save_model, tmp_path, refuses):
    folders = save_model("one"), save_model("two", seed=1)
    before = _content(folders[0])
    with refuses("one", "is read; give another --output"):
        _merge(folders[0], *folders)
    assert _content(folders[0]) == before
    _merge(tmp_path / "soup", *folders)
    with refuses("soup", "holds something else"):
        _merge(tmp_path / "soup", *folders, method=mean_of(2, [1, 2]))


def test_float64_is_not_rounded_without_a_word(save_model, tmp_path, refuses):
    one = save_model("one", dtype=torch.float64)
    with refuses("float64", "--dtype"):
        _merge(tmp_path / "soup", one)
    _merge(tmp_path / "soup", one, dtype=torch.float32)


def test_parents_of_other_dtypes_need_a_word(save_model, tmp_path, refuses):
    folders = save_model("one"), save_model("two", seed=1, dtype=torch.bfloat16)
    with refuses("one", "float32", "two", "bfloat16", "--dtype"):
        _merge(tmp_path / "soup", *folders)
    _merge(tmp_path / "soup", *folders, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in _weights(tmp_path / "soup").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "soup" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(save_model, tmp_path, refuses, value):
    folders = save_model("one"), save_model("two", seed=1)
    weights = load_file(folders[1] / "model.safetensors")
    weights["norm.weight"][3] = value
    save_file(weights, folders[1] / "model.safetensors", metadata={"format": "pt"})
    with refuses("two", "norm.weight", "NaN or infinite"):
        _merge(tmp_path / "soup", *folders)
    assert not (tmp_path / "soup").exists()


def test_an_average_too_large_for_its_dtype_is_refused(save_model, tmp_path, refuses):
    one = save_model("one")
    weights = load_file(one / "model.safetensors")
    weights["norm.weight"][3] = 1e6
    save_file(weights, one / "model.safetensors", metadata={"format": "pt"})
    with refuses("norm.weight", "float16", "--dtype"):
        _merge(tmp_path / "soup", one, dtype=torch.float16)


def test_slerp_of_opposite_weights_is_refused(save_model, tmp_path, refuses):
    folders = save_model("one"), save_model("two")
    weights = load_file(folders[1] / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, folders[1] / "model.safetensors")
    with refuses("one and two", "opposite", "use the mean"):
        _merge(tmp_path / "soup", *folders, method=slerp_of(2, 0.5))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"hidden_size": 48}, ["config.json", "hidden_size", "(48, not 32)"]),
        ({"num_hidden_layers": 3}, ["config.json", "layer_types"]),
        ({"vocab_size": 330}, ["config.json", "vocab_size"]),
        ({"rms_norm_eps": 1e-5}, ["config.json", "rms_norm_eps"]),
        ({"matryoshka_dimensions": [32, 16]}, ["config.json", "matryoshka_dimensions"]),
        ({"prompts": {"query": "Other: ", "document": ""}}, ["config_sentence_transformers.json", "prompts"]),
    ],
)
def test_models_that_do_not_match_are_refused(save_model, tmp_path, refuses, change, parts):
    folders = save_model("one"), save_model("two", **change)
    with refuses("two cannot be merged with one", *parts):
        _merge(tmp_path / "soup", *folders)
    assert not (tmp_path / "soup").exists()


def test_another_tokenizer_is_refused(save_model, tmp_path, refuses, sentences):
    other = train_tokenizer(iter(sentences[:5]), vocab_size=280)
    with refuses("two cannot be merged with one", "tokenizer.json"):
        _merge(tmp_path / "soup", save_model("one"), save_model("two", tokenizer=other))


def _edit(path: Path, **keys) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_another_pooling_is_refused(save_model, tmp_path, refuses):
    folders = save_model("one"), save_model("two")
    _edit(folders[1] / "1_Pooling" / "config.json", pooling_mode="mean")
    with refuses("two", "Pooling", "pooling_mode"):
        _merge(tmp_path / "soup", *folders)


def test_what_shapes_nothing_may_differ(save_model, tmp_path):
    folders = save_model("one"), save_model("two", seed=1)
    _edit(folders[1] / "config.json", transformers_version="4.57.0", use_cache=True, auto_map={})
    tokenizer = json.loads((folders[1] / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    (folders[1] / "tokenizer.json").write_text(json.dumps(tokenizer))
    _merge(tmp_path / "soup", *folders)


def test_missing_and_extra_tensors_are_refused(save_model, tmp_path, refuses):
    folders = save_model("one"), save_model("two")
    weights = load_file(folders[1] / "model.safetensors")
    save_file({key: value for key, value in weights.items() if key != "norm.weight"}, folders[1] / "model.safetensors")
    with refuses("two lacks the tensor norm.weight"):
        _merge(tmp_path / "soup", *folders)
    with refuses("two lacks the tensor norm.weight"):
        _merge(tmp_path / "soup", *reversed(folders))
    save_file({**weights, "norm.weight": torch.ones(3)}, folders[1] / "model.safetensors")
    with refuses("two: norm.weight has the shape (3,), not (32,)"):
        _merge(tmp_path / "soup", *folders)


def test_a_module_with_weights_of_its_own_is_refused(save_model, tmp_path, refuses):
    one = save_model("one")
    save_file({"linear.weight": torch.ones(2, 2)}, one / "2_Normalize" / "model.safetensors")
    with refuses("2_Normalize", "weights of its own"):
        _merge(tmp_path / "soup", one)


def test_other_architectures_are_refused(save_model, tmp_path, refuses):
    one = save_model("one")
    _edit(one / "config.json", model_type="bert")
    with refuses("one", "'bert'", "qwen3"):
        _merge(tmp_path / "soup", one)
