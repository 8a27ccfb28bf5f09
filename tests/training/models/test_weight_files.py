from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.models.weight_files import WeightFiles


def _save(folder: Path, index: dict[str, str] | None = None, **tensors: torch.Tensor) -> None:
    files = index or dict.fromkeys(tensors, "model.safetensors")
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_one_file_and_shards_read_alike(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}
    for folder, index in (("one", None), ("two", {"a": "x.safetensors", "b": "y.safetensors"})):
        (tmp_path / folder).mkdir()
        _save(tmp_path / folder, index, **tensors)
        weights = WeightFiles(tmp_path / folder)
        assert list(weights.tensors.items()) == [("a", ((2,), torch.bfloat16)), ("b", ((2, 3), torch.float32))]
        assert all(torch.equal(weights.read(name), tensor) for name, tensor in tensors.items())


def test_what_cannot_be_read_is_refused(tmp_path, refuses):
    with refuses(tmp_path, "holds no weights as safetensors"):
        WeightFiles(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with refuses(tmp_path, "pickled"):
        WeightFiles(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with refuses(tmp_path, "adapter", "merge it into its base first"):
        WeightFiles(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
    with refuses("model.safetensors", "not a readable safetensors file"):
        WeightFiles(tmp_path)
    _save(tmp_path, a=torch.ones(2, dtype=torch.int8))
    with refuses("a holds I8", "floating-point"):
        WeightFiles(tmp_path)


def test_an_index_that_promises_too_much_is_refused(tmp_path, refuses):
    _save(tmp_path, {"a": "x.safetensors"}, a=torch.ones(2))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    with refuses("lack b"):
        WeightFiles(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with refuses("gone.safetensors", "not a readable"):
        WeightFiles(tmp_path)
    index.write_text("{")
    with refuses(index, "damaged"):
        WeightFiles(tmp_path)
