"""Rows and batches of an epoch: counted in prepared data, else estimated from manifest and file sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from training.common.errors import UserError
from training.config.arguments import StageArguments
from training.data.manifest import Entry, Source, find_entry_files, read_manifest, select_sources
from training.data.prepared import PreparedSource
from training.data.survey import CollectionSurvey, survey
from training.models.encoding import lay_out
from training.trainer.batches import GlobalBatchSampler, PackedCollator, PreparedRows

# Batches whose tokens are counted, spread over an epoch.
_SAMPLE = 256


# Rows


@dataclass(frozen=True)
class SourceSizes:
    """The sources of one entry of a manifest."""

    name: str
    task_type: str
    rows: list[float]  # of each source, under the caps
    published: bool  # from the manifest's published_rows, not counted


def why_not_local(args: StageArguments) -> str | None:
    """Return why the stage's data cannot be prepared without fetching it, or None if it can.

    Remote folders are not listed. A builder can make its data.
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
    """Estimate the sizes of the stage's sources without fetching anything.

    If all files of an entry are local, their rows are counted. Otherwise ``published_rows`` is used, divided evenly
    among the files of a collection. A cap removes more rows from files of different sizes: if the manifest states the
    ``stage_rows``, the capped collections are scaled down to that total.
    """
    manifest = read_manifest(args.manifest, args.data_dir)
    found = survey(args.manifest, args.data_dir, args.manifest_stage, reach=isinstance(manifest.folder.root, Path))
    scale = _scale(found.collections, manifest.stage_rows.get(args.manifest_stage))
    # Names of a collection's sources are not known: those of its entry stand for them here.
    stand_ins = [Source(each.entry.name, [], each.entry.task_type, "") for each in found.collections]
    kept = {source.name for source in select_sources(stand_ins, None, args.task_types)}
    sizes = [_sizes(args, each, scale) for each in found.collections if each.entry.name in kept]
    if not any(each.rows for each in sizes):
        raise UserError(f"{args.manifest}: no source fits {args.sources!r} in 'sources'; see the names in the manifest")
    return [each for each in sizes if each.rows]


def _scale(collections: Sequence[CollectionSurvey], stage_rows: int | None) -> float:
    """Return the factor of capped collections that gives the published rows of the stage."""
    uncertain = sum(each.published_kept for each in collections if _is_uncertain(each))
    certain = sum(each.published_kept for each in collections if not _is_uncertain(each))
    if stage_rows is None or not uncertain:
        return 1.0
    return min(max((stage_rows - certain) / uncertain, 0.0), 1.0)


def _is_uncertain(found: CollectionSurvey) -> bool:
    """Return whether the rows under the cap depend on the unknown sizes of a collection's files."""
    return found.entry.each_file and found.cap is not None and found.entry.published_rows is not None


def _sizes(args: StageArguments, found: CollectionSurvey, scale: float) -> SourceSizes:
    entry = found.entry
    caps = [cap for cap in (found.cap, args.cap_of(entry.name)) if cap is not None]
    capped = replace(found, cap=min(caps, default=None))
    whole = bool(found.files) and not found.missing and not found.faults
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
                f"{args.manifest}: source {entry.name!r}: its files are missing here and it has no 'published_rows' to "
                "estimate from; download or build the files, or add the number"
            )
        factor = scale if _is_uncertain(found) else 1.0
        rows = [min(capped.published_kept, found.published_kept * factor) / number] * selected
    return SourceSizes(entry.name, entry.task_type, rows, published=not whole)


def _fits(name: str, patterns: Sequence[str] | None) -> bool:
    return not patterns or any(fnmatch(name, pattern) for pattern in patterns)


def _number_selected(entry: Entry, patterns: Sequence[str] | None, number: int) -> int:
    """Return how many of an entry's sources, whose names may be unknown, the patterns can select."""
    if not entry.each_file:
        return number if _fits(entry.name, patterns) else 0
    stems = [Path(file).stem for file in entry.files]
    # A pattern that covers the entry's own, such as `webfaq_*`, selects all files; a name that fits it, one file.
    if any(_fits(stem, patterns) for stem in stems):
        return number
    return min(number, sum(any(fnmatch(pattern, stem) for stem in stems) for pattern in patterns or []))


