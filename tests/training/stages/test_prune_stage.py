"""A stage that prunes: what it leaves, that it is found again, and that later stages and stock libraries load it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, Qwen3Model

from modeling_f2llm import F2LLMConfig
from tests.training.recipes import error_of, write_recipe
from training.data.prepared import PreparedSource
from training.run_stage import main

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}


def numbers(ranges):
    """Read what a plan writes as ``0-2 7``."""
    ends = [[int(end) for end in each.split("-")] for each in str(ranges).split()]
    return [number for first, *last in ends for number in range(first, (last or [first])[0] + 1)]


def write_pruning(folder, **keys):
    """The two-stage recipe with a pruning of stage 1 and a stage that trains what is left."""
    pruned = {"model": "stage1", "prune_to": SHAPE, "calibration_texts": 40, **keys}
    more = {"pruned": pruned, "student": {"model": "pruned", "teacher": "stage2"}}
    return write_recipe(folder, more, max_steps=2, save_strategy="no", eval_strategy="no")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder in which all four stages ran."""
    folder = tmp_path_factory.mktemp("pruning")
    assert main([str(write_pruning(folder))]) == 0
    return folder / "run"


def test_a_pruned_model_loads_as_stock_qwen3(run):
    config = F2LLMConfig.from_pretrained(run / "pruned/model")
    assert {name: getattr(config, name) for name in SHAPE} == SHAPE
    assert len(config.layer_types) == config.max_window_layers == 1
    stock = AutoModel.from_pretrained(run / "pruned/model")
    assert type(stock) is Qwen3Model
    text = "the red river"
    expected = SentenceTransformer(str(run / "pruned/model")).encode(text)
    packed = SentenceTransformer(str(run / "pruned/model"), trust_remote_code=True).encode(text)
    np.testing.assert_allclose(packed, expected, atol=1e-6)


def test_weights_are_those_that_the_plan_names_and_are_trained_on(run, capsys):
    plan = yaml.safe_load((run / "pruned/pruning.yaml").read_text())
    whole, cut = (load_file(run / stage / "model/model.safetensors") for stage in ("stage1", "pruned"))
    hidden, neurons = (torch.tensor(numbers(each)) for each in (plan["hidden"], plan["neurons"][0]))
    assert torch.equal(cut["embed_tokens.weight"], whole["embed_tokens.weight"][:, hidden])
    name = f"layers.{numbers(plan['layers'])[0]}.mlp.up_proj.weight"
    assert torch.equal(cut["layers.0.mlp.up_proj.weight"], whole[name][neurons][:, hidden])
    # What a stage trains of it.
    assert SentenceTransformer(str(run / "student/model")).get_embedding_dimension() == 16
    assert json.loads((run / "student/data.json").read_text())
    # It is not repeated.
    words, model = [str(run.parent / "recipe.yaml"), "--stage", "pruned"], run / "pruned/model/model.safetensors"
    before = model.stat().st_mtime_ns
    assert "add --resume" in error_of(words, capsys)
    assert main([*words, "--resume"]) == 0 and model.stat().st_mtime_ns == before


def test_what_was_measured_serves_another_cut_and_the_log_says_how_channels_are_chosen(run, tmp_path, caplog):
    caplog.set_level("INFO", logger="training")
    # No data is needed any more.
    keys = {"importance": str(run / "pruned"), "prune_to": {"hidden_size": 8}, "manifest": "no-such-file.yaml"}
    recipe = write_pruning(tmp_path, model=str(run / "stage1/model"), **keys)
    assert main([str(recipe), "--stage", "pruned", "--eval_steps", "5"]) == 0
    assert "stage 'pruned': key 'eval_steps' has no effect" in caplog.text
    folder = tmp_path / "run/pruned"
    assert not (folder / "importance.safetensors").exists() and not (folder / "prepared").exists()
    wide, narrow = (yaml.safe_load((each / "pruning.yaml").read_text()) for each in (run / "pruned", folder))
    assert "prune_hidden: leading, it was trained with matryoshka" in caplog.text
    assert wide["hidden"] == "0-15" and narrow["hidden"] == "0-7"
    # The published choice is one key away.
    words = ["--stage", "pruned", "--prune_hidden", "published", "--output_dir", str(tmp_path / "other")]
    assert main([str(recipe), *words]) == 0 and "prune_hidden: published, as its key says" in caplog.text
    published = yaml.safe_load((tmp_path / "other/pruned/pruning.yaml").read_text())
    assert published["methods"]["hidden"] == "published" and published["hidden"] != "0-7"
    assert narrow["layers"] == "0-1" and [len(numbers(each["hidden"])) for each in (narrow, wide)] == [8, 16]


def test_the_vocabulary_is_trimmed_to_the_sources(run, tmp_path):
    few = {"task_types": ["retrieval"], "instructions": False, "cap": 8, "validation_share": 0.0}
    recipe = write_pruning(tmp_path, model=str(run / "stage1/model"), prune_to=None, trim_vocabulary=True, **few)
    assert main([str(recipe), "--stage", "pruned"]) == 0
    folder = tmp_path / "run/pruned"
    report = json.loads((folder / "vocabulary.json").read_text())
    assert report["tokens_after"] < report["tokens_before"]
    used = next(PreparedSource(path.parent) for path in folder.glob("prepared/*/source.json"))
    tokenizer = SentenceTransformer(str(run / "stage1/model")).tokenizer
    texts = [tokenizer.decode(used.tokens(text)[:-1]) for text in range(used.description["texts"])]
    whole, trimmed = (SentenceTransformer(str(each)) for each in (run / "stage1/model", folder / "model"))
    np.testing.assert_array_equal(trimmed.encode(texts), whole.encode(texts))
    assert trimmed.tokenizer.decode(trimmed.tokenizer("größer 東京 🙂").input_ids[:-1]) == "größer 東京 🙂"


