"""The files of a model that are released beside its weights: configurations, tokenizer, modules, remote code."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_f2llm
from modeling_f2llm.configuration_f2llm import FAMILY, F2LLMConfig
from modeling_f2llm.tokenizer import end_token_id
from training.common.errors import UserError
from training.common.outputs import temporary_folder
from training.config.checks import SHAPE
from training.models.model_folder import check_tokenizer_file, user_error, write_for_older_readers
from training.models.model_folder import read_json as read_settings
from training.models.model_ref import MERGED_ADAPTER, why_not_last_token
from training.publishing.states import VOCABULARIES, clean_config, is_hub_name, read_json, write_json
from training.publishing.weights import Weights

CONFIG, MODULES, ADAPTER_CONFIG = "config.json", "modules.json", "adapter_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SENTENCE_TRANSFORMERS, TRANSFORMER_MODULE = "config_sentence_transformers.json", "sentence_bert_config.json"
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
class ModelFiles:
    """What a model's folder says of the model."""

    folder: Path
    config: F2LLMConfig
    code: tuple[Path, ...]  # files of remote code
    modules: tuple[str, ...]  # subfolders of sentence-transformers modules
    max_length: int  # maximum tokens of a text
    prompts: dict[str, str]  # by name
    versions: dict[str, str]  # of the libraries that wrote the model, by name

    @property
    def shape(self) -> dict[str, Any]:
        """The fields of the configuration that make the shape."""
        return {name: getattr(self.config, name) for name in _SHAPE}

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Trained widths, the full one first."""
        width = self.config.hidden_size
        return (width, *(each for each in self.config.matryoshka_dimensions or () if each != width))


@dataclass(frozen=True)
class ModelToPack:
    """A model or an adapter that is to be packed."""

    weights: Weights
    fields: dict[str, Any]  # of the release's record
    copy_files: Callable[[Path, str], None]  # copies all but the weights to a folder, for weights of a dtype


def model_fields(
    weights: Weights,
    dimensions: tuple[int, ...],
    max_length: int,
    config: F2LLMConfig | None,
    prompts: dict[str, str],
    versions: dict[str, str],
) -> dict[str, Any]:
    """Return the fields of a release's record that its files give; ``config`` of an adapter is that of its base."""
    family = None
    for name in FAMILY if config else ():
        published = F2LLMConfig.from_family(name)
        if all(getattr(config, field) == getattr(published, field) for field in SHAPE):
            family = name
    return {
        "parameters": weights.parameters,
        "dimension": dimensions[0],
        "dimensions": dimensions,
        "max_length": max_length,
        "shape": {name: getattr(config, name) for name in _SHAPE} if config else {},
        "prompts": prompts,
        "versions": versions,
        "family": family,
    }


def read_model_files(folder: Path) -> ModelFiles:
    """Look at the folder of a whole model."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder}: holds an adapter, not a whole model; merge it into its base model and give that")
    _require(folder, CONFIG)
    sentences, modules = read_sentence_files(folder)
    tokenizer, config = _load(folder, "pack another state of the run")
    code = code_files(read_json(folder / CONFIG).get("auto_map", {}), folder)
    length = min(tokenizer.model_max_length, config.max_position_embeddings)
    prompts, versions = (dict(sentences.get(key) or {}) for key in ("prompts", "__version__"))
    return ModelFiles(folder, config, code, modules, length, prompts, versions)


def read_sentence_files(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the sentence-transformers settings of a model or adapter, and the subfolders of its modules."""
    for name in (MODULES, SENTENCE_TRANSFORMERS, TOKENIZER, TOKENIZER_CONFIG):
        _require(folder, name)
    check_tokenizer_file(folder)
    modules = tuple(module["path"] for module in read_json(folder / MODULES) if module["path"])
    for module in modules:
        _require(folder, f"{module}/{CONFIG}")
    return read_json(folder / SENTENCE_TRANSFORMERS), modules


def _require(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise UserError(f"{folder}: the model is damaged, it lacks {name}; pack another state of the run")


def _load(folder: Path, remedy: str) -> tuple[PreTrainedTokenizerBase, F2LLMConfig]:
    with user_error(f"{folder}: cannot be read", remedy):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False), F2LLMConfig.from_pretrained(folder)


def code_files(auto_map: Mapping[str, str], folder: Path | None = None) -> tuple[Path, ...]:
    """Return the files that an ``auto_map`` names and those that they import; ``folder`` is named in an error.

    They come from this checkout, not from the run: a release gets the code that is tested.
    """
    found = set()
    for target in auto_map.values():
        path = _PACKAGE / f"{target.rpartition('.')[0]}.py"
        if not path.is_file():
            raise UserError(f"{folder}/{CONFIG}: auto_map names {target}, which is not of F2LLM; take it out")
        found |= {path, *map(Path, get_relative_import_files(path))}
    return tuple(sorted(found))


def copy_model_files(files: ModelFiles, folder: Path, dtype: str) -> None:
    """Copy everything except the weights, which will be ``dtype``, to a folder, readable for older versions, too."""
    write_json(folder / CONFIG, clean_config({**read_json(files.folder / CONFIG), "dtype": dtype}))
    for path in files.code:
        shutil.copyfile(path, folder / path.name)
    copy_sentence_files(files.folder, files.modules, folder)


