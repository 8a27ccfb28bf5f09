"""Raw rows by role, and examples: queries with any number of passages and negatives, joined, and graded pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Any, NamedTuple

import numpy as np

from training.common.errors import UserError
from training.common.keyed import text_key
from training.data.building.reader import RawData, as_text, is_text
from training.data.cleaning.normalise import normalise
from training.data.instructions import with_instruction, without_instruction

HELD_OUT_TEXT = "text is a held-out query"
IDENTICAL = "query and passage are identical"
# Keys of a passage or negative that is an object.
_DOCUMENT_TEXTS = ("text", "contents", "content", "body", "passage")
_DOCUMENT_IDS = ("docid", "doc_id", "_id", "id", "pid")
_REMEDY = "fill it in, drop the row, or leave out such rows with 'on_bad_row: quarantine'"


@dataclass
class RawRows:
    """Yields the number and the columns, by role, of each row that has all it must have; the others are counted."""

    data: RawData
    # By role: a name, a path such as "answers.text", or several; of a role of lists, None for a column that is missing.
    columns: Mapping[str, str | Sequence[str | None]]
    where: str  # the beginning of an error message
    texts: Sequence[str] = ()  # roles that must be texts, neither missing nor blank
    values: Sequence[str] = ()  # roles that must not be missing
    optional: Sequence[str] = ()  # roles that may be missing or not be among the columns; they are None then
    lists: Sequence[str] = ()  # roles of any number of columns; a list of the values of each, whatever these are
    name: str = ""  # of the source, for the keys of draws
    seed: int = 0  # of draws
    held_out: Container[str] = frozenset()  # normal forms of queries that no row may hold
    quarantine: bool = False  # leave out and count rows with a value of another type instead of text: no error
    dropped: Counter[str] = field(default_factory=Counter)  # rows left out in the last iteration, by reason

    def __post_init__(self) -> None:
        self._paths: dict[str, list[list[str]]] = {}
        for role, named in self.columns.items():
            for column in [named] if isinstance(named, str) else named:
                if column is None:
                    self._paths.setdefault(role, []).append([])
                    continue
                # The name of a column may contain dots.
                path = [column] if column in self.data.column_names else column.split(".")
                if path[0] not in self.data.column_names:
                    remedy = f"correct 'columns', the data has {', '.join(self.data.column_names)}"
                    raise UserError(f"{self.where}: there is no column {column!r} for {role!r}; {remedy}")
                self._paths.setdefault(role, []).append(path)
        self._text_roles = (*self.texts, "lang", "passage_lang")
        self._location = ""  # of the current row
        self._found: set[tuple[str, ...]] = set()  # paths with a value in any row

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        self.dropped.clear()
        read = [*dict.fromkeys(path[0] for paths in self._paths.values() for path in paths if path)]
        for number, (location, row) in enumerate(self.data.read(read)):
            self._location = location
            values = {role: self._value(role, row) for role in (*self.texts, *self.values, *self.optional)}
            fault = next(filter(None, (self._fault(*each) for each in values.items())), None)
            if fault is None and self.held_out and self._asks(values):
                fault = HELD_OUT_TEXT
            values |= {role: [self._listed(row, path) for path in self._paths.get(role, ())] for role in self.lists}
            if fault is None:
                yield number, values
            else:
                self.dropped[fault] += 1
        for role, paths in self._paths.items():
            for path in paths:
                if len(path) > 1 and tuple(path) not in self._found:
                    fault = f"no row has a column {'.'.join(path)!r} for {role!r}; correct 'columns'"
                    raise UserError(f"{self.where}: {fault}")

    def refuse(self, role: str, fault: str) -> UserError:
        """Return the error for a faulty column of the current row; ``fault`` says what to do."""
        named = self.columns.get(role, role)
        names = " or ".join(repr(name) for name in ([named] if isinstance(named, str) else named) if name is not None)
        # The place of a row of JSON names its file.
        place = self._location if self._location.startswith(self.where) else f"{self.where}: {self._location}"
        return UserError(f"{place}, column {names} ({role}) {fault}")

    def not_text(self, role: str, value: Any, expected: str = "text") -> str:
        """Return the reason to count for a row with a value that is not text, or raise if such rows are errors."""
        if self.quarantine:
            return f"{role} is not text"
        remedy = "correct the row, name another column, or leave such rows out with 'on_bad_row: quarantine'"
        raise self.refuse(role, f"holds {repr(value)[:100]}, which is not {expected}; {remedy}")

    def _value(self, role: str, row: Mapping[str, Any]) -> Any:
        """Return the value of a role; several texts are joined, and one that is not text is returned alone."""
        paths = self._paths.get(role, ())
        found = [walk(row, path) for path in paths]
        self._found |= {tuple(path) for path, part in zip(paths, found, strict=True) if part is not None}
        if role in self._text_roles:
            found = map(_first, found)
        parts = [part for part in found if part is not None]
        wrong = [part for part in parts if not isinstance(part, str)]
        if wrong or len(parts) < 2:
            return next(iter([*wrong, *parts]), None)
        return "\n".join(text for text in parts if text.strip())

    def _asks(self, values: Mapping[str, Any]) -> bool:
        """Return whether a text of the current row is a held-out query."""
        texts = (as_text(values[role]) for role in (*self.texts, *self.optional))
        return any(text_form(text) in self.held_out for text in texts if text)

    def _listed(self, row: Mapping[str, Any], path: list[str]) -> list[Any]:
        """Return all values at the end of a path."""
        found = flat(_walk_lists(row, path)) if path else []
        if len(path) > 1 and any(value is not None for value in found):
            self._found.add(tuple(path))
        return found

    def _fault(self, role: str, value: Any) -> str | None:
        """Return why the current row is left out because of a value, if it is."""
        if value is None or (role not in self.texts and value == ""):
            return None if role in self.optional else f"{role} is missing"
        if role in self._text_roles and not is_text(value):
            return self.not_text(role, value)
        return f"{role} is blank" if role in self.texts and not value.strip() else None


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


def text_form(text: str) -> str:
    """Return the normal form of a query, the same with and without an instruction."""
    return normalise(without_instruction(text))


def flat(value: Any) -> list[Any]:
    """Return the values of a nested list, or a value alone."""
    return [found for each in value for found in flat(each)] if isinstance(value, list) else [value]


def _walk_lists(value: Any, path: Sequence[str]) -> Any:
    """Return what is at the end of a path, of every item where there is a list on the way."""
    if isinstance(value, list):
        return [_walk_lists(each, path) for each in value]
    if not path or value is None:
        return value
    return _walk_lists(value.get(path[0]), path[1:]) if isinstance(value, dict) else {f"without {path[0]}": value}


def _first(value: Any) -> Any:
    """Return the first item of a nested list, or None of an empty one."""
    while isinstance(value, list):
        value = value[0] if value else None
    return value


def walk(value: Any, path: Sequence[str]) -> Any:
    """Return the value at the end of a path; of what has no such parts, a value that is refused as text."""
    for step in path:
        value = _first(value)
        if value is None:
            return None
        if not isinstance(value, dict):
            return {f"without {step}": value}
        value = value.get(step)
    return value
