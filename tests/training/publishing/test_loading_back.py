"""What was pushed is loaded back by name, with the libraries that a user has, and is the same to the last bit."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from modeling_f2llm import F2LLMModel
from tests.hub_server import load_worker
from tests.hub_server.client import environment
from tests.training.publishing.packed import write_packed
from tests.training.recipes import write_sources
from training.data.releasing import release
from training.publish import main

MODEL, DATA = "org/tiny", "org/tiny-data"


@pytest.mark.usefixtures("client_waits")
def test_model_and_data_load_back_the_same(hub_server, tmp_path):
    packed = write_packed(tmp_path / "first")
    newer = write_packed(tmp_path / "second", seed=7)
    assert (packed / "model.safetensors").read_bytes() != (newer / "model.safetensors").read_bytes()
    data = release(write_sources(tmp_path / "data"), tmp_path / "release")
    assert main(["push", str(packed), "--repo", MODEL, "--tag", "v1.0"]) == 0
    assert main(["push", str(newer), "--repo", MODEL]) == 0
    assert main(["push-data", str(data), "--repo", DATA, "--private"]) == 0

    words = [tmp_path / "loaded.npz", MODEL, "v1.0", DATA, "tiny_retrieval"]
    command = [sys.executable, load_worker.__file__, *map(str, words)]
    done = subprocess.run(
        command, env=environment(hub_server, tmp_path / "home"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded = np.load(tmp_path / "loaded.npz")
    local = SentenceTransformer(str(packed), device="cpu")
    np.testing.assert_array_equal(loaded["sentences"], local.encode(load_worker.TEXTS))
    with torch.no_grad():
        tokens = local.tokenizer(load_worker.TEXTS[0], return_tensors="pt")
        np.testing.assert_array_equal(
            loaded["transformers"], F2LLMModel.from_pretrained(packed)(**tokens).last_hidden_state.numpy()
        )
    assert "transformers_modules" in str(loaded["code"])
    rows = json.loads(str(loaded["rows"]))
    assert len(rows) == 80
    assert {row["passage"] for row in rows if row["query"] == "the red river"} == {"river, red"}
