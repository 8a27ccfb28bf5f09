"""Manifests: what they may say, which files they find, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

from training.data.manifest import Source, load_manifest, select_sources
from training.data.manifest_file import read_manifest

ENTRY = {"name": "faq", "files": "a.parquet", "task_type": "retrieval", "instruction": "Find the answer."}
Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a manifest of entries beside a few (empty) data files."""
    for name in ("a.parquet", "b_10.parquet", "b_2.parquet", "deep/c.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def write(*entries: Any) -> Path:
        path = tmp_path / "manifest.yaml"
        path.write_text(yaml.safe_dump({"sources": list(entries)}))
        return path

    return write


def found(path: Path) -> list[str]:
    (source,) = load_manifest(path)
    return [file.relative_to(path.parent).as_posix() for file in source.files]


def test_all_keys_arrive(write: Callable[..., Path], tmp_path: Path) -> None:
    told = {"symmetric": True, "languages": ["kor", "eng"], "cap": 80_000, "licence": "CC-BY-4.0"}
    (source,) = load_manifest(write({**ENTRY, **told, "task_type": "clustering"}))
    assert source == Source(
        "faq", [tmp_path / "a.parquet"], "clustering", "Find the answer.", True, ["kor", "eng"], 80_000, "CC-BY-4.0"
    )


def test_optional_keys_have_defaults(write: Callable[..., Path], tmp_path: Path) -> None:
    sources = load_manifest(str(write(ENTRY, {**ENTRY, "name": "other", "cap": None, "licence": None})))
    assert [source.name for source in sources] == ["faq", "other"]
    for source in sources:
        assert (source.symmetric, source.languages, source.cap, source.licence) == (False, [], None, None)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("a.parquet", ["a.parquet"]),
        ("b_*.parquet", ["b_10.parquet", "b_2.parquet"]),
        ("deep/*.parquet", ["deep/c.parquet"]),
        ("**/*.parquet", ["a.parquet", "b_10.parquet", "b_2.parquet", "deep/c.parquet"]),
        (["deep/c.parquet", "a.parquet"], ["deep/c.parquet", "a.parquet"]),
        (["b_*.parquet", "a.parquet"], ["b_10.parquet", "b_2.parquet", "a.parquet"]),
    ],
)
def test_files_are_found_in_reading_order(
    write: Callable[..., Path], files: str | list[str], expected: list[str]
) -> None:
    assert found(write({**ENTRY, "files": files})) == expected


def test_files_may_be_absolute(write: Callable[..., Path], tmp_path: Path) -> None:
    assert found(write({**ENTRY, "files": str(tmp_path / "a.parquet")})) == ["a.parquet"]
    assert found(write({**ENTRY, "files": str(tmp_path / "b_?.parquet")})) == ["b_2.parquet"]


def test_absolute_pattern_may_have_a_star_in_a_folder(write: Callable[..., Path], tmp_path: Path) -> None:
    assert found(write({**ENTRY, "files": str(tmp_path / "d*" / "c.parquet")})) == ["deep/c.parquet"]


def test_file_that_two_patterns_match_is_read_once(write: Callable[..., Path]) -> None:
    assert found(write({**ENTRY, "files": ["*.parquet", "a.parquet"]})) == ["a.parquet", "b_10.parquet", "b_2.parquet"]
    assert found(write({**ENTRY, "files": ["b_2.parquet", "*.parquet"]})) == [
        "b_2.parquet",
        "a.parquet",
        "b_10.parquet",
    ]


