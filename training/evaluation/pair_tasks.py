"""Retrieval and bitext mining over a file of pairs, by language."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from datasets import Dataset, DatasetDict
from mteb.abstasks.abstask import AbsTask
from mteb.languages import check_language_code

from training.common.errors import UserError
from training.common.keyed import text_key
from training.common.languages import iso639_3, usual_script
from training.data.published import PublishedFile
from training.evaluation.pairs import read_texts
from training.evaluation.tasks import SPLIT, Corpus, Languages, make_task

# Fewer pairs would be found by chance.
LEAST_SHARED = 10

# By subset: its languages, and its pairs, in which no text occurs twice on one side.
Bitext = dict[str, tuple[tuple[str, ...], dict[str, str]]]


@dataclass(frozen=True)
class PairRows:
    """Columns of a file: queries without instructions, and codes such as ``deu-Latn`` if the languages are known."""

    queries: list[str]
    passages: list[str]
    negatives: list[list[str]]
    languages: list[str] | None
    passage_languages: list[str] | None


def pair_tasks(
    path: Path, name: str, candidates: Path | None = None, passage_language: str | None = None
) -> list[AbsTask]:
    """Make the tasks of a parquet file in the published format: retrieval and bitext mining, by language of the query.

    If the languages of both sides are known (columns lang, script, passage_lang, passage_script), bitext mining is by
    both, and a third task mines queries of two languages that share passages. ``name`` begins the names of the tasks,
    and ``candidates`` is a file of further passages that can be found.
    """
    rows = read_pairs(path, passage_language)
    extra = [] if candidates is None else read_texts(candidates, ["passage"])["passage"]
    tasks = [
        _retrieval(rows, extra, f"{name}Retrieval", path),
        _bitext_mining(with_passages(rows), f"{name}BitextMining", path),
    ]
    if found := any_to_any(rows):
        tasks.append(_bitext_mining(found, f"{name}AnyToAnyBitextMining", path))
    return tasks


def _retrieval(rows: PairRows, extra: list[str], name: str, path: Path) -> AbsTask:
    corpus = Corpus(chain(extra, rows.passages, *rows.negatives))
    of_query: dict[str, list[str]] = defaultdict(list)
    of_language: dict[str | None, dict[str, None]] = defaultdict(dict)
    codes = rows.languages or [None] * len(rows.queries)
    for query, passage, code in zip(rows.queries, rows.passages, codes, strict=True):
        of_query[query].append(passage)
        of_language[code][query] = None
    data = {}
    for code, queries in of_language.items():
        # A model gets the text of a query alone: what is right in another language is right.
        answers = [(query, passage) for query in queries for passage in of_query[query]]
        data[code or "default"] = {SPLIT: corpus.split(*map(list, zip(*answers, strict=True)))}
    languages = _languages({code or "default": (code,) if code else () for code in of_language})
    return make_task("Retrieval", name, path, languages, data)


def _bitext_mining(bitext: Bitext, name: str, path: Path) -> AbsTask:
    data = {
        subset: DatasetDict({SPLIT: Dataset.from_dict({"sentence1": list(pairs), "sentence2": list(pairs.values())})})
        for subset, (_, pairs) in bitext.items()
    }
    return make_task("BitextMining", name, path, _languages({key: codes for key, (codes, _) in bitext.items()}), data)


def _languages(by_subset: dict[str, tuple[str, ...]]) -> Languages:
    # mteb's form for a task without subsets.
    if list(by_subset) == ["default"]:
        return list(by_subset["default"])
    return {subset: list(codes) for subset, codes in by_subset.items()}


def with_passages(rows: PairRows) -> Bitext:
    """Pair each query with its passage, by the known languages of both; without any, in one subset ``default``."""
    count = len(rows.queries)
    sources, targets = rows.languages or [None] * count, rows.passage_languages or [None] * count
    found: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    for source, target, query, passage in zip(sources, targets, rows.queries, rows.passages, strict=True):
        found[tuple(code for code in (source, target) if code is not None)].append((query, passage))
    return {_subset(codes): (tuple(dict.fromkeys(codes)), dict(_one_to_one(pairs))) for codes, pairs in found.items()}


def any_to_any(rows: PairRows) -> Bitext:
    """Pair queries of two languages that share a passage in a third; empty if the languages are not known.

    Not all languages with all others: in a pseudo-random order closed to a ring, each one with the next that shares at
    least ``LEAST_SHARED`` passages with it, so that most languages are in two subsets.
    """
    if rows.languages is None or rows.passage_languages is None:
        return {}
    texts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    columns = (rows.languages, rows.passage_languages, rows.queries, rows.passages)
    for source, target, query, passage in zip(*columns, strict=True):
        if source != target:
            texts[source][passage].append(query)
    order = sorted(texts, key=lambda code: text_key(f"any-to-any {code}"))
    found: dict[frozenset[str], tuple[str, str]] = {}
    for position, one in enumerate(order):
        following = [*order[position + 1 :], *order[:position]]
        other = next((code for code in following if len(_shared(texts[one], texts[code])) >= LEAST_SHARED), None)
        if other is not None:
            found.setdefault(frozenset((one, other)), (one, other))
    return {_subset(pair): (pair, _shared(*(texts[code] for code in pair))) for pair in found.values()}


def _shared(one: Mapping[str, list[str]], other: Mapping[str, list[str]]) -> dict[str, str]:
    shared = ((one[passage], other[passage]) for passage in one if passage in other)
    return dict(_one_to_one((text, its) for texts, others in shared for text in texts for its in others))


def _one_to_one(pairs: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    """Yield pairs so that each text has one right answer: a text's other partners are in no further pair."""
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


