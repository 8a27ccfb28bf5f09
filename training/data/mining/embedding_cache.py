"""Embeddings on disk, found by the id of their text and never computed twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.common.checksums import check_file, checksums_of, write_checksums
from training.common.errors import UserError
from training.common.outputs import locked
from training.data.mining.text_ids import Ids

_KEYS, _VECTORS, _DESCRIPTION = ".keys.npy", ".vectors.npy", "embeddings.json"
_REMEDY = "delete it and its .keys.npy, and the texts are embedded again"


class Locations(NamedTuple):
    """Where embeddings lie.

    Attributes:
        names: File names without their ends.
        file: ``(n,)`` numbers among ``names``; -1 where there is no embedding.
        row: ``(n,)`` rows of the files.
    """

    names: list[str]
    file: NDArray[np.int32]
    row: NDArray[np.int32]


class EmbeddingCache:
    """Embeddings that one model gave to texts of one role.

    The folder ``<folder>/<digest of what made them>/`` holds pairs of files: sorted ids and, in their order,
    embeddings. Files are whole or absent, are named after their ids and never change, so that any number of tasks may
    write at once, and a task that is done twice writes the same file again.

    Args:
        folder: The folder of all caches.
        made_by: Everything that an embedding depends on besides its text: model, revision, prompt, length, ...
        half: Store 16 bits a number rather than 32.

    Raises:
        UserError: If the folder cannot be written.
    """

    def __init__(self, folder: Path | str, made_by: Mapping[str, Any], half: bool = False) -> None:
        description = json.dumps({**made_by, "dtype": "float16" if half else "float32"}, sort_keys=True, indent=2)
        self.folder = Path(folder) / blake2b(description.encode(), digest_size=16).hexdigest()
        self._dtype = np.float16 if half else np.float32
        try:
            # A finished cache may lie on a read-only disk.
            if not (self.folder / _DESCRIPTION).is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                self._write(_DESCRIPTION, lambda handle: handle.write(description.encode()))
        except OSError as error:
            raise UserError(
                f"{folder}: the folder of cached embeddings cannot be written ({error.strerror}); give another --cache"
            ) from None

    def add(self, ids: Ids, vectors: NDArray[np.floating]) -> None:
        """Stores embeddings.

        Args:
            ids: ``(n,)``, at least one.
            vectors: ``(n, dimensions)``.
        """
        order = np.argsort(ids)
        ids, vectors = ids[order], np.asarray(vectors)[order].astype(self._dtype)
        name = _name(ids)
        self._write(name + _VECTORS, lambda handle: np.save(handle, vectors))
        # Last: whoever finds the ids finds the embeddings and their checksums.
        self._write(name + _KEYS, lambda handle: np.save(handle, ids))

    def _write(self, name: str, write: Any) -> None:
        final = self.folder / name
        partial = final.with_name(f".{name}.partial")
        with locked(final):
            try:
                with partial.open("wb") as handle:
                    write(handle)
                if name.endswith(_VECTORS):
                    write_checksums(final, partial)
                partial.replace(final)
            finally:
                partial.unlink(missing_ok=True)

    def locate(self, ids: Ids) -> Locations:
        """Looks ids up, which must be distinct.

        Raises:
            UserError: If a file of ids is damaged.
        """
        # Those of earlier versions have no checksums, and are written again.
        files = [path.name.removesuffix(_KEYS) for path in self.folder.glob(f"[!.]*{_KEYS}")]
        names = sorted(name for name in files if checksums_of(self.folder / (name + _VECTORS)).is_file())
        order = np.argsort(ids)
        wanted = ids[order]
        file, row = np.full(len(ids), -1, dtype=np.int32), np.full(len(ids), -1, dtype=np.int32)
        for number, name in enumerate(names if len(ids) else []):
            keys = self._keys(name)
            at = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
            found = np.flatnonzero(wanted[at] == keys)
            file[order[at[found]]], row[order[at[found]]] = number, found
        return Locations(names, file, row)

    def _keys(self, name: str) -> Ids:
        path = self.folder / (name + _KEYS)
        try:
            keys = np.load(path)
        except (OSError, ValueError, EOFError):
            keys = None
        if keys is None or _name(keys) != name:
            raise UserError(f"{path}: is damaged, its bytes are not those that were written; {_REMEDY}")
        return keys

    def read(self, locations: Locations) -> NDArray[np.float32]:
        """``(n, dimensions)`` embeddings, all of which must be there.

        Raises:
            UserError: If a file is damaged; of each, 64 MiB are compared with what was written.
        """
        vectors: NDArray[np.float32] | None = None
        for number in np.unique(locations.file).tolist():
            path = self.folder / (locations.names[number] + _VECTORS)
            check_file(path, _REMEDY)
            stored = np.load(path, mmap_mode="r")
            if vectors is None:
                vectors = np.empty((len(locations.file), stored.shape[1]), dtype=np.float32)
            own = np.flatnonzero(locations.file == number)
            vectors[own] = stored[locations.row[own]]
        assert vectors is not None
        return vectors


def _name(ids: Ids) -> str:
    """The name of the files of some ids, which tells whether they are what was written."""
    return blake2b(ids.tobytes(), digest_size=16).hexdigest()
