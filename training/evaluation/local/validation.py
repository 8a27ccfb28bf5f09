"""The validation rows of prepared sources: the task that fits what their rows hold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from mteb.abstasks.abstask import AbsTask

from training.common.errors import UserError
from training.data.instructions import without_instruction
from training.data.prepared import PreparedSource
from training.evaluation.local.candidates import Corpus
from training.evaluation.local.labelled import classification, labels_of
from training.evaluation.local.pair_file import language_code
from training.evaluation.local.task_classes import SPLIT, UnfitError, camel_case, make_task

logger = logging.getLogger("training")


def validation_tasks(folders: Sequence[Path]) -> list[AbsTask]:
    """A task for each prepared source; of several, those with too few validation rows for one are left out.

    Retrieval looks for the passage among all passages and negatives of the validation rows. Clustering rows do not
    name their class, and other rows may be of the same: reranking looks for the passage among the row's own negatives.
    Classification rows have the text of a label as passage.

    Args:
        folders: Folders of prepared sources.

    Raises:
        UserError: If a folder is no whole prepared source, is damaged, its texts were not kept, a source is there
            twice, or no source is left.
    """
    tasks, unfit = [], []
    there: dict[str, Path] = {}
    for source in (PreparedSource(folder).check() for folder in folders):
        before = there.setdefault(source.name, source.folder)
        if before != source.folder:
            raise UserError(
                f"{before} and {source.folder.name}: hold one source, prepared with different settings; give the "
                "folders to evaluate on by name, or delete those that are no longer used"
            )
        try:
            tasks.append(_task(source))
        except UnfitError as error:
            unfit.append(error)
    if not tasks:
        raise unfit[0]
    for error in unfit:
        logger.warning("%s; left out", error)
    return tasks


def _task(source: PreparedSource) -> AbsTask:
    if not len(source.rows["validation"]):
        raise UnfitError(
            f"{source.folder}: no validation rows; prepare it again with a larger validation_share (prepare.py: "
            "--validation-share)"
        )
    queries, passages, negatives = _columns(source)
    name, place, languages = f"{camel_case(source.name)}Validation", source.folder, _languages(source)
    if source.task_type == "classification":
        return classification(f"{name}Classification", place, languages, labels_of(place, queries, passages))
    corpus = Corpus(chain(passages, *negatives))
    if source.task_type == "retrieval":
        data = {"default": {SPLIT: corpus.split(queries, passages)}}
        return make_task("Retrieval", f"{name}Retrieval", place, languages, data)
    if not any(negatives):
        raise UnfitError(f"{place}: no validation row has a negative to tell its passage from; mine some")
    data = {"default": {SPLIT: corpus.split(queries, passages, negatives)}}
    return make_task("Reranking", f"{name}Reranking", place, languages, data)


def _columns(source: PreparedSource) -> tuple[list[str], list[str], list[list[str]]]:
    """Queries, passages and negatives of the validation rows, without instructions."""
    rows = np.asarray(source.rows["validation"])
    positions = np.unique(rows[rows >= 0])
    # The runner puts the prompts itself, and passages of symmetric sources may carry one as queries do.
    texts = dict(zip(positions.tolist(), map(without_instruction, source.texts(positions)), strict=True))
    queries, passages = ([texts[position] for position in column] for column in rows[:, :2].T.tolist())
    return queries, passages, [[texts[each] for each in row if each >= 0] for row in rows[:, 2:].tolist()]


def _languages(source: PreparedSource) -> list[str]:
    """The language of a source in one; more are not told apart."""
    told = source.description.get("languages") or []
    if len(told) != 1:
        return []
    try:
        return [language_code(told[0])]
    except ValueError:
        return []
