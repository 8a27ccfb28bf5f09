"""Load any SentenceTransformer to embed texts: checked, pooled as it was trained, its code run only on request."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from sentence_transformers.util import batch_to_device
from torch import nn
from transformers import PreTrainedModel

import modeling_f2llm
from modeling_f2llm.prompts import DEFAULT_PROMPTS, instruct
from modeling_f2llm.tokenizer import append_eos
from training.common.errors import UserError, in_one_line
from training.data.instructions import split_instruction, without_instruction
from training.models.devices import SharedEncoder
from training.models.loading import check_finite, check_tokenizer
from training.models.model_folder import read_json
from training.models.model_ref import ModelRef, is_plain, resolve

logger = logging.getLogger("training")

# What the user of a command with this option can do to have other code run.
TRUST_OPTION = "add --trust-remote-code if you trust it"
_PACKAGE = Path(modeling_f2llm.__file__).resolve().parent
# Modules of this package's models. Code counts as foreign with any other: Dense, for one, calls the activation_function
# that its settings name.
_MODULES = (".Transformer", ".Pooling", ".Normalize", ".StaticEmbedding")


def load_encoder(
    model: ModelRef, key: str, *, trust_remote_code: bool = False, trust: str | None = None, **options: Any
) -> SentenceTransformer:
    """Load a model and check that its tokenizer has words and that all weights that matter are there and finite.

    A plain Qwen3 model, without ``modules.json``, is read as this repository trains one: at the last token, with EOS
    appended, normalised, and with the published prompts. ``key`` is what the user gave it as, such as ``--model``. With
    ``trust_remote_code`` code that comes with the model runs; a local copy of this package's own always does. ``trust``
    says what the user can do to have other code run.
    """
    try:
        return _load(model, trust_remote_code, trust, options)
    # from_pretrained can raise any exception on a corrupt folder.
    except Exception as error:
        reason = in_one_line(error)
        if not isinstance(error, UserError) and "trust_remote_code" in str(error):
            remedy = trust or "use a model that needs none"
            reason = f"it needs code that comes with it, which does not run by default; {remedy}"
        raise UserError(f"{key}: {model.name!r} cannot be used: {reason}") from None


def _load(model: ModelRef, trust_remote_code: bool, trust: str | None, options: dict[str, Any]) -> SentenceTransformer:
    if model.revision is None and not trust_remote_code:
        trust_remote_code = runs_own_code(model)
        if not trust_remote_code and _has_code(model):
            logger.info("%s: its code is not this package's and is not run; %s", model.name, trust or "stock code is")
    described = model.described_by
    loaded = SentenceTransformer(
        described.place, revision=described.revision, trust_remote_code=trust_remote_code, **options
    )
    if described is not model:
        # An adapter without modules is read as its base is.
        loaded.load_adapter(model.place, adapter_kwargs={"revision": model.revision})
    if is_plain(model):
        loaded = _with_pooling(loaded, model.name)
    check_tokenizer(loaded.tokenizer)
    check_finite(loaded)
    if (missing := _missing_weight(loaded)) is not None:
        raise ValueError(f"its weights lack {missing}; fetch or save the model again")
    return loaded


def _with_pooling(model: SentenceTransformer, name: str) -> SentenceTransformer:
    """Return a plain Qwen3 model with this repository's pooling; any other model as sentence-transformers reads it."""
    if getattr(getattr(model[0], "config", None), "model_type", None) != "qwen3":
        logger.info("%s: has no modules.json; sentence-transformers pools it by %s", name, pooling_of(model))
        return model
    append_eos(model.tokenizer)
    logger.info("%s: has no modules.json; read as F2LLM is, at the last token, with its prompts", name)
    return SentenceTransformer(
        modules=[model[0], Pooling(model[0].get_embedding_dimension(), pooling_mode="lasttoken"), Normalize()],
        prompts=dict(DEFAULT_PROMPTS),
        similarity_fn_name="cosine",
        truncate_dim=model.truncate_dim,
        device=str(model.device),
    )


class _Exits(nn.Module):
    """Gives Pooling the tokens after several layers of Qwen3 side by side, ``(b, t, exits * d)``."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers, self.norm, self._depth = tuple(layers), model.norm, model.config.num_hidden_layers
        total = model.num_parameters()
        self.sizes = {n: total - sum(w.numel() for w in model.layers[n:].parameters()) for n in layers}
        model.config.output_hidden_states = True

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Replace ``token_embeddings``."""
        states = features.pop("all_layer_embeddings")
        found = [states[layer] if layer == self._depth else self.norm(states[layer]) for layer in self.layers]
        return {**features, "token_embeddings": torch.cat(found, dim=-1)}


