"""Draws keyed by what is drawn for, vectorised over rows: no generator state, so no order of calls can matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from training.common.keyed import keyed_bits, text_key

# Elements of one (rows, candidates) matrix: bounds the memory of a draw to some tens of megabytes.
_CHUNK_ELEMENTS = 1_000_000
# Of four candidates, three come from the first pool and one from the second.
_FIRST_POOL_RATIO = 3


def for_purpose(keys: NDArray[np.uint64], purpose: str) -> NDArray[np.uint64]:
    """Derives from each key an independent one for the named purpose."""
    return keyed_bits(text_key(purpose), keys)


def grouped(values: NDArray[np.integer], rows: NDArray[np.intp]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Yields each distinct value with the rows that have it, in order.

    Args:
        values: One value a row, shape (rows,).
        rows: What to yield for each row, shape (rows,).
    """
    order = np.argsort(values, kind="stable")
    distinct, starts = np.unique(values[order], return_index=True)
    # Of no rows, np.split makes one empty part; no value stands for it.
    yield from zip(distinct.tolist(), np.split(rows[order], starts[1:]), strict=False)


def draw_distinct(
    keys: NDArray[np.uint64],
    groups: NDArray[np.intp],
    pools: Callable[[int], tuple[NDArray[np.intp], NDArray[np.intp]]],
    identity: NDArray[np.intp],
    count: int,
    allowed: Callable[[NDArray[np.intp], NDArray[np.intp]], NDArray[np.bool_]],
) -> NDArray[np.intp]:
    """Draws for each row ``count`` items of different identity from the two pools of the row's group.

    Three of four items come from the first pool as long as it has them, the others from the second.

    Args:
        keys: One key a row, shape (rows,). A row's draw depends on its key and its pools, and on no other row.
        groups: Each row's group, shape (rows,).
        pools: Given a group, returns its first and its second pool of items; either may be empty.
        identity: The identity of every item, indexed by item; two items of one identity count as one.
        count: How many items to draw for each row.
        allowed: Given rows of shape (n, 1) and items of shape (n, m), says which items each row may have, (n, m).

    Returns:
        Items, shape (rows, count); all -1 for a row that has fewer than ``count`` possible items.
    """
    drawn = np.full((len(keys), count), -1, dtype=np.intp)
    # Twice the need outlasts the repeats of a draw with replacement; a pool not much larger is ranked whole.
    width = 2 * count + 16
    for group, rows in grouped(groups, np.arange(len(keys))):
        first, rest = pools(group)
        _fill(drawn, rows, keys, (first, rest), width, identity, allowed)
        # Whatever chance left short is offered every item, so that only rows without enough possible ones stay empty.
        if max(len(first), len(rest)) > 2 * width:
            _fill(drawn, rows[drawn[rows, 0] < 0], keys, (first, rest), None, identity, allowed)
    return drawn


def _fill(
    drawn: NDArray[np.intp],
    rows: NDArray[np.intp],
    keys: NDArray[np.uint64],
    pools: tuple[NDArray[np.intp], NDArray[np.intp]],
    width: int | None,
    identity: NDArray[np.intp],
    allowed: Callable[[NDArray[np.intp], NDArray[np.intp]], NDArray[np.bool_]],
) -> None:
    """Writes the draw of the given rows into ``drawn``, a bounded number of rows at a time."""
    columns = sum(len(pool) if width is None else min(len(pool), 2 * width) for pool in pools)
    step = max(1, _CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        first = _candidates(for_purpose(keys[part], "first pool"), pools[0], width)
        rest = _candidates(for_purpose(keys[part], "rest pool"), pools[1], width)
        places = (np.arange(first.shape[1]) / _FIRST_POOL_RATIO, np.arange(rest.shape[1]) + 0.9)
        items = np.concatenate((first, rest), axis=1)[:, np.argsort(np.concatenate(places), kind="stable")]
        drawn[part] = first_distinct(items, allowed(part[:, None], items), identity, drawn.shape[1])


def _candidates(keys: NDArray[np.uint64], pool: NDArray[np.intp], width: int | None) -> NDArray[np.intp]:
    """Returns items in drawn order: the whole pool where ``width`` allows, else ``width`` of them, repeats and all.

    Returns:
        Items, shape (keys, candidates).
    """
    whole = width is None or len(pool) <= 2 * width
    draws = keyed_bits(keys[:, None], np.arange(len(pool) if whole else width))
    if whole:
        return pool[np.argsort(draws, axis=1, kind="stable")]
    return pool[(draws % np.uint64(len(pool))).astype(np.intp)]


def first_distinct(
    items: NDArray[np.intp], valid: NDArray[np.bool_], identity: NDArray[np.intp], count: int
) -> NDArray[np.intp]:
    """Returns each row's first ``count`` valid items of different identity, or -1 throughout where there are fewer.

    Args:
        items: Items in order of preference, shape (rows, candidates).
        valid: Which of them the row may have, shape (rows, candidates).
        identity: The identity of every item, indexed by item.
        count: How many items each row gets.

    Returns:
        Items, shape (rows, count).
    """
    chosen = np.full((len(items), count), -1, dtype=np.intp)
    if items.shape[1] < count:
        return chosen
    marks = np.where(valid, identity[items], -1)
    order = np.argsort(marks, axis=1, kind="stable")
    ordered = np.take_along_axis(marks, order, axis=1)
    new = np.ones_like(valid)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    keep = np.empty_like(valid)
    np.put_along_axis(keep, order, new, axis=1)
    keep &= valid
    rank = np.cumsum(keep, axis=1)
    complete = rank[:, -1] >= count
    chosen[complete] = items[complete][keep[complete] & (rank[complete] <= count)].reshape(-1, count)
    return chosen
