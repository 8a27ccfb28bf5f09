"""Prepared sources: tokens of every distinct text, and rows of integer positions into them, memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from training.common.errors import UserError
from training.common.outputs import check_file

# A prepared source is a folder of these files: raw little-endian arrays, a file of checksums beside each, and a JSON
# file that is written last. Optional are the texts, with the starts of each among their bytes; a number per text, which
# texts that differ only in spelling, or are of one document, share; and the bad rows with the reason.
TOKENS, OFFSETS = "tokens.int32", "offsets.int64"
SPLITS = {"train": "train.int32", "validation": "validation.int32"}
SCORES = {split: f"{split}_scores.float32" for split in SPLITS}
DESCRIPTION, QUARANTINE = "source.json", "quarantine.parquet"
TEXTS, TEXT_OFFSETS, FORMS = "texts.utf8", "text_offsets.int64", "forms.uint64"
FILE_PATTERNS = (DESCRIPTION, QUARANTINE, "*.int32*", "*.float32*", "*.int64*", "*.uint64*", f"{TEXTS}*")


class PreparedSource:
    """One prepared source, opened without reading it.

    Attributes:
        name: The source's name.
        task_type: ``retrieval``, ``clustering``, ``classification`` or ``similarity``.
        num_negatives: Negative columns of the rows.
        num_positives: Positive columns of the rows, the passage included.
        rows: ``(n, 1 + num_positives + num_negatives)`` int32 positions of query, passage, negatives and further
            positives among the texts, by split; -1 for missing documents.
        scores: ``(n,)`` float32 scores of the rows of a similarity source, by split; or, if they were kept,
            ``(n, num_positives + num_negatives)`` of a row's documents, NaN where one has none; else empty.
        description: The content of ``source.json``.
        mapped_files: The memory maps by file name.
        has_texts: Whether the texts were kept; ``has_forms``: their normal forms; ``has_ids``: their documents;
            ``has_document_scores``: scores of rows' documents.
        weight: That of the manifest, which no file holds.
    """

    def __init__(self, folder: Path | str, weight: float = 1) -> None:
        self.folder, self.weight = Path(folder), weight
        self.mapped_files: dict[str, np.ndarray] = {}
        try:
            self.description = described = json.loads((self.folder / DESCRIPTION).read_text())
            self.name: str = described["name"]
            self.task_type: str = described["task_type"]
            self.num_negatives: int = described["negatives"]
            self.num_positives: int = described.get("positives", 1)
            self.has_texts, self.has_forms = "text_bytes" in described, "forms" in described
            self.has_ids = "document_ids" in described
            texts, width = described["texts"], 1 + self.num_positives + self.num_negatives
            files = {TOKENS: ("<i4", described["tokens"]), OFFSETS: ("<i8", texts + 1)}
            files |= {name: ("<i4", described["rows"][split], width) for split, name in SPLITS.items()}
            self.has_document_scores = "document_scores" in described
            if self.task_type == "similarity" or self.has_document_scores:
                shape = (width - 1,) if self.has_document_scores else ()
                files |= {name: ("<f4", described["rows"][split], *shape) for split, name in SCORES.items()}
            if self.has_texts:
                files |= {TEXTS: ("u1", described["text_bytes"]), TEXT_OFFSETS: ("<i8", texts + 1)}
            if self.has_forms:
                files[FORMS] = ("<u8", texts)
            for name, (dtype, *shape) in files.items():
                # An empty file cannot be mapped.
                path = self.folder / name
                mapped = np.memmap(path, dtype, "r", shape=tuple(shape)) if all(shape) else np.zeros(shape, dtype)
                self.mapped_files[name] = mapped
            self.rows = {split: self.mapped_files[name] for split, name in SPLITS.items()}
            self.scores = {split: self.mapped_files[name] for split, name in SCORES.items() if name in files}
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{self.folder}: not a whole prepared source ({reason}); prepare it again") from None

    def __reduce__(self) -> tuple[type[PreparedSource], tuple[Path, float]]:
        # A pickled memory map contains the whole array: a loader worker opens the folder instead.
        return type(self), (self.folder, self.weight)

    def check(self) -> PreparedSource:
        """Compare the files with their checksums, in bounded time."""
        for name in self.mapped_files:
            check_file(self.folder / name, f"delete {self.folder}, and it is prepared again")
        return self

    def positives(self, rows: np.ndarray) -> np.ndarray:
        """Return the ``(n, num_positives)`` positives of rows, the passage first."""
        return np.concatenate([rows[:, 1:2], rows[:, 2 + self.num_negatives :]], axis=1)

    def negatives(self, rows: np.ndarray) -> np.ndarray:
        """Return the ``(n, num_negatives)`` negatives of rows."""
        return rows[:, 2 : 2 + self.num_negatives]

    def tokens(self, text: int) -> np.ndarray:
        """Return ``(length,)`` token ids of one text, EOS last."""
        offsets = self.mapped_files[OFFSETS]
        return self.mapped_files[TOKENS][offsets[text] : offsets[text + 1]]

    def token_blocks(self, size: int = 1 << 22) -> Iterator[np.ndarray]:
        """Yield the token ids of all texts, concatenated, in blocks of at most ``size``."""
        tokens = self.mapped_files[TOKENS]
        for start in range(0, len(tokens), size):
            yield tokens[start : start + size]

    def lengths(self, texts: np.ndarray) -> np.ndarray:
        """Return the token counts of the texts at the given positions, in the same shape."""
        return self.mapped_files[OFFSETS][texts + 1] - self.mapped_files[OFFSETS][texts]

    def forms(self, positions: np.ndarray) -> np.ndarray:
        """Return the numbers of the texts' forms or documents, or the positions themselves if none were kept."""
        return self.mapped_files[FORMS][positions] if self.has_forms else positions

    def texts(self, positions: np.ndarray) -> list[str]:
        """Return the texts at ``(n,)`` positions, with their instruction and not truncated."""
        if not self.has_texts:
            what = f"{self.folder}: the texts were not kept beside their tokens"
            raise UserError(f"{what}; prepare it again by prepare.py --keep-texts")
        starts, ends = (self.mapped_files[TEXT_OFFSETS][each].tolist() for each in (positions, positions + 1))
        content = self.mapped_files[TEXTS]
        return [content[start:end].tobytes().decode() for start, end in zip(starts, ends, strict=True)]


