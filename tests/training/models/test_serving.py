"""Exported and served models in their own environments: ``--onnx-python``, ``--openvino-python``, ``--llama-python``,
``--infinity-python`` and ``--rag-python``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from hub_cards.snippets import snippets
from tests.training.publishing.releases import make_release, write_release
from training.models.export import LEAST_COSINE, reference_embeddings
from training.models.model_folder import write_for_older_readers
from training.publishing.card import model_card

pytestmark = pytest.mark.slow
_WORKER = Path(__file__).with_name("serving_worker.py")
_EXPORT = Path(__file__).parents[3] / "training/export.py"


@pytest.fixture
def texts(sentences):
    """Short and long texts in turn, one of them longer than the model takes."""
    prompt = "Instruct: Given a question, retrieve passages that answer the question.\nQuery: "
    return [*sentences, "a", *(prompt + each for each in sentences), " ".join(sentences * 4), "b"]


@pytest.fixture
def expected(folder, texts):
    """``(texts, width)`` unit-length embeddings by sentence-transformers in this environment."""
    return SentenceTransformer(str(folder), device="cpu").encode(texts)


# Of an interpreter that must not see this one's packages, nor report its use.
_ENVIRONMENT = {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, "DO_NOT_TRACK": "1"}


def _run(*command, environment=_ENVIRONMENT):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def embed(tmp_path, texts):
    """``embed(python, kind, model, file_name)``: the texts' embeddings from another environment."""

    def run(python, *words):
        (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        _run(python, "-I", _WORKER, "backend", tmp_path / "texts.json", tmp_path / "answer.npy", *words)
        return np.load(tmp_path / "answer.npy")

    return run


def _export(python, folder, output, *words):
    _run(python, _EXPORT, folder, "--output", output, *words, environment=None)
    return json.loads((output / "export.json").read_text())["file_name"]


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "fp32"), (torch.float32, "int8"), (torch.bfloat16, "fp32"), (torch.float16, "fp32")],
)
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_exported_embeddings_are_those_of_torch(
    backend, dtype, precision, folder, texts, tmp_path, other_python, embed
):
    python, output = other_python(f"{backend}-python"), tmp_path / "exported"
    SentenceTransformer(str(folder), device="cpu").to(dtype).save_pretrained(str(folder), create_model_card=False)
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    for _ in range(2):  # the second time, nothing is to be done
        file_name = _export(python, folder, output, "--backend", backend, "--precision", precision)
    assert not list(tmp_path.glob(".*.partial")) and not list(output.glob("*.safetensors"))
    vectors = embed(python, backend, output, file_name)
    assert (vectors * reference_embeddings(folder, texts)).sum(axis=1).min() >= LEAST_COSINE[precision]


@pytest.mark.parametrize("kind", ["torch", "remote-code"])
def test_transformers_4_embeds_the_same(kind, folder, expected, other_python, embed):
    python = other_python("onnx-python")
    write_for_older_readers(folder)
    np.testing.assert_allclose(embed(python, kind, folder), expected, atol=1e-5)


def test_llama_cpp_embeds_the_same(folder, expected, texts, other_python, embed):
    pytest.importorskip("gguf")
    from training.models.gguf import export_gguf

    python, file = other_python("llama-python"), folder.parent / "model.gguf"
    export_gguf(folder, file, "f32")
    vectors = embed(python, "llama", file)
    # llama.cpp would cut off EOS with the end of a long text.
    fits = np.array([len(text) < 1000 for text in texts])
    assert fits.sum() == len(texts) - 1
    assert (vectors * expected).sum(axis=1)[fits].min() >= 0.9999


@contextmanager
def _infinity(python, folder, log):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(python).with_name("infinity_emb")), "v2", "--model-id", str(folder)]
    command += ["--served-model-name", "f2llm", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    command += ["--dtype", "float32", "--no-trust-remote-code", "--no-bettertransformer", "--no-compile"]
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    with log.open("w") as messages:
        server = subprocess.Popen(command, stdout=messages, stderr=messages, env=_ENVIRONMENT)
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                assert time.monotonic() < end and server.poll() is None, log.read_text()[-2000:]
                time.sleep(0.3)
        yield url
    finally:
        server.kill()
        server.wait(30)


def test_infinity_serves_the_same_embeddings(folder, texts, expected, tmp_path, other_python):
    python = other_python("infinity-python")
    write_for_older_readers(folder)
    requests = {
        "batch": {"input": texts},
        "one": {"input": texts[:1], "encoding_format": "float"},
        "short": {"input": texts, "dimensions": 8},
    }
    (tmp_path / "requests.json").write_text(json.dumps(requests), encoding="utf-8")
    with _infinity(python, folder, tmp_path / "log.txt") as url:
        _run(python, "-I", _WORKER, "server", url, tmp_path)
    answers = {name: np.array(rows) for name, rows in json.loads((tmp_path / "answers.json").read_text()).items()}
    assert (answers["batch"] * expected).sum(axis=1).min() >= 0.9999
    assert (answers["one"] * expected[:1]).sum() >= 0.9999
    # Shortened, but not normalised again: that is the client's part.
    np.testing.assert_allclose(answers["short"], expected[:, :8], atol=1e-4)


@pytest.mark.parametrize("document_prompt", ["", "Title: "])
def test_the_examples_of_the_card_embed_as_sentence_transformers_does(
    document_prompt, folder, sentences, tmp_path, other_python
):
    python = other_python("rag-python")
    model = SentenceTransformer(str(folder), device="cpu")
    model.prompts = {"query": "Instruct: Find it.\nQuery: ", "document": document_prompt}
    model.save_pretrained(str(folder), create_model_card=False)
    write_release(tmp_path / "release", make_release(prompts=model.prompts), losses=False)
    codes = snippets(model_card(tmp_path / "release", str(folder)), "library")
    given = {"queries": sentences[:4], "documents": sentences, "codes": codes}
    (tmp_path / "given.json").write_text(json.dumps(given), encoding="utf-8")
    _run(python, "-I", _WORKER, "libraries", tmp_path)
    expected = {"query": model.encode_query(sentences[:4]), "document": model.encode_document(sentences)}
    with np.load(tmp_path / "found.npz") as found:
        assert len(found) == 6
        for name, vectors in found.items():
            assert (vectors * expected[name.rsplit("-", 1)[1]]).sum(axis=1).min() > 0.999999, name
