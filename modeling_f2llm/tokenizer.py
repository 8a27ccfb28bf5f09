"""Tokenizers that end every text with the same token, as last-token pooling needs."""

from __future__ import annotations

from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import PreTrainedTokenizerBase

__all__ = ["append_eos", "end_token_id"]


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the token that a tokenizer appends to every text, or None if it appends none.

    It need not be the EOS token: Qwen3-Embedding's tokenizer has ``<|im_end|>`` as EOS and appends ``<|endoftext|>``,
    its padding token. The embedding is read at the token that is appended.
    """
    ids, text = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    return None if ids[len(ids) - len(text) :] == text else ids[-1]


def append_eos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Make a fast tokenizer end every text with a token, and keep it when it truncates.

    Last-token pooling reads the embedding at that token. A tokenizer that appends one keeps it, because the model was
    trained with it, and its padding side; any other gets its EOS token, and pads on the right. transformers 5 ignores
    ``add_eos_token``, so the token comes from the post-processor, which is saved in ``tokenizer.json`` and works in
    every runtime that reads that file.

    Args:
        tokenizer: A fast tokenizer with an EOS token; changed in place.

    Returns:
        The same tokenizer.

    Raises:
        ValueError: If the tokenizer has no EOS token or is not a fast one.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {name} has no EOS token: name one of its special tokens in its tokenizer_config.json, for "
            'instance "eos_token": "<|im_end|>"'
        )
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {name} is not a fast tokenizer: load it with AutoTokenizer and use_fast=True")
    if tokenizer.pad_token_id is None:
        # Some token must fill a batch up. Its attention mask says which ones are padding, so EOS can do it, too.
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.truncation_side = "right"
    if end_token_id(tokenizer) is None:
        tokenizer.padding_side = "right"
        _append(tokenizer, tokenizer.eos_token)
    return tokenizer


def _append(tokenizer: PreTrainedTokenizerBase, end: str) -> None:
    """Sets a post-processor that puts ``end`` after a text, and before it what the tokenizer puts there today."""
    ids, text = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    first = tokenizer.convert_ids_to_tokens(ids[: len(ids) - len(text)])
    template = TemplateProcessing(
        single=[*first, "$A", end],
        pair=[*first, "$A", end, *(f"{token}:1" for token in first), "$B:1", f"{end}:1"],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in {*first, end}],
    )
    backend = tokenizer.backend_tokenizer
    # A byte-level post-processor only trims offsets, but byte-level tokenizers expect to find it.
    before = backend.post_processor
    parts = list(before) if isinstance(before, Sequence) else [before]
    byte_level = any(isinstance(part, ByteLevel) for part in parts)
    backend.post_processor = Sequence([ByteLevel(trim_offsets=False), template]) if byte_level else template
