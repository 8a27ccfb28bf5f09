"""The facts of a dataset card: metadata for the Hub, tables, provenance, contamination, and the plot of languages."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from hub_cards.hub_terms import SPECIAL_LANGUAGES, hub_languages, licence_metadata
from hub_cards.metadata import header
from training.common.errors import UserError
from training.common.languages import SEVERAL, language_name
from training.data.manifest import Source

PLOTS = ("languages.svg", "languages.png")
_RECORDS = ("build.json", "mining.json")
_TASK_CATEGORIES = {
    "retrieval": "text-retrieval",
    "clustering": "text-classification",
    "classification": "text-classification",
}
_SIZES = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
# Bars of the plot.
_SHOWN = 40
_NO_LANGUAGE = {SEVERAL: "several languages", "zxx": "programming languages"}
_BAR, _TEXT, _QUIET = "#4c72b0", "#222222", "#777777"


@dataclass(frozen=True)
class ReleasedSource:
    """A source in a release."""

    source: Source
    files: list[str]  # paths within the release, in reading order
    columns: list[str]
    negatives: int  # negative columns
    rows: int
    faulty: int  # rows that preparation leaves out, such as those without a query
    memory_bytes: int  # of the rows as Arrow tables
    file_bytes: int
    languages: Counter[str]  # rows by ISO 639-3 code; each language of a pair gets half of them


def language_rows(released: Sequence[ReleasedSource]) -> Counter[str]:
    """Return the rows of a release by ISO 639-3 code."""
    return sum((each.languages for each in released), Counter())


# Facts


def card_facts(
    released: Sequence[ReleasedSource],
    *,
    name: str,
    repository: str,
    licence: str | None,
    origin: str | None,
    provenance: Sequence[Sequence[Any]],
    contamination: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return everything that the template of the card names.

    ``origin`` is the address of remote input files; ``contamination`` is None if nobody checked.
    """
    rows = sum(each.rows for each in released)
    languages = language_rows(released)
    ours = re.compile(r"query|passage|lang|negative_\d+")
    return {
        "metadata": card_metadata(released, name, licence),
        "name": name,
        "repository": repository,
        "rows": rows,
        "size": _bytes(sum(each.file_bytes for each in released)),
        "language_count": len(languages.keys() - SPECIAL_LANGUAGES.keys()),
        "more_columns": sorted({column for each in released for column in each.columns if not ours.fullmatch(column)}),
        "sources": [{"name": each.source.name, "rows": each.rows} for each in released],
        "source_rows": [_source_row(each) for each in released],
        "task_types": _grouped(released, lambda each: each.source.task_type),
        "categories": _grouped(released, lambda each: each.source.category or "none given")
        if any(each.source.category for each in released)
        else [],
        "licences": [row[:3] for row in _grouped(released, lambda each: each.source.licence or "not stated")],
        "licence_note": f"The release as a whole is under {licence}." if licence else None,
        "languages": [
            [code, language_name(code), count, f"{100 * count / rows:.2f} %"] for code, count in _largest(languages)
        ],
        "faulty": [{"name": each.source.name, "rows": each.faulty} for each in released if each.faulty],
        "origin": origin,
        "provenance": provenance,
        "contamination": contamination,
    }


def card_metadata(released: Sequence[ReleasedSource], name: str, licence: str | None) -> str:
    """Return the YAML header of the card: one configuration per source, since their columns differ."""
    languages = hub_languages(language_rows(released))
    tasks = {_TASK_CATEGORIES[each.source.task_type] for each in released}
    configs, infos = [], []
    for each in released:
        path = each.files[0] if len(each.files) == 1 else f"data/{each.source.name}/train-*.parquet"
        configs.append({"config_name": each.source.name, "data_files": [{"split": "train", "path": path}]})
        infos.append(
            {
                "config_name": each.source.name,
                "splits": [{"name": "train", "num_bytes": each.memory_bytes, "num_examples": each.rows}],
                "download_size": each.file_bytes,
                "dataset_size": each.memory_bytes,
            }
        )
    metadata = DatasetCardData(
        language=languages,
        **licence_metadata([licence] if licence else [each.source.licence for each in released]),
        multilinguality="multilingual" if len(languages) > 1 or "multilingual" in languages else "monolingual",
        size_categories=[size_category(sum(each.rows for each in released))],
        task_categories=sorted({"feature-extraction", "sentence-similarity", *tasks}),
        pretty_name=name,
        tags=["embeddings", "sentence-transformers"],
        configs=configs,
        dataset_info=infos,
    )
    return header(metadata)


