"""Checkpoints that wait to be uploaded, on disk: hard links that outlive the rotation of the run's own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from training.common.errors import UserError
from training.common.run_folder import holds_model, numbered_checkpoints
from training.publishing.hub.progress import STATE

# In the run's folder.
QUEUE = ".upload_queue"
_PARTIAL, _GONE = ".partial", ".discarded"
# Of a checkpoint these are what a model is made of; optimizer, scheduler and random states are left out.
_KEPT = (".json", ".jinja", ".safetensors", ".txt")


class QueueFullError(RuntimeError):
    """As many checkpoints wait as may."""


class UploadQueue:
    """The checkpoints of a run that wait.

    A checkpoint is in the queue whole or not at all, and stays until :meth:`remove`, whatever ends the process.

    Args:
        run: The run's folder.
        limit: Checkpoints that may wait; each keeps a model's weights on the disk once its run has deleted them, and so
            none is added unless the run can save another checkpoint after that.
    """

    def __init__(self, run: Path, limit: int = 8) -> None:
        self.folder = run / QUEUE
        self.limit = limit

    def waiting(self) -> list[Path]:
        """What waits, the oldest step first."""
        return numbered_checkpoints(self.folder)

    def add(self, checkpoint: Path, limited: bool = True) -> Path:
        """Puts a checkpoint into the queue; one that waits already stays as it is.

        Args:
            checkpoint: ``checkpoint-N``, whole.
            limited: Whether the limit holds for it, and room must be left for the run's next checkpoint.

        Returns:
            Its place in the queue.

        Raises:
            QueueFullError: If as many wait as may, or the disk has no room for more; those that wait stay.
            UserError: If there is no such checkpoint, or it is gone before all of it is linked.
            OSError: If the disk is full or cannot be written.
        """
        place = self.folder / checkpoint.name
        if place.exists():
            return place
        if limited and len(self.waiting()) >= self.limit:
            raise QueueFullError(f"{self.limit} checkpoints wait already")
        partial = self.folder / f".{checkpoint.name}{_PARTIAL}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            if limited:
                _require_room(checkpoint)
            self._make(partial)
            _link(checkpoint, partial)
            if not (holds_model(partial) and (partial / STATE).is_file()):
                raise FileNotFoundError(f"it lacks {STATE} or the model")
            partial.rename(place)
        except FileNotFoundError as error:
            raise UserError(f"{checkpoint}: is gone, or not whole ({error}); it cannot be uploaded") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return place

    def tidy(self) -> None:
        """Removes what killed processes left half linked or half deleted."""
        for ending in (_PARTIAL, _GONE):
            for left in self.folder.glob(f".*{ending}"):
                shutil.rmtree(left, ignore_errors=True)

    def _make(self, partial: Path) -> None:
        """Makes a folder in the queue's own, which whoever empties the queue may remove at any moment.

        Raises:
            FileNotFoundError: If the run's folder is gone.
        """
        while True:
            self.folder.mkdir(exist_ok=True)
            try:
                partial.mkdir()
            except FileNotFoundError:
                continue
            return

    def remove(self, place: Path) -> None:
        """Takes out what was uploaded; nothing is done if another process did."""
        # Renamed first: half of it must not look like all of it.
        gone = place.with_name(f".{place.name}{_GONE}")
        shutil.rmtree(gone, ignore_errors=True)
        try:
            place.rename(gone)
        except FileNotFoundError:
            return
        shutil.rmtree(gone, ignore_errors=True)
        try:
            self.folder.rmdir()
        # Others wait.
        except OSError:
            pass


def _require_room(checkpoint: Path) -> None:
    """Makes sure that what is kept of a checkpoint never takes the disk from the run's next one.

    Raises:
        QueueFullError: If it could: what is kept, and a whole checkpoint, do not fit at once.
    """
    sizes = {path: path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()}
    needed = sum(sizes.values()) + sum(size for path, size in sizes.items() if path.suffix in _KEPT)
    free = shutil.disk_usage(checkpoint.parent).free
    if free < needed:
        raise QueueFullError(f"the disk has {free / 1e9:.1f} GB left, and {needed / 1e9:.1f} GB must be free")


def _link(checkpoint: Path, folder: Path) -> None:
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix in _KEPT and path.is_file():
            place = folder / path.relative_to(checkpoint)
            place.parent.mkdir(exist_ok=True)
            try:
                os.link(path, place)
            except FileNotFoundError:
                raise
            # Another device, or a file system without hard links.
            except OSError:
                shutil.copyfile(path, place)
