"""Trim a vocabulary to the tokens that somebody's texts use, and what is needed to read any other text."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.modeling_f2llm import F2LLMModel
from training.common.errors import UserError
from training.common.outputs import temporary_folder
from training.pruning.pruning import build_model

_FILE, _CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
# The characters that stand for the bytes of a text.
_BYTES = ByteLevel.alphabet()
# ByteLevel holds no ids; those of the others are renumbered.
_POST_PROCESSORS = {"ByteLevel", "TemplateProcessing", "RobertaProcessing", "BertProcessing"}


@dataclass(frozen=True)
class VocabularyReport:
    """What trimming changed: ``before`` and ``after`` it.

    Tokens and merges are the tokenizer's; the table of embeddings then has one row per token. Embeddings, parameters
    and bytes (of the parameters) are the model's.
    """

    tokens_before: int
    tokens_after: int
    merges_before: int
    merges_after: int
    embeddings_before: int
    embeddings_after: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return (
            f"{self.tokens_before:,} -> {self.tokens_after:,} tokens, {self.parameters_before:,} -> "
            f"{self.parameters_after:,} parameters, {self.bytes_before / 2**20:,.1f} -> "
            f"{self.bytes_after / 2**20:,.1f} MiB, embeddings {self.embeddings_before / self.parameters_before:.1%} -> "
            f"{self.embeddings_after / self.parameters_after:.1%} of them"
        )


def trim_vocabulary(
    model: F2LLMModel, tokenizer: PreTrainedTokenizerBase, used_ids: Iterable[int]
) -> tuple[F2LLMModel, PreTrainedTokenizerBase, VocabularyReport]:
    """Keep the tokens that are used, every byte, and all special and added tokens.

    Any text is still read without loss: all 256 bytes stay. A text whose pieces all stay is cut into the same pieces
    and has the same embedding, bit for bit. With a token stay all merges that make it, in the old order, and the parts
    that they join, down to bytes. So on the way to the pieces of such a text, both tokenizers know the same pairs and
    always join the same one next. A text with a piece that is gone is cut into more pieces, as if that token had never
    been trained.

    The new ids keep the old order. The table of embeddings loses the rows that no token has (151,936 rows for 151,669
    tokens in the published models). Special tokens of the configuration that the tokenizer does not have become None.

    Args:
        model: The model; unchanged.
        tokenizer: Its tokenizer, byte-level BPE such as Qwen's; unchanged.
        used_ids: Ids of the tokens that texts use, in any order, repeated or not.

    Returns:
        The model and the tokenizer with the smaller vocabulary, which share nothing with the old, and the change.
    """
    source, rows = _ByteLevelBPE.of(tokenizer), model.config.vocab_size
    if max(source.tokens.values()) >= rows:
        raise UserError(
            f"the tokenizer has token ids up to {max(source.tokens.values())}, the model only {rows} embeddings; use "
            "the tokenizer that the model was trained with"
        )
    kept = source.closure(used_ids)
    new_ids = {old: new for new, old in enumerate(kept)}
    trimmed = source.renumbered(new_ids)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"][torch.tensor(kept, device=model.device)]
    smaller = build_model(model, _renumbered_config(model.config, new_ids), weights)
    report = VocabularyReport(
        *(len(source.tokens), len(kept)),
        *(len(source.merges), len(trimmed.merges)),
        *(each.embed_tokens.weight.numel() for each in (model, smaller)),
        *(each.num_parameters() for each in (model, smaller)),
        *(sum(weight.nbytes for weight in each.parameters()) for each in (model, smaller)),
    )
    return smaller, trimmed.as_tokenizer(tokenizer), report


def _renumbered_config(config: F2LLMConfig, new_ids: dict[int, int]) -> F2LLMConfig:
    renumbered = deepcopy(config)
    renumbered.vocab_size = len(new_ids)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        old = getattr(config, name)
        new = [new_ids[each] for each in old if each in new_ids] if isinstance(old, list) else new_ids.get(old)
        setattr(renumbered, name, new)
    renumbered.validate()
    return renumbered


@dataclass(frozen=True)
class _ByteLevelBPE:
    """A byte-level BPE tokenizer.

    Attributes:
        description: The content of ``tokenizer.json``.
        tokens: Ids of all tokens, added ones included.
        merges: Pairs of tokens that are joined, the first rank first.
    """

    description: dict[str, Any]
    tokens: dict[str, int]
    merges: list[tuple[str, str]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> _ByteLevelBPE:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise UserError(f"tokenizer {name} has no {_FILE}; load it with AutoTokenizer and use_fast=True")
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        if reason := _why_not(description):
            raise UserError(
                f"tokenizer {name} {reason}: only a byte-level BPE tokenizer such as Qwen's can be trimmed; keep its "
                "vocabulary"
            )
        # A merge is a pair or, in files of old versions, one string.
        merges = [tuple(each.split(" ") if isinstance(each, str) else each) for each in description["model"]["merges"]]
        return cls(description, tokenizer.get_vocab(), merges)

    def closure(self, used_ids: Iterable[int]) -> list[int]:
        """Return ids in ascending order: those given, all bytes, special and added tokens, and the parts of these."""
        used = {int(each) for each in used_ids}
        if unknown := sorted(used - set(self.tokens.values())):
            raise UserError(f"used token id {unknown[0]} is no token of the tokenizer; count ids with this tokenizer")
        # Several merges may make the same token.
        parts: defaultdict[int, set[int]] = defaultdict(set)
        for first, second in self.merges:
            parts[self.tokens[first + second]] |= {self.tokens[first], self.tokens[second]}
        kept: set[int] = set()
        waiting = used | {self.tokens[byte] for byte in _BYTES}
        waiting |= {each["id"] for each in self.description["added_tokens"]}
        waiting |= set(_map_ids(self.description["post_processor"], lambda old: old))
        while waiting:
            kept |= waiting
            waiting = set().union(*(parts[each] for each in waiting)) - kept
        return sorted(kept)

    def renumbered(self, new_ids: Mapping[int, int]) -> _ByteLevelBPE:
        """Return the tokenizer of the tokens that have a new id, a closed set."""
        description = deepcopy(self.description)
        model = description["model"]
        tokens = {token: new_ids[old] for token, old in self.tokens.items() if old in new_ids}
        merges = [pair for pair in self.merges if pair[0] + pair[1] in tokens]
        ordinary = sorted((new_ids[old], token) for token, old in model["vocab"].items() if old in new_ids)
        model["vocab"] = {token: number for number, token in ordinary}
        model["merges"] = [list(pair) for pair in merges]
        for each in description["added_tokens"]:
            each["id"] = new_ids[each["id"]]
        _map_ids(description["post_processor"], new_ids.__getitem__)
        # They come from the last call, not from the tokenizer.
        description["padding"] = description["truncation"] = None
        return _ByteLevelBPE(description, tokens, merges)

    def as_tokenizer(self, like: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Return a tokenizer of this description, otherwise like the given one."""
        with temporary_folder() as name:
            folder = Path(name)
            like.save_pretrained(folder)
            (folder / _FILE).write_text(json.dumps(self.description, ensure_ascii=False), encoding="utf-8")
            config = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
            # It has the old ids; tokenizer.json has the new ones.
            config.pop("added_tokens_decoder", None)
            (folder / _CONFIG_FILE).write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
            tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.get_vocab() != self.tokens:
            raise UserError(
                f"tokenizer {like.name_or_path or type(like).__name__} gives its tokens other ids when it is loaded; "
                "keep its vocabulary"
            )
        tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = like.name_or_path
        tokenizer.model_max_length = like.model_max_length
        tokenizer.padding_side, tokenizer.truncation_side = like.padding_side, like.truncation_side
        return tokenizer


