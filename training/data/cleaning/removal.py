"""Writing sources without some of their rows: the same files otherwise, and a manifest of them."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from training.common.errors import StoppedError, UserError
from training.common.executor import Executor, Phase, run_phases
from training.common.run_folder import write_whole
from training.data.cleaning.work import stage_folder
from training.data.manifest import Source
from training.data.parquet import write_parquet
from training.data.published import PublishedFile

logger = logging.getLogger(__name__)

MANIFEST = "manifest.yaml"


def write_clean(
    sources: Sequence[Source],
    removed: Sequence[np.ndarray],
    output: Path,
    work: Path,
    executor: Executor | None = None,
) -> None:
    """Writes ``<source>/<number>.parquet`` for every file, without the rows to remove, and ``manifest.yaml``.

    All columns, their types and the order of the rows stay; a file that loses nothing is copied byte for byte. A file
    that loses every row is not written, nor a source without files.

    Args:
        sources: Where rows come from.
        removed: Rows to leave out of each file, in order, for the files of all sources in a row.
        output: The folder to write into.
        work: Where the state of tasks goes. What is finished there and unchanged is used again.
        executor: Where tasks run; local processes if None.

    Raises:
        UserError: If no row is left.
        StoppedError: If a file that should be there is not.
    """
    files = [path for source in sources for path in source.files]
    digest = hashlib.blake2b(b"".join(len(rows).to_bytes(8, "little") + rows.tobytes() for rows in removed))
    folder = stage_folder(work, "clean", files, [digest.hexdigest(), [source.name for source in sources]])
    names = [Path(source.name, f"{number:05d}.parquet") for source in sources for number in range(len(source.files))]
    moved = folder / "moved"
    if moved.exists():
        there = [_is_written(path, output / name, rows) for path, name, rows in zip(files, names, removed, strict=True)]
        if all(there) and (output / MANIFEST).exists():
            return
        # Somebody deleted what was finished, or the move was cut short.
        shutil.rmtree(folder / "tasks")
        moved.unlink()
    # Aside: what an earlier run left in the output stays until there is something to take its place.
    targets = [folder / "files" / name for name in names]
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(removed):
        np.save(folder / f"removed_{number:05d}.npy", rows)
    clean = partial(_clean, tuple(files), tuple(targets), folder)
    run_phases([Phase("clean", clean, len(files))], folder / "tasks", executor)
    written = map(_is_written, files, targets, removed)
    missing = [target for target, there in zip(targets, written, strict=True) if not there]
    if missing:
        raise StoppedError(f"{missing[0]}: a task left it out; remove {output} and run the command again")
    entries = []
    for source in sources:
        left = sorted(path.name for path in (folder / "files" / source.name).iterdir())
        if left:
            entries.append(_entry(source, [f"{escape(source.name)}/{name}" for name in left]))
        else:
            logger.warning("source %s: every row was removed; the manifest leaves it out", source.name)
    if not entries:
        raise UserError(f"{output}: no row of any source is left; look at contamination.json before removing rows")
    moved.touch()
    for source in sources:
        shutil.rmtree(output / source.name, ignore_errors=True)
        if any((folder / "files" / source.name).iterdir()):
            (folder / "files" / source.name).rename(output / source.name)
    text = yaml.safe_dump({"sources": entries}, sort_keys=False, allow_unicode=True, width=119)
    write_whole(output / MANIFEST, text)


def _is_written(path: Path, target: Path, removed: np.ndarray) -> bool:
    return target.exists() or len(removed) == pq.read_metadata(path).num_rows


def _clean(files: Sequence[Path], targets: Sequence[Path], folder: Path, task: int) -> None:
    removed, path, target = np.load(folder / f"removed_{task:05d}.npy"), files[task], targets[task]
    if not len(removed):
        partial_copy = target.with_name(f".{target.name}.partial")
        shutil.copyfile(path, partial_copy)
        partial_copy.replace(target)
        return
    if len(removed) < pq.read_metadata(path).num_rows:
        write_parquet(target, _kept(path, removed))


def _kept(path: Path, removed: np.ndarray) -> Iterator[pa.Table]:
    """Yields the rows that stay."""
    row = 0
    for batch in PublishedFile(path).record_batches(all_columns=True):
        stays = np.ones(len(batch), dtype=bool)
        start, end = np.searchsorted(removed, (row, row + len(batch)))
        stays[removed[start:end] - row] = False
        row += len(batch)
        yield pa.Table.from_batches([batch.filter(pa.array(stays))])


def _entry(source: Source, files: list[str]) -> dict[str, Any]:
    """The source as the manifest says it, without what is as by default."""
    entry: dict[str, Any] = {}
    for key in fields(source):
        value = getattr(source, key.name)
        default = key.default_factory() if key.default_factory is not MISSING else key.default
        if key.name == "files":
            entry["files"] = files
        elif default is MISSING or value != default:
            entry[key.name] = value
    return entry
