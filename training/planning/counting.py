"""The batches of an epoch: counted where the prepared data is at hand, else estimated from the sizes of the sources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.config.arguments import StageArguments
from training.data.prepared import PreparedSource
from training.models.layout import lay_out
from training.planning.data_sizes import SourceSizes
from training.trainer.collator import PackedCollator, PreparedRows
from training.trainer.sampler import GlobalBatchSampler

# Batches whose texts are counted; an epoch's tokens are estimated from them.
_SAMPLE = 256


@dataclass(frozen=True)
class Batches:
    """The batches of one epoch.

    Attributes:
        count: Number of batches.
        tokens: Tokens of a batch on average, each distinct text once.
        texts: Distinct texts of a batch on average.
        chunks: Forward passes of a batch on each process on average.
        most_texts: Distinct texts of the largest batch seen.
        most_chunk_tokens: Tokens of the largest chunk seen.
        squared_tokens: Sum over a batch's distinct texts of their tokens, squared, on average.
        repeated_tokens: Tokens of a batch that are encoded twice on average: those of all chunks but the last.
    """

    count: int = 0
    tokens: float = 0.0
    texts: float = 0.0
    chunks: float = 0.0
    most_texts: int = 0
    most_chunk_tokens: int = 0
    squared_tokens: float = 0.0
    repeated_tokens: float = 0.0


def count_batches(args: StageArguments, sources: Sequence[PreparedSource], split: str) -> Batches:
    """Counts the texts and tokens of an epoch's batches, from a sample of them spread over the epoch."""
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
    layouts = [lay_out(each, 0, args.world_size, args.max_tokens_per_forward) for each in lengths]
    chunk_tokens = [
        [int(each[chunk].sum()) for chunk in layout.chunks] for each, layout in zip(lengths, layouts, strict=True)
    ]
    # The first process stands for all: their shares differ by less than one text.
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
    """Estimates an epoch's batches: every text distinct and of ``planned_text_tokens``, ``max_length`` at most.

    Distinct texts are fewer where rows share texts, so tokens are rather too many; operations of attention rather too
    few, since texts differ in length.

    Args:
        args: The stage.
        sizes: Rows of its sources.
        share: Share of the rows that belong to the split, such as ``validation_share``.
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
