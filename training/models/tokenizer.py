"""Tokenizers: one from the Hub or a folder, or one trained on the sources themselves."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from modeling_f2llm.tokenizer import append_eos, end_token_id
from training.common.errors import UserError, in_one_line
from training.data.instructions import with_instruction
from training.data.manifest import Source
from training.data.published import PublishedFile
from training.models.checks import check_tokenizer

logger = logging.getLogger("training")


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer and makes it end every text with a token, if it does not: EOS.

    Raises:
        UserError: If there is none of that name, or it has no words or no EOS token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        check_tokenizer(tokenizer)
        appends = end_token_id(tokenizer)
        append_eos(tokenizer)
    # Damaged folders come out of the libraries as anything.
    except Exception as error:
        raise UserError(f"tokenizer {name_or_path!r} cannot be used: {in_one_line(error)}") from None
    if appends is None:
        logger.info("tokenizer %s appends nothing to a text; %s is appended", name_or_path, tokenizer.eos_token)
    return tokenizer


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer with Qwen's pre-tokenization and special tokens.

    Args:
        texts: What to train on; the order counts.
        vocab_size: Tokens wanted, special ones included; all 256 bytes are among them, so no text is unknown.
    """
    blank = Qwen2Tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer = blank.train_new_from_iterator(
        texts, vocab_size=vocab_size, new_special_tokens=["<|im_start|>"], show_progress=False
    )
    return append_eos(tokenizer)


def source_texts(sources: Sequence[Source], every: int = 1, skip_bad: bool = False) -> Iterator[str]:
    """Yields what a model reads of every ``every``-th row: the query under its instruction, the passage as it is.

    Args:
        sources: The sources.
        every: Which rows are read of a batch.
        skip_bad: Leave bad rows out, rather than stop at the first.
    """
    for source in sources:
        for path in source.files:
            for batch in PublishedFile(path).batches(skip_bad=skip_bad):
                queries, passages = (batch.columns[name][::every] for name in ("query", "passage"))
                for query, passage in zip(queries, passages, strict=True):
                    if query and passage:
                        yield from (with_instruction(source.instruction, query), passage)