def test_folder_is_no_file(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write({**ENTRY, "files": ["*"]})
    assert path.parent / "deep" not in load_manifest(path)[0].files
    path = write({**ENTRY, "files": "deep"})
    with refuses(path, "'faq'", path.parent / "deep", "'files'"):
        load_manifest(path)


@pytest.mark.parametrize("name", ["data [v2]", "what?", "*"])
def test_folder_of_the_manifest_is_no_pattern(tmp_path: Path, name: str) -> None:
    for folder in (tmp_path / name, tmp_path / "other"):
        folder.mkdir()
        (folder / "a.parquet").touch()
    path = tmp_path / name / "manifest.yaml"
    path.write_text(yaml.safe_dump({"sources": [ENTRY]}))
    assert found(path) == ["a.parquet"]


def test_missing_manifest(tmp_path: Path, refuses: Refuses) -> None:
    with refuses(tmp_path / "none.yaml", "no such file"):
        load_manifest(tmp_path / "none.yaml")


def test_manifest_that_is_no_yaml(tmp_path: Path, refuses: Refuses) -> None:
    path = tmp_path / "manifest.yaml"
    path.write_text("sources: [\n")
    with refuses(path, "not valid YAML"):
        load_manifest(path)


@pytest.mark.parametrize("content", ["sources: []\n", "sources:\n", "sources: {a: b}\n", "{}\n"])
def test_no_source(tmp_path: Path, refuses: Refuses, content: str) -> None:
    path = tmp_path / "manifest.yaml"
    path.write_text(content)
    with refuses(path, "'sources'", "at least one"):
        load_manifest(path)


def test_unknown_key_beside_sources(tmp_path: Path, refuses: Refuses) -> None:
    path = tmp_path / "manifest.yaml"
    path.write_text("source: []\n")
    with refuses(path, "'source'", "did you mean 'sources'?"):
        load_manifest(path)


def test_entry_is_no_mapping(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write(ENTRY, "b.parquet")
    with refuses(path, "source 2", "str"):
        load_manifest(path)


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("file", "did you mean 'files'?"),
        ("task-type", "did you mean 'task_type'?"),
        ("zzz", "known keys are cap, "),
    ],
)
def test_unknown_key(write: Callable[..., Path], refuses: Refuses, key: str, remedy: str) -> None:
    path = write({**ENTRY, key: "x"})
    with refuses(path, "'faq'", repr(key), remedy):
        load_manifest(path)


@pytest.mark.parametrize("key", [1, True, None])
def test_key_that_is_no_text(write: Callable[..., Path], refuses: Refuses, key: Any) -> None:
    path = write({**ENTRY, key: "x"})
    with refuses(path, "'faq'", "unknown key", repr(key)):
        load_manifest(path)


@pytest.mark.parametrize("key", ["name", "files", "task_type", "instruction"])
def test_missing_key(write: Callable[..., Path], refuses: Refuses, key: str) -> None:
    path = write({name: value for name, value in ENTRY.items() if name != key})
    with refuses(path, "source 1" if key == "name" else "'faq'", repr(key), "missing"):
        load_manifest(path)


@pytest.mark.parametrize("key", ["name", "files", "task_type", "instruction"])
def test_key_without_a_value(write: Callable[..., Path], refuses: Refuses, key: str) -> None:
    path = write({**ENTRY, key: None})
    with refuses(path, repr(key), "missing"):
        load_manifest(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 5),
        ("files", 5),
        ("files", {"a": "b"}),
        ("task_type", ["retrieval"]),
        ("instruction", ["Find."]),
        ("symmetric", "yes"),
        ("symmetric", None),
        ("symmetric", 1),
        ("languages", "kor"),
        ("languages", None),
        ("cap", "80k"),
        ("cap", 1.5),
        ("cap", True),
        ("licence", 4.0),
    ],
)
def test_wrong_type(write: Callable[..., Path], refuses: Refuses, key: str, value: Any) -> None:
    path = write({**ENTRY, key: value})
    with refuses(path, "source", repr(key), repr(value)):
        load_manifest(path)


# YAML reads the language code `no` as false.
@pytest.mark.parametrize(
    ("key", "value"), [("languages", [False]), ("languages", [3]), ("files", [1]), ("files", [""])]
)
def test_wrong_type_in_a_list(write: Callable[..., Path], refuses: Refuses, key: str, value: Any) -> None:
    path = write({**ENTRY, key: value})
    with refuses(path, "'faq'", repr(key)):
        load_manifest(path)


@pytest.mark.parametrize("cap", [0, -1])
def test_cap_below_one(write: Callable[..., Path], refuses: Refuses, cap: int) -> None:
    path = write({**ENTRY, "cap": cap})
    with refuses(path, "'faq'", "cap", "at least 1", cap):
        load_manifest(path)


def test_unknown_task_type(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write({**ENTRY, "task_type": "reranking"})
    with refuses(path, "'faq'", "'reranking'", "retrieval, clustering, classification"):
        load_manifest(path)


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "/root"])
def test_name_that_is_no_folder_name(write: Callable[..., Path], refuses: Refuses, name: str) -> None:
    path = write({**ENTRY, "name": name})
    with refuses(path, repr(name), "folder"):
        load_manifest(path)


