"""Output files and folders: complete or absent, written by one command at a time, with checksums beside large files."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from random import SystemRandom
from tempfile import TemporaryDirectory

import numpy as np
from filelock import FileLock, Timeout
from xxhash import xxh3_64_intdigest

from training.common.errors import OutputError, UserError

logger = logging.getLogger("training")

_BLOCK_BYTES = 1 << 20
# Suffix of a folder that is being deleted.
DISCARDED = ".discarded"
# The lock inside a folder whose parent cannot be written.
_LOCK = ".lock"


@contextmanager
def whole_file(path: Path, checksums: bool = False) -> Iterator[Path]:
    """Give a partial path that becomes ``path`` when the block ends, with checksums on request, unless it fails."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        if checksums:
            write_checksums(path, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a small file and sync it to disk; interrupted half way, it leaves the old file."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
        _sync(partial)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksums_of(path: Path) -> Path:
    """Return the path of a file's checksums: the XXH3 of every block, as little-endian uint64."""
    return path.with_name(f"{path.name}.xxh3")


def write_checksums(path: Path, content: Path | None = None) -> None:
    """Write the checksums of a file beside it; ``content`` is the file to read if ``path`` does not exist yet."""
    with (content or path).open("rb") as file:
        sums = [xxh3_64_intdigest(block) for block in iter(lambda: file.read(_BLOCK_BYTES), b"")]
    checksums_of(path).write_bytes(np.array(sums, dtype="<u8").tobytes())


def check_file(path: Path, remedy: str, most_blocks: int = 64) -> None:
    """Refuse a file that differs from its checksums; ``remedy`` is what the user has to do then.

    Of a file with more than ``most_blocks`` blocks of 1 MiB, each call reads another random sample.
    """
    try:
        sums = np.fromfile(checksums_of(path), dtype="<u8")
        blocks = -(-path.stat().st_size // _BLOCK_BYTES)
        same = len(sums) == blocks
        # Not keyed: the draw decides only where a fault is looked for.
        drawn = sorted(SystemRandom().sample(range(blocks), min(blocks, most_blocks))) if same else []
        with path.open("rb") as file:
            for block in drawn:
                file.seek(block * _BLOCK_BYTES)
                same &= xxh3_64_intdigest(file.read(_BLOCK_BYTES)) == int(sums[block])
    except OSError as error:
        raise UserError(f"{path}: cannot be checked ({error.strerror}: {error.filename}); {remedy}") from None
    if not same:
        raise UserError(f"{path}: is damaged, its bytes are not those that were written; {remedy}")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give an empty folder that replaces ``output`` when the block ends, unless it fails; use it in :func:`locked`."""
    with scratch_folder(output) as partial:
        yield partial
        move_into_place(partial, output.resolve())


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """Give an empty hidden folder beside ``output`` for the time of the block; use it in :func:`locked`."""
    # Beside the target of a link, which may be on another disk.
    output = output.resolve()
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def temporary_folder() -> TemporaryDirectory[str]:
    """Give an empty temporary folder for the time of a block."""
    return TemporaryDirectory(prefix="f2llm-", ignore_cleanup_errors=True)


def move_into_place(partial: Path, final: Path) -> None:
    """Rename a finished folder to its final name and sync it, so that a power failure loses nothing."""
    # Some libraries write files that only their owner may read; the folder has the mode of the umask.
    readers = partial.stat().st_mode & 0o666
    for path in (*partial.rglob("*"), partial):
        if path.is_file() and not path.is_symlink():
            # Not every file system has modes.
            with suppress(OSError):
                path.chmod(readers)
        _sync(path)
    # A folder of that name is incomplete, or it would have been used: replace it.
    if final.exists():
        discard(final)
    partial.rename(final)
    _sync(final.parent)


def discard(folder: Path) -> None:
    """Delete a folder; interrupted half way, it leaves none under the old name."""
    doomed = folder.with_name(f".{folder.name}{DISCARDED}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_partials(folder: Path) -> None:
    """Remove the partial files and folders that killed commands left in a folder, if their output is not locked."""
    for partial in folder.glob(".*.partial"):
        output = folder / partial.name.removeprefix(".").removesuffix(".partial")
        with suppress(UserError), locked(output, busy="is being written"):
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink()


@contextmanager
def locked(output: Path, busy: str | None = None) -> Iterator[None]:
    """Keep other commands from writing the same output until the block ends or this process dies.

    Look for a finished output before (its disk may be read-only) and again in the block (another command may have made
    it). With ``busy``, the error is raised instead of waiting for that command.
    """
    # Two spellings of a path are one output.
    path = output.resolve()
    # A folder may be the only part of its disk that can be written.
    inside = path.is_dir() and not os.access(path.parent, os.W_OK)
    lock = FileLock(path / _LOCK if inside else path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        if busy is not None:
            raise UserError(f"{output}: {busy}") from None
        logger.info("%s: another command is writing it; waiting for that one to end", output)
        lock.acquire()
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error})", "give another path") from None
    try:
        yield
    finally:
        # Removed while it is held: whoever waits for it notices and takes a new one.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def check_output(
    output: Path, reads: Iterable[Path] = (), ours: Collection[str] | None = None, option: str = "--output"
) -> None:
    """Refuse an output that is, contains or lies in an input, or that holds files of other programs.

    Inputs that do not exist, such as Hub names, are ignored. ``ours`` are names that the folder may hold already (``*``
    as in file names); None allows any. ``option`` is the one to change.
    """
    path, fault = output.resolve(), None
    for read in [each.resolve() for each in reads if each.exists()]:
        if read == path:
            fault = "is read"
        elif read.is_relative_to(path):
            fault = f"holds {read.name}, which is read"
        elif path.is_relative_to(read):
            fault = f"lies in {read}, which is read"
    if ours is not None and path.is_file():
        fault = "is a file, so that a folder cannot be written there"
    elif ours is not None and path.exists():
        names = sorted(each.name for each in path.iterdir())
        foreign = next((name for name in names if not any(fnmatch(name, each) for each in (*ours, _LOCK))), None)
        fault = fault or (foreign and f"holds {foreign}, which this command did not write")
    if fault:
        raise OutputError(f"{output}: {fault}", f"give another {option}")
