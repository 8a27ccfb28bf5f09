"""Ids of texts: 128 bits of a text's own hash, the same in every run and on every machine."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from training.data.cleaning.normalise import normalise

# Bytes of a fixed length sort and compare in numpy; that it ignores zeros at the end changes nothing at equal lengths.
ID = np.dtype("S16")
Ids = NDArray[np.bytes_]


def text_ids(texts: Iterable[str]) -> Ids:
    """``(n,)`` ids. Two different texts have one id with a chance of 1 in 10^21 among a thousand million texts."""
    digests = b"".join(blake2b(text.encode(), digest_size=ID.itemsize).digest() for text in texts)
    return np.frombuffer(digests, dtype=ID)


def form_ids(texts: Iterable[str]) -> Ids:
    """``(n,)`` ids of the texts' normal forms: texts that differ in spelling only have one."""
    return text_ids(map(normalise, texts))


def distinct(ids: Ids) -> tuple[Ids, NDArray[np.int64], NDArray[np.int64]]:
    """Numbers the distinct ids in the order of their first occurrence.

    Args:
        ids: ``(n,)``.

    Returns:
        The ``m`` distinct ids, ``(n,)`` numbers of the given ones, and ``(m,)`` first occurrences, which ascend.
    """
    unique, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty(len(unique), dtype=np.int64)
    number[order] = np.arange(len(unique))
    return unique[order], number[inverse.reshape(-1)], first[order]


def find(ids: Ids, among: Ids) -> NDArray[np.int64]:
    """``(n,)`` positions of ids in a sorted array of distinct ids, -1 where an id is not there."""
    if not len(among):
        return np.full(len(ids), -1, dtype=np.int64)
    at = np.minimum(np.searchsorted(among, ids), len(among) - 1)
    return np.where(among[at] == ids, at, -1)
