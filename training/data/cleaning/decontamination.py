"""Training rows that an evaluation set contains: a text of theirs as a whole, or a run of 13 tokens of it.

Texts are compared column by column after one normalisation. A whole text counts however short it is; runs need 13
tokens: words, or characters where the script has no spaces, which is about as much text as 3 to 8 words.

``datatrove``'s decontamination asks for ``lighteval`` and a word tokenizer of one language, knows no texts shorter than
a run, and stops at the first match of a row, where the report needs every set and column; so the index is our own: a
sorted array of 8 bytes a distinct run, read from disk where it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.common.errors import UserError
from training.common.executor import Executor, Phase, run_phases
from training.common.run_folder import write_whole
from training.data.cleaning.evaluation_texts import EvaluationSet
from training.data.cleaning.normalise import HashedTexts, hash_texts, ngram_hashes
from training.data.cleaning.work import stage_folder
from training.data.published import PublishedFile

# The run length of GPT-3's decontamination (Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C).
GRAM = 13

_TEXTS_PER_CHUNK = 16_384
# Long passages times 24 negatives: fewer rows at once than elsewhere.
_BATCH_ROWS = 2048
_KINDS = ("wholes", "grams")


class Contamination(NamedTuple):
    """What evaluation sets and rows have in common.

    Attributes:
        columns: ``(name of the set, column of the set)`` of each column of evaluation texts.
        texts: Number of texts in each.
        found: For each file ``(n, 4)``: row, column (0 the query, 1 the passage, ``k + 1`` the negative ``k``),
            position in ``columns``, and 1 if the row's text is one of the evaluation texts, 0 if it shares a run.
    """

    columns: list[tuple[str, str]]
    texts: list[int]
    found: list[np.ndarray]


def find_contamination(
    files: Sequence[Path],
    sets: Sequence[EvaluationSet],
    work: Path,
    negatives: bool = False,
    executor: Executor | None = None,
) -> Contamination:
    """Looks for evaluation texts in the rows of files.

    Args:
        files: Files of the published format.
        sets: Evaluation sets, of different names.
        work: Where the index and the state of tasks go. What is finished there and unchanged is used again.
        negatives: Whether negatives are looked at, too.
        executor: Where tasks run; local processes if None.

    Raises:
        UserError: If a file or an evaluation set is faulty, or two sets have one name.
    """
    names = [given.name for given in sets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two evaluation sets are named {name!r}; rename a file or name each set once")
    versions = [given.version() for given in sets]
    index = stage_folder(work, "evaluation", [], [GRAM, versions])
    run_phases(_index_phases(sets, index), index / "tasks", executor)
    rows = stage_folder(work, "contamination", files, [GRAM, versions, negatives])
    find = partial(_find, tuple(files), index, negatives, rows)
    run_phases([Phase("contamination", find, len(files))], rows / "tasks", executor)
    labels = _labels(index)
    found = [np.load(rows / f"{number:05d}.npy") for number in range(len(files))]
    return Contamination(
        [(names[label["set"]], label["column"]) for label in labels], [label["texts"] for label in labels], found
    )


def _index_phases(sets: Sequence[EvaluationSet], folder: Path) -> list[Phase]:
    return [
        Phase("evaluation-sets", partial(_index_set, tuple(sets), folder), len(sets)),
        Phase("evaluation-index", partial(_merge_index, folder), 1),
    ]


class _Distinct:
    """Distinct hashes of what was added, at any time few more than these in memory."""

    def __init__(self) -> None:
        self._merged = np.empty(0, dtype=np.uint64)
        self._waiting: list[np.ndarray] = []
        self._count = 0

    def add(self, hashes: np.ndarray) -> None:
        self._waiting.append(hashes)
        self._count += len(hashes)
        if self._count > max(len(self._merged), 1 << 20):
            self.sorted()

    def sorted(self) -> np.ndarray:
        # np.unique puts hashes into a table of its own before it sorts them, several times as slow.
        hashes = np.sort(np.concatenate([self._merged, *self._waiting]))
        self._merged, self._waiting, self._count = hashes[np.diff(hashes, prepend=~hashes[:1]) != 0], [], 0
        return self._merged


def _index_set(sets: Sequence[EvaluationSet], folder: Path, task: int) -> None:
    """Writes the hashes of one set, column by column."""
    waiting: dict[str, list[str]] = {}
    distinct: dict[str, dict[str, _Distinct]] = {}
    counts: dict[str, int] = {}

    def take(column: str) -> None:
        texts, waiting[column] = waiting[column], []
        hashed = hash_texts(texts)
        found = distinct.setdefault(column, {kind: _Distinct() for kind in _KINDS})
        found["wholes"].add(hashed.wholes)
        found["grams"].add(ngram_hashes(hashed, GRAM)[0])
        counts[column] = counts.get(column, 0) + len(texts)

    for column, text in sets[task].texts():
        # Blank texts are equal to one another and say nothing.
        if text.strip():
            waiting.setdefault(column, []).append(text)
            if len(waiting[column]) == _TEXTS_PER_CHUNK:
                take(column)
    for column in list(waiting):
        take(column)
    if not counts:
        raise UserError(f"evaluation set {sets[task].name!r} holds no text; check its file and columns")
    labels = []
    for number, column in enumerate(sorted(counts)):
        stem = f"{task:04d}_{number:03d}"
        for kind in _KINDS:
            np.save(folder / f"{stem}.{kind}.npy", distinct[column][kind].sorted())
        labels.append({"set": task, "column": column, "texts": counts[column], "stem": stem})
    write_whole(folder / f"{task:04d}.json", json.dumps(labels))


def _labels(folder: Path) -> list[dict]:
    return [label for path in sorted(folder.glob("[0-9]*.json")) for label in json.loads(path.read_text())]


def _merge_index(folder: Path, task: int) -> None:
    """Writes what all sets hold together, so that a row without a match is looked up once."""
    for kind in _KINDS:
        merged = _Distinct()
        for label in _labels(folder):
            merged.add(np.load(folder / f"{label['stem']}.{kind}.npy"))
        np.save(folder / f"all.{kind}.npy", merged.sorted())


def _is_in(hashes: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Which hashes a sorted index holds."""
    if not len(index):
        return np.zeros(len(hashes), dtype=bool)
    return index[np.minimum(np.searchsorted(index, hashes), len(index) - 1)] == hashes