def read_pairs(path: Path, passage_language: str | None = None) -> PairRows:
    """Read a file in the published format; the arguments are those of :func:`pair_tasks`."""
    file = PublishedFile(path)
    queries, passages, negatives = [], [], []
    # Passages and negatives repeat: keep one object per text.
    texts: dict[str, str] = {}
    for batch in file.batches(raw=True):
        queries += batch.columns["query"]
        passages += [texts.setdefault(text, text) for text in batch.columns["passage"]]
        for row in zip(*(batch.columns[name] for name in file.negatives), strict=True):
            negatives.append([texts.setdefault(text, text) for text in row if text is not None])
    negatives = negatives or [[] for _ in queries]
    languages = _read_languages(file, "lang", "script")
    passage_languages = _read_languages(file, "passage_lang", "passage_script")
    if passage_languages is None and passage_language is not None:
        passage_languages = [passage_language] * len(passages)
    return PairRows(queries, passages, negatives, languages, passage_languages)


def _read_languages(file: PublishedFile, language: str, script: str) -> list[str] | None:
    """Return the code of each row; None if the file has no such column."""
    names = [name for name in (language, script) if name in file.schema.names]
    if language not in names:
        return None
    found: list[str] = []
    codes: dict[tuple[str | None, ...], str] = {}
    for batch in file.further_columns(names):
        for row in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
            if row not in codes:
                codes[row] = _code(f"{file.path}: row {len(found)}", dict(zip(names, row, strict=True)))
            found.append(codes[row])
    return found


def _code(where: str, cells: dict[str, str | None]) -> str:
    for name, value in cells.items():
        if value is None or not value.strip():
            raise UserError(f"{where}, column {name!r} is not text; correct or drop the row")
    try:
        return language_code(*cells.values())
    except ValueError as error:
        values = ", ".join(f"{name} {value!r}" for name, value in cells.items())
        raise UserError(f"{where}: {values} is not a language ({error})") from None


def language_code(tag: str, script: str | None = None) -> str:
    """Return a BCP 47 tag and its (usual) script as mteb writes them: ``deu-Latn``.

    Raises:
        ValueError: If mteb does not know the language or script.
    """
    code = f"{iso639_3(tag)}-{script or usual_script(tag)}"
    check_language_code(code)
    return code
