"""Builders of data from what is installed on the machine, by the name that a recipe uses."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from training.common.errors import UserError
from training.common.yaml_file import unknown_key
from training.data.cldr.sources import build_cldr
from training.data.gettext_catalogs.sources import build_gettext

_BUILDERS = {"cldr": build_cldr, "gettext": build_gettext}


def build(name: str, folder: Path, seed: int, options: Mapping[str, Any] | None = None) -> Path:
    """Build a folder of data unless it exists, and return it; ``options`` are keyword arguments of the builder."""
    if name not in _BUILDERS:
        raise UserError(f"unknown builder {name!r}; there are {', '.join(_BUILDERS)}")
    builder, options = _BUILDERS[name], options or {}
    keywords = [each for each in signature(builder).parameters.values() if each.kind is Parameter.KEYWORD_ONLY]
    defaults = {each.name: each.default for each in keywords if each.name != "seed"}
    where = f"key 'builder_options' (of the builder {name!r})"
    for key, value in options.items():
        if key not in defaults:
            raise unknown_key(where, key, list(defaults))
        if not _is_like(value, defaults[key]):
            raise UserError(f"{where}: {key!r} cannot be {value!r}; give a value such as {defaults[key]!r}")
    return builder(folder, seed=seed, **options)


def _is_like(value: Any, default: Any) -> bool:
    """Return whether an option is a number or a list of texts like its default."""
    if isinstance(default, int | float):
        return type(value) in {int, type(default)}
    return value is default or (isinstance(value, list) and all(isinstance(item, str) for item in value))