class _Index:
    """The hashes of all evaluation texts."""

    def __init__(self, folder: Path) -> None:
        self._all = {kind: np.load(folder / f"all.{kind}.npy", mmap_mode="r") for kind in _KINDS}
        self._own = [
            {kind: np.load(folder / f"{label['stem']}.{kind}.npy", mmap_mode="r") for kind in _KINDS}
            for label in _labels(folder)
        ]

    def matches(self, hashed: HashedTexts) -> list[tuple[int, int, int]]:
        """Text, column of evaluation texts, and whether the text is one of them; others share a run."""
        texts = np.arange(len(hashed.wholes))
        grams, owner = ngram_hashes(hashed, GRAM)
        hits = {}
        for kind, hashes, position in (("wholes", hashed.wholes, texts), ("grams", grams, owner)):
            found = _is_in(hashes, self._all[kind])
            hits[kind] = hashes[found], position[found]
        matches = []
        for number, own in enumerate(self._own):
            of_kind = {kind: set(hits[kind][1][_is_in(hits[kind][0], own[kind])].tolist()) for kind in _KINDS}
            matches += [(text, number, 1) for text in of_kind["wholes"]]
            matches += [(text, number, 0) for text in of_kind["grams"] - of_kind["wholes"]]
        return matches


def _find(files: Sequence[Path], index_folder: Path, negatives: bool, folder: Path, task: int) -> None:
    index, file = _Index(index_folder), PublishedFile(files[task])
    found: list[tuple[int, int, int, int]] = []
    for batch in file.batches(_BATCH_ROWS, raw=True):
        for column in ("query", "passage", *(file.negatives if negatives else ())):
            texts = batch.columns[column]
            rows = [row for row, text in enumerate(texts) if text is not None]
            number = ("query", "passage").index(column) if column in ("query", "passage") else 1 + _number(column)
            found += [
                (batch.first_row + rows[text], number, label, whole)
                for text, label, whole in index.matches(hash_texts([texts[row] for row in rows]))
            ]
    np.save(folder / f"{task:05d}.npy", np.array(sorted(found), dtype=np.int64).reshape(-1, 4))


def _number(column: str) -> int:
    return int(column.removeprefix("negative_"))
