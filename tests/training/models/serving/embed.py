"""Embeds texts with sentence-transformers or llama.cpp in another environment; imports nothing of ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def with_sentence_transformers(folder: str, kind: str, file_name: str, texts: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    backend, remote_code = kind.split("-")[0].replace("remote", "torch"), kind.endswith("remote-code")
    choice = {"file_name": file_name} if file_name else {"export": True}
    if backend == "openvino":
        choice["ov_config"] = {"INFERENCE_PRECISION_HINT": "f32"}
    model = SentenceTransformer(
        folder,
        device="cpu",
        backend=backend,
        trust_remote_code=remote_code,
        model_kwargs={} if backend == "torch" else choice,
    )
    if remote_code and backend == "torch":
        assert type(model[0].auto_model).__name__ == "F2LLMModel"
    # As they come, so that short texts are padded to long ones.
    return np.concatenate([model.encode(texts[start : start + 4]) for start in range(0, len(texts), 4)])


def with_llama_cpp(file: str, texts: list[str]) -> np.ndarray:
    from llama_cpp import Llama

    model = Llama(file, embedding=True, n_ctx=512, n_batch=512, n_ubatch=512, n_threads=1, verbose=False)
    vectors = np.array([model.embed(text) for text in texts])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def main(texts: Path, output: Path, kind: str, model: str, file_name: str = "") -> None:
    content = json.loads(texts.read_text(encoding="utf-8"))
    if kind == "llama":
        np.save(output, with_llama_cpp(model, content))
    else:
        np.save(output, with_sentence_transformers(model, kind, file_name, content))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
