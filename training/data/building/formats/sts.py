"""Semantic textual similarity: pairs of sentences that people scored, of which the similar ones find each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any

from training.data.building.formats.format import Format, Key, Row, directed
from training.data.building.raw import RawRows

_HIGHEST = 5.0
# A score of single precision may miss the threshold it was written to meet: 0.8 of 1 is 4 of 5.
_TOLERANCE = 1e-6


def sts(raw: RawRows, *, threshold: float, scale: Sequence[float]) -> Iterator[Row]:
    """Yields every pair of at least the threshold's similarity as two rows, one in each direction.

    Args:
        raw: Columns ``query``, ``passage`` and ``score``; ``lang`` and ``passage_lang`` may name the languages.
        threshold: The lowest score to keep, on a scale from 0 to 5.
        scale: The scores of the least and of the most similar pairs, which are set to 0 and 5.

    Raises:
        UserError: If a score is not a number or off the scale.
    """
    lowest, highest = scale
    for number, row in raw:
        written = row.pop("score")
        score = _number(written)
        if score is None:
            raise raw.refuse(number, "score", f"holds {written!r}, which is not a number; correct it")
        similarity = (score - lowest) / (highest - lowest)
        if not -_TOLERANCE <= similarity <= 1 + _TOLERANCE:
            raise raw.refuse(number, "score", f"holds {score}, which is off the scale {list(scale)}; correct 'scale'")
        if _HIGHEST * similarity < threshold - _TOLERANCE:
            raw.dropped["score is below the threshold"] += 1
        else:
            yield from directed(raw, **row, both_directions=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _number(value: Any) -> float | None:
    """A score; in a csv file it is a text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if _is_number(value) else None


def _is_scale(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[0] != value[1]


STS = Format(
    sts,
    "retrieval",
    texts=("query", "passage"),
    values=("score",),
    optional=("lang", "passage_lang"),
    symmetric=True,
    keys={
        "threshold": Key("a number from 0 to 5", lambda value: _is_number(value) and 0 <= value <= _HIGHEST, 4),
        "scale": Key("a list of the lowest and the highest score, such as [0, 1]", _is_scale, [0, 5]),
    },
)
