"""The first layers of a model as a folder of its own: what loading them alone gives, with a card that says so."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import Qwen3Model

from modeling_f2llm import F2LLMConfig
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
    for part in ("The first 1 of the 2 layers of model", f"{count:,} parameters", "was trained to end here"):
        assert part in card.text.replace("\n", " ")


def test_layers_that_are_no_exit_are_warned_of_and_faults_refused(folder, tmp_path, capsys, caplog):
    words = ["--output", str(tmp_path / "out")]
    for more, part in {
        ("--layers", "3"): "has 2 layers; it was trained to end after 2",
        ("--layers", "1", "--dtype", "f16"): "--dtype has no effect with --layers",
    }.items():
        assert main([str(folder), *more, *words]) == 2 and part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with caplog.at_level(logging.WARNING):
        assert main([str(folder), "--layers", "1", *words]) == 0
    assert "expect poor embeddings" in caplog.text
    with pytest.raises(SystemExit):
        main([str(folder), *words])
