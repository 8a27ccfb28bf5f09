"""Trim a vocabulary to the tokens that somebody's texts use, and what is needed to read any other text."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_f2llm.modeling_f2llm import F2LLMModel
from training.common.errors import UserError
from training.common.outputs import temporary_folder
from training.models.model_folder import read_json
from training.pruning.pruning import build_model

# The characters that stand for the bytes of a text.
_BYTES = ByteLevel.alphabet()


@dataclass(frozen=True)
class VocabularyReport:
    """Tokens of the tokenizer and parameters of the model before and after trimming; one row stays for each token."""

    tokens_before: int
    tokens_after: int
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        return (
            f"{self.tokens_before:,} -> {self.tokens_after:,} tokens, {self.parameters_before:,} -> "
            f"{self.parameters_after:,} parameters"
        )


def trim_vocabulary(
    model: F2LLMModel, tokenizer: PreTrainedTokenizerBase, used_ids: Iterable[int]
) -> tuple[F2LLMModel, PreTrainedTokenizerBase, VocabularyReport]:
    """Keep the tokens of byte-level BPE that are used, every byte, and all special and added tokens.

    Any text is still read without loss: all 256 bytes stay. A text whose pieces all stay is cut into the same pieces
    and has the same embedding, bit for bit. With a token stay all merges that make it, in the old order, and the parts
    that they join, down to bytes. So on the way to the pieces of such a text, both tokenizers know the same pairs and
    always join the same one next. A text with a piece that is gone is cut into more pieces, as if that token had never
    been trained.

    The new ids keep the old order. The table of embeddings loses the rows that no token has (151,936 rows for 151,669
    tokens in the published models). Special tokens of the configuration that the tokenizer does not have become None.
    The model and the tokenizer that are returned share nothing with the old ones.
    """
    tokens, used = tokenizer.get_vocab(), {int(each) for each in used_ids}
    if max(tokens.values()) >= model.config.vocab_size or not used <= set(tokens.values()):
        raise UserError("token ids of the texts, tokenizer and model differ; use the tokenizer of the model's training")
    description = _description(tokenizer)
    kept = _closure(description, tokens, used)
    new_ids = {old: new for new, old in enumerate(kept)}
    _renumber(description, new_ids)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"][torch.tensor(kept, device=model.device)]
    config = deepcopy(model.config)
    config.vocab_size = len(new_ids)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        old = getattr(config, name)
        new = [new_ids[each] for each in old if each in new_ids] if isinstance(old, list) else new_ids.get(old)
        setattr(config, name, new)
    config.validate()
    smaller = build_model(model, config, weights)
    report = VocabularyReport(len(tokens), len(kept), model.num_parameters(), smaller.num_parameters())
    trimmed = _as_tokenizer(description, tokenizer)
    if trimmed.get_vocab() != {token: new_ids[old] for token, old in tokens.items() if old in new_ids}:
        raise UserError(f"tokenizer {tokenizer.name_or_path} changes its ids when it is loaded; keep its vocabulary")
    return smaller, trimmed, report


def rank_tokens(tokenizer: PreTrainedTokenizerBase, counts: np.ndarray) -> tuple[list[int], int]:
    """Order the used tokens of byte-level BPE by ``(V,)`` counts; return their ids, and the fewest that can stay alone.

    The fewest are all bytes and all special and added tokens. A token comes after its parts, so any longer beginning of
    the list is what :func:`trim_vocabulary` keeps of it. Of equally frequent tokens the one of the lower id is first.
    """
    description, tokens = _description(tokenizer), tokenizer.get_vocab()
    parts, needed = _parts(description, tokens), _closure(description, tokens, set())
    ranked = dict.fromkeys(needed)
    for token in np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist():
        waiting = [token]
        while waiting:
            missing = sorted(parts[waiting[-1]] - ranked.keys())
            if missing:
                waiting += missing
            else:
                ranked[waiting.pop()] = None
    return list(ranked), len(needed)


def _description(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of ``tokenizer.json``; a UserError if it is no byte-level BPE tokenizer."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model, pre_tokenizer = description["model"], description["pre_tokenizer"] or {}
    steps = [part.get("type") for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer])]
    marks = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if (
        model["type"] != "BPE"
        or any(model.get(mark) for mark in marks)
        or not set(_BYTES) <= set(model["vocab"])
        or "ByteLevel" not in steps
        or {part["type"] for part in _processors(description)} - {"ByteLevel", "TemplateProcessing"}
    ):
        raise UserError(
            f"tokenizer {tokenizer.name_or_path} ({model['type']}): only a byte-level BPE tokenizer such as Qwen's can "
            "be trimmed; keep its vocabulary"
        )
    # A merge is a pair or, in files of old versions, one string.
    model["merges"] = [tuple(each.split(" ") if isinstance(each, str) else each) for each in model["merges"]]
    return description


def _processors(description: dict[str, Any]) -> list[dict[str, Any]]:
    processor = description["post_processor"] or {"type": "Sequence", "processors": []}
    return processor["processors"] if processor["type"] == "Sequence" else [processor]


def _templates(description: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the descriptions of the tokens that are put around a text."""
    return [token for part in _processors(description) for token in part.get("special_tokens", {}).values()]


def _parts(description: dict[str, Any], tokens: dict[str, int]) -> defaultdict[int, set[int]]:
    """Return the ids of the tokens that a merge joins to a token; several merges may make the same one."""
    parts: defaultdict[int, set[int]] = defaultdict(set)
    for first, second in description["model"]["merges"]:
        parts[tokens[first + second]] |= {tokens[first], tokens[second]}
    return parts


def _closure(description: dict[str, Any], tokens: dict[str, int], used: set[int]) -> list[int]:
    """Return ids in ascending order: those used, all bytes, special and added tokens, and the parts of these."""
    parts, kept = _parts(description, tokens), set()
    waiting = used | {tokens[byte] for byte in _BYTES} | {each["id"] for each in description["added_tokens"]}
    waiting |= {each for token in _templates(description) for each in token["ids"]}
    while waiting:
        kept |= waiting
        waiting = set().union(*(parts[each] for each in waiting)) - kept
    return sorted(kept)


def _renumber(description: dict[str, Any], new_ids: dict[int, int]) -> None:
    """Give a description the tokens that have a new id, a closed set."""
    model = description["model"]
    ordinary = sorted((new_ids[old], token) for token, old in model["vocab"].items() if old in new_ids)
    model["vocab"] = {token: number for number, token in ordinary}
    model["merges"] = [list(pair) for pair in model["merges"] if "".join(pair) in model["vocab"]]
    for each in description["added_tokens"]:
        each["id"] = new_ids[each["id"]]
    for token in _templates(description):
        token["ids"] = [new_ids[old] for old in token["ids"]]
    # They come from the last call, not from the tokenizer.
    description["padding"] = description["truncation"] = None


def _as_tokenizer(description: dict[str, Any], like: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    with temporary_folder() as name:
        folder = Path(name)
        like.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
        # It has the old ids; tokenizer.json has the new ones.
        config = read_json(folder / "tokenizer_config.json")
        config.pop("added_tokens_decoder", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = like.name_or_path
    tokenizer.model_max_length = like.model_max_length
    tokenizer.padding_side, tokenizer.truncation_side = like.padding_side, like.truncation_side
    return tokenizer
