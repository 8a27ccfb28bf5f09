"""Long lists of whole numbers as text that a person can read: ``0-3 5 9-20``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from training.common.errors import UserError

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def as_ranges(numbers: Iterable[int]) -> str:
    """Joins runs of numbers that follow one another; the order stays.

    Example:
        >>> as_ranges([0, 1, 2, 7, 4, 5])
        '0-2 7 4-5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def from_ranges(text: Any, where: str) -> tuple[int, ...]:
    """The numbers that :func:`as_ranges` wrote; YAML makes a number of a single one.

    Raises:
        UserError: If something else than numbers and rising ranges is written there.
    """
    numbers: list[int] = []
    words = str(text).split() if isinstance(text, str | int) and not isinstance(text, bool) else [repr(text)]
    for word in words:
        match = _RANGE.fullmatch(word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError(f"{where}: {word!r} is no number or rising range; write them as in '0-3 5 9-20'")
        numbers += range(first, last + 1)
    return tuple(numbers)
