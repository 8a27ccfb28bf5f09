"""Names and contents of a run folder; checkpoints are written beside it, synced and renamed, so each is complete."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import shutil
from contextlib import suppress
from pathlib import Path

from training.common.paths import place_of
from training.common.yaml_file import load_yaml

# What pruning measured: which layers and channels matter.
IMPORTANCE_FILE = "importance.safetensors"
# The stage's keys, written to its folder when everything is ready to train.
RECIPE = "recipe.yaml"
# What a stage is made of: fingerprints of its prepared sources by name, and of teacher and base.
DATA = "data.json"
# Name of the folder, below a stage's output, that holds its finished model.
FINAL_MODEL = "model"
# A checkpoint in the making, and old ones on their way out: neither is ever resumed from.
STAGING = ".checkpoint.partial"
_DISCARDED = ".discarded"
# Without one of these, training cannot go on as if nothing had happened: the file that is missed, and what else may be
# there in its place, where weights and optimizer are sharded.
_NEEDED = {
    "trainer_state.json": (),
    "scheduler.pt": (),
    "optimizer.pt": ("optimizer.bin", "optimizer_*", "latest"),
    "model.safetensors": ("*.safetensors", "pytorch_model*"),
    "rng_state.pth": ("rng_state_*.pth",),
}
# Which file of large weights holds which.
_INDEX = "model.safetensors.index.json"
# What a folder has that holds a model, or an adapter of one.
_OF_A_MODEL = ("config.json", "adapter_config.json")


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter."""
    return any((folder / name).is_file() for name in _OF_A_MODEL)


def numbered_checkpoints(output_dir: Path) -> list[Path]:
    """All folders named as checkpoints, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(folders, key=step_of)


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run that can be resumed from, oldest first."""
    return [path for path in numbered_checkpoints(output_dir) if missing_part(path) is None]


def missing_part(checkpoint: Path) -> str | None:
    """The name of a file without which a checkpoint cannot be resumed from; None if it has all of them."""
    if not holds_model(checkpoint):
        return _OF_A_MODEL[0]
    for name, others in _NEEDED.items():
        if not (checkpoint / name).is_file() and not any(any(checkpoint.glob(other)) for other in others):
            return name
    return next((name for name in _shards(checkpoint) if not (checkpoint / name).is_file()), None)


def _shards(checkpoint: Path) -> list[str]:
    """The files of weights that an index names; none if there is no index, or a damaged one, which loading it says."""
    try:
        return sorted({*json.loads((checkpoint / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that can be resumed from."""
    return next(reversed(checkpoints(output_dir)), None)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is of, by its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def publish(partial: Path, final: Path) -> None:
    """Gives a finished folder its name, at once and for good: a power failure after it loses nothing.

    Raises:
        OSError: If the disk is full or the folder cannot be renamed; then only the partial folder is there.
    """
    # Some libraries write files that only their owner may read; the folder has the mode that the umask gives.
    readers = partial.stat().st_mode & 0o666
    for path in (*partial.rglob("*"), partial):
        if path.is_file() and not path.is_symlink():
            # Not every file system has modes to set.
            with suppress(OSError):
                path.chmod(readers)
        _sync(path)
    # A folder of that name lacks a file that is needed (it could be loaded otherwise): this one replaces it.
    if final.exists():
        discard(final)
    partial.rename(final)
    _sync(final.parent)


def write_whole(path: Path, text: str) -> None:
    """Writes a small file; interrupted half way, it leaves the old one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    partial.replace(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rotate(output_dir: Path, limit: int | None, best: Path | None = None) -> None:
    """Deletes the oldest checkpoints over ``limit``, but never the newest nor the best one."""
    if not limit:
        return
    whole = checkpoints(output_dir)
    spared = {path.resolve() for path in (*whole[-1:], *([best] if best else []))}
    surplus = len(whole) - limit
    for checkpoint in [path for path in whole if path.resolve() not in spared][: max(surplus, 0)]:
        discard(checkpoint)


def discard(folder: Path) -> None:
    """Deletes a folder; interrupted half way, it leaves none under the old name."""
    doomed = folder.with_name(f".{folder.name}{_DISCARDED}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(output_dir: Path) -> None:
    """Removes what an interrupted save or rotation left behind."""
    for path in (output_dir / STAGING, *output_dir.glob(f".*{_DISCARDED}")):
        shutil.rmtree(path, ignore_errors=True)


def run_of(name: str) -> Path | None:
    """The folder of the run that a folder is, or is the model or a checkpoint of; None if there is none."""
    folder = Path(name)
    return next((place for place in (folder, folder.parent) if (place / RECIPE).is_file()), None)


def manifest_of(run: Path) -> Path | None:
    """The manifest of the data that a run was trained on; None if it is no longer there."""
    keys = load_yaml(run / RECIPE)
    manifest = place_of(run, keys, str(keys["manifest"])) if keys.get("manifest") else None
    return manifest if manifest is not None and manifest.is_file() else None


def public_name(place: str) -> str:
    """The last part of a path; nothing if it names this machine or its user.

    Args:
        place: A folder or file.
    """
    name = Path(place).name
    words = re.split(r"[^a-z0-9]+", name.lower())
    return "" if set(words) & {each.lower() for each in _own_names()} else name


def _own_names() -> set[str]:
    host = platform.node()
    names = {host, host.split(".")[0], Path.home().name}
    try:
        names.add(getpass.getuser())
    # A container's user need have no name.
    except (KeyError, OSError):
        pass
    return names - {""}
