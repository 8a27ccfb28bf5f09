"""Survey of a manifest: files, rows and missing data, from the metadata of the files, and tables of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from tqdm.auto import tqdm

from training.common.errors import UserError
from training.common.languages import SEVERAL
from training.data.manifest import Entry, file_languages, find_entry_files, read_manifest
from training.data.prepared import text_table
from training.data.published import PublishedFile
from training.data.storage import SourceFile

# Languages in a report.
_SHOWN = 20


class FileSurvey(NamedTuple):
    """One file that was found."""

    name: str  # path or address
    rows: int
    negatives: int  # number of negative columns
    languages: list[str]  # ISO 639-3 codes; two are the two sides of a bitext
    tells_language: bool  # whether it has a column "lang"


@dataclass(frozen=True)
class CollectionSurvey:
    """One entry of the manifest, or one of its sources."""

    entry: Entry
    cap: int | None  # maximum rows of each of its sources
    files: list[FileSurvey]  # those that were found and can be read
    missing: list[str]  # patterns, or a number of files, that were not found
    faults: list[str]  # why some of the files found cannot be read

    @property
    def sources(self) -> list[CollectionSurvey]:
        """Its sources: each file of a collection, or all files together."""
        return [replace(self, files=[file]) for file in self.files] if self.entry.each_file else [self]

    @property
    def languages(self) -> list[str]:
        """ISO 639-3 codes of a source."""
        return self.files[0].languages if self.files else self.entry.languages

    def _capped(self, rows: int, sources: int = 1) -> int:
        return rows if self.cap is None else min(rows, self.cap * sources)

    @property
    def rows(self) -> int:
        """Rows of all files found."""
        return sum(file.rows for file in self.files)

    @property
    def kept(self) -> int:
        """Rows found, with each source under the cap."""
        return sum(self._capped(source.rows) for source in self.sources)

    @property
    def published_kept(self) -> int:
        """Published rows under the cap: an upper bound, because the sizes of a collection's files are unknown."""
        files = (self.entry.published_files or 1) if self.entry.each_file else 1
        return self._capped(self.entry.published_rows or 0, files)


