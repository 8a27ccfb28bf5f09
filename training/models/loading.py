"""Load models and tokenizers whole or not at all, and train a tokenizer on the sources themselves."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from modeling_f2llm.modeling_f2llm import F2LLMModel
from modeling_f2llm.tokenizer import append_eos, end_token_id
from training.common.errors import UserError
from training.data.instructions import with_instruction
from training.data.manifest import Source
from training.data.published import PublishedFile
from training.models.adapters import attach_adapter
from training.models.model_folder import NO_WORDS, is_finite, user_error
from training.models.model_ref import AdapterFolder, base_revision, find_adapter

logger = logging.getLogger("training")


def load_whole_model(name: str, revision: str | None = None, train_adapter: bool = False, **options: Any) -> F2LLMModel:
    """Load a model in fp32 (AdamW at usual learning rates is lost on bf16 weights), or an adapter with its frozen base.

    ``options`` are those of ``F2LLMModel.from_pretrained``, whose exceptions pass.
    """
    adapter = find_adapter(name, revision)
    if adapter is None:
        return _load(name, revision=revision, **options)
    model = load_base(adapter, **options)
    attach_adapter(model, adapter, train_adapter)
    check_finite(model)
    return model


def load_base(adapter: AdapterFolder, **options: Any) -> F2LLMModel:
    """Load the model that an adapter was trained on; a UserError if its weights are not those of the training."""
    remedy = "put its base there, or say where it is as 'base_model_name_or_path' in adapter_config.json"
    with user_error(f"{adapter.name} was trained on {adapter.base}, which cannot be loaded", remedy):
        model = _load(adapter.base, **options)
    if adapter.base_revision not in (None, base_revision(adapter.base, "the base")):
        raise UserError(f"{adapter.name} was trained on {adapter.base}, which has other weights now; {remedy}")
    return model


def _load(name: str, **options: Any) -> F2LLMModel:
    model, loaded = F2LLMModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
    if missing := loaded["missing_keys"]:
        raise ValueError(f"its weights lack {min(missing)}; fetch or save the model again")
    check_finite(model)
    return model


def check_finite(model: nn.Module) -> None:
    """Raise a ValueError if a weight is NaN or infinite; the caller knows the model's name."""
    for name, weight in model.named_parameters():
        if not is_finite(weight.detach()):
            raise ValueError(f"its weight {name} is NaN or infinite; take an earlier state of the model")


def check_tokenizer(tokenizer: Any) -> None:
    """Raise a ValueError if a tokenizer has no words: transformers makes it silently where a folder has none."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        added = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        if set(tokenizer.get_vocab()) <= added:
            raise ValueError(NO_WORDS)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer and make it append EOS to every text, if it appends nothing; say which."""
    with user_error(f"tokenizer {name_or_path!r} cannot be used"):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        check_tokenizer(tokenizer)
        appends = end_token_id(tokenizer)
        append_eos(tokenizer)
    if appends is None:
        logger.info("tokenizer %s appends nothing to a text; %s is appended", name_or_path, tokenizer.eos_token)
    else:
        kept = tokenizer.convert_ids_to_tokens(appends)
        logger.info(
            "tokenizer %s appends %s to a text, which stays; %s is EOS", name_or_path, kept, tokenizer.eos_token
        )
    return tokenizer


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with Qwen's pre-tokenization and special tokens, and all 256 bytes."""
    blank = Qwen2Tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer = blank.train_new_from_iterator(
        texts, vocab_size=vocab_size, new_special_tokens=["<|im_start|>"], show_progress=False
    )
    return append_eos(tokenizer)


def source_texts(sources: Sequence[Source], every: int = 1, skip_bad: bool = False) -> Iterator[str]:
    """Yield what a model reads of every ``every``-th row of a batch: the query under its instruction, the passage."""
    for source in sources:
        for path in source.files:
            for batch in PublishedFile(path).batches(skip_bad=skip_bad):
                queries, passages = (batch.columns[name][::every] for name in ("query", "passage"))
                for query, passage in zip(queries, passages, strict=True):
                    if query and passage:
                        yield from (with_instruction(source.instruction, query), passage)
