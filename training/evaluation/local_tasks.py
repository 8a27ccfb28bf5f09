"""mteb tasks over local data, without a network: builds with held-out rows, prepared sources, files of pairs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskBitextMining, AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.languages import check_language_code
from mteb.types import PromptType

from training.common.errors import UserError
from training.common.keyed import text_key
from training.common.languages import iso639_3, usual_script
from training.data.cleaning.normalise import normalise
from training.data.instructions import without_instruction, without_prompts
from training.data.prepared import DESCRIPTION, PreparedSource
from training.data.published import PublishedFile
from training.evaluation.pairs import read_texts

logger = logging.getLogger("training")

HELD_OUT, CANDIDATES = "held_out.parquet", "candidates.parquet"
# Builders pair every held-out text with an English one.
ENGLISH = "eng-Latn"
# Fewer pairs would be found by chance.
LEAST_SHARED = 10
# mteb's split, and its subset of a task without subsets.
SPLIT, _ALL = "test", "default"
# A text and the query of the same text share an id: no query finds itself.
_FINDS_OTHERS = {"ignore_identical_ids": True}
# The first text of a graded pair is a query, the second a document.
_PROMPTED = {"input1_prompt_type": PromptType.query, "input2_prompt_type": PromptType.document}
# By mteb's type of task: base class, category, main score and attributes.
_KINDS: dict[str, tuple[type[AbsTask], str, str, dict[str, Any]]] = {
    # mteb's ranks up to a thousand take longer than all else where texts are short and subsets many.
    "Retrieval": (AbsTaskRetrieval, "t2t", "ndcg_at_10", {**_FINDS_OTHERS, "k_values": (1, 5, 10, 100)}),
    "Reranking": (AbsTaskRetrieval, "t2t", "map_at_1000", _FINDS_OTHERS),
    "BitextMining": (AbsTaskBitextMining, "t2t", "f1", {}),
    "Classification": (AbsTaskClassification, "t2c", "accuracy", {}),
    "STS": (AbsTaskSTS, "t2t", "cosine_spearman", _PROMPTED),
    "Clustering": (AbsTaskClustering, "t2c", "v_measure", {"max_fraction_of_documents_to_embed": None}),
}

# Codes such as ``deu-Latn`` of a task without subsets, or by subset; empty if they are not known.
Languages = Sequence[str] | Mapping[str, Sequence[str]]
# By subset: its languages, and its pairs, in which no text occurs twice on one side.
Bitext = dict[str, tuple[tuple[str, ...], dict[str, str]]]


class TooFewError(UserError):
    """Good data that are too few for a task; tasks over other data can run."""


def local_tasks(path: Path) -> list[AbsTask]:
    """Make the tasks of a CLDR or gettext build, a prepared source or a folder of them, or a parquet file of pairs."""
    if path.is_file():
        return pair_tasks(path, _camel_case(path.stem))
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
        for make in (classification, clustering):
            tasks.append(make(f"{name}{label.capitalize()}{make.__name__.capitalize()}", held_out, languages, labels))
    return tasks


def validation_tasks(folders: Sequence[Path]) -> list[AbsTask]:
    """Make a task of the validation rows of each prepared source; sources with too few rows are left out."""
    sources = [PreparedSource(folder).check() for folder in folders]
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
    prompts = [source.description.get(name, "") for name in ("prompt", "document_prompt")]
    alone = (without_instruction(without_prompts(text, prompts)) for text in source.texts(positions))
    texts = dict(zip(positions.tolist(), alone, strict=True))
    queries, passages = ([texts[position] for position in column] for column in rows[:, :2].T.tolist())
    positives, negatives = (
        [[texts[each] for each in row if each >= 0] for row in of(rows).tolist()]
        for of in (source.positives, source.negatives)
    )
    name, tags = f"{_camel_case(source.name)}Validation", source.description.get("languages") or []
    try:
        # Rows of several languages are not separated.
        languages = [language_code(*tags)] if len(tags) == 1 else []
    except ValueError:
        languages = []
    if source.task_type == "similarity":
        return similarity(f"{name}STS", folder, languages, queries, passages, source.scores["validation"].tolist())
    # The passages of classification are labels. Clustering rows do not name their class, and other rows may have the
    # same: reranking searches the row's own negatives.
    if source.task_type == "classification":
        return classification(f"{name}Classification", folder, languages, labels_of(folder, queries, passages))
    if source.task_type != "retrieval" and not any(negatives):
        raise TooFewError(f"{folder}: no validation row has a negative to tell its passage from; mine some")
    kind = "Retrieval" if source.task_type == "retrieval" else "Reranking"
    answers, candidates = defaultdict(list), defaultdict(list)
    for query, right, own in zip(queries, positives, negatives, strict=True):
        answers[query] += right
        candidates[query] += [*right, *own]
    split = Corpus(chain(passages, *positives, *negatives)).split(answers, candidates if kind == "Reranking" else None)
    return make_task(kind, f"{name}{kind}", folder, languages, {_ALL: {SPLIT: split}})


class PairRows(NamedTuple):
    """Columns of a file: queries without instructions, and codes such as ``deu-Latn``, empty if they are not known."""

    queries: list[str]
    passages: list[str]
    negatives: list[list[str]]
    languages: list[str]
    passage_languages: list[str]


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
    corpus = Corpus(chain(extra, rows.passages, *rows.negatives))
    of_query: dict[str, list[str]] = defaultdict(list)
    of_language: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for query, passage, code in zip(rows.queries, rows.passages, rows.languages, strict=True):
        of_query[query].append(passage)
        # A model gets the text of a query alone: what is right in another language is right.
        of_language[code][query] = of_query[query]
    languages = {code: [code] for code in of_language if code}
    data = {code or _ALL: {SPLIT: corpus.split(answers)} for code, answers in of_language.items()}
    tasks = [make_task("Retrieval", f"{name}Retrieval", path, languages or [], data)]
    for kind, bitext in (("BitextMining", with_passages(rows)), ("AnyToAnyBitextMining", any_to_any(rows))):
        data = {}
        for subset, (_, pairs) in bitext.items():
            sentences = {"sentence1": list(pairs), "sentence2": list(pairs.values())}
            data[subset] = DatasetDict({SPLIT: Dataset.from_dict(sentences)})
        languages = {subset: list(codes) for subset, (codes, _) in bitext.items() if codes}
        if data:
            tasks.append(make_task("BitextMining", f"{name}{kind}", path, languages or [], data))
    return tasks


def with_passages(rows: PairRows) -> Bitext:
    """Pair each query with its passage, by the known languages of both; without any, in one subset ``default``."""
    found: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    for query, passage, _, *codes in zip(*rows, strict=True):
        found[tuple(filter(None, codes))].append((query, passage))
    return {_subset(codes): (tuple(dict.fromkeys(codes)), dict(_one_to_one(pairs))) for codes, pairs in found.items()}


def any_to_any(rows: PairRows) -> Bitext:
    """Pair queries of two languages that share a passage in a third; empty if the languages are not known.

    Not all languages with all others: in a pseudo-random order closed to a ring, each one with the next that shares at
    least ``LEAST_SHARED`` passages with it, so that most languages are in two subsets.
    """
    texts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for query, passage, _, source, target in zip(*rows, strict=True):
        if source and target and source != target:
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
    partners: dict[tuple[int, str], set[tuple[int, str]]] = defaultdict(set)
    for one, other in pairs:
        partners[0, one].add((1, other))
        partners[1, other].add((0, one))
    used: set[tuple[int, str]] = set()
    for one, other in pairs:
        if used.isdisjoint([(0, one), (1, other)]):
            used |= partners[0, one] | partners[1, other]
            yield one, other


def _subset(codes: tuple[str, ...]) -> str:
    # As mteb names the pairs of FLORES.
    return "-".join(code.replace("-", "_") for code in codes) if len(codes) == 2 else "".join(codes) or _ALL


def read_pairs(path: Path, passage_language: str | None = None) -> PairRows:
    """Read a file in the published format; the arguments are those of :func:`pair_tasks`."""
    file = PublishedFile(path)
    queries, positives, negatives = [], [], []
    for batch in file.batches(raw=True):
        queries += batch.columns["query"]
        for texts, names in ((positives, file.positives), (negatives, file.negatives)):
            rows = zip(*(batch.columns[name] for name in names), strict=True)
            texts += [[text for text in row if text is not None] for row in rows]
    languages = _read_languages(file, "lang", "script")
    passage_languages = _read_languages(file, "passage_lang", "passage_script", passage_language or "")
    rows = zip(queries, positives, negatives or [[]] * len(queries), languages, passage_languages, strict=True)
    # A pair of each positive.
    pairs = [(query, passage, *rest) for query, passages, *rest in rows for passage in passages]
    return PairRows(*map(list, zip(*pairs, strict=True)))


def _read_languages(file: PublishedFile, language: str, script: str, default: str = "") -> list[str]:
    """Return the code of each row; the default if the file has no such column."""
    if language not in file.schema.names:
        return [default] * file.num_rows
    names = [name for name in (language, script) if name in file.schema.names]
    rows = [row for each in file.further_columns(names) for row in zip(*each.to_pydict().values(), strict=True)]
    codes: dict[tuple[str | None, ...], str] = {}
    for row in dict.fromkeys(rows):
        try:
            codes[row] = language_code(*row)
        except ValueError as error:
            cells = ", ".join(f"{name} {value!r}" for name, value in zip(names, row, strict=True))
            where = f"{file.path}: row {rows.index(row)}: {cells} is not a language"
            raise UserError(f"{where} ({error}); correct or drop the row") from None
    return [codes[row] for row in rows]


def language_code(tag: str | None, script: str | None = None) -> str:
    """Return a BCP 47 tag and its (usual) script as mteb writes them (``deu-Latn``), or raise a ValueError."""
    code = f"{iso639_3(tag or '')}-{usual_script(tag) if script is None else script}"
    check_language_code(code)
    return code


def make_task(task_type: str, name: str, path: Path, languages: Languages, data: Mapping[str, Any]) -> AbsTask:
    """Make a task that mteb can run, with data in the form of mteb's class: by subset and split, or by split."""
    kind, category, metric, attributes = _KINDS[task_type]
    metadata = TaskMetadata(
        name=name,
        description=f"Local data: {path.name}",
        # Results on other data of the same name are other results.
        dataset={"path": str(path), "revision": _hash(data, cache(lambda part: _hash(part.to_dict())))[:16]},
        type=task_type,
        category=category,
        eval_splits=[SPLIT],
        eval_langs=languages,
        main_score=metric,
    )
    task = type(name, (kind,), {"metadata": metadata, "load_data": lambda self, **_: None, **attributes})()
    task.dataset, task.data_loaded = data, True
    return task


