"""What older readers find in a packed folder, and that new ones read the same of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sentence_transformers import SentenceTransformer
from transformers import AutoConfig

from training.models.older_readers import write_for_older_readers


def test_a_release_is_written_for_older_readers(release: Path) -> None:
    config = json.loads((release / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    modules = json.loads((release / "modules.json").read_text())
    assert [module["type"] for module in modules] == [
        f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")
    ]
    pooling = json.loads((release / "1_Pooling/config.json").read_text())
    assert pooling["word_embedding_dimension"] == config["hidden_size"]
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_lasttoken", "include_prompt"]
    tokenizer = json.loads((release / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in tokenizer and tokenizer["additional_special_tokens"] == ["<|im_start|>"]
    length = tokenizer["model_max_length"]
    settings = json.loads((release / "sentence_bert_config.json").read_text())
    assert settings == {"max_seq_length": length, "do_lower_case": False}


def test_done_twice_nothing_changes(release: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(release, tmp_path / "again")
    write_for_older_readers(folder)
    for path in release.rglob("*.json"):
        assert (folder / path.relative_to(release)).read_bytes() == path.read_bytes()


def test_new_readers_read_the_same(release: Path, instructed: Path, sentences: list[str]) -> None:
    ours, theirs = (SentenceTransformer(str(folder), device="cpu") for folder in (release, instructed / "model"))
    assert (ours.encode(sentences) == theirs.encode(sentences)).all()
    assert ours.max_seq_length == theirs.max_seq_length
    assert ours.tokenizer.all_special_tokens == theirs.tokenizer.all_special_tokens
    rotary = [AutoConfig.from_pretrained(folder).rope_parameters for folder in (release, instructed / "model")]
    assert rotary[0] == rotary[1]
