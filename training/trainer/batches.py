"""Global batches: the order of rows, and rows of one source → a batch of distinct texts, divided over processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from training.common.keyed import keyed_bits, keyed_order
from training.config.arguments import StageArguments
from training.data.prepared import PreparedSource
from training.distillation.teacher_cache import TeacherCache
from training.models.encoding import lay_out

_ROW_ORDER, _BATCH_ORDER, _NEGATIVES, _POSITIVE = 11, 12, 21, 22
# Sources that a line can name.
_MOST_SHOWN = 8


class RowKey(NamedTuple):
    """Identifies a row in one pass over its source; its random draws use this key."""

    epoch: int  # number of the pass, which is the epoch's unless sources are weighted
    source: int
    row: int


@dataclass(eq=False)
class RowKeys(Sequence[RowKey]):
    """The keys of a batch, each made when it is read: a resumed epoch passes over tens of thousands of batches."""

    epoch: int
    source: int
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> RowKey:
        return RowKey(self.epoch, self.source, int(self.rows[index]))


def epoch_batches(
    rows: Sequence[float], global_batch_size: int, weights: Sequence[float] | None = None, temperature: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ``(s,)`` batches of a pass over each source, and ``(s,)`` how many of them a mean epoch takes.

    An epoch takes a share ``p`` of its rows from each source, at least one batch, where ``p`` is proportional to
    ``weight * rows ** (1 / temperature)``: the sampling of languages of Conneau et al. (2020, XLM-R), with an alpha of
    1 / temperature. The sum is whole. With equal weights and a temperature of 1 an epoch takes every row once.
    """
    rows = np.asarray(rows, dtype=float)
    weights = np.ones(len(rows)) if weights is None else np.asarray(weights, dtype=float)
    counts = np.ceil(rows / global_batch_size).astype(int)
    # Scaled to at most 1, so that no power overflows.
    parts = weights / weights.max() * (rows / max(rows.max(), 1)) ** (1 / temperature)
    passes = parts * rows.sum() / (np.maximum(rows, 1) * max(parts.sum(), np.finfo(float).tiny))
    # Rounded, so that what is whole stays so.
    shares = np.where(counts > 0, np.maximum(np.round(counts * passes, 6), 1), 0.0)
    total = round(shares.sum(), 6)
    return counts, shares * (np.ceil(total) / max(total, 1))


