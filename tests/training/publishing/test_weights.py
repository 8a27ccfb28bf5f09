"""Released weights are the run's own, in the dtype and the shards asked for."""

from __future__ import annotations

import json
import threading
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modeling_f2llm.modeling_f2llm import F2LLMModel
from training.publishing.model_files import copy_weights, read_weights


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A folder with a model's weights in one file."""
    tiny_model.save_pretrained(tmp_path / "saved")
    (tmp_path / "target").mkdir()
    return tmp_path / "saved"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_copied_or_rounded_to_the_nearest(saved, tmp_path, tiny_model, dtype):
    # Nothing but the weights goes along.
    save_file(load_file(saved / "model.safetensors"), saved / "model.safetensors", {"format": "pt", "by": "alice@host"})
    weights = read_weights(saved, tiny_model.config)
    copy_weights(weights, tmp_path / "target", dtype)
    assert weights.dtype == "float32" and weights.parameters == tiny_model.num_parameters()
    (file,) = (tmp_path / "target").iterdir()
    copied, expected = load_file(file), dict(tiny_model.named_parameters())
    assert copied.keys() == expected.keys() and file.name == "model.safetensors"
    assert all(torch.equal(copied[name], expected[name].to(getattr(torch, dtype))) for name in expected)
    with safe_open(file, "pt") as stored:
        assert stored.metadata() == {"format": "pt"}


def test_shards_are_small_and_load_as_one_model(saved, tmp_path, tiny_model, random_batch):
    target = tmp_path / "target"
    copy_weights(read_weights(saved, tiny_model.config), target, "float32", "20KB")
    tiny_model.config.save_pretrained(target)
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(target / file)
        assert len(tensors) == 1 or sum(each.nbytes for each in tensors.values()) <= 20_000
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in tiny_model.parameters())
    batch = random_batch([5, 9])
    loaded = F2LLMModel.from_pretrained(target, dtype=torch.float32).eval()
    assert torch.equal(loaded(**batch).last_hidden_state, tiny_model(**batch).last_hidden_state)
    # Shards are read as they are written.
    again = read_weights(target, tiny_model.config)
    assert again.parameters == tiny_model.num_parameters() and set(again.files.values()) == set(files)


def test_no_more_than_a_shard_is_held(saved, tmp_path, tiny_model, monkeypatch):
    alive, most, total = [], 0, 0

    def save(tensors, path, metadata):
        nonlocal most, total
        # Those of the shard before must be gone by now.
        assert not [each for each in alive if each() is not None]
        alive[:] = [weakref.ref(each) for each in tensors.values()]
        most, total = max(most, len(tensors)), total + len(tensors)

    monkeypatch.setattr("training.publishing.model_files.save_file", save)
    copy_weights(read_weights(saved, tiny_model.config), tmp_path / "target", "bfloat16", "10KB")
    assert total == len(list(tiny_model.parameters())) > most


def test_weights_that_are_not_finite_in_their_dtype_are_refused(saved, tmp_path, tiny_model, refuses):
    tensors = load_file(saved / "model.safetensors")
    tensors["norm.weight"][3] = torch.finfo(torch.float32).max
    save_file(tensors, saved / "model.safetensors")
    with refuses(saved, "norm.weight is NaN or infinite in bfloat16", "earlier checkpoint"):
        copy_weights(read_weights(saved, tiny_model.config), tmp_path / "target", "bfloat16")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda each: {k: v for k, v in each.items() if k != "norm.weight"}, ["norm.weight", "absent"]),
        (lambda each: {**each, "norm.weight": torch.ones(3)}, ["norm.weight", "(3,)", "(32,)"]),
        (lambda each: {**each, "norm.weight": each["norm.weight"].half()}, ["float16, float32"]),
        (lambda each: {k: v.double() for k, v in each.items()}, ["float64"]),
    ],
)
def test_weights_of_another_model_are_refused(saved, tiny_model, refuses, change, parts):
    save_file(change(load_file(saved / "model.safetensors")), saved / "model.safetensors")
    with refuses(saved, *parts):
        read_weights(saved, tiny_model.config)


def test_reading_leaves_what_another_thread_makes_alone(saved, tiny_model, monkeypatch):
    # As when a checkpoint is uploaded while its run trains.
    made = []

    def model_while_another_thread_works(config):
        thread = threading.Thread(target=lambda: made.append(torch.nn.Linear(2, 2)))
        thread.start()
        thread.join()
        return F2LLMModel(config)

    monkeypatch.setattr("training.models.model_folder.F2LLMModel", model_while_another_thread_works)
    read_weights(saved, tiny_model.config)
    assert [each.weight.is_meta for each in made] == [False]
