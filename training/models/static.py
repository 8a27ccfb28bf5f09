"""Static models: a text's embedding is the mean of its tokens' own, as in sentence-transformers' ``StaticEmbedding``.

:func:`distil_static` makes one from a finished model without texts, as model2vec does (Tulkens and van Dongen, 2024,
"Model2Vec: Fast State-of-the-Art Static Embeddings"); :class:`StaticModel` trains one as any other model here.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sklearn.decomposition import PCA
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_f2llm.tokenizer import append_eos, end_token_id
from training.common.errors import UserError
from training.common.outputs import check_output
from training.data.prepared import DESCRIPTION, PreparedSource
from training.models.encoders import load_encoder
from training.models.model_folder import recorded_folder
from training.models.model_ref import ModelRef, prompts_of, resolve

logger = logging.getLogger("training")

# The a of smooth inverse frequency, a / (a + p) (Arora et al., 2017, "A Simple but Tough-to-Beat Baseline for Sentence
# Embeddings"); model2vec's default.
SIF = 1e-4
_MOST_DIMENSIONS = 256
_RECORD = "export.json"
_TOKENS_AT_ONCE = 1024


class StaticConfig(PreTrainedConfig):
    """Shape of a static model; ``end_token_id`` is the token after each packed text, which is not part of the mean."""

    model_type = "static_embedding"
    hidden_size: int = 256
    vocab_size: int = 0
    end_token_id: int = 0
    attention_dropout: float = 0.0
    # No position is embedded, and there are no layers or factors.
    max_position_embeddings: int = 1 << 30
    num_hidden_layers: int = 0
    embedding_ranks: list[int] | None = None


class StaticModel(PreTrainedModel):
    """The mean of a text's token embeddings, over texts packed end to end."""

    config_class = StaticConfig

    def __init__(self, config: StaticConfig) -> None:
        super().__init__(config)
        # sentence-transformers reads a text without the token at its end.
        self.embedding = nn.EmbeddingBag(
            config.vocab_size, config.hidden_size, mode="mean", padding_idx=config.end_token_id
        )
        self.post_init()

    def forward(self, input_ids: Tensor, sequence_lengths: list[int], **kwargs: Any) -> Tensor:
        """``(1, T)`` ids of ``n`` texts, each with its end token → ``(n, d)`` unnormalised embeddings.

        Further arguments of F2LLMModel have no meaning here.
        """
        lengths = torch.tensor(sequence_lengths, device=input_ids.device)
        return self.embedding(input_ids[0], lengths.cumsum(0) - lengths)


def is_static(model: ModelRef | str) -> bool:
    """Return whether a model's first module is a ``StaticEmbedding``."""
    ref = model if isinstance(model, ModelRef) else ModelRef(model, model)
    modules = ref.read("modules.json")
    # Others refuse what is no list of modules.
    first = modules[0] if isinstance(modules, list) and modules else None
    return isinstance(first, dict) and str(first.get("type")).endswith(".StaticEmbedding")


def load_static(model: ModelRef, key: str, tokenizer: PreTrainedTokenizerBase) -> StaticModel:
    """Load a static model to train it, in fp32; the tokenizer is its own, with an end token after every text."""
    loaded = load_encoder(model, key, device="cpu")
    if kinds := [type(module).__name__ for module in list(loaded)[1:] if not isinstance(module, Normalize)]:
        raise UserError(f"{key}: {model.name!r} has the module {kinds[0]} after its token embeddings; give one without")
    weights = loaded[0].embedding.weight
    if tokenizer("a").input_ids[:-1] != tokenizer("a", add_special_tokens=False).input_ids:
        raise UserError(f"{key}: the tokenizer of {model.name!r} puts tokens before a text, which a mean must not hold")
    if len(tokenizer) > len(weights):
        raise UserError(f"{key}: {len(tokenizer)} tokens but {len(weights)} embeddings; leave out 'tokenizer'")
    return _with_embeddings(weights.detach(), tokenizer)


