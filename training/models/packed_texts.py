"""Texts of a prepared source, packed for forward passes: neighbours in length together, within a token budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.data.prepared import PreparedSource
from training.models.layout import balanced_chunks


class PackedTexts(NamedTuple):
    """Some texts end to end.

    Attributes:
        positions: ``(n,)`` positions of the texts among the source's.
        input_ids: ``(1, T)`` token ids.
        lengths: The ``n`` token counts.
    """

    positions: np.ndarray
    input_ids: Tensor
    lengths: list[int]


def packed_texts(source: PreparedSource, positions: np.ndarray, max_tokens: int) -> Iterator[PackedTexts]:
    """Packs the texts at the given positions, shortest first.

    Args:
        source: The prepared source.
        positions: ``(n,)`` positions of texts, in any order.
        max_tokens: Tokens of a batch at most; a longer text is a batch of its own.
    """
    positions = positions[np.argsort(source.lengths(positions), kind="stable")]
    for chunk in balanced_chunks(positions, source.lengths(positions), max_tokens):
        tokens = np.concatenate([source.tokens(text) for text in chunk])
        yield PackedTexts(chunk, torch.from_numpy(tokens.astype(np.int64))[None], source.lengths(chunk).tolist())
