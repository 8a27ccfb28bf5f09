"""The division of a batch: every text once, within the budget, in shares and chunks of about equal size."""

from __future__ import annotations

import numpy as np
import pytest

from training.models.encoding import balanced_chunks, lay_out, shares


def realistic_lengths(rng, texts, longest=1024):
    return np.sort(np.clip(rng.lognormal(4.5, 0.9, texts).astype(np.int64), 2, longest))


def all_parts(lengths, world_size, max_tokens):
    return [lay_out(lengths, rank, world_size, max_tokens) for rank in range(world_size)]


def assert_exact(lengths, parts, max_tokens):
    # Gather the texts themselves instead of embeddings, and look each up in its slot.
    width = parts[0].max_rows_per_rank
    gathered = np.full(len(parts) * width, -1)
    for rank, part in enumerate(parts):
        assert part.max_rows_per_rank == width and (part.slots == parts[0].slots).all()
        assert len(part.chunks) == len(parts[0].chunks)
        assert all(len(chunk) for chunk in part.chunks)
        own = np.concatenate(part.chunks)
        assert len(own) <= width
        gathered[rank * width : rank * width + len(own)] = own
        for chunk in part.chunks:
            assert max_tokens is None or len(chunk) == 1 or lengths[chunk].sum() <= max_tokens
    assert (gathered[parts[0].slots] == np.arange(len(lengths))).all()
    # Outside of the slots there are repetitions of the shortest text, or nothing.
    unused = np.delete(gathered, parts[0].slots)
    assert set(unused.tolist()) <= {0, -1}
    encoded = sum(len(chunk) for part in parts for chunk in part.chunks)
    assert encoded == len(lengths) + (unused == 0).sum()


def test_every_division_is_exact_and_within_the_budget():
    rng = np.random.default_rng(0)
    for _ in range(400):
        texts, world_size = int(rng.integers(1, 200)), int(rng.integers(1, 9))
        lengths = np.sort(rng.integers(1, int(rng.integers(2, 500)), texts))
        max_tokens = None if rng.random() < 0.1 else int(rng.integers(1, 2000))
        assert_exact(lengths, all_parts(lengths, world_size, max_tokens), max_tokens)


@pytest.mark.parametrize(("texts", "max_tokens"), [(300, 2048), (1500, 8192), (4608, 2048), (4608, 32768)])
def test_no_chunk_is_nearly_empty(texts, max_tokens):
    # A cut is off by at most half a text on either side, so a chunk differs from the mean by one text's length at most.
    # With budgets of twice the longest text (1,024 tokens here) or more, that leaves half.
    rng = np.random.default_rng(texts + max_tokens)
    for _ in range(20):
        lengths = realistic_lengths(rng, texts)
        sums = np.array([lengths[chunk].sum() for chunk in balanced_chunks(np.arange(texts), lengths, max_tokens)])
        assert sums.max() <= max_tokens and sums.min() >= sums.mean() / 2
        assert np.abs(sums - sums.mean()).max() <= lengths.max()
        # Nor are there many more chunks than the tokens need.
        assert len(sums) <= np.ceil(lengths.sum() / (max_tokens - lengths.max())) + 1


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_shares_differ_by_less_than_the_longest_text(world_size):
    rng = np.random.default_rng(world_size)
    for _ in range(200):
        lengths = realistic_lengths(rng, int(rng.integers(1, 600)))
        dealt = shares(len(lengths), world_size)
        assert sorted(np.concatenate(dealt).tolist()) == list(range(len(lengths)))
        tokens, counts = [int(lengths[share].sum()) for share in dealt], [len(share) for share in dealt]
        assert max(tokens) - min(tokens) <= lengths[-1] and max(counts) - min(counts) <= 1
        assert all((np.diff(share) > 0).all() for share in dealt)
        # An idle process repeats one text, the shortest, per missing chunk.
        encoded = sum(lengths[chunk].sum() for part in all_parts(lengths, world_size, 8192) for chunk in part.chunks)
        assert encoded <= lengths.sum() + world_size * lengths[0]
