"""Tokenizers: one from the Hub or a folder, or one trained on the sources themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from modeling_f2llm.tokenizer import append_eos
from training.data.instructions import with_instruction
from training.data.manifest import Source
from training.data.published import PublishedFile
from training.errors import UserError

__all__ = ["load_tokenizer", "source_texts", "train_tokenizer"]


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer and makes it append EOS.

    Raises:
        UserError: If there is none of that name, or it has no EOS token.
    """
    try:
        return append_eos(AutoTokenizer.from_pretrained(name_or_path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"tokenizer {name_or_path!r} cannot be used: {reason}") from None


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
