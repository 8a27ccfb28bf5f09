"""Global batches: each row once, one source a batch, and a resumed order is the order's tail."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from accelerate import skip_first_batches

from training.data.prepared import PreparedSource
from training.trainer.collator import PackedCollator, PreparedRows
from training.trainer.sampler import GlobalBatchSampler, RowKey
from training.trainer.trainer import _EpochLoader

ROWS = [100, 7, 0, 1, 33]


def batches(sampler: GlobalBatchSampler, epoch: int = 0) -> list[list[RowKey]]:
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("rows", [[1], [64], [65], [63, 128], ROWS])
@pytest.mark.parametrize("global_batch_size", [1, 8, 64, 1000])
@pytest.mark.parametrize("epoch", [0, 3])
def test_epoch_visits_every_row_once_in_even_batches_of_one_source(
    rows: list[int], global_batch_size: int, epoch: int
) -> None:
    sampler = GlobalBatchSampler(rows, global_batch_size, seed=5)
    order = batches(sampler, epoch)
    assert sorted(key for batch in order for key in batch) == [
        (epoch, source, row) for source, count in enumerate(rows) for row in range(count)
    ]
    assert all(len({key.source for key in batch}) == 1 for batch in order)
    for source, count in enumerate(rows):
        sizes = [len(batch) for batch in order if batch[0].source == source]
        assert len(sizes) == math.ceil(count / global_batch_size)
        assert not sizes or max(sizes) <= min(global_batch_size, min(sizes) + 1)
    assert len(order) == len(sampler)


def test_keys_are_plain_integers() -> None:
    for key in batches(GlobalBatchSampler([5, 5], 3))[0]:
        assert isinstance(key, RowKey)
        assert [type(part) for part in key] == [int, int, int]


def test_order_is_repeated_for_the_same_seed_and_epoch() -> None:
    assert batches(GlobalBatchSampler(ROWS, 8, seed=1), 2) == batches(GlobalBatchSampler(ROWS, 8, seed=1), 2)
    sampler = GlobalBatchSampler(ROWS, 8, seed=1)
    first = batches(sampler, 2)
    batches(sampler, 3)
    torch.manual_seed(9)
    assert batches(sampler, 2) == first


@pytest.mark.parametrize(("seed", "epoch"), [(1, 0), (0, 1)])
def test_order_differs_between_seeds_and_epochs(seed: int, epoch: int) -> None:
    one = batches(GlobalBatchSampler([200, 200], 10))
    other = batches(GlobalBatchSampler([200, 200], 10, seed=seed), epoch)
    # Neither the order of the sources, nor the rows that meet in a batch, nor the order of the rows.
    assert [batch[0].source for batch in one] != [batch[0].source for batch in other]
    rows = [{frozenset(key[1:] for key in batch) for batch in order} for order in (one, other)]
    assert not rows[0] & rows[1]
    assert sum(a[1:] == b[1:] for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)) < 20


def test_sources_of_one_size_have_orders_of_their_own() -> None:
    order = batches(GlobalBatchSampler([200, 200], 200))
    assert [key.row for key in order[0]] != [key.row for key in order[1]]


def test_rows_are_shuffled_over_the_whole_source() -> None:
    order = batches(GlobalBatchSampler([10_000], 500))
    for batch in order:
        in_first_half = sum(key.row < 5000 for key in batch)
        assert 250 - 5 * math.sqrt(125) < in_first_half < 250 + 5 * math.sqrt(125)


@pytest.mark.parametrize("epoch", [0, 1])
def test_sources_are_spread_over_the_epoch_in_proportion(epoch: int) -> None:
    rows = [40_000, 10_000, 4_000]
    sources = [batch[0].source for batch in batches(GlobalBatchSampler(rows, 20), epoch)]
    counts = Counter(sources)
    assert counts == {0: 2000, 1: 500, 2: 200}
    quarter = len(sources) // 4
    for start in range(0, 4 * quarter, quarter):
        part = Counter(sources[start : start + quarter])
        for source, count in counts.items():
            assert abs(part[source] - count / 4) < 4 * math.sqrt(count * 3 / 16)


@pytest.mark.parametrize("rows", [[], [0], [0, 0]])
def test_no_rows_is_an_error(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="no source has a training row"):
        GlobalBatchSampler(rows, 4)


# Through the loader


def loader(
    sources: list[PreparedSource], num_hard_negatives: dict[str, int], workers: int, **kwargs: Any
) -> _EpochLoader:
    sampler = GlobalBatchSampler([len(source.rows["train"]) for source in sources], 8, seed=2)
    collator = PackedCollator(sources, num_hard_negatives, seed=2)
    rows = PreparedRows(sources)
    return _EpochLoader(rows, batch_sampler=sampler, collate_fn=collator, num_workers=workers, **kwargs)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a
    )


def all_same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def uninterrupted(
    prepared_sources: list[PreparedSource], num_hard_negatives: dict[str, int]
) -> list[list[dict[str, Any]]]:
    """The batches of two epochs."""
    whole = loader(prepared_sources, num_hard_negatives, workers=0)
    epochs = []
    for epoch in range(2):
        whole.set_epoch(epoch)
        epochs.append(list(whole))
    return epochs


def test_epochs_differ(uninterrupted: list[list[dict[str, Any]]]) -> None:
    first, second = uninterrupted
    assert len(first) == len(second) > 10
    assert not any(same(batch, other) for batch in first for other in second)
    assert {batch["source"] for batch in first} == {"qa", "topics", "polarity"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epoch", [0, 1])
def test_resumed_order_is_the_tail_of_the_uninterrupted_one(
    prepared_sources: list[PreparedSource],
    num_hard_negatives: dict[str, int],
    uninterrupted: list[list[dict[str, Any]]],
    workers: int,
    epoch: int,
) -> None:
    fresh = loader(prepared_sources, num_hard_negatives, workers)
    fresh.set_epoch(epoch)
    resumed = skip_first_batches(fresh, 5)
    assert all_same(list(resumed), uninterrupted[epoch][5:])
    # The loader itself goes on with whole epochs.
    fresh.set_epoch(1)
    assert all_same(list(fresh), uninterrupted[1])


@pytest.mark.parametrize("epoch", [0, 1])
def test_epoch_may_be_set_after_skipping(
    prepared_sources: list[PreparedSource],
    num_hard_negatives: dict[str, int],
    uninterrupted: list[list[dict[str, Any]]],
    epoch: int,
) -> None:
    # Trainer skips first. What it then iterates is a plain DataLoader, whose sampler wraps ours.
    resumed = skip_first_batches(loader(prepared_sources, num_hard_negatives, workers=0), 5)
    resumed.batch_sampler.batch_sampler.set_epoch(epoch)
    assert all_same(list(resumed), uninterrupted[epoch][5:])


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_follow_the_epoch(
    prepared_sources: list[PreparedSource],
    num_hard_negatives: dict[str, int],
    uninterrupted: list[list[dict[str, Any]]],
    persistent: bool,
) -> None:
    whole = loader(prepared_sources, num_hard_negatives, workers=2, persistent_workers=persistent)
    for epoch in (0, 1):
        whole.set_epoch(epoch)
        assert all_same(list(whole), uninterrupted[epoch])


def test_rows_of_a_split(prepared_sources: list[PreparedSource]) -> None:
    for split in ("train", "validation"):
        rows = PreparedRows(prepared_sources, split)
        assert len(rows) == sum(len(source.rows[split]) for source in prepared_sources)
    row = PreparedRows(prepared_sources)[RowKey(4, 1, 6)]
    assert row.key == (4, 1, 6)
    assert row.positions.tolist() == prepared_sources[1].rows["train"][6].tolist()
