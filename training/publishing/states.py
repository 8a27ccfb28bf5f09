"""States of a run's model: the finished one and those of its checkpoints, and where the paths of a recipe lead."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from training.common.errors import UserError
from training.common.paths import place_of
from training.common.run_folder import FINAL_MODEL, RECIPE, holds_model, numbered_checkpoints
from training.common.yaml_file import load_yaml
from training.models.merging.record import MERGE

# What a model on the Hub is known by; the digest of a folder is shorter.
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class ModelState:
    """A model that a run made, or that was merged of such models; or one of which no run is known.

    Attributes:
        run: The run's folder; for a merged model, and one without a run, its own.
        folder: The model's: ``RUN/model`` or ``RUN/checkpoint-N``.
        keys: What the run was told, as its ``recipe.yaml`` has it; nothing for a merged model, and one without a run.
    """

    run: Path
    folder: Path
    keys: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The stage's name, with that of the checkpoint if it is one: ``stage2@checkpoint-500``."""
        stage = self.run.resolve().name
        return stage if self.folder.name == FINAL_MODEL or self.run == self.folder else f"{stage}@{self.folder.name}"

    @property
    def is_unknown(self) -> bool:
        """Whether nothing is known of how the model was made."""
        return not self.keys and not self.merges

    @property
    def prunes(self) -> bool:
        """Whether the run cut a model instead of training one."""
        return self.keys.get("prune_to") is not None or bool(self.keys.get("trim_vocabulary"))

    @property
    def merges(self) -> bool:
        """Whether the model was merged of others."""
        return (self.folder / MERGE).is_file()

    def place(self, written: str) -> Path:
        """Where a path of the recipe leads now."""
        return place_of(self.run, self.keys, written)

    def is_hub_name(self, written: str) -> bool:
        """Whether a name in the recipe is one on the Hub: formed like one, and like no folder of this run's machine."""
        parts = Path(written).parts
        if os.path.isabs(written) or len(parts) != 2 or self.place(written).exists():
            return False
        try:
            validate_repo_id(written)
        except HFValidationError:
            return False
        # `runs/old` that is no longer there is formed like a name on the Hub, too.
        folders = {Path(str(self.keys[key])).parts[0] for key in ("output_dir", "manifest") if self.keys.get(key)}
        return parts[0] not in folders and parts[1] != FINAL_MODEL and not parts[1].startswith("checkpoint-")


def find_state(run: Path, checkpoint: str | None = None) -> ModelState:
    """The finished model of a run, or one of its checkpoints; or a merged model, or one of which no run is known.

    Raises:
        UserError: If the folder is no run and no model, the run is not finished, or it has no such checkpoint.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; give the folder of a run")
    if (run / MERGE).is_file() and checkpoint is None:
        return ModelState(run, run, {})
    if not (run / RECIPE).is_file() and checkpoint is None and _is_alone(run):
        return ModelState(run, run, {})
    if not (run / RECIPE).is_file():
        raise UserError(f"{run}: the folder is no run, it lacks {RECIPE}; {_hint(run)}")
    known = ", ".join(path.name for path in numbered_checkpoints(run)) or "none"
    if checkpoint is not None and not holds_model(run / checkpoint):
        raise UserError(f"{run}: has no checkpoint {checkpoint!r}; there are {known}")
    if checkpoint is None and not (run / FINAL_MODEL).is_dir():
        raise UserError(
            f"{run}: the run is not finished, it lacks {FINAL_MODEL}/; finish it by run_stage.py --resume, or name one "
            f"of its checkpoints with --checkpoint ({known})"
        )
    return ModelState(run, run / (checkpoint or FINAL_MODEL), load_yaml(run / RECIPE))


def _is_alone(folder: Path) -> bool:
    """Whether a folder holds a SentenceTransformer that is neither a run's nor packed.

    Raises:
        UserError: If it is packed.
    """
    if not all((folder / name).is_file() for name in ("config.json", "modules.json")):
        return False
    if (folder / "release.json").is_file():
        raise UserError(f"{folder}: is packed already; upload it with `publish.py push`, or give its run")
    return not (folder.absolute().parent / RECIPE).is_file()


def _hint(folder: Path) -> str:
    if (folder.absolute().parent / RECIPE).is_file():
        return f"give its run, {folder.absolute().parent}"
    stages = sorted(path.parent.name for path in folder.glob(f"*/{RECIPE}"))
    return f"name one of its stages: {', '.join(stages)}" if stages else "give the output_dir of a stage"


def state_of(folder: Path) -> ModelState | None:
    """The state that a folder holds: of a run, its model or one of its checkpoints, or a merged model.

    None if neither a run made it nor a merge.
    """
    if (folder / MERGE).is_file():
        return ModelState(folder, folder, {})
    if (folder / RECIPE).is_file() and (folder / FINAL_MODEL).is_dir():
        folder = folder / FINAL_MODEL
    recipe = folder.absolute().parent / RECIPE
    if not holds_model(folder) or not recipe.is_file():
        return None
    return ModelState(recipe.parent, folder, load_yaml(recipe))


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run.

    Raises:
        UserError: If it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}); the run is damaged") from None
