"""Stateless random numbers, keyed by (seed, purpose, index).

A draw is a function of its key, not of earlier draws. A resumed run, or one with another number of processes or loader
workers, therefore makes the same draws.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
_GOLDEN_GAMMA, *_MIX = map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
# Rows that are drawn at once.
_BLOCK_ROWS = 1 << 16


def keyed_bits(*keys: int | np.ndarray) -> np.ndarray:
    """Return 64 random bits per key, as ``uint64`` of the shape that the keys broadcast to; their order counts."""
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = (state ^ np.asarray(key).astype(np.uint64)) + _GOLDEN_GAMMA
            state = (state ^ (state >> np.uint64(30))) * _MIX[0]
            state = (state ^ (state >> np.uint64(27))) * _MIX[1]
            state = state ^ (state >> np.uint64(31))
    return state


def keyed_uniform(*keys: int | np.ndarray) -> np.ndarray:
    """Return one ``float64`` in [0, 1) per key."""
    return (keyed_bits(*keys) >> np.uint64(11)) * 2.0**-53


def keyed_order(rows: int, *keys: int) -> np.ndarray:
    """Return ``(rows,)`` uint32 numbers, shuffled: in the order of their 64-bit draws, as a stable argsort has them.

    In memory are 8 bytes a row while it is made, and 4 of the result: a row's number takes the place of the low bits of
    its draw. Where the bits that are left are equal, the whole draws are compared.
    """
    low, blocks = np.uint64((1 << rows.bit_length()) - 1), range(0, rows, _BLOCK_ROWS)
    order = np.arange(rows, dtype=np.uint64)
    for start in blocks:
        block = slice(start, start + _BLOCK_ROWS)
        order[block] |= keyed_bits(*keys, order[block]) & ~low
    order.sort()
    near = [np.flatnonzero(np.diff(order[start : start + _BLOCK_ROWS + 1]) <= low) + start for start in blocks]
    near = np.concatenate([np.zeros(0, dtype=np.int64), *near])
    near = np.unique(np.concatenate([near, near + 1]))
    tied = order[near] & low
    order[near] = tied[np.lexsort((tied, keyed_bits(*keys, tied)))]
    # In place: what is written of a block lies before what is read of the next.
    numbers = order.view(np.uint32)[:rows]
    for start in blocks:
        numbers[start : start + _BLOCK_ROWS] = order[start : start + _BLOCK_ROWS] & low
    del numbers
    order.resize(-(-rows // 2), refcheck=False)
    return order.view(np.uint32)[:rows]


def text_key(text: str) -> int:
    """Return a stable 64-bit key of a text (Python's own ``hash`` differs from run to run)."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
