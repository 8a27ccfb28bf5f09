"""Manifests of whole collections: a source for each file, folders and addresses, stages, and published shares."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from training.data.manifest import load_manifest
from training.data.manifest_file import read_manifest

ENTRY = {"name": "faq", "files": "a.parquet", "task_type": "retrieval", "instruction": "Find the answer."}
Refuses = Callable[..., AbstractContextManager[None]]


def collection(tmp_path: Path, *names: str, **keys: Any) -> Path:
    """A manifest of one collection of the files named."""
    for name in names:
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).touch()
    path = tmp_path / "manifest.yaml"
    entry = {**ENTRY, "files": "*.parquet", "each_file": True, **keys}
    path.write_text(yaml.safe_dump({"root": "data", "sources": [entry]}))
    return path


def test_each_file_of_a_collection_is_a_source(tmp_path: Path) -> None:
    path = collection(tmp_path, "faq_kor.parquet", "faq_de-en.parquet", "faq_part2.parquet", cap=7, symmetric=True)
    sources = load_manifest(path)
    assert [(source.name, source.languages) for source in sources] == [
        ("faq_de-en", ["deu", "eng"]),
        ("faq_kor", ["kor"]),
        ("faq_part2", []),
    ]
    for source in sources:
        assert source.files == [tmp_path / "data" / f"{source.name}.parquet"]
        assert (source.cap, source.symmetric, source.instruction) == (7, True, ENTRY["instruction"])


def test_file_whose_name_tells_no_language_has_those_of_the_collection(tmp_path: Path) -> None:
    path = collection(tmp_path, "faq_kor.parquet", "faq_x.parquet", "faq_fra.parquet", languages=["kor", "deu"])
    told = {source.name: source.languages for source in load_manifest(path)}
    assert told == {"faq_kor": ["kor"], "faq_x": ["kor", "deu"], "faq_fra": ["kor", "deu"]}
    path = collection(tmp_path, languages=["kor", "deu"], name_tells_language=False)
    assert [source.languages for source in load_manifest(path)] == [["kor", "deu"]] * 3


def test_file_whose_name_is_no_folder_name(tmp_path: Path, refuses: Refuses) -> None:
    # On a store a file may be called anything; its source would be prepared outside the folder.
    fsspec.filesystem("memory").pipe("/odd/...parquet", b"x")
    path = collection(tmp_path, files="*.parquet")
    with refuses(path, "'faq'", "'..'", "leading '.'"):
        load_manifest(path, "memory://odd")


def test_file_that_two_collections_claim(tmp_path: Path, refuses: Refuses) -> None:
    path = collection(tmp_path, "faq_kor.parquet")
    content = yaml.safe_load(path.read_text())
    content["sources"].append({**content["sources"][0], "name": "other"})
    path.write_text(yaml.safe_dump(content))
    with refuses(path, "'faq_kor'", "'other'", "narrow its 'files'"):
        load_manifest(path)


def test_root_and_the_folder_given_instead(tmp_path: Path) -> None:
    path = collection(tmp_path, "faq_kor.parquet")
    assert [str(source.files[0]) for source in load_manifest(path)] == [str(tmp_path / "data" / "faq_kor.parquet")]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "faq_deu.parquet").touch()
    assert [source.name for source in load_manifest(path, tmp_path / "elsewhere")] == ["faq_deu"]
    assert [source.name for source in load_manifest(path, str(tmp_path / "elsewhere"))] == ["faq_deu"]


def test_root_may_be_an_address(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/hub/faq_kor.parquet", b"PAR1")
    path = collection(tmp_path)
    path.write_text(path.read_text().replace("root: data", "root: memory://hub"))
    (source,) = load_manifest(path)
    assert (source.name, str(source.files[0])) == ("faq_kor", "memory://hub/faq_kor.parquet")
    store.rm("/hub", recursive=True)


@pytest.mark.parametrize("root", [5, "", ["data"]])
def test_root_of_the_wrong_type(tmp_path: Path, refuses: Refuses, root: Any) -> None:
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump({"root": root, "sources": [ENTRY]}))
    with refuses(path, "'root'", repr(root)):
        load_manifest(path)


def test_stage_takes_its_sources_under_its_cap(tmp_path: Path, refuses: Refuses) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.parquet").touch()
    entries = [
        {**ENTRY, "name": "a", "files": "a.parquet", "stages": ["one", "two"], "cap": 5},
        {**ENTRY, "name": "b", "files": "b.parquet", "stages": ["two"]},
        {**ENTRY, "name": "c", "files": "c.parquet"},
        {**ENTRY, "name": "d", "files": "missing.parquet", "stages": ["three"]},
    ]
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump({"sources": entries, "stage_caps": {"two": 3}}))
    assert [(source.name, source.cap) for source in load_manifest(path, stage="one")] == [("a", 5), ("c", None)]
    assert [(source.name, source.cap) for source in load_manifest(path, stage="two")] == [("a", 3), ("b", 3), ("c", 3)]
    with refuses(path, "'d'", "missing.parquet"):
        load_manifest(path)
    with refuses(path, "'four'", "one, three, two"):
        load_manifest(path, stage="four")


@pytest.mark.parametrize(
    ("caps", "named"), [({"stageX": 5}, "'stageX'"), ({"one": 0}, "'one'"), ({"one": "80k"}, "'80k'"), ([5], "[5]")]
)
def test_faulty_stage_caps(tmp_path: Path, refuses: Refuses, caps: Any, named: str) -> None:
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump({"sources": [{**ENTRY, "stages": ["one"]}], "stage_caps": caps}))
    with refuses(path, "'stage_caps'", named):
        read_manifest(path)


@pytest.mark.parametrize(
    ("shares", "named"),
    [
        (5, "5"),
        ({}, "'total_rows'"),
        ({"total_rows": 0}, "'total_rows'"),
        ({"total_rows": 1, "language_shares": {}}, "'language_shares'"),
        ({"total_rows": 1, "language_rows": ["eng"]}, "'language_rows'"),
        ({"total_rows": 1, "language_rows": {"eng": "many"}}, "'many'"),
        ({"total_rows": 1, "language_rows": {False: 5}}, "False"),
        ({"total_rows": 1, "category_percent": {"QA": -1}}, "'QA'"),
    ],
)
def test_faulty_published_shares(tmp_path: Path, refuses: Refuses, shares: Any, named: str) -> None:
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump({"sources": [ENTRY], "published_shares": shares}))
    with refuses(path, "'published_shares'", named):
        read_manifest(path)
