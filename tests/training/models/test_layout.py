"""The division of a batch: every text once, within the budget, in shares and chunks of about equal size."""

from __future__ import annotations

import numpy as np
import pytest

from training.models.layout import BatchLayout, balanced_chunks, lay_out, shares


def realistic_lengths(rng: np.random.Generator, texts: int, longest: int = 1024) -> np.ndarray:
    """Token counts as corpora have them, log-normal and cut at the maximal length; ascending."""
    return np.sort(np.clip(rng.lognormal(4.5, 0.9, texts).astype(np.int64), 2, longest))


def all_parts(lengths: np.ndarray, world_size: int, max_tokens: int | None) -> list[BatchLayout]:
    return [lay_out(lengths, rank, world_size, max_tokens) for rank in range(world_size)]


def assert_exact(lengths: np.ndarray, parts: list[BatchLayout], max_tokens: int | None) -> None:
    """Gathers the texts themselves instead of embeddings, and looks each up in its slot."""
    width = parts[0].width
    gathered = np.full(len(parts) * width, -1)
    for rank, part in enumerate(parts):
        assert part.width == width and (part.slots == parts[0].slots).all()
        assert len(part.chunks) == len(parts[0].chunks)
        assert all(len(chunk) for chunk in part.chunks)
        own = np.concatenate(part.chunks)
        assert len(own) <= width
        gathered[rank * width : rank * width + len(own)] = own
        for chunk in part.chunks:
            assert max_tokens is None or len(chunk) == 1 or lengths[chunk].sum() <= max_tokens
    assert (gathered[parts[0].slots] == np.arange(len(lengths))).all()
    # What lies outside of the slots are repetitions of the shortest text, or nothing.
    unused = np.delete(gathered, parts[0].slots)
    assert set(unused.tolist()) <= {0, -1}
    encoded = sum(len(chunk) for part in parts for chunk in part.chunks)
    assert encoded == len(lengths) + (unused == 0).sum()


def test_every_division_is_exact_and_keeps_to_the_budget() -> None:
    rng = np.random.default_rng(0)
    for _ in range(400):
        texts, world_size = int(rng.integers(1, 200)), int(rng.integers(1, 9))
        lengths = np.sort(rng.integers(1, int(rng.integers(2, 500)), texts))
        max_tokens = None if rng.random() < 0.1 else int(rng.integers(1, 2000))
        assert_exact(lengths, all_parts(lengths, world_size, max_tokens), max_tokens)


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
@pytest.mark.parametrize("max_tokens", [None, 1, 10, 10**9])
@pytest.mark.parametrize(
    "lengths",
    [[5], [5] * 6, [1] * 64, [7, 7, 7, 5000], [1, 2], list(range(1, 60))],
    ids=["one text", "fewer than processes", "equal", "one huge", "two", "rising"],
)
def test_edges(lengths: list[int], max_tokens: int | None, world_size: int) -> None:
    assert_exact(np.array(lengths), all_parts(np.array(lengths), world_size, max_tokens), max_tokens)


@pytest.mark.parametrize("world_size", [1, 3])
def test_without_a_budget_each_process_has_one_chunk(world_size: int) -> None:
    for part in all_parts(realistic_lengths(np.random.default_rng(0), 100), world_size, None):
        assert len(part.chunks) == 1


def test_more_processes_than_texts_encode_as_often_as_the_others() -> None:
    parts = all_parts(np.array([3, 4]), 4, None)
    assert [[chunk.tolist() for chunk in part.chunks] for part in parts] == [[[1]], [[0]], [[0]], [[0]]]
    assert parts[0].slots.tolist() == [1, 0]


def test_a_text_over_the_budget_is_a_chunk_of_its_own() -> None:
    lengths = np.array([1, 1, 2, 90])
    chunks = balanced_chunks(np.arange(4), lengths, 4)
    assert [chunk.tolist() for chunk in chunks][-1] == [3]
    assert all(lengths[chunk].sum() <= 4 for chunk in chunks[:-1])


def test_equal_lengths_make_equal_chunks() -> None:
    lengths = np.full(100, 10)
    sizes = [len(chunk) for chunk in balanced_chunks(np.arange(100), lengths, 160)]
    assert sum(sizes) == 100 and max(sizes) - min(sizes) <= 1 and len(sizes) == 7  # ceil(100 / 16)


@pytest.mark.parametrize("max_tokens", [2048, 8192, 32768])
@pytest.mark.parametrize("texts", [300, 1500, 4608])
def test_no_chunk_is_nearly_empty(texts: int, max_tokens: int) -> None:
    # A cut lies at most half a text off its place on either side, so a chunk misses the share of each by one text's
    # length at most. With budgets of twice the longest text (1,024 tokens here) or more, that leaves half.
    rng = np.random.default_rng(texts + max_tokens)
    for _ in range(20):
        lengths = realistic_lengths(rng, texts)
        sums = np.array([lengths[chunk].sum() for chunk in balanced_chunks(np.arange(texts), lengths, max_tokens)])
        assert sums.max() <= max_tokens
        assert sums.min() >= sums.mean() / 2
        # Nor are there many more chunks than the tokens need.
        assert len(sums) <= np.ceil(lengths.sum() / (max_tokens - lengths.max())) + 1


def test_a_chunk_differs_from_its_share_by_less_than_its_longest_text() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        lengths = realistic_lengths(rng, int(rng.integers(2, 500)))
        chunks = balanced_chunks(np.arange(len(lengths)), lengths, 2048)
        sums = np.array([lengths[chunk].sum() for chunk in chunks])
        assert np.abs(sums - lengths.sum() / len(chunks)).max() <= lengths.max()


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_shares_differ_by_less_than_the_longest_text(world_size: int) -> None:
    rng = np.random.default_rng(world_size)
    for _ in range(200):
        lengths = realistic_lengths(rng, int(rng.integers(1, 600)))
        dealt = shares(len(lengths), world_size)
        assert sorted(np.concatenate(dealt).tolist()) == list(range(len(lengths)))
        tokens = [int(lengths[share].sum()) for share in dealt]
        assert max(tokens) - min(tokens) <= lengths[-1]
        counts = [len(share) for share in dealt]
        assert max(counts) - min(counts) <= 1
        assert all((np.diff(share) > 0).all() for share in dealt)


def test_processes_divide_the_work_of_chunks_too() -> None:
    # An idle process repeats one text per missing chunk: rare, and cheap as it is the shortest.
    rng = np.random.default_rng(5)
    for _ in range(50):
        lengths = realistic_lengths(rng, 1000)
        parts = all_parts(lengths, 4, 8192)
        encoded = sum(lengths[chunk].sum() for part in parts for chunk in part.chunks)
        assert encoded <= lengths.sum() + 4 * lengths[0]
