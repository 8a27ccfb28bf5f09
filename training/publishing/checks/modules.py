"""What sentence-transformers reads: the modules, all its own, and the prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from training.publishing.checks.packed import MODULES, SENTENCE_TRANSFORMERS, Finding, PackedFolder
from training.publishing.record import RECORD

_KINDS = ["Transformer", "Pooling", "Normalize"]
_REPACK = "pack the run again"


def check_modules(packed: PackedFolder) -> Iterator[Finding]:
    """Transformer, pooling and normalisation, classes of sentence-transformers alone, in folders that exist."""
    entries = list(packed.modules())
    kinds = [str(entry["type"]).rpartition(".")[2] for entry in entries]
    if kinds != _KINDS:
        yield Finding(MODULES, f"the modules are {', '.join(kinds)}, not {', '.join(_KINDS)}", _REPACK)
    for entry in entries:
        kind, path = str(entry["type"]), str(entry["path"])
        if not kind.startswith("sentence_transformers."):
            wrong = f"{kind} is no class of sentence-transformers: the folder would not load without its package"
            yield Finding(MODULES, wrong, _REPACK)
        elif not _importable(kind):
            yield Finding(MODULES, f"sentence-transformers has no class {kind}", _REPACK)
        if not (packed.path / path).is_dir():
            yield Finding(MODULES, f"there is no folder {path}", _REPACK)


def check_pooling(packed: PackedFolder) -> Iterator[Finding]:
    """The last token, instruction and all, at the width of the model."""
    name, pooling = packed.pooling()
    modes = pooling_modes(pooling)
    if modes != ["lasttoken"]:
        yield Finding(name, f"pools by {' and '.join(modes) or 'nothing'}, not by the last token", _REPACK)
    width = pooling.get("embedding_dimension", pooling.get("word_embedding_dimension"))
    config = packed.model_config()
    # The base of an adapter need not be at hand.
    hidden = packed.release.dimension if config is None else config.get("hidden_size")
    if width != hidden:
        yield Finding(name, f"pools {width} dimensions, but hidden_size is {hidden}", f"set it to {hidden}")
    if pooling.get("include_prompt", True) is not True:
        yield Finding(name, "leaves the prompt out of pooling", "set include_prompt to true")


def check_prompts(packed: PackedFolder) -> Iterator[Finding]:
    """The prompts of the release, none of them put before every text, and cosine similarity."""
    config = packed.table(SENTENCE_TRANSFORMERS)
    prompts = config.get("prompts")
    # A model that was trained without instructions has a prompt without text.
    if not isinstance(prompts, dict) or not isinstance(prompts.get("query"), str):
        yield Finding(SENTENCE_TRANSFORMERS, "has no prompt for queries", _REPACK)
    elif prompts != dict(packed.release.prompts):
        yield Finding(RECORD, f"the prompts are not those of {SENTENCE_TRANSFORMERS}", _REPACK)
    if config.get("default_prompt_name") is not None:
        wrong = f"default_prompt_name {config['default_prompt_name']!r} goes before documents, too"
        yield Finding(SENTENCE_TRANSFORMERS, wrong, "set it to null")
    if config.get("similarity_fn_name") != "cosine":
        wrong = f"similarity_fn_name is {config.get('similarity_fn_name')!r}"
        yield Finding(SENTENCE_TRANSFORMERS, wrong, "set it to 'cosine'")


def pooling_modes(pooling: dict[str, Any]) -> list[str]:
    """The modes of a pooling configuration, as sentence-transformers 5.4 and later write it or as earlier ones did."""
    mode = pooling.get("pooling_mode")
    if mode is not None:
        return [str(each) for each in (mode if isinstance(mode, list) else [mode])]
    flags = (key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True)
    return [key.removeprefix("pooling_mode_") for key in flags]


def _importable(kind: str) -> bool:

    from sentence_transformers.util import import_from_string

    try:
        import_from_string(kind)
    except (ImportError, AttributeError):
        return False
    return True