def _camel_case(name: str) -> str:
    # As mteb names tasks.
    return "".join(part.capitalize() for part in name.replace("-", "_").split("_"))


def _hash(value: Any, default: Any = None) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=default).encode()).hexdigest()


class Corpus:
    """Distinct texts in which passages are searched."""

    def __init__(self, texts: Iterable[str]) -> None:
        # Ids by text, not by position: the order of rows must not decide between equal scores.
        self._ids = {text: f"{text_key(text):016x}" for text in dict.fromkeys(texts)}
        self._spellings: dict[str, list[str]] = defaultdict(list)
        for text, own in self._ids.items():
            self._spellings[normalise(text)].append(own)
        self.dataset = Dataset.from_dict({"id": list(self._ids.values()), "text": list(self._ids)})

    def split(
        self, answers: Mapping[str, Sequence[str]], candidates: Mapping[str, Sequence[str]] | None = None
    ) -> dict[str, Any]:
        """Return one split of a retrieval task, or (with candidates by query) of a reranking task.

        All passages of a query are right, and so are texts with the same normal form. A query does not find itself,
        unless it is its passage.
        """
        ids, relevant, ranked = [], {}, {}
        for query, passages in answers.items():
            right = {each for passage in passages for each in self._spellings[normalise(passage)]}
            given = list(dict.fromkeys(self._ids[text] for text in candidates[query])) if candidates else None
            own = f"{text_key(query):016x}"
            ids.append(f"q{own}" if own in right else own)
            relevant[ids[-1]] = {each: 1 for each in right if given is None or each in given}
            ranked[ids[-1]] = given
        queries = Dataset.from_dict({"id": ids, "text": list(answers)})
        top_ranked = ranked if candidates else None
        return {"corpus": self.dataset, "queries": queries, "relevant_docs": relevant, "top_ranked": top_ranked}


