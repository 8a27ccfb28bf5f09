"""sentence-transformers' OpenVINO backend as a contestant, in another process and environment.

``optimum-intel`` holds transformers back, so it cannot share an environment with what is measured against it. The other
process waits while the others are timed, and times itself when it is its turn.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tests.benchmarks.timing import Contestant

_CHILD = Path(__file__).with_name("openvino_child.py")


class OpenVINO:
    """The other process; a context that ends it.

    Args:
        python: Interpreter of the other environment; None if there is none.
        model: The stock SentenceTransformer, whose folder the other process loads.

    Attributes:
        why_absent: Why there is no such contestant; None if there is one.
        notes: What it runs on.
    """

    def __init__(self, python: str | None, model: Any) -> None:
        self._python, self._model = python, model
        self._process: subprocess.Popen | None = None
        self._embeddings: dict[str, np.ndarray] = {}
        self.why_absent: str | None = None
        self.notes: list[str] = []

    def __enter__(self) -> OpenVINO:
        if self._python is None:
            self.why_absent = "no --openvino-python was given"
            return self
        self._folder = TemporaryDirectory()
        folder = Path(self._folder.name)
        self._model.save_pretrained(str(folder / "model"), create_model_card=False)
        try:
            # Isolated: this folder's modules must not hide those of the other environment.
            command = [self._python, "-I", str(_CHILD), str(folder)]
            with (folder / "messages.txt").open("w") as messages:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True
                )
            hello = self._ask({})
            self.notes.append(f"OpenVINO: {hello['versions']}; its precision is asked for by INFERENCE_PRECISION_HINT.")
        except (OSError, RuntimeError) as error:
            self.why_absent = f"{self._python}: {error}"
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()
        if self._python is not None:
            self._folder.cleanup()

    def contestants(self, texts: list[str], batch: int, precisions: tuple[str, ...]) -> dict[str, Contestant]:
        """``openvino_fp32`` and so on."""
        (Path(self._folder.name) / "texts.json").write_text(json.dumps(texts))
        return {
            f"openvino_{precision}": Contestant(
                self._encode(precision, batch), warm_ups=1, reports_seconds=True, optional=True
            )
            for precision in precisions
        }

    def check(self, check: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
        """``check`` with what the other process embedded in place of the seconds that it reported."""
        return lambda results: check({**results, **{name: self._embeddings[name] for name in self._embeddings}})

    def _encode(self, precision: str, batch: int) -> Callable[[], float]:
        def encode() -> float:
            answer = self._ask({"precision": precision, "batch": batch})
            self._embeddings[f"openvino_{precision}"] = np.load(Path(self._folder.name) / "embeddings.npy")
            return answer["seconds"]

        return encode

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            messages = (Path(self._folder.name) / "messages.txt").read_text().split()
            raise RuntimeError(f"status {self._process.wait()}: {' '.join(messages)[-300:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer
