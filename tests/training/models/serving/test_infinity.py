"""A released folder behind infinity-emb, asked with the openai client: ``--infinity-python``."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.training.models.serving.conftest import other_environment
from training.models.older_readers import write_for_older_readers

_CLIENT = Path(__file__).with_name("query_server.py")
_WIDTH = 8


@contextmanager
def _infinity(python: str, folder: Path, log: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(python).with_name("infinity_emb")), "v2", "--model-id", str(folder)]
    command += ["--served-model-name", "f2llm", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    command += ["--dtype", "float32", "--no-trust-remote-code", "--no-bettertransformer", "--no-compile"]
    with log.open("w") as messages:
        server = subprocess.Popen(command, stdout=messages, stderr=messages, env=other_environment())
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(server, url, log)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(30)


def _wait(server: subprocess.Popen, url: str, log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise AssertionError(f"no server: {log.read_text()[-2000:]}")


@pytest.mark.slow
def test_infinity_serves_the_same_embeddings(
    served: Path, texts: list[str], expected: np.ndarray, tmp_path: Path, other_python: Callable[[str], str]
) -> None:
    python = other_python("infinity-python")
    write_for_older_readers(served)
    requests = {
        "batch": {"input": texts},
        "one": {"input": texts[:1], "encoding_format": "float"},
        "short": {"input": texts, "dimensions": _WIDTH},
    }
    (tmp_path / "requests.json").write_text(json.dumps(requests), encoding="utf-8")
    with _infinity(python, served, tmp_path / "log.txt") as url:
        command = [python, "-I", str(_CLIENT), url, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=other_environment())
    assert done.returncode == 0, done.stderr[-2000:]
    answers = {name: np.array(rows) for name, rows in json.loads((tmp_path / "answers.json").read_text()).items()}
    assert (answers["batch"] * expected).sum(axis=1).min() >= 0.9999
    assert (answers["one"] * expected[:1]).sum() >= 0.9999
    # Shortened, but not brought back to unit length: that is the client's part.
    np.testing.assert_allclose(answers["short"], expected[:, :_WIDTH], atol=1e-4)
