"""Classes follow the rows of the manifest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.evaluation.resources import resource_class, training_rows

Refuses = Callable[..., AbstractContextManager[None]]

PUBLISHED = Path(__file__).parents[3] / "training" / "data" / "manifests"


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        *[("eng-Latn", "high"), ("isl", "middle"), ("srp-Latn", "middle")],
        *[("fao-Latn", "low"), ("srp-Cyrl", "low"), ("tlh-Latn", "none")],
    ],
)
def test_classes_are_shares_of_the_rows(language: str, expected: str) -> None:
    rows = {"eng": 9_890, "isl": 50, "fao": 5, "srp-Cyrl": 5, "srp-Latn": 50, "tlh": 0}
    assert resource_class(language, rows) == expected


def _manifest(folder: Path, text: str) -> Path:
    path = folder / "manifest.yaml"
    path.write_text(text, encoding="utf-8")
    return path


FIELDS = "name: {name}, files: {name}.parquet, task_type: retrieval, instruction: Find it, languages: {languages}{more}"
SOURCE = f"  - {{{{{FIELDS}}}}}\n"


def test_rows_are_those_of_the_files_under_their_caps(tmp_path: Path) -> None:
    for name, count in (("a", 30), ("b", 50), ("c", 70)):
        pq.write_table(pa.table({"query": ["q"] * count, "passage": ["p"] * count}), tmp_path / f"{name}.parquet")
    sources = [("a", "[deu]", ""), ("b", "[fra]", ", cap: 20"), ("c", "[deu, fra, rus]", "")]
    lines = [SOURCE.format(name=name, languages=languages, more=more) for name, languages, more in sources]
    assert training_rows(_manifest(tmp_path, "sources:\n" + "".join(lines))) == {"deu": 30, "fra": 20}


def test_the_published_rows_stand_in_for_absent_files() -> None:
    rows = training_rows(next(PUBLISHED.glob("*.yaml")))
    assert resource_class("eng-Latn", rows) == "high" and len(rows) > 20


def test_a_manifest_without_languages_is_refused(tmp_path: Path, refuses: Refuses) -> None:
    with refuses("tells no language's rows"):
        training_rows(_manifest(tmp_path, "sources:\n" + SOURCE.format(name="a", languages="[]", more="")))
