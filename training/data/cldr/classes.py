"""Training sources of classes of names: their kind, their language, and whether they name a territory."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa

from training.data.cldr.draws import draw_distinct, for_purpose, grouped
from training.data.cldr.names import KINDS, CldrNames
from training.data.cldr.source import (
    NO_ROWS,
    Rows,
    Source,
    any_item,
    codes_of,
    same_and_other_kinds,
    source_of,
    texts_of,
)

logger = logging.getLogger(__name__)

IS_TERRITORY = "a country or territory"
IS_NOT_TERRITORY = "not a country or territory"
# Codes that CLDR keeps among the territories for what is none: unions, and regions unknown or left over.
_NO_TERRITORIES = frozenset({"EU", "EZ", "QO", "UN", "ZZ"})


def kind(names: CldrNames, rows: Rows, num_negatives: int) -> Source:
    """Pairs every name with one of the same kind and language; the negatives are that language's names of other kinds.

    Args:
        names: All names.
        rows: The rows of ``names`` that may appear in training.
        num_negatives: Negatives a row.
    """
    # A text that names both a language and its script has no kind of its own to be told by.
    query = rows[names.kinds_named[rows] == 1 << names.kind[rows]]
    pools = same_and_other_kinds(names, query)
    groups = names.language[query] * len(KINDS) + names.kind[query]
    passage = draw_distinct(
        for_purpose(names.draw_key[query], "kind passage"),
        groups,
        lambda group: (pools(group)[0], NO_ROWS),
        names.text_id,
        1,
        lambda row, item: names.text_id[query[row]] != names.text_id[item],
    )[:, 0]
    negatives = draw_distinct(
        for_purpose(names.draw_key[query], "kind negatives"),
        groups,
        lambda group: (pools(group)[1], NO_ROWS),
        names.text_id,
        num_negatives,
        any_item,
    )
    return source_of(
        names,
        "cldr_kind",
        "clustering",
        True,
        "Identify whether a name is that of a territory, a language, a script or a currency.",
        query,
        passage,
        negatives,
    )


def same_language(names: CldrNames, rows: Rows, num_negatives: int) -> Source:
    """Pairs every name with one in the same language; the negatives are in others, mostly of the same script.

    Args:
        names: All names.
        rows: The rows of ``names`` that may appear in training.
        num_negatives: Negatives a row.
    """
    # A text found in two languages belongs to neither class, be it as query, passage or negative.
    query = rows[names.languages_naming[rows] == 1]
    language = names.language[query]
    scripts = np.array(names.scripts)

    def other_languages(own: int) -> tuple[Rows, Rows]:
        same_script = scripts[language] == scripts[own]
        return query[same_script & (language != own)], query[~same_script]

    pool_of_language = dict(grouped(language, query))
    passage = draw_distinct(
        for_purpose(names.draw_key[query], "same language passage"),
        language,
        lambda own: (pool_of_language[own], NO_ROWS),
        names.text_id,
        1,
        lambda row, item: names.text_id[query[row]] != names.text_id[item],
    )[:, 0]
    negatives = draw_distinct(
        for_purpose(names.draw_key[query], "same language negatives"),
        language,
        other_languages,
        names.text_id,
        num_negatives,
        any_item,
    )
    return source_of(
        names,
        "cldr_same_language",
        "clustering",
        True,
        "Identify the language a name is written in.",
        query,
        passage,
        negatives,
    )


def is_territory(names: CldrNames, rows: Rows) -> Source:
    """Labels names as a country's or territory's or not, as many of the one as of the other in each language.

    Args:
        names: All names.
        rows: The rows of ``names`` that may appear in training.
    """
    territory_bit = 1 << KINDS.index("territory")
    # Continents and the like (numeric codes) would be arguable either way: they take no part.
    place = np.array(
        [kind == "territory" and code.isalpha() and code not in _NO_TERRITORIES for kind, code in names.concepts]
    )
    label = np.full(len(names.texts), -1, dtype=np.intp)
    label[(names.kinds_named == territory_bit) & place[names.concept]] = 1
    label[names.kinds_named & territory_bit == 0] = 0

    draw = for_purpose(names.draw_key, "is territory")
    chosen = []
    for _, members in grouped(names.language[rows], rows):
        sides = [members[label[members] == side] for side in (0, 1)]
        size = min(map(len, sides))
        chosen.extend(side[np.argsort(draw[side], kind="stable")[:size]] for side in sides)
    query = np.sort(np.concatenate(chosen))
    logger.info(
        "cldr_is_territory: %d rows; left out %d that are ambiguous or would unbalance a language",
        len(query),
        len(rows) - len(query),
    )
    labels = pa.array([IS_NOT_TERRITORY, IS_TERRITORY])
    return Source(
        name="cldr_is_territory",
        task_type="classification",
        symmetric=False,
        instruction="Is this a country or territory?",
        languages=codes_of(names, query),
        table=pa.table(
            {
                "query": texts_of(names).take(pa.array(query)),
                "passage": labels.take(pa.array(label[query])),
                "negative_1": labels.take(pa.array(1 - label[query])),
                "lang": pa.array(names.codes).take(pa.array(names.language[query])),
            }
        ),
        dropped=len(rows) - len(query),
    )
