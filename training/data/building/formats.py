"""Formats of raw data: one function per format turns raw rows into rows of the published format."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.common.errors import UserError
from training.common.keyed import keyed_bits, text_key
from training.data.building.examples import IDENTICAL, RawRows, Row, examples, similarity
from training.data.building.reader import is_text
from training.data.cleaning.normalise import normalise

# The default of a key without one.
REQUIRED: Any = object()
_NLI_LABELS = ("entailment", "contradiction", "neutral")
# A score of single precision may miss a threshold by rounding: 0.8 of 1 is 4 of 5.
_TOLERANCE = 1e-6
# Rows drawn for at a time, to limit the memory of a draw to some megabytes.
_CHUNK_ROWS = 10_000


class Key(NamedTuple):
    """One key of a build file."""

    expected: str  # what a value must be, for errors
    fits: Callable[[Any], bool]
    default: Any = REQUIRED

    def value(self, where: str, name: str, entry: Mapping[str, Any]) -> Any:
        """Return the value of the key in a part of the build file, or its default."""
        value = entry.get(name, self.default)
        if value is REQUIRED or not (value is self.default or self.fits(value)):
            fault = "is missing" if value is REQUIRED else f"cannot be {value!r}"
            raise UserError(f"{where}: key {name!r} {fault}; give {self.expected}")
        return value


@dataclass(frozen=True)
class Format:
    """One format of raw data."""

    # Given RawRows and a value for each of `keys`, yields the rows and counts what it leaves out.
    rows: Callable[..., Iterator[Row]]
    task_type: str
    texts: tuple[str, ...] = ()  # text columns that every raw row must have
    values: tuple[str, ...] = ()  # other columns that every raw row must have
    optional: tuple[str, ...] = ("lang",)  # columns that need neither be named nor filled in every raw row
    lists: tuple[str, ...] = ()  # roles of any number of columns, which may hold lists
    more: tuple[str, ...] = ()  # further columns that every row has
    held_out_by: str | None = None  # the role by whose texts rows can be held out
    symmetric: bool = False  # unless the build file says otherwise
    num_negatives: int = 0  # unless there is a key for it
    keys: Mapping[str, Key] = field(default_factory=dict)


def pairs(raw: RawRows, *, both_directions: bool = False) -> Iterator[Row]:
    """Yield every pair as a row, and with ``both_directions`` also the passage as query."""
    for _, row in raw:
        yield from _directed(raw, both_directions, *row.values())


def _directed(
    raw: RawRows, both: bool, query: str, passage: str, lang: str | None, passage_lang: str | None = None
) -> Iterator[Row]:
    """Yield a pair in one or both directions; count and leave out a pair of equal texts."""
    if query.strip() == passage.strip():
        raw.dropped[IDENTICAL] += 1
        return
    yield Row(query, passage, lang=lang)
    if both:
        yield Row(passage, query, lang=passage_lang or lang)


def sts(raw: RawRows, *, threshold: float, scale: Sequence[float]) -> Iterator[Row]:
    """Yield every pair of at least the threshold's similarity in both directions; ``scale`` is mapped to 0 and 5."""
    lowest, highest = scale
    for _, row in raw:
        score = row.pop("score")
        try:
            # Scores of csv files are texts.
            similarity = (float(score) - lowest) / (highest - lowest)
        except (TypeError, ValueError):
            raise raw.refuse("score", f"holds {score!r}, which is not a number; correct it") from None
        # Nor is NaN on the scale.
        if not -_TOLERANCE <= similarity <= 1 + _TOLERANCE:
            raise raw.refuse("score", f"holds {score}, which is off the scale {list(scale)}; correct 'scale'")
        if 5 * similarity < threshold - _TOLERANCE:
            raw.dropped["score is below the threshold"] += 1
        else:
            yield from _directed(raw, True, **row)


def duplicates(raw: RawRows, *, duplicate_label: Any, both_directions: bool) -> Iterator[Row]:
    """Yield every pair with the label of duplicates, or every pair if no column ``label`` is named."""
    for _, row in raw:
        label = row.pop("label")
        if "label" in raw.columns and (label is None or _label_text(label) != _label_text(duplicate_label)):
            raw.dropped[f"label is not {duplicate_label}"] += 1
        else:
            yield from _directed(raw, both_directions, **row)


def duplicate_groups(raw: RawRows, *, both_directions: bool) -> Iterator[Row]:
    """Yield for every text of a group but the last one a row with the next text; all pairs would be too many."""
    for _, row in raw:
        group = row["group"]
        if not isinstance(group, list) or not all(text is None or is_text(text) for text in group):
            raw.dropped[raw.not_text("group", group, "a list of texts")] += 1
            continue
        texts = list(dict.fromkeys(text for text in group if text and text.strip()))
        if len(texts) < 2:
            raw.dropped["group has fewer than two different texts"] += 1
        for query, passage in pairwise(texts):
            yield from _directed(raw, both_directions, query, passage, row["lang"])