def size_category(rows: int) -> str:
    """Return the Hub's size category of a number of rows, such as ``10K<n<100K``."""
    index = next((index for index in range(len(_SIZES)) if rows < 1000 * 10**index), len(_SIZES))
    if index == 0:
        return f"n<{_SIZES[0]}"
    return f"n>{_SIZES[-1]}" if index == len(_SIZES) else f"{_SIZES[index - 1]}<n<{_SIZES[index]}"


def _source_row(each: ReleasedSource) -> list[Any]:
    source, codes = each.source, sorted(each.languages)
    languages = ", ".join(codes) if len(codes) < 5 else str(len(codes))
    symmetric = "yes" if source.symmetric else "no"
    described = [source.name, source.task_type, symmetric, languages, source.licence]
    return [*described, each.rows, each.negatives, source.instruction]


def _grouped(released: Sequence[ReleasedSource], key: Callable[[ReleasedSource], str]) -> list[list[Any]]:
    """Return group, sources, rows and share of rows, largest first."""
    sources, rows = Counter(key(each) for each in released), Counter()
    for each in released:
        rows[key(each)] += each.rows
    return [[group, sources[group], count, f"{100 * count / rows.total():.1f} %"] for group, count in _largest(rows)]


def _largest(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _bytes(size: int) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


# Provenance and contamination, from the files beside the data


def read_records(folder: Path) -> dict[str, Any]:
    """Read the records of builders and of mining in the folder of a manifest, by file name."""
    return {name: _read_json(folder / name) for name in _RECORDS if (folder / name).is_file()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); write it again or remove it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, got {type(content).__name__}; write it again or remove it")
    return content


def provenance_rows(records: Mapping[str, Any], names: Sequence[str]) -> list[list[Any]]:
    """Return source, step, rows read, rows dropped and details, for each source that a record covers."""
    rows = []
    for name in names:
        for file, record in records.items():
            try:
                row = _step(file, record, name)
            except (AttributeError, KeyError, TypeError) as error:
                raise UserError(
                    f"{file}, beside the manifest, is not a record of a builder ({error!r}); remove it"
                ) from None
            rows += [[name, *row]] if row else []
    return rows


def _step(file: str, record: Mapping[str, Any], name: str) -> list[Any] | None:
    if file == "build.json" and "options" in record:
        if name not in record["rows"]:
            return None
        options = {key: value for key, value in record["options"].items() if key not in ("format", "languages")}
        return ["built from CLDR", None, record["dropped"][name], _listed(options)]
    entry = record["sources"].get(name)
    if entry is None:
        return None
    if file == "build.json":
        reasons = {reason: count for reason, count in entry["dropped"].items() if count}
        return ["built from raw data", entry["read"], entry["read"] - entry["rows"], _listed(reasons)]
    options = {key: value for key, value in entry["options"].items() if not isinstance(value, bool)}
    # The path of a local model is private.
    model = Path(entry["model"]).name if Path(entry["model"]).is_absolute() else entry["model"]
    revision = f" at {entry['revision']}" if entry["revision"] else ""
    return ["negatives mined", entry["rows"], entry["dropped"], f"{model}{revision}: {_listed(options)}"]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def read_contamination(path: Path) -> dict[str, Any]:
    """Read and check the report of a search for duplicates and evaluation texts."""
    report = _read_json(path)
    try:
        for given in report["evaluation_sets"]:
            str(given["name"]), sum(given["texts"].values())
        for found in report["sources"]:
            found["name"], found["removed"], _counts(found)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a contamination report ({error!r}); give the contamination.json of this data"
        ) from None
    return report