def _why_not(description: dict[str, Any]) -> str | None:
    """Return why a tokenizer cannot be trimmed; None if it can."""
    model, pre_tokenizer = description["model"], description["pre_tokenizer"] or {}
    if model["type"] != "BPE":
        return f"is {model['type']}"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("byte_fallback"):
        return "marks words or bytes in its tokens"
    if not set(_BYTES) <= set(model["vocab"]):
        return "has no token for some bytes"
    if "ByteLevel" not in [part.get("type") for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer])]:
        return "does not work on bytes"
    unknown = {part["type"] for part in _processors(description["post_processor"])} - _POST_PROCESSORS
    return f"has a post-processor {unknown.pop()}" if unknown else None


def _processors(post_processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the post-processors in a sequence of them, or the single one."""
    if post_processor is None:
        return []
    return post_processor["processors"] if post_processor["type"] == "Sequence" else [post_processor]


def _map_ids(post_processor: dict[str, Any] | None, new_id: Callable[[int], int]) -> list[int]:
    """Replace the ids that a post-processor adds to a text, in place, and return them."""
    found = []
    for part in _processors(post_processor):
        for token in part.get("special_tokens", {}).values():
            token["ids"] = [new_id(old) for old in token["ids"]]
            found += token["ids"]
        for name in {"sep", "cls"} & part.keys():
            part[name][1] = new_id(part[name][1])
            found.append(part[name][1])
    return found
