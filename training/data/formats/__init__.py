"""From raw rows to rows of the published format: one small function for each kind of raw data."""

from __future__ import annotations

from training.data.formats.duplicates import DUPLICATE_GROUPS, DUPLICATES
from training.data.formats.format import Format, Key, Row
from training.data.formats.labelled import LABELLED
from training.data.formats.nli import NLI
from training.data.formats.pairs import PAIRS
from training.data.formats.sts import STS
from training.data.formats.summaries import SUMMARIES
from training.data.formats.two_way import TWO_WAY

__all__ = ["FORMATS", "Format", "Key", "Row"]

# By the name that a build file gives them.
FORMATS: dict[str, Format] = {
    "pairs": PAIRS,
    "summaries": SUMMARIES,
    "nli": NLI,
    "sts": STS,
    "duplicates": DUPLICATES,
    "duplicate_groups": DUPLICATE_GROUPS,
    "labelled": LABELLED,
    "two_way": TWO_WAY,
}
