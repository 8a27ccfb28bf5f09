"""Duplicates: texts that say the same, in labelled pairs or in groups, find each other."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from training.data.building.formats.format import BOTH_DIRECTIONS, Format, Key, Row, directed
from training.data.building.formats.labels import is_label, label_text
from training.data.building.raw import RawRows, is_text


def duplicates(raw: RawRows, *, duplicate_label: Any, both_directions: bool) -> Iterator[Row]:
    """Yields every pair of duplicates as a row of retrieval.

    Args:
        raw: Columns ``query`` and ``passage``, and ``label`` if not all pairs are duplicates; ``lang`` and
            ``passage_lang`` may name their languages.
        duplicate_label: The label of duplicates.
        both_directions: Whether each passage also looks for its query.
    """
    for _, row in raw:
        label = row.pop("label")
        if "label" in raw.columns and (label is None or label_text(label) != label_text(duplicate_label)):
            raw.dropped[f"label is not {duplicate_label}"] += 1
        else:
            yield from directed(raw, **row, both_directions=both_directions)


def duplicate_groups(raw: RawRows, *, both_directions: bool) -> Iterator[Row]:
    """Yields from each group of duplicates one row for every text but the last, which looks for the next.

    All pairs of a group would be its size squared, and a large group would outweigh the others.

    Args:
        raw: A column ``group`` of lists of texts; ``lang`` may name their language.
        both_directions: Whether each text also looks for the one before it.

    Raises:
        UserError: If a group is not a list of texts, and such rows are errors.
    """
    for number, row in raw:
        group = row["group"]
        if not isinstance(group, list) or not all(text is None or is_text(text) for text in group):
            shown = f"holds {repr(group)[:100]}, which is not a list of texts"
            raw.dropped[raw.refuse_or_count(number, "group", shown, "correct the row")] += 1
            continue
        texts = list(dict.fromkeys(text for text in group if text and text.strip()))
        if len(texts) < 2:
            raw.dropped["group has fewer than two different texts"] += 1
        for query, passage in pairwise(texts):
            yield from directed(raw, query, passage, both_directions=both_directions, lang=row["lang"])


DUPLICATES = Format(
    duplicates,
    "retrieval",
    texts=("query", "passage"),
    optional=("label", "lang", "passage_lang"),
    symmetric=True,
    keys={
        "duplicate_label": Key("a text, a number or a truth value", is_label, 1),
        "both_directions": BOTH_DIRECTIONS,
    },
)
DUPLICATE_GROUPS = Format(
    duplicate_groups,
    "retrieval",
    values=("group",),
    symmetric=True,
    keys={"both_directions": BOTH_DIRECTIONS},
)
