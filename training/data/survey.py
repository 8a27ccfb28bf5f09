"""What a manifest would read: files, rows and missing data, from the files' metadata alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from training.common.errors import UserError
from training.common.languages import SEVERAL
from training.data.manifest import file_languages, find_entry_files
from training.data.manifest_file import Entry, Manifest, PublishedShares, read_manifest
from training.data.published import PublishedFile
from training.data.storage import SourceFile


@dataclass(frozen=True)
class FileSurvey:
    """One file that is there.

    Attributes:
        name: Its path or address.
        rows: Its rows.
        negatives: Its negative columns.
        languages: ISO 639-3 codes; two are the two sides of a bitext.
        tells_language: Whether it has a column ``lang``, the language of each row.
    """

    name: str
    rows: int
    negatives: int
    languages: list[str]
    tells_language: bool = False


@dataclass(frozen=True)
class SourceSurvey:
    """One source: an entry, or one file of a collection.

    Attributes:
        files: Its files that are there.
        kept: Their rows under the cap.
        languages: ISO 639-3 codes.
    """

    files: list[FileSurvey]
    kept: int
    languages: list[str]


@dataclass(frozen=True)
class CollectionSurvey:
    """One entry of the manifest: what it says, and what is there of it.

    Attributes:
        entry: As the manifest has it.
        cap: Rows used at most of each of its sources.
        files: The files that were found and can be read.
        missing: Patterns, or a number of files, that were not found.
        faults: Why files that were found cannot be read.
    """

    entry: Entry
    cap: int | None
    files: list[FileSurvey]
    missing: list[str]
    faults: list[str]

    @property
    def rows(self) -> int:
        """Rows of all files found."""
        return sum(file.rows for file in self.files)

    @property
    def kept(self) -> int:
        """Rows found, each source under the cap."""
        return sum(source.kept for source in self.sources)

    @property
    def published_kept(self) -> int:
        """Rows under the cap as published: at most, since the sizes of a collection's files are not."""
        rows, count = self.entry.published_rows or 0, self.entry.published_files or 1
        return rows if self.cap is None else min(rows, self.cap * (count if self.entry.each_file else 1))

    def rows_by_language(self, capped: bool = False) -> Counter[str]:
        """Rows found by language; a pair of languages takes half each."""
        counts: Counter[str] = Counter()
        if capped:
            pairs = [(source.kept, source.languages) for source in self.sources]
        else:
            pairs = [(file.rows, file.languages) for file in self.files]
        for rows, languages in pairs:
            counts += divided(rows, languages, pair=self.entry.each_file)
        return counts

    def published_by_language(self) -> Counter[str]:
        """Published rows by language, as far as the manifest tells."""
        return divided(self.entry.published_rows or 0, self.entry.languages, pair=False)

    @property
    def sources(self) -> list[SourceSurvey]:
        """Its sources: each file of a collection, else all files together."""
        if self.entry.each_file:
            each = [([file], file.languages) for file in self.files]
        else:
            each = [(self.files, self.entry.languages)]
        return [SourceSurvey(files, self._capped(files), languages) for files, languages in each]

    def _capped(self, files: Sequence[FileSurvey]) -> int:
        rows = sum(file.rows for file in files)
        return rows if self.cap is None else min(rows, self.cap)


def divided(rows: int, languages: Sequence[str], pair: bool) -> Counter[str]:
    """Rows by language, without looking at them.

    Args:
        rows: The rows.
        languages: Their languages.
        pair: Whether two languages are the two sides of a bitext, which take half each.
    """
    if len(languages) == 1 and rows:
        return Counter({languages[0]: rows})
    if len(languages) == 2 and pair:
        return Counter({languages[0]: rows - rows // 2, languages[1]: rows // 2})
    return Counter({SEVERAL: rows} if rows else {})


@dataclass(frozen=True)
class Survey:
    """What a manifest would read.

    Attributes:
        manifest: Path of the manifest.
        folder: Where the files were looked for.
        stage: The stage asked for; None for all data.
        collections: Its entries in order.
        unclaimed: Parquet files in the folder that no entry names.
        unreachable: Why the folder could not be looked into; None if it could.
        published_shares: What the data's paper counts, if the manifest says so.
    """

    manifest: str
    folder: str
    stage: str | None
    collections: list[CollectionSurvey]
    unclaimed: list[str]
    unreachable: str | None
    published_shares: PublishedShares | None

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
        """The entries of which something is missing or cannot be read."""
        return [each for each in self.collections if each.missing or each.faults]


def survey(
    manifest_path: Path | str, data_dir: Path | str | None = None, stage: str | None = None, reach: bool = True
) -> Survey:
    """Looks what of a manifest's data is there, reading no more than the footer of each file, one file at a time.

    Args:
        manifest_path: The manifest.
        data_dir: Folder or address to look in, instead of the manifest's ``root`` or own folder.
        stage: Survey the sources of this stage, under its cap.
        reach: Look for the files at all; without it, the survey shows what the manifest says.

    Raises:
        UserError: If the manifest is faulty or no source names the stage. Missing, unreadable and unreachable files
            are what the survey reports.
    """
    manifest = read_manifest(manifest_path, data_dir)
    entries = manifest.of_stage(stage)
    unreachable, found, claimed = None, {}, set()
    if reach:
        try:
            # The entries of other stages claim their files, too.
            every = {entry.name: find_entry_files(manifest, entry) for entry in manifest.entries}
            found = {entry.name: every[entry.name] for entry in entries}
            claimed = {str(file) for files in every.values() for each in files.values() for file in each}
        except UserError as error:
            unreachable = str(error)
    looked = reach and unreachable is None
    there = manifest.folder.find("**/*.parquet") if looked else []
    bar = tqdm(entries, desc="survey", unit="source", disable=None if found else True)
    return Survey(
        manifest=str(manifest.path),
        folder=str(manifest.folder),
        stage=stage,
        collections=[_collection(manifest, entry, stage, found.get(entry.name)) for entry in bar],
        unclaimed=[str(file) for file in there if str(file) not in claimed],
        unreachable=unreachable,
        published_shares=manifest.published_shares,
    )


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
    files, faults = _read_footers(entry, each)
    return CollectionSurvey(entry, cap, files, missing, faults)


def _read_footers(entry: Entry, files: Iterable[SourceFile]) -> tuple[list[FileSurvey], list[str]]:
    readable, faults = [], []
    for file in files:
        try:
            published = PublishedFile(file)
        except UserError as error:
            faults.append(str(error))
            continue
        languages = file_languages(entry, file) if entry.each_file else entry.languages
        tells = "lang" in published.schema.names
        readable.append(FileSurvey(str(file), published.num_rows, len(published.negatives), languages, tells))
    return readable, faults
