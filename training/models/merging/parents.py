"""The models that are merged: where they lie, and what may be told of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from training.common.errors import UserError, in_one_line
from training.common.run_folder import FINAL_MODEL, public_name, run_of
from training.models.merging.record import MERGED_FROM
from training.models.reference import find_model
from training.models.weight_files import ADAPTER, WeightFiles

# What of a repository is fetched: no other formats of the same weights, no evaluation.
_FETCHED = ["*.json", "*.safetensors", "*.py", "*.txt", "*.jinja", "LICENSE*"]
_LEFT = ["onnx/*", "openvino/*", "evaluation/*", "figures/*"]


@dataclass(frozen=True)
class Parent:
    """A model to be merged.

    Attributes:
        folder: Where its files are.
        name: What it is called in public: a Hub name, or the last parts of a folder's path.
        revision: Commit on the Hub; None for a folder.
    """

    folder: Path
    name: str
    revision: str | None = None

    @cached_property
    def weights(self) -> WeightFiles:
        """Its weights.

        Raises:
            UserError: If they cannot be read.
        """
        return WeightFiles(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of its ``config.json``.

        Raises:
            UserError: If it cannot be read.
        """
        return self.read_json("config.json")

    def read_json(self, name: str) -> Any:
        """Reads a file of the folder.

        Raises:
            UserError: If it is not there, or damaged.
        """
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / name}: cannot be read ({in_one_line(error)})") from None

    def record(self) -> dict[str, Any]:
        """What is told of it: name, revision, and its own parents if it is merged itself."""
        revision = {"revision": self.revision} if self.revision else {}
        ancestors = {MERGED_FROM: self.config[MERGED_FROM]} if MERGED_FROM in self.config else {}
        return {"name": self.name, **revision, **ancestors}


def find_parent(word: str) -> Parent:
    """Finds a model: a folder, a run (its finished model) or a checkpoint of it, or ``ORG/NAME[@REVISION]`` on the Hub.

    What the Hub's cache holds is used without network.

    Raises:
        UserError: If there is no such model, or no safetensors of all its weights: an adapter, pickled ones.
    """
    parent = _local(word) if Path(word).is_dir() else _published(word)
    # Looked at first: what is no whole model lacks other files, too, which would say less.
    _ = parent.weights
    return parent


def _local(word: str) -> Parent:
    adapters = [place for place in (Path(word), Path(word, FINAL_MODEL)) if (place / ADAPTER).is_file()]
    folder = adapters[0] if adapters else Path(find_model(word, None)[0])
    return Parent(folder, _public_name(folder.resolve()))


def _published(word: str) -> Parent:
    name, _, revision = word.partition("@")
    try:
        validate_repo_id(name)
        fetched = snapshot_download(name, revision=revision or None, allow_patterns=_FETCHED, ignore_patterns=_LEFT)
    except HFValidationError:
        raise UserError(f"{word}: no such folder, and no name on the Hub; name a folder or ORG/NAME@REVISION") from None
    # What the Hub's client raises differs with the network, the name and the version.
    except Exception as error:
        raise UserError(
            f"{word}: no such folder, and not to be had from the Hub ({in_one_line(error)}); correct the name"
        ) from None
    # The folder of a snapshot is named after its commit.
    return Parent(Path(fetched), name, Path(fetched).name)


def _public_name(folder: Path) -> str:
    """The last part of a folder's path, after that of its run if it is the model or a checkpoint of one."""
    parts = folder.parts[-2:] if run_of(str(folder)) == folder.parent else folder.parts[-1:]
    return "/".join(filter(None, map(public_name, parts))) or FINAL_MODEL
