"""Pairs: questions and answers, titles and texts, sentences and their translations."""

from __future__ import annotations

from collections.abc import Iterator

from training.data.building.formats.format import BOTH_DIRECTIONS, Format, Row, directed
from training.data.building.raw import RawRows


def pairs(raw: RawRows, *, both_directions: bool) -> Iterator[Row]:
    """Yields every pair as a row of retrieval.

    Args:
        raw: Columns ``query`` and ``passage``; ``lang`` and ``passage_lang`` may name their languages.
        both_directions: Whether each passage also looks for its query, as translations may.
    """
    for _, row in raw:
        yield from directed(raw, **row, both_directions=both_directions)


PAIRS = Format(
    pairs,
    "retrieval",
    texts=("query", "passage"),
    optional=("lang", "passage_lang"),
    keys={"both_directions": BOTH_DIRECTIONS},
)
