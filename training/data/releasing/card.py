"""The facts of a dataset card: metadata for the Hub, tables, provenance, contamination, and the plot of languages."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from hub_cards.hub_terms import SPECIAL_LANGUAGES, hub_languages, licence_metadata
from hub_cards.metadata import header
from training.common.errors import UserError
from training.common.languages import SEVERAL, language_name
from training.data.cleaning.decontamination import COUNTS
from training.data.manifest import Source

_TASK_CATEGORIES = {
    "retrieval": "text-retrieval",
    "clustering": "text-classification",
    "classification": "text-classification",
}
_SIZES = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
# Columns of the published format, which the card describes.
_FORMAT_COLUMN = re.compile(r"query|passage|lang|negative_\d+")
# Bars of the plot.
_SHOWN = 40
_NO_LANGUAGE = {SEVERAL: "several languages", "zxx": "programming languages"}


@dataclass(frozen=True)
class ReleasedSource:
    """A source in a release."""

    source: Source
    files: list[str]  # paths within the release, in reading order
    columns: list[str]
    negatives: int  # negative columns
    rows: int
    faulty: int  # rows that preparation leaves out, such as those without a query
    file_bytes: int
    languages: Counter[str]  # rows by ISO 639-3 code; each language of a pair gets half of them


def language_rows(released: Sequence[ReleasedSource]) -> Counter[str]:
    """Return the rows of a release by ISO 639-3 code."""
    return sum((each.languages for each in released), Counter())


# Facts


def card_facts(released: Sequence[ReleasedSource], name: str, licence: str | None) -> dict[str, Any]:
    """Return what the template of the card says of the files; ``licence`` is that of the release as a whole."""
    rows, languages = sum(each.rows for each in released), language_rows(released)
    columns = {column for each in released for column in each.columns if not _FORMAT_COLUMN.fullmatch(column)}
    categories = _grouped(released, lambda each: each.source.category or "none given")
    return {
        "metadata": _metadata(released, name, licence),
        "name": name,
        "rows": rows,
        "size": f"{sum(each.file_bytes for each in released) / 1e6:,.1f} MB",
        "language_count": len(languages.keys() - SPECIAL_LANGUAGES.keys()),
        "more_columns": sorted(columns),
        "sources": [{"name": each.source.name, "rows": each.rows} for each in released],
        "source_rows": [_source_row(each) for each in released],
        "task_types": _grouped(released, lambda each: each.source.task_type),
        "categories": categories if any(each.source.category for each in released) else [],
        "licences": [row[:3] for row in _grouped(released, lambda each: each.source.licence or "not stated")],
        "licence_note": f"The release as a whole is under {licence}." if licence else None,
        "languages": [
            [code, language_name(code), count, f"{100 * count / rows:.2f} %"] for code, count in _largest(languages)
        ],
        "faulty": [{"name": each.source.name, "rows": each.faulty} for each in released if each.faulty],
    }


def _metadata(released: Sequence[ReleasedSource], name: str, licence: str | None) -> str:
    """Return the YAML header of the card: one configuration per source, since their columns differ."""
    languages = hub_languages(language_rows(released))
    tasks = {_TASK_CATEGORIES[each.source.task_type] for each in released}
    configs = []
    for each in released:
        path = each.files[0] if len(each.files) == 1 else f"data/{each.source.name}/train-*.parquet"
        configs.append({"config_name": each.source.name, "data_files": [{"split": "train", "path": path}]})
    metadata = DatasetCardData(
        language=languages,
        **licence_metadata([licence] if licence else [each.source.licence for each in released]),
        multilinguality="multilingual" if len(languages) > 1 or "multilingual" in languages else "monolingual",
        size_categories=[size_category(sum(each.rows for each in released))],
        task_categories=sorted({"feature-extraction", "sentence-similarity", *tasks}),
        pretty_name=name,
        tags=["embeddings", "sentence-transformers"],
        configs=configs,
    )
    return header(metadata)


def size_category(rows: int) -> str:
    """Return the Hub's size category of a number of rows, such as ``10K<n<100K``."""
    power = len(str(rows)) - len("999")
    if power < 1:
        return f"n<{_SIZES[0]}"
    return f"{_SIZES[power - 1]}<n<{_SIZES[power]}" if power < len(_SIZES) else f"n>{_SIZES[-1]}"


def _source_row(each: ReleasedSource) -> list[Any]:
    source, codes = each.source, sorted(each.languages)
    languages = ", ".join(codes) if len(codes) < 5 else str(len(codes))
    described = [source.name, source.task_type, "yes" if source.symmetric else "no", languages, source.licence]
    return [*described, each.rows, each.negatives, source.instruction]


