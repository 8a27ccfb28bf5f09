"""Writing outputs: one command at a time, whole or absent, and never over what is read."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from tempfile import gettempdir
from uuid import uuid4

from filelock import FileLock, Timeout

from training.common.errors import OutputError, UserError
from training.common.run_folder import publish

logger = logging.getLogger("training")

# What temporary folders are named.
_TEMPORARY = "f2llm-scratch-"
# The lock of a folder beside which nothing can be written.
_LOCK = ".lock"


@contextmanager
def locked(output: Path, busy: str | None = None) -> Iterator[None]:
    """Makes other commands that write the same output wait until the block ends, or its process does.

    Look for a finished output before, since its disk may be read-only, and again inside the block: another command may
    just have made it.

    Args:
        output: The file or folder to be written. The lock is a hidden file beside it, or in it where nothing beside it
            can be written.
        busy: What to say of the output if another command is writing it; None waits for that one to end.

    Raises:
        UserError: If nothing can be written there, or another command is writing it and ``busy`` is given.
    """
    # Two spellings of a path are one output.
    place = output.resolve()
    beside = place.with_name(f".{place.name}.lock")
    # A folder may be all of a disk that can be written.
    lock = FileLock(place / _LOCK if place.is_dir() and not os.access(place.parent, os.W_OK) else beside)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if busy is not None:
                raise UserError(f"{output}: {busy}") from None
            logger.info("%s: another command is writing it; waiting for that one to end", output)
            lock.acquire()
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error})", "name another place") from None
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
    with scratch_folder(output) as partial:
        yield partial
        publish(partial, output.resolve())


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """Gives an empty hidden folder beside ``output`` that vanishes when the block ends.

    Use it under :func:`locked`. What a killed command left here is cleared.
    """
    # Beside what a link leads to, which may be on another disk.
    output = output.resolve()
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Gives the path of an empty folder of the system's temporary ones, as ``tempfile.TemporaryDirectory`` does.

    It is cleared when the block ends or, if its command was killed, when the next one of ours asks for one.
    """
    place = Path(gettempdir())
    for left in place.glob(f"{_TEMPORARY}*"):
        # Another user's cannot be locked or removed.
        with suppress(UserError), locked(left, busy="is in use"):
            shutil.rmtree(left, ignore_errors=True)
    folder = place / f"{_TEMPORARY}{uuid4().hex}"
    with locked(folder):
        folder.mkdir(mode=0o700)
        try:
            yield str(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def clear_partials(folder: Path) -> None:
    """Removes the unfinished files and folders that killed commands left in a folder, but none that is being written.

    One whose output is :func:`locked` stays. Those of outputs that are written without a lock of their own go: call it
    under the lock of the folder that holds them.
    """
    for partial in folder.glob(".*.partial"):
        output = folder / partial.name.removeprefix(".").removesuffix(".partial")
        with suppress(UserError), locked(output, busy="is being written"):
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)


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
        raise OutputError(f"{output}: {what}", f"give another {option}")
    if ours is None or not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"{output}: is a file, so that a folder cannot be written there", f"give another {option}")
    ours = (*ours, _LOCK)
    foreign = sorted(path.name for path in output.iterdir() if not any(fnmatch(path.name, each) for each in ours))
    if foreign:
        raise OutputError(f"{output}: holds {foreign[0]}, which this command did not write", f"give another {option}")
