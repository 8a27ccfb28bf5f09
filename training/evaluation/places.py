"""Which model is meant: a folder, a run and its checkpoints, or a name on the Hub; and where a run's data are."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from training.common.errors import UserError, in_one_line
from training.models.reference import revisions_in


def revisions_of(name: str) -> list[str]:
    """All checkpoints of a run, oldest first, or all branches and tags of a repository on the Hub.

    Raises:
        UserError: If the Hub cannot be asked.
    """
    if Path(name).is_dir():
        return revisions_in(Path(name))
    try:
        refs = HfApi().list_repo_refs(name)
    # What the Hub's client raises differs with the network, the name and the version.
    except Exception as error:
        raise UserError(f"{name}: its revisions cannot be listed ({in_one_line(error)}); name them") from None
    return [ref.name for ref in (*refs.branches, *refs.tags)]