def test_a_budget_chooses_the_shape_and_again_the_same(run, tmp_path, caplog, capsys):
    caplog.set_level("INFO", logger="training")
    keys = {"model": str(run / "stage1/model"), "prune_to": {"max_megabytes": 0.03, "dtype": "float16"}}
    recipe = write_pruning(tmp_path, **keys)
    words = [str(recipe), "--stage", "pruned"]
    assert main([*words, "--dry-run"]) == 0
    assert "  budget       0.03 MB in float16; taken here: " in (plan := capsys.readouterr().out)
    assert main(words) == 0
    searched = yaml.safe_load((tmp_path / "run/pruned/pruning_search.yaml").read_text())
    tried = [searched["chosen"], *searched["rejected"]]
    assert f"  shapes       {len(tried)} of " in plan
    assert [each["loss"] for each in tried] == sorted(each["loss"] for each in tried)
    assert "shapes of 0.03 MB in float16:" in caplog.text and "chosen" in caplog.text
    model = SentenceTransformer(str(tmp_path / "run/pruned/model"))[0].model
    config = model.config
    assert {name: getattr(config, name) for name in SHAPE} == {name: searched["chosen"][name] for name in SHAPE}
    assert sum(weight.numel() for weight in model.parameters()) == searched["chosen"]["parameters"]
    model.half().save_pretrained(tmp_path / "half")
    assert (tmp_path / "half/model.safetensors").stat().st_size <= 30_000
    # What was measured serves again, with any choice of channels; published ones make another model.
    for name, more in {"again": {}, "other": {"prune_hidden": "published"}}.items():
        again = write_pruning(tmp_path / name, **keys, **more, importance=str(tmp_path / "run/pruned"))
        assert main([str(again), "--stage", "pruned"]) == 0
    weights = [load_file(tmp_path / each / "pruned/model/model.safetensors") for each in ("run", "again/run")]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert searched == yaml.safe_load((tmp_path / "again/run/pruned/pruning_search.yaml").read_text())
    assert searched != yaml.safe_load((tmp_path / "other/run/pruned/pruning_search.yaml").read_text())
    assert main([*words, "--resume"]) == 0


def test_a_budget_may_cut_the_vocabulary(run, tmp_path, capsys):
    keys = {"trim_vocabulary": True, "prune_hidden": "reordered", "prune_to": {"max_parameters": "12K"}}
    recipe = write_pruning(tmp_path, model=str(run / "stage1/model"), **keys)
    assert main([str(recipe), "--stage", "pruned", "--dry-run"]) == 0
    assert "12,000 parameters" in capsys.readouterr().out
    assert main([str(recipe), "--stage", "pruned"]) == 0
    folder = tmp_path / "run/pruned"
    searched = yaml.safe_load((folder / "pruning_search.yaml").read_text())
    assert len({each["vocab_size"] for each in searched["rejected"]}) > 1
    model = SentenceTransformer(str(folder / "model"))
    assert len(model.tokenizer) == searched["chosen"]["vocab_size"] == model[0].model.config.vocab_size
    assert json.loads((folder / "vocabulary.json").read_text())["parameters_after"] == searched["chosen"]["parameters"]
    # The next stage trains it, with a teacher that reads other tokens.
    assert main([str(recipe), "--stage", "student", "--teacher", str(run / "stage2/model")]) == 0


def test_a_full_disk_leaves_no_model(run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SentenceTransformer, "save_pretrained", full)
    recipe = write_pruning(tmp_path, model=str(run / "stage1/model"))
    assert main([str(recipe), "--stage", "pruned"]) == 1
    assert not (tmp_path / "run/pruned/model").exists()
    monkeypatch.undo()
    assert main([str(recipe), "--stage", "pruned"]) == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prune_to": {"hidden_size": 64}}, "hidden_size 64 is more than the 32"),
        ({"prune_to": {"hidden_size": 18}}, "no multiple of the 4 attention heads"),
        ({"importance": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"prune_to": {"max_parameters": "2X"}}, "max_parameters must be a number such as 20M"),
        ({"prune_to": {"max_parameters": 300}}, "below the smallest possible shape"),
        ({"prune_to": {"max_parameters": 300}, "trim_vocabulary": True}, "below the smallest possible shape"),
        ({"model": "RUN/stage2/model", "importance": "RUN/pruned"}, "measure this model"),
    ],
)
def test_bad_keys_are_named(run, tmp_path, capsys, keys, message):
    keys = {key: value.replace("RUN", str(run)) if isinstance(value, str) else value for key, value in keys.items()}
    recipe = write_pruning(tmp_path, **{"model": str(run / "stage1/model"), **keys})
    assert message in error_of([recipe, "--stage", "pruned"], capsys)
