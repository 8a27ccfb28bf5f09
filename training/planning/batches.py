"""Rows and batches of an epoch: counted in prepared data, else estimated from manifest and file sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import islice
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
    missing = sum(not all(find_entry_files(manifest, entry).values()) for entry in entries)
    return f"{manifest.folder} lacks files of {missing} of {len(entries)} entries" if missing else None


def estimated_sizes(args: StageArguments) -> list[SourceSizes]:
    """Estimate the sizes of the stage's sources without fetching anything.

    If all files of an entry are local, their rows are counted. Otherwise ``published_rows`` is used, divided evenly
    among the files of a collection. A cap removes more rows from files of different sizes: if the manifest states the
    ``stage_rows``, the capped collections are scaled down to that total.
    """
    manifest = read_manifest(args.manifest, args.data_dir)
    local = isinstance(manifest.folder.root, Path)
    found = survey(args.manifest, args.data_dir, args.manifest_stage, reach=local).collections
    total, scale = manifest.stage_rows.get(args.manifest_stage), 1.0
    uncertain = sum(each.published_kept for each in found if _is_uncertain(each))
    if total is not None and uncertain:
        certain = sum(each.published_kept for each in found if not _is_uncertain(each))
        scale = min(max((total - certain) / uncertain, 0.0), 1.0)
    # Names of a collection's sources are not known: those of its entry stand for them here.
    stand_ins = [Source(each.entry.name, [], each.entry.task_type, "") for each in found]
    kept = {source.name for source in select_sources(stand_ins, None, args.task_types)}
    sizes = [_sizes(args, each, scale) for each in found if each.entry.name in kept]
    if not any(each.rows for each in sizes):
        raise UserError(f"{args.manifest}: no source fits {args.sources!r} in 'sources'; see the names in the manifest")
    return [each for each in sizes if each.rows]


def _is_uncertain(found: CollectionSurvey) -> bool:
    """Return whether the rows under the cap depend on the unknown sizes of a collection's files."""
    return found.entry.each_file and found.cap is not None and found.entry.published_rows is not None


def _sizes(args: StageArguments, found: CollectionSurvey, scale: float) -> SourceSizes:
    entry, patterns = found.entry, args.sources or ["*"]
    caps = [cap for cap in (found.cap, args.cap_of(entry.name)) if cap is not None]
    capped = replace(found, cap=min(caps, default=None))
    whole = bool(found.files) and not found.missing and not found.faults
    if whole and entry.each_file:
        fitting = [file for file in found.files if _fits(Path(file.name).stem, patterns)]
        rows = [float(replace(capped, files=[file]).kept) for file in fitting]
    elif whole:
        rows = [float(capped.kept)] * _fits(entry.name, patterns)
    else:
        number = (entry.published_files or 1) if entry.each_file else 1
        selected = _number_selected(entry, patterns, number)
        if selected and entry.published_rows is None:
            raise UserError(
                f"{args.manifest}: source {entry.name!r}: its files are missing here and it has no 'published_rows' to "
                "estimate from; download or build the files, or add the number"
            )
        factor = scale if _is_uncertain(found) else 1.0
        rows = [min(capped.published_kept, found.published_kept * factor) / number] * selected
    return SourceSizes(entry.name, entry.task_type, rows, published=not whole)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _number_selected(entry: Entry, patterns: Sequence[str], number: int) -> int:
    """Return how many of an entry's sources, whose names may be unknown, the patterns can select."""
    stems = [Path(file).stem for file in entry.files] if entry.each_file else [entry.name]
    # A pattern that covers the entry's own, such as `webfaq_*`, selects all files; a name that fits it, one file.
    if any(_fits(stem, patterns) for stem in stems):
        return number
    return min(number, sum(_fits(pattern, stems) for pattern in patterns)) if entry.each_file else 0


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
    batches = []
    for keys in islice(sampler, 0, None, every):
        lengths = collator.text_lengths([dataset[key] for key in keys])
        # Process 0 stands for all: their shares differ by less than one text.
        layout = lay_out(lengths, 0, args.world_size, args.max_tokens_per_forward)
        chunks = [int(lengths[chunk].sum()) for chunk in layout.chunks]
        squared, repeated = (lengths.astype(float) ** 2).sum(), lengths.sum() * (sum(chunks[:-1]) / sum(chunks))
        batches.append((lengths.sum(), len(lengths), len(chunks), max(chunks), squared, repeated))
    tokens, texts, chunks, most_tokens, squared, repeated = np.array(batches, dtype=float).T
    return Batches(
        count=len(sampler),
        tokens=float(tokens.mean()),
        texts=float(texts.mean()),
        chunks=float(chunks.mean()),
        most_texts=int(texts.max()),
        most_chunk_tokens=int(most_tokens.max()),
        squared_tokens=float(squared.mean()),
        repeated_tokens=float(repeated.mean()),
    )


def estimate_batches(args: StageArguments, sizes: Sequence[SourceSizes], share: float) -> Batches:
    """Estimate an epoch's batches of a ``share`` of the rows, such as ``validation_share``.

    Every text is taken as distinct, with ``planned_text_tokens`` (at most ``max_length``) tokens. Rows that share texts
    make the estimate of tokens too high; texts of different lengths make that of attention too low.
    """
    length = min(args.planned_text_tokens, args.max_length)
    # Batches of each source, and texts of each of them.
    counts, texts = [], []
    for each in sizes:
        columns = 2 + args.num_hard_negatives[each.task_type]
        for rows in each.rows:
            counts.append(math.ceil(rows * share / args.global_batch_size))
            texts.append(columns * rows * share / max(counts[-1], 1))
    if not sum(counts):
        return Batches()
    texts = np.array(texts)
    of_process, budget = texts / args.world_size, args.max_tokens_per_forward
    # A chunk holds whole texts.
    chunks = np.ones(len(texts)) if budget is None else np.maximum(np.ceil(of_process / (budget // length)), 1)

    def mean(values: np.ndarray) -> float:
        return float(np.average(values, weights=counts))

    return Batches(
        count=sum(counts),
        tokens=mean(texts * length),
        texts=mean(texts),
        chunks=mean(chunks),
        most_texts=math.ceil(texts.max()),
        most_chunk_tokens=math.ceil((of_process * length / chunks).max()),
        squared_tokens=mean(texts * length**2),
        repeated_tokens=mean(texts * length * (1 - 1 / chunks)),
    )
