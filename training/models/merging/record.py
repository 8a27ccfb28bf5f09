"""What a merged model says of the models that it was merged from, and where those are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.common.errors import UserError, in_one_line
from training.models.weight_files import WeightFiles

# File in a merged folder, and key of its config.json. The file alone has the digests of the parents' weights.
MERGE, MERGED_FROM = "merge.json", "merged_from"


def read_merge(folder: Path) -> dict[str, Any]:
    """Reads the record of a merged folder.

    Raises:
        UserError: If it is missing or damaged.
    """
    try:
        return json.loads((folder / MERGE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MERGE}: cannot be read ({in_one_line(error)}); merge the models again") from None


def find_beside(folder: Path, parent: Mapping[str, Any]) -> Path | None:
    """The folder of a parent, if it lies beside the merged one or its run and has the weights that were merged.

    Args:
        folder: Of the merged model.
        parent: What its record says of the parent.
    """
    for place in (folder.absolute().parent, folder.absolute().parent.parent):
        found = place / parent["name"]
        if (found / "config.json").is_file() and WeightFiles(found).digest() == parent["digest"]:
            return found
    return None
