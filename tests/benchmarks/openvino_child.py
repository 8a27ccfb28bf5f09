"""Answers ``openvino_backend.py``, one JSON object a line; runs in another environment and imports nothing of ours."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import optimum.intel.openvino  # noqa: F401 - an environment without it must say so before anything is timed
from sentence_transformers import SentenceTransformer

_PACKAGES = ("openvino", "optimum-intel", "sentence-transformers", "transformers", "torch")


@cache
def load(folder, precision):
    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    options = {"export": True, "ov_config": {"INFERENCE_PRECISION_HINT": hint}}
    return SentenceTransformer(str(folder / "model"), backend="openvino", device="cpu", model_kwargs=options)


def answer(folder, question):
    """Versions to an empty question, else the seconds of encoding ``texts.json``; embeddings go into a file."""
    if not question:
        return {"versions": ", ".join(f"{package} {version(package)}" for package in _PACKAGES)}
    model = load(folder, question["precision"])
    texts = json.loads((folder / "texts.json").read_text())
    start = time.perf_counter()
    embeddings = model.encode(texts, batch_size=question["batch"], show_progress_bar=False)
    seconds = time.perf_counter() - start
    np.save(folder / "embeddings.npy", embeddings.astype(np.float32))
    return {"seconds": seconds}


if __name__ == "__main__":
    # Libraries print to standard output: the answers get their own channel.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(answer(Path(sys.argv[1]), json.loads(line))) + "\n")
        answers.flush()
