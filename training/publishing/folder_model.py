"""A model that no run of this repository made, or whose run is gone: its settings as a run would have written them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.modeling_f2llm import F2LLMModel
from modeling_f2llm.tokenizer import end_token_id
from training.common.errors import UserError, in_one_line
from training.common.outputs import temporary_folder
from training.models.adapter_folder import MERGED_ADAPTER
from training.models.checks import check_tokenizer_file
from training.models.settings import why_not_last_token
from training.publishing.adapter_base import is_hub_name
from training.publishing.states import read_json

_CONFIG, _MODULES, _SENTENCES = "config.json", "modules.json", "config_sentence_transformers.json"
_TRANSFORMER = "sentence_bert_config.json"
_CLASSES = {
    "": "sentence_transformers.models.Transformer",
    "1_Pooling": "sentence_transformers.models.Pooling",
    "2_Normalize": "sentence_transformers.models.Normalize",
}


@contextmanager
def standard_settings(folder: Path) -> Iterator[Path]:
    """A folder for a while with the settings and tokenizer of a model, in the form in which a run saves them.

    Args:
        folder: The model's: a Qwen3 of sentence-transformers with last-token pooling and normalisation.

    Raises:
        UserError: If it is another kind of model, or damaged.
    """
    _check(folder)
    tokenizer, config = _read(folder)
    if end_token_id(tokenizer) is None:
        raise UserError(
            f"{folder}: its tokenizer puts no token after a text, of which the embedding could be read; fine-tune it "
            "here (key 'model'), or save it with a post-processor that appends one"
        )
    sentences, transformer = (_optional(folder / name) for name in (_SENTENCES, _TRANSFORMER))
    if transformer.get("do_lower_case"):
        raise UserError(f"{folder / _TRANSFORMER}: do_lower_case changes texts, which servers do not; it is not packed")
    if sentences.get("default_prompt_name") is not None:
        raise UserError(
            f"{folder / _SENTENCES}: default_prompt_name puts a prompt before documents, too; set it to null"
        )
    lengths = (tokenizer.model_max_length, config.max_position_embeddings, transformer.get("max_seq_length"))
    with temporary_folder() as place:
        output = Path(place)
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        tokenizer.model_max_length = int(min(length for length in lengths if length))
        tokenizer.save_pretrained(output)
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        config.save_pretrained(output)
        _write(output / _CONFIG, _with_code(read_json(output / _CONFIG)))
        _write_modules(output, config.hidden_size)
        prompts = {"query": "", "document": "", **(sentences.get("prompts") or {})}
        told = {**sentences, "prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
        _write(output / _SENTENCES, told)
        # Its lengths are written for older readers.
        _write(output / _TRANSFORMER, {})
        yield output


def _check(folder: Path) -> None:
    kind = read_json(folder / _CONFIG).get("model_type")
    if kind != "qwen3":
        raise UserError(f"{folder}: is a {kind}; only models of the Qwen3 architecture are packed")
    if (folder / "adapter_config.json").is_file() or (folder / MERGED_ADAPTER).is_file():
        raise UserError(f"{folder}: holds an adapter, or a model that one was merged into; pack the adapter's run")
    check_tokenizer_file(folder)
    wrong = why_not_last_token(str(folder))
    kinds = [str(module.get("type")).rpartition(".")[2] for module in read_json(folder / _MODULES)]
    if wrong or "Normalize" not in kinds:
        raise UserError(
            f"{folder}: {wrong or 'does not normalise its embeddings'}; only models with last-token pooling and "
            "normalisation are packed"
        )


def _read(folder: Path) -> tuple[PreTrainedTokenizerBase, F2LLMConfig]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = F2LLMConfig.from_pretrained(folder)
    # Damaged files come out of the libraries as anything.
    except Exception as error:
        raise UserError(f"{folder}: cannot be read ({in_one_line(error)}); save the model again") from None
    if not read_json(folder / _CONFIG).get("is_matryoshka"):
        # That it was trained at several widths is what F2LLM's configuration takes for granted.
        config.is_matryoshka, config.matryoshka_dimensions = False, None
    return tokenizer, config


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _with_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that names this repository's code, which computes any Qwen3."""
    named = {"AutoConfig": F2LLMConfig, "AutoModel": F2LLMModel}
    modules = {auto: kind.__module__.rpartition(".")[2] for auto, kind in named.items()}
    return {**config, "auto_map": {auto: f"{modules[auto]}.{kind.__name__}" for auto, kind in named.items()}}


def _write_modules(folder: Path, width: int) -> None:
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(_CLASSES.items())
    ]
    _write(folder / _MODULES, modules)
    settings = {
        "1_Pooling": {"embedding_dimension": width, "pooling_mode": "lasttoken", "include_prompt": True},
        "2_Normalize": {},
    }
    for path, content in settings.items():
        (folder / path).mkdir()
        _write(folder / path / _CONFIG, content)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def base_named(folder: Path) -> str | None:
    """The model on the Hub that a folder says that it was made from: on its card, or in its configuration."""
    named: list[Any] = []
    if (folder / "README.md").is_file():
        try:
            base = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.base_model
        # YAML's errors and huggingface_hub's own share no class.
        except Exception:
            base = None
        named += base if isinstance(base, list) else [base]
    named.append(read_json(folder / _CONFIG).get("_name_or_path"))
    return next((name for name in named if isinstance(name, str) and is_hub_name(name)), None)
