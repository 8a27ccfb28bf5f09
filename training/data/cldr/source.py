"""What every CLDR source is built with: the published format, and the pools that negatives come from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.data.cldr.draws import grouped
from training.data.cldr.names import KINDS, CldrNames

logger = logging.getLogger(__name__)

Rows = NDArray[np.intp]

NO_ROWS = np.empty(0, dtype=np.intp)


@dataclass(frozen=True, eq=False)
class Source:
    """One source in the published format, and what the manifest says about it.

    Attributes:
        name: The name of the source and of its file.
        task_type: retrieval, clustering or classification.
        symmetric: Whether query and passage are texts of one sort, so that either takes the instruction.
        instruction: What to do with a query.
        languages: The ISO 639-3 codes of its texts, sorted.
        table: String columns query, passage, negative_1 to negative_n and lang.
        dropped: The number of rows left out: for want of a passage or of negatives, or to balance labels.
    """

    name: str
    task_type: str
    symmetric: bool
    instruction: str
    languages: tuple[str, ...]
    table: pa.Table
    dropped: int


def source_of(
    names: CldrNames,
    name: str,
    task_type: str,
    symmetric: bool,
    instruction: str,
    query: Rows,
    passage: Rows,
    negatives: NDArray[np.intp],
) -> Source:
    """Assembles a source from rows of ``names``, leaving out what lacks a passage or negatives.

    Rows whose query and passage are the same text ("Togo" in Finnish and in English) are left out too: they teach
    nothing.

    Args:
        names: All names.
        name: The name of the source.
        task_type: retrieval, clustering or classification.
        symmetric: Whether query and passage are texts of one sort.
        instruction: What to do with a query.
        query: Rows of ``names``, shape (rows,).
        passage: Rows of ``names`` or -1, shape (rows,).
        negatives: Rows of ``names``, shape (rows, negatives); -1 throughout where there are too few.
    """
    paired = (passage >= 0) & (names.text_id[query] != names.text_id[passage])
    complete = negatives[:, 0] >= 0
    kept = paired & complete
    logger.info(
        "%s: %d rows; dropped %d without a passage of different text and %d with fewer than %d possible negatives",
        name,
        kept.sum(),
        (~paired).sum(),
        (paired & ~complete).sum(),
        negatives.shape[1],
    )
    query, passage, negatives = query[kept], passage[kept], negatives[kept]
    texts = texts_of(names)
    columns = {"query": texts.take(pa.array(query)), "passage": texts.take(pa.array(passage))}
    for position, column in enumerate(negatives.T, start=1):
        columns[f"negative_{position}"] = texts.take(pa.array(column))
    columns["lang"] = pa.array(names.codes).take(pa.array(names.language[query]))
    languages = codes_of(names, np.concatenate((query, passage)))
    return Source(name, task_type, symmetric, instruction, languages, pa.table(columns), int((~kept).sum()))


def same_and_other_kinds(names: CldrNames, rows: Rows) -> Callable[[int], tuple[Rows, Rows]]:
    """Returns the pools of group ``language * len(KINDS) + kind``: the language's names of that kind, and its others.

    Args:
        names: All names.
        rows: The rows of ``names`` to divide.
    """
    by_group = dict(grouped(names.language[rows] * len(KINDS) + names.kind[rows], rows))

    def pools(group: int) -> tuple[Rows, Rows]:
        start = group - group % len(KINDS)
        others = [by_group.get(other, NO_ROWS) for other in range(start, start + len(KINDS)) if other != group]
        return by_group.get(group, NO_ROWS), np.concatenate(others)

    return pools


def any_item(row: Rows, item: Rows) -> NDArray[np.bool_]:
    """Allows every item, where the pools themselves hold no wrong one."""
    return np.ones(item.shape, dtype=bool)


def texts_of(names: CldrNames) -> pa.Array:
    """Returns the texts of all rows of ``names``."""
    return pa.array(names.texts, type=pa.string())


def codes_of(names: CldrNames, rows: Rows) -> tuple[str, ...]:
    """Returns the sorted ISO 639-3 codes of the languages of the given rows."""
    return tuple(sorted({names.codes[language] for language in np.unique(names.language[rows]).tolist()}))
