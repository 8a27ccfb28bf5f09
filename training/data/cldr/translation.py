"""Training sources of translation: a name and its English name, or its name in some other language."""

from __future__ import annotations

import numpy as np

from training.data.cldr.draws import draw_distinct, for_purpose, grouped
from training.data.cldr.names import KINDS, CldrNames
from training.data.cldr.source import NO_ROWS, Rows, Source, same_and_other_kinds, source_of


def translation(names: CldrNames, rows: Rows, num_negatives: int) -> Source:
    """Pairs every name with the English one; the negatives are English names, mostly of the same kind.

    Args:
        names: All names.
        rows: The rows of ``names`` that may appear in training.
        num_negatives: Negatives a row.
    """
    query = rows[~names.is_english[rows]]
    passage = names.english[names.concept[query]]
    english_kind = names.kind[names.english]
    negatives = draw_distinct(
        for_purpose(names.draw_key[query], "translation negatives"),
        names.kind[query],
        lambda kind: (names.english[english_kind == kind], names.english[english_kind != kind]),
        names.text_id,
        num_negatives,
        lambda row, item: ~names.confusable[names.concept[query[row]], names.concept[item]],
    )
    return source_of(
        names,
        "cldr_translation",
        "retrieval",
        True,
        "Retrieve the English name.",
        query,
        passage,
        negatives,
    )


def translation_pairs(names: CldrNames, rows: Rows, num_negatives: int) -> Source:
    """Pairs every name with the same concept's name in another language, drawn; the negatives are in that language.

    Args:
        names: All names.
        rows: The rows of ``names`` that may appear in training.
        num_negatives: Negatives a row.
    """
    # Pairs with English are the translation source.
    query = rows[~names.is_english[rows]]
    pool_of_concept = dict(grouped(names.concept[query], query))
    passage = draw_distinct(
        for_purpose(names.draw_key[query], "pairs passage"),
        names.concept[query],
        lambda concept: (pool_of_concept[concept], NO_ROWS),
        names.text_id,
        1,
        lambda row, item: names.text_id[query[row]] != names.text_id[item],
    )[:, 0]
    # Negatives repeat within a language: rows sorted by it compress to half the size.
    order = np.argsort(names.language[passage], kind="stable")
    query, passage = query[order], passage[order]
    negatives = draw_distinct(
        for_purpose(names.draw_key[query], "pairs negatives"),
        names.language[passage] * len(KINDS) + names.kind[passage],
        same_and_other_kinds(names, query),
        names.text_id,
        num_negatives,
        lambda row, item: ~names.confusable[names.concept[query[row]], names.concept[item]],
    )
    return source_of(
        names,
        "cldr_translation_pairs",
        "retrieval",
        True,
        "Retrieve the name in another language.",
        query,
        passage,
        negatives,
    )
