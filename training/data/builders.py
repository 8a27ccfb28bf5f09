"""Builders of data from what is installed on the machine: each makes a folder once, complete or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from training.common.errors import UserError
from training.common.outputs import locked, new_folder
from training.common.yaml_file import unknown_key

logger = logging.getLogger(__name__)

# By the name that a recipe uses. Imported when they run: babel, pandas and scikit-learn take seconds.
_BUILDERS = {
    "cldr": "training.data.cldr.sources:build_cldr",
    "gettext": "training.data.gettext_catalogs.sources:build_gettext",
}
_RECORD = "build.json"


def build(name: str, folder: Path, seed: int, options: Mapping[str, Any] | None = None) -> Path:
    """Build a folder of data unless it exists, and return it; ``options`` are keyword arguments of the builder."""
    if name not in _BUILDERS:
        raise UserError(f"unknown builder {name!r}; there are {', '.join(_BUILDERS)}")
    if "seed" in (options or {}):
        fault = "option 'seed' is not one of 'builder_options'; give the recipe's key 'seed'"
        raise UserError(f"builder {name!r}: {fault}")
    return resolve_name(_BUILDERS[name])(folder, seed=seed, **(options or {}))


def builder(name: str, **versions: Any) -> Callable[[Callable[..., dict[str, Any]]], Callable[..., Path]]:
    """Turn a function that writes files into an empty folder into a builder: it takes a path and returns it.

    The options of the function are its keyword arguments: whole numbers from 1 (or from 0 if that is the default),
    shares between 0 and 1, or lists of texts in any order. A folder with a build of the same options is kept, and one
    that holds anything else is refused. ``build.json`` records ``versions``, the options, the files and what the
    function returns.
    """

    def decorate(write: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
        keywords = [each for each in signature(write).parameters.values() if each.kind is Parameter.KEYWORD_ONLY]
        defaults = {each.name: each.default for each in keywords}

        @wraps(write)
        def build(output_dir: Path | str, **given: Any) -> Path:
            for key, value in given.items():
                if key not in defaults:
                    raise unknown_key(f"builder {name!r}", key, list(defaults))
                if not _fits(value, defaults[key]):
                    fault = f"option {key!r} cannot be {value!r}; give a value such as {defaults[key]!r}"
                    raise UserError(f"builder {name!r}: {fault}")
            options, output = {key: given.get(key, default) for key, default in defaults.items()}, Path(output_dir)
            options = {key: sorted({*value}) if _is_list(value) else value for key, value in options.items()}
            # The disk of a finished build may be read-only.
            if _is_built(output, name, versions | options):
                logger.info("%s already holds this build", output)
                return output
            with locked(output):
                # Another command may have built it before the lock was free.
                if not _is_built(output, name, versions | options):
                    with new_folder(output) as built:
                        more = write(built, **options)
                        files = sorted(path.name for path in built.iterdir())
                        # Last, because it marks the build as finished.
                        record = {"options": versions | options, "files": files, **more}
                        (built / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            return output

        return build

    return decorate


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, float):
        return isinstance(value, int | float) and 0 < value < 1
    if isinstance(default, int):
        return type(value) is int and value >= min(default, 1)
    return value is default or _is_list(value)


def _is_built(output_dir: Path, name: str, options: dict[str, Any]) -> bool:
    """Return whether the folder contains this build, or is missing or empty; refuse anything else in it."""
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return False
    try:
        record = json.loads((output_dir / _RECORD).read_text(encoding="utf-8"))
        found, missing = record["options"], [file for file in record["files"] if not (output_dir / file).is_file()]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{output_dir} exists and is not a finished {name} build; remove it or name another") from None
    if wrong := [*sorted(key for key in {*found, *options} if found.get(key) != options.get(key)), *missing]:
        what = f"{output_dir} holds a {name} build that differs in {', '.join(wrong)}"
        raise UserError(f"{what}; remove it or name another")
    return True
