"""Training sources from CLDR names, with a share of the names held out for evaluation: the offline default data.

Each function below returns the rows of one source as positions in the list of names: query, passage (-1 where there is
none) and negatives (-1 throughout where there are too few).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import babel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from babel.core import get_global

from training.common.languages import macrolanguage
from training.data.builders import builder
from training.data.cldr.draws import Mask, Pools, Rows, draw_distinct, for_purpose, grouped
from training.data.cldr.names import KINDS, CldrNames, read_names
from training.data.manifest import MANIFEST, write_manifest
from training.data.published import ROW_GROUP_ROWS, rows_table

logger = logging.getLogger(__name__)

LICENCE = "Unicode-3.0"
# Increase it when the same options would build other data than before.
_FORMAT = 2
LABELS = ("not a country or territory", "a country or territory")
# Codes that CLDR lists among the territories for unions, and for regions that are unknown or left over.
_NO_TERRITORIES = frozenset({"EU", "EZ", "QO", "UN", "ZZ"})
_OFFICIAL = ("official", "de_facto_official")
# "Multiple languages", "unknown language" and "no linguistic content" are not even wrong answers.
_NO_LANGUAGES = frozenset({"mul", "und", "zxx"})
_NO_ROWS = np.empty(0, dtype=np.intp)

Drawn = tuple[Rows, Rows, Rows]
Facts = Mapping[str, set[str]]  # codes by territory
_write_parquet = partial(pq.write_table, compression="zstd", row_group_size=ROW_GROUP_ROWS)


@builder("cldr", format=_FORMAT, babel=babel.__version__)
def build_cldr(
    folder: Path,
    *,
    seed: int = 0,
    held_out_share: float = 0.1,
    num_negatives: int = 24,
    languages: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Build training sources, their manifest and held-out names from the CLDR data in ``babel``.

    The folder contains ``manifest.yaml``, one parquet file per source (sorted by language), ``held_out.parquet``
    (query, passage, lang, script, kind), ``candidates.parquet`` (passage: every distinct English name) and
    ``build.json``. No held-out text occurs in any source. ``languages`` are CLDR identifiers besides English, or None
    for all with enough names.

    Example:
        >>> folder = build_cldr("data/cldr", languages=["de", "sw"])  # doctest: +SKIP
    """
    names = read_names(seed, languages)
    held_out = names.held_out(held_out_share)
    entries, counts, dropped = [], {}, {}
    # One source after the other, to keep only one in memory.
    for name, (task_type, symmetric, instruction, draw) in SOURCES.items():
        drawn = draw(names, np.flatnonzero(~held_out), num_negatives)
        table, spoken = _table(names, name, *drawn)
        _write_parquet(table, folder / f"{name}.parquet")
        counts[name], dropped[name] = len(table), len(drawn[0]) - len(table)
        about = {"task_type": task_type, "symmetric": symmetric, "instruction": instruction}
        entries.append({"name": name, "files": [f"{name}.parquet"], **about, "languages": spoken, "licence": LICENCE})
    write_manifest(folder / MANIFEST, entries)
    rows = np.flatnonzero(held_out)
    concept, language = names.concept[rows], names.language[rows].tolist()
    evaluation = rows_table(
        [names.texts[row] for row in rows.tolist()],
        [names.texts[row] for row in names.english[concept].tolist()],
        lang=[names.codes[position] for position in language],
        script=[names.scripts[position] for position in language],
        kind=[names.concepts[position][0] for position in concept.tolist()],
    )
    _write_parquet(evaluation, folder / "held_out.parquet")
    candidates = dict.fromkeys(names.texts[row] for row in names.english.tolist())
    _write_parquet(pa.table({"passage": pa.array(candidates, type=pa.string())}), folder / "candidates.parquet")
    counted = {"names": len(names.texts), "languages": len(names.languages), "held_out": len(rows)}
    return {**counted, "rows": counts, "dropped": dropped}


def _table(names: CldrNames, name: str, query: Rows, passage: Rows, negatives: Rows) -> tuple[pa.Table, list[str]]:
    """Return the complete rows of a source as texts, and its languages; "Togo" is no translation of "Togo"."""
    # Labels follow the names.
    texts = pa.array([*names.texts, *LABELS], type=pa.string())
    text_id = np.append(names.text_id, [-1, -2])
    kept = (passage >= 0) & (text_id[query] != text_id[passage]) & (negatives[:, 0] >= 0)
    logger.info("%s: %d rows, %d dropped", name, kept.sum(), (~kept).sum())
    query, passage, negatives = query[kept], passage[kept], negatives[kept]
    columns = {"query": query, "passage": passage}
    columns |= {f"negative_{number}": column for number, column in enumerate(negatives.T, start=1)}
    table = pa.table({name: texts.take(pa.array(rows)) for name, rows in columns.items()})
    table = table.append_column("lang", pa.array(names.codes).take(pa.array(names.language[query])))
    named = np.concatenate((query, passage[passage < len(names.texts)]))
    return table, sorted({names.codes[language] for language in np.unique(names.language[named]).tolist()})


