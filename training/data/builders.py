"""Builders of data that comes with installed packages, by the name a recipe gives them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from training.data.cldr import build_cldr
from training.errors import UserError

__all__ = ["build"]

_BUILDERS: dict[str, Callable[..., Path]] = {"cldr": build_cldr}


def build(name: str, folder: Path, seed: int) -> Path:
    """Builds a data folder unless it is there already, and returns its manifest.

    Raises:
        UserError: If there is no such builder, or the folder holds something else.
    """
    builder = _BUILDERS.get(name)
    if builder is None:
        raise UserError(f"unknown builder {name!r}; there are {', '.join(_BUILDERS)}")
    return builder(folder, seed=seed)
