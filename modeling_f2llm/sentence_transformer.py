"""From a model and a tokenizer to a SentenceTransformer, and so to the released folder."""

from __future__ import annotations

from collections.abc import Mapping
from tempfile import TemporaryDirectory
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .prompts import DEFAULT_PROMPTS
from .tokenizer import append_eos

__all__ = ["build_sentence_transformer"]


class _LoadedTransformer(Transformer):
    """A Transformer module around a model that is in memory already."""

    def __init__(self, folder: str, model: PreTrainedModel) -> None:
        # nn.Module refuses a submodule before its own __init__ has run, a plain list it accepts.
        self.__dict__["_loaded"] = [model]
        super().__init__(folder)
        self.__dict__.pop("_loaded")

    def _load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        return self.__dict__["_loaded"][0]


def _transformer_module(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Transformer:
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        module = _LoadedTransformer(folder, model)
    # modules.json names the class: a released folder must not need this package.
    module.__class__ = Transformer
    return module


def build_sentence_transformer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, str] | None = None,
) -> SentenceTransformer:
    """Wraps a model as the published ones are: last-token pooling, unit length, cosine similarity, a query prompt.

    ``save_pretrained`` of the result writes the released folder. sentence-transformers alone loads it (as
    ``Qwen3Model``); with ``trust_remote_code=True`` the copy of :class:`F2LLMModel` in the folder runs instead.

    Args:
        model: An :class:`F2LLMModel`, or any causal encoder whose last token carries the embedding. Shared, not copied.
        tokenizer: A fast tokenizer with an EOS token; changed in place so that it appends EOS.
        prompts: Texts put before the input by prompt name; the published ``query`` and ``document`` by default.

    Raises:
        ValueError: If the tokenizer has no EOS token or more tokens than the model has embeddings.

    Example:
        >>> sentence_transformer = build_sentence_transformer(model, tokenizer)  # doctest: +SKIP
        >>> sentence_transformer.encode_query(["Where do pandas live?"]).shape  # doctest: +SKIP
        (1, 896)
    """
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {model.config.vocab_size} embeddings: "
            "use the tokenizer the model was trained with, or resize the model's token embeddings"
        )
    append_eos(tokenizer)
    if model.config.pad_token_id is None:
        # Servers read it there.
        model.config.pad_token_id = tokenizer.pad_token_id
    width = model.config.hidden_size
    modules = [_transformer_module(model, tokenizer), Pooling(width, pooling_mode="lasttoken"), Normalize()]
    return SentenceTransformer(
        modules=modules,
        prompts=dict(DEFAULT_PROMPTS if prompts is None else prompts),
        similarity_fn_name="cosine",
        device=str(model.device),
    )
