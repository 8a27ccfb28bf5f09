"""Summaries: a summary looks for the article it sums up."""

from __future__ import annotations

from collections.abc import Iterator

from training.data.building.formats.format import Format, Row, directed
from training.data.building.raw import RawRows


def summaries(raw: RawRows) -> Iterator[Row]:
    """Yields every summary with its article as a row of retrieval.

    Args:
        raw: Columns ``summary`` and ``article``; ``lang`` may name their language.
    """
    for _, row in raw:
        yield from directed(raw, row["summary"], row["article"], lang=row["lang"])


SUMMARIES = Format(summaries, "retrieval", texts=("summary", "article"))