def translation(names: CldrNames, rows: Rows, num_negatives: int) -> Drawn:
    """Pair every name with the English one; the negatives are English names, mostly of the same kind."""
    query = rows[~names.is_english[rows]]
    kind = names.kind[names.english]

    pools = lambda own: (names.english[kind == own], names.english[kind != own])  # noqa: E731
    groups, allowed = names.kind[query], ~names.confusable
    negatives = _draw(names, query, "translation negatives", groups, pools, num_negatives, allowed)
    return query, names.english[names.concept[query]], negatives


def translation_pairs(names: CldrNames, rows: Rows, num_negatives: int) -> Drawn:
    """Pair every name with one of the same concept in another language, in which the negatives are too."""
    # Pairs with English are in `translation`.
    query = rows[~names.is_english[rows]]
    passage = _draw(names, query, "pairs passage", names.concept[query], _pool(names.concept, query), 1)
    # Negatives repeat within a language: rows sorted by it compress to half the size.
    order = np.argsort(names.language[passage[:, 0]], kind="stable")
    query, passage = query[order], passage[order, 0]
    groups, pools = names.group[passage], _same_and_other_kinds(names, query)
    return query, passage, _draw(names, query, "pairs negatives", groups, pools, num_negatives, ~names.confusable)


def territory_currency(names: CldrNames, rows: Rows, num_negatives: int) -> Drawn:
    """Pair a territory with its legal tender of today in the same language; the negatives are no tender there."""
    known = get_global("territory_currencies")
    tender = {place: {code for code, _, end, legal in each if end is None and legal} for place, each in known.items()}
    current = {place: {code for code, _, end, _ in each if end is None} for place, each in known.items()}
    once_tender = {code for each in known.values() for code, _, _, legal in each if legal}
    # Metals, funds, units of account and "testing currency code" would be too easy to rule out.
    excluded = {code for kind, code in names.concepts if kind == "currency"} - once_tender
    return _related(names, rows, num_negatives, "currency", tender, current, excluded)


def territory_language(names: CldrNames, rows: Rows, num_negatives: int) -> Drawn:
    """Pair a territory with an official language in the same language; the negatives are not spoken there."""
    # CLDR counts speakers of Dari under "fa" and names it "fa_AF": treat a macrolanguage as one language.
    official, spoken, members = {}, {}, defaultdict(set)
    for code in (code for kind, code in names.concepts if kind == "language"):
        members[macrolanguage(code)].add(code)
    for place, languages in get_global("territory_languages").items():
        of_state = [code for code, about in languages.items() if about["official_status"] in _OFFICIAL]
        official[place] = {code.split("_")[0] for code in of_state}
        spoken[place] = set().union(*(members[macrolanguage(code)] for code in languages))
    return _related(names, rows, num_negatives, "language", official, spoken, _NO_LANGUAGES)


def _related(
    names: CldrNames, rows: Rows, num_negatives: int, kind: str, answers: Facts, true: Facts, excluded: Collection[str]
) -> Drawn:
    """Pair territories with names of another kind: passages name answers, negatives nothing true of the territory."""
    index = {concept: position for position, concept in enumerate(names.concepts)}

    # Which concept (column) is a fact of which territory (row), shape (concepts, concepts).
    def as_matrix(facts: Facts) -> Mask:
        matrix = np.zeros((len(index), len(index)), dtype=bool)
        for territory, codes in facts.items():
            if ("territory", territory) in index:
                columns = [index[kind, code] for code in codes if (kind, code) in index]
                matrix[index["territory", territory], columns] = True
        return matrix

    answer = as_matrix(answers)
    # Neither what the query may mean nor what the negative may mean must make the pair true.
    confusable = names.confusable.astype(np.float32)
    barred = confusable @ (as_matrix(true) | answer).astype(np.float32) @ confusable > 0
    is_answer = answer.any(axis=0)
    is_other = np.array([of == kind and code not in excluded for of, code in names.concepts]) & ~is_answer

    query = rows[answer.any(axis=1)[names.concept[rows]]]
    answers_in = _pool(names.language, rows[is_answer[names.concept[rows]]])
    others_in = _pool(names.language, rows[is_other[names.concept[rows]]])
    pools = lambda language: (answers_in(language)[0], others_in(language)[0])  # noqa: E731
    purpose, groups = f"cldr_territory_{kind}", names.language[query]
    passage = _draw(names, query, f"{purpose} passage", groups, answers_in, 1, answer)[:, 0]
    return query, passage, _draw(names, query, f"{purpose} negatives", groups, pools, num_negatives, ~barred)


