"""A packed folder without a run: a tiny model, and a record that says what it is."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from modeling_f2llm import F2LLMModel, build_sentence_transformer
from training.publishing.card import model_card
from training.publishing.record import RECORD, ModelRelease, Reference, StageRecord

__all__ = ["NAME", "write_packed"]

NAME = "tiny-embedder"


def write_packed(folder: Path, model: F2LLMModel, tokenizer: PreTrainedTokenizerBase, name: str = NAME) -> Path:
    """Writes what ``publish.py pack`` writes, scores and figures aside."""
    whole = build_sentence_transformer(model, deepcopy(tokenizer))
    whole.save_pretrained(str(folder), create_model_card=False)
    (folder / "LICENSE").write_text("Apache License 2.0\n")
    config = model.config
    release = ModelRelease(
        name=name,
        licence="apache-2.0",
        parameters=model.num_parameters(),
        dtype="float32",
        dimension=config.hidden_size,
        dimensions=(config.hidden_size,),
        max_length=512,
        shape={field: getattr(config, field) for field in ("hidden_size", "num_hidden_layers", "vocab_size")},
        prompts=dict(whole.prompts),
        languages=("eng",),
        stages=(StageRecord("stage1", "training", Reference("scratch"), steps=10),),
    )
    record = folder / RECORD
    record.write_text(release.to_json())
    (folder / "README.md").write_text(model_card(folder))
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != record]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    record.write_text(replace(release, files=sizes).to_json())
    return folder
