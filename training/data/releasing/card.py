"""The facts of a dataset card: the metadata that the Hub reads, and the tables of the text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from huggingface_hub import DatasetCardData

from hub_cards.hub_terms import SPECIAL_LANGUAGES, hub_languages, licence_metadata
from hub_cards.metadata import header
from training.common.languages import language_name
from training.data.releasing.files import ReleasedSource

_TASK_CATEGORIES = {
    "retrieval": "text-retrieval",
    "clustering": "text-classification",
    "classification": "text-classification",
}
_SIZES = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]


def size_category(rows: int) -> str:
    """The Hub's size category of a number of rows, such as ``10K<n<100K``."""
    place = next((place for place in range(len(_SIZES)) if rows < 1000 * 10**place), len(_SIZES))
    if place == 0:
        return f"n<{_SIZES[0]}"
    return f"n>{_SIZES[-1]}" if place == len(_SIZES) else f"{_SIZES[place - 1]}<n<{_SIZES[place]}"


def card_metadata(released: Sequence[ReleasedSource], name: str, licence: str | None) -> str:
    """The YAML of the card's header: one configuration a source, none of them with another's columns.

    Args:
        released: The sources.
        name: Of the dataset.
        licence: Of the release as a whole; None for those of the sources.
    """
    languages = hub_languages(_language_rows(released))
    tasks = {_TASK_CATEGORIES[each.source.task_type] for each in released}
    metadata = DatasetCardData(
        language=languages,
        **licence_metadata([licence] if licence else [each.source.licence for each in released]),
        multilinguality="multilingual" if len(languages) > 1 or "multilingual" in languages else "monolingual",
        size_categories=[size_category(sum(each.rows for each in released))],
        task_categories=sorted({"feature-extraction", "sentence-similarity", *tasks}),
        pretty_name=name,
        tags=["embeddings", "sentence-transformers"],
        configs=[_config(each) for each in released],
        dataset_info=[_info(each) for each in released],
    )
    return header(metadata)


def _config(each: ReleasedSource) -> dict[str, Any]:
    path = each.files[0] if len(each.files) == 1 else f"data/{each.source.name}/train-*.parquet"
    return {"config_name": each.source.name, "data_files": [{"split": "train", "path": path}]}


def _info(each: ReleasedSource) -> dict[str, Any]:
    return {
        "config_name": each.source.name,
        "splits": [{"name": "train", "num_bytes": each.memory_bytes, "num_examples": each.rows}],
        "download_size": each.file_bytes,
        "dataset_size": each.memory_bytes,
    }


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
    """All that the template of the card names.

    Args:
        released: The sources.
        name: Of the dataset.
        repository: What the examples load.
        licence: Of the release as a whole.
        origin: Address that the files were read from, if they were not at hand.
        provenance: Rows of that table.
        contamination: As :func:`~training.data.releasing.records.contamination_facts` gives it; None if unchecked.
    """
    rows = sum(each.rows for each in released)
    languages = _language_rows(released)
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
        "source_rows": [_source(each) for each in released],
        "task_types": _grouped(released, lambda each: each.source.task_type),
        "categories": _grouped(released, lambda each: each.source.category or "none given")
        if any(each.source.category for each in released)
        else [],
        "licences": [row[:3] for row in _grouped(released, lambda each: each.source.licence or "not stated")],
        "licence_note": f"The release as a whole is under {licence}." if licence else None,
        "languages": [
            [code, language_name(code), count, f"{100 * count / rows:.2f} %"]
            for code, count in sorted(languages.items(), key=lambda item: (-item[1], item[0]))
        ],
        "faulty": [{"name": each.source.name, "rows": each.faulty} for each in released if each.faulty],
        "origin": origin,
        "provenance": provenance,
        "contamination": contamination,
    }


def _language_rows(released: Sequence[ReleasedSource]) -> Counter[str]:
    return sum((each.languages for each in released), Counter())


def _source(each: ReleasedSource) -> list[Any]:
    source, codes = each.source, sorted(each.languages)
    told = ", ".join(codes) if len(codes) < 5 else str(len(codes))
    symmetric = "yes" if source.symmetric else "no"
    described = [source.name, source.task_type, symmetric, told, source.licence]
    return [*described, each.rows, each.negatives, source.instruction]


def _grouped(released: Sequence[ReleasedSource], key: Callable[[ReleasedSource], str]) -> list[list[Any]]:
    """Group, sources, rows and share, the largest first."""
    sources = Counter(key(each) for each in released)
    rows: Counter[str] = Counter()
    for each in released:
        rows[key(each)] += each.rows
    total = sum(rows.values())
    ordered = sorted(rows.items(), key=lambda item: (-item[1], item[0]))
    return [[group, sources[group], count, f"{100 * count / total:.1f} %"] for group, count in ordered]


def _bytes(size: int) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
