"""A smaller vocabulary: only the tokens that somebody's texts use, and what is needed to read any other text."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.modeling_f2llm import F2LLMModel
from training.common.errors import UserError
from training.pruning.byte_level_bpe import ByteLevelBPE
from training.pruning.slicing import build_model


@dataclass(frozen=True)
class VocabularyReport:
    """What trimming did; ``before`` and ``after`` it.

    Attributes:
        tokens_before: Tokens of the tokenizer.
        tokens_after: The same after trimming; the table of embeddings then has as many rows.
        merges_before: Merges of the tokenizer.
        merges_after: The same after trimming.
        embeddings_before: Parameters of the table of embeddings.
        embeddings_after: The same after trimming.
        parameters_before: Parameters of the model.
        parameters_after: The same after trimming.
        bytes_before: Bytes of these parameters.
        bytes_after: The same after trimming.
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

    @property
    def embedding_share_before(self) -> float:
        """Part of the parameters that is the table of embeddings."""
        return self.embeddings_before / self.parameters_before

    @property
    def embedding_share_after(self) -> float:
        """The same after trimming."""
        return self.embeddings_after / self.parameters_after

    def __str__(self) -> str:
        return (
            f"{self.tokens_before:,} -> {self.tokens_after:,} tokens, {self.parameters_before:,} -> "
            f"{self.parameters_after:,} parameters, {self.bytes_before / 2**20:,.1f} -> "
            f"{self.bytes_after / 2**20:,.1f} MiB, embeddings {self.embedding_share_before:.1%} -> "
            f"{self.embedding_share_after:.1%} of them"
        )


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of the same texts before and after trimming, special tokens included.

    Attributes:
        texts: How many texts.
        same: How many of them have the same pieces.
        before: Tokens of all texts.
        after: The same after trimming.
    """

    texts: int
    same: int
    before: int
    after: int

    @property
    def ratio(self) -> float:
        """Tokens after over tokens before: 1.0 if every piece survived."""
        return self.after / self.before if self.before else 1.0


def trim_vocabulary(
    model: F2LLMModel, tokenizer: PreTrainedTokenizerBase, used_ids: Iterable[int]
) -> tuple[F2LLMModel, PreTrainedTokenizerBase, VocabularyReport]:
    """Keeps the tokens that are used, every byte, and all special and added tokens.

    **Any text is still read without loss**: all 256 bytes stay. **A text whose pieces all stay is cut into the same
    pieces.** For a kept token every merge that makes it stays too, and so do the two parts it joins, and what makes
    these, down to bytes. So the merges that stay are those of the old list, in the old order, whose result stays, and
    among them are all that the old tokenizer applies on its way to the pieces. By induction over the merges of a word:
    both tokenizers hold the same symbols; the pair of lowest rank that the old one joins next is on the way to a piece
    that stays, so the new one knows it; and it knows no pair that the old one does not, so none comes before it. Both
    join the same pair, until no pair is left. The embeddings of such a text are the same, bit for bit.

    A text with a piece that is gone is cut into more pieces, as if that token had never been trained.

    The new ids keep the old order. The table of embeddings loses the rows that no token has (151,936 rows for 151,669
    tokens in the published models). Special tokens of the configuration that the tokenizer does not have become None:
    no text holds them.

    Args:
        model: The model; unchanged.
        tokenizer: Its tokenizer, byte-level BPE such as Qwen's; unchanged.
        used_ids: Ids of the tokens that texts use, in any order, as often as they come.

    Returns:
        The model and the tokenizer with the smaller vocabulary, and what that saved. They share nothing with the old.

    Raises:
        UserError: If the tokenizer is not byte-level BPE, does not belong to the model, or an id is no token of it.
    """
    source = ByteLevelBPE.of(tokenizer)
    rows = model.config.vocab_size
    if max(source.tokens.values()) >= rows:
        raise UserError(
            f"the tokenizer has token ids up to {max(source.tokens.values())}, the model only {rows} embeddings; use "
            "the tokenizer that the model was trained with"
        )
    kept = source.closure(used_ids)
    new_ids = {old: new for new, old in enumerate(kept)}
    trimmed = source.renumbered(new_ids)
    smaller = _with_rows(model, _renumbered_config(model.config, new_ids), kept)
    report = VocabularyReport(
        *(len(source.tokens), len(kept)),
        *(len(source.merges), len(trimmed.merges)),
        *(each.embed_tokens.weight.numel() for each in (model, smaller)),
        *(each.num_parameters() for each in (model, smaller)),
        *(sum(weight.nbytes for weight in each.parameters()) for each in (model, smaller)),
    )
    return smaller, trimmed.as_tokenizer(tokenizer), report


def compare_tokens(
    before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, texts: Iterable[str]
) -> TokenCounts:
    """Counts the tokens of texts under both tokenizers."""
    count = same = tokens_before = tokens_after = 0
    for text in texts:
        old, new = (each.convert_ids_to_tokens(each(text)["input_ids"]) for each in (before, after))
        count, same = count + 1, same + (old == new)
        tokens_before, tokens_after = tokens_before + len(old), tokens_after + len(new)
    return TokenCounts(count, same, tokens_before, tokens_after)


def _renumbered_config(config: F2LLMConfig, new_ids: dict[int, int]) -> F2LLMConfig:
    renumbered = deepcopy(config)
    renumbered.vocab_size = len(new_ids)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        old = getattr(config, name)
        new = [new_ids[each] for each in old if each in new_ids] if isinstance(old, list) else new_ids.get(old)
        setattr(renumbered, name, new)
    renumbered.validate()
    return renumbered


def _with_rows(model: F2LLMModel, config: F2LLMConfig, kept: list[int]) -> F2LLMModel:
    """The model with these rows of its table of embeddings."""
    index = torch.tensor(kept, device=model.device)
    table = model.embed_tokens.weight.detach().index_select(0, index)
    others = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return build_model(model, config, {**others, "embed_tokens.weight": table})
