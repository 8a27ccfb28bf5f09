"""What an exported graph is compared with."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase, Qwen3Config

from modeling_f2llm import F2LLMModel, build_sentence_transformer
from training.common.errors import StoppedError, UserError
from training.models import exporting


@pytest.fixture
def halved(tiny_model: F2LLMModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, request) -> Path:
    """A checkpoint of the precision that the test names, and the same numbers in fp32 beside it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, weights in tiny_model.named_parameters():
            # Larger than at the start of training, so that precision shows.
            weights.data.normal_(1 if name.endswith("norm.weight") else 0, 0.3)
    for name, dtype in (("half", request.param), ("whole", torch.float32)):
        model = build_sentence_transformer(tiny_model.to(dtype), deepcopy(tiny_tokenizer))
        model.save_pretrained(str(tmp_path / name), create_model_card=False)
    return tmp_path


@pytest.mark.parametrize("halved", [torch.bfloat16, torch.float16], indirect=True)
def test_a_graph_is_compared_with_the_numbers_of_fp32(halved: Path, monkeypatch: pytest.MonkeyPatch):
    def check() -> float:
        return exporting.check_same_embeddings(halved / "half", halved / "whole", "openvino", "fp32", "graph")

    # What stands for the graph computes in fp32.
    monkeypatch.setattr(exporting, "_loading", lambda *_: {"device": "cpu"})
    assert SentenceTransformer(str(halved / "half"), device="cpu").dtype != torch.float32
    assert check() > 0.999999
    monkeypatch.setitem(exporting.LEAST_COSINE, "fp32", 1.1)
    with pytest.raises(StoppedError, match="was not kept"):
        check()


def test_a_model_with_the_names_of_a_language_model_is_whole(
    tiny_model: F2LLMModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    build_sentence_transformer(tiny_model, deepcopy(tiny_tokenizer)).save_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(Qwen3Config.from_dict(tiny_model.config.to_dict()).to_json_string())
    path = tmp_path / "model.safetensors"
    weights = {f"model.{name}": weight for name, weight in load_file(path).items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, path, metadata={"format": "pt"})
    exporting.check_whole(tmp_path, tmp_path)
    del weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weight norm\.weight is absent"):
        exporting.check_whole(tmp_path, tmp_path)
