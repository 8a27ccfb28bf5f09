"""From raw rows to rows of the published format: one small function for each kind of raw data."""

from __future__ import annotations

from training.data.building.formats.duplicates import DUPLICATE_GROUPS, DUPLICATES
from training.data.building.formats.format import Format
from training.data.building.formats.labelled import LABELLED
from training.data.building.formats.nli import NLI
from training.data.building.formats.pairs import PAIRS
from training.data.building.formats.sts import STS
from training.data.building.formats.summaries import SUMMARIES
from training.data.building.formats.two_way import TWO_WAY

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
