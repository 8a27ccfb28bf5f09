"""Folders of intermediate results that are used again as long as what they were made from is unchanged."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.data.storage import identity


def stage_folder(work: Path, stage: str, files: Sequence[Path], options: Any) -> Path:
    """The folder for a stage of work on these files with these options; those of other files or options are deleted.

    Args:
        work: The folder of all stages.
        stage: A name without dashes.
        files: What the stage reads; a change of path or content counts.
        options: What else the result depends on, as JSON.
    """
    described = [[str(path.resolve()), *identity(path, work / ".hashes")] for path in files]
    digest = hashlib.blake2b(json.dumps([described, options]).encode(), digest_size=8).hexdigest()
    folder = work / f"{stage}-{digest}"
    for other in work.glob(f"{stage}-*"):
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
