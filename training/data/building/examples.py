"""Rows of a query with any number of passages and negatives, and graded pairs: values as texts, queries joined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any, NamedTuple

import numpy as np

from training.common.errors import UserError
from training.common.keyed import text_key
from training.data.building.reader import HELD_OUT_TEXT, RawRows, as_text
from training.data.cleaning.normalise import normalise
from training.data.instructions import with_instruction, without_instruction

IDENTICAL = "query and passage are identical"
# Keys of a passage or negative that is an object.
_DOCUMENT_TEXTS = ("text", "contents", "content", "body", "passage")
_DOCUMENT_IDS = ("docid", "doc_id", "_id", "id", "pid")
_REMEDY = "fill it in, drop the row, or leave out such rows with 'on_bad_row: quarantine'"


class Row(NamedTuple):
    """One row of the published format."""

    query: str
    passage: str
    negatives: Sequence[str] = ()  # the hardest first; mining adds missing ones
    lang: str | None = None  # of the query
    positives: Sequence[str] = ()  # further passages of the query
    more: Mapping[str, Any] = {}  # values of further columns, such as passage_id


class Document(NamedTuple):
    """A passage or a negative of a query, with its id and its relevance, if the data has them."""

    text: str
    id: str | None = None
    score: float | None = None


def examples(raw: RawRows) -> Iterator[Row]:
    """Yield one row per query with all its passages and negatives, which may be in any number of raw rows and lists."""
    keys = np.fromiter((text_key(example.query) for example in _examples(raw)), dtype=np.uint64)
    distinct, counts = np.unique(keys, return_counts=True)
    repeated = {*distinct[counts > 1].tolist()}
    # Only queries of several raw rows are in memory.
    joined: dict[str, _Example] = {}
    for example in _examples(raw):
        if text_key(example.query) not in repeated:
            yield from _joined_row(raw, example)
            continue
        first = joined.setdefault(example.query, example)
        if first is not example:
            first.positives.extend(example.positives)
            first.negatives.extend(example.negatives)
    for example in joined.values():
        yield from _joined_row(raw, example)


class _Example(NamedTuple):
    query: str
    lang: str | None
    positives: list[Document]
    negatives: list[Document]


def _examples(raw: RawRows) -> Iterator[_Example]:
    """Yield the raw rows with their values as texts; count faulty ones if they are to be left out."""
    for _, row in raw:
        try:
            query, prompt, lang = (_one_text(raw, role, row[role]) for role in ("query", "prompt", "lang"))
            if query is None:
                raise raw.refuse("query", f"is empty; {_REMEDY}")
            positives, negatives = (_documents(raw, role, row) for role in ("passage", "negative"))
            if not positives:
                raise raw.refuse("passage", f"holds no text; {_REMEDY}")
        except UserError:
            if not raw.quarantine:
                raise
            raw.dropped["row is faulty"] += 1
            continue
        yield _Example(query if prompt is None else with_instruction(prompt, query), lang, positives, negatives)


def _joined_row(raw: RawRows, example: _Example) -> Iterator[Row]:
    """Yield a query's row; leave out repeated documents, and negatives that are a passage or the query itself."""
    query = without_instruction(example.query)
    right, ids, kept = {normalise(query)}, set(), []
    for document in _distinct(example.positives):
        form = normalise(document.text)
        if document.text.strip() == query.strip():
            raw.dropped[IDENTICAL] += 1
        elif form in raw.held_out:
            raw.dropped[HELD_OUT_TEXT] += 1
        else:
            kept.append(document)
            right.add(form)
            ids |= {document.id} - {None}
    if not kept:
        return
    negatives = []
    for document in _distinct(example.negatives):
        form = normalise(document.text)
        if form in right or document.id in ids:
            raw.dropped["negative is a passage of the query, or the query itself"] += 1
        elif form in raw.held_out:
            raw.dropped[HELD_OUT_TEXT] += 1
        else:
            negatives.append(document)
    named = [("passage", kept[0])]
    named += [(f"positive_{number}", document) for number, document in enumerate(kept[1:], start=2)]
    named += [(f"negative_{number}", document) for number, document in enumerate(negatives, start=1)]
    more = {f"{name}_{what}": getattr(document, what) for name, document in named for what in ("id", "score")}
    yield Row(
        example.query,
        kept[0].text,
        [each.text for each in negatives],
        example.lang,
        [each.text for each in kept[1:]],
        {name: value for name, value in more.items() if value is not None},
    )


def _distinct(documents: Sequence[Document]) -> list[Document]:
    """Return the first document of each text and of each id."""
    seen: set[str | tuple[str]] = set()
    found = []
    for document in documents:
        keys = {document.text} | ({(document.id,)} if document.id is not None else set())
        if not keys & seen:
            found.append(document)
        seen |= keys
    return found


def _documents(raw: RawRows, role: str, row: Mapping[str, Any]) -> list[Document]:
    """Return the passages or negatives of a raw row: texts, or objects with a text, in columns and in lists."""
    names, given = (role, f"{role}_id", f"{role}_score"), []
    for values, *others in zip_longest(*(row[name] for name in names), fillvalue=()):
        for name, other in zip(names[1:], others, strict=True):
            if len(other) not in (0, len(values)) and any(value is not None for value in other):
                raise raw.refuse(name, f"has {len(other)} values for {len(values)} texts; give one for each")
        given += islice(zip_longest(values, *others), len(values))
    found = []
    for value, document_id, score in given:
        title = None
        if isinstance(value, dict):
            title, score = value.get("title"), value.get("score", score)
            document_id = next((value[key] for key in _DOCUMENT_IDS if value.get(key) is not None), document_id)
            text_keys = [key for key in _DOCUMENT_TEXTS if key in value]
            if not text_keys:
                what = f"holds an object of {', '.join(value) or 'nothing'}"
                raise raw.refuse(role, f"{what}; its text must be named {' or '.join(_DOCUMENT_TEXTS)}")
            value = value[text_keys[0]]
        texts = [_one_text(raw, role, each) for each in (title, value)]
        if text := " ".join(each for each in texts if each is not None):
            score = None if score is None else _number(raw, role, score)
            found.append(Document(text, None if document_id is None else str(document_id), score))
    return found


def _one_text(raw: RawRows, role: str, value: Any) -> str | None:
    """Return a value as text; None for a missing or blank one."""
    text = as_text(value)
    if text is None and value is not None:
        raise raw.refuse(role, f"holds {repr(value)[:100]}, which is not text; correct it")
    return text if text is not None and text.strip() else None


def similarity(raw: RawRows) -> Iterator[Row]:
    """Yield every pair with its score, of which only the order counts."""
    for _, row in raw:
        texts = [_one_text(raw, role, row[role]) for role in ("query", "passage")]
        for role, text in zip(("query", "passage"), texts, strict=True):
            if text is None:
                raise raw.refuse(role, f"is empty; {_REMEDY}")
        score = _number(raw, "score", row["score"])
        if not -1 <= score <= 5:
            raise raw.refuse("score", f"holds {score:g}, which is out of range; give numbers from -1 to 1 or 0 to 5")
        yield Row(*texts, lang=row["lang"], more={"score": score})


def _number(raw: RawRows, role: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not np.isfinite(number):
        raise raw.refuse(role, f"holds {value!r}, which is not a number; correct it")
    return number
