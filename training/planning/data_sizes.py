"""How many rows a stage has where its data is not all there: as its manifest says, or as the files that are show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from training.common.errors import UserError
from training.config.arguments import StageArguments
from training.data.manifest import Source, find_entry_files, select_sources
from training.data.manifest_file import Entry, read_manifest
from training.data.survey import CollectionSurvey, survey


@dataclass(frozen=True)
class SourceSizes:
    """The sources of one entry of a manifest.

    Attributes:
        name: The entry's name.
        task_type: That of all its sources.
        rows: Rows of each source, under the caps.
        published: Whether they are those that the manifest says were published, not counted ones.
    """

    name: str
    task_type: str
    rows: list[float]
    published: bool


def why_not_at_hand(args: StageArguments) -> str | None:
    """Why the stage's data cannot be prepared on this machine without fetching it; None if it can.

    No remote folder is listed. What a builder makes is at hand, since it can be made.

    Raises:
        UserError: If the manifest is missing or faulty.
    """
    if args.manifest is None or args.builder is not None:
        return None
    manifest = read_manifest(args.manifest, args.data_dir)
    if not isinstance(manifest.folder.root, Path):
        return f"{manifest.folder} is remote"
    entries = manifest.of_stage(args.manifest_stage)
    missing = [entry for entry in entries if not all(find_entry_files(manifest, entry).values())]
    if not missing:
        return None
    return f"{manifest.folder} lacks files of {len(missing)} of {len(entries)} entries"


def estimated_sizes(args: StageArguments) -> list[SourceSizes]:
    """The sizes of the stage's sources, without fetching anything.

    Where all files of an entry are there, their rows count. Otherwise its ``published_rows`` do; those of a collection
    are taken to be spread evenly over its files. Caps take away more of files of different sizes, so where the manifest
    says how many ``stage_rows`` there are, capped collections are scaled to make up that number.

    Raises:
        UserError: If the manifest is faulty, the stage selects nothing, or an entry has neither files nor
            ``published_rows``.
    """
    manifest = read_manifest(args.manifest, args.data_dir)
    found = survey(args.manifest, args.data_dir, args.manifest_stage, reach=isinstance(manifest.folder.root, Path))
    shrinkage = _shrinkage(found.collections, manifest.stage_rows.get(args.manifest_stage))
    # The type is checked and selected as in the training, the names by what a collection's may become.
    stand_ins = [Source(each.entry.name, [], each.entry.task_type, "") for each in found.collections]
    kept = {source.name for source in select_sources(stand_ins, None, args.task_types)}
    sizes = [_sizes(args, each, shrinkage) for each in found.collections if each.entry.name in kept]
    if not any(each.rows for each in sizes):
        raise UserError(f"{args.manifest}: no source fits {args.sources!r} in 'sources'; see the names in the manifest")
    return [each for each in sizes if each.rows]


def _shrinkage(collections: Sequence[CollectionSurvey], stage_rows: int | None) -> float:
    """What capped collections are multiplied with, so that the stage has the rows that were published."""
    uncertain = sum(each.published_kept for each in collections if _is_uncertain(each))
    certain = sum(each.published_kept for each in collections if not _is_uncertain(each))
    if stage_rows is None or not uncertain:
        return 1.0
    return min(max((stage_rows - certain) / uncertain, 0.0), 1.0)


def _is_uncertain(found: CollectionSurvey) -> bool:
    """Whether the cap takes away more than can be told without knowing the sizes of a collection's files."""
    return found.entry.each_file and found.cap is not None and found.entry.published_rows is not None


def _is_whole(found: CollectionSurvey) -> bool:
    return bool(found.files) and not found.missing and not found.faults


def _sizes(args: StageArguments, found: CollectionSurvey, shrinkage: float) -> SourceSizes:
    entry = found.entry
    caps = [cap for cap in (found.cap, args.cap_of(entry.name)) if cap is not None]
    capped = replace(found, cap=min(caps, default=None))
    whole = _is_whole(found)
    if whole and entry.each_file:
        fitting = [file for file in found.files if _fits(Path(file.name).stem, args.sources)]
        rows = [float(replace(capped, files=[file]).kept) for file in fitting]
    elif whole:
        rows = [float(capped.kept)] * _fits(entry.name, args.sources)
    else:
        number = (entry.published_files or 1) if entry.each_file else 1
        selected = _number_selected(entry, args.sources, number)
        if selected and entry.published_rows is None:
            raise UserError(
                f"{args.manifest}: source {entry.name!r}: its files are not at hand and it says no 'published_rows' to "
                "estimate from; download or build the files, or add the number"
            )
        factor = shrinkage if _is_uncertain(found) else 1.0
        rows = [min(capped.published_kept, found.published_kept * factor) / number] * selected
    return SourceSizes(entry.name, entry.task_type, rows, published=not whole)


def _fits(name: str, patterns: Sequence[str] | None) -> bool:
    return not patterns or any(fnmatch(name, pattern) for pattern in patterns)


def _number_selected(entry: Entry, patterns: Sequence[str] | None, number: int) -> int:
    """How many of a collection's sources, whose names are not known, some patterns may mean."""
    if not entry.each_file:
        return number if _fits(entry.name, patterns) else 0
    stems = [Path(file).stem for file in entry.files]
    # A pattern that covers the entry's own, such as `webfaq_*`, means all files; a name that fits it, one file.
    if any(_fits(stem, patterns) for stem in stems):
        return number
    return min(number, sum(any(fnmatch(pattern, stem) for stem in stems) for pattern in patterns or []))
