"""Checkpoints with a pending upload, on disk: hard links that outlive the rotation of the run's checkpoints."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from training.common.errors import UserError
from training.common.outputs import discard
from training.common.run_folder import holds_model, numbered_checkpoints
from training.publishing.hub.progress import STATE

# In the run's folder.
QUEUE = ".upload_queue"
# The files of a checkpoint that make the model; optimizer, scheduler and random states are left out.
_KEPT = (".json", ".jinja", ".safetensors", ".txt")


class UploadQueue:
    """The checkpoints of a run whose upload is pending, at most ``limit``: each keeps a model's weights on the disk.

    A checkpoint is in the queue whole or not at all, and stays until :meth:`remove`, even if the process is killed.
    """

    def __init__(self, run: Path, limit: int = 8) -> None:
        self.folder = run / QUEUE
        self.limit = limit

    def pending(self) -> list[Path]:
        """Return the checkpoints in the queue, oldest step first."""
        return numbered_checkpoints(self.folder)

    def add(self, checkpoint: Path) -> Path:
        """Put a whole ``checkpoint-N`` into the queue, unless it is there; return its path in the queue.

        It is refused at the limit, or if the disk has no room for the run's next one.
        """
        queued = self.folder / checkpoint.name
        if queued.exists():
            return queued
        if len(self.pending()) >= self.limit:
            raise UserError(f"{self.limit} checkpoints are in the queue already")
        partial = self.folder / f".{checkpoint.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _require_room(checkpoint)
            partial.mkdir(parents=True)
            for path in sorted(checkpoint.rglob("*")):
                if path.suffix in _KEPT and path.is_file():
                    _link(path, partial / path.relative_to(checkpoint))
            if not (holds_model(partial) and (partial / STATE).is_file()):
                raise FileNotFoundError(f"it lacks {STATE} or the model")
            partial.rename(queued)
        except FileNotFoundError as error:
            raise UserError(f"{checkpoint}: is gone or incomplete ({error}); it cannot be uploaded") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return queued

    def remove(self, queued: Path) -> None:
        """Remove an uploaded checkpoint; do nothing if another process has."""
        with suppress(FileNotFoundError):
            discard(queued)
        # Fails while other checkpoints are pending.
        with suppress(OSError):
            self.folder.rmdir()

    def tidy(self) -> None:
        """Remove what killed processes left half linked or half deleted."""
        for left in self.folder.glob(".*"):
            shutil.rmtree(left, ignore_errors=True)


def _require_room(checkpoint: Path) -> None:
    """Refuse a checkpoint unless what is kept of it and the run's next checkpoint fit on the disk together."""
    sizes = {path: path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()}
    needed = sum(sizes.values()) + sum(size for path, size in sizes.items() if path.suffix in _KEPT)
    free = shutil.disk_usage(checkpoint.parent).free
    if free < needed:
        raise UserError(f"the disk has {free / 1e9:.1f} GB left, and {needed / 1e9:.1f} GB must be free")


def _link(path: Path, link: Path) -> None:
    link.parent.mkdir(exist_ok=True)
    try:
        os.link(path, link)
    except FileNotFoundError:
        raise
    # Another device, or a file system without hard links.
    except OSError:
        shutil.copyfile(path, link)
