"""Builders of data from what is installed on the machine, by the name a recipe gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from training.common.errors import UserError
from training.common.yaml_file import unknown_key
from training.data.cldr.build import build_cldr
from training.data.gettext_catalogs.build import build_gettext

_BUILDERS: dict[str, Callable[..., Path]] = {"cldr": build_cldr, "gettext": build_gettext}


def build(name: str, folder: Path, seed: int, options: Mapping[str, Any] | None = None) -> Path:
    """Builds a data folder unless it is there already, and returns its manifest.

    Args:
        name: The builder.
        folder: The folder to build.
        seed: The seed of every draw.
        options: The builder's own options, its defaults where left out.

    Raises:
        UserError: If there is no such builder or option, an option has a wrong value, or the folder holds something
            else.
    """
    builder = _BUILDERS.get(name)
    if builder is None:
        raise UserError(f"unknown builder {name!r}; there are {', '.join(_BUILDERS)}")
    keywords = [each for each in signature(builder).parameters.values() if each.kind is Parameter.KEYWORD_ONLY]
    defaults = {each.name: each.default for each in keywords if each.name != "seed"}
    where = f"key 'builder_options' (of the builder {name!r})"
    for key, value in (options or {}).items():
        if key not in defaults:
            raise unknown_key(where, key, list(defaults))
        if not _is_like(value, defaults[key]):
            raise UserError(f"{where}: {key!r} cannot be {value!r}; give a value such as {defaults[key]!r}")
    return builder(folder, seed=seed, **(options or {}))


def _is_like(value: Any, default: Any) -> bool:
    """Whether an option's value is of its default's kind: a number, or texts."""
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int) and not isinstance(value, bool)
    return value is default or (isinstance(value, list) and all(isinstance(item, str) for item in value))
