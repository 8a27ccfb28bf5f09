"""Retrieval and bitext mining over pairs of texts."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from pathlib import Path

from datasets import Dataset, DatasetDict
from mteb.abstasks.abstask import AbsTask

from training.evaluation.local.bitext import Bitext, any_to_any, with_passages
from training.evaluation.local.candidates import Corpus
from training.evaluation.local.pair_file import PairRows, read_pairs
from training.evaluation.local.task_classes import SPLIT, Languages, make_task
from training.evaluation.text_file import read_texts


def pair_tasks(
    path: Path, name: str, candidates: Path | None = None, passage_language: str | None = None
) -> list[AbsTask]:
    """Retrieval and bitext mining over a parquet file in the published format, by language of the queries.

    Where the languages of both sides are known, bitext mining is by both, and languages whose queries share passages
    are mined against one another, too.

    Args:
        path: Has the columns query and passage, and may have negatives, lang and script, passage_lang and
            passage_script.
        name: Begins the names of the tasks.
        candidates: Has the column passage: what else can be found, beside passages and negatives.
        passage_language: The language of all passages, such as ``eng-Latn``, if the file does not tell.

    Raises:
        UserError: If a file cannot be read, lacks a column or holds a bad row.
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
    for query, passage in zip(rows.queries, rows.passages, strict=True):
        of_query[query].append(passage)
    of_language: dict[str | None, dict[str, None]] = defaultdict(dict)
    for query, code in zip(rows.queries, rows.languages or [None] * len(rows.queries), strict=True):
        of_language[code][query] = None
    data = {}
    for code, queries in of_language.items():
        # A model is given the text of a query alone: what is right in another language is right.
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
