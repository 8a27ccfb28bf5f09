"""What a folder holds, to compare folders with."""

from __future__ import annotations

from pathlib import Path

__all__ = ["content_of"]


def content_of(folder: Path) -> dict[str, bytes]:
    """The bytes of all files in a folder, by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
