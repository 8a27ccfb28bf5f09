"""mteb tasks over local data: builds with held-out rows, prepared sources, files of pairs."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks.abstask import AbsTask
from mteb.languages import check_language_code

from training.common.errors import UserError
from training.common.keyed import text_key
from training.common.languages import iso639_3, usual_script
from training.data.instructions import without_instruction
from training.data.prepared import DESCRIPTION, PreparedSource
from training.data.published import PublishedFile
from training.evaluation.pairs import read_texts
from training.evaluation.tasks import (
    SPLIT,
    Corpus,
    TooFewError,
    camel_case,
    classification,
    clustering,
    labels_of,
    make_task,
)

logger = logging.getLogger("training")

HELD_OUT, CANDIDATES = "held_out.parquet", "candidates.parquet"
# Builders pair every held-out text with an English one.
ENGLISH = "eng-Latn"
# Fewer pairs would be found by chance.
LEAST_SHARED = 10
# mteb's subset of a task without subsets.
_ALL = "default"

# By subset: its languages, and its pairs, in which no text occurs twice on one side.
Bitext = dict[str, tuple[tuple[str, ...], dict[str, str]]]


def local_tasks(path: Path) -> list[AbsTask]:
    """Make the tasks of a CLDR or gettext build, a prepared source or a folder of them, or a parquet file of pairs."""
    if path.suffix.lower() in (".csv", ".jsonl"):
        raise UserError(f"{path}: --local reads parquet files; save the rows as one, or give it as 'evaluation_pairs'")
    if path.is_file():
        return pair_tasks(path, camel_case(path.stem))
    if (path / HELD_OUT).is_file() and (path / CANDIDATES).is_file():
        return _held_out_tasks(path)
    prepared = sorted(each.parent for pattern in (DESCRIPTION, f"[!.]*/{DESCRIPTION}") for each in path.glob(pattern))
    if not prepared:
        raise UserError(
            f"{path}: no such file or folder, or nothing in it to evaluate on; give a parquet file, or a folder with "
            f"{HELD_OUT} and {CANDIDATES} (a CLDR or gettext build), {DESCRIPTION} (a prepared source) or several"
        )
    return validation_tasks(prepared)


def _held_out_tasks(folder: Path) -> list[AbsTask]:
    """Make retrieval and bitext mining, and for CLDR's names classification and clustering by script and kind."""
    held_out = folder / HELD_OUT
    is_cldr = "kind" in PublishedFile(held_out).schema.names
    name = "Cldr" if is_cldr else "Gettext"
    tasks = pair_tasks(held_out, name, folder / CANDIDATES, ENGLISH)
    languages = tasks[0].metadata.bcp47_codes
    for label in ("script", "kind") if is_cldr else ():
        columns = read_texts(held_out, ["query", label])
        try:
            labels = labels_of(f"{held_out}, column {label!r}", columns["query"], columns[label])
        except TooFewError as error:
            # A build of few languages may have a single script.
            logger.warning("%s; left out", error)
            continue
        prefix = f"{name}{label.capitalize()}"
        tasks.append(classification(f"{prefix}Classification", held_out, languages, labels))
        tasks.append(clustering(f"{prefix}Clustering", held_out, languages, labels))
    return tasks


def validation_tasks(folders: Sequence[Path]) -> list[AbsTask]:
    """Make a task of the validation rows of each prepared source; sources with too few rows are left out.

    Retrieval searches all passages and negatives of the rows. Clustering rows do not name their class, and other rows
    may have the same: reranking searches the row's own negatives. Classification rows have a label as passage.
    """
    sources = [PreparedSource(folder).check() for folder in folders]
    if twice := [name for name, count in Counter(source.name for source in sources).items() if count > 1]:
        names = ", ".join(str(source.folder) for source in sources if source.name == twice[0])
        raise UserError(
            f"{names}: hold one source, prepared with different settings; give the folders to evaluate on by name, or "
            "delete those that are no longer used"
        )
    tasks = []
    for source in sources:
        try:
            tasks.append(_validation_task(source))
        except TooFewError as error:
            if len(sources) == 1:
                raise
            logger.warning("%s; left out", error)
    return tasks


