"""Checkpoints that are whole or absent: written aside, made durable, and renamed."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

__all__ = [
    *("STAGING", "checkpoints", "holds_model", "last_checkpoint", "missing_part", "numbered_checkpoints"),
    *("publish", "remove_leftovers", "rotate", "step_of", "write_whole"),
]

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