def test_two_sources_of_one_name(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write(ENTRY, {**ENTRY, "files": "b_2.parquet"})
    with refuses(path, "'faq'", "rename"):
        load_manifest(path)


@pytest.mark.parametrize("files", ["none.parquet", "none_*.parquet", ["a.parquet", "none.parquet"]])
def test_missing_file(write: Callable[..., Path], refuses: Refuses, files: str | list[str]) -> None:
    path = write({**ENTRY, "files": files})
    with refuses(path, "'faq'", path.parent / "none", "'files'"):
        load_manifest(path)


def test_keys_for_reports_are_no_source_keys(write: Callable[..., Path]) -> None:
    told = {"stages": ["one"], "published_rows": 5, "published_files": 1, "instruction_from": "v1", "category": "QA"}
    (source,) = load_manifest(write({**ENTRY, **told}))
    assert source.category == "QA"
    (entry,) = read_manifest(write({**ENTRY, **told})).entries
    assert {key: getattr(entry, key) for key in told} == told


@pytest.mark.parametrize("key", ["published_rows", "published_files", "category", "instruction_from"])
def test_key_for_reports_may_be_null(write: Callable[..., Path], key: str) -> None:
    assert getattr(read_manifest(write({**ENTRY, key: None})).entries[0], key) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("published_rows", "60M"),
        ("published_rows", True),
        ("published_files", 1.5),
        ("category", 3),
        ("stages", "stage1"),
        ("stages", [1]),
        ("stages", None),
        ("instruction_from", ["v1"]),
        ("each_file", "yes"),
        ("each_file", None),
        ("name_tells_language", 1),
    ],
)
def test_wrong_type_of_a_key_for_collections(
    write: Callable[..., Path], refuses: Refuses, key: str, value: Any
) -> None:
    path = write({**ENTRY, key: value})
    with refuses(path, "'faq'", repr(key), repr(value)):
        load_manifest(path)


@pytest.mark.parametrize("key", ["published_rows", "published_files"])
def test_published_size_below_one(write: Callable[..., Path], refuses: Refuses, key: str) -> None:
    path = write({**ENTRY, key: 0})
    with refuses(path, "'faq'", key, "at least 1"):
        load_manifest(path)


def test_unknown_origin_of_an_instruction(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write({**ENTRY, "instruction_from": "v2"})
    with refuses(path, "'faq'", "'v2'", "v1, mteb, written"):
        load_manifest(path)


SOURCES = [
    Source(name, [], task_type, "Find.")
    for name, task_type in [
        ("web_kor", "retrieval"),
        ("web_deu", "retrieval"),
        ("sts", "clustering"),
        ("polarity", "classification"),
    ]
]


@pytest.mark.parametrize(
    ("patterns", "task_types", "expected"),
    [
        (None, None, ["web_kor", "web_deu", "sts", "polarity"]),
        ([], [], ["web_kor", "web_deu", "sts", "polarity"]),
        (["web_*"], None, ["web_kor", "web_deu"]),
        (["sts", "web_kor"], None, ["web_kor", "sts"]),  # the manifest's order
        (["*", "sts"], None, ["web_kor", "web_deu", "sts", "polarity"]),
        (None, ["classification", "clustering"], ["sts", "polarity"]),
        (["w*", "s*"], ["clustering"], ["sts"]),
    ],
)
def test_select_sources(patterns: list[str] | None, task_types: list[str] | None, expected: list[str]) -> None:
    assert [source.name for source in select_sources(SOURCES, patterns, task_types)] == expected


def test_select_pattern_that_fits_nothing(refuses: Refuses) -> None:
    with refuses("no source fits 'webb_*'", "web_kor, web_deu, sts, polarity"):
        select_sources(SOURCES, ["sts", "webb_*"])


def test_select_unknown_task_type(refuses: Refuses) -> None:
    with refuses("unknown task type 'sts'", "retrieval, clustering, classification"):
        select_sources(SOURCES, None, ["retrieval", "sts"])


def test_select_leaves_nothing(refuses: Refuses) -> None:
    with refuses("no source is left of 4", "task types"):
        select_sources(SOURCES, ["web_*"], ["clustering"])
