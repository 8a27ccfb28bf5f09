"""The mteb tasks that local data make: builds with held-out rows, prepared sources, files of pairs."""

from __future__ import annotations

import logging
from pathlib import Path

from mteb.abstasks.abstask import AbsTask

from training.common.errors import UserError
from training.data.prepared import DESCRIPTION
from training.data.published import PublishedFile
from training.evaluation.local.labelled import classification, clustering, labels_of
from training.evaluation.local.pair_tasks import pair_tasks
from training.evaluation.local.task_classes import UnfitError, camel_case
from training.evaluation.local.validation import validation_tasks
from training.evaluation.text_file import read_texts

logger = logging.getLogger("training")

HELD_OUT, CANDIDATES = "held_out.parquet", "candidates.parquet"
# Builders pair every held-out text with an English one.
ENGLISH = "eng-Latn"
_LABELS = ("script", "kind")


def local_tasks(place: Path) -> list[AbsTask]:
    """The tasks of a file or folder.

    Args:
        place: A folder of the CLDR or gettext builder, a prepared source or a folder of some, or a parquet file of
            pairs.

    Raises:
        UserError: If it is something else, or is faulty.
    """
    if place.suffix.lower() in (".csv", ".jsonl"):
        raise UserError(f"{place}: --local reads parquet files; save the rows as one, or give it as 'evaluation_pairs'")
    if place.is_file():
        return pair_tasks(place, camel_case(place.stem))
    if not place.is_dir():
        raise UserError(f"{place}: no such file or folder; give a parquet file, or a folder that was built or prepared")
    if (place / DESCRIPTION).is_file():
        return validation_tasks([place])
    if (place / HELD_OUT).is_file() and (place / CANDIDATES).is_file():
        return _held_out_tasks(place)
    prepared = sorted(each.parent for each in place.glob(f"[!.]*/{DESCRIPTION}"))
    if prepared:
        return validation_tasks(prepared)
    raise UserError(
        f"{place}: holds nothing to evaluate on; looked for {HELD_OUT} and {CANDIDATES} (a CLDR or gettext build), "
        f"{DESCRIPTION} (a prepared source) and */{DESCRIPTION} (several)"
    )


def _held_out_tasks(folder: Path) -> list[AbsTask]:
    """Retrieval and bitext mining; of CLDR's names, classification and clustering by script and kind, too."""
    held_out = folder / HELD_OUT
    is_cldr = "kind" in PublishedFile(held_out).schema.names
    name = "Cldr" if is_cldr else "Gettext"
    tasks = pair_tasks(held_out, name, folder / CANDIDATES, ENGLISH)
    languages = tasks[0].metadata.bcp47_codes
    for label in _LABELS if is_cldr else ():
        columns = read_texts(held_out, ["query", label])
        try:
            labels = labels_of(f"{held_out}, column {label!r}", columns["query"], columns[label])
        except UnfitError as error:
            # A build of few languages may have a single script.
            logger.warning("%s; left out", error)
            continue
        prefix = f"{name}{label.capitalize()}"
        tasks.append(classification(f"{prefix}Classification", held_out, languages, labels))
        tasks.append(clustering(f"{prefix}Clustering", held_out, languages, labels))
    return tasks