def _counts(found: Mapping[str, Any]) -> list[int | None]:
    """Return a source's rows, duplicates of three kinds and contaminated rows of two; None where nobody checked."""
    across, leaked = found["across_sources"], found["contaminated"]
    return [
        *(found[key] for key in ("rows", "exact_duplicates", "near_duplicates")),
        None if across is None else sum(count for kind in across.values() for count in kind.values()),
        *(None if leaked is None else leaked[kind] for kind in ("whole", "overlap")),
    ]


def contamination_facts(report: Mapping[str, Any], released: Sequence[ReleasedSource]) -> dict[str, Any]:
    """Return the report as the card shows it: rows of the table, evaluation sets, and sources without a check."""
    by_name = {source["name"]: source for source in report["sources"]}
    rows, unchecked = [], []
    for each in released:
        found = by_name.get(each.source.name)
        if found is None:
            unchecked.append(each.source.name)
            continue
        # Either the checked rows are released, or those that were left of them.
        if each.rows not in (found["rows"], found["rows"] - (found["removed"] or 0)):
            raise UserError(
                f"contamination report: source {each.source.name!r} had {found['rows']:,} rows, of which "
                f"{found['removed'] or 0:,} were removed, but {each.rows:,} are released; check this very data"
            )
        removed = found["removed"]
        if removed is not None and each.rows == found["rows"]:
            removed = 0
        rows.append([each.source.name, *_counts(found), removed])
    if len(rows) > 1:
        rows.append(["all", *(_total(column) for column in list(zip(*rows, strict=True))[1:])])
    sets = [{"name": each["name"], "texts": sum(each["texts"].values())} for each in report["evaluation_sets"]]
    return {"rows": rows, "sets": sets, "unchecked": unchecked}


def _total(column: Sequence[int | None]) -> int | None:
    counts = [count for count in column if count is not None]
    return sum(counts) if counts else None


# Plot


def plot_languages(rows: Mapping[str, int], folder: Path, title: str) -> None:
    """Draw ``languages.svg`` and ``.png``: a bar for each of the largest languages, the others as a sum."""
    try:
        # Optional package.
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator
    except ImportError:
        raise UserError("the plot of languages needs matplotlib; install it with `pip install matplotlib`") from None

    total, ordered = sum(rows.values()), _largest(rows)
    shown, rest = ordered[:_SHOWN], ordered[_SHOWN:]
    counts = [count for _, count in shown]
    languages = len(rows.keys() - _NO_LANGUAGE.keys())
    note = "rows"
    if rest:
        others = sum(count for _, count in rest)
        note += f"; not shown: {len(rest)} more languages with {others:,} rows ({100 * others / total:.1f} %)"
    # Titles may contain dollar signs, which are not formulas; the salt and the missing dates make the bytes repeat.
    with rc_context({"svg.hashsalt": "languages", "text.parse_math": False, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(8, 1.3 + 0.2 * len(shown)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(shown)), counts, height=0.72, color=_BAR)
        for bar, count in enumerate(counts):
            label = f" {count:,} ({100 * count / total:.1f} %)"
            axes.text(count, bar, label, va="center", fontsize=8, color=_TEXT)
        axes.set_yticks(range(len(shown)), [_label(code) for code, _ in shown], fontsize=8)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, 1.22 * max(counts))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        number = "1 language" if languages == 1 else f"{languages} languages"
        axes.set_title(f"{title}: {number}", fontsize=10, loc="left", color=_TEXT)
        axes.set_xlabel(note, fontsize=8, color=_QUIET)
        figure.savefig(folder / PLOTS[0], metadata={"Date": None})
        figure.savefig(folder / PLOTS[1], dpi=130, metadata={"Software": None})


def _label(code: str) -> str:
    return _NO_LANGUAGE.get(code) or f"{language_name(code)} ({code})"