def labels_of(where: object, texts: Sequence[str], labels: Sequence[str]) -> pd.DataFrame:
    """Return each distinct text (``text``) and its label, as a number by name, in a pseudo-random order.

    Order and repetition of the rows have no influence, and texts with several labels are left out.
    """
    rows = pd.DataFrame({"text": texts, "label": labels}, dtype=object).drop_duplicates()
    clear = rows[~rows.text.duplicated(keep=False)]
    if (clear.label.value_counts() >= 2).sum() < 2:
        raise TooFewError(f"{where}: fewer than two labels have two texts; two are needed to classify")
    clear = clear.assign(label=clear.label.astype("category").cat.codes.astype(int))
    return clear.sort_values("text", key=lambda texts: [text_key(f"order of labelled texts {text}") for text in texts])


def classification(name: str, path: Path, languages: Sequence[str], labels: pd.DataFrame) -> AbsTask:
    """Make a classification task of :func:`labels_of`; half of each label's texts (rounded up) are for training."""
    # The texts are in pseudo-random order, so every second one is a random half.
    half = labels.groupby("label").cumcount() % 2
    splits = {"train": labels[half == 0], SPLIT: labels[half == 1]}
    data = {split: Dataset.from_dict(rows.to_dict("list")) for split, rows in splits.items()}
    return make_task("Classification", name, path, languages, DatasetDict(data))


def clustering(name: str, path: Path, languages: Sequence[str], labels: pd.DataFrame) -> AbsTask:
    """Make a clustering task of :func:`labels_of`."""
    data = {SPLIT: Dataset.from_dict({"sentences": labels.text.tolist(), "labels": labels.label.tolist()})}
    return make_task("Clustering", name, path, languages, DatasetDict(data))


def similarity(
    name: str, path: Path, languages: Sequence[str], one: Sequence[str], other: Sequence[str], scores: Sequence[float]
) -> AbsTask:
    """Make a task of graded pairs, whose order of scores the cosines should have."""
    if len(set(scores)) < 2:
        raise TooFewError(f"{path}: its validation rows have one score alone, which orders nothing")
    pairs = Dataset.from_dict({"sentence1": one, "sentence2": other, "score": scores})
    task = make_task("STS", name, path, languages, DatasetDict({SPLIT: pairs}))
    task.min_score, task.max_score = min(scores), max(scores)
    return task
