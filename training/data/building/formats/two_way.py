"""Text of two classes: each text looks for the text of its own label, with the other one as its negative."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from training.data.building.formats.format import Format, Key, Row
from training.data.building.formats.labels import meaning
from training.data.building.raw import RawRows
from training.data.cleaning.normalise import normalise


def two_way(raw: RawRows, *, label_texts: Mapping[Any, str | None]) -> Iterator[Row]:
    """Yields every text as a row of classification.

    Args:
        raw: Columns ``text`` and ``label``; ``lang`` may name the text's language.
        label_texts: The text that stands for each label, None for rows to leave out; two different texts in all.

    Raises:
        UserError: If a label has no text.
    """
    first, second = _distinct(label_texts)
    other = {first: second, second: first}
    for number, row in raw:
        own = meaning(raw, number, row["label"], label_texts, "label_texts")
        if own is not None:
            yield Row(row["text"], own, (other[own],), row["lang"])


def _distinct(label_texts: Mapping[Any, str | None]) -> list[str]:
    return list(dict.fromkeys(text for text in label_texts.values() if text is not None))


def _are_label_texts(value: Any) -> bool:
    if not isinstance(value, dict) or not all(text is None or isinstance(text, str) for text in value.values()):
        return False
    texts = _distinct(value)
    return len(texts) == 2 and all(text.strip() for text in texts) and len(set(map(normalise, texts))) == 2


TWO_WAY = Format(
    two_way,
    "classification",
    texts=("text",),
    values=("label",),
    num_negatives=1,
    keys={
        "label_texts": Key(
            "a mapping of labels to two different texts, such as {0: negative, 1: positive}", _are_label_texts
        )
    },
)