def _validation_task(source: PreparedSource) -> AbsTask:
    rows, folder = np.asarray(source.rows["validation"]), source.folder
    if not len(rows):
        raise TooFewError(
            f"{folder}: no validation rows; prepare it again with a larger validation_share (prepare.py: "
            "--validation-share)"
        )
    positions = np.unique(rows[rows >= 0])
    # The runner adds the prompts, and passages of symmetric sources may have one, too.
    texts = dict(zip(positions.tolist(), map(without_instruction, source.texts(positions)), strict=True))
    queries, passages = ([texts[position] for position in column] for column in rows[:, :2].T.tolist())
    negatives = [[texts[each] for each in row if each >= 0] for row in rows[:, 2:].tolist()]
    name, languages = f"{camel_case(source.name)}Validation", _languages(source)
    if source.task_type == "classification":
        return classification(f"{name}Classification", folder, languages, labels_of(folder, queries, passages))
    if source.task_type != "retrieval" and not any(negatives):
        raise TooFewError(f"{folder}: no validation row has a negative to tell its passage from; mine some")
    kind, own = ("Retrieval", None) if source.task_type == "retrieval" else ("Reranking", negatives)
    data = {"default": {SPLIT: Corpus(chain(passages, *negatives)).split(queries, passages, own)}}
    return make_task(kind, f"{name}{kind}", folder, languages, data)


def _languages(source: PreparedSource) -> list[str]:
    """Return the language of a source in one language; rows of several languages are not separated."""
    tags = source.description.get("languages") or []
    try:
        return [language_code(tags[0])] if len(tags) == 1 else []
    except ValueError:
        return []


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
    of_language: dict[str, dict[str, None]] = defaultdict(dict)
    for query, passage, code in zip(rows.queries, rows.passages, rows.languages or repeat(_ALL), strict=False):
        of_query[query].append(passage)
        of_language[code][query] = None
    data = {}
    for code, queries in of_language.items():
        # A model gets the text of a query alone: what is right in another language is right.
        answers = [(query, passage) for query in queries for passage in of_query[query]]
        data[code] = {SPLIT: corpus.split(*map(list, zip(*answers, strict=True)))}
    return make_task("Retrieval", name, path, {code: [code] for code in data} if rows.languages else [], data)


def _bitext_mining(bitext: Bitext, name: str, path: Path) -> AbsTask:
    data = {
        subset: DatasetDict({SPLIT: Dataset.from_dict({"sentence1": list(pairs), "sentence2": list(pairs.values())})})
        for subset, (_, pairs) in bitext.items()
    }
    languages = {subset: list(codes) for subset, (codes, _) in bitext.items()}
    return make_task("BitextMining", name, path, languages if list(bitext) != [_ALL] else [], data)


def with_passages(rows: PairRows) -> Bitext:
    """Pair each query with its passage, by the known languages of both; without any, in one subset ``default``."""
    found: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    known = [codes for codes in (rows.languages, rows.passage_languages) if codes is not None]
    for query, passage, *codes in zip(rows.queries, rows.passages, *known, strict=True):
        found[tuple(codes)].append((query, passage))
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
    return "-".join(code.replace("-", "_") for code in codes) if len(codes) == 2 else "".join(codes) or _ALL


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
    passage_languages = _read_languages(file, "passage_lang", "passage_script")
    if passage_languages is None and passage_language is not None:
        passage_languages = [passage_language] * len(passages)
    languages = _read_languages(file, "lang", "script")
    return PairRows(queries, passages, negatives or [[] for _ in queries], languages, passage_languages)


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
                cells = ", ".join(f"{name} {value!r}" for name, value in zip(names, row, strict=True))
                try:
                    codes[row] = language_code(*row)
                except ValueError as error:
                    where = f"{file.path}: row {len(found)}: {cells} is not a language"
                    raise UserError(f"{where} ({error}); correct or drop the row") from None
            found.append(codes[row])
    return found


def language_code(tag: str | None, script: str | None = None) -> str:
    """Return a BCP 47 tag and its (usual) script as mteb writes them: ``deu-Latn``.

    Raises:
        ValueError: If mteb does not know the language or script.
    """
    code = f"{iso639_3(tag or '')}-{usual_script(tag) if script is None else script}"
    check_language_code(code)
    return code
