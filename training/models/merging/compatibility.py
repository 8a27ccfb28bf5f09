"""Whether models can be merged: the same shape, tokenizer, pooling, prompts and tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sentence_transformers.sentence_transformer.modules import Pooling

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.errors import UserError, in_one_line
from training.models.checks import check_tokenizer_file
from training.models.merging.parents import Parent
from training.models.merging.record import MERGED_FROM
from training.models.shapes import wrong_weight

# Keys of config.json that shape no embedding: what wrote the file, and how the model is loaded.
_NO_SHAPE = frozenset({MERGED_FROM, "_name_or_path", "auto_map", "dtype", "transformers_version", "use_cache"})
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# Parts of tokenizer.json that every call sets anew.
_SET_ANEW = frozenset({"padding", "truncation"})
_SENTENCE_KEYS = ("prompts", "default_prompt_name", "similarity_fn_name")


def check_compatible(parents: Sequence[Parent]) -> None:
    """Checks that models differ in their weights alone.

    Raises:
        UserError: If they do not: which models, and in which key or tensor; also if a file of one cannot be read.
    """
    first, *others = parents
    facts = _facts(first)
    for other in others:
        found = _facts(other)
        for file, expected in facts.items():
            _check_alike(file, first, expected, other, found[file])
        _check_tensors(first, other)
    # What all lack would be lacking in what is written.
    shapes = {name: info.shape for name, info in first.weights.tensors.items()}
    if (wrong := wrong_weight(shapes, F2LLMConfig.from_dict(dict(first.config)))) is not None:
        raise UserError(f"{first.name}: {wrong}; fetch or save the model again")


def _facts(parent: Parent) -> dict[str, Mapping[str, Any]]:
    """All that must be alike, by the file that says it."""
    return {
        "config.json": _shape(parent),
        "tokenizer.json": _tokenizer(parent),
        "tokenizer_config.json": _special_tokens(parent),
        **_modules(parent),
    }


def _shape(parent: Parent) -> dict[str, Any]:
    """The configuration as the model class reads it, whichever version of the library wrote it."""
    if parent.config.get("model_type") != "qwen3":
        raise UserError(
            f"{parent.folder}: its model_type is {parent.config.get('model_type')!r}; only qwen3 models can be merged"
        )
    try:
        config = F2LLMConfig.from_dict(dict(parent.config)).to_dict()
    # The library's checks of a configuration raise errors of their own.
    except Exception as error:
        raise UserError(f"{parent.folder / 'config.json'}: faulty ({in_one_line(error)}); correct it") from None
    return {key: value for key, value in config.items() if key not in _NO_SHAPE}


def _tokenizer(parent: Parent) -> dict[str, Any]:
    check_tokenizer_file(parent.folder)
    content = parent.read_json("tokenizer.json")
    model = content.pop("model")
    # Older files write a merge as one text, "a b".
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.pop("merges", [])]
    parts = {f"model.{key}": value for key, value in model.items()}
    return {key: value for key, value in content.items() if key not in _SET_ANEW} | parts | {"model.merges": merges}


def _special_tokens(parent: Parent) -> dict[str, Any]:
    config = parent.read_json("tokenizer_config.json")
    tokens = {key: config.get(key) for key in _SPECIAL_TOKENS}
    return {key: token["content"] if isinstance(token, dict) else token for key, token in tokens.items()}


def _modules(parent: Parent) -> dict[str, dict[str, Any]]:
    """What sentence-transformers does with the model, which no module but the first may have weights for."""
    modules = parent.read_json("modules.json")
    pipeline, pooling = {}, {}
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        pipeline[module["name"]] = (kind, module["path"])
        if module["path"] and list((parent.folder / module["path"]).glob("*.safetensors")):
            raise UserError(f"{parent.folder}: module {module['path']} has weights of its own; that cannot be merged")
        if kind == "Pooling":
            pooling |= Pooling.load(str(parent.folder), subfolder=module["path"]).get_config_dict()
    sentence = parent.read_json("config_sentence_transformers.json")
    return {
        "modules.json": pipeline,
        "Pooling": pooling,
        "config_sentence_transformers.json": {key: sentence.get(key) for key in _SENTENCE_KEYS},
    }


def _check_alike(
    file: str, first: Parent, expected: Mapping[str, Any], other: Parent, found: Mapping[str, Any]
) -> None:
    for key in sorted(expected.keys() | found.keys()):
        one, two = expected.get(key), found.get(key)
        if one != two:
            raise UserError(
                f"{other.name} cannot be merged with {first.name}: {file} differs in {key!r} "
                f"({_brief(two)}, not {_brief(one)}); merge models of one architecture and tokenizer"
            )


def _brief(value: Any) -> str:
    """A value, or how large it is."""
    text = repr(value)
    if len(text) <= 60:
        return text
    return f"{len(value)} entries" if isinstance(value, (dict, list)) else f"{text[:57]}..."


def _check_tensors(first: Parent, other: Parent) -> None:
    expected, found = first.weights.tensors, other.weights.tensors
    for name in sorted(expected.keys() ^ found.keys()):
        lacks, has = (other, first) if name in expected else (first, other)
        raise UserError(f"{lacks.name} lacks the tensor {name}, which {has.name} has; merge models of one architecture")
    for name, info in expected.items():
        if info.shape != found[name].shape:
            raise UserError(
                f"{other.name}: {name} has the shape {found[name].shape}, not {info.shape} as in {first.name}; "
                "merge models of one architecture"
            )