def kind(names: CldrNames, rows: Rows, num_negatives: int) -> Drawn:
    """Pair every name with one of its kind and language; the negatives are names of other kinds in that language."""
    # The kind of a text that names both a language and its script is ambiguous.
    query = rows[names.kinds_named[rows] == 1 << names.kind[rows]]
    groups, pools = names.group[query], _same_and_other_kinds(names, query)
    passage = _draw(names, query, "kind passage", groups, _pool(names.group, query), 1)[:, 0]
    negatives = _draw(names, query, "kind negatives", groups, lambda own: (pools(own)[1], _NO_ROWS), num_negatives)
    return query, passage, negatives


def same_language(names: CldrNames, rows: Rows, num_negatives: int) -> Drawn:
    """Pair every name with one in its language; the negatives are in other languages, mostly of the same script."""
    # A text found in two languages belongs to neither class.
    query = rows[names.partners(names.language)[rows] == 1]
    language, scripts = names.language[query], np.array(names.scripts)

    def others(own: int) -> tuple[Rows, Rows]:
        same_script = scripts[language] == scripts[own]
        return query[same_script & (language != own)], query[~same_script]

    passage = _draw(names, query, "same language passage", language, _pool(names.language, query), 1)[:, 0]
    return query, passage, _draw(names, query, "same language negatives", language, others, num_negatives)


def is_territory(names: CldrNames, rows: Rows, num_negatives: int) -> Drawn:
    """Label names as those of a country or territory or not, with as many of either in each language."""
    territory = 1 << KINDS.index("territory")
    # Continents and the like have numeric codes and could be either: leave them out.
    countries = [of == "territory" and code.isalpha() and code not in _NO_TERRITORIES for of, code in names.concepts]
    label = np.full(len(names.texts), -1, dtype=np.intp)
    label[(names.kinds_named == territory) & np.array(countries)[names.concept]] = 1
    label[names.kinds_named & territory == 0] = 0

    key = for_purpose(names.draw_key, "is territory")
    chosen = np.zeros(len(names.texts), dtype=bool)
    for _, members in grouped(names.language[rows], rows):
        sides = [members[label[members] == side] for side in (0, 1)]
        for side in sides:
            chosen[side[np.argsort(key[side], kind="stable")[: min(map(len, sides))]]] = True
    passage = np.where(chosen[rows], len(names.texts) + label[rows], -1)
    return rows, passage, (len(names.texts) + 1 - label[rows])[:, None]


_KIND = "Identify whether a name is that of a territory, a language, a script or a currency."
# Task type, whether symmetric, and instruction, as in the manifest; and how rows are drawn.
SOURCES: dict[str, tuple[str, bool, str, Callable[[CldrNames, Rows, int], Drawn]]] = {
    "cldr_translation": ("retrieval", True, "Retrieve the English name.", translation),
    "cldr_translation_pairs": ("retrieval", True, "Retrieve the name in another language.", translation_pairs),
    "cldr_territory_currency": ("retrieval", False, "Retrieve the territory's currency.", territory_currency),
    "cldr_territory_language": ("retrieval", False, "Retrieve an official language.", territory_language),
    "cldr_kind": ("clustering", True, _KIND, kind),
    "cldr_same_language": ("clustering", True, "Identify the language a name is written in.", same_language),
    "cldr_is_territory": ("classification", False, "Is this a country or territory?", is_territory),
}


def _draw(
    names: CldrNames, query: Rows, purpose: str, groups: Rows, pools: Pools, count: int, allowed: Mask | None = None
) -> Rows:
    """Draw ``count`` names for each query; ``allowed`` says which concept (column) may be drawn for which one (row)."""

    def may_have(position: Rows, item: Rows) -> Mask:
        row = query[position]
        if allowed is None:
            return names.text_id[row] != names.text_id[item]
        return allowed[names.concept[row], names.concept[item]]

    return draw_distinct(for_purpose(names.draw_key[query], purpose), groups, pools, names.text_id, count, may_have)


def _pool(values: Rows, rows: Rows) -> Pools:
    """Return the pools of each value in ``values``, given for all names: the rows that have it, and none."""
    by_value = dict(grouped(values[rows], rows))
    return lambda value: (by_value.get(value, _NO_ROWS), _NO_ROWS)


def _same_and_other_kinds(names: CldrNames, rows: Rows) -> Pools:
    """Return the pools of each group of ``names.group``: the language's names of that kind, and its others."""
    by_group = dict(grouped(names.group[rows], rows))

    def pools(group: int) -> tuple[Rows, Rows]:
        start = group - group % len(KINDS)
        others = [by_group.get(other, _NO_ROWS) for other in range(start, start + len(KINDS)) if other != group]
        return by_group.get(group, _NO_ROWS), np.concatenate(others)

    return pools
