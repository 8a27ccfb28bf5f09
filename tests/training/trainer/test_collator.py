"""Packed batches: each distinct text once, indices that lead back to every row, and negatives drawn by key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch

from training.data.prepared import PreparedSource
from training.trainer.collator import PackedCollator, PreparedRows, Row
from training.trainer.sampler import RowKey

Refuses = Callable[..., AbstractContextManager[None]]
Text = tuple[int, ...]


def lengths_of(batch: dict[str, Any]) -> list[int]:
    return [length for chunk in batch["chunk_lengths"] for length in chunk]


def texts_of(batch: dict[str, Any]) -> list[Text]:
    """The token ids of the batch's texts."""
    (tokens,) = batch["input_ids"]
    return [tuple(text.tolist()) for text in tokens.split(lengths_of(batch))]


def stored(source: PreparedSource) -> dict[Text, int]:
    """Token ids → position; the examples have no two texts of the same tokens."""
    positions = {tuple(source.tokens(text).tolist()): text for text in range(source.description["texts"])}
    assert len(positions) == source.description["texts"]
    return positions


def rows_of(batch: dict[str, Any], source: PreparedSource) -> np.ndarray:
    """``(b, 2 + k)`` positions of query, positive and negatives among the source's texts."""
    positions = np.array([stored(source)[text] for text in texts_of(batch)])
    index = torch.cat([batch["query"][:, None], batch["positive"][:, None], batch["negatives"]], dim=1)
    return positions[index.numpy()]


def take(sources: list[PreparedSource], source: int, rows: list[int], epoch: int = 0) -> list[Row]:
    dataset = PreparedRows(sources)
    return [dataset[RowKey(epoch, source, row)] for row in rows]


@pytest.fixture
def collator(prepared_sources: list[PreparedSource], num_hard_negatives: dict[str, int]) -> PackedCollator:
    return PackedCollator(prepared_sources, num_hard_negatives, seed=7)


@pytest.mark.parametrize("source", [0, 1, 2])
def test_batch_holds_the_texts_of_its_rows(
    collator: PackedCollator, prepared_sources: list[PreparedSource], source: int
) -> None:
    wanted = prepared_sources[source]
    order = [11, 3, 5, 0, 12, 9]
    batch = collator(take(prepared_sources, source, order))
    rows = rows_of(batch, wanted)
    assert (batch["source"], batch["task_type"]) == (wanted.name, wanted.task_type)
    published = wanted.rows["train"][order]
    assert rows[:, :2].tolist() == published[:, :2].tolist()
    assert rows.shape == (6, 2 + collator.num_hard_negatives[wanted.task_type])
    for row, all_of_row in zip(rows, published, strict=True):
        assert set(row[2:]) <= set(all_of_row[2:]) - {-1}


def test_shapes_and_types(collator: PackedCollator, prepared_sources: list[PreparedSource]) -> None:
    batch = collator(take(prepared_sources, 1, [0, 1, 2]))
    lengths = lengths_of(batch)
    assert batch["input_ids"].shape == (1, sum(lengths))
    assert all(type(length) is int for length in lengths)
    assert batch["query"].shape == batch["positive"].shape == (3,)
    assert batch["negatives"].shape == (3, 3)
    for name in ("input_ids", "query", "positive", "negatives"):
        assert batch[name].dtype == torch.int64
    for name in ("query", "positive", "negatives"):
        assert 0 <= batch[name].min()
        assert batch[name].max() < len(lengths)


def test_distinct_texts_are_packed_once_and_shortest_first(
    collator: PackedCollator, prepared_sources: list[PreparedSource]
) -> None:
    # Rows 61 apart share their passage, rows in general some negatives.
    rows = take(prepared_sources, 0, list(range(80)))
    batch = collator(rows)
    texts = texts_of(batch)
    assert len(set(texts)) == len(texts) < batch["query"].numel() * 4
    used = torch.cat([batch["query"], batch["positive"], batch["negatives"].flatten()])
    assert set(used.tolist()) == set(range(len(texts)))
    assert lengths_of(batch) == sorted(len(text) for text in texts)
    assert all(text[-1] == texts[0][-1] for text in texts)  # EOS


