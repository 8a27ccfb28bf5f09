"""Exports are whole or absent, say how they were made, and compute what the model computes."""

from __future__ import annotations

import json
import shutil
import sys
from copy import deepcopy
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import Qwen3Config

from modeling_f2llm import build_sentence_transformer
from tests.training.models.starts import edit_json, save_like_qwen3_embedding
from training.common.errors import StoppedError
from training.models import export
from training.models.export import check_same_embeddings, export_graph

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def optimum(monkeypatch):
    """The backend's packages seem to be installed; the test writes the graph."""

    def write_graph(source, folder, precision):
        assert (source / "model.safetensors").stat().st_size > 1000
        (folder / "onnx").mkdir()
        (folder / "onnx/model.onnx").write_text("graph")

    monkeypatch.setitem(sys.modules, "optimum", ModuleType("optimum"))
    monkeypatch.setitem(sys.modules, "optimum.onnxruntime", ModuleType("optimum.onnxruntime"))
    monkeypatch.setattr(export, "_write_onnx", write_graph)
    monkeypatch.setattr(export, "check_same_embeddings", lambda *_: None)


def _content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("backend", "module"), export.BACKENDS.items())
def test_missing_packages_name_what_to_install(backend, module, folder, tmp_path, refuses, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with refuses(f"the {backend} backend", f"pip install --group {backend}"):
        export_graph(folder, tmp_path / "out", backend)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "keys", "part"),
    [
        *((name, "gone", name) for name in ("config.json", "tokenizer.json", "1_Pooling/config.json", WEIGHTS)),
        ("config.json", None, "config.json: cannot be read"),
        ("tokenizer_config.json", None, "damaged"),
        ("config.json", {"num_hidden_layers": 3}, "settings are damaged"),
        ("config.json", {"num_attention_heads": 0}, "settings are damaged"),
        ("config.json", {"model_type": "bert"}, "model_type is 'bert'; only 'qwen3'"),
    ],
)
def test_missing_and_faulty_files_are_refused(name, keys, part, folder, tmp_path, refuses):
    if keys == "gone":
        (folder / name).unlink()
    elif keys is None:
        (folder / name).write_text("{")
    else:
        edit_json(folder / name, **keys)
    with refuses(folder, part):
        export_graph(folder, tmp_path / "out", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_modules_come_with_their_weights(folder, tmp_path, tiny_config, tiny_tokenizer):
    start = save_like_qwen3_embedding(tmp_path / "start", tiny_config, tiny_tokenizer, dense=True)
    export_graph(start, tmp_path / "out", "onnx")
    copied, given = (each / "2_Dense/model.safetensors" for each in (tmp_path / "out", start))
    assert copied.read_bytes() == given.read_bytes()
    # A module without files has no folder in a repository.
    shutil.rmtree(folder / "2_Normalize")
    export_graph(folder, tmp_path / "other", "onnx")


def test_an_export_is_whole_or_absent(folder, tmp_path, monkeypatch, refuses):
    (folder / "README.md").write_text("# Card\n")
    (folder / "training_arguments.json").write_text('{"output_dir": "/home/someone"}')
    before, output = _content(folder), tmp_path / "out"
    for error in (StoppedError("cosine 0.5"), KeyError("qwen3")):
        with monkeypatch.context() as patched, pytest.raises(StoppedError):
            patched.setattr(export, "check_same_embeddings", lambda *_, error=error: (_ for _ in ()).throw(error))
            export_graph(folder, output, "onnx")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert export_graph(folder, output, "onnx") == "onnx/model.onnx"
    assert _content(folder) == before
    written = _content(output)
    assert {"README.md", "export.json", "onnx/model.onnx", "tokenizer.json", "1_Pooling/config.json"} <= set(written)
    # No weights, no code, and no keys of the training, which may be private.
    assert not [name for name in written if name.endswith((".safetensors", ".py")) or "training" in name]
    assert "auto_map" not in json.loads((output / "config.json").read_text())
    # The same again does nothing; anything else is refused.
    monkeypatch.setattr(export, "_write_onnx", lambda *_: pytest.fail("written again"))
    assert export_graph(folder, output, "onnx") == "onnx/model.onnx" and _content(output) == written
    with refuses(output, "holds something else"):
        export_graph(folder, output, "onnx", "int8")
    assert _content(folder) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_graph_is_compared_with_fp32(dtype, tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    for name, weights in tiny_model.named_parameters():
        # Larger than at the start of training, so that precision shows.
        weights.data.normal_(1 if name.endswith("norm.weight") else 0, 0.3)
    folders = tmp_path / "half", tmp_path / "whole"
    for folder, kind in zip(folders, (dtype, torch.float32), strict=True):
        model = build_sentence_transformer(tiny_model.to(kind), deepcopy(tiny_tokenizer))
        model.save_pretrained(str(folder), create_model_card=False)
    assert SentenceTransformer(str(folders[0]), device="cpu").dtype == dtype
    # In the place of the graph, which computes in fp32.
    monkeypatch.setattr(export, "_load_exported", lambda folder, *_: SentenceTransformer(str(folder), device="cpu"))
    monkeypatch.setitem(export.LEAST_COSINE, "fp32", 0.999999)
    check_same_embeddings(*folders, "openvino", "fp32")
    monkeypatch.setitem(export.LEAST_COSINE, "fp32", 1.1)
    with pytest.raises(StoppedError, match="was not kept"):
        check_same_embeddings(*folders, "openvino", "fp32")


def test_a_model_with_the_names_of_a_language_model_is_whole(folder, tmp_path, refuses):
    path, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(Qwen3Config.from_dict(config).to_json_string())
    weights = {f"model.{name}": weight for name, weight in load_file(path).items()}
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path)
    export_graph(folder, tmp_path / "out", "onnx")
    del weights["model.norm.weight"]
    save_file(weights, path)
    with refuses("weight norm.weight is absent"):
        export_graph(folder, tmp_path / "other", "onnx")
