"""Survey of a manifest: files, rows and missing data, from the metadata of the files, and tables of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from training.common.errors import UserError
from training.common.languages import SEVERAL
from training.data.manifest import Entry, Manifest, file_languages, find_entry_files, read_manifest
from training.data.published import PublishedFile
from training.data.storage import SourceFile


@dataclass(frozen=True)
class FileSurvey:
    """One file that was found."""

    name: str  # path or address
    rows: int
    negatives: int  # number of negative columns
    languages: list[str]  # ISO 639-3 codes; two are the two sides of a bitext
    tells_language: bool  # whether it has a column "lang"


@dataclass(frozen=True)
class SourceSurvey:
    """One source: an entry, or one file of a collection."""

    files: list[FileSurvey]
    rows: int
    kept: int  # rows under the cap
    languages: list[str]


@dataclass(frozen=True)
class CollectionSurvey:
    """One entry of the manifest."""

    entry: Entry
    cap: int | None  # maximum rows of each of its sources
    files: list[FileSurvey]  # those that were found and can be read
    missing: list[str]  # patterns, or a number of files, that were not found
    faults: list[str]  # why some of the files found cannot be read

    @property
    def sources(self) -> list[SourceSurvey]:
        """Its sources: each file of a collection, or all files together."""
        groups = [([file], file.languages) for file in self.files]
        if not self.entry.each_file:
            groups = [(self.files, self.entry.languages)]
        counted = [(files, sum(file.rows for file in files), languages) for files, languages in groups]
        return [SourceSurvey(files, rows, self._capped(rows), languages) for files, rows, languages in counted]

    def _capped(self, rows: int, sources: int = 1) -> int:
        return rows if self.cap is None else min(rows, self.cap * sources)

    @property
    def rows(self) -> int:
        """Rows of all files found."""
        return sum(file.rows for file in self.files)

    @property
    def kept(self) -> int:
        """Rows found, with each source under the cap."""
        return sum(source.kept for source in self.sources)

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

    title: str  # the manifest and the stage
    folder: str
    collections: list[CollectionSurvey]
    unclaimed: list[str]  # parquet files in the folder that no entry names
    unreachable: str | None  # why the folder cannot be listed

    @property
    def rows(self) -> int:
        """Rows found."""
        return sum(each.rows for each in self.collections)

    @property
    def kept(self) -> int:
        """Rows found, under the caps."""
        return sum(each.kept for each in self.collections)

    @property
    def published_rows(self) -> int:
        """Rows that the manifest says were published."""
        return sum(each.entry.published_rows or 0 for each in self.collections)

    @property
    def missing(self) -> list[CollectionSurvey]:
        """The entries with files that are missing or cannot be read."""
        return [each for each in self.collections if each.missing or each.faults]


def survey(
    manifest_path: Path | str, data_dir: Path | str | None = None, stage: str | None = None, reach: bool = True
) -> Survey:
    """Find out which data of a manifest is there, reading no more than the footer of each file.

    Missing, unreadable and unreachable files are part of the result, not errors.

    Args:
        manifest_path: The manifest.
        data_dir: Folder or address to look in, instead of the manifest's ``root`` or folder.
        stage: Survey only the sources of this stage, under its caps.
        reach: Look for the files; without it, the survey shows what the manifest says.
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
            unreachable = str(error)
    bar = tqdm(entries, desc="survey", unit="source", disable=None if found else True)
    collections = [_collection(manifest, entry, stage, found.get(entry.name)) for entry in bar]
    title = f"{manifest.path}, stage {stage}" if stage else str(manifest.path)
    return Survey(title, str(manifest.folder), collections, unclaimed, unreachable)


def _collection(
    manifest: Manifest, entry: Entry, stage: str | None, found: dict[str, list[SourceFile]] | None
) -> CollectionSurvey:
    cap = manifest.cap_of(entry, stage)
    if found is None:
        return CollectionSurvey(entry, cap, [], list(entry.files), [])
    each = list(dict.fromkeys(file for files in found.values() for file in files))
    missing = [pattern for pattern, files in found.items() if not files]
    if not missing and entry.published_files is not None and len(each) < entry.published_files:
        missing = [f"{entry.published_files - len(each)} of {entry.published_files} files"]
    readable, faults = [], []
    for file in each:
        try:
            published = PublishedFile(file)
        except UserError as error:
            faults.append(str(error))
            continue
        languages = file_languages(entry, file) if entry.each_file else entry.languages
        has_lang = "lang" in published.schema.names
        readable.append(FileSurvey(str(file), published.num_rows, len(published.negatives), languages, has_lang))
    return CollectionSurvey(entry, cap, readable, missing, faults)


