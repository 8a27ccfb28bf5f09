"""Faults of the weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.training.publishing.broken import BrokenRelease
from training.publishing.checks import weights as checks
from training.publishing.pack import PackOptions, pack

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "rng_state.pth", "cache/texts.pkl"])
def test_files_that_can_run_code(broken: BrokenRelease, name: str) -> None:
    broken.write(name, b"cos\nsystem\n")
    faults = broken.faults()
    assert any(fault.startswith(f"{name}: is no safetensors") for fault in faults)


def test_the_prefix_of_a_language_model(broken: BrokenRelease) -> None:
    broken.edit_weights(lambda tensors: [tensors.update({f"model.{name}": tensors.pop(name)}) for name in [*tensors]])
    broken.expect((WEIGHTS, "tensors have the prefix 'model.'"))


def test_a_tensor_too_few_and_one_too_many(broken: BrokenRelease) -> None:
    broken.edit_weights(lambda tensors: tensors.update({"lm_head.weight": tensors.pop("norm.weight")}))
    broken.expect((WEIGHTS, "lacks norm.weight"), (WEIGHTS, "has, beyond the model, lm_head.weight"))


def test_a_tensor_of_another_shape(broken: BrokenRelease) -> None:
    broken.edit_weights(lambda tensors: tensors.update({"norm.weight": torch.ones(33)}))
    broken.expect(
        (WEIGHTS, "norm.weight is (33,), the configuration wants (32,)"),
        ("release.json", "parameters, but the weights have"),
    )


def test_weights_that_are_not_finite(broken: BrokenRelease) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["norm.weight"][3] = float("nan")
        tensors["embed_tokens.weight"][-1, -1] = float("inf")

    broken.edit_weights(spoil)
    broken.expect((WEIGHTS, "embed_tokens.weight, norm.weight is NaN or infinite"))


def test_large_tensors_are_read_in_pieces(broken: BrokenRelease, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_PIECE", 40)
    broken.expect()
    broken.edit_weights(lambda tensors: tensors["embed_tokens.weight"][-1].fill_(float("nan")))
    broken.expect((WEIGHTS, "embed_tokens.weight is NaN"))


def test_another_dtype_than_told(broken: BrokenRelease) -> None:
    broken.edit("config.json", dtype="bfloat16")
    broken.expect(("config.json", "dtype is 'bfloat16', but the weights are float32"))


def test_two_dtypes(broken: BrokenRelease) -> None:
    broken.edit_weights(lambda tensors: tensors.update({"norm.weight": tensors["norm.weight"].half()}))
    broken.expect((WEIGHTS, "mixes float16, float32"))


def test_a_count_that_is_not_that_of_the_record(broken: BrokenRelease) -> None:
    broken.edit("release.json", parameters=330_000_000)
    broken.expect(
        ("release.json", "330,000,000 parameters, but"), ("README.md", "parameters: ", "330,000,000 in the record")
    )


def test_a_file_cut_off(broken: BrokenRelease) -> None:
    content = (broken.folder / WEIGHTS).read_bytes()
    broken.write(WEIGHTS, content[: len(content) // 2])
    broken.expect((WEIGHTS, "is no safetensors file", "not checked for it, or not in full: weights"))


def test_no_weights(broken: BrokenRelease) -> None:
    broken.delete(WEIGHTS)
    broken.expect((WEIGHTS, "is missing"))


@pytest.fixture(scope="module")
def sharded(instructed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "tiny"
    return pack(instructed, folder, PackOptions("tiny", dtype="bfloat16", max_shard_size="20KB"))


@pytest.fixture
def broken_shards(sharded: Path, tmp_path: Path) -> BrokenRelease:
    return BrokenRelease(sharded, tmp_path / "tiny")


def test_shards(broken_shards: BrokenRelease) -> None:
    assert len(list(broken_shards.folder.glob("model-*.safetensors"))) > 1
    broken_shards.expect()


def test_an_index_that_names_another_shard(broken_shards: BrokenRelease) -> None:
    files = sorted(path.name for path in broken_shards.folder.glob("model-*.safetensors"))

    def move(index: dict) -> None:
        name = next(name for name, file in index["weight_map"].items() if file == files[0])
        index["weight_map"][name] = files[1]

    broken_shards.edit(INDEX, move)
    broken_shards.expect((INDEX, "does not say where"))


def test_shards_without_their_index(broken_shards: BrokenRelease) -> None:
    broken_shards.delete(INDEX)
    broken_shards.expect((INDEX, "is missing, but the weights are in model-"))


def test_a_shard_that_is_gone(broken_shards: BrokenRelease) -> None:
    last = sorted(broken_shards.folder.glob("model-*.safetensors"))[-1].name
    broken_shards.delete(last)
    faults = broken_shards.faults()
    assert any(fault.startswith(f"{INDEX}: names {last}, which is not there") for fault in faults)


def test_a_shard_of_more_than_five_gigabytes(broken: BrokenRelease) -> None:
    with (broken.folder / "model-00009-of-00009.safetensors").open("wb") as file:
        os.truncate(file.fileno(), 5_100_000_000)
    faults = broken.faults()
    assert any("is 5.1 GB large" in fault for fault in faults)
