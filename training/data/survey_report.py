"""The survey of a manifest as tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from training.common.languages import SEVERAL
from training.data.survey import CollectionSurvey, Survey

_SHOWN = 20


def report(survey: Survey, languages: int = _SHOWN) -> str:
    """Lays a survey out as text.

    Args:
        survey: What was found.
        languages: Languages shown at most, those with the most rows first.

    Returns:
        Lines that end with a newline: sources, categories, languages, what is missing, and what no source claims.
    """
    parts = [_head(survey), _sources(survey), _categories(survey), _languages(survey, languages), _missing(survey)]
    if survey.unclaimed:
        parts.append(_named(f"{len(survey.unclaimed)} files that no source claims:", survey.unclaimed))
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(survey: Survey) -> str:
    files = sum(len(each.files) for each in survey.collections)
    stage = f", stage {survey.stage}" if survey.stage else ""
    lines = [
        f"{survey.manifest}{stage}: {len(survey.collections)} sources and collections, "
        f"{survey.published_rows:,} rows as published",
        f"{survey.folder}: {files} files found, {survey.rows:,} rows, {survey.kept:,} under the caps",
    ]
    if survey.unreachable:
        lines.append(f"not looked into: {survey.unreachable}")
    return "\n".join(lines)


def _sources(survey: Survey) -> str:
    rows = [_source(each) for each in survey.collections]
    total = ["total", "", "", "", str(sum(len(each.files) for each in survey.collections)), "", f"{survey.rows:,}"]
    most = sum(each.published_kept for each in survey.collections)
    total += [f"{survey.kept:,}", f"{survey.published_rows:,}", f"{most:,}"]
    # The published sizes are of collections, the caps of their files: so it is a bound.
    head = ["source", "task", "category", "lang", "files", "neg", "rows", "capped", "published", "capped ≤"]
    if all(each.cap is None for each in survey.collections):
        head, rows, total = head[:-1], [row[:-1] for row in rows], total[:-1]
    return _table(head, [*rows, total], left=4)


def _source(each: CollectionSurvey) -> list[str]:
    entry = each.entry
    told = entry.languages if len(entry.languages) < 3 else [str(len(entry.languages))]
    files = str(len(each.files)) + (f"/{entry.published_files}" if entry.published_files else "")
    negatives = sorted({file.negatives for file in each.files})
    return [
        entry.name,
        entry.task_type,
        entry.category or "",
        ", ".join(told),
        files,
        "–".join(str(count) for count in dict.fromkeys((negatives[0], negatives[-1]))) if negatives else "",
        f"{each.rows:,}" if each.files else "missing",
        f"{each.kept:,}" if each.files else "",
        f"{entry.published_rows:,}" if entry.published_rows else "",
        f"{each.published_kept:,}" if entry.published_rows else "",
    ]


def _categories(survey: Survey) -> str:
    paper = survey.published_shares.category_percent if survey.published_shares else {}
    found: Counter[str] = Counter()
    published: Counter[str] = Counter()
    for each in survey.collections:
        found[each.entry.category or "none given"] += each.rows
        published[each.entry.category or "none given"] += each.entry.published_rows or 0
    # Percentages are of what the paper's are of: the rows of the categories that it lists.
    listed = [name for name in found if name in paper] or list(found)
    totals = [sum(counts[name] for name in listed) for counts in (found, published)]
    rows = [
        [
            name,
            f"{found[name]:,}",
            _percent(found[name], totals[0] if name in listed else 0),
            f"{published[name]:,}",
            _percent(published[name], totals[1] if name in listed else 0),
            f"{paper[name]:.1f}" if name in paper else "",
        ]
        for name in sorted(found, key=lambda name: (-published[name], -found[name]))
    ]
    return _table(["category", "rows", "%", "published", "%", "paper %"], rows)


def _languages(survey: Survey, shown: int) -> str:
    paper = survey.published_shares.language_rows if survey.published_shares else {}
    found: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    published: Counter[str] = Counter()
    for each in survey.collections:
        found += each.rows_by_language()
        kept += each.rows_by_language(capped=True)
        published += each.published_by_language()
    codes = sorted({*found, *published, *paper}, key=lambda code: (-found[code], -paper.get(code, 0), -published[code]))
    total = survey.published_shares.total_rows if survey.published_shares else 0
    rows = [
        [
            "several" if code == SEVERAL else code,
            f"{found[code]:,}",
            _percent(found[code], survey.rows),
            f"{kept[code]:,}",
            f"{published[code]:,}",
            f"{paper[code]:,}" if code in paper else "",
            _percent(paper.get(code, 0), total),
        ]
        for code in codes[:shown]
    ]
    table = _table(["language", "rows", "%", "capped", "published", "paper rows", "%"], rows)
    more = len(codes) - shown
    return f"{table}\n… and {more} more languages" if more > 0 else table


def _missing(survey: Survey) -> str:
    if not any(each.files or each.faults for each in survey.collections):
        return f"none of the {len(survey.collections)} sources was found: download them, or give another data folder"
    lines = []
    for each in survey.missing:
        if each.missing:
            rows = f" ({each.entry.published_rows:,} rows as published)" if each.entry.published_rows else ""
            lines.append(f"{each.entry.name}: {', '.join(each.missing)}{rows if not each.files else ''}")
        lines += [f"{each.entry.name}: {fault}" for fault in each.faults]
    if not lines:
        return "nothing is missing"
    return _named(f"missing or unreadable, {len(survey.missing)} of {len(survey.collections)} sources:", lines)


def _named(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole and part else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as their widest cell, empty ones left out; the first ``left`` are text, the others numbers."""
    filled = [k for k in range(len(head)) if any(row[k] for row in rows)]
    widths = {k: max(len(row[k]) for row in (head, *rows)) for k in filled}

    def line(row: Sequence[str]) -> str:
        cells = (row[k].ljust(widths[k]) if k < left else row[k].rjust(widths[k]) for k in filled)
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), "  ".join("─" * widths[k] for k in filled), *map(line, rows)])
