"""Training rows that an evaluation set contains: one of their texts as a whole, or a run of 13 tokens of it.

``datatrove``'s decontamination does not find texts shorter than a run, and stops at the first match of a row.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd

from training.common.errors import UserError
from training.common.executor import Executor, Phase, run_phases
from training.common.outputs import write_whole
from training.data.cleaning.evaluation_texts import EvaluationSet
from training.data.cleaning.normalise import hash_texts, ngram_hashes
from training.data.published import PublishedFile
from training.data.storage import stage_folder

# The run length of GPT-3's decontamination (Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C).
GRAM = 13
_TEXTS_PER_CHUNK = 16_384
# Long passages times 24 negatives: fewer rows at once than elsewhere.
_BATCH_ROWS = 2048


def find_contamination(
    files: Sequence[Path],
    sets: Sequence[EvaluationSet],
    work: Path,
    negatives: bool = False,
    executor: Executor | None = None,
) -> tuple[dict[str, int], pd.DataFrame]:
    """Look for evaluation texts in queries, positives and, on request, negatives of files.

    Returns the number of texts of each set, and the matches: number of the ``file``, ``row``, ``column``,
    ``evaluation_set``, ``evaluation_column``, and whether a ``whole`` evaluation text or a run of one was found.
    Intermediate results in the folder ``work`` are reused while files and sets stay the same.
    """
    names = [each.name for each in sets]
    if repeated := sorted(name for name in names if names.count(name) > 1):
        raise UserError(f"two evaluation sets are named {repeated[0]!r}; rename a file or name each set once")
    versions = [each.version() for each in sets]
    index = stage_folder(work, "evaluation", [], [GRAM, versions])
    phases = [
        Phase("evaluation-sets", partial(_hash_set, tuple(sets), index), len(sets)),
        Phase("evaluation-index", partial(_merge, index), 1),
    ]
    run_phases(phases, index / "tasks", executor)
    rows = stage_folder(work, "contamination", files, [GRAM, versions, negatives])
    find = partial(_find, tuple(files), index, negatives, rows)
    run_phases([Phase("contamination", find, len(files))], rows / "tasks", executor)
    columns = ["evaluation_set", "evaluation_column", "texts"]
    columns = pd.DataFrame(json.loads((index / "columns.json").read_text()), columns=columns)
    found = pd.concat([pd.read_parquet(rows / f"{number:05d}.parquet") for number in range(len(files))])
    matches = found.reset_index(drop=True).join(columns.drop(columns="texts"), on="label").drop(columns="label")
    return columns.groupby("evaluation_set")["texts"].sum().to_dict(), matches


def _hash_texts(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return hashes of whole texts and of their runs, which are whole texts, and the text of each."""
    hashed = hash_texts(texts)
    runs, owner = ngram_hashes(hashed, GRAM)
    whole = np.arange(len(texts) + len(runs)) < len(texts)
    return np.append(hashed.wholes, runs), whole, np.append(np.arange(len(texts)), owner)


def _hash_set(sets: Sequence[EvaluationSet], folder: Path, task: int) -> None:
    """Write the distinct hashes of one set by column and kind, and the number of texts in each column."""
    hashes: dict[str, list[list[np.ndarray]]] = defaultdict(lambda: [[], []])
    # Blank texts are equal to one another and say nothing.
    texts = (pair for pair in sets[task].texts() if pair[1].strip())
    counts: dict[str, int] = defaultdict(int)
    while chunk := sorted(islice(texts, _TEXTS_PER_CHUNK)):
        for column, pairs in groupby(chunk, itemgetter(0)):
            found, whole, _ = _hash_texts([text for _, text in pairs])
            counts[column] += int(whole.sum())
            for kind in (0, 1):
                hashes[column][kind].append(np.unique(found[whole == kind]))
    if not counts:
        raise UserError(f"evaluation set {sets[task].name!r} holds no text; check its file and columns")
    for number, column in enumerate(sorted(counts)):
        for kind, parts in enumerate(hashes[column]):
            np.save(folder / f"{task:04d}_{number:03d}_{kind}.npy", np.unique(np.concatenate(parts)))
    columns = [[sets[task].name, column, counts[column]] for column in sorted(counts)]
    write_whole(folder / f"{task:04d}.json", json.dumps(columns))


def _merge(folder: Path, _: int) -> None:
    """Write the hashes of all sets, sorted, and beside each its column and kind as ``2 * column + kind``."""
    columns = [column for path in sorted(folder.glob("[0-9]*.json")) for column in json.loads(path.read_text())]
    parts = [np.load(path) for path in sorted(folder.glob("[0-9]*.npy"))]
    hashes, codes = np.concatenate(parts), np.repeat(np.arange(len(parts), dtype=np.int32), list(map(len, parts)))
    order = np.argsort(hashes)
    np.save(folder / "hashes.npy", hashes[order])
    np.save(folder / "codes.npy", codes[order])
    write_whole(folder / "columns.json", json.dumps(columns))


def _find(files: Sequence[Path], folder: Path, negatives: bool, output: Path, task: int) -> None:
    index, codes = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("hashes", "codes"))
    file = PublishedFile(files[task])
    # Row, column and label of each match → whether any is of a whole text.
    found: dict[tuple[int, str, int], bool] = {}
    for batch in file.batches(_BATCH_ROWS, raw=True):
        for column in ("query", *file.positives, *(file.negatives if negatives else [])):
            # A missing document is a blank text, and no evaluation text is blank.
            hashes, whole, text = _hash_texts([text or "" for text in batch.columns[column]])
            starts, ends = (np.searchsorted(index, hashes, side) for side in ("left", "right"))
            # A hash may be that of several columns of evaluation texts.
            for match in np.flatnonzero(ends > starts).tolist():
                for code in codes[starts[match] : ends[match]].tolist():
                    if code % 2 == whole[match]:
                        key = (batch.first_row + int(text[match]), column, code // 2)
                        found[key] = found.get(key, False) or code % 2 == 1
    matches = [(task, *key, found[key]) for key in sorted(found)]
    kinds = {"file": int, "row": int, "column": str, "label": int, "whole": bool}
    pd.DataFrame(matches, columns=[*kinds]).astype(kinds).to_parquet(output / f"{task:05d}.parquet")