def _grouped(released: Sequence[ReleasedSource], key: Callable[[ReleasedSource], str]) -> list[list[Any]]:
    """Return group, sources, rows and share of rows, largest first."""
    sources, rows = Counter(key(each) for each in released), Counter()
    for each in released:
        rows[key(each)] += each.rows
    return [[group, sources[group], count, f"{100 * count / rows.total():.1f} %"] for group, count in _largest(rows)]


def _largest(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


# Provenance and contamination, from the files beside the data


def read_json(path: Path) -> dict[str, Any]:
    """Read the record of a step that made the data."""
    with _reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        what = f"{path}: not the record of a command of this project ({error!r})"
        raise UserError(f"{what}; give another one, or remove it") from None


def provenance_rows(records: Mapping[Path, Any], names: Sequence[str]) -> list[list[Any]]:
    """Return source, step, rows read, rows dropped and details, for each source that a record covers."""
    rows = []
    for name in names:
        for path, record in records.items():
            with _reading(path):
                if name in (record["rows"] if "options" in record else record["sources"]):
                    rows.append([name, *_step(record, name)])
    return rows


def _step(record: Mapping[str, Any], name: str) -> list[Any]:
    if "options" in record:
        options = {key: value for key, value in record["options"].items() if key not in ("format", "languages")}
        return ["built from CLDR", None, record["dropped"][name], _listed(options)]
    entry = record["sources"][name]
    if "model" not in entry:
        reasons = {reason: count for reason, count in entry["dropped"].items() if count}
        return ["built from raw data", entry["read"], entry["read"] - entry["rows"], _listed(reasons)]
    options = {key: value for key, value in entry["options"].items() if not isinstance(value, bool)}
    # The path of a local model is private.
    model = Path(entry["model"]).name if Path(entry["model"]).is_absolute() else entry["model"]
    revision = f" at {entry['revision']}" if entry["revision"] else ""
    return ["negatives mined", entry["rows"], entry["dropped"], f"{model}{revision}: {_listed(options)}"]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def contamination_facts(path: Path, report: Mapping[str, Any], released: Mapping[str, int]) -> dict[str, Any]:
    """Return the rows of the card's table, the evaluation sets, and the sources that the report does not cover.

    ``released`` are the rows by source.
    """
    with _reading(path):
        sets = [{"name": name, "texts": texts} for name, texts in report["evaluation_sets"].items()]
        checked = {source["name"]: [source[count] for count in COUNTS] for source in report["sources"]}
    rows = []
    for name in filter(checked.__contains__, released):
        looked_at, *found, removed = checked[name]
        # Either the checked rows are released, or those that were left of them.
        if released[name] not in (looked_at, looked_at - (removed or 0)):
            what = f"{path}: source {name!r} had {looked_at:,} rows, of which {removed or 0:,} were removed"
            raise UserError(f"{what}, but {released[name]:,} are released; check this very data")
        rows.append([name, looked_at, *found, 0 if removed and released[name] == looked_at else removed])
    if len(rows) > 1:
        _, *columns = ([count for count in column if count is not None] for column in zip(*rows, strict=True))
        rows.append(["all", *(sum(column) if column else None for column in columns)])
    return {"rows": rows, "sets": sets, "unchecked": [name for name in released if name not in checked]}


# Plot


def plot_languages(rows: Mapping[str, int], folder: Path, title: str) -> None:
    """Draw ``languages.svg`` and ``.png``: a bar for each of the largest languages, the others as a sum."""
    # Takes a second to import.
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    total, ordered = sum(rows.values()), _largest(rows)
    codes, counts = zip(*ordered[:_SHOWN], strict=True)
    languages, rest = len(rows.keys() - _NO_LANGUAGE.keys()), ordered[_SHOWN:]
    # Titles may contain dollar signs, which are not formulas; the salt and the missing dates make the bytes repeat.
    with rc_context({"svg.hashsalt": "languages", "text.parse_math": False, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(8, 1.3 + 0.2 * len(codes)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh([_NO_LANGUAGE.get(code) or f"{language_name(code)} ({code})" for code in codes], counts)
        axes.bar_label(bars, [f"{count:,} ({count / total:.1%})" for count in counts], padding=3, fontsize=8)
        axes.set_ylim(len(codes) - 0.4, -0.6)
        axes.set_xlim(0, 1.22 * max(counts))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{title}: {languages} language{'s' * (languages != 1)}", fontsize=10, loc="left")
        others = sum(count for _, count in rest)
        note = f"; not shown: {len(rest)} more languages with {others:,} rows ({others / total:.1%})" if rest else ""
        axes.set_xlabel(f"rows{note}", fontsize=8)
        figure.savefig(folder / "languages.svg", metadata={"Date": None})
        figure.savefig(folder / "languages.png", dpi=130, metadata={"Software": None})
