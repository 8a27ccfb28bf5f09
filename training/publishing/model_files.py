"""The files of a released model: weights, configurations, tokenizer, modules of sentence-transformers, remote code.

No more than one shard of the weights is in memory, so that a machine can pack models that it could not load.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_f2llm
from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.tokenizer import end_token_id
from training.common.errors import UserError
from training.common.outputs import temporary_folder
from training.models.adapters import ADAPTER_WEIGHTS
from training.models.merging import MAX_SHARD_SIZE
from training.models.model_folder import (
    WeightFiles,
    check_tokenizer_file,
    is_finite,
    user_error,
    write_for_older_readers,
    wrong_weight,
)
from training.models.model_folder import read_json as read_settings
from training.models.model_ref import MERGED_ADAPTER, why_not_last_token
from training.models.static import is_static
from training.publishing.states import VOCABULARIES, clean_config, is_hub_name, read_json, write_json

CONFIG, MODULES, ADAPTER_CONFIG = "config.json", "modules.json", "adapter_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SENTENCE_TRANSFORMERS, TRANSFORMER_MODULE = "config_sentence_transformers.json", "sentence_bert_config.json"
# Dtypes of released weights, and of the weights that a run may have saved.
DTYPES = ("bfloat16", "float32")
_SAVED_DTYPES = (*DTYPES, "float16")
_PACKAGE = Path(modeling_f2llm.__file__).resolve().parent
# The code of this repository computes any Qwen3.
AUTO_MAP = {"AutoConfig": "configuration_f2llm.F2LLMConfig", "AutoModel": "modeling_f2llm.F2LLMModel"}
# Files that only some tokenizers and versions write.
_TOKENIZER_OPTIONAL = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", *VOCABULARIES[1:])
# Fields of the configuration in the record.
_SHAPE = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings"),
)


@dataclass(frozen=True)
class Weights:
    """The weights in a folder, not loaded."""

    folder: Path
    files: Mapping[str, str]  # file of each weight by name
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str  # its name

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(map(prod, self.shapes.values()))

    def load(self, name: str) -> Tensor:
        """Load one weight."""
        # An open file keeps all that was read from it in memory.
        with safe_open(self.folder / self.files[name], framework="pt") as stored:
            return stored.get_tensor(name)

    def save(self, names: Iterable[str], path: Path, dtype: str) -> None:
        """Write some of the weights to a file, as ``dtype``; none may be NaN or infinite."""
        tensors = {name: self.load(name).to(getattr(torch, dtype)).contiguous() for name in names}
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                raise UserError(f"{self.folder}: {name} is NaN or infinite in {dtype}; pack an earlier checkpoint")
        # transformers requires this entry; other metadata of the run's files is left out.
        save_file(tensors, path, metadata={"format": "pt"})


def read_weights(folder: Path, config: F2LLMConfig) -> Weights:
    """Look at the weights of a model, which must be exactly those of ``config``."""
    stored = WeightFiles(folder)
    if (wrong := wrong_weight(stored.shapes, config)) is not None:
        raise UserError(f"{folder}: {wrong}; pack another state")
    dtype = _common_dtype(folder, (info.dtype for info in stored.tensors.values()))
    return Weights(folder, {name: path.name for name, path in stored.file_of.items()}, stored.shapes, dtype)


def adapter_weights(folder: Path) -> Weights:
    """Look at the weights of an adapter."""
    with user_error(f"{folder / ADAPTER_WEIGHTS}: damaged", "pack another state of the run"):
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtype = _common_dtype(folder, (tensor.dtype for tensor in tensors.values()))
    return Weights(folder, dict.fromkeys(shapes, ADAPTER_WEIGHTS), shapes, dtype)


def _common_dtype(folder: Path, dtypes: Iterable[torch.dtype]) -> str:
    names = sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})
    if len(names) != 1 or names[0] not in _SAVED_DTYPES:
        raise UserError(f"{folder}: weights of {', '.join(names)}; only one of {', '.join(_SAVED_DTYPES)} is packed")
    return names[0]


def copy_weights(weights: Weights, folder: Path, dtype: str, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Write weights to a folder as ``dtype``: in one file, or in shards with an index if that would be too large."""
    if ADAPTER_WEIGHTS in weights.files.values():
        # Every reader of adapters looks for this one file.
        weights.save(sorted(weights.shapes), folder / ADAPTER_WEIGHTS, dtype)
        return
    itemsize = getattr(torch, dtype).itemsize
    with user_error(f"--max-shard-size {max_shard_size!r}", "give a size such as 5GB or 500MB"):
        split = split_state_dict_into_shards_factory(
            {name: prod(shape) * itemsize for name, shape in sorted(weights.shapes.items())},
            get_storage_size=int,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    for file, names in split.filename_to_tensors.items():
        weights.save(names, folder / file, dtype)
    if split.is_sharded:
        index = {"metadata": dict(split.metadata), "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        write_json(folder / "model.safetensors.index.json", index)


@dataclass(frozen=True)
class ModelFiles:
    """What a folder says of its model or adapter."""

    folder: Path  # of all files but the weights
    weights: Weights
    config: F2LLMConfig | None  # of an adapter, that of its base; None if that is unknown
    dimensions: tuple[int, ...]  # trained widths, the full one first
    max_length: int  # maximum tokens of a text
    sentences: Mapping[str, Any]  # settings of sentence-transformers
    modules: tuple[str, ...]  # subfolders of sentence-transformers modules
    code: Sequence[Path] = ()  # files of remote code
    adapter: Mapping[str, Any] | None = None  # adapter_config.json

    @property
    def prompts(self) -> dict[str, str]:
        """What comes before a text, by name."""
        return dict(self.sentences.get("prompts") or {})

    @property
    def shape(self) -> dict[str, Any]:
        """The fields of the configuration that make the shape."""
        exits = {"exit_layers": self.config.exit_layers} if self.config and self.config.exit_layers else {}
        return {**{name: getattr(self.config, name) for name in _SHAPE}, **exits} if self.config else {}

    def fields(self) -> dict[str, Any]:
        """Return the fields of a release's record."""
        return {
            "parameters": self.weights.parameters,
            "dimension": self.dimensions[0],
            "dimensions": self.dimensions,
            "max_length": self.max_length,
            "shape": self.shape,
            "prompts": self.prompts,
            "versions": dict(self.sentences.get("__version__") or {}),
        }


def read_model_files(folder: Path, weights: Path | None = None) -> ModelFiles:
    """Look at the folder of a whole model, whose ``weights`` may lie in another."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder}: holds an adapter, not a whole model; merge it into its base model and give that")
    if is_static(str(folder)):
        raise UserError(f"{folder}: is static and not packed; load it with SentenceTransformer and call push_to_hub")
    sentences, modules = read_sentence_files(folder)
    tokenizer, config = _load(folder, "pack another state of the run")
    width, named = config.hidden_size, read_json(folder / CONFIG).get("auto_map")
    if named and named != AUTO_MAP:
        raise UserError(f"{folder / CONFIG}: auto_map is {named}, not {AUTO_MAP}; correct it, or take it out")
    return ModelFiles(
        folder,
        read_weights(weights or folder, config),
        config,
        dimensions=(width, *(each for each in config.matryoshka_dimensions or () if each != width)),
        max_length=min(tokenizer.model_max_length, config.max_position_embeddings),
        sentences=sentences,
        modules=modules,
        code=code_files() if named else (),
    )


def read_sentence_files(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the sentence-transformers settings of a model or adapter, and the subfolders of its modules."""
    check_tokenizer_file(folder)
    modules = tuple(module["path"] for module in read_json(folder / MODULES) if module["path"])
    for name in (TOKENIZER_CONFIG, *(f"{module}/{CONFIG}" for module in modules)):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: the model is damaged, it lacks {name}; pack another state of the run")
    return read_json(folder / SENTENCE_TRANSFORMERS), modules


def _load(folder: Path, remedy: str) -> tuple[PreTrainedTokenizerBase, F2LLMConfig]:
    with user_error(f"{folder}: cannot be read", remedy):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False), F2LLMConfig.from_pretrained(folder)


def code_files() -> list[Path]:
    """Return the files of remote code: those of this checkout, not of the run, as these are tested."""
    named = {_PACKAGE / f"{target.rpartition('.')[0]}.py" for target in AUTO_MAP.values()}
    return sorted(named.union(*(map(Path, get_relative_import_files(path)) for path in named)))


def copy_model_files(files: ModelFiles, folder: Path, dtype: str) -> None:
    """Copy everything except the weights, which will be ``dtype``, to a folder, readable for older versions, too."""
    source = files.folder
    if files.adapter is None:
        config = {**clean_config(read_json(source / CONFIG)), "dtype": dtype}
        # The product of factors is packed, not they.
        config.pop("embedding_ranks", None)
        write_json(folder / CONFIG, config)
    else:
        write_json(folder / ADAPTER_CONFIG, dict(sorted({**files.adapter, "inference_mode": True}.items())))
    for path in files.code:
        shutil.copyfile(path, folder / path.name)
    for name in (MODULES, SENTENCE_TRANSFORMERS, TRANSFORMER_MODULE, TOKENIZER, *_TOKENIZER_OPTIONAL):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    of_modules = (f"{module}/{name}" for module in files.modules for name in (CONFIG, TRANSFORMER_MODULE))
    for name in (TOKENIZER_CONFIG, *of_modules):
        if (source / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_json(folder / name, clean_config(read_json(source / name)))
    write_for_older_readers(folder)


@contextmanager
def standard_settings(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder with settings and tokenizer of a model without a run, as a run would save them."""
    settings = read_json(folder / CONFIG)
    if settings.get("model_type") != "qwen3":
        wrong = f"is a {settings.get('model_type')}"
    elif (folder / ADAPTER_CONFIG).is_file() or (folder / MERGED_ADAPTER).is_file():
        wrong = "holds an adapter, or a model that one was merged into, without the adapter's run"
    else:
        check_tokenizer_file(folder)
        wrong = why_not_packed(folder)
    if wrong:
        raise UserError(f"{folder}: {wrong}; only Qwen3 with last-token pooling and normalisation is packed")
    tokenizer, config = _load(folder, "save the model again")
    if not settings.get("is_matryoshka"):
        # F2LLMConfig assumes by default that a model was trained at several widths.
        config.is_matryoshka, config.matryoshka_dimensions = False, None
    # Either may be missing.
    sentences, transformer = (read_settings(folder / name) for name in (SENTENCE_TRANSFORMERS, TRANSFORMER_MODULE))
    for wrong, applies in {
        "its tokenizer puts no token after a text, of which the embedding is read": end_token_id(tokenizer) is None,
        "do_lower_case changes texts, which servers do not": transformer.get("do_lower_case"),
        "default_prompt_name puts a prompt before documents, too": sentences.get("default_prompt_name") is not None,
    }.items():
        if applies:
            raise UserError(f"{folder}: {wrong}; change that, or fine-tune the model here (key 'model')")
    lengths = (tokenizer.model_max_length, config.max_position_embeddings, transformer.get("max_seq_length"))
    with temporary_folder() as temporary:
        output = Path(temporary)
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        tokenizer.model_max_length = int(min(length for length in lengths if length))
        tokenizer.save_pretrained(output)
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        config.save_pretrained(output)
        write_json(output / CONFIG, {**read_json(output / CONFIG), "auto_map": AUTO_MAP})
        paths = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{module}"}
            for number, (path, module) in enumerate(paths.items())
        ]
        write_json(output / MODULES, modules)
        pooling = {"embedding_dimension": config.hidden_size, "pooling_mode": "lasttoken", "include_prompt": True}
        for path, settings in {"1_Pooling": pooling, "2_Normalize": {}}.items():
            (output / path).mkdir()
            write_json(output / path / CONFIG, settings)
        prompts = {"query": "", "document": "", **(sentences.get("prompts") or {})}
        settings = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
        write_json(output / SENTENCE_TRANSFORMERS, {**sentences, **settings})
        # `write_for_older_readers` adds the lengths.
        write_json(output / TRANSFORMER_MODULE, {})
        yield output


def why_not_packed(folder: Path) -> str | None:
    """Return what of a model's modules is not last-token pooling and normalisation; None if they are that."""
    kinds = [str(module.get("type")).rpartition(".")[2] for module in read_json(folder / MODULES)]
    return why_not_last_token(str(folder)) or (None if "Normalize" in kinds else "does not normalise its embeddings")


def base_named(folder: Path) -> str | None:
    """Return the Hub repository that a model's card or configuration names as its base, if any."""
    named: list[Any] = [card_field(folder / "README.md", "base_model"), read_json(folder / CONFIG).get("_name_or_path")]
    flat = [name for each in named for name in (each if isinstance(each, list) else [each])]
    return next((name for name in flat if isinstance(name, str) and is_hub_name(name)), None)


def card_field(path: Path, name: str) -> Any:
    """Return a field of a card's header; None if the card is missing or damaged, or lacks the field."""
    # Errors of files, of YAML and of huggingface_hub share no class.
    with suppress(Exception):
        return getattr(ModelCard.load(path, ignore_metadata_errors=True).data, name)
    return None