def copy_sentence_files(source: Path, modules: Iterable[str], folder: Path) -> None:
    """Copy tokenizer, modules and their settings from ``source`` to ``folder``, readable for older versions, too."""
    write_json(folder / TOKENIZER_CONFIG, clean_config(read_json(source / TOKENIZER_CONFIG)))
    for name in (MODULES, SENTENCE_TRANSFORMERS, TRANSFORMER_MODULE, TOKENIZER, *_TOKENIZER_OPTIONAL):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for module in modules:
        (folder / module).mkdir(parents=True)
        for name in (CONFIG, TRANSFORMER_MODULE):
            if (source / module / name).is_file():
                write_json(folder / module / name, clean_config(read_json(source / module / name)))
    write_for_older_readers(folder)


@contextmanager
def standard_settings(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder with settings and tokenizer of a model without a run, as a run would save them."""
    _check_kind(folder)
    tokenizer, config = _load(folder, "save the model again")
    if not read_json(folder / CONFIG).get("is_matryoshka"):
        # F2LLMConfig assumes by default that a model was trained at several widths.
        config.is_matryoshka, config.matryoshka_dimensions = False, None
    if end_token_id(tokenizer) is None:
        raise UserError(
            f"{folder}: its tokenizer puts no token after a text, of which the embedding could be read; fine-tune it "
            "here (key 'model'), or save it with a post-processor that appends one"
        )
    # Either may be missing.
    sentences, transformer = (read_settings(folder / name) for name in (SENTENCE_TRANSFORMERS, TRANSFORMER_MODULE))
    if transformer.get("do_lower_case"):
        raise UserError(
            f"{folder / TRANSFORMER_MODULE}: do_lower_case changes texts, which servers do not; it is not packed"
        )
    if sentences.get("default_prompt_name") is not None:
        raise UserError(
            f"{folder / SENTENCE_TRANSFORMERS}: default_prompt_name puts a prompt before documents, too; set it to null"
        )
    lengths = (tokenizer.model_max_length, config.max_position_embeddings, transformer.get("max_seq_length"))
    with temporary_folder() as temporary:
        output = Path(temporary)
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        tokenizer.model_max_length = int(min(length for length in lengths if length))
        tokenizer.save_pretrained(output)
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        config.save_pretrained(output)
        write_json(output / CONFIG, {**read_json(output / CONFIG), "auto_map": AUTO_MAP})
        _write_modules(output, config.hidden_size)
        prompts = {"query": "", "document": "", **(sentences.get("prompts") or {})}
        settings = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
        write_json(output / SENTENCE_TRANSFORMERS, {**sentences, **settings})
        # `write_for_older_readers` adds the lengths.
        write_json(output / TRANSFORMER_MODULE, {})
        yield output


def _check_kind(folder: Path) -> None:
    kind = read_json(folder / CONFIG).get("model_type")
    if kind != "qwen3":
        raise UserError(f"{folder}: is a {kind}; only models of the Qwen3 architecture are packed")
    if (folder / ADAPTER_CONFIG).is_file() or (folder / MERGED_ADAPTER).is_file():
        raise UserError(f"{folder}: holds an adapter, or a model that one was merged into; pack the adapter's run")
    check_tokenizer_file(folder)
    if wrong := why_not_packed(folder):
        raise UserError(f"{folder}: {wrong}; only models with last-token pooling and normalisation are packed")


def why_not_packed(folder: Path) -> str | None:
    """Return what of a model's modules is not last-token pooling and normalisation; None if they are that."""
    kinds = [str(module.get("type")).rpartition(".")[2] for module in read_json(folder / MODULES)]
    return why_not_last_token(str(folder)) or (None if "Normalize" in kinds else "does not normalise its embeddings")


def _write_modules(folder: Path, width: int) -> None:
    paths = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(paths.items())
    ]
    write_json(folder / MODULES, modules)
    pooling = {"embedding_dimension": width, "pooling_mode": "lasttoken", "include_prompt": True}
    for path, settings in {"1_Pooling": pooling, "2_Normalize": {}}.items():
        (folder / path).mkdir()
        write_json(folder / path / CONFIG, settings)


def base_named(folder: Path) -> str | None:
    """Return the Hub repository that a model's card or configuration names as its base, if any."""
    named: list[Any] = [card_field(folder / "README.md", "base_model"), read_json(folder / CONFIG).get("_name_or_path")]
    flat = [name for each in named for name in (each if isinstance(each, list) else [each])]
    return next((name for name in flat if isinstance(name, str) and is_hub_name(name)), None)


def card_field(path: Path, name: str) -> Any:
    """Return a field of a card's header; None if the card is missing or damaged, or lacks the field."""
    if not path.is_file():
        return None
    try:
        return getattr(ModelCard.load(path, ignore_metadata_errors=True).data, name)
    # Errors of YAML and of huggingface_hub share no class.
    except Exception:
        return None
