"""The survey: what a manifest would read, told from metadata, whatever is there and whatever is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from training.data.published import PublishedFile
from training.data.survey import Survey, survey
from training.data.survey_report import report

PATH = Path(__file__).parents[3] / "training" / "data" / "manifests" / "f2llm-v2.yaml"
Refuses = Callable[..., AbstractContextManager[None]]


def entry(name: str, task_type: str, category: str, languages: list[str], rows: int, **keys: Any) -> dict[str, Any]:
    told = {"task_type": task_type, "category": category, "languages": languages, "published_rows": rows}
    return {"name": name, "files": f"{name}.parquet", "instruction": "Find.", "stages": ["two"], **told, **keys}


# In the published layout: 3, 26 and 28 columns.
ENTRIES = [
    entry("polarity", "classification", "sentiment", ["eng"], 50),
    entry("faq", "retrieval", "QA", ["eng", "kor", "deu"], 900, files="faq_*.parquet", each_file=True, stages=["one"]),
    entry("crawl", "retrieval", "bitext", ["kor", "eng"], 100, files="crawl_*.parquet", each_file=True),
    entry("world", "clustering", "topic", ["mul"], 70),
]
SHARES = {
    "total_rows": 1000,
    "language_rows": {"eng": 600, "kor": 300, "fra": 5},
    "category_percent": {"QA": 85.7, "bitext": 9.5, "sentiment": 4.8},
}


def write(path: Path, rows: int, negatives: int, *more: str) -> None:
    names = ["query", "passage", *(f"negative_{number + 1}" for number in range(negatives)), *more]
    pq.write_table(pa.table({name: [f"{name} {row}" for row in range(rows)] for name in names}), path)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A manifest and its data: one file of each layout, one of two FAQ languages, and a file of nobody's."""
    data = tmp_path / "data"
    data.mkdir()
    write(data / "polarity.parquet", 50, 1)
    write(data / "faq_kor.parquet", 30, 24)
    write(data / "faq_en.parquet", 70, 24)
    write(data / "crawl_ko-en.parquet", 21, 24, "lang", "source")
    write(data / "world.parquet", 70, 24)
    write(data / "nobody.parquet", 5, 1)
    path = tmp_path / "manifest.yaml"
    content = {"root": "data", "stage_caps": {"two": 20}, "published_shares": SHARES, "sources": ENTRIES}
    path.write_text(yaml.safe_dump(content))
    return path


def table(text: str, head: str) -> dict[str, list[str]]:
    """The rows of one table of a report by their first cell."""
    lines = text[text.index(f"\n{head}") :].strip().split("\n\n")[0].splitlines()[2:]
    return {line.split()[0]: line.split()[1:] for line in lines}


def test_three_layouts(manifest: Path) -> None:
    found = survey(manifest)
    layouts = {
        Path(file.name).name: (file.rows, file.negatives, file.languages)
        for collection in found.collections
        for file in collection.files
    }
    assert layouts == {
        "polarity.parquet": (50, 1, ["eng"]),
        "faq_en.parquet": (70, 24, ["eng"]),
        "faq_kor.parquet": (30, 24, ["kor"]),
        "crawl_ko-en.parquet": (21, 24, ["kor", "eng"]),
        "world.parquet": (70, 24, ["mul"]),
    }
    assert [len(pq.read_schema(manifest.parent / "data" / name)) for name in layouts] == [3, 26, 26, 28, 26]
    assert (found.rows, found.kept, found.published_rows) == (241, 241, 1120)
    assert (found.missing, found.unreachable) == ([], None)
    assert found.unclaimed == [str(manifest.parent / "data" / "nobody.parquet")]


def test_stage_and_its_cap(manifest: Path, refuses: Refuses) -> None:
    found = survey(manifest, stage="two")
    assert [(each.entry.name, each.rows, each.kept) for each in found.collections] == [
        ("polarity", 50, 20),
        ("crawl", 21, 20),
        ("world", 70, 20),
    ]
    # Files of the other stage are no strangers.
    assert [Path(name).name for name in found.unclaimed] == ["nobody.parquet"]
    found = survey(manifest, stage="one")
    assert [(each.entry.name, each.rows, each.kept) for each in found.collections] == [("faq", 100, 100)]
    with refuses(manifest, "'three'", "one, two"):
        survey(manifest, stage="three")


def test_cap_is_of_a_source(tmp_path: Path) -> None:
    for name in ("faq_kor", "faq_en"):
        write(tmp_path / f"{name}.parquet", 30, 1)
    faq = entry("faq", "retrieval", "QA", ["kor", "eng"], 60, files="faq_*.parquet", cap=20, published_files=2)
    kept = {}
    for each_file in (True, False):
        path = tmp_path / "manifest.yaml"
        path.write_text(yaml.safe_dump({"sources": [{**faq, "each_file": each_file}]}))
        (collection,) = survey(path).collections
        kept[each_file] = (collection.kept, collection.published_kept)
    assert kept == {True: (40, 40), False: (20, 20)}


def test_rows_by_language(manifest: Path) -> None:
    found = {each.entry.name: each for each in survey(manifest, stage="two").collections}
    # A pair takes half each, the odd row going to the first.
    assert found["crawl"].rows_by_language() == {"kor": 11, "eng": 10}
    assert found["crawl"].rows_by_language(capped=True) == {"kor": 10, "eng": 10}
    assert found["world"].rows_by_language() == {"mul": 70}
    assert found["polarity"].published_by_language() == {"eng": 50}
    assert found["crawl"].published_by_language() == {"mul": 100}


