"""Folders of a model, stock and released, and what stock libraries make of them in a process without this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModel, Qwen3Model

from modeling_f2llm import F2LLMModel, build_sentence_transformer
from tests.modeling_f2llm.comparing import LENGTHS


class Loaded(NamedTuple):
    """What ``load_released.py`` found: arrays (embeddings, hidden states) and plain facts (classes, files)."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


@pytest.fixture(scope="session")
def saved_folder(tiny_config, tmp_path_factory):
    """The weights of ``tiny_model``, as F2LLMModel.save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("saved")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        F2LLMModel(deepcopy(tiny_config)).save_pretrained(folder)
    return folder


@pytest.fixture
def stock_model(saved_folder):
    """The weights of ``tiny_model`` in the model that transformers makes of its folder."""
    model = AutoModel.from_pretrained(saved_folder)
    assert type(model) is Qwen3Model
    return model.eval()


@pytest.fixture(scope="session")
def released_folder(saved_folder, tiny_tokenizer, tmp_path_factory):
    """The weights of ``tiny_model`` as a release: what SentenceTransformer.save_pretrained writes."""
    folder = tmp_path_factory.mktemp("released")
    model = F2LLMModel.from_pretrained(saved_folder)
    build_sentence_transformer(model, deepcopy(tiny_tokenizer)).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def token_batch(tiny_tokenizer, sentences):
    # A tokenizer goes on padding once it has padded: not the one that all tests share.
    return dict(deepcopy(tiny_tokenizer)(sentences, padding=True, return_tensors="pt"))


@pytest.fixture(scope="session")
def loaded_elsewhere(released_folder, sentences, tmp_path_factory):
    """The released folder, loaded from another directory by a process that cannot import modeling_f2llm."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "texts.json").write_text(json.dumps(sentences))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = Path(__file__).with_name("load_released.py")
    command = [sys.executable, str(script), str(released_folder), str(elsewhere)]
    process = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    with np.load(elsewhere / "arrays.npz") as arrays:
        return Loaded(dict(arrays), json.loads((elsewhere / "facts.json").read_text()))


@pytest.fixture(params=["right", "left"])
def padded(request, random_batch):
    """Texts of unequal lengths, padded on either side."""
    return random_batch(LENGTHS, request.param)
