"""Prepared sources: tokens of every distinct text and rows of integers into them, memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from training.common.checksums import check_file
from training.common.errors import UserError

# A prepared source is a folder of these files: raw little-endian arrays, checksums beside each, and a JSON file that is
# written last.
TOKENS = "tokens.int32"
OFFSETS = "offsets.int64"
SPLITS = {"train": "train.int32", "validation": "validation.int32"}
DESCRIPTION = "source.json"
# The texts themselves, and where each starts among their bytes; there only if they were to be kept.
TEXTS = "texts.utf8"
TEXT_OFFSETS = "text_offsets.int64"
# A number for the normal form of each text, the same for texts that differ in spelling only; there only if asked for.
FORMS = "forms.uint64"
# Bad rows that were put aside, with the reason; there only if there are some.
QUARANTINE = "quarantine.parquet"
# Texts that are looked at when a source is checked.
_CHECKED_TEXTS = 4096


def _open(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r", shape=shape) if all(shape) else np.zeros(shape, dtype)


class PreparedSource:
    """One prepared source, opened without reading it.

    Attributes:
        name: The source's name.
        task_type: ``retrieval``, ``clustering`` or ``classification``.
        num_negatives: Negative columns of the rows; a row that has fewer is filled with -1.
        rows: ``(n, 2 + num_negatives)`` int32 positions of query, passage and negatives among the texts, by split.
        description: Everything that ``source.json`` says.

    Raises:
        UserError: If the folder does not hold a finished prepared source.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            self.description: dict[str, Any] = json.loads((self.folder / DESCRIPTION).read_text())
            self.name: str = self.description["name"]
            self.task_type: str = self.description["task_type"]
            self.num_negatives: int = self.description["negatives"]
            self._tokens = _open(self.folder / TOKENS, "<i4", (self.description["tokens"],))
            self._offsets = _open(self.folder / OFFSETS, "<i8", (self.description["texts"] + 1,))
            self.rows = {
                split: _open(self.folder / file, "<i4", (self.description["rows"][split], 2 + self.num_negatives))
                for split, file in SPLITS.items()
            }
            if self.has_forms:
                self._forms = _open(self.folder / FORMS, "<u8", (self.description["texts"],))
            if self.has_texts:
                self._texts = _open(self.folder / TEXTS, "u1", (self.description["text_bytes"],))
                self._text_offsets = _open(self.folder / TEXT_OFFSETS, "<i8", (self.description["texts"] + 1,))
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{self.folder}: not a whole prepared source ({reason}); prepare it again") from None

    def check(self) -> PreparedSource:
        """Compares the files with what was written, in bounded time, and returns the source.

        Of each file at most 64 MiB are read, as :func:`~training.common.checksums.check_file` has it, and of the texts
        some thousand are looked at: none is empty, and each ends in its end token.

        Raises:
            UserError: If a file is damaged.
        """
        remedy = f"delete {self.folder}, and it is prepared again"
        for name in self.arrays:
            check_file(self.folder / name, remedy)
        texts = self.description["texts"]
        some = np.unique(np.linspace(0, texts - 1, min(texts, _CHECKED_TEXTS), dtype=np.int64))
        starts, ends = self._offsets[some], self._offsets[some + 1]
        if (ends <= starts).any() or (self._tokens[ends - 1] != self.description["end_token"]).any():
            raise UserError(f"{self.folder}: a text is empty or does not end in its end token; {remedy}")
        return self

    def __reduce__(self) -> tuple[type[PreparedSource], tuple[Path]]:
        # A pickled memory map holds the whole array: a loader worker opens the folder instead.
        return type(self), (self.folder,)

    def __repr__(self) -> str:
        rows = {split: len(rows) for split, rows in self.rows.items()}
        return f"PreparedSource({self.name!r}, {self.task_type}, rows={rows}, texts={self.description['texts']})"

    @property
    def arrays(self) -> list[str]:
        """Names of its arrays."""
        kept = [*([TEXTS, TEXT_OFFSETS] if self.has_texts else []), *([FORMS] if self.has_forms else [])]
        return [TOKENS, OFFSETS, *SPLITS.values(), *kept]

    @property
    def has_forms(self) -> bool:
        """Whether the normal forms of the texts were kept, too."""
        return "forms" in self.description

    def forms(self, positions: np.ndarray) -> np.ndarray:
        """``(n,)`` numbers of the normal forms of the texts at the given positions; these where no forms are kept."""
        return self._forms[positions] if self.has_forms else positions

    @property
    def has_texts(self) -> bool:
        """Whether the texts themselves were kept, too."""
        return "text_bytes" in self.description

    def texts(self, positions: np.ndarray) -> list[str]:
        """The ``n`` texts at the given positions, in that order: with their instruction, and not cut.

        Args:
            positions: ``(n,)`` positions among the source's texts.

        Raises:
            UserError: If texts were not kept.
        """
        if not self.has_texts:
            raise UserError(
                f"{self.folder}: the texts were not kept beside their tokens; prepare it again by prepare.py "
                "--keep-texts"
            )
        starts, ends = self._text_offsets[positions].tolist(), self._text_offsets[positions + 1].tolist()
        return [self._texts[start:end].tobytes().decode() for start, end in zip(starts, ends, strict=True)]

    def lengths(self, texts: np.ndarray) -> np.ndarray:
        """``(n,)`` token counts of the texts at the given positions."""
        return self._offsets[texts + 1] - self._offsets[texts]

    def token_blocks(self, size: int = 1 << 22) -> Iterator[np.ndarray]:
        """Yields the token ids of all texts, one after the other, in blocks of ``(size,)`` at most."""
        for start in range(0, len(self._tokens), size):
            yield self._tokens[start : start + size]

    def tokens(self, text: int) -> np.ndarray:
        """``(length,)`` token ids of one text, EOS last."""
        return self._tokens[self._offsets[text] : self._offsets[text + 1]]


def put_aside(source: PreparedSource) -> str:
    """How many rows of a source were put aside for which reasons, in a line; empty if none were."""
    reasons = source.description["quarantined"]
    if not reasons:
        return ""
    aside, read = sum(reasons.values()), source.description["read"]
    said = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
    return (
        f"source {source.name!r}: {aside:,} of {read:,} rows ({aside / read:.1%}) were put aside ({said}), see "
        f"{source.folder / QUARANTINE}"
    )


def find_prepared(folder: Path, fingerprints: Mapping[str, str]) -> list[Path]:
    """The folders of a run's sources among those that other settings may have left beside them.

    Args:
        folder: The folder of prepared sources.
        fingerprints: Those of the sources, by name, as a run notes them.

    Returns:
        A folder for each source that is there, in the order given.
    """
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.glob(f"[!.]*/{DESCRIPTION}")):
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
            found.setdefault((described["name"], described["fingerprint"]), path.parent)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return [found[named] for named in fingerprints.items() if named in found]
