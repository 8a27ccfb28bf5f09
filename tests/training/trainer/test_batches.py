"""Global batches: each row once, one source a batch; each distinct text once, and negatives drawn by key."""

from __future__ import annotations

import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import SkipBatchSampler

from training.common.keyed import keyed_order
from training.data.prepared import PreparedSource
from training.trainer import batches as batches_module
from training.trainer.batches import GlobalBatchSampler, PackedCollator, PreparedRows, Row, RowKey
from training.trainer.step import _no_negatives
from training.trainer.trainer import _EpochLoader

ROWS = [100, 7, 0, 1, 33]


def batches(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(map(list, sampler))


@pytest.mark.parametrize("rows", [[1], [64], [65], [63, 128], ROWS])
@pytest.mark.parametrize("global_batch_size", [1, 8, 64, 1000])
@pytest.mark.parametrize("epoch", [0, 3])
def test_epoch_visits_every_row_once_in_even_batches_of_one_source(rows, global_batch_size, epoch):
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


@pytest.mark.parametrize(("seed", "epoch"), [(1, 0), (0, 1)])
def test_order_differs_between_seeds_and_epochs(seed, epoch):
    one = batches(GlobalBatchSampler([200, 200], 10))
    other = batches(GlobalBatchSampler([200, 200], 10, seed=seed), epoch)
    # Neither the order of the sources, nor the rows that meet in a batch, nor the order of the rows.
    assert [batch[0].source for batch in one] != [batch[0].source for batch in other]
    rows = [{frozenset(key[1:] for key in batch) for batch in order} for order in (one, other)]
    assert not rows[0] & rows[1]
    assert sum(a[1:] == b[1:] for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)) < 20


def test_batches_that_are_passed_over_cost_no_keys_and_orders_are_made_when_due(monkeypatch):
    whole = batches(GlobalBatchSampler([3000, 500], 10))
    made = []
    monkeypatch.setattr(batches_module, "RowKey", lambda *key: pytest.fail("a key was made"))
    counted = lambda rows, *keys: made.append(rows) or keyed_order(rows, *keys)  # noqa: E731
    monkeypatch.setattr(batches_module, "keyed_order", counted)
    resumed = iter(SkipBatchSampler(GlobalBatchSampler([3000, 500], 10), 200))
    keys = next(resumed)
    assert sorted(made) == [350, 500, 3000]
    monkeypatch.undo()
    assert [list(keys), *map(list, resumed)] == whole[200:]
    assert list(pickle.loads(pickle.dumps(keys))) == whole[200]


def loader(sources, num_hard_negatives, workers, **kwargs):
    sampler = GlobalBatchSampler([len(source.rows["train"]) for source in sources], 8, seed=2)
    collator = PackedCollator(sources, num_hard_negatives, seed=2)
    rows = PreparedRows(sources)
    return _EpochLoader(rows, batch_sampler=sampler, collate_fn=collator, num_workers=workers, **kwargs)