class _NormalizeExits(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        by_exit = features["sentence_embedding"].unflatten(1, (self._count, -1))
        return {**features, "sentence_embedding": nn.functional.normalize(by_exit, dim=-1).flatten(1)}


def exit_sizes(model: SentenceTransformer) -> dict[int, int]:
    """Return the parameters of each exit by its number of layers; none without :func:`with_exits`."""
    return next((module.sizes for module in model if isinstance(module, _Exits)), {})


def _factors(model: SentenceTransformer) -> list[nn.Module]:
    # The class of a model's own code is another than this package's.
    return [each for each in model.modules() if type(each).__name__ == "LowRankEmbedding"]


def has_factors(model: SentenceTransformer) -> bool:
    """Return whether a model's token embeddings are factorised."""
    return bool(_factors(model))


def unused_parameters(model: SentenceTransformer) -> int:
    """Return the parameters of columns of factorised token embeddings beyond the rank in use."""
    columns = ((e.left.embedding_dim - e.rank, e.left.num_embeddings + e.right.out_features) for e in _factors(model))
    return sum(unused * rows for unused, rows in columns)


def trained_exits(model: SentenceTransformer) -> list[int]:
    """Return the numbers of layers that a model was trained to end after; none if only its last."""
    return list(getattr(getattr(model[0], "config", None), "exit_layers", None) or ())


def with_exits(model: SentenceTransformer, layers: Sequence[int], key: str) -> SentenceTransformer:
    """Return a Qwen3 model, changed in place, whose embeddings are those after several layers side by side.

    ``(n, exits * d)`` by one forward pass, each exit normalised: what models of so many layers embed. Its embedding
    dimension stays ``d``.
    """
    config = getattr(model[0], "config", None)
    if getattr(config, "model_type", None) != "qwen3" or len(model) != 3 or pooling_of(model) != "lasttoken":
        raise UserError(f"{key}: only Qwen3 with last-token pooling and normalisation ends after fewer layers")
    if wrong := [layer for layer in layers if not 1 <= layer <= config.num_hidden_layers]:
        raise UserError(f"{key}: {wrong} do not fit a model of {config.num_hidden_layers} layers")
    changed = SentenceTransformer(
        modules=[model[0], _Exits(model[0].auto_model, layers), model[1], _NormalizeExits(len(layers))],
        prompts=model.prompts,
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
        device=str(model.device),
    )
    changed.max_seq_length = model.max_seq_length
    return changed


def pooling_of(model: SentenceTransformer) -> str:
    """Describe how a model reduces token embeddings to one."""
    modes = [module.pooling_mode for module in model if isinstance(module, Pooling)]
    flat = [each for mode in modes for each in ([mode] if isinstance(mode, str) else mode)]
    static = "the mean of token embeddings" if isinstance(model[0], StaticEmbedding) else type(model[-1]).__name__
    return " and ".join(flat) or static


def limit_length(model: SentenceTransformer, tokens: int) -> None:
    """Let a model cut texts after so many tokens."""
    # Its property cannot be set.
    if isinstance(model[0], StaticEmbedding):
        model[0].tokenizer.enable_truncation(tokens)
    else:
        model.max_seq_length = tokens


def _missing_weight(model: SentenceTransformer) -> str | None:
    """Return a weight that is random although embeddings depend on it; freeze a model that lacks any weight."""
    missing = {}
    for number, module in model.named_children():
        if isinstance(inner := getattr(module, "auto_model", None), PreTrainedModel):
            for name, weight in inner.named_parameters():
                # transformers marks what it has read.
                if not getattr(weight, "_is_hf_initialized", False):
                    missing[f"{number}.{name}"] = weight
    if not missing:
        return None
    # Those that matter receive a gradient from a text's embedding, unlike the pooler of a BERT that averages tokens.
    model.requires_grad_()
    embedding = model(batch_to_device(model.preprocess(["a text"]), model.device))["sentence_embedding"].sum()
    used = torch.autograd.grad(embedding, list(missing.values()), allow_unused=True)
    model.requires_grad_(False)
    return next((name for name, gradient in zip(missing, used, strict=True) if gradient is not None), None)


def foreign_files(folder: Path) -> list[str]:
    """Return the Python files in a folder that are not, byte for byte, this package's in their place."""
    files = sorted(folder.rglob("*.py"))
    return [path.relative_to(folder).as_posix() for path in files if not _is_own(path, folder)]


def _is_own(path: Path, folder: Path) -> bool:
    own = _PACKAGE / path.name
    return path.parent == folder and path.is_file() and own.is_file() and own.read_bytes() == path.read_bytes()


def runs_own_code(model: ModelRef) -> bool:
    """Return whether a local model, or an adapter's base, brings the code that it names, all of it this package's."""
    folders = [Path(place) for place in {model.place, model.base.place}]
    named = [(file, folder) for folder in folders for file in _named_code(folder).values()]
    local = all(folder.is_dir() for folder in folders)
    return local and bool(named) and all(_is_own(*each) for each in named) and not any(map(foreign_files, folders))


def _has_code(model: ModelRef) -> bool:
    """Return whether a folder names code that lies in it or in another repository."""
    # sentence-transformers saves the names of code that it has not run, without that code.
    named = [each for place in {model.place, model.base.place} for each in _named_code(Path(place)).items()]
    return any("--" in name or file.is_file() for name, file in named)


def _named_code(folder: Path) -> dict[str, Path]:
    """Return the files of classes outside transformers that a folder's settings name, and of modules that load more."""
    # Settings of modules lie in subfolders.
    maps = [read_json(path).get("auto_map") for path in folder.rglob("*config*.json")]
    values = [value for each in maps if isinstance(each, dict) for value in each.values()]
    # A tokenizer has two, a slow and a fast one.
    classes = [name for value in values for name in (value if isinstance(value, list) else [value])]
    types = [str(each.get("type")) for each in read_json(folder / "modules.json", list) if isinstance(each, dict)]
    ours = [name for name in types if name.startswith("sentence_transformers.") and name.endswith(_MODULES)]
    names = [str(name) for name in [*filter(None, classes), *(set(types) - set(ours))]]
    return {name: folder / f"{name.rpartition('.')[0]}.py" for name in names}


@dataclass(frozen=True)
class Miner:
    """The model that embeds texts for mining, pinned to a commit on the Hub or a digest of its folder's files."""

    model: str
    revision: str
    max_length: int | None = None
    truncate_dim: int | None = None
    dtype: str = "float32"
    batch_size: int = 32
    trust_remote_code: bool = False
    devices: tuple[str, ...] = ()  # from training.models.devices.choose_devices

    def made_by(self) -> dict[str, Any]:
        """Return what embeddings depend on, as the key of their cache."""
        described = asdict(self)
        # The batch size changes nothing but the last bits. A folder may move: its revision identifies its files.
        described.pop("batch_size")
        described.pop("devices")
        if Path(self.model).is_dir():
            described.pop("model")
        return described

    def embed_queries(self, texts: Sequence[str], instruction: str | None) -> NDArray[np.float32]:
        """``(n, dimensions)`` unit-length embeddings of queries, under an instruction or the model's own prompt."""
        if instruction is None:
            # The model's prompt replaces what published files carry in the text.
            return self._embed("encode_query", [without_instruction(text) for text in texts])
        # Published files may carry the instruction in the text already.
        prompts = ["" if split_instruction(text)[0] is not None else instruct(instruction) for text in texts]
        embedded: dict[int, NDArray[np.float32]] = {}
        for prompt in dict.fromkeys(prompts):
            rows = [row for row, each in enumerate(prompts) if each == prompt]
            vectors = self._embed("encode_query", [texts[row] for row in rows], prompt=prompt)
            embedded.update(zip(rows, vectors, strict=True))
        return np.stack([embedded[row] for row in range(len(texts))])

    def embed_passages(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """``(n, dimensions)`` unit-length embeddings of passages, under the model's document prompt, if it has one."""
        return self._embed("encode_document", list(texts))

    def _embed(self, method: str, texts: list[str], **options: Any) -> NDArray[np.float32]:
        vectors = _encoder(self).encode(method, texts, self.batch_size, show_progress_bar=False, **options)
        # Normalised in fp32, in any dtype of the model.
        vectors = np.asarray(vectors, dtype=np.float32)
        if not np.isfinite(vectors).all():
            raise UserError("the miner gives embeddings that are not finite; use dtype float32 or another model")
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def close(self) -> None:
        """Free the model and end its workers."""
        _encoder.cache_clear()


def find_miner(model: str, key: str = "--model", **options: Any) -> Miner:
    """Find a model and pin its revision, without loading it; ``key`` is what the user gave it as."""
    found = resolve(model, key)
    miner = Miner(found.place, found.identity, **options)
    for name in ("max_length", "truncate_dim", "batch_size"):
        if (value := getattr(miner, name)) is not None and value < 1:
            raise UserError(f"{name.replace('_', '-')} must be at least 1, got {value}")
    if miner.dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"unknown dtype {miner.dtype!r}; use one of float32, bfloat16, float16")
    return miner


# A worker embeds for many tasks and loads the model for the first.
@lru_cache(maxsize=1)
def _encoder(miner: Miner) -> SharedEncoder:
    return SharedEncoder(partial(_load_miner, miner), miner.devices)


def _load_miner(miner: Miner) -> SentenceTransformer:
    model = load_encoder(
        ModelRef(miner.model, miner.model, None if Path(miner.model).is_dir() else miner.revision, miner.revision),
        "--model",
        trust_remote_code=miner.trust_remote_code,
        trust=TRUST_OPTION,
        truncate_dim=miner.truncate_dim,
        model_kwargs={"dtype": getattr(torch, miner.dtype)},
    )
    if miner.max_length is not None:
        if model.max_seq_length is not None and miner.max_length > model.max_seq_length:
            most = model.max_seq_length
            what = f"--max-length {miner.max_length}: {miner.model} reads {most} tokens at most"
            raise UserError(f"{what}; give --max-length {most}")
        limit_length(model, miner.max_length)
    return model