def report(survey: Survey, languages: int = 20) -> str:
    """Lay out a survey as text: sources, tasks, the ``languages`` with most rows, missing and unclaimed files."""
    each_file = sum(len(each.files) for each in survey.collections)
    head = (
        f"{survey.title}: {len(survey.collections)} sources and collections, "
        f"{survey.published_rows:,} rows as published\n"
        f"{survey.folder}: {each_file} files found, {survey.rows:,} rows, {survey.kept:,} under the caps"
    )
    if survey.unreachable:
        head += f"\nnot looked into: {survey.unreachable}"
    tasks = [
        (each.entry.category or each.entry.task_type, each.rows, each.kept, each.entry.published_rows or 0)
        for each in survey.collections
    ]
    parts = [
        head,
        _sources(survey, each_file),
        _counts("task", tasks),
        _counts("language", _by_language(survey), languages),
        _missing(survey),
    ]
    if survey.unclaimed:
        parts.append("\n  ".join([f"{len(survey.unclaimed)} files that no source claims:", *survey.unclaimed]))
    return "\n\n".join(parts) + "\n"


def _sources(survey: Survey, each_file: int) -> str:
    rows: list[Sequence[str | int | None]] = []
    for each in survey.collections:
        entry, negatives = each.entry, sorted({file.negatives for file in each.files})
        rows.append(
            (
                entry.name,
                entry.task_type,
                entry.category,
                ", ".join(entry.languages) if len(entry.languages) < 3 else len(entry.languages),
                f"{len(each.files)}/{entry.published_files}" if entry.published_files else len(each.files),
                "–".join(str(count) for count in dict.fromkeys((negatives[0], negatives[-1]))) if negatives else None,
                each.rows if each.files else "missing",
                each.kept if each.files else None,
                entry.published_rows,
                each.published_kept if entry.published_rows else None,
            )
        )
    most = sum(each.published_kept for each in survey.collections)
    rows.append(("total", None, None, None, each_file, None, survey.rows, survey.kept, survey.published_rows, most))
    # The last column is a bound: the caps are of a collection's files, whose published sizes are unknown.
    head = ["source", "task", "category", "lang", "files", "neg", "rows", "capped", "published", "capped ≤"]
    width = 10 if any(each.cap is not None for each in survey.collections) else 9
    return _table(head[:width], [row[:width] for row in rows], left=4)


def _by_language(survey: Survey) -> Iterator[tuple[str, int, int, int]]:
    for each in survey.collections:
        for source in each.sources:
            kept = divided(source.kept, source.languages, each.entry.each_file)
            for language, rows in divided(source.rows, source.languages, each.entry.each_file).items():
                yield language, rows, kept[language], 0
        for language, rows in divided(each.entry.published_rows or 0, each.entry.languages, pair=False).items():
            yield language, 0, 0, rows


def _counts(kind: str, counted: Iterable[tuple[str, int, int, int]], shown: int | None = None) -> str:
    """Return a table of rows found, under the caps and published, with the largest kinds first."""
    frame = pd.DataFrame(counted, columns=[kind, "rows", "capped", "published"]).groupby(kind, as_index=False).sum()
    frame = frame.sort_values(["rows", "published", kind], ascending=[False, False, True]).replace(SEVERAL, "several")
    more = len(frame) - len(frame[:shown])
    return _table(list(frame), frame[:shown].values.tolist()) + f"\n… and {more} more {kind}s" * (more > 0)


def _missing(survey: Survey) -> str:
    count = len(survey.collections)
    if not any(each.files or each.faults for each in survey.collections):
        return f"none of the {count} sources was found: download them, or give another data folder"
    if not survey.missing:
        return "nothing is missing"
    lines = [f"missing or unreadable, {len(survey.missing)} of {count} sources:"]
    for each in survey.missing:
        reasons = [", ".join(each.missing), *each.faults] if each.missing else each.faults
        lines += [f"{each.entry.name}: {reason}" for reason in reasons]
    return "\n  ".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str | int | None]], left: int = 1) -> str:
    """Lay out the columns that are not empty: the first ``left`` are text, the others numbers."""
    cells = [["" if v is None else f"{v:,}" if isinstance(v, int) else v for v in row] for row in (head, *rows)]
    columns = []
    for number, column in enumerate(zip(*cells, strict=True)):
        if any(column[1:]):
            width = max(map(len, column))
            aligned = [cell.ljust(width) if number < left else cell.rjust(width) for cell in column]
            columns.append([aligned[0], "─" * width, *aligned[1:]])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
