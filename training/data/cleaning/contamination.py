"""Training rows that an evaluation set contains: one of their texts as a whole, or a run of 13 tokens of it.

Texts are compared column by column after the same normalisation. A whole text counts however short it is. Tokens are
words, or characters where the script has no spaces; 13 of them are about as much text as 3 to 8 words.

``datatrove``'s decontamination needs ``lighteval`` and a word tokenizer for one language, does not find texts shorter
than a run, and stops at the first match of a row, while the report needs every set and column. This index is a sorted
array of 8 bytes per distinct run, memory-mapped.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
# Sorted after so many new hashes.
_UNSORTED = 1 << 20


class Contamination(NamedTuple):
    """What evaluation sets and rows have in common."""

    columns: list[tuple[str, str]]  # name and column of each column of evaluation texts
    texts: list[int]  # their number in each column
    # For each file (n, 4): row, column (0 the query, 1 the passage, k + 1 the negative k), index in columns, and 1 if
    # the text is an evaluation text or 0 if it shares a run.
    found: list[np.ndarray]


def find_contamination(
    files: Sequence[Path],
    sets: Sequence[EvaluationSet],
    work: Path,
    negatives: bool = False,
    executor: Executor | None = None,
) -> Contamination:
    """Look for evaluation texts in queries, passages and, on request, negatives of files.

    ``work`` is the folder of intermediate results, which are reused while files and sets stay the same.
    """
    names = [each.name for each in sets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two evaluation sets are named {name!r}; rename a file or name each set once")
    versions = [each.version() for each in sets]
    index = stage_folder(work, "evaluation", [], [GRAM, versions])
    phases = [
        Phase("evaluation-sets", partial(_index_set, tuple(sets), index), len(sets)),
        Phase("evaluation-index", partial(_merge_index, index), 1),
    ]
    run_phases(phases, index / "tasks", executor)
    rows = stage_folder(work, "contamination", files, [GRAM, versions, negatives])
    find = partial(_find, tuple(files), index, negatives, rows)
    run_phases([Phase("contamination", find, len(files))], rows / "tasks", executor)
    labels = _labels(index)
    columns = [(names[label["set"]], label["column"]) for label in labels]
    found = [np.load(rows / f"{number:05d}.npy") for number in range(len(files))]
    return Contamination(columns, [label["texts"] for label in labels], found)


class _Distinct:
    """Distinct hashes; in memory there are few more than these at any time."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype=np.uint64)
        self._new: list[np.ndarray] = []
        self._count = 0

    def add(self, hashes: np.ndarray) -> None:
        self._new.append(hashes)
        self._count += len(hashes)
        if self._count > max(len(self._sorted), _UNSORTED):
            self.sorted()

    def sorted(self) -> np.ndarray:
        # np.unique first builds a hash table, which takes several times as long.
        hashes = np.sort(np.concatenate([self._sorted, *self._new]))
        self._sorted, self._new, self._count = hashes[np.diff(hashes, prepend=~hashes[:1]) != 0], [], 0
        return self._sorted


def _index_set(sets: Sequence[EvaluationSet], folder: Path, task: int) -> None:
    """Write the hashes of one set: for each column those of whole texts and those of runs, sorted."""
    waiting: dict[str, list[str]] = defaultdict(list)
    wholes: dict[str, _Distinct] = defaultdict(_Distinct)
    grams: dict[str, _Distinct] = defaultdict(_Distinct)
    counts: dict[str, int] = defaultdict(int)

    def take(column: str) -> None:
        hashed = hash_texts(waiting[column])
        wholes[column].add(hashed.wholes)
        grams[column].add(ngram_hashes(hashed, GRAM)[0])
        counts[column] += len(waiting.pop(column))

    for column, text in sets[task].texts():
        # Blank texts are equal to one another and say nothing.
        if text.strip():
            waiting[column].append(text)
            if len(waiting[column]) == _TEXTS_PER_CHUNK:
                take(column)
    for column in list(waiting):
        take(column)
    if not counts:
        raise UserError(f"evaluation set {sets[task].name!r} holds no text; check its file and columns")
    labels = []
    for number, column in enumerate(sorted(counts)):
        stem = f"{task:04d}_{number:03d}"
        np.save(folder / f"{stem}.wholes.npy", wholes[column].sorted())
        np.save(folder / f"{stem}.grams.npy", grams[column].sorted())
        labels.append({"set": task, "column": column, "texts": counts[column], "stem": stem})
    write_whole(folder / f"{task:04d}.json", json.dumps(labels))


def _labels(folder: Path) -> list[dict[str, Any]]:
    return [label for path in sorted(folder.glob("[0-9]*.json")) for label in json.loads(path.read_text())]


def _merge_index(folder: Path, _: int) -> None:
    """Write the hashes of all sets together, so that a row without a match is looked up once."""
    for kind in ("wholes", "grams"):
        merged = _Distinct()
        for label in _labels(folder):
            merged.add(np.load(folder / f"{label['stem']}.{kind}.npy"))
        np.save(folder / f"all.{kind}.npy", merged.sorted())


def _is_in(hashes: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Mask of the hashes that a sorted index contains."""
    if not len(index):
        return np.zeros(len(hashes), dtype=bool)
    return index[np.minimum(np.searchsorted(index, hashes), len(index) - 1)] == hashes


def _find(files: Sequence[Path], index: Path, negatives: bool, folder: Path, task: int) -> None:
    def load(stem: str) -> list[np.ndarray]:
        return [np.load(index / f"{stem}.{kind}.npy", mmap_mode="r") for kind in ("wholes", "grams")]

    everything, columns = load("all"), [load(label["stem"]) for label in _labels(index)]
    found: list[tuple[int, int, int, int]] = []
    file = PublishedFile(files[task])
    # A column's number is 0 for the query, 1 for the passage and k + 1 for negative_k.
    numbers = {"query": 0, "passage": 1}
    if negatives:
        numbers |= {name: 1 + int(name.removeprefix("negative_")) for name in file.negatives}
    for batch in file.batches(_BATCH_ROWS, raw=True):
        for column, number in numbers.items():
            rows = np.array([row for row, text in enumerate(batch.columns[column]) if text is not None], dtype=np.int64)
            hashed = hash_texts([batch.columns[column][row] for row in rows])
            grams, owner = ngram_hashes(hashed, GRAM)
            hits = []
            for hashes, position, known in zip((hashed.wholes, grams), (rows, rows[owner]), everything, strict=True):
                hit = _is_in(hashes, known)
                hits.append((hashes[hit], position[hit] + batch.first_row))
            for label, own in enumerate(columns):
                whole, run = (
                    set(where[_is_in(hashes, known)].tolist()) for (hashes, where), known in zip(hits, own, strict=True)
                )
                found += [(row, number, label, 1) for row in whole]
                found += [(row, number, label, 0) for row in run - whole]
    np.save(folder / f"{task:05d}.npy", np.array(sorted(found), dtype=np.int64).reshape(-1, 4))
