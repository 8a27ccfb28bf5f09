"""The one thing F2LLM asks of a tokenizer: that it ends every text with EOS by itself."""

from __future__ import annotations

from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import PreTrainedTokenizerBase

__all__ = ["append_eos"]


def append_eos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Makes a fast tokenizer append its EOS token, and keep it when it truncates.

    Last-token pooling reads the embedding at EOS. transformers 5 ignores ``add_eos_token``, so the token comes from the
    post-processor, which is saved in ``tokenizer.json`` and works in every runtime that reads that file.

    Args:
        tokenizer: A fast tokenizer with an EOS token; changed in place. Padding goes to the right.

    Returns:
        The same tokenizer.

    Raises:
        ValueError: If the tokenizer has no EOS token, is not a fast one, or pads with its EOS token (texts would then
            seem to end where padding begins).
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name} has no EOS token: set tokenizer.eos_token, for instance to <|im_end|>")
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {name} is not a fast tokenizer: load it with AutoTokenizer and use_fast=True")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"tokenizer {name} needs a padding token other than its EOS token {tokenizer.eos_token}: "
            "set tokenizer.pad_token, for instance to <|endoftext|>"
        )
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "right"
    if tokenizer("a").input_ids[-1:] != [tokenizer.eos_token_id]:
        eos = tokenizer.eos_token
        template = TemplateProcessing(
            single=f"$A {eos}",
            pair=f"$A {eos} $B:1 {eos}:1",
            special_tokens=[(eos, tokenizer.eos_token_id)],
        )
        backend = tokenizer.backend_tokenizer
        # A byte-level post-processor only trims offsets, but byte-level tokenizers expect to find it.
        byte_level = isinstance(backend.post_processor, ByteLevel)
        backend.post_processor = Sequence([ByteLevel(trim_offsets=False), template]) if byte_level else template
    return tokenizer
