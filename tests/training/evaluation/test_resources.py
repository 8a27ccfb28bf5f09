"""Classes follow the rows of the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from training.data.cldr.build import build_cldr
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


def test_rows_without_script_count_for_each_script() -> None:
    rows = {"deu": 2, "deu-Latn": 98, "srp-Cyrl": 1, "srp": 1, "eng": 99_898}
    assert [resource_class(code, rows) for code in ("deu-Latn", "deu", "deu-Runr")] == ["middle", "middle", "low"]
    assert resource_class("srp", rows) == "low"


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


def _write(folder: Path, name: str, *told: tuple[int, str | None, str | None], columns: str = "lang script") -> None:
    rows = [(lang, script) for count, lang, script in told for _ in range(count)]
    more = dict(zip(("lang", "script"), map(list, zip(*rows, strict=True)), strict=True))
    columns = {name: more[name] for name in columns.split()}
    pq.write_table(pa.table({"query": ["q"] * len(rows), "passage": ["p"] * len(rows), **columns}), folder / name)


def test_files_tell_the_languages_of_several(tmp_path: Path) -> None:
    _write(tmp_path, "a_0.parquet", (20, "de", "Latn"), (9_000, "sr", "Cyrl"), (1_000, "sr", "Latn"))
    _write(tmp_path, "a_1.parquet", (9_979, "fra", "Latn"), (1, "isl", None), (20, None, None))
    _write(tmp_path, "b.parquet", (3, "zh-Hant", None), (4, "pt-BR", None), columns="lang")
    _write(tmp_path, "c.parquet", (5, "de", None), columns="lang")
    sources = [("a_*", "[deu, fra, srp]", ", cap: 1000"), ("b", "[]", ""), ("c", "[nld]", "")]
    lines = [SOURCE.format(name=name, languages=languages, more=more) for name, languages, more in sources]
    text = "sources:\n" + "".join(lines).replace("name: a_*", "name: a")
    # A twentieth of the first source's rows; what the manifest says of a source in one language stands.
    assert training_rows(_manifest(tmp_path, text)) == {
        **{"deu-Latn": 1, "srp-Cyrl": 450, "srp-Latn": 50, "fra-Latn": 499, "isl": 1},
        **{"zho-Hant": 3, "por": 4, "nld": 5},
    }


def test_the_quickstarts_own_manifest(tmp_path: Path) -> None:
    folder = build_cldr(tmp_path / "cldr", languages=["de", "no", "sr"])
    rows = training_rows(folder / "manifest.yaml")
    names = [source["name"] for source in yaml.safe_load((folder / "manifest.yaml").read_text())["sources"]]
    told = Counter(code for name in names for code in pq.read_table(folder / f"{name}.parquet")["lang"].to_pylist())
    assert rows == told and set(rows) == {"deu", "eng", "nor", "srp"}
    assert resource_class("deu-Latn", rows) == "high" and resource_class("fra-Latn", rows) == "none"


def test_a_language_that_is_none_is_refused(tmp_path: Path, refuses: Refuses) -> None:
    _write(tmp_path, "a.parquet", (2, "de", None), (1, "English", None))
    with refuses(tmp_path / "a.parquet", "column 'lang' holds 'English'"):
        training_rows(_manifest(tmp_path, "sources:\n" + SOURCE.format(name="a", languages="[]", more="")))
