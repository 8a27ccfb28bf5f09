"""Exported models in their own environments: ``--onnx-python``, ``--openvino-python`` and ``--llama-python``."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from training.models.exporting import LEAST_COSINE, reference_embeddings
from training.models.older_readers import write_for_older_readers

_EXPORT = Path(__file__).parents[4] / "training/models/export.py"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_exported_embeddings_are_those_of_torch(
    backend: str,
    precision: str,
    served: Path,
    expected: np.ndarray,
    tmp_path: Path,
    other_python: Callable[[str], str],
    embed: Callable[..., np.ndarray],
) -> None:
    python, output = other_python(f"{backend}-python"), tmp_path / "exported"
    command = [python, str(_EXPORT), str(served), "--backend", backend]
    command += ["--precision", precision, "--output", str(output)]
    for _ in range(2):  # the second time, nothing is to be done
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((output / "export.json").read_text())
    assert not list(tmp_path.glob(".*.partial"))
    assert not list(output.glob("*.safetensors"))
    vectors = embed(python, backend, str(output), record["file_name"])
    assert (vectors * expected).sum(axis=1).min() >= LEAST_COSINE[precision]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_checkpoint_in_half_precision_is_exported(
    backend: str,
    dtype: torch.dtype,
    served: Path,
    texts: list[str],
    tmp_path: Path,
    other_python: Callable[[str], str],
    embed: Callable[..., np.ndarray],
) -> None:
    python, output = other_python(f"{backend}-python"), tmp_path / "exported"
    SentenceTransformer(str(served), device="cpu").to(dtype).save_pretrained(str(served), create_model_card=False)
    assert json.loads((served / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    done = subprocess.run(
        [python, str(_EXPORT), str(served), "--backend", backend, "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    vectors = embed(python, backend, str(output), json.loads((output / "export.json").read_text())["file_name"])
    assert (vectors * reference_embeddings(served, texts)).sum(axis=1).min() >= LEAST_COSINE["fp32"]


@pytest.mark.slow
def test_openvino_exports_the_remote_code(
    served: Path, expected: np.ndarray, other_python: Callable[[str], str], embed: Callable[..., np.ndarray]
) -> None:
    vectors = embed(other_python("openvino-python"), "openvino-of-remote-code", str(served))
    assert (vectors * expected).sum(axis=1).min() >= LEAST_COSINE["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "remote-code"])
def test_transformers_4_embeds_the_same(
    kind: str, served: Path, expected: np.ndarray, other_python: Callable[[str], str], embed: Callable[..., np.ndarray]
) -> None:
    python = other_python("onnx-python")
    write_for_older_readers(served)
    np.testing.assert_allclose(embed(python, kind, str(served)), expected, atol=1e-5)


@pytest.mark.slow
def test_llama_cpp_embeds_the_same(
    served: Path, expected: np.ndarray, texts: list[str], other_python: Callable[[str], str], embed: Callable
) -> None:
    pytest.importorskip("gguf")
    from training.models.export_gguf import export

    python, file = other_python("llama-python"), served.parent / "model.gguf"
    export(served, file, "f32")
    vectors = embed(python, "llama", str(file))
    # llama.cpp would cut off EOS with what is too long.
    fits = np.array([len(text) < 1000 for text in texts])
    assert fits.sum() == len(texts) - 1
    assert (vectors * expected).sum(axis=1)[fits].min() >= 0.9999