def nli(raw: RawRows, *, labels: Mapping[Any, str | None], num_negatives: int) -> Iterator[Row]:
    """Yield one row per premise and entailed hypothesis, with its other hypotheses as the first negatives."""
    # All rows are in memory: the hypotheses of a premise may be far apart.
    meanings = {_label_text(label): meaning for label, meaning in labels.items()}
    # Hypotheses by premise and by label; dicts keep them distinct and in order.
    grouped: dict[tuple[str, str | None], dict[str, dict[str, None]]] = {}
    for _, row in raw:
        label = _meaning(raw, row["label"], meanings, "labels")
        premise, hypothesis = row["premise"], row["hypothesis"]
        if label == "entailment" and premise.strip() == hypothesis.strip():
            raw.dropped[IDENTICAL] += 1
        elif label is not None:
            hypotheses = grouped.setdefault((premise, row["lang"]), {known: {} for known in _NLI_LABELS})
            raw.dropped["row is repeated"] += hypothesis in hypotheses[label]
            hypotheses[label][hypothesis] = None

    for (premise, lang), hypotheses in grouped.items():
        entailed = hypotheses["entailment"]
        if not entailed:
            raw.dropped["premise entails no hypothesis"] += 1
            continue
        # What is contradicted is certainly wrong: it comes first. Annotators may disagree about a hypothesis.
        others = hypotheses["contradiction"] | hypotheses["neutral"]
        right = {normalise(text) for text in (*entailed, premise)}
        negatives = [text for text in others if normalise(text) not in right]
        reason = "hypothesis is labelled entailed, or is the premise, and cannot be a negative"
        raw.dropped[reason] += len(others) - len(negatives)
        for hypothesis in entailed:
            yield Row(premise, hypothesis, negatives[:num_negatives], lang)


def two_way(raw: RawRows, *, label_texts: Mapping[Any, str | None]) -> Iterator[Row]:
    """Yield every text with the text of its label and that of the other one; a label of None leaves out a row."""
    meanings = {_label_text(label): text for label, text in label_texts.items()}
    first, second = dict.fromkeys(text for text in label_texts.values() if text is not None)
    for _, row in raw:
        own = _meaning(raw, row["label"], meanings, "label_texts")
        if own is not None:
            yield Row(row["text"], own, (second if own == first else first,), row["lang"])


def labelled(raw: RawRows, *, num_negatives: int) -> Iterator[Row]:
    """Yield every text, all of them in memory, with drawn texts of its class and, as negatives, of other classes."""
    # By normal form: text, number of the raw row, class and language.
    found: dict[str, tuple[str, int, int, str | None]] = {}
    ambiguous: set[str] = set()
    class_numbers: dict[str, int] = {}
    for number, row in raw:
        if not _is_label(row["label"]):
            raise raw.refuse("label", f"holds {str(row['label'])[:100]!r}, which is neither text nor number")
        own = class_numbers.setdefault(_label_text(row["label"]), len(class_numbers))
        form = normalise(row["text"])
        if form not in found:
            found[form] = (row["text"], number, own, row["lang"])
        elif found[form][2] == own:
            raw.dropped["text is repeated"] += 1
        else:
            raw.dropped["text has several labels"] += 1 + (form not in ambiguous)
            ambiguous.add(form)
    # A class is contiguous in this order, so the other classes are what comes before and after it.
    kept = sorted((each for form, each in found.items() if form not in ambiguous), key=lambda each: each[2])
    numbers, classes = (np.array([each[column] for each in kept], dtype=np.int64) for column in (1, 2))
    starts, size = np.searchsorted(classes, classes), np.bincount(classes)[classes]
    alone, few = size < 2, len(kept) - size < num_negatives
    raw.dropped["class has no other text"] += int(alone.sum())
    raw.dropped[f"other classes have fewer than {num_negatives} texts"] += int((few & ~alone).sum())
    wanted = np.flatnonzero(~alone & ~few)
    wanted = wanted[np.argsort(numbers[wanted])]
    for rows in np.split(wanted, range(_CHUNK_ROWS, len(wanted), _CHUNK_ROWS)):
        own, start = size[rows], starts[rows]
        keys = [text_key(f"labelled {purpose}") for purpose in ("passage", "negatives")]
        keys = [keyed_bits(raw.seed, purpose, text_key(raw.name), numbers[rows]) for purpose in keys]
        passage = distinct_below(keys[0], own - 1, 1)[:, 0] + start
        passage += passage >= rows
        negatives = distinct_below(keys[1], len(kept) - own, num_negatives)
        negatives += np.where(negatives >= start[:, None], own[:, None], 0)
        for row, other, others in zip(rows.tolist(), passage.tolist(), negatives.tolist(), strict=True):
            yield Row(kept[row][0], kept[other][0], [kept[negative][0] for negative in others], kept[row][3])


