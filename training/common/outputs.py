"""Writing outputs: one command at a time, whole or absent, and never over what is read."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from training.checkpoints import publish
from training.errors import UserError

__all__ = ["check_output", "locked", "new_folder"]

logger = logging.getLogger("training")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Makes other commands that write the same output wait until the block ends, or its process does.

    Look for a finished output again inside the block: another command may just have made it.

    Args:
        output: The file or folder to be written. The lock is a hidden file beside it.

    Raises:
        UserError: If nothing can be written there.
    """
    lock = FileLock(output.with_name(f".{output.name}.lock"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("%s: another command is writing it; waiting for that one to end", output)
            lock.acquire()
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error}); name another place") from None
    try:
        yield
    finally:
        # Removed while it is held: who waits for it notices and takes a new one.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Gives an empty folder that takes the place of ``output`` when the block ends, or vanishes if it fails.

    Use it under :func:`locked`. What a killed command left here is cleared.
    """
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        publish(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(
    output: Path, reads: Iterable[Path] = (), ours: Collection[str] | None = None, option: str = "--output"
) -> None:
    """Refuses an output in whose place something would be lost.

    Args:
        output: The file or folder to be written.
        reads: Files and folders that are read. What is not there, such as a name on the Hub, is passed over.
        ours: Names that may already stand in an output folder (``*`` as in file names); anything else there is
            foreign. None: not looked at.
        option: What the user has to change, such as ``--output``.

    Raises:
        UserError: If the output is, holds or lies in something that is read, or holds something foreign.
    """
    place = output.resolve()
    for path in reads:
        read = path.resolve()
        if not read.exists() or not (read.is_relative_to(place) or place.is_relative_to(read)):
            continue
        what = "is read" if read == place else f"holds {path.name}, which is read"
        if place != read and place.is_relative_to(read):
            what = f"lies in {path}, which is read"
        raise UserError(f"{output}: {what}; give another {option}")
    if ours is None or not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: is a file, so that a folder cannot be written there; give another {option}")
    foreign = sorted(path.name for path in output.iterdir() if not any(fnmatch(path.name, each) for each in ours))
    if foreign:
        raise UserError(f"{output}: holds {foreign[0]}, which this command did not write; give another {option}")
