"""Labelled text: each text looks for another of its class among texts of other classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.common.keyed import keyed_bits, text_key
from training.data.building.formats.format import NUM_NEGATIVES, Format, Row
from training.data.building.formats.labels import is_label, label_text
from training.data.building.raw import RawRows
from training.data.cleaning.normalise import normalise

_Integers = NDArray[np.int64]
# Rows drawn for at a time: bounds the memory of a draw to some megabytes.
_CHUNK_ROWS = 10_000


@dataclass
class _Texts:
    """Distinct texts of one class each, with the number of their raw row, their class and their language."""

    texts: list[str]
    numbers: _Integers
    classes: _Integers
    langs: list[str | None]


def labelled(raw: RawRows, *, num_negatives: int) -> Iterator[Row]:
    """Yields every text as a row of clustering, with a text of its class and negatives of others, drawn by key.

    All texts are held in memory; time and memory grow with their number, whatever the number of classes.

    Args:
        raw: Columns ``text`` and ``label``; ``lang`` may name the text's language.
        num_negatives: Negatives of a row; texts that have fewer texts of other classes are left out.

    Raises:
        UserError: If a label is neither a text nor a number.
    """
    found = _read(raw)
    sizes = np.bincount(found.classes)
    size = sizes[found.classes]
    alone, few = size < 2, len(found.texts) - size < num_negatives
    raw.dropped["class has no other text"] += int(alone.sum())
    raw.dropped[f"other classes have fewer than {num_negatives} texts"] += int((few & ~alone).sum())
    wanted = np.flatnonzero(~alone & ~few)

    # A class is a stretch of this order, and the other classes are what lies before and after it.
    order = np.argsort(found.classes, kind="stable")
    starts = np.cumsum(sizes) - sizes
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    for rows in np.split(wanted, range(_CHUNK_ROWS, len(wanted), _CHUNK_ROWS)):
        own, start = size[rows], starts[found.classes[rows]]
        passage = distinct_below(_keys(raw, "labelled passage", found.numbers[rows]), own - 1, 1)[:, 0] + start
        passage += passage >= place[rows]
        negatives = distinct_below(
            _keys(raw, "labelled negatives", found.numbers[rows]), len(order) - own, num_negatives
        )
        negatives += np.where(negatives >= start[:, None], own[:, None], 0)
        for row, other, others in zip(rows.tolist(), order[passage].tolist(), order[negatives].tolist(), strict=True):
            texts = found.texts
            yield Row(texts[row], texts[other], [texts[negative] for negative in others], found.langs[row])


def distinct_below(keys: NDArray[np.uint64], bounds: _Integers, count: int) -> _Integers:
    """Draws for each key ``count`` different integers from 0 up to its bound, every choice and order as likely.

    The algorithm of Floyd (Bentley and Floyd, "Programming pearls: a sample of brilliance", 1987), which never draws
    in vain, for all rows at once.

    Args:
        keys: One key a row, shape (rows,).
        bounds: One bound a row, shape (rows,), at least ``count``; the bound itself is not drawn.
        count: How many integers to draw for each row.

    Returns:
        Integers, shape (rows, count).
    """
    drawn = np.empty((len(keys), count), dtype=np.int64)
    for column in range(count):
        last = bounds - count + column
        draw = (keyed_bits(keys, column) % (last + 1).astype(np.uint64)).astype(np.int64)
        taken = (drawn[:, :column] == draw[:, None]).any(axis=1)
        drawn[:, column] = np.where(taken, last, draw)
    # The algorithm puts high integers last.
    order = np.argsort(keyed_bits(keys[:, None], count + np.arange(count)), axis=1, kind="stable")
    return np.take_along_axis(drawn, order, axis=1)


def _keys(raw: RawRows, purpose: str, numbers: _Integers) -> NDArray[np.uint64]:
    return keyed_bits(raw.seed, text_key(purpose), text_key(raw.name), numbers)


def _read(raw: RawRows) -> _Texts:
    """Reads the texts of exactly one class, each once, in the first spelling."""
    positions: dict[str, int] = {}
    class_numbers: dict[str, int] = {}
    texts, numbers, classes, langs, kept = [], [], [], [], []
    for number, row in raw:
        text, label = row["text"], row["label"]
        if not is_label(label):
            raise raw.refuse(number, "label", f"holds {str(label)[:100]!r}, which is neither text nor number")
        label_number = class_numbers.setdefault(label_text(label), len(class_numbers))
        # Another spelling of a text is no other text, be it of its class or of another.
        position = positions.setdefault(normalise(text), len(positions))
        if position == len(numbers):
            texts.append(text)
            numbers.append(number)
            classes.append(label_number)
            langs.append(row["lang"])
            kept.append(True)
        elif classes[position] == label_number:
            raw.dropped["text is repeated"] += 1
        else:
            # It belongs to neither class, be it as query, passage or negative.
            raw.dropped["text has several labels"] += 1 + kept[position]
            kept[position] = False
    chosen = np.flatnonzero(np.array(kept, dtype=bool))
    return _Texts(
        [texts[position] for position in chosen],
        np.array(numbers, dtype=np.int64)[chosen],
        np.array(classes, dtype=np.int64)[chosen],
        [langs[position] for position in chosen],
    )


LABELLED = Format(
    labelled,
    "clustering",
    texts=("text",),
    values=("label",),
    symmetric=True,
    keys={"num_negatives": NUM_NEGATIVES},
)
