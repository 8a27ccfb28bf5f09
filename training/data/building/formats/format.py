"""What every format is made of: the rows it yields, the columns it reads and the keys of a build file it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from training.data.building.raw import RawRows

# The default of a key that has none.
REQUIRED: Any = object()


class Row(NamedTuple):
    """One row of the published format.

    Attributes:
        query: The text that looks for another.
        passage: The text it shall find.
        negatives: Texts it shall not find, the hardest first; mining adds what is missing.
        lang: The language of the query, if it is known.
    """

    query: str
    passage: str
    negatives: Sequence[str] = ()
    lang: str | None = None


class Key(NamedTuple):
    """One key of a build file.

    Attributes:
        expected: What a value must be, as an error says it.
        fits: Whether a value is that.
        default: The value if none is given, or ``REQUIRED``.
    """

    expected: str
    fits: Callable[[Any], bool]
    default: Any = REQUIRED


@dataclass(frozen=True)
class Format:
    """One kind of raw data.

    Attributes:
        rows: Given :class:`RawRows` and a value for each of ``keys``, yields the rows; what it leaves out it counts.
        task_type: How the rows are trained on: retrieval, clustering or classification.
        texts: Columns of text that every raw row must have.
        values: Columns of anything else that every raw row must have.
        optional: Columns that need not be named, nor filled in every raw row.
        symmetric: Whether query and passage are of one kind, unless the build file says otherwise.
        num_negatives: Negatives of a row, where no key says so.
        keys: The keys that this format takes besides those of every source.
    """

    rows: Callable[..., Iterator[Row]]
    task_type: str
    texts: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    optional: tuple[str, ...] = ("lang",)
    symmetric: bool = False
    num_negatives: int = 0
    keys: Mapping[str, Key] = field(default_factory=dict)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


BOTH_DIRECTIONS = Key("true or false", lambda value: isinstance(value, bool), False)
NUM_NEGATIVES = Key("a number of at least 1", _is_count, 24)


def directed(
    raw: RawRows,
    query: str,
    passage: str,
    *,
    both_directions: bool = False,
    lang: str | None = None,
    passage_lang: str | None = None,
) -> Iterator[Row]:
    """Yields a pair as one row, or as two that look for each other; a pair of one text is counted and left out.

    Args:
        raw: Where the pair comes from; it counts what is left out.
        query: A text.
        passage: Another.
        both_directions: Whether the passage looks for the query, too.
        lang: The language of the query.
        passage_lang: The language of the passage, that of the query if None.
    """
    if query.strip() == passage.strip():
        raw.dropped["query and passage are identical"] += 1
        return
    yield Row(query, passage, lang=lang)
    if both_directions:
        yield Row(passage, query, lang=passage_lang or lang)