def distinct_below(keys: NDArray[np.uint64], bounds: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Draw for each key ``count`` different integers from 0 up to its bound, all choices and orders equally likely.

    Keys and bounds (exclusive, at least ``count``) have shape (rows,), the result (rows, count).
    """
    # Floyd's algorithm for all rows at once (Bentley, "Programming pearls: a sample of brilliance", 1987).
    drawn = np.empty((len(keys), count), dtype=np.int64)
    for column in range(count):
        last = bounds - count + column
        draw = (keyed_bits(keys, column) % (last + 1).astype(np.uint64)).astype(np.int64)
        taken = (drawn[:, :column] == draw[:, None]).any(axis=1)
        drawn[:, column] = np.where(taken, last, draw)
    # The algorithm puts high integers last.
    order = np.argsort(keyed_bits(keys[:, None], count + np.arange(count)), axis=1, kind="stable")
    return np.take_along_axis(drawn, order, axis=1)


def _is_label(value: Any) -> bool:
    return isinstance(value, (str, bool, int, float))


def _label_text(value: Any) -> str:
    """Return one spelling of a label: 1, 1.0, true and the texts of csv files "1", "1.0" and "true" are the same."""
    text = {"true": "1", "false": "0"}.get(str(value).lower(), str(value))
    return re.sub(r"^(-?[0-9]+)\.0+$", r"\1", text)


def _meaning(raw: RawRows, label: Any, meanings: Mapping[str, str | None], key: str) -> str | None:
    """Return the meaning of a raw row's label, or None, and count the row, if it is to be left out."""
    # Many data sets mark rows without a label with -1.
    name = _label_text(label)
    if name not in meanings and name != "-1":
        raise raw.refuse("label", f"holds the unknown label {label!r}; add it to {key!r}, null to leave it out")
    if meanings.get(name) is None:
        raw.dropped[f"label is {name}"] += 1
    return meanings.get(name)


def is_filled(value: Any) -> bool:
    """Return whether a value is a text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def _is_scale(value: Any) -> bool:
    return isinstance(value, list) and len({*value}) == len(value) == 2 and {*map(type, value)} <= {int, float}


def _are_nli_labels(value: Any) -> bool:
    meanings = list(value.values()) if isinstance(value, dict) else []
    return "entailment" in meanings and all(meaning in (*_NLI_LABELS, None) for meaning in meanings)


def _are_label_texts(value: Any) -> bool:
    texts = [text for text in value.values() if text is not None] if isinstance(value, dict) else []
    return all(map(is_filled, texts)) and len({*texts}) == len({*map(normalise, texts)}) == 2


TEXT = Key("a text", is_filled)
NUMBER = Key("a number of at least 1", lambda value: type(value) is int and value >= 1)
FLAG = Key("true or false", lambda value: isinstance(value, bool))
_LABELS = Key(
    f"a mapping of labels to {', '.join(_NLI_LABELS)} or null, with entailment among them",
    _are_nli_labels,
    {label: label for label in _NLI_LABELS},
)
_LABEL_TEXTS = Key("a mapping of labels to two different texts, such as {0: no, 1: yes}", _are_label_texts)
_THRESHOLD = Key("a number from 0 to 5", lambda value: type(value) in (int, float) and 0 <= value <= 5, 4)
_SCALE = Key("a list of the lowest and the highest score, such as [0, 1]", _is_scale, [0, 5])
_LABEL = Key("a text, a number or a truth value", _is_label, 1)
_BOTH, _NEGATIVES = {"both_directions": FLAG._replace(default=False)}, {"num_negatives": NUMBER._replace(default=24)}
_PAIR, _LANGS, _LABELLED = ("query", "passage"), ("lang", "passage_lang"), (("text",), ("label",))
_STS, _DUPLICATES = {"threshold": _THRESHOLD, "scale": _SCALE}, {"duplicate_label": _LABEL, **_BOTH}
_RETRIEVAL = "retrieval"
_EXAMPLE_LISTS = tuple(f"{role}{part}" for role in ("passage", "negative") for part in ("", "_id", "_score"))

FORMATS = {
    "examples": Format(
        *(examples, _RETRIEVAL), optional=("query", "prompt", "lang"), lists=_EXAMPLE_LISTS, held_out_by="query"
    ),
    "similarity": Format(
        *(similarity, "similarity"),
        optional=(*_PAIR, "score", "lang"),
        symmetric=True,
        more=("score",),
        held_out_by="query",
    ),
    "pairs": Format(pairs, _RETRIEVAL, _PAIR, optional=_LANGS, keys=_BOTH),
    "summaries": Format(pairs, _RETRIEVAL, ("summary", "article")),
    "nli": Format(
        *(nli, _RETRIEVAL, ("premise", "hypothesis"), ("label",)),
        keys={"labels": _LABELS, **_NEGATIVES},
        held_out_by="premise",
    ),
    "sts": Format(sts, _RETRIEVAL, _PAIR, ("score",), _LANGS, symmetric=True, keys=_STS),
    "duplicates": Format(duplicates, _RETRIEVAL, _PAIR, optional=("label", *_LANGS), symmetric=True, keys=_DUPLICATES),
    "duplicate_groups": Format(duplicate_groups, _RETRIEVAL, values=("group",), symmetric=True, keys=_BOTH),
    "labelled": Format(labelled, "clustering", *_LABELLED, symmetric=True, keys=_NEGATIVES, held_out_by="text"),
    "two_way": Format(two_way, "classification", *_LABELLED, num_negatives=1, keys={"label_texts": _LABEL_TEXTS}),
}