def divided(rows: int, languages: Sequence[str], pair: bool) -> Counter[str]:
    """Divide rows among languages without reading them; ``pair``: two languages are the sides of a bitext."""
    if len(languages) == 1 and rows:
        return Counter({languages[0]: rows})
    if len(languages) == 2 and pair:
        return Counter({languages[0]: rows - rows // 2, languages[1]: rows // 2})
    return Counter({SEVERAL: rows} if rows else {})


@dataclass(frozen=True)
class Survey:
    """What a manifest would read."""

    title: str  # the manifest, the stage and the folder
    collections: list[CollectionSurvey]
    unclaimed: list[str]  # parquet files in the folder that no entry names
    unreachable: str | None  # why the folder cannot be listed


def survey(
    manifest_path: Path | str, data_dir: Path | str | None = None, stage: str | None = None, reach: bool = True
) -> Survey:
    """Find out which data of a manifest is there, reading no more than the footer of each file.

    Missing, unreadable and unreachable files are part of the result, not errors. ``data_dir`` is the folder or address
    to look in, instead of the manifest's. Without ``reach``, the survey shows what the manifest says.
    """
    manifest = read_manifest(manifest_path, data_dir)
    entries = manifest.of_stage(stage)
    unreachable, found, unclaimed = None, {}, []
    if reach:
        try:
            # Files of the other stages' entries are claimed, too.
            found = {entry.name: find_entry_files(manifest, entry) for entry in manifest.entries}
            claimed = {str(file) for files in found.values() for each in files.values() for file in each}
            unclaimed = [str(file) for file in manifest.folder.find("**/*.parquet") if str(file) not in claimed]
        except UserError as error:
            found, unreachable = {}, str(error)
    collections = []
    for entry in tqdm(entries, desc="survey", unit="source", disable=None if found else True):
        files = found.get(entry.name, {pattern: [] for pattern in entry.files})
        collections.append(_collection(entry, manifest.cap_of(entry, stage), files))
    title = f"{manifest.path}{f', stage {stage}' if stage else ''}, in {manifest.folder}"
    return Survey(title, collections, unclaimed, unreachable)


def _collection(entry: Entry, cap: int | None, found: dict[str, list[SourceFile]]) -> CollectionSurvey:
    each = list(dict.fromkeys(file for files in found.values() for file in files))
    missing = [pattern for pattern, files in found.items() if not files]
    if not missing and entry.published_files is not None and len(each) < entry.published_files:
        missing = [f"{entry.published_files - len(each)} of {entry.published_files} files"]
    readable, faults = [], []
    for file in each:
        languages = file_languages(entry, file) if entry.each_file else entry.languages
        try:
            opened = PublishedFile(file, task_type=entry.task_type)
            about = (opened.num_rows, len(opened.negatives), languages, "lang" in opened.schema.names)
            readable.append(FileSurvey(str(file), *about))
        except UserError as error:
            faults.append(str(error))
    return CollectionSurvey(entry, cap, readable, missing, faults)


def report(found: Survey) -> str:
    """Lay out a survey as text: sources, tasks, the languages with most rows, missing and unclaimed files."""
    collections, sources, tasks = found.collections, [], []
    for each in collections:
        entry, counts = each.entry, (each.rows, each.kept, each.entry.published_rows or 0)
        languages = ", ".join(entry.languages) if len(entry.languages) < 3 else str(len(entry.languages))
        negatives = sorted({file.negatives for file in each.files})
        files = f"{len(each.files)}/{entry.published_files}" if entry.published_files else len(each.files)
        sources.append((entry.name, entry.task_type, languages, files, ", ".join(map(str, negatives)), *counts))
        tasks.append((entry.category or entry.task_type, *counts))
    totals = map(sum, list(zip(*tasks, strict=True))[1:])
    sources.append(("total", "", "", sum(len(each.files) for each in collections), "", *totals))
    missing = [f"{each.entry.name}: {reason}" for each in collections for reason in (*each.missing, *each.faults)]
    if not any(each.files or each.faults for each in collections):
        missing = [f"none of the {len(collections)} sources was found: download them, or give another data folder"]
    parts = [
        f"{found.title}: {found.unreachable}" if found.unreachable else found.title,
        text_table(["source", "task", "lang", "files", "neg", "rows", "capped", "published"], sources, text_columns=3),
        _counts("task", tasks),
        _counts("language", _by_language(collections)),
        "\n  ".join(["missing or unreadable:", *missing] if missing else ["nothing is missing"]),
    ]
    if found.unclaimed:
        parts.append("\n  ".join([f"{len(found.unclaimed)} files that no source claims:", *found.unclaimed]))
    return "\n\n".join(parts) + "\n"


def _by_language(collections: Iterable[CollectionSurvey]) -> Iterator[tuple[str, int, int, int]]:
    for each in collections:
        for source in each.sources:
            kept = divided(source.kept, source.languages, each.entry.each_file)
            for language, rows in divided(source.rows, source.languages, each.entry.each_file).items():
                yield language, rows, kept[language], 0
        for language, rows in divided(each.entry.published_rows or 0, each.entry.languages, pair=False).items():
            yield language, 0, 0, rows


def _counts(kind: str, counted: Iterable[tuple[str, int, int, int]]) -> str:
    """Return a table of rows found, under the caps and published, with the largest kinds first."""
    frame = pd.DataFrame(counted, columns=[kind, "rows", "capped", "published"]).groupby(kind, as_index=False).sum()
    frame = frame.sort_values(["rows", "published", kind], ascending=[False, False, True]).replace(SEVERAL, "several")
    more = f"\n… and {len(frame) - _SHOWN} more" if len(frame) > _SHOWN else ""
    return text_table(list(frame), frame[:_SHOWN].values.tolist(), text_columns=1) + more
