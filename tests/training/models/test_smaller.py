"""The first layers of a model as a folder of its own: what loading them alone gives, with a card that says so."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, Qwen3Model

from modeling_f2llm import F2LLMConfig, F2LLMModel
from tests.training.models.starts import edit_json
from training.export import main


def test_a_smaller_model_embeds_as_its_layers_do(folder, tmp_path, sentences, caplog):
    edit_json(folder / "config.json", exit_layers=[1, 2])
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: de\nbase_model: a/b\n---\nAll about 2 layers.\n")
    wanted = SentenceTransformer(str(folder), config_kwargs={"num_hidden_layers": 1}).encode_query(sentences)
    words = [str(folder), "--layers", "1", "--output", str(tmp_path / "out")]
    assert main(words) == 0 and main(words) == 0 and not caplog.records[1:]
    smaller = SentenceTransformer(str(tmp_path / "out"))
    assert type(smaller[0].auto_model) is Qwen3Model
    np.testing.assert_allclose(smaller.encode_query(sentences), wanted, atol=1e-6)
    weights = load_file(tmp_path / "out/model.safetensors")
    assert weights.keys() == smaller[0].auto_model.state_dict().keys()
    config = F2LLMConfig.from_pretrained(tmp_path / "out")
    assert (config.layer_types, config.exit_layers, config.max_window_layers) == (["full_attention"], [1], 1)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.license, card.data.language, card.data.base_model) == ("mit", "de", None)
    count = sum(weight.numel() for weight in weights.values())
    for part in ("A part of model: the first 1 of 2 layers.", f"{count:,} parameters", "ended after these layers, too"):
        assert part in card.text


def test_a_lower_rank_needs_the_code_of_its_folder(folder, tmp_path, sentences, capsys):
    model = F2LLMModel.from_pretrained(folder)
    model.factorize_embeddings([8, 16])
    model.save_pretrained(folder)
    options = {"trust_remote_code": True, "model_kwargs": {"num_hidden_layers": 1, "embedding_rank": 8}}
    wanted = SentenceTransformer(str(folder), **options).encode_query(sentences)
    output = tmp_path / "out"
    assert main([str(folder), "--layers", "1", "--rank", "8", "--output", str(output)]) == 0
    smaller = SentenceTransformer(str(output), trust_remote_code=True)
    np.testing.assert_allclose(smaller.encode_query(sentences), wanted, atol=1e-6)
    assert sum(each.numel() for each in load_file(output / "model.safetensors").values()) == sum(
        each.numel() for each in smaller.parameters()
    )
    assert "token embeddings of rank 8" in (output / "README.md").read_text()
    # Stock Qwen3 would embed tokens at random.
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(output, trust_remote_code=False)
    # The whole model is stock Qwen3 again.
    assert main([str(folder), "--layers", "2", "--output", str(tmp_path / "stock")]) == 0
    stock, own = (SentenceTransformer(str(each)).encode(sentences) for each in (tmp_path / "stock", folder))
    np.testing.assert_allclose(stock, own, atol=1e-6)
    assert main([str(folder), "--rank", "9", "--output", str(tmp_path / "nine")]) == 2
    assert "it was trained at 8, 16" in capsys.readouterr().err


def test_layers_that_are_no_exit_are_warned_of_and_faults_refused(folder, tmp_path, capsys, caplog):
    words = ["--output", str(tmp_path / "out")]
    for more, part in {
        ("--layers", "3"): "has 2 layers; it was trained to end after 2",
        ("--rank", "8"): "have no factors of this rank; train with 'embedding_ranks' first",
        ("--layers", "1", "--dtype", "f16"): "--dtype has no effect without --backend",
        ("--layers", "1", "--backend", "gguf"): "--layers has no effect with --backend gguf",
        (): "nothing to export",
    }.items():
        assert main([str(folder), *more, *words]) == 2 and part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with caplog.at_level(logging.WARNING):
        assert main([str(folder), "--layers", "1", *words]) == 0
    assert "expect poor embeddings" in caplog.text
