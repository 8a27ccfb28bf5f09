"""Folders of data that a builder makes once: complete or absent, and never in place of something else."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.common.errors import UserError
from training.common.outputs import locked, new_folder

logger = logging.getLogger(__name__)

_BUILD = "build.json"


def build_folder(output_dir: Path, kind: str, options: dict[str, Any], write: Callable[[Path], dict[str, Any]]) -> Path:
    """Make a folder that appears complete or not at all, unless it already contains the same build; return it.

    Args:
        output_dir: The folder.
        kind: The name of the build in error messages, such as ``"CLDR"``.
        options: What the build depends on, as JSON values; ``build.json`` records it.
        write: Writes the files into an empty folder and returns further values for ``build.json``.
    """
    # The disk of a finished build may be read-only. Another command may have built it before the lock was free.
    if _is_built(output_dir, kind, options):
        logger.info("%s already holds this build", output_dir)
        return output_dir
    with locked(output_dir):
        if not _is_built(output_dir, kind, options):
            with new_folder(output_dir) as built:
                more = write(built)
                # Last, because it marks the build as finished.
                record = {"options": options, "files": sorted(path.name for path in built.iterdir()), **more}
                (built / _BUILD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return output_dir


def _is_built(output_dir: Path, kind: str, options: dict[str, Any]) -> bool:
    """Return whether the folder contains this build, or is missing or empty; refuse anything else in it."""
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return False
    try:
        record = json.loads((output_dir / _BUILD).read_text(encoding="utf-8"))
        found, files = record["options"], record["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{output_dir} exists and is not a finished {kind} build; remove it or name another") from None
    differing = sorted(key for key in {*found, *options} if found.get(key) != options.get(key))
    if differing:
        raise UserError(
            f"{output_dir} holds a {kind} build with other {', '.join(differing)}; remove it or name another folder"
        )
    missing = [name for name in files if not (output_dir / name).is_file()]
    if missing:
        raise UserError(f"{output_dir} lacks {', '.join(missing)} of its {kind} build; remove it to build it again")
    return True
