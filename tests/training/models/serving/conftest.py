from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase

from modeling_f2llm import F2LLMConfig, F2LLMModel, build_sentence_transformer

_EMBED = Path(__file__).with_name("embed.py")


@pytest.fixture
def served(tmp_path: Path, tiny_config: F2LLMConfig, small_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A model as training leaves it, whose rotary base is not the one that older readers take for granted."""
    config = deepcopy(tiny_config)
    config.vocab_size = 416
    config.rope_parameters = {"rope_type": "default", "rope_theta": 100.0}
    tokenizer = deepcopy(small_tokenizer)
    tokenizer.model_max_length = 256
    # transformers 5 writes such tokens in a form that transformers 4 cannot read.
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = F2LLMModel(config).eval()
        for name, weights in model.named_parameters():
            # Larger than at the start of training, so that positions matter.
            weights.data.normal_(1 if name.endswith("norm.weight") else 0, 0.1)
    build_sentence_transformer(model, tokenizer).save_pretrained(str(tmp_path / "model"), create_model_card=False)
    return tmp_path / "model"


@pytest.fixture
def texts(sentences: list[str]) -> list[str]:
    """Short and long ones by turns, one of them longer than the model takes."""
    prompt = "Instruct: Given a question, retrieve passages that answer the question.\nQuery: "
    return [*sentences, "a", *(prompt + each for each in sentences), " ".join(sentences * 4), "b"]


@pytest.fixture
def expected(served: Path, texts: list[str]) -> np.ndarray:
    """What sentence-transformers makes of the texts here: ``(texts, width)``, unit length."""
    return SentenceTransformer(str(served), device="cpu").encode(texts)


@pytest.fixture
def embed(tmp_path: Path, texts: list[str]) -> Callable[..., np.ndarray]:
    """``embed(python, kind, model, file_name)``: the texts' embeddings from another environment."""

    def run(python: str, *words: str) -> np.ndarray:
        (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        command = [python, "-I", str(_EMBED), str(tmp_path / "texts.json"), str(tmp_path / "answer.npy"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=other_environment())
        assert done.returncode == 0, done.stderr[-2000:]
        return np.load(tmp_path / "answer.npy")

    return run


def other_environment() -> dict[str, str]:
    """This process's, for an interpreter that must not see this environment's packages, nor report its use."""
    return {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, "DO_NOT_TRACK": "1"}