def put_aside(source: PreparedSource) -> str:
    """Return a line with the number of quarantined rows by reason; empty if there are none."""
    reasons, read = source.description["quarantined"], source.description["read"]
    counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
    aside = f"{sum(reasons.values()):,} of {read:,} rows ({sum(reasons.values()) / read:.1%})"
    where = source.folder / QUARANTINE
    return f"source {source.name!r}: {aside} were put aside ({counts}), see {where}" if reasons else ""


def sources_table(prepared: Sequence[PreparedSource]) -> str:
    """Return an aligned table of prepared sources and their sum, without a final newline."""
    rows: list[tuple[Any, ...]] = []
    for source in prepared:
        about = source.description
        counts = (*about["rows"].values(), about["texts"], about["tokens"], sum(about["quarantined"].values()))
        rows.append((source.name, source.task_type, *counts))
    rows.append(("all", "", *map(sum, list(zip(*rows, strict=True))[2:])))
    return text_table(["source", "task", "rows", "validation", "texts", "tokens", "put aside"], rows, text_columns=2)


def text_table(head: Sequence[str], rows: Iterable[Sequence[str | int]], text_columns: int) -> str:
    """Lay out rows for a terminal: the first ``text_columns`` are aligned left, the others, numbers, right."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    align = [str.ljust] * text_columns + [str.rjust] * (len(head) - text_columns)
    lines = [[f(cell, width) for f, cell, width in zip(align, row, widths, strict=True)] for row in cells]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def find_prepared(folder: Path, fingerprints: Mapping[str, str]) -> list[Path]:
    """Return the existing folders of sources with these fingerprints, by name, among those of other settings."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.glob(f"[!.]*/{DESCRIPTION}")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            described = json.loads(path.read_text(encoding="utf-8"))
            found.setdefault((described["name"], described["fingerprint"]), path.parent)
    return [found[named] for named in fingerprints.items() if named in found]