def test_text_in_several_roles_is_packed_once(prepared_sources: list[PreparedSource]) -> None:
    collator = PackedCollator(prepared_sources, {"retrieval": 2, "clustering": 3, "classification": 1})
    positions = np.array([4, 4, 4, 5, -1, -1, -1])
    batch = collator([Row(RowKey(0, 0, row), positions) for row in (0, 1)])
    assert len(lengths_of(batch)) == 2
    assert rows_of(batch, prepared_sources[0])[:, :2].tolist() == [[4, 4], [4, 4]]
    assert {tuple(sorted(row)) for row in rows_of(batch, prepared_sources[0])[:, 2:].tolist()} == {(4, 5)}


def test_one_row(collator: PackedCollator, prepared_sources: list[PreparedSource]) -> None:
    batch = collator(take(prepared_sources, 2, [6]))
    assert rows_of(batch, prepared_sources[2]).tolist() == prepared_sources[2].rows["train"][[6]].tolist()


# Negatives


def drawn(collator: PackedCollator, rows: list[Row]) -> list[list[int]]:
    """Positions of the negatives, in the order of their draw."""
    return rows_of(collator(rows), collator.sources[rows[0].key.source])[:, 2:].tolist()


def numbered(keys: list[RowKey], negatives: list[int]) -> list[Row]:
    """Rows of one and the same texts under different keys."""
    return [Row(key, np.array([0, 1, *negatives])) for key in keys]


def test_draw_does_not_depend_on_the_batch(
    collator: PackedCollator, prepared_sources: list[PreparedSource], num_hard_negatives: dict[str, int]
) -> None:
    together = drawn(collator, take(prepared_sources, 1, list(range(20))))
    assert drawn(collator, take(prepared_sources, 1, list(range(20))[::-1])) == together[::-1]
    again = PackedCollator(prepared_sources, num_hard_negatives, seed=7)
    for row in range(20):
        assert drawn(again, take(prepared_sources, 1, [row])) == [together[row]]


def test_draw_differs_between_rows_epochs_and_seeds(
    collator: PackedCollator, prepared_sources: list[PreparedSource], num_hard_negatives: dict[str, int]
) -> None:
    negatives = list(range(2, 8))
    first = drawn(collator, numbered([RowKey(0, 1, row) for row in range(200)], negatives))
    # 6 · 5 · 4 = 120 ordered draws: about 1 row in 120 draws the same again.
    assert len(set(map(tuple, first))) > 80
    other_epoch = drawn(collator, numbered([RowKey(1, 1, row) for row in range(200)], negatives))
    other_seed = PackedCollator(prepared_sources, num_hard_negatives, seed=8)
    for other in (other_epoch, drawn(other_seed, numbered([RowKey(0, 1, row) for row in range(200)], negatives))):
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 10


def test_draw_is_without_replacement_and_even_over_columns(collator: PackedCollator) -> None:
    negatives = list(range(2, 8))
    draws = drawn(collator, numbered([RowKey(0, 1, row) for row in range(3000)], negatives))
    assert all(len(set(row)) == 3 for row in draws)
    for place in range(3):
        counts = Counter(row[place] for row in draws)
        assert set(counts) == set(negatives)
        # 500 expected, standard deviation 20.
        assert all(400 < count < 600 for count in counts.values())
    pairs = Counter(frozenset(row[:2]) for row in draws)
    assert len(pairs) == 15
    assert all(130 < count < 270 for count in pairs.values())  # 200 expected, standard deviation 14