def _with_embeddings(weights: Tensor, tokenizer: PreTrainedTokenizerBase) -> StaticModel:
    """Return a model of the ``(V, d)`` embeddings of a tokenizer with an end token."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    shape = {"vocab_size": len(weights), "hidden_size": weights.shape[1]}
    static = StaticModel(StaticConfig(**shape, **ids, end_token_id=end_token_id(tokenizer)))
    static.embedding.weight.data.copy_(weights)
    return static


def save_static(
    folder: Path, model: StaticModel, tokenizer: PreTrainedTokenizerBase, prompts: Mapping[str, str]
) -> None:
    """Write a SentenceTransformer folder of ``StaticEmbedding`` and ``Normalize``, with what training reads beside."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    # Of a model type that it does not know, AutoTokenizer would warn.
    config = {key: value for key, value in model.config.to_diff_dict().items() if key != "model_type"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # A copy: the module takes padding and truncation away.
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    modules = [StaticEmbedding(copy, model.embedding.weight.detach().float().cpu().clone()), Normalize()]
    transformer = SentenceTransformer(modules=modules, prompts=dict(prompts), similarity_fn_name="cosine", device="cpu")
    transformer.save_pretrained(str(folder), create_model_card=False)


def distil_static(folder: Path, output: Path, dimensions: int | None = None, prepared: Path | None = None) -> None:
    """Write a static model of a finished one: each token embedded alone, PCA to ``dimensions``, weighted by frequency.

    A token is read as a document of one token, under the document prompt, with what the tokenizer puts around a text.
    Bytes and parts of words are tokens like others; special tokens get zeros, which change no direction of a mean.
    ``prepared`` holds sources prepared with its tokenizer, which say the frequencies; without, tokens are taken to be
    ordered by frequency, and Zipf's law gives it. Dimensions are ordered by variance, so that they can be truncated.

    The result has no prompts: in a mean, a prompt only shifts all texts in one direction.
    """
    check_output(output, [folder])
    reference = resolve(str(folder), "FOLDER")
    if is_static(reference):
        raise UserError(f"{folder}: is a static model already; name the model to distil")
    record = {"backend": "static", "dimensions": dimensions, "model": reference.identity}
    record["prepared"] = sorted(path.parent.name for path in _descriptions(prepared)) if prepared else None
    with recorded_folder(output, _RECORD, record) as partial:
        if partial is None:
            return
        model = load_encoder(reference, "FOLDER").float()
        tokenizer = model.tokenizer
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UserError(f"{folder}: has no fast tokenizer, which a static model needs")
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        tokens = np.array(sorted(set(tokenizer.get_vocab().values()) - special))
        width = model.get_embedding_dimension()
        dimensions = min(width, _MOST_DIMENSIONS) if dimensions is None else dimensions
        if not 1 <= dimensions <= min(width, len(tokens) - 1):
            raise UserError(
                f"--dimensions {dimensions}: {folder} has {width} dimensions and {len(tokens)} tokens; give at most "
                f"{min(width, len(tokens) - 1)}"
            )
        vocabulary = int(max(tokenizer.get_vocab().values())) + 1
        weights = sif_weights(_frequencies(prepared, tokens, vocabulary))
        embedded = embed_tokens(model, tokens, (prompts_of(reference) or {}).get("document", ""))
        reduced = PCA(dimensions, svd_solver="covariance_eigh").fit_transform(embedded)
        rows = torch.zeros(vocabulary, dimensions)
        rows[tokens] = torch.from_numpy((reduced * weights[:, None]).astype(np.float32))
        static = _with_embeddings(rows, append_eos(tokenizer))
        save_static(partial, static, tokenizer, {"query": "", "document": ""})
    logger.info("%s: %s tokens of %d dimensions, read without a prompt", output, f"{len(tokens):,}", dimensions)


def sif_weights(frequencies: np.ndarray) -> np.ndarray:
    """``(n,)`` relative frequencies → ``(n,)`` weights of smooth inverse frequency."""
    return SIF / (SIF + frequencies)


def _frequencies(prepared: Path | None, tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    """Return the ``(n,)`` relative frequencies of tokens among each other."""
    if prepared is None:
        counts = 1 / np.arange(2, len(tokens) + 2)
    else:
        counts = np.zeros(vocabulary)
        for path in _descriptions(prepared):
            for block in PreparedSource(path.parent).token_blocks():
                if len(block) and block.max() >= vocabulary:
                    raise UserError(f"--prepared {prepared}: holds tokens that the model does not know")
                counts += np.bincount(block, minlength=vocabulary)
        counts = counts[tokens]
    return counts / counts.sum()


def _descriptions(prepared: Path) -> list[Path]:
    found = sorted(prepared.glob(f"[!.]*/{DESCRIPTION}"))
    if not found:
        raise UserError(f"--prepared {prepared}: holds no prepared source; name the folder 'prepared' of a run")
    return found


@torch.inference_mode()
def embed_tokens(model: SentenceTransformer, tokens: np.ndarray, prompt: str) -> np.ndarray:
    """``(n,)`` token ids → ``(n, d)`` embeddings of texts of one token each, after a prompt."""
    around, text = (model.tokenizer(f"{prompt}a", add_special_tokens=each).input_ids for each in (True, False))
    start = next(place for place in range(len(around)) if around[place : place + len(text)] == text) + len(text) - 1
    found = []
    for block in np.array_split(tokens, math.ceil(len(tokens) / _TOKENS_AT_ONCE)):
        ids = torch.tensor(around).repeat(len(block), 1)
        ids[:, start] = torch.from_numpy(block)
        features = {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}
        found.append(model(features)["sentence_embedding"].float().cpu().numpy())
    return np.concatenate(found)
