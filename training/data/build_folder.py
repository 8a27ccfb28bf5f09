"""Folders that a builder makes once: whole or absent, and never in place of anything else."""

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
    """Makes a folder that appears whole or not at all, unless it holds the same build already.

    Args:
        output_dir: The folder.
        kind: What error messages call the build, such as ``"CLDR"``.
        options: What the build depends on, as JSON knows it; ``build.json`` records it.
        write: Writes the files into an empty folder and returns what else ``build.json`` is to say.

    Returns:
        ``output_dir``.

    Raises:
        UserError: The folder holds anything but the same build; nothing in it is touched.
    """
    if _is_built(output_dir, kind, options):
        logger.info("%s already holds this build", output_dir)
        return output_dir
    with locked(output_dir):
        # Another command may have built it meanwhile.
        if _is_built(output_dir, kind, options):
            return output_dir
        with new_folder(output_dir) as built:
            more = write(built)
            # Last, and alone in saying which folder holds a finished build.
            record = {"options": options, "files": sorted(path.name for path in built.iterdir()), **more}
            (built / _BUILD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return output_dir


def _is_built(output_dir: Path, kind: str, options: dict[str, Any]) -> bool:
    """Whether the folder holds the build with these options; a folder that is missing or empty does not.

    Raises:
        UserError: It holds anything else.
    """
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return False
    try:
        record = json.loads((output_dir / _BUILD).read_text(encoding="utf-8"))
        found, files = dict(record["options"]), [output_dir / name for name in record["files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{output_dir} exists and is no finished {kind} build; remove it or name another") from None
    if found != options:
        differing = sorted(key for key in {*found, *options} if found.get(key) != options.get(key))
        raise UserError(
            f"{output_dir} holds a {kind} build with other {', '.join(differing)}; remove it or name another folder"
        )
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise UserError(f"{output_dir} lacks {', '.join(missing)} of its {kind} build; remove it to build it again")
    return True
