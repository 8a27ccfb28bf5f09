"""What was found in each source, as JSON and as a table for the dataset card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.data.cleaning.decontamination import Contamination
from training.data.cleaning.deduplication import Repeats
from training.data.manifest import Source

_EXAMPLES = 5


@dataclass(frozen=True)
class Findings:
    """All that was found.

    Attributes:
        sources: The sources in the order of the manifest.
        rows: Number of rows of each file.
        duplicates: ``exact`` and ``near``, those that were looked for.
        across: Whether sources were compared with one another.
        contamination: What evaluation sets and rows have in common; None if there was no evaluation set.
        removed: ``(n,)`` rows left out of each file; None if nothing was written.
    """

    sources: Sequence[Source]
    rows: Sequence[int]
    duplicates: Mapping[str, Repeats]
    across: bool
    contamination: Contamination | None
    removed: Sequence[np.ndarray] | None

    def files(self) -> list[tuple[int, str]]:
        """The source's number and the name of each file, in order."""
        return [(number, path.name) for number, source in enumerate(self.sources) for path in source.files]


def contamination_report(findings: Findings) -> dict[str, Any]:
    """Counts and examples by source; None stands for what was not looked for.

    A row is counted once among the duplicates: as an exact one rather than a near one, and as one inside its source
    rather than of another. ``contaminated`` counts rows of which a whole text is an evaluation text (``whole``) apart
    from those that only share a run of tokens (``overlap``). Rows are numbered from 0 within their file.
    """
    sets: list[dict[str, Any]] = []
    if findings.contamination is not None:
        for (name, column), texts in zip(findings.contamination.columns, findings.contamination.texts, strict=True):
            if not sets or sets[-1]["name"] != name:
                sets.append({"name": name, "texts": {}})
            sets[-1]["texts"][column] = texts
    return {"evaluation_sets": sets, "sources": [_source(findings, number) for number in range(len(findings.sources))]}


def _source(findings: Findings, number: int) -> dict[str, Any]:
    files = findings.files()
    own = [file for file, (source, _) in enumerate(files) if source == number]
    exact, near = (_duplicates(findings, kind, own) for kind in ("exact", "near"))
    looked_across = findings.across and findings.duplicates
    across = {kind: found["across"] for kind, found in (("exact", exact), ("near", near)) if found}
    contaminated, leaks = _contaminated(findings, own)
    return {
        "name": findings.sources[number].name,
        "rows": sum(findings.rows[file] for file in own),
        "exact_duplicates": exact["inside"] if exact else None,
        "near_duplicates": near["inside"] if near else None,
        "across_sources": across if looked_across else None,
        "contaminated": contaminated,
        "removed": None if findings.removed is None else sum(len(findings.removed[file]) for file in own),
        "examples": {
            "exact_duplicates": exact["examples"] if exact else [],
            "near_duplicates": near["examples"] if near else [],
            "contaminated": leaks,
        },
    }


def _duplicates(findings: Findings, kind: str, own: Sequence[int]) -> dict[str, Any] | None:
    """Counts inside the source and by other source, and examples."""
    repeats = findings.duplicates.get(kind)
    if repeats is None:
        return None
    files = findings.files()
    repeats = repeats[np.isin(repeats.file, own)]
    others = Counter(findings.sources[files[file][0]].name for file in repeats.first_file[~repeats.inside].tolist())
    # Some of either, where there are both.
    chosen = np.sort(np.concatenate([np.flatnonzero(part)[:_EXAMPLES] for part in (repeats.inside, ~repeats.inside)]))
    examples = [
        {
            "file": files[file][1],
            "row": row,
            "repeats": {
                "source": findings.sources[files[first_file][0]].name,
                "file": files[first_file][1],
                "row": first_row,
            },
        }
        for file, row, first_file, first_row in zip(
            *(getattr(repeats, name)[chosen].tolist() for name in ("file", "row", "first_file", "first_row")),
            strict=True,
        )
    ]
    return {"inside": int(repeats.inside.sum()), "across": dict(sorted(others.items())), "examples": examples}


def _contaminated(findings: Findings, own: Sequence[int]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Counts of a source's rows, in all and by evaluation set and column, and examples."""
    if findings.contamination is None:
        return None, []
    files, columns = findings.files(), findings.contamination.columns
    rows: dict[tuple[int, int], bool] = {}
    by_set: dict[str, dict[tuple[int, int], bool]] = {}
    by_column: dict[str, dict[str, dict[tuple[int, int], bool]]] = {}
    examples: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for file in own:
        for row, number, label, whole in findings.contamination.found[file].tolist():
            (name, evaluation_column), column = columns[label], _column_name(number)
            per_column = by_column.setdefault(name, {}).setdefault(column, {})
            for seen in (rows, by_set.setdefault(name, {}), per_column):
                seen[file, row] = seen.get((file, row), False) or bool(whole)
            if len(examples[bool(whole)]) < _EXAMPLES:
                example = {"file": files[file][1], "row": row, "column": column, "evaluation_set": name}
                example |= {"evaluation_column": evaluation_column, "kind": "whole" if whole else "overlap"}
                examples[bool(whole)].append(example)
    counts = {
        "rows": len(rows),
        **_counts(rows),
        "sets": {
            name: {
                **_counts(seen),
                "columns": {column: _counts(own_seen) for column, own_seen in sorted(by_column[name].items())},
            }
            for name, seen in sorted(by_set.items())
        },
    }
    return counts, examples[True] + examples[False]


def _counts(rows: Mapping[tuple[int, int], bool]) -> dict[str, int]:
    whole = sum(rows.values())
    return {"whole": whole, "overlap": len(rows) - whole}


def _column_name(number: int) -> str:
    return ("query", "passage")[number] if number < 2 else f"negative_{number - 1}"


def contamination_table(report: Mapping[str, Any]) -> str:
    """The report as a Markdown table for the dataset card; a dash stands for what was not looked for."""
    head = ["source", "rows", "exact duplicates", "near duplicates", "in other sources"]
    head += ["evaluation texts", "13-gram overlaps", "removed"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    totals = [0] * (len(head) - 1)
    looked: list[bool] = [False] * len(totals)
    for source in report["sources"]:
        across, contaminated = source["across_sources"], source["contaminated"] or {}
        cells = [
            source["rows"],
            source["exact_duplicates"],
            source["near_duplicates"],
            None if across is None else sum(count for kind in across.values() for count in kind.values()),
            contaminated.get("whole"),
            contaminated.get("overlap"),
            source["removed"],
        ]
        totals = [total + (cell or 0) for total, cell in zip(totals, cells, strict=True)]
        looked = [before or cell is not None for before, cell in zip(looked, cells, strict=True)]
        lines.append(_line(source["name"], cells))
    lines.append(_line("**all**", [total if seen else None for total, seen in zip(totals, looked, strict=True)]))
    sets = ", ".join(
        f"`{found['name']}` ({sum(found['texts'].values()):,} texts)" for found in report["evaluation_sets"]
    )
    notes = [f"\nEvaluation sets: {sets}."] if sets else []
    return "\n".join([*lines, *notes]) + "\n"


def _line(name: str, cells: Sequence[int | None]) -> str:
    return f"| {name} | " + " | ".join("–" if cell is None else f"{cell:,}" for cell in cells) + " |"