# Batches


@dataclass(frozen=True)
class Batches:
    """The batches of one epoch: averages over batches, in which each distinct text counts once."""

    count: int = 0  # batches
    tokens: float = 0.0
    texts: float = 0.0
    chunks: float = 0.0  # forward passes on each process
    most_texts: int = 0  # of the largest batch
    most_chunk_tokens: int = 0  # of the largest chunk
    squared_tokens: float = 0.0  # sum of the squared lengths of texts
    repeated_tokens: float = 0.0  # tokens that are encoded twice: those of all chunks but the last


def count_batches(args: StageArguments, sources: Sequence[PreparedSource], split: str) -> Batches:
    """Count an epoch's batches, and the texts and tokens of a sample of them."""
    rows = [len(source.rows[split]) for source in sources]
    if not sum(rows):
        return Batches()
    sampler = GlobalBatchSampler(rows, args.global_batch_size, args.seed)
    collator = PackedCollator(sources, args.num_hard_negatives, args.seed)
    dataset = PreparedRows(sources, split)
    every = max(len(sampler) // _SAMPLE, 1)
    lengths = [
        collator.text_lengths([dataset[key] for key in keys]) for i, keys in enumerate(sampler) if i % every == 0
    ]
    # Process 0 stands for all: their shares differ by less than one text.
    layouts = [lay_out(each, 0, args.world_size, args.max_tokens_per_forward) for each in lengths]
    chunk_tokens = [
        [int(each[chunk].sum()) for chunk in layout.chunks] for each, layout in zip(lengths, layouts, strict=True)
    ]
    repeated = [sum(chunks[:-1]) / sum(chunks) for chunks in chunk_tokens]
    return Batches(
        count=len(sampler),
        tokens=float(np.mean([each.sum() for each in lengths])),
        texts=float(np.mean([len(each) for each in lengths])),
        chunks=float(np.mean([len(layout.chunks) for layout in layouts])),
        most_texts=max(len(each) for each in lengths),
        most_chunk_tokens=max(max(chunks) for chunks in chunk_tokens),
        squared_tokens=float(np.mean([(each.astype(float) ** 2).sum() for each in lengths])),
        repeated_tokens=float(np.mean([each.sum() * share for each, share in zip(lengths, repeated, strict=True)])),
    )


def estimate_batches(args: StageArguments, sizes: Sequence[SourceSizes], share: float) -> Batches:
    """Estimate an epoch's batches of a ``share`` of the rows, such as ``validation_share``.

    Every text is taken as distinct, with ``planned_text_tokens`` (at most ``max_length``) tokens. Rows that share texts
    make the estimate of tokens too high; texts of different lengths make that of attention too low.
    """
    length = min(args.planned_text_tokens, args.max_length)
    columns = {task_type: 2 + count for task_type, count in args.num_hard_negatives.items()}
    # Batches of each source, and texts of each of them.
    counts, texts = [], []
    for each in sizes:
        for rows in each.rows:
            kept = rows * share
            counts.append(math.ceil(kept / args.global_batch_size))
            texts.append(columns[each.task_type] * kept / counts[-1] if counts[-1] else 0.0)
    if not sum(counts):
        return Batches()
    weights, texts = np.array(counts), np.array(texts)
    of_process, budget = texts / args.world_size, args.max_tokens_per_forward
    # A chunk holds whole texts.
    chunks = np.ones(len(texts)) if budget is None else np.maximum(np.ceil(of_process / (budget // length)), 1)

    def mean(values: np.ndarray) -> float:
        return float(np.average(values, weights=weights))

    return Batches(
        count=int(weights.sum()),
        tokens=mean(texts * length),
        texts=mean(texts),
        chunks=mean(chunks),
        most_texts=math.ceil(texts.max()),
        most_chunk_tokens=math.ceil((of_process * length / chunks).max()),
        squared_tokens=mean(texts * length**2),
        repeated_tokens=mean(texts * length * (1 - 1 / chunks)),
    )
