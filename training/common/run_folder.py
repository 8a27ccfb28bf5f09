"""Names and contents of a run folder: recipe, checkpoints, finished model, and the paths in its recipe."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.common.outputs import DISCARDED, discard
from training.common.yaml_file import PATH_KEYS, load_yaml

if TYPE_CHECKING:
    from torch.optim import Optimizer

IMPORTANCE_FILE = "importance.safetensors"  # importances of layers and channels, measured by pruning
PRUNING_PLAN = "pruning.yaml"  # what stayed of a model that was pruned, and how that was chosen
PRUNING_SEARCH = "pruning_search.yaml"  # the shapes that were tried for a budget
RECIPE = "recipe.yaml"  # the stage's keys, written when everything is ready to train
DATA = "data.json"  # fingerprints of the sources by name, their weights, and fingerprints of teacher and base
# A source is named like a folder: no name of one contains "/".
TEACHER_DATA, BASE_DATA, WEIGHTS_DATA = "the teacher/", "the base/", "the weights/"
FINAL_MODEL = "model"  # folder of the finished model
STAGING = ".checkpoint.partial"  # folder in which a checkpoint is written; never resumed from
_PREFIX = "checkpoint-"
# Files without which training cannot resume exactly, and what may replace them where weights and optimizer are sharded.
_NEEDED = {
    "trainer_state.json": (),
    "scheduler.pt": (),
    "optimizer.pt": ("optimizer.bin", "optimizer_*", "latest"),
    "model.safetensors": ("*.safetensors", "pytorch_model*"),
    "rng_state.pth": ("rng_state_*.pth",),
}
_MODEL_CONFIGS = ("config.json", "adapter_config.json")
# What a recipe sets for a parameter group. Other entries of a group may be states of the optimizer.
_OPTIONS = ("betas", "eps", "weight_decay")


def holds_model(folder: Path) -> bool:
    """Return whether a folder holds a model or an adapter."""
    return any((folder / name).is_file() for name in _MODEL_CONFIGS)


def numbered_checkpoints(output_dir: Path) -> list[Path]:
    """Return all folders named as checkpoints, oldest first."""
    folders = [path for path in output_dir.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(folders, key=step_of)


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run that can be resumed from, oldest first."""
    return [path for path in numbered_checkpoints(output_dir) if missing_part(path) is None]


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest checkpoint that can be resumed from."""
    return next(reversed(checkpoints(output_dir)), None)


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def missing_part(checkpoint: Path) -> str | None:
    """Return the name of a file that a checkpoint lacks to be resumed from, or None."""
    if not holds_model(checkpoint):
        return _MODEL_CONFIGS[0]
    for name, others in _NEEDED.items():
        if not any(any(checkpoint.glob(each)) for each in (name, *others)):
            return name
    shards: set[str] = set()
    # Most checkpoints have no index; loading reports a damaged one.
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        index = json.loads((checkpoint / "model.safetensors.index.json").read_text(encoding="utf-8"))
        shards = {*index["weight_map"].values()}
    return next((name for name in sorted(shards) if not (checkpoint / name).is_file()), None)


def rotate(output_dir: Path, limit: int | None, best: Path | None = None) -> None:
    """Delete the oldest checkpoints above ``limit``, but never the newest or the best one."""
    whole = checkpoints(output_dir)
    surplus = max(len(whole) - limit, 0) if limit else 0
    for checkpoint in [path for path in whole[:-1] if best is None or path.resolve() != best.resolve()][:surplus]:
        discard(checkpoint)


def remove_leftovers(output_dir: Path) -> None:
    """Remove the remains of an interrupted save or rotation."""
    for path in (output_dir / STAGING, *output_dir.glob(f".*{DISCARDED}")):
        shutil.rmtree(path, ignore_errors=True)


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return learning rate, betas, epsilon and weight decay of each parameter group of a new optimizer."""
    return [{key: group[key] for key in ("lr", *_OPTIONS) if key in group} for group in optimizer.param_groups]


def apply_options(optimizer: Optimizer, options: Sequence[dict[str, Any]]) -> None:
    """Set the recipe's options in an optimizer from a checkpoint, except the learning rate, which the schedule sets."""
    for group, own in zip(optimizer.param_groups, options, strict=False):
        group.update({key: own[key] for key in _OPTIONS if key in own and key in group})


def run_of(name: str) -> Path | None:
    """Return the run folder of a run, or of its model or checkpoint; None if there is none."""
    folder = Path(name)
    return next((path for path in (folder, folder.parent) if (path / RECIPE).is_file()), None)


def manifest_of(run: Path) -> Path | None:
    """Return the manifest of a run's training data; None if it no longer exists."""
    keys = load_yaml(run / RECIPE)
    manifest = place_of(run, keys, str(keys["manifest"])) if keys.get("manifest") else None
    return manifest if manifest is not None and manifest.is_file() else None


def from_run(key: str, keys: Mapping[str, Any]) -> Any:
    """Return a recipe value that does not depend on the working directory: a path becomes relative to the run."""
    value, output_dir = keys.get(key), str(keys.get("output_dir", ""))
    is_path = key in PATH_KEYS and isinstance(value, str) and output_dir and "://" not in value
    same_kind = is_path and os.path.isabs(value) == os.path.isabs(output_dir)
    return os.path.relpath(value, output_dir) if same_kind else value


def place_of(run: Path, keys: Mapping[str, Any], written: str) -> Path:
    """Resolve a path that is ``written`` in a run's recipe.

    It is relative to the working directory of the training, which is not known later. Relative to the run folder it
    still holds, even if run and data were moved together.
    """
    output_dir = str(keys.get("output_dir", ""))
    if os.path.isabs(written) == os.path.isabs(output_dir):
        # Not resolved: `..` of a run that is a link leads to the folder of the link, as it did in training.
        beside = Path(os.path.normpath(run.absolute() / os.path.relpath(written, output_dir)))
        if beside.exists():
            return beside
    return Path(written)


def public_name(path: str) -> str:
    """Return the last part of a path, or nothing if it contains the name of this machine or user."""
    name, host = Path(path).name, platform.node()
    own = {host, host.split(".")[0], Path.home().name}
    # The user of a container may have no name.
    with suppress(KeyError, OSError):
        own.add(getpass.getuser())
    words = re.split(r"[^a-z0-9]+", name.lower())
    return "" if {each.lower() for each in own if each} & set(words) else name
