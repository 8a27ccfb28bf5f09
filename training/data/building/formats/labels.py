"""Labels: one spelling for what files of different kinds write differently, and their meaning by the build file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from training.data.building.raw import RawRows

_TRUTHS = {"true": "1", "false": "0"}


def is_label(value: Any) -> bool:
    """Whether a value can be a label: a text, a number or a truth value."""
    return isinstance(value, (str, bool, int, float))


def label_text(value: Any) -> str:
    """One spelling of a label: the integer 1, a 1.0, true and the texts "1", "1.0" and "true" are the same.

    In a csv file all are texts, and what wrote it may have made a column with gaps one of floats.
    """
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value)
    return _TRUTHS.get(text.lower()) or re.sub(r"^(-?[0-9]+)\.0+$", r"\1", text)


def meaning(raw: RawRows, number: int, label: Any, meanings: Mapping[Any, str | None], key: str) -> str | None:
    """What a raw row's label stands for; None, counted, if its row is to be left out.

    Args:
        raw: Where the row comes from.
        number: The number of the raw row.
        label: Its label. -1, by which many data sets mark what has no label, need not be among the meanings.
        meanings: The meaning of each label, None for labels to leave out.
        key: The key of the build file that gives the meanings.

    Raises:
        UserError: If the label has no meaning.
    """
    name = label_text(label)
    known = {label_text(written): means for written, means in meanings.items()}
    if name not in known and name != "-1":
        raise raw.refuse(number, "label", f"holds the unknown label {label!r}; add it to {key!r}, null to leave it out")
    if known.get(name) is None:
        raw.dropped[f"label is {name}"] += 1
    return known.get(name)
