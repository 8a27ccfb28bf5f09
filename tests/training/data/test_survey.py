"""The survey: what a manifest would read, from metadata alone, with files present, missing, damaged or remote."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import yaml

from tests.training.data.prepared_rows import write_rows
from training.data.published import PublishedFile
from training.data.survey import divided, report, survey

PATH = Path(__file__).parents[3] / "training" / "data" / "manifests" / "f2llm-v2.yaml"


def entry(name, task_type, category, languages, rows, **keys):
    about = {"task_type": task_type, "category": category, "languages": languages, "published_rows": rows}
    return {"name": name, "files": f"{name}.parquet", "instruction": "Find.", "stages": ["two"], **about, **keys}


# In the published layout: 3, 26 and 28 columns.
ENTRIES = [
    entry("polarity", "classification", "sentiment", ["eng"], 50),
    entry("faq", "retrieval", "QA", ["eng", "kor", "deu"], 900, files="faq_*.parquet", each_file=True, stages=["one"]),
    entry("crawl", "retrieval", "bitext", ["kor", "eng"], 100, files="crawl_*.parquet", each_file=True),
    entry("world", "clustering", "topic", ["mul"], 70),
]


@pytest.fixture
def manifest(tmp_path):
    """A manifest and its data: one file of each layout, one of two FAQ languages, and an unclaimed file."""
    data = tmp_path / "data"
    data.mkdir()
    files = {"polarity": (50, 1), "faq_kor": (30, 24), "faq_en": (70, 24), "world": (70, 24), "nobody": (5, 1)}
    for name, (rows, negatives) in files.items():
        write_rows(data / f"{name}.parquet", rows, negatives)
    write_rows(data / "crawl_ko-en.parquet", 21, 24, lang=["ko"] * 21, source=["web"] * 21)
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump({"root": "data", "stage_caps": {"two": 20}, "sources": ENTRIES}))
    return path


def table(text, head):
    """The rows of one table of a report by their first cell."""
    lines = text[text.index(f"\n{head}") :].strip().split("\n\n")[0].splitlines()[1:]
    return {line.split()[0]: line.split()[1:] for line in lines}


@pytest.mark.parametrize("remote", [None, "memory://hub"])
def test_three_layouts(manifest, monkeypatch, remote):
    monkeypatch.setattr(PublishedFile, "batches", lambda *_, **__: pytest.fail("a survey reads no rows"))
    for file in (manifest.parent / "data").iterdir():
        fsspec.filesystem("memory").pipe(f"/hub/{file.name}", file.read_bytes())
    found = survey(manifest, remote)
    files = [file for collection in found.collections for file in collection.files]
    assert [(Path(file.name).stem, file.rows, file.negatives, *file.languages) for file in files] == [
        ("polarity", 50, 1, "eng"),
        ("faq_en", 70, 24, "eng"),
        ("faq_kor", 30, 24, "kor"),
        ("crawl_ko-en", 21, 24, "kor", "eng"),
        ("world", 70, 24, "mul"),
    ]
    assert [file.tells_language for file in files] == [False, False, False, True, False]
    assert not any(each.missing or each.faults for each in found.collections) and found.unreachable is None
    assert found.unclaimed == [f"{remote or manifest.parent / 'data'}/nobody.parquet"]


@pytest.mark.parametrize(("each_file", "kept"), [(True, 40), (False, 20)])
def test_the_cap_is_of_a_source(tmp_path, each_file, kept):
    for name in ("faq_kor", "faq_en"):
        write_rows(tmp_path / f"{name}.parquet", 30, 1)
    keys = {"files": "faq_*.parquet", "cap": 20, "published_files": 2, "each_file": each_file}
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump({"sources": [entry("faq", "retrieval", "QA", ["kor", "eng"], 60, **keys)]}))
    (collection,) = survey(path).collections
    assert (collection.kept, collection.published_kept) == (kept, kept)


def test_report_of_a_stage_under_its_cap(manifest):
    text = report(survey(manifest, stage="two"))
    sources = table(text, "source")
    assert sources["polarity"] == ["classification", "eng", "1", "1", "50", "20", "50"]
    assert sources["crawl"] == ["retrieval", "kor,", "eng", "1", "24", "21", "20", "100"]
    assert sources["total"] == ["3", "141", "60", "220"]
    assert table(text, "task")["bitext"] == ["21", "20", "100"]
    languages = table(text, "language")
    assert languages["eng"] == ["60", "30", "50"]
    assert languages["several"] == ["70", "20", "170"]
    # Files of the other stage are claimed.
    assert "nothing is missing" in text and "1 files that no source claims:\n  " in text and "nobody.parquet" in text
    # The odd row goes to the first; rows in several languages to none.
    assert divided(21, ["kor", "eng"], pair=True) == {"kor": 11, "eng": 10}
    assert divided(21, ["kor", "eng"], pair=False) == {"mul": 21}


def test_missing_and_unreadable_files_and_folders(manifest, tmp_path):
    data = manifest.parent / "data"
    (data / "world.parquet").unlink()
    (data / "faq_kor.parquet").unlink()
    (data / "polarity.parquet").write_bytes(b"no parquet")
    content = yaml.safe_load(manifest.read_text())
    content["sources"][1]["published_files"] = 3
    manifest.write_text(yaml.safe_dump(content))
    found = survey(manifest)
    assert [each.missing for each in found.collections] == [[], ["2 of 3 files"], [], ["world.parquet"]]
    (fault,) = found.collections[0].faults
    assert "polarity.parquet: not a readable parquet file" in fault
    text = report(found)
    assert f"missing or unreadable:\n  polarity: {fault}\n  faq: 2 of 3 files\n  world: world.parquet\n" in text
    assert table(text, "source")["world"] == ["clustering", "mul", "0", "0", "0", "70"]
    # The tests run offline.
    found = survey(manifest, "hf://datasets/owner/name")
    assert "cannot be reached" in found.unreachable and found.unreachable in report(found)
    found = survey(manifest, "hf://datasets/owner/name", reach=False)
    assert [each.rows for each in found.collections] == [0] * 4 and found.unreachable is None
    (tmp_path / "empty").mkdir()
    text = report(survey(PATH, tmp_path / "empty", stage="stage1"))
    sources = table(text, "source")
    assert len(sources) == 7 + 1 and sources["total"] == ["0", "0", "0", "26,693,280"]
    assert sources["paracrawl"] == ["retrieval", "30", "0/52", "0", "0", "10,684,184"]
    assert "none of the 7 sources was found" in text
