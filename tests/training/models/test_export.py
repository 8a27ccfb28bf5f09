from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from modeling_f2llm import F2LLMConfig, F2LLMModel, build_sentence_transformer
from tests.training.models.starts import save_like_qwen3_embedding
from training.common.errors import StoppedError
from training.models import export as command
from training.models.export import export, main


@pytest.fixture
def folder(tmp_path: Path, tiny_model: F2LLMModel, small_tokenizer) -> Path:
    tiny_model.resize_token_embeddings(400)
    build_sentence_transformer(tiny_model, small_tokenizer).save_pretrained(
        str(tmp_path / "model"), create_model_card=False
    )
    (tmp_path / "model/README.md").write_text("# Card\n")
    (tmp_path / "model/training_arguments.json").write_text('{"output_dir": "/home/someone"}')
    return tmp_path / "model"


@pytest.fixture
def with_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's packages seem to be there; what is exported is written by the test."""
    monkeypatch.setitem(sys.modules, "optimum", ModuleType("optimum"))
    monkeypatch.setitem(sys.modules, "optimum.onnxruntime", ModuleType("optimum.onnxruntime"))


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _write_graph(source: Path, folder: Path, backend: str, precision: str) -> str:
    assert (source / "model.safetensors").stat().st_size > 1000
    (folder / "onnx").mkdir()
    (folder / "onnx/model.onnx").write_text("graph")
    return "onnx/model.onnx"


def test_unknown_backend(folder: Path, tmp_path: Path, refuses: Callable, capsys: pytest.CaptureFixture) -> None:
    with refuses("backend 'tensorrt'", "onnx, openvino"):
        export(folder, tmp_path / "out", "tensorrt")
    assert main([str(folder), "--output", str(tmp_path / "out"), "--backend", "tensorrt"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown backend")


def test_unknown_precision(folder: Path, tmp_path: Path, refuses: Callable) -> None:
    with refuses("precision 'int4'", "fp32, int8"):
        export(folder, tmp_path / "out", "onnx", "int4")


@pytest.mark.parametrize(("backend", "module"), command.BACKENDS.items())
def test_missing_packages_name_what_to_install(
    backend: str, module: str, folder: Path, tmp_path: Path, refuses: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with refuses(f"the {backend} backend", f"pip install --group {backend}"):
        export(folder, tmp_path / "out", backend)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"])
def test_no_model(name: str, folder: Path, tmp_path: Path, refuses: Callable) -> None:
    (folder / name).unlink()
    with refuses(folder, "holds no model", name):
        export(folder, tmp_path / "out", "onnx")
    (folder / "model.safetensors").unlink()
    with refuses(tmp_path / "nowhere", "holds no model"):
        export(tmp_path / "nowhere", tmp_path / "out", "onnx")


def test_no_weights(folder: Path, tmp_path: Path, refuses: Callable) -> None:
    (folder / "model.safetensors").unlink()
    with refuses(folder, "lacks model.safetensors"):
        export(folder, tmp_path / "out", "onnx")


@pytest.mark.usefixtures("with_optimum")
@pytest.mark.parametrize("name", ["config.json", "modules.json", "tokenizer_config.json"])
def test_damaged_settings(name: str, folder: Path, tmp_path: Path, refuses: Callable) -> None:
    (folder / name).write_text("{")
    with refuses(folder, "damaged"):
        export(folder, tmp_path / "out", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.usefixtures("with_optimum")
@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", "two"), ("num_hidden_layers", 3), ("num_attention_heads", 0)]
)
def test_a_configuration_that_no_model_has(
    key: str, value: object, folder: Path, tmp_path: Path, refuses: Callable
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with refuses(folder, "config.json is damaged"):
        export(folder, tmp_path / "out", "onnx")


@pytest.mark.usefixtures("with_optimum")
def test_modules_come_with_their_weights(
    folder: Path, tmp_path: Path, tiny_config: F2LLMConfig, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "write_graph", _write_graph)
    monkeypatch.setattr(command, "check_same_embeddings", lambda *_: 1.0)
    start = save_like_qwen3_embedding(tmp_path / "start", tiny_config, tiny_tokenizer, dense=True)
    export(start, tmp_path / "out", "onnx")
    assert (tmp_path / "out/2_Dense/model.safetensors").read_bytes() == (
        start / "2_Dense/model.safetensors"
    ).read_bytes()
    # A module without files has no folder in a repository.
    shutil.rmtree(folder / "2_Normalize")
    export(folder, tmp_path / "other", "onnx")


@pytest.mark.usefixtures("with_optimum")
def test_another_kind_of_model(folder: Path, tmp_path: Path, refuses: Callable) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with refuses(folder, "'bert'", "'qwen3'"):
        export(folder, tmp_path / "out", "onnx")


@pytest.mark.usefixtures("with_optimum")
def test_folder_is_whole_or_absent(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, output = _digests(folder), tmp_path / "out"
    monkeypatch.setattr(command, "write_graph", _write_graph)

    def differs(*_: object) -> float:
        raise StoppedError("cosine 0.5")

    def fails(*_: object) -> float:
        raise KeyError("qwen3")

    for wrong in (differs, fails):
        monkeypatch.setattr(command, "check_same_embeddings", wrong)
        with pytest.raises(StoppedError):
            export(folder, output, "onnx")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.setattr(command, "check_same_embeddings", lambda *_: 1.0)
    assert export(folder, output, "onnx") == "onnx/model.onnx"
    assert _digests(folder) == before
    written = set(_digests(output))
    assert {"README.md", "export.json", "onnx/model.onnx", "tokenizer.json", "1_Pooling/config.json"} <= written
    # Neither weights nor code nor what training was told, which may be private.
    assert not [name for name in written if name.endswith((".safetensors", ".py")) or "training" in name]
    assert "auto_map" not in json.loads((output / "config.json").read_text())

    monkeypatch.setattr(command, "write_graph", fails)
    exported = _digests(output)
    assert export(folder, output, "onnx") == "onnx/model.onnx"
    assert _digests(output) == exported


@pytest.mark.usefixtures("with_optimum")
def test_output_in_use(folder: Path, tmp_path: Path, refuses: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "write_graph", _write_graph)
    monkeypatch.setattr(command, "check_same_embeddings", lambda *_: 1.0)
    before = _digests(folder)
    with refuses(folder, "is read; give another --output"):
        export(folder, folder, "onnx")
    assert _digests(folder) == before
    export(folder, tmp_path / "out", "onnx")
    with refuses(tmp_path / "out", "holds something else"):
        export(folder, tmp_path / "out", "onnx", "int8")