class GlobalBatchSampler(Sampler[Sequence[RowKey]]):
    """Yields the rows of each global batch, the same on every process.

    A pass over a source visits each of its rows once: they are shuffled and cut into as few batches of at most
    ``global_batch_size`` as hold them, equal in size to within one row (a rest of a few rows would have few in-batch
    negatives). A source's passes follow one another without end; each epoch takes the next batches of every source, on
    average as many as :func:`epoch_batches` says, and shuffles them together. The order of a pass depends on seed,
    source and its number only, that of an epoch on seed and epoch. Without weights and temperature, an epoch is a pass
    over all rows.
    """

    def __init__(
        self,
        rows_per_source: Sequence[int],
        global_batch_size: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.rows_per_source, self.seed, self.epoch = list(rows_per_source), seed, 0
        counts, self.shares = epoch_batches(rows_per_source, global_batch_size, weights, temperature)
        # Batches of a pass over each source.
        self.counts: list[int] = counts.tolist()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return round(self.shares.sum())

    def _taken(self) -> np.ndarray:
        """Return the ``(epochs, s)`` batches of each epoch until this one: shares are rounded up or down in turn.

        Systematic sampling: lined up, the fractions of all shares cover a whole length, and a batch goes to each that
        holds one of the points start, start + 1 … The starts of epochs are multiples of the golden ratio, modulo 1.
        """
        starts = np.arange(self.epoch + 1)[:, None] * ((5**0.5 - 1) / 2) % 1
        ends = np.round(np.cumsum(self.shares % 1), 6)
        return np.floor(self.shares).astype(int) + np.diff(np.floor(ends + starts), axis=1, prepend=0).astype(int)

    def __iter__(self) -> Iterator[Sequence[RowKey]]:
        *earlier, taken = self._taken()
        before = np.sum(earlier, axis=0, dtype=int) if earlier else np.zeros_like(taken)
        sources = np.repeat(np.arange(len(taken)), taken)
        # Of each batch: how many its source has given before it, in all epochs.
        numbers = np.arange(len(sources)) + (before - np.cumsum(taken) + taken)[sources]
        # Made when the first batch of a pass is due.
        order = cache(
            lambda turn, source: keyed_order(self.rows_per_source[source], self.seed, _ROW_ORDER, turn, source)
        )
        for index in keyed_order(len(sources), self.seed, _BATCH_ORDER, self.epoch):
            source = int(sources[index])
            rows, count = self.rows_per_source[source], self.counts[source]
            turn, number = divmod(int(numbers[index]), count)
            yield RowKeys(turn, source, order(turn, source)[number * rows // count : (number + 1) * rows // count])


def batch_sampler(args: StageArguments, sources: Sequence[PreparedSource], split: str = "train") -> GlobalBatchSampler:
    """Return the order of a split's batches; validation takes every row once, whatever its source's weight."""
    mixing = ([source.weight for source in sources], args.source_temperature) if split == "train" else ()
    return GlobalBatchSampler(
        [len(source.rows[split]) for source in sources], args.global_batch_size, args.seed, *mixing
    )


def epoch_line(sampler: GlobalBatchSampler, names: Sequence[str]) -> str | None:
    """Return what an epoch takes of each source, in one line; None if it takes every row once."""
    if sampler.shares.tolist() == sampler.counts:
        return None
    visits = zip(names, sampler.shares.tolist(), sampler.counts, strict=True)
    passes = sorted(((share / count, name, share) for name, share, count in visits if count), reverse=True)
    shown = passes if len(passes) <= _MOST_SHOWN else [passes[0], passes[-1]]
    each = [f"{name} {round(share, 1):,.9g} ({turns:.3g} passes over its rows)" for turns, name, share in shown]
    of_each = ", ".join(each) if shown is passes else f"from {each[0]} down to {each[1]}"
    return f"an epoch is {len(sampler):,} batches of {len(passes):,} sources: {of_each}"


class Row(NamedTuple):
    """A row and its key; ``positions`` are those of the prepared source's row, ``score`` that of pair or documents."""

    key: RowKey
    positions: np.ndarray
    score: np.ndarray | None = None


class PreparedRows(Dataset[Row]):
    """The rows of one split of prepared sources, by their keys."""

    def __init__(self, sources: Sequence[PreparedSource], split: str = "train") -> None:
        self.sources, self.split = list(sources), split

    def __len__(self) -> int:
        return sum(len(source.rows[self.split]) for source in self.sources)

    def __getitem__(self, key: RowKey) -> Row:
        source = self.sources[key.source]
        score = np.asarray(source.scores[self.split][key.row]) if source.scores else None
        return Row(key, np.asarray(source.rows[self.split][key.row]), score)


def _own_forms(source: PreparedSource, positions: np.ndarray) -> np.ndarray | None:
    """Return ``(b, p)`` forms of all positives of rows; None if each has one, of which no document is known."""
    if source.num_positives == 1 and not source.has_ids:
        return None
    own = source.positives(positions)
    # The passage again in place of a missing one.
    return source.forms(np.where(own < 0, own[:, :1], own))


def _drawn_scores(rows: Sequence[Row], texts: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return ``(b, c)`` scores of the ``(b, c)`` drawn documents, given as indices into texts, -1 for a missing one."""
    documents, scores = (np.stack(each) for each in zip(*((row.positions[1:], row.score) for row in rows), strict=True))
    place = (texts[drawn][:, :, None] == documents[:, None]).argmax(axis=2)
    return np.where(drawn < 0, np.float32(np.nan), np.take_along_axis(scores, place, axis=1))


class PackedCollator:
    """Draws positive and hard negatives of each row and packs this process's share of the batch's distinct texts.

    The negatives of a row are drawn by (seed, epoch, source, row) alone: ``num_hard_negatives`` by task type, or all of
    a row that has no more. Of a row's positives each epoch trains one, in turn. Every process is given all rows of the
    global batch and reads the tokens of its own texts only: each distinct text is encoded once, by one process.

    A batch is a dict of

    - ``input_ids``: ``(1, T)``, this process's texts end to end, chunk by chunk, shortest first;
    - ``chunk_lengths``, ``slots`` and ``max_rows_per_rank``: see :class:`~training.models.encoding.BatchLayout`;
    - ``query``, ``positive``: ``(b,)``, and ``negatives``: ``(b, k)``, all rows of the batch as indices into the texts,
      -1 for a negative that a row does not have;
    - ``forms``: ``(n,)``, equal for texts that differ in spelling only or are of one document, where the source knows;
    - ``own_forms``: ``(b, p)``, forms of all positives of a row, if the source has several or knows documents;
    - ``scores``: ``(b,)`` float32, of graded pairs;
    - ``candidate_scores``: ``(b, 1 + k)`` float32, those of positive and negatives that the data has, else NaN;
    - ``own_texts``: positions of this process's texts among the source's, in the order of ``input_ids``;
    - ``teacher``: ``(n, teacher_width)`` float16, if there is a cache;
    - ``tokens``: tokens of all ``n`` distinct texts;
    - ``rows``: ``b`` numbers of the rows within their split of the source;
    - ``source`` and ``task_type``: names.
    """

    def __init__(
        self,
        sources: Sequence[PreparedSource],
        num_hard_negatives: Mapping[str, int],
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_tokens_per_forward: int | None = None,
        teacher_cache: TeacherCache | None = None,
        teacher_width: int = 0,
    ) -> None:
        self.sources = list(sources)
        # By source.
        self._drawn = [min(num_hard_negatives.get(each.task_type, 0), each.num_negatives) for each in sources]
        self._seed, self._layout = seed, (rank, world_size, max_tokens_per_forward)
        self._teacher_cache, self._teacher_width = teacher_cache, teacher_width

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Build this process's part of the batch; all rows must be of one source."""
        source = self.sources[rows[0].key.source]
        texts, lengths, index = self._distinct_texts(rows)
        layout = lay_out(lengths, *self._layout)
        own = np.concatenate([texts[chunk] for chunk in layout.chunks])
        tokens = np.concatenate([source.tokens(text) for text in own])
        batch = {
            "input_ids": torch.from_numpy(tokens.astype(np.int64))[None],
            **layout.of_batch(lengths),
            **{"query": index[:, 0], "positive": index[:, 1], "negatives": index[:, 2:]},
            "forms": torch.from_numpy(source.forms(texts).astype(np.int64)),
            **{"own_texts": own.tolist(), "tokens": int(lengths.sum()), "rows": [row.key.row for row in rows]},
            **{"source": source.name, "task_type": source.task_type},
        }
        if rows[0].score is not None and source.task_type == "similarity":
            batch["scores"] = torch.from_numpy(np.stack([row.score for row in rows]))
        elif rows[0].score is not None:
            batch["candidate_scores"] = torch.from_numpy(_drawn_scores(rows, texts, index[:, 1:].numpy()))
        if (own := _own_forms(source, np.stack([row.positions for row in rows]))) is not None:
            batch["own_forms"] = torch.from_numpy(own.astype(np.int64))
        # Of the whole batch on every process: reading is cheaper than gathering.
        if self._teacher_cache is not None:
            batch["teacher"] = torch.from_numpy(self._teacher_cache.read(source.name, texts, self._teacher_width))
        return batch

    def text_lengths(self, rows: Sequence[Row]) -> np.ndarray:
        """Return the ``(n,)`` token counts of the batch's distinct texts, ascending, without reading a token."""
        return self._distinct_texts(rows)[1]

    def _distinct_texts(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """Return the ``n`` texts of some rows, shortest first, their lengths, and ``(b, 2 + k)`` indices into them."""
        positions = np.stack([row.positions for row in rows]).astype(np.int64)
        keys, source = [row.key for row in rows], self.sources[rows[0].key.source]
        positive = self._draw_positive(keys, source.positives(positions))
        negatives = source.negatives(positions)
        if (own := _own_forms(source, positions)) is not None:
            # What is known of documents by other rows, too.
            same = source.forms(np.maximum(negatives, 0))[:, :, None] == own[:, None]
            negatives = np.where(same.any(axis=2), -1, negatives)
        negatives = self._draw_negatives(keys, negatives)
        positions = np.concatenate([positions[:, :1], positive, negatives], axis=1)
        texts, index = np.unique(positions, return_inverse=True)
        # Without the position of missing negatives, which is the least, their index becomes -1.
        missing = int(texts[0] < 0)
        texts, index = texts[missing:], index - missing
        lengths = source.lengths(texts)
        order = np.argsort(lengths, kind="stable")
        rank = np.full(len(order) + 1, -1)
        rank[order] = np.arange(len(order))
        return texts[order], lengths[order], torch.from_numpy(rank[index].reshape(len(rows), -1))

    def _draw_positive(self, keys: Sequence[RowKey], positives: np.ndarray) -> np.ndarray:
        """``(b, p)`` positions, -1 where a row has none → ``(b, 1)``: all of a row in turn, epoch by epoch."""
        if positives.shape[1] == 1:
            return positives
        epoch, source, row = np.array(keys, dtype=np.int64).T
        count = (positives >= 0).sum(axis=1)
        start = keyed_bits(self._seed, _POSITIVE, source, row) % count.astype(np.uint64)
        turn = (start.astype(np.int64) + epoch) % count
        there = np.argsort(positives < 0, axis=1, kind="stable")
        return np.take_along_axis(positives, np.take_along_axis(there, turn[:, None], axis=1), axis=1)

    def _draw_negatives(self, keys: Sequence[RowKey], negatives: np.ndarray) -> np.ndarray:
        """``(b, n)`` positions, -1 where a row has none → ``(b, k)`` drawn without replacement, -1 last."""
        epoch, source, row = np.array(keys, dtype=np.int64).T[:, :, None]
        draws = keyed_bits(self._seed, _NEGATIVES, epoch, source, row, np.arange(negatives.shape[1]))
        draws = np.where(negatives >= 0, draws, np.iinfo(np.uint64).max)
        chosen = np.argsort(draws, axis=1, kind="stable")[:, : self._drawn[keys[0].source]]
        return np.take_along_axis(negatives, chosen, axis=1)
