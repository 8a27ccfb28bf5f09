"""What all tests share: a two-layer model, its tokenizer and random batches. No network, no downloads."""

from __future__ import annotations

import os
import shutil
from copy import deepcopy
from tempfile import mkdtemp

# Read when huggingface_hub and transformers are imported. Remote code is copied to a folder of this run.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = mkdtemp(prefix="f2llm-tests-")

import pytest
import torch
from transformers import Qwen2Tokenizer

from modeling_f2llm import F2LLMConfig, F2LLMModel, append_eos
from tests.hub_server.client import client_waits, hub_server

# Fixtures of a Hub on the loopback, for all rooms.
__all__ = ["client_waits", "hub_server"]

# Tensors of a two-layer model are too small to share, and threads that wait for a busy core take ten times as long.
torch.set_num_threads(1)

# Ids of the tiny tokenizer: the lowest that is neither padding nor EOS begins the ordinary tokens.
PAD, EOS, FIRST_TOKEN = 0, 1, 2

SENTENCES = [
    "Where do giant pandas live?",
    "Giant pandas live in the mountain forests of Sichuan.",
    "Der Große Panda lebt in den Bergwäldern Chinas.",
    "Où vivent les pandas géants ?",
    "大熊猫生活在四川的山林里。",
    "ジャイアントパンダは竹を食べます。",
    "Панды живут в бамбуковых лесах.",
    "تعيش الباندا في غابات الخيزران.",
    "विशाल पांडा बाँस खाते हैं।",
    "판다는 대나무를 먹는다.",
]

# Environments that cannot be this one: option, and what is in it.
OTHER_PYTHONS = {
    "onnx-python": "the dependency group onnx",
    "openvino-python": "the dependency group openvino",
    "infinity-python": "infinity-emb and openai",
    "llama-python": "llama-cpp-python",
    "rag-python": "langchain-huggingface, llama-index-embeddings-huggingface and sentence-transformers-haystack",
}


def pytest_addoption(parser):
    for option, packages in OTHER_PYTHONS.items():
        parser.addoption(f"--{option}", metavar="PATH", help=f"interpreter of an environment with {packages}")


@pytest.fixture
def other_python(request):
    """``other_python("onnx-python")``: the interpreter that was given; without one the test is skipped."""

    def find(option):
        path = request.config.getoption(f"--{option}")
        if path is None:
            pytest.skip(f"needs --{option} PATH, an interpreter with {OTHER_PYTHONS[option]}")
        return path

    return find


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def sentences():
    """Ten short texts in nine languages, those the tiny tokenizer was trained on."""
    return list(SENTENCES)


@pytest.fixture(scope="session")
def tiny_config():
    """Two layers, 32 wide, 320 tokens. Shared by the whole session: pass ``deepcopy(tiny_config)`` to a model."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return F2LLMConfig(vocab_size=320, **shape, pad_token_id=PAD, bos_token_id=PAD, eos_token_id=EOS)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer of 300 tokens that appends EOS. Shared by the whole session: copy before changing."""
    blank = Qwen2Tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer = blank.train_new_from_iterator(iter(SENTENCES), vocab_size=300, show_progress=False)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, EOS)
    return append_eos(tokenizer)


@pytest.fixture
def tiny_model(tiny_config):
    """A fresh model on the CPU, fp32, in eval mode; the same weights in every test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return F2LLMModel(deepcopy(tiny_config)).eval()


@pytest.fixture(scope="session")
def random_batch(tiny_config):
    """``random_batch(lengths, side="right", seed=0)``: a padded batch of random texts that end with EOS.

    Returns ``input_ids`` and ``attention_mask``, both ``(len(lengths), max(lengths))``. ``side`` says where the padding
    goes: ``"right"``, ``"left"`` or ``"both"``.
    """

    def build(lengths, side="right", seed=0):
        generator = torch.Generator().manual_seed(seed)
        width = max(lengths)
        input_ids = torch.full((len(lengths), width), PAD)
        attention_mask = torch.zeros(len(lengths), width, dtype=torch.long)
        for row, length in enumerate(lengths):
            start = {"right": 0, "left": width - length, "both": (width - length) // 2}[side]
            text = torch.randint(FIRST_TOKEN, tiny_config.vocab_size, (length,), generator=generator)
            text[length - 1 :] = EOS
            input_ids[row, start : start + length] = text
            attention_mask[row, start : start + length] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    return build