def all_same(a, b):
    def same(x, y):
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return all(x.keys() == y.keys() and all(same(x[key], y[key]) for key in x) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def uninterrupted(prepared_sources, num_hard_negatives):
    """The batches of two epochs."""
    whole = loader(prepared_sources, num_hard_negatives, workers=0)
    epochs = []
    for epoch in range(2):
        whole.set_epoch(epoch)
        epochs.append(list(whole))
    return epochs


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("epoch", [0, 1])
def test_resumed_order_is_the_tail_of_the_uninterrupted_one(
    prepared_sources, num_hard_negatives, uninterrupted, workers, persistent, epoch
):
    fresh = loader(prepared_sources, num_hard_negatives, workers, persistent_workers=persistent)
    fresh.set_epoch(epoch)
    resumed = skip_first_batches(fresh, 5)
    assert all_same(resumed, uninterrupted[epoch][5:])
    # The loader itself goes on with whole epochs.
    fresh.set_epoch(1)
    assert all_same(fresh, uninterrupted[1])
    # Trainer skips first, and then sets the epoch of a plain DataLoader, whose sampler wraps ours.
    resumed.batch_sampler.batch_sampler.set_epoch(1)
    assert all_same(resumed, uninterrupted[1][5:])


def lengths_of(batch):
    return [length for chunk in batch["chunk_lengths"] for length in chunk]


def texts_of(batch):
    """The token ids of the batch's texts."""
    (tokens,) = batch["input_ids"]
    return [tuple(text.tolist()) for text in tokens.split(lengths_of(batch))]


def rows_of(batch, source):
    """``(b, 2 + k)`` positions of query, positive and negatives among the source's texts."""
    # The examples have no two texts of the same tokens.
    stored = {tuple(source.tokens(text).tolist()): text for text in range(source.description["texts"])}
    positions = np.array([stored[text] for text in texts_of(batch)])
    index = torch.cat([batch["query"][:, None], batch["positive"][:, None], batch["negatives"]], dim=1)
    return positions[index.numpy()]


def take(sources, source, rows):
    return [PreparedRows(sources)[RowKey(0, source, row)] for row in rows]


@pytest.fixture
def make(prepared_sources, num_hard_negatives):
    return lambda *process, seed=7, **negatives: PackedCollator(
        prepared_sources, {**num_hard_negatives, **negatives}, seed, *process
    )


@pytest.mark.parametrize(("source", "zero"), [(0, {}), (1, {}), (2, {}), (0, {"retrieval": 0})])
def test_batch_holds_the_texts_of_its_rows(make, prepared_sources, num_hard_negatives, source, zero):
    wanted = prepared_sources[source]
    order = [11, 3, 5, 0, 12, 9]
    batch = make(**zero)(take(prepared_sources, source, order))
    rows = rows_of(batch, wanted)
    assert (batch["source"], batch["task_type"]) == (wanted.name, wanted.task_type)
    published = wanted.rows["train"][order]
    assert rows[:, :2].tolist() == published[:, :2].tolist()
    assert batch["negatives"].shape == (6, {**num_hard_negatives, **zero}[wanted.task_type])
    assert batch["negatives"].dtype == torch.int64
    for row, all_of_row in zip(rows, published, strict=True):
        assert set(row[2:]) <= set(all_of_row[2:]) - {-1}


def test_distinct_texts_are_packed_once_and_shortest_first(make, prepared_sources):
    # Rows 61 apart share their passage, rows in general some negatives.
    batch = make()(take(prepared_sources, 0, range(80)))
    texts = texts_of(batch)
    assert len(set(texts)) == len(texts) < batch["query"].numel() * 4
    used = torch.cat([batch["query"], batch["positive"], batch["negatives"].flatten()])
    assert set(used.tolist()) == set(range(len(texts)))
    assert lengths_of(batch) == sorted(len(text) for text in texts)
    assert all(text[-1] == texts[0][-1] for text in texts)  # EOS


def drawn(collator, rows):
    """Positions of the negatives, in the order of their draw."""
    return rows_of(collator(rows), collator.sources[rows[0].key.source])[:, 2:].tolist()


def numbered(count, negatives, epoch=0):
    """Rows of one and the same texts under different keys."""
    return [Row(RowKey(epoch, 1, row), np.array([0, 1, *negatives])) for row in range(count)]


def test_draw_depends_on_row_epoch_and_seed_and_not_on_the_batch(make, prepared_sources):
    collator, negatives = make(), range(2, 8)
    together = drawn(collator, take(prepared_sources, 1, range(20)))
    assert drawn(collator, take(prepared_sources, 1, range(20)[::-1])) == together[::-1]
    assert [drawn(make(), take(prepared_sources, 1, [row])) for row in range(20)] == [[row] for row in together]
    first = drawn(collator, numbered(200, negatives))
    # 6 · 5 · 4 = 120 ordered draws: about 1 row in 120 draws the same again.
    assert len(set(map(tuple, first))) > 80
    other_epoch = drawn(collator, numbered(200, negatives, epoch=1))
    for other in (other_epoch, drawn(make(seed=8), numbered(200, negatives))):
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 10


def test_missing_negatives_are_never_drawn_and_the_rest_evenly(make):
    draws = drawn(make(), numbered(2000, [-1, 3, 4, -1, 6, 7]))
    counts = Counter(position for row in draws for position in row)
    assert set(counts) == {3, 4, 6, 7}
    assert all(len(set(row)) == 3 for row in draws)
    assert all(1400 < count < 1600 for count in counts.values())  # 1500 expected, standard deviation 19
    # A row with just enough negatives draws all of them.
    draws = drawn(make(), numbered(50, [-1, 3, -1, -1, 6, 7]))
    assert {tuple(sorted(row)) for row in draws} == {(3, 6, 7)}


def test_a_row_with_few_negatives_has_them_all_and_marks_the_rest(make):
    rows = [
        Row(RowKey(0, 1, row), np.array([row, 20 + row, *negatives]))
        for row, negatives in enumerate([[-1, 7, -1, -1], [-1] * 4, [2, 7, 9, 11]])
    ]
    batch = make()(rows)
    assert (batch["negatives"] >= 0).tolist() == [[True, False, False], [False] * 3, [True] * 3]
    used = torch.cat([batch["query"], batch["positive"], batch["negatives"][batch["negatives"] >= 0]])
    assert set(used.tolist()) == set(range(len(texts_of(batch))))
    # Rows with enough are drawn the same beside those.
    assert drawn(make(), rows[2:])[0] == [rows_of(batch, make().sources[1])[2][k] for k in (2, 3, 4)]


class SeveralPositives:
    """Rows of two negatives and up to three positives over texts of one token; texts 4 and 5 are one document."""

    name, task_type, num_negatives, num_positives, has_ids = "several", "retrieval", 2, 3, True
    positives, negatives = PreparedSource.positives, PreparedSource.negatives

    def tokens(self, text):
        return np.array([text])

    def lengths(self, texts):
        return np.ones_like(texts)

    def forms(self, texts):
        return np.where(np.asarray(texts) == 5, 4, texts)


def test_all_positives_of_a_row_are_trained_in_turn_and_none_is_a_negative_of_its_query():
    source = SeveralPositives()
    rows = np.array([[0, 2, 10, 5, 3, 4], [1, 6, 12, -1, 7, -1], [8, 5, -1, -1, -1, -1], [9, 13, 10, 11, 6, -1]])
    collator, trained, excluded = PackedCollator([source], {"retrieval": 2}, seed=3), [], []
    for epoch in range(6):
        batch = collator([Row(RowKey(epoch, 0, number), row) for number, row in enumerate(rows)])
        texts = np.array([text for (text,) in texts_of(batch)])
        trained.append(texts[batch["positive"]].tolist())
        # A negative of the first row is the document of a positive.
        negatives = np.where(batch["negatives"] < 0, -1, texts[batch["negatives"]])
        assert [set(row) - {-1} for row in negatives.tolist()] == [{10}, {12}, set(), {10, 11}]
        forms = source.forms(trained[-1])
        wanted = [np.isin(forms, source.forms(own[own >= 0])) for own in source.positives(rows)]
        excluded.append(_no_negatives(batch, mask_duplicates=False))
        assert torch.equal(excluded[-1], torch.tensor(np.array(wanted) & ~np.eye(4, dtype=bool)))
        assert (_no_negatives(batch, mask_duplicates=True) >= excluded[-1]).all()
    # Of the first row against the document of the third, and of two rows that share a text.
    assert excluded[0][0, 2] and any(each[1, 3] for each in excluded) and any(each[3, 1] for each in excluded)
    for own, row in zip(zip(*trained, strict=True), source.positives(rows), strict=True):
        there = set(row[row >= 0].tolist())
        assert all(set(own[start : start + len(there)]) == there for start in range(6 - len(there)))


def test_scores_of_the_data_follow_the_documents_that_are_drawn():
    rows = np.array([[0, 2, 10, 5, 3, 4], [1, 6, 12, -1, 7, -1], [9, 13, 10, 11, 6, -1]])
    # Of the last row's passage, none is known.
    scores = np.where(rows[:, 1:] == 13, np.nan, rows[:, 1:] / 8).astype(np.float32)
    collator = PackedCollator([SeveralPositives()], {"retrieval": 2}, seed=3)
    for epoch in range(3):
        keys = [RowKey(epoch, 0, number) for number in range(3)]
        batch = collator([Row(*each) for each in zip(keys, rows, scores, strict=True)])
        texts = np.array([text for (text,) in texts_of(batch)], dtype=np.float32)
        drawn = torch.cat([batch["positive"][:, None], batch["negatives"]], dim=1).numpy()
        wanted = np.where((drawn < 0) | (texts[drawn] == 13), np.nan, texts[drawn] / 8)
        assert (drawn < 0).any()
        np.testing.assert_array_equal(batch["candidate_scores"], wanted)


@pytest.mark.parametrize("max_tokens", [None, 60])
@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
@pytest.mark.parametrize("row_count", [1, 17])
def test_processes_together_encode_each_text_of_the_batch_once(
    make, prepared_sources, row_count, world_size, max_tokens
):
    for source in range(3):
        rows = take(prepared_sources, source, range(row_count)[:15])
        whole, parts = make()(rows), [make(rank, world_size, max_tokens)(rows) for rank in range(world_size)]
        gathered = []
        for part in parts:
            for name in ("query", "positive", "negatives", "slots"):
                assert torch.equal(part[name], parts[0][name])
            assert part["rows"] == whole["rows"] and part["tokens"] == sum(lengths_of(whole))
            assert len(part["chunk_lengths"]) == len(parts[0]["chunk_lengths"])
            assert all(len(chunk) == 1 or sum(chunk) <= (max_tokens or 10**9) for chunk in part["chunk_lengths"])
            own = texts_of(part)
            gathered += [*own, *[None] * (part["max_rows_per_rank"] - len(own))]
        # Slots lead to the texts of the batch, in the order that the indices mean.
        assert [gathered[slot] for slot in parts[0]["slots"]] == texts_of(whole)
        for name in ("query", "positive", "negatives"):
            assert torch.equal(parts[0][name], whole[name])
        # What is encoded besides is the shortest text, where a process has a chunk too few.
        spare = [text for slot, text in enumerate(gathered) if text and slot not in set(parts[0]["slots"].tolist())]
        assert set(spare) <= {texts_of(whole)[0]}
