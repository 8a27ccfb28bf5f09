"""sentence-transformers' OpenVINO backend as a contestant, in another process and environment.

``optimum-intel`` holds transformers back, so it cannot share an environment with what is measured against it. The other
process waits while the others are timed, and times itself when it is its turn.
"""

from __future__ import annotations

import json
import subprocess
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tests.benchmarks.timing import Contestant

_CHILD = Path(__file__).with_name("openvino_child.py")


class OpenVINO:
    """The other process, run by the interpreter ``python`` on a copy of the stock model; a context that ends it."""

    def __init__(self, python, model):
        self._python, self._model = python, model
        self._embeddings: dict[str, np.ndarray] = {}

    def __enter__(self):
        self._temporary = TemporaryDirectory()
        self._folder = Path(self._temporary.name)
        self._model.save_pretrained(str(self._folder / "model"), create_model_card=False)
        # Isolated: this folder's modules must not hide those of the other environment.
        command = [self._python, "-I", str(_CHILD), str(self._folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()
        self._temporary.cleanup()

    def versions(self):
        """Return the versions of its packages."""
        return self._ask({})["versions"]

    def contestants(self, texts, batch, precisions):
        """``openvino_fp32`` and so on."""
        (self._folder / "texts.json").write_text(json.dumps(texts))
        runs = {f"openvino_{each}": partial(self._encode, each, batch) for each in precisions}
        return {name: Contestant(encode, reports_seconds=True, optional=True) for name, encode in runs.items()}

    def check(self, check):
        """``check`` with what the other process embedded in place of the seconds that it reported."""
        return lambda results: check({**results, **self._embeddings})

    def _encode(self, precision, batch):
        answer = self._ask({"precision": precision, "batch": batch})
        self._embeddings[f"openvino_{precision}"] = np.load(self._folder / "embeddings.npy")
        return answer["seconds"]

    def _ask(self, question):
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self._python} ended with status {self._process.wait()}")
        return json.loads(line)
