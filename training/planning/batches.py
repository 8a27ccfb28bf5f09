"""Rows and batches of an epoch: counted in prepared data, else estimated from manifest and file sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.common.errors import UserError
from training.config.arguments import StageArguments
from training.data.manifest import TASK_TYPES, find_entry_files, read_manifest, select_sources
from training.data.prepared import PreparedSource
from training.data.survey import CollectionSurvey, survey
from training.models.encoding import lay_out
from training.trainer.batches import PackedCollator, PreparedRows, batch_sampler, epoch_batches

# Batches whose tokens are counted, spread over an epoch.
_SAMPLE = 256


class SourceSizes(NamedTuple):
    """The sources of one entry of a manifest, and the rows of each of them under the caps."""

    name: str
    task_type: str
    rows: list[float]
    weight: float = 1


def why_not_local(args: StageArguments) -> str | None:
    """Return why the stage's data cannot be prepared without fetching it; remote folders are not listed."""
    for name in (args.miner or args.model, args.reranker) if args.mine and not args.prunes else ():
        if name is not None and not Path(name).exists():
            return f"{name}, which mines its hard negatives, is not on this machine"
    # A builder can make its data.
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
        certain = sum(each.published_kept for each in found) - uncertain
        scale = min(max((total - certain) / uncertain, 0.0), 1.0)
    kept = {entry.name for entry in select_sources([each.entry for each in found], None, args.task_types)}
    sizes = [
        SourceSizes(entry.name, entry.task_type, _rows(args, each, scale if _is_uncertain(each) else 1.0), entry.weight)
        for each in found
        if (entry := each.entry).name in kept
    ]
    if not any(each.rows for each in sizes):
        raise UserError(f"{args.manifest}: no source fits {args.sources!r} in 'sources'; see the names in the manifest")
    return [each for each in sizes if each.rows]


def _is_uncertain(found: CollectionSurvey) -> bool:
    """Return whether the rows under the cap depend on the unknown sizes of a collection's files."""
    return found.entry.each_file and found.cap is not None and found.entry.published_rows is not None


def _rows(args: StageArguments, found: CollectionSurvey, scale: float) -> list[float]:
    """Return the rows of each of an entry's sources that the stage selects, under all caps."""
    entry, patterns = found.entry, args.sources or ["*"]
    caps = [cap for cap in (found.cap, args.cap_of(entry.name)) if cap is not None]
    capped = replace(found, cap=min(caps, default=None))
    if found.files and not found.missing and not found.faults:
        names = [Path(file.name).stem for file in found.files] if entry.each_file else [entry.name]
        rows = [float(source.kept) for source in capped.sources]
        return [each for name, each in zip(names, rows, strict=True) if _fits(name, patterns)]
    number = (entry.published_files or 1) if entry.each_file else 1
    selected = number
    # A pattern that covers the entry's own, such as `webfaq_*`, selects all files; a name that fits it, one file.
    stems = [Path(file).stem for file in entry.files] if entry.each_file else [entry.name]
    if not any(_fits(stem, patterns) for stem in stems):
        selected = min(number, sum(_fits(pattern, stems) for pattern in patterns)) if entry.each_file else 0
    if selected and entry.published_rows is None:
        raise UserError(
            f"{args.manifest}: source {entry.name!r}: its files are missing here and it has no 'published_rows' to "
            "estimate from; download or build the files, or add the number"
        )
    return [min(capped.published_kept, found.published_kept * scale) / number] * selected


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


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


def count_batches(args: StageArguments, sources: Sequence[PreparedSource], split: str, processes: int = 1) -> Batches:
    """Count an epoch's batches, and the texts and tokens of a sample of them."""
    sampler = batch_sampler(args, sources, split)
    if not len(sampler):
        return Batches()
    collator = PackedCollator(sources, args.num_hard_negatives, args.seed)
    dataset = PreparedRows(sources, split)
    facts = []
    for keys in islice(sampler, 0, None, max(len(sampler) // _SAMPLE, 1)):
        lengths = collator.text_lengths([dataset[key] for key in keys])
        # Process 0 stands for all: their shares differ by less than one text.
        layout = lay_out(lengths, 0, processes, args.max_tokens_per_forward)
        chunks = [int(lengths[chunk].sum()) for chunk in layout.chunks]
        tokens, squared = lengths.sum(), (lengths.astype(float) ** 2).sum()
        repeated = tokens * (sum(chunks[:-1]) / sum(chunks))
        facts.append((tokens, len(lengths), len(chunks), max(chunks), squared, repeated))
    return _average(len(sampler), np.array(facts, dtype=float).T)


def estimate_batches(args: StageArguments, sizes: Sequence[SourceSizes], split: str, processes: int = 1) -> Batches:
    """Estimate an epoch's batches of a split.

    Every text is taken as distinct, with ``planned_text_tokens`` (at most ``max_length``) tokens. Rows that share texts
    make the estimate of tokens too high; texts of different lengths make that of attention too low.
    """
    length, budget = min(args.planned_text_tokens, args.max_length), args.max_tokens_per_forward
    share = 1 - args.validation_share if split == "train" else args.validation_share
    columns = {task_type: 2 + args.num_hard_negatives.get(task_type, 0) for task_type in TASK_TYPES}
    described = [(columns[each.task_type], rows * share, each.weight) for each in sizes for rows in each.rows]
    cells, rows, weights = np.array(described).T
    mixing = (weights, args.source_temperature) if split == "train" else ()
    counts, shares = epoch_batches(rows, args.global_batch_size, *mixing)
    if not shares.any():
        return Batches()
    texts = cells * rows / np.maximum(counts, 1)
    of_process = texts / processes
    # A chunk holds whole texts.
    chunks = np.ones(len(texts)) if budget is None else np.maximum(np.ceil(of_process / (budget // length)), 1)
    tokens = texts * length
    facts = (tokens, texts, chunks, of_process * length / chunks, tokens * length, tokens * (1 - 1 / chunks))
    return _average(round(shares.sum()), np.array(facts), shares)


def _average(count: int, facts: np.ndarray, weights: np.ndarray | None = None) -> Batches:
    """Sum up ``(6, n)`` facts: tokens, texts, chunks, tokens of the largest chunk, squared and repeated tokens."""
    tokens, texts, chunks, _, squared, repeated = np.average(facts, axis=1, weights=weights).tolist()
    most_texts, most_chunk_tokens = np.ceil(facts[[1, 3]].max(axis=1)).astype(int).tolist()
    return Batches(count, tokens, texts, chunks, most_texts, most_chunk_tokens, squared, repeated)
