"""Stateless random numbers, keyed by (seed, purpose, index).

A draw is a function of its key, not of earlier draws. A resumed run, or one with another number of processes or loader
workers, therefore makes the same draws.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
_GOLDEN_GAMMA, *_MIX = map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


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


def text_key(text: str) -> int:
    """Return a stable 64-bit key of a text (Python's own ``hash`` differs from run to run)."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
