"""Bitexts among pairs: each text with its passage, and the texts of two languages that share a passage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from training.common.keyed import text_key
from training.evaluation.local.pair_file import PairRows

# Fewer pairs would be found by chance.
LEAST_SHARED = 10

# Of each subset its languages, and its pairs: no text stands twice on one side.
Bitext = dict[str, tuple[tuple[str, ...], dict[str, str]]]


def with_passages(rows: PairRows) -> Bitext:
    """Each query with its passage, by the language of the queries or, if known, by both languages.

    Without any language there is one subset, ``default``.
    """
    count = len(rows.queries)
    sources = rows.languages or [None] * count
    targets = rows.passage_languages or [None] * count
    found: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    for source, target, query, passage in zip(sources, targets, rows.queries, rows.passages, strict=True):
        found[tuple(code for code in (source, target) if code is not None)].append((query, passage))
    return {_subset(codes): (tuple(dict.fromkeys(codes)), dict(_one_to_one(pairs))) for codes, pairs in found.items()}


def any_to_any(rows: PairRows) -> Bitext:
    """Texts of two languages that have one passage in common, which is in a third.

    Not all languages with all others: in an order drawn by key, and closed to a ring, each one with the next that
    shares at least ``LEAST_SHARED`` passages with it. So most languages are in two subsets, and no choice is made of
    which languages are near to which.

    Returns:
        The subsets; none if a file does not tell the languages of both sides.
    """
    if rows.languages is None or rows.passage_languages is None:
        return {}
    texts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    columns = (rows.languages, rows.passage_languages, rows.queries, rows.passages)
    for source, target, query, passage in zip(*columns, strict=True):
        if source != target:
            texts[source][passage].append(query)
    found: Bitext = {}
    for one, other in _ring(texts):
        pairs = _shared(texts[one], texts[other])
        found[_subset((one, other))] = ((one, other), pairs)
    return found


def _ring(texts: Mapping[str, Mapping[str, list[str]]]) -> list[tuple[str, str]]:
    order = sorted(texts, key=lambda code: text_key(f"any-to-any {code}"))
    found: dict[frozenset[str], tuple[str, str]] = {}
    for place, one in enumerate(order):
        following = [*order[place + 1 :], *order[:place]]
        other = next((code for code in following if len(_shared(texts[one], texts[code])) >= LEAST_SHARED), None)
        if other is not None:
            found.setdefault(frozenset((one, other)), (one, other))
    return list(found.values())


def _shared(one: Mapping[str, list[str]], other: Mapping[str, list[str]]) -> dict[str, str]:
    shared = ((one[passage], other[passage]) for passage in one if passage in other)
    return dict(_one_to_one((text, its) for texts, others in shared for text in texts for its in others))


def _one_to_one(pairs: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    """The pairs that leave each text a single right answer: none of their texts is in another pair with one of them."""
    pairs = list(pairs)
    partners: dict[str, set[str]] = defaultdict(set)
    partners_back: dict[str, set[str]] = defaultdict(set)
    for one, other in pairs:
        partners[one].add(other)
        partners_back[other].add(one)
    first: set[str] = set()
    second: set[str] = set()
    for one, other in pairs:
        if one not in first and other not in second:
            first |= partners_back[other]
            second |= partners[one]
            yield one, other


def _subset(codes: tuple[str, ...]) -> str:
    # As mteb names the pairs of FLORES.
    return "-".join(code.replace("-", "_") for code in codes) if len(codes) == 2 else "".join(codes) or "default"
