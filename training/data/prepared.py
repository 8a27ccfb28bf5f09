"""Prepared sources: tokens of every distinct text, and rows of integer positions into them, memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.common.errors import UserError
from training.common.outputs import check_file

# A prepared source is a folder of these files: raw little-endian arrays, a file of checksums beside each, and a JSON
# file that is written last.
TOKENS = "tokens.int32"
OFFSETS = "offsets.int64"
SPLITS = {"train": "train.int32", "validation": "validation.int32"}
DESCRIPTION = "source.json"
# The texts, and where each starts among their bytes; only if they were to be kept.
TEXTS = "texts.utf8"
TEXT_OFFSETS = "text_offsets.int64"
# One number per text, which texts that differ only in spelling share; only if they were to be kept.
FORMS = "forms.uint64"
# Bad rows with the reason; only if there are any.
QUARANTINE = "quarantine.parquet"
FILE_PATTERNS = (DESCRIPTION, QUARANTINE, "*.int32*", "*.int64*", "*.uint64*", f"{TEXTS}*")
_CHECKED_TEXTS = 4096


class PreparedSource:
    """One prepared source, opened without reading it.

    Attributes:
        name: The source's name.
        task_type: ``retrieval``, ``clustering`` or ``classification``.
        num_negatives: Negative columns of the rows; missing negatives are -1.
        rows: ``(n, 2 + num_negatives)`` int32 positions of query, passage and negatives among the texts, by split.
        description: The content of ``source.json``.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            described: dict[str, Any] = json.loads((self.folder / DESCRIPTION).read_text())
            self.description = described
            self.name: str = described["name"]
            self.task_type: str = described["task_type"]
            self.num_negatives: int = described["negatives"]
            texts, width = described["texts"], 2 + self.num_negatives
            self._tokens = self._open(TOKENS, "<i4", described["tokens"])
            self._offsets = self._open(OFFSETS, "<i8", texts + 1)
            self.rows = {
                split: self._open(name, "<i4", described["rows"][split], width) for split, name in SPLITS.items()
            }
            if self.has_forms:
                self._forms = self._open(FORMS, "<u8", texts)
            if self.has_texts:
                self._texts = self._open(TEXTS, "u1", described["text_bytes"])
                self._text_offsets = self._open(TEXT_OFFSETS, "<i8", texts + 1)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{self.folder}: not a whole prepared source ({reason}); prepare it again") from None

    def _open(self, name: str, dtype: str, *shape: int) -> np.ndarray:
        # An empty file cannot be mapped.
        return np.memmap(self.folder / name, dtype, "r", shape=shape) if all(shape) else np.zeros(shape, dtype)

    def check(self) -> PreparedSource:
        """Compare the files with their checksums, and some texts with the format, in bounded time."""
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
        # A pickled memory map contains the whole array: a loader worker opens the folder instead.
        return type(self), (self.folder,)

    def __repr__(self) -> str:
        rows = {split: len(rows) for split, rows in self.rows.items()}
        return f"PreparedSource({self.name!r}, {self.task_type}, rows={rows}, texts={self.description['texts']})"

    @property
    def arrays(self) -> list[str]:
        """File names of its arrays."""
        kept = [*([TEXTS, TEXT_OFFSETS] if self.has_texts else []), *([FORMS] if self.has_forms else [])]
        return [TOKENS, OFFSETS, *SPLITS.values(), *kept]

    @property
    def has_forms(self) -> bool:
        """Whether the normal forms of the texts were kept."""
        return "forms" in self.description

    @property
    def has_texts(self) -> bool:
        """Whether the texts were kept."""
        return "text_bytes" in self.description

    def forms(self, positions: np.ndarray) -> np.ndarray:
        """Return ``(n,)`` numbers of the texts' normal forms, or the ``(n,)`` positions if forms were not kept."""
        return self._forms[positions] if self.has_forms else positions

    def texts(self, positions: np.ndarray) -> list[str]:
        """Return the texts at ``(n,)`` positions, with their instruction and not truncated."""
        if not self.has_texts:
            raise UserError(
                f"{self.folder}: the texts were not kept beside their tokens; prepare it again by prepare.py "
                "--keep-texts"
            )
        starts, ends = self._text_offsets[positions].tolist(), self._text_offsets[positions + 1].tolist()
        return [self._texts[start:end].tobytes().decode() for start, end in zip(starts, ends, strict=True)]

    def lengths(self, texts: np.ndarray) -> np.ndarray:
        """Return the token counts of the texts at the given positions, in the same shape."""
        return self._offsets[texts + 1] - self._offsets[texts]

    def token_blocks(self, size: int = 1 << 22) -> Iterator[np.ndarray]:
        """Yield the token ids of all texts, concatenated, in blocks of at most ``size``."""
        for start in range(0, len(self._tokens), size):
            yield self._tokens[start : start + size]

    def tokens(self, text: int) -> np.ndarray:
        """Return ``(length,)`` token ids of one text, EOS last."""
        return self._tokens[self._offsets[text] : self._offsets[text + 1]]


def put_aside(source: PreparedSource) -> str:
    """Return a line with the number of quarantined rows by reason; empty if there are none."""
    reasons = source.description["quarantined"]
    if not reasons:
        return ""
    aside, read = sum(reasons.values()), source.description["read"]
    counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
    return (
        f"source {source.name!r}: {aside:,} of {read:,} rows ({aside / read:.1%}) were put aside ({counts}), see "
        f"{source.folder / QUARANTINE}"
    )


def sources_table(prepared: Sequence[PreparedSource]) -> str:
    """Return an aligned table of prepared sources and their sum, without a final newline."""
    rows = []
    for source in prepared:
        about = source.description
        counts = (*about["rows"].values(), about["texts"], about["tokens"], sum(about["quarantined"].values()))
        rows.append((source.name, source.task_type, *counts))
    totals = [sum(column) for column in list(zip(*rows, strict=True))[2:]]
    head = ("source", "task", "rows", "validation", "texts", "tokens", "put aside")
    cells = [
        head,
        *([name, task, *map("{:,}".format, counts)] for name, task, *counts in [*rows, ("all", "", *totals)]),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, task, *numbers in cells:
        lines.append("  ".join([name.ljust(widths[0]), task.ljust(widths[1]), *map(str.rjust, numbers, widths[2:])]))
    return "\n".join(lines)


def find_prepared(folder: Path, fingerprints: Mapping[str, str]) -> list[Path]:
    """Return the existing folders of sources with these fingerprints, by name, among those of other settings."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.glob(f"[!.]*/{DESCRIPTION}")):
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
            found.setdefault((described["name"], described["fingerprint"]), path.parent)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return [found[named] for named in fingerprints.items() if named in found]