def test_report_sets_rows_beside_the_published_ones(manifest: Path) -> None:
    text = report(survey(manifest, stage="two"))
    lines = text.replace(str(manifest.parent), "").splitlines()
    assert all(len(line) <= 140 and line == line.rstrip() for line in lines)
    sources = table(text, "source")
    assert sources["polarity"] == ["classification", "sentiment", "eng", "1", "1", "50", "20", "50", "20"]
    assert sources["crawl"] == ["retrieval", "bitext", "kor,", "eng", "1", "24", "21", "20", "100", "20"]
    assert sources["total"] == ["3", "141", "60", "220", "60"]
    # The shares are of the categories that the paper lists.
    categories = table(text, "category")
    assert categories["bitext"] == ["21", "29.6", "100", "66.7", "9.5"]
    assert categories["topic"] == ["70", "70"]
    languages = table(text, "language")
    assert languages["eng"] == ["60", "42.6", "30", "50", "600", "60.0"]
    assert languages["several"] == ["70", "49.6", "20", "170"]
    assert languages["fra"] == ["0", "0", "0", "5", "0.5"]
    assert "nothing is missing" in text
    assert "1 files that no source claims:\n  " in text and "nobody.parquet" in text


def test_report_shows_as_many_languages_as_asked_for(manifest: Path) -> None:
    text = report(survey(manifest), languages=2)
    assert list(table(text, "language")) == ["eng", "several", "…"]
    assert "… and 2 more languages" in text


def test_missing_files(manifest: Path) -> None:
    (manifest.parent / "data" / "faq_kor.parquet").unlink()
    (manifest.parent / "data" / "world.parquet").unlink()
    content = yaml.safe_load(manifest.read_text())
    content["sources"][1]["published_files"] = 3
    manifest.write_text(yaml.safe_dump(content))
    found = survey(manifest)
    assert {each.entry.name: each.missing for each in found.missing} == {
        "faq": ["2 of 3 files"],
        "world": ["world.parquet"],
    }
    text = report(found)
    assert "missing or unreadable, 2 of 4 sources:\n  faq: 2 of 3 files\n  world: world.parquet (70 rows as" in text
    assert table(text, "source")["world"] == ["clustering", "topic", "mul", "0", "missing", "70"]


def test_unreadable_file_is_reported_and_the_others_are_counted(manifest: Path) -> None:
    (manifest.parent / "data" / "faq_kor.parquet").write_bytes(b"no parquet")
    found = survey(manifest)
    (faq,) = found.missing
    assert [Path(file.name).name for file in faq.files] == ["faq_en.parquet"]
    assert "faq_kor.parquet: not a readable parquet file" in faq.faults[0]
    assert faq.faults[0] in report(found)


@pytest.mark.parametrize("folder", ["empty", "none"])
def test_nothing_on_disk(manifest: Path, folder: str) -> None:
    (manifest.parent / "empty").mkdir()
    found = survey(manifest, manifest.parent / folder)
    assert (found.rows, found.published_rows, len(found.missing)) == (0, 1120, 4)
    text = report(found)
    assert "none of the 4 sources was found" in text
    assert table(text, "source")["faq"] == ["retrieval", "QA", "3", "0", "missing", "900"]
    assert table(text, "category")["QA"] == ["0", "900", "85.7", "85.7"]


def test_no_data_is_read(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_, **__):
        raise AssertionError("a survey reads no rows")

    monkeypatch.setattr(PublishedFile, "batches", fail)
    assert survey(manifest).rows == 241


def test_manifest_of_the_least_keys(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 3, 0)
    path = tmp_path / "manifest.yaml"
    told = {"name": "a", "files": "a.parquet", "task_type": "retrieval", "instruction": "Find."}
    path.write_text(yaml.safe_dump({"sources": [told]}))
    text = report(survey(path))
    assert table(text, "source")["a"] == ["retrieval", "1", "0", "3", "3"]
    assert table(text, "language")["several"] == ["3", "100.0", "3", "0"]


@pytest.fixture
def remote(manifest: Path) -> Iterator[str]:
    store = fsspec.filesystem("memory")
    for file in (manifest.parent / "data").iterdir():
        store.pipe(f"/hub/{file.name}", file.read_bytes())
    yield "memory://hub"
    store.rm("/hub", recursive=True)


def without_folder(found: Survey) -> list[Any]:
    return [[(Path(file.name).name, file.rows, file.languages) for file in each.files] for each in found.collections]


def test_remote_folder_surveys_as_the_local_one(manifest: Path, remote: str) -> None:
    here, there = survey(manifest), survey(manifest, remote)
    assert without_folder(there) == without_folder(here)
    assert (there.rows, there.kept, there.unclaimed) == (241, 241, [f"{remote}/nobody.parquet"])


def test_folder_out_of_reach(manifest: Path) -> None:
    # The tests run offline.
    found = survey(manifest, "hf://datasets/owner/name")
    assert found.rows == 0 and "cannot be reached" in found.unreachable
    text = report(found)
    assert f"not looked into: {found.unreachable}" in text and "900" in text


def test_survey_without_looking(manifest: Path) -> None:
    found = survey(manifest, "hf://datasets/owner/name", reach=False)
    assert (found.rows, found.unreachable, found.published_rows) == (0, None, 1120)


def test_faulty_manifest(manifest: Path, refuses: Refuses) -> None:
    manifest.write_text("sources: []\n")
    with refuses(manifest, "'sources'"):
        survey(manifest)


def test_shipped_manifest_without_data(tmp_path: Path) -> None:
    text = report(survey(PATH, tmp_path, stage="stage1"))
    sources = table(text, "source")
    assert len(sources) == 7 + 1
    assert sources["total"] == ["0", "0", "0", "26,693,280"]
    assert sources["paracrawl"] == ["retrieval", "bitext", "30", "0/52", "missing", "10,684,184"]
    assert table(text, "language")["eng"] == ["0", "0", "0", "16,059,000", "26.8"]
