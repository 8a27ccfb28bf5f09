"""A byte-level BPE tokenizer as its ``tokenizer.json`` describes it, and the same with fewer tokens."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from training.common.errors import UserError
from training.common.outputs import temporary_folder

_FILE, _CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
# What the text's own bytes look like after byte-level pre-tokenization.
_BYTES = ByteLevel.alphabet()
# Post-processors that hold no ids.
_WITHOUT_IDS = ("ByteLevel",)


@dataclass(frozen=True)
class ByteLevelBPE:
    """The parts of a tokenizer that ids and merges are in.

    Attributes:
        description: The content of ``tokenizer.json``.
        tokens: Ids of all tokens, added ones included.
        merges: Pairs of tokens that are joined, the first rank first.
    """

    description: dict[str, Any]
    tokens: dict[str, int]
    merges: list[tuple[str, str]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ByteLevelBPE:
        """Reads a tokenizer.

        Raises:
            UserError: If it is not byte-level BPE with a token for every byte.
        """
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise UserError(f"tokenizer {name} has no {_FILE}; load it with AutoTokenizer and use_fast=True")
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        reason = _why_not(description)
        if reason:
            raise UserError(
                f"tokenizer {name} {reason}: only a byte-level BPE tokenizer such as Qwen's can be trimmed; leave "
                "its vocabulary as it is"
            )
        # A merge is a pair or, in files of old versions, one string.
        merges = [tuple(each.split(" ") if isinstance(each, str) else each) for each in description["model"]["merges"]]
        return cls(description, tokenizer.get_vocab(), merges)

    def closure(self, used_ids: Iterable[int]) -> list[int]:
        """Ids in ascending order: those given, all bytes, special and added tokens, and the parts of all these.

        Raises:
            UserError: If an id is no token.
        """
        used = {int(each) for each in used_ids}
        strange = sorted(used - set(self.tokens.values()))
        if strange:
            raise UserError(f"used token id {strange[0]} is no token of the tokenizer; count ids with this tokenizer")
        kept = used | {self.tokens[byte] for byte in _BYTES}
        kept |= {each["id"] for each in self.description["added_tokens"]}
        kept |= set(_ids(self.description["post_processor"]))
        parts = self._parts()
        waiting = list(kept)
        while waiting:
            for part in parts[waiting.pop()]:
                if part not in kept:
                    kept.add(part)
                    waiting.append(part)
        return sorted(kept)

    def _parts(self) -> Mapping[int, set[int]]:
        """For each token, both parts of every merge that makes it; several merges may make the same."""
        parts: defaultdict[int, set[int]] = defaultdict(set)
        for first, second in self.merges:
            parts[self.tokens[first + second]] |= {self.tokens[first], self.tokens[second]}
        return parts

    def renumbered(self, new_ids: Mapping[int, int]) -> ByteLevelBPE:
        """The tokenizer of the tokens that have a new id, a closed set."""
        description = deepcopy(self.description)
        model = description["model"]
        tokens = {token: new_ids[old] for token, old in self.tokens.items() if old in new_ids}
        merges = [pair for pair in self.merges if pair[0] + pair[1] in tokens]
        ordinary = sorted((new_ids[old], token) for token, old in model["vocab"].items() if old in new_ids)
        model["vocab"] = {token: number for number, token in ordinary}
        model["merges"] = [list(pair) for pair in merges]
        for each in description["added_tokens"]:
            each["id"] = new_ids[each["id"]]
        description["post_processor"] = _with_ids(description["post_processor"], new_ids)
        # The padding and truncation of the last call are no part of the tokenizer.
        description["padding"] = description["truncation"] = None
        return ByteLevelBPE(description, tokens, merges)

    def as_tokenizer(self, like: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """A tokenizer of this description, otherwise like the given one.

        Raises:
            UserError: If transformers makes other ids of it.
        """
        with temporary_folder() as name:
            folder = Path(name)
            like.save_pretrained(folder)
            (folder / _FILE).write_text(json.dumps(self.description, ensure_ascii=False), encoding="utf-8")
            _without_added_tokens(folder / _CONFIG_FILE)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.get_vocab() != self.tokens:
            raise UserError(
                f"tokenizer {like.name_or_path or type(like).__name__} gives its tokens other ids when it is loaded; "
                "leave its vocabulary as it is"
            )
        tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = like.name_or_path
        tokenizer.model_max_length = like.model_max_length
        tokenizer.padding_side, tokenizer.truncation_side = like.padding_side, like.truncation_side
        return tokenizer


def _why_not(description: dict[str, Any]) -> str | None:
    """Why a tokenizer cannot be trimmed; None if it can."""
    model = description["model"]
    if model["type"] != "BPE":
        return f"is {model['type']}"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("byte_fallback"):
        return "marks words or bytes in its tokens"
    if not set(_BYTES) <= set(model["vocab"]):
        return "has no token for some bytes"
    pre_tokenizer = description["pre_tokenizer"] or {}
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not any(part.get("type") == "ByteLevel" for part in parts):
        return "does not work on bytes"
    unknown = {part["type"] for part in _processors(description["post_processor"])} - {
        *("TemplateProcessing", "RobertaProcessing", "BertProcessing"),
        *_WITHOUT_IDS,
    }
    return f"has a post-processor {unknown.pop()}" if unknown else None


def _processors(post_processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The post-processors in a sequence of them, or the single one."""
    if post_processor is None:
        return []
    if post_processor["type"] != "Sequence":
        return [post_processor]
    return [part for each in post_processor["processors"] for part in _processors(each)]


def _ids(post_processor: dict[str, Any] | None) -> Iterable[int]:
    """Ids that a post-processor adds to a text."""
    for part in _processors(post_processor):
        for token in part.get("special_tokens", {}).values():
            yield from token["ids"]
        yield from (part[name][1] for name in ("sep", "cls") if name in part)


def _with_ids(post_processor: dict[str, Any] | None, new_ids: Mapping[int, int]) -> dict[str, Any] | None:
    """The same post-processor with new ids."""
    renumbered = deepcopy(post_processor)
    for part in _processors(renumbered):
        for token in part.get("special_tokens", {}).values():
            token["ids"] = [new_ids[old] for old in token["ids"]]
        for name in {"sep", "cls"} & part.keys():
            part[name][1] = new_ids[part[name][1]]
    return renumbered


def _without_added_tokens(path: Path) -> None:
    """Takes the old ids of added tokens out of the configuration; ``tokenizer.json`` has the new ones."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("added_tokens_decoder", None) is not None:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
