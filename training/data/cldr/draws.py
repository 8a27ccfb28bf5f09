"""Stateless draws of rows, vectorised: what a row gets depends on its key and its pools only."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from training.common.keyed import keyed_bits, text_key

Rows = NDArray[np.intp]
Mask = NDArray[np.bool_]
Keys = NDArray[np.uint64]
Pools = Callable[[int], tuple[Rows, Rows]]  # the two pools of a group

# Elements of one (rows, candidates) matrix, to limit a draw to some tens of megabytes.
_CHUNK_ELEMENTS = 1_000_000


def for_purpose(keys: Keys, purpose: str) -> Keys:
    """Derive from each key an independent one for the named purpose."""
    return keyed_bits(text_key(purpose), keys)


def grouped(values: NDArray[np.integer], rows: Rows) -> Iterator[tuple[int, Rows]]:
    """Yield each distinct value, in order, with the rows that have it; both arrays have one item per row."""
    order = np.argsort(values, kind="stable")
    distinct, starts = np.unique(values[order], return_index=True)
    # np.split returns one empty part for no rows, when there is no value for it.
    yield from zip(distinct.tolist(), np.split(rows[order], starts[1:]), strict=False)


def draw_distinct(
    keys: Keys, groups: Rows, pools: Pools, identity: Rows, count: int, allowed: Callable[[Rows, Rows], Mask]
) -> Rows:
    """Draw for each row ``count`` items of different identity from the two pools of the row's group.

    Three of four come from the first pool while it lasts. Keys and groups have shape (rows,), identities are indexed by
    item. ``allowed`` says for rows (n, 1) and items (n, m) which items each row may have, (n, m). Returns
    (rows, count); all -1 for a row with fewer possible items.
    """
    drawn = np.full((len(keys), count), -1, dtype=np.intp)
    # Twice the need outlasts the repeats of a draw with replacement.
    width = 2 * count + 16
    for group, rows in grouped(groups, np.arange(len(keys))):
        both = pools(group)
        longest = max(map(len, both))
        # Offer every item to the rows that are incomplete by chance.
        for most in (width, longest) if longest > 2 * width else (width,):
            left = rows[drawn[rows, 0] < 0]
            step = max(1, _CHUNK_ELEMENTS // max(1, sum(min(len(pool), 2 * most) for pool in both)))
            for start in range(0, len(left), step):
                part = left[start : start + step]
                first = _candidates(for_purpose(keys[part], "first pool"), both[0], most)
                rest = _candidates(for_purpose(keys[part], "rest pool"), both[1], most)
                # Interleave three of the first pool with one of the second.
                ranks = np.concatenate((np.arange(first.shape[1]) / 3, np.arange(rest.shape[1]) + 0.9))
                items = np.concatenate((first, rest), axis=1)[:, np.argsort(ranks, kind="stable")]
                drawn[part] = first_distinct(items, allowed(part[:, None], items), identity, count)
    return drawn


def _candidates(keys: Keys, pool: Rows, width: int) -> Rows:
    """Return the whole pool in drawn order if it has at most ``2 * width`` items, else ``width`` of it with repeats."""
    whole = len(pool) <= 2 * width
    draws = keyed_bits(keys[:, None], np.arange(len(pool) if whole else width))
    if whole:
        return pool[np.argsort(draws, axis=1, kind="stable")]
    return pool[(draws % np.uint64(len(pool))).astype(np.intp)]


def repeated(values: NDArray[np.integer]) -> Mask:
    """Return which values occur further to the left in their row."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    found = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(found, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return found


def first_distinct(items: Rows, valid: Mask, identity: Rows, count: int) -> Rows:
    """Return the first ``count`` valid items of different identity of each row, or -1; shape (rows, candidates)."""
    chosen = np.full((len(items), count), -1, dtype=np.intp)
    if items.shape[1] < count:
        return chosen
    keep = valid & ~repeated(np.where(valid, identity[items], -1))
    rank = np.cumsum(keep, axis=1)
    complete = rank[:, -1] >= count
    chosen[complete] = items[complete][keep[complete] & (rank[complete] <= count)].reshape(-1, count)
    return chosen
