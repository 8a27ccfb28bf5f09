"""Checksums beside large files: bytes that changed are noticed when a file is opened, in bounded time."""

from __future__ import annotations

from pathlib import Path
from random import SystemRandom

import numpy as np
from xxhash import xxh3_64_intdigest

from training.common.errors import UserError

# Added to the name of a file for that of its checksums: the XXH3 of every block, as little-endian uint64.
CHECKSUMS = ".xxh3"
_BLOCK_BYTES = 1 << 20
# Read of a file when it is opened, at most.
_MOST_BLOCKS = 64


def checksums_of(path: Path) -> Path:
    """Where the checksums of a file are."""
    return path.with_name(path.name + CHECKSUMS)


def write_checksums(path: Path, content: Path | None = None) -> None:
    """Writes the checksums of a file beside it.

    Args:
        path: The file.
        content: Where its bytes are, if it has not got its name yet.
    """
    with (content or path).open("rb") as file:
        sums = [xxh3_64_intdigest(block) for block in iter(lambda: file.read(_BLOCK_BYTES), b"")]
    checksums_of(path).write_bytes(np.array(sums, dtype="<u8").tobytes())


def check_file(path: Path, remedy: str, most_blocks: int = _MOST_BLOCKS) -> None:
    """Compares a file with its checksums: the whole of a small one, a sample of a large one.

    Args:
        path: The file.
        remedy: What the error tells the user to do.
        most_blocks: Blocks of 1 MiB that are read at most. Files up to 64 MiB are read whole by default; of larger
            ones blocks are drawn, each time others: repeated starts come to see all.

    Raises:
        UserError: If the file is not as it was written, or it or its checksums are missing.
    """
    try:
        sums, size = np.fromfile(checksums_of(path), dtype="<u8"), path.stat().st_size
        blocks = -(-size // _BLOCK_BYTES)
        same = len(sums) == blocks
        # Not drawn by key: what is drawn decides nothing but where a fault is looked for.
        drawn = sorted(SystemRandom().sample(range(blocks), min(blocks, most_blocks)))
        with path.open("rb") as file:
            for block in drawn if same else ():
                file.seek(block * _BLOCK_BYTES)
                same &= xxh3_64_intdigest(file.read(_BLOCK_BYTES)) == int(sums[block])
    except OSError as error:
        raise UserError(f"{path}: cannot be checked ({error.strerror}: {error.filename}); {remedy}") from None
    if not same:
        raise UserError(f"{path}: is damaged, its bytes are not those that were written; {remedy}")
