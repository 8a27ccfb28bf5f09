"""Large made-up sources in the published format, written fast and without being held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from tests.benchmarks.texts import NEGATIVES
from training.data.parquet import ROW_GROUP_ROWS, rows_table, write_parquet

__all__ = ["MadeUpCorpus"]


class MadeUpCorpus:
    """Rows whose negatives are passages of other rows, as mined negatives are.

    Args:
        rows: Number of rows.
        seed: Seed of everything.
    """

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.rows = rows
        generator = np.random.default_rng(seed)
        letters = generator.choice(list("etaoinshrdlucmfwypvbgkjqxz"), (50_000, 9), p=_frequencies(26))
        words = [" ".join("".join(word)[: 2 + i % 8] for i, word in enumerate(letters)).split()]
        # Zipf's law: a few words are most of a text, as in every language.
        drawn = generator.zipf(1.3, 400_000) % len(words[0])
        self._text = " ".join(words[0][i] for i in drawn)
        self._query_lengths = generator.lognormal(np.log(60), 0.4, rows).clip(10, 400).astype(int)
        self._lengths = generator.lognormal(np.log(200), 0.6, rows).clip(20, 4000).astype(int)
        self._starts = generator.integers(0, len(self._text) - 4000, (2, rows))
        self._generator = generator

    def passage(self, row: int) -> str:
        """The passage of a row, unlike every other by its number."""
        start = int(self._starts[0, row])
        return f"{row} {self._text[start : start + int(self._lengths[row])]}"

    def _query(self, row: int) -> str:
        start = int(self._starts[1, row])
        return f"{self._text[start : start + int(self._query_lengths[row])]} {row}"

    def write(self, path: Path) -> Path:
        """Writes the rows to a parquet file."""
        write_parquet(path, self._tables())
        return path

    def _tables(self) -> Iterator[pa.Table]:
        for start in range(0, self.rows, ROW_GROUP_ROWS):
            rows = np.arange(start, min(start + ROW_GROUP_ROWS, self.rows))
            others = (rows + self._generator.integers(1, self.rows, (NEGATIVES, len(rows)))) % self.rows
            yield rows_table(
                [self._query(row) for row in rows],
                [self.passage(row) for row in rows],
                [[self.passage(row) for row in column] for column in others],
            )


def _frequencies(letters: int) -> np.ndarray:
    weights = 1 / (1 + np.arange(letters))
    return weights / weights.sum()
