"""mteb tasks over local data: builds with held-out rows, prepared sources, files of pairs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from mteb.abstasks.abstask import AbsTask

from training.common.errors import UserError
from training.data.instructions import without_instruction
from training.data.prepared import DESCRIPTION, PreparedSource
from training.data.published import PublishedFile
from training.evaluation.pair_tasks import language_code, pair_tasks
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
_LABELS = ("script", "kind")


def local_tasks(path: Path) -> list[AbsTask]:
    """Make the tasks of a CLDR or gettext build, a prepared source or a folder of them, or a parquet file of pairs."""
    if path.suffix.lower() in (".csv", ".jsonl"):
        raise UserError(f"{path}: --local reads parquet files; save the rows as one, or give it as 'evaluation_pairs'")
    if path.is_file():
        return pair_tasks(path, camel_case(path.stem))
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give a parquet file, or a folder that was built or prepared")
    if (path / DESCRIPTION).is_file():
        return validation_tasks([path])
    if (path / HELD_OUT).is_file() and (path / CANDIDATES).is_file():
        return _held_out_tasks(path)
    if prepared := sorted(each.parent for each in path.glob(f"[!.]*/{DESCRIPTION}")):
        return validation_tasks(prepared)
    raise UserError(
        f"{path}: holds nothing to evaluate on; looked for {HELD_OUT} and {CANDIDATES} (a CLDR or gettext build), "
        f"{DESCRIPTION} (a prepared source) and */{DESCRIPTION} (several)"
    )


def _held_out_tasks(folder: Path) -> list[AbsTask]:
    """Make retrieval and bitext mining, and for CLDR's names classification and clustering by script and kind."""
    held_out = folder / HELD_OUT
    is_cldr = "kind" in PublishedFile(held_out).schema.names
    name = "Cldr" if is_cldr else "Gettext"
    tasks = pair_tasks(held_out, name, folder / CANDIDATES, ENGLISH)
    languages = tasks[0].metadata.bcp47_codes
    for label in _LABELS if is_cldr else ():
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
    tasks, too_few = [], []
    folder_of: dict[str, Path] = {}
    for source in (PreparedSource(folder).check() for folder in folders):
        before = folder_of.setdefault(source.name, source.folder)
        if before != source.folder:
            raise UserError(
                f"{before} and {source.folder.name}: hold one source, prepared with different settings; give the "
                "folders to evaluate on by name, or delete those that are no longer used"
            )
        try:
            tasks.append(_validation_task(source))
        except TooFewError as error:
            too_few.append(error)
    if not tasks:
        raise too_few[0]
    for error in too_few:
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
    corpus = Corpus(chain(passages, *negatives))
    if source.task_type == "retrieval":
        data = {"default": {SPLIT: corpus.split(queries, passages)}}
        return make_task("Retrieval", f"{name}Retrieval", folder, languages, data)
    if not any(negatives):
        raise TooFewError(f"{folder}: no validation row has a negative to tell its passage from; mine some")
    data = {"default": {SPLIT: corpus.split(queries, passages, negatives)}}
    return make_task("Reranking", f"{name}Reranking", folder, languages, data)


def _languages(source: PreparedSource) -> list[str]:
    """Return the language of a source in one language; rows of several languages are not separated."""
    tags = source.description.get("languages") or []
    try:
        return [language_code(tags[0])] if len(tags) == 1 else []
    except ValueError:
        return []
