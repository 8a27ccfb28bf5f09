"""What the folder of an adapter says: which model it adapts. Reading it needs no peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from transformers.utils.peft_utils import find_adapter_config_file

from training.common.errors import UserError
from training.common.run_folder import write_whole
from training.models.model_identity import model_revision

# In the folder of an adapter that was trained here: its base and what that was, to tell it from another of that name.
BASE_RECORD = "base_model.json"
# In a merged model's folder: which adapter and which base it is made of.
MERGED_ADAPTER = "adapter.json"


class AdapterFolder(NamedTuple):
    """An adapter that was saved.

    Attributes:
        name: Its folder or Hub name.
        base: Folder or Hub name of the model that it adapts.
        base_revision: What that model was when the adapter was trained: a commit on the Hub, or a digest of its
            weights; None if nobody noted it.
        revision: Branch, tag or commit of the adapter on the Hub that was asked for.
    """

    name: str
    base: str
    base_revision: str | None = None
    revision: str | None = None


def find_adapter(name: str, revision: str | None = None) -> AdapterFolder | None:
    """The adapter in a folder or on the Hub; None if that is no adapter.

    Args:
        name: Folder or Hub name.
        revision: Branch, tag or commit on the Hub.

    Raises:
        UserError: If the adapter does not say what it adapts.
    """
    try:
        path = find_adapter_config_file(name, revision=revision)
    # No such model; loading it says so.
    except OSError:
        return None
    if path is None:
        return None
    try:
        base = json.loads(Path(path).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}); save the adapter again") from None
    if not isinstance(base, str):
        raise UserError(f"{path}: does not say what it adapts; write its name as 'base_model_name_or_path'")
    return AdapterFolder(name, base, _noted_revision(Path(path).with_name(BASE_RECORD), base), revision)


def _noted_revision(path: Path, base: str) -> str | None:
    """What the base was, unless the adapter was given another base since."""
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        return noted["revision"] if noted["name"] == base else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def base_of(name: str) -> str:
    """The model that an adapter adapts; any other model itself."""
    adapter = find_adapter(name)
    return name if adapter is None else adapter.base


def note_base(folder: Path, name: str, revision: str) -> None:
    """Writes into an adapter's folder which model it adapts."""
    write_whole(folder / BASE_RECORD, json.dumps({"name": name, "revision": revision}, indent=2) + "\n")


def base_revision(name: str, key: str) -> str:
    """What a base is now: its commit on the Hub, or a digest of the weights in its folder."""
    return model_revision(name, key, weights_only=True)