def test_missing_negatives_are_never_drawn_and_the_rest_evenly(collator: PackedCollator) -> None:
    draws = drawn(collator, numbered([RowKey(0, 1, row) for row in range(2000)], [-1, 3, 4, -1, 6, 7]))
    counts = Counter(position for row in draws for position in row)
    assert set(counts) == {3, 4, 6, 7}
    assert all(len(set(row)) == 3 for row in draws)
    assert all(1400 < count < 1600 for count in counts.values())  # 1500 expected, standard deviation 19


def test_row_with_just_enough_negatives_draws_all(collator: PackedCollator) -> None:
    draws = drawn(collator, numbered([RowKey(0, 1, row) for row in range(50)], [-1, 3, -1, -1, 6, 7]))
    assert {tuple(sorted(row)) for row in draws} == {(3, 6, 7)}


def test_prepared_rows_with_fewer_columns_draw_from_their_own(
    collator: PackedCollator, prepared_sources: list[PreparedSource]
) -> None:
    # The first source's files have 2 and 5 negatives.
    rows = prepared_sources[0].rows["train"]
    short = [number for number, row in enumerate(rows) if (row == -1).any()]
    assert 0 < len(short) < len(rows)
    draws = drawn(collator, take(prepared_sources, 0, short))
    assert [sorted(row) for row in draws] == np.sort(rows[short, 2:4], axis=1).tolist()


def test_zero_negatives(prepared_sources: list[PreparedSource], num_hard_negatives: dict[str, int]) -> None:
    collator = PackedCollator(prepared_sources, {**num_hard_negatives, "retrieval": 0})
    batch = collator(take(prepared_sources, 0, [0, 1, 2]))
    assert batch["negatives"].shape == (3, 0)
    assert batch["negatives"].dtype == torch.int64
    published = prepared_sources[0].rows["train"][:3, :2]
    assert rows_of(batch, prepared_sources[0]).tolist() == published.tolist()
    assert len(lengths_of(batch)) == len(np.unique(published))


def test_too_few_negatives(
    prepared_sources: list[PreparedSource], num_hard_negatives: dict[str, int], refuses: Refuses
) -> None:
    with refuses(prepared_sources[1].folder, "6 negatives", "7", "num_hard_negatives_clustering"):
        PackedCollator(prepared_sources, {**num_hard_negatives, "clustering": 7})


# Many processes


@pytest.mark.parametrize("max_tokens", [None, 60])
@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
@pytest.mark.parametrize("row_count", [1, 17])
def test_processes_together_encode_each_text_of_the_batch_once(
    prepared_sources: list[PreparedSource],
    num_hard_negatives: dict[str, int],
    row_count: int,
    world_size: int,
    max_tokens: int | None,
) -> None:
    for source in range(3):
        rows = take(prepared_sources, source, list(range(row_count))[:15])
        whole = PackedCollator(prepared_sources, num_hard_negatives, 7)(rows)
        parts = [
            PackedCollator(prepared_sources, num_hard_negatives, 7, rank, world_size, max_tokens)(rows)
            for rank in range(world_size)
        ]
        gathered: list[Text | None] = []
        for part in parts:
            for name in ("query", "positive", "negatives", "slots"):
                assert torch.equal(part[name], parts[0][name])
            assert part["rows"] == whole["rows"]
            assert len(part["chunk_lengths"]) == len(parts[0]["chunk_lengths"])
            assert all(len(chunk) == 1 or sum(chunk) <= (max_tokens or 10**9) for chunk in part["chunk_lengths"])
            own = texts_of(part)
            gathered += [*own, *[None] * (part["width"] - len(own))]
        # Slots lead to the texts of the batch, in the order that the indices mean.
        assert [gathered[slot] for slot in parts[0]["slots"]] == texts_of(whole)
        for name in ("query", "positive", "negatives"):
            assert torch.equal(parts[0][name], whole[name])
        # What is encoded besides is the shortest text, where a process has a chunk too few.
        spare = [text for slot, text in enumerate(gathered) if text and slot not in set(parts[0]["slots"].tolist())]
        assert set(spare) <= {texts_of(whole)[0]}
