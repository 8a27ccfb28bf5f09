"""What a model's own files say of it: how its tokens become an embedding, and what goes before texts."""

from __future__ import annotations

import json
from typing import Any

from training.common.errors import UserError
from training.models.adapter_folder import base_of
from training.models.model_identity import model_file

_MODULES = "modules.json"


def is_plain(name: str, revision: str | None = None) -> bool:
    """Whether a model has no ``modules.json``, nor has an adapter's base: nothing says how it is pooled."""
    place, at = described_by(name, revision)
    return model_file(place, _MODULES, at) is None


def described_by(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """The model whose files say how one is read, and its revision: the base of an adapter without ``modules.json``.

    Any other model says so itself.
    """
    base = base_of(name)
    return (name, revision) if base == name or model_file(name, _MODULES, revision) else (base, None)


def reads_as_ours(name: str, revision: str | None = None) -> bool:
    """Whether a model is a plain Qwen3, which is read as this repository trains one: at the last token."""
    return is_plain(name, revision) and model_type(name) == "qwen3"


def model_type(name: str) -> str | None:
    """The kind of a model, or of the base of an adapter, as its ``config.json`` has it."""
    return (_read(base_of(name), "config.json") or {}).get("model_type")


def why_not_last_token(name: str) -> str | None:
    """Why a model's embedding is not its last token's, such as ``is pooled by mean``; None if it is.

    It is if its modules are a transformer, last-token pooling and normalisation, or if it is plain and lists none.

    Args:
        name: Folder or Hub name of a model or an adapter.

    Raises:
        UserError: If its settings are damaged.
    """
    name, _ = described_by(name)
    modules = _read(name, _MODULES)
    if modules is None:
        return None
    try:
        kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
        if kinds[:2] != ["Transformer", "Pooling"]:
            return f"has the modules {', '.join(kinds)}"
        if after := [kind for kind in kinds[2:] if kind != "Normalize"]:
            return f"has the module {after[0]} after pooling"
        pooled = _pooling(_read(name, f"{modules[1]['path']}/config.json"))
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{name}: its modules.json or pooling is damaged ({type(error).__name__}: {error})") from None
    return None if pooled == ["lasttoken"] else f"is pooled by {' and '.join(pooled) or 'nothing'}"


def _pooling(config: dict[str, Any]) -> list[str]:
    """How a module pools, as sentence-transformers 5.4 and later, or earlier ones, write it."""
    if "pooling_mode" in config:
        chosen = config["pooling_mode"]
        return [chosen] if isinstance(chosen, str) else list(chosen)
    prefix = "pooling_mode_"
    return sorted(
        key.removeprefix(prefix) for key, chosen in config.items() if key.startswith(prefix) and chosen is True
    )


def saved_prompts(name: str, revision: str | None = None) -> dict[str, str] | None:
    """What a model puts before texts, by the name of the prompt; None if it does not say.

    An adapter that does not say has its base's.

    Args:
        name: Folder or Hub name of a model or an adapter.
        revision: Branch, tag or commit on the Hub.
    """
    prompts = (_read(name, "config_sentence_transformers.json", revision) or {}).get("prompts")
    if prompts is None:
        base = base_of(name)
        return None if base == name else saved_prompts(base)
    return {key: text or "" for key, text in prompts.items()}


def _read(name: str, file: str, revision: str | None = None) -> Any:
    """The content of a model's JSON file; None if it has none.

    Raises:
        UserError: If it is no JSON.
    """
    path = model_file(name, file, revision)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); fetch or save the model again"
        ) from None
