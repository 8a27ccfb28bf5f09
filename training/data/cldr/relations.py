"""Training sources made of facts about territories: the currency used there, a language official there."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from babel.core import get_global
from numpy.typing import NDArray

from training.common.languages import macrolanguage
from training.data.cldr.draws import draw_distinct, for_purpose, grouped
from training.data.cldr.names import CldrNames
from training.data.cldr.source import NO_ROWS, Rows, Source, source_of

_OFFICIAL = ("official", "de_facto_official")
# "Multiple languages", "unknown language" and "no linguistic content" are no answer, not even a wrong one.
_NO_LANGUAGES = frozenset({"mul", "und", "zxx"})


def territory_currency(names: CldrNames, rows: Rows, num_negatives: int) -> Source:
    """Pairs a territory with its legal tender of today, both named in one language; the negatives are no tender there.

    Args:
        names: All names.
        rows: The rows of ``names`` that may appear in training.
        num_negatives: Negatives a row.
    """
    tender: dict[str, set[str]] = {}
    current: dict[str, set[str]] = {}
    once_tender: set[str] = set()
    for territory, currencies in get_global("territory_currencies").items():
        tender[territory] = {code for code, _, end, is_tender in currencies if end is None and is_tender}
        current[territory] = {code for code, _, end, _ in currencies if end is None}
        once_tender |= {code for code, _, _, is_tender in currencies if is_tender}
    # Metals, funds, units of account, "testing currency code": nobody would take them for the money of a place.
    no_money = frozenset(code for kind, code in names.concepts if kind == "currency") - once_tender
    return _related(
        names,
        rows,
        num_negatives,
        "cldr_territory_currency",
        "Retrieve the territory's currency.",
        "currency",
        answers=tender,
        true_of=current,
        excluded=no_money,
    )


def territory_language(names: CldrNames, rows: Rows, num_negatives: int) -> Source:
    """Pairs a territory with an official language, both named in one language; the negatives are not spoken there.

    Args:
        names: All names.
        rows: The rows of ``names`` that may appear in training.
        num_negatives: Negatives a row.
    """
    official: dict[str, set[str]] = {}
    spoken: dict[str, set[str]] = {}
    # CLDR counts speakers of Dari under "fa" and names it "fa_AF": what is one macrolanguage is spoken as one.
    members: dict[str, set[str]] = {}
    for kind, code in names.concepts:
        if kind == "language":
            members.setdefault(macrolanguage(code), set()).add(code)
    for territory, languages in get_global("territory_languages").items():
        official[territory] = {
            code.split("_")[0] for code, facts in languages.items() if facts["official_status"] in _OFFICIAL
        }
        spoken[territory] = set().union(*(members.get(macrolanguage(code), set()) for code in languages))
    return _related(
        names,
        rows,
        num_negatives,
        "cldr_territory_language",
        "Retrieve an official language.",
        "language",
        answers=official,
        true_of=spoken,
        excluded=_NO_LANGUAGES,
    )


def _related(
    names: CldrNames,
    rows: Rows,
    num_negatives: int,
    name: str,
    instruction: str,
    kind: str,
    *,
    answers: Mapping[str, set[str]],
    true_of: Mapping[str, set[str]],
    excluded: frozenset[str],
) -> Source:
    """Pairs territories with what holds of them.

    Args:
        names: All names.
        rows: The rows of ``names`` that may appear in training.
        num_negatives: Negatives a row.
        name: The name of the source.
        instruction: What to do with a query.
        kind: The kind of the answers.
        answers: Territory code -> codes that a passage may name.
        true_of: Territory code -> codes that no negative may name.
        excluded: Codes that no negative of any territory may name.
    """
    answer = _as_matrix(names, kind, answers)
    barred = _as_matrix(names, kind, true_of) | answer
    # What may be meant by the query, and what may be meant by the negative: no pair of these may hold.
    confusable = names.confusable.astype(np.float32)
    barred = confusable @ barred.astype(np.float32) @ confusable > 0
    is_answer = answer.any(axis=0)
    is_other = np.array([of == kind and code not in excluded for of, code in names.concepts]) & ~is_answer

    query = rows[answer.any(axis=1)[names.concept[rows]]]
    answers_in = _by_language(names, rows[is_answer[names.concept[rows]]])
    others_in = _by_language(names, rows[is_other[names.concept[rows]]])
    language = names.language[query]
    passage = draw_distinct(
        for_purpose(names.draw_key[query], f"{name} passage"),
        language,
        lambda own: (answers_in.get(own, NO_ROWS), NO_ROWS),
        names.text_id,
        1,
        lambda row, item: answer[names.concept[query[row]], names.concept[item]],
    )[:, 0]
    negatives = draw_distinct(
        for_purpose(names.draw_key[query], f"{name} negatives"),
        language,
        lambda own: (answers_in.get(own, NO_ROWS), others_in.get(own, NO_ROWS)),
        names.text_id,
        num_negatives,
        lambda row, item: ~barred[names.concept[query[row]], names.concept[item]],
    )
    return source_of(names, name, "retrieval", False, instruction, query, passage, negatives)


def _as_matrix(names: CldrNames, kind: str, facts: Mapping[str, set[str]]) -> NDArray[np.bool_]:
    """Returns which concept (column) is among the facts of which territory (row), shape (concepts, concepts)."""
    index = {concept: position for position, concept in enumerate(names.concepts)}
    matrix = np.zeros((len(index), len(index)), dtype=bool)
    for territory, codes in facts.items():
        columns = [index[kind, code] for code in codes if (kind, code) in index]
        if ("territory", territory) in index:
            matrix[index["territory", territory], columns] = True
    return matrix


def _by_language(names: CldrNames, rows: Rows) -> dict[int, Rows]:
    return dict(grouped(names.language[rows], rows))
