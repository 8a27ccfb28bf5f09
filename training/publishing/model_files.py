"""The files of a run's model that are released beside its weights: configurations, tokenizer, modules, remote code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_f2llm
from modeling_f2llm.configuration_f2llm import FAMILY, F2LLMConfig
from training.common.errors import UserError, in_one_line
from training.config.planning_arguments import SHAPE
from training.models.checks import check_tokenizer_file
from training.models.older_readers import write_for_older_readers
from training.publishing.cleaning import VOCABULARIES, clean_config
from training.publishing.states import read_json

_PACKAGE = Path(modeling_f2llm.__file__).resolve().parent
_CONFIG, _MODULES, _SENTENCES = "config.json", "modules.json", "config_sentence_transformers.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
# These are there with some tokenizers and versions only.
_TOKENIZER_OPTIONAL = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", *VOCABULARIES[1:])
_MODULE_FILES = ("config.json", "sentence_bert_config.json")
# What is told of a shape, by the configuration's names.
_SHAPE = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings"),
)


@dataclass(frozen=True)
class ModelFiles:
    """What a model's folder says of the model.

    Attributes:
        folder: The folder.
        config: Its shape.
        sentences: Its ``config_sentence_transformers.json``.
        code: Files of remote code.
        modules: Folders of the sentence-transformers modules that are not the folder itself.
        max_length: Tokens of a text at most.
    """

    folder: Path
    config: F2LLMConfig
    sentences: Mapping[str, Any]
    code: tuple[Path, ...]
    modules: tuple[str, ...]
    max_length: int

    @property
    def shape(self) -> dict[str, Any]:
        """The fields of the configuration that make the shape."""
        return shape_of(self.config)

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Widths that were trained, the full one first."""
        width = self.config.hidden_size
        return (width, *(each for each in self.config.matryoshka_dimensions or () if each != width))

    @property
    def prompts(self) -> dict[str, str]:
        """Prompts by name."""
        return dict(self.sentences.get("prompts") or {})

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that wrote the model, by name."""
        return dict(self.sentences.get("__version__") or {})


def read_model_files(folder: Path) -> ModelFiles:
    """Looks at a model's folder.

    Raises:
        UserError: If it holds no model that can be packed, or a file is missing or damaged.
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: holds an adapter, not a whole model; merge it into its base model and give that")
    _require(folder, _CONFIG)
    sentences, modules = read_sentence_files(folder)
    try:
        config = F2LLMConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # Damaged files come out of the libraries as anything.
    except Exception as error:
        raise UserError(f"{folder}: cannot be read ({in_one_line(error)}); pack another state of the run") from None
    length = min(tokenizer.model_max_length, config.max_position_embeddings)
    return ModelFiles(folder, config, sentences, _code(folder), modules, length)


def read_sentence_files(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What sentence-transformers reads of a model's or an adapter's folder: its settings and folders of modules.

    Raises:
        UserError: If a file is missing or damaged.
    """
    for name in (_MODULES, _SENTENCES, *_TOKENIZER):
        _require(folder, name)
    check_tokenizer_file(folder)
    modules = tuple(module["path"] for module in read_json(folder / _MODULES) if module["path"])
    for module in modules:
        _require(folder, f"{module}/{_CONFIG}")
    return read_json(folder / _SENTENCES), modules


def shape_of(config: F2LLMConfig) -> dict[str, Any]:
    """The fields of a configuration that make the shape."""
    return {name: getattr(config, name) for name in _SHAPE}


def _require(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise UserError(f"{folder}: the model is damaged, it lacks {name}; pack another state of the run")


def _code(folder: Path) -> tuple[Path, ...]:
    """The files of remote code that ``auto_map`` names, and those that they import from beside them.

    They are taken from this checkout: a run keeps the code of its day, a release is to have the one that is tested.
    """
    found = set()
    for target in read_json(folder / _CONFIG).get("auto_map", {}).values():
        path = _PACKAGE / f"{target.rpartition('.')[0]}.py"
        if not path.is_file():
            raise UserError(f"{folder / _CONFIG}: auto_map names {target}, which is not of F2LLM; take it out")
        found |= {path, *map(Path, get_relative_import_files(path))}
    return tuple(sorted(found))


def family_of(config: F2LLMConfig) -> str | None:
    """The published model of the same shape; None if there is none."""
    for name in FAMILY:
        published = F2LLMConfig.from_family(name)
        if all(getattr(config, field) == getattr(published, field) for field in SHAPE):
            return name
    return None


def copy_model_files(files: ModelFiles, folder: Path, dtype: str) -> None:
    """Copies all that is released of a model's folder but its weights, in a form that older readers know, too.

    Args:
        files: The model's files.
        folder: Where they go.
        dtype: Of the weights that go there, too.
    """
    source = files.folder
    _write_json(folder / _CONFIG, clean_config({**read_json(source / _CONFIG), "dtype": dtype}))
    for path in files.code:
        shutil.copyfile(path, folder / path.name)
    copy_sentence_files(source, files.modules, folder)


def copy_sentence_files(source: Path, modules: Iterable[str], folder: Path) -> None:
    """Copies tokenizer, modules and their settings, in a form that older readers know, too.

    Args:
        source: Where they are.
        modules: Folders of modules there.
        folder: Where they go.
    """
    _write_json(folder / "tokenizer_config.json", clean_config(read_json(source / "tokenizer_config.json")))
    for name in (_MODULES, _SENTENCES, "sentence_bert_config.json", "tokenizer.json", *_TOKENIZER_OPTIONAL):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for module in modules:
        (folder / module).mkdir(parents=True)
        for name in _MODULE_FILES:
            if (source / module / name).is_file():
                _write_json(folder / module / name, clean_config(read_json(source / module / name)))
    write_for_older_readers(folder)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
