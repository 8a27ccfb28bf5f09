"""The build file: what it may say and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

from training.data.building.build_file import load_build_file

ENTRY = {
    "name": "faq",
    "dataset": "json",
    "data_files": "faq.jsonl",
    "format": "pairs",
    "columns": {"query": "question", "passage": ["title", "answer"]},
    "instruction": "Find the answer.",
}
Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*entries: Any, **keys: Any) -> Path:
        path = tmp_path / "build.yaml"
        path.write_text(yaml.safe_dump({"sources": list(entries), **keys}))
        return path

    return write


def test_optional_keys_have_defaults(write: Callable[..., Path]) -> None:
    build_file = load_build_file(write(ENTRY))
    (source,) = build_file.sources
    assert build_file.seed == 0
    assert source.load_options == {"split": "train", "data_files": "faq.jsonl"}
    assert source.options == {"both_directions": False}
    assert source.description == {
        "instruction": "Find the answer.",
        "languages": [],
        "licence": None,
        "cap": None,
        "symmetric": False,
    }
    assert (source.num_negatives, source.lang) == (0, None)


def test_all_keys_arrive(write: Callable[..., Path]) -> None:
    told = {"config": "main", "split": "test", "revision": "v1", "load_options": {"field": "data"}}
    described = {"languages": ["kor"], "licence": "CC0-1.0", "cap": 7, "symmetric": False}
    columns = {"query": "a", "passage": "b", "score": "c"}
    (source,) = load_build_file(
        write({**ENTRY, **told, **described, "format": "sts", "columns": columns, "scale": [0, 1]})
    ).sources
    assert source.load_options == {
        "name": "main",
        "split": "test",
        "revision": "v1",
        "data_files": "faq.jsonl",
        "field": "data",
    }
    assert source.description == {"instruction": "Find the answer.", **described}
    assert source.options == {"threshold": 4, "scale": [0, 1]}
    assert (source.columns, source.lang) == (columns, "kor")


@pytest.mark.parametrize("key", ["name", "dataset", "format", "columns", "instruction"])
def test_missing_key(write: Callable[..., Path], refuses: Refuses, key: str) -> None:
    path = write({name: value for name, value in ENTRY.items() if name != key})
    with refuses(path, "source 1" if key == "name" else "'faq'", repr(key), "missing"):
        load_build_file(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 5),
        ("dataset", None),
        ("config", 5),
        ("split", ["train"]),
        ("revision", 1.5),
        ("data_files", 5),
        ("data_files", []),
        ("data_files", {"train": "a"}),
        ("load_options", {"streaming": True}),
        ("load_options", ["sep"]),
        ("format", "pair"),
        ("format", ["pairs"]),
        ("columns", "query"),
        ("both_directions", "yes"),
        ("instruction", " "),
        ("languages", "kor"),
        ("languages", [False]),
        ("licence", 4.0),
        ("cap", 0),
        ("cap", True),
        ("symmetric", 1),
    ],
)
def test_wrong_value(write: Callable[..., Path], refuses: Refuses, key: str, value: Any) -> None:
    path = write({**ENTRY, key: value})
    with refuses(path, "source", repr(key), repr(value), "give"):
        load_build_file(path)


@pytest.mark.parametrize(
    ("key", "remedy"),
    [("instructions", "did you mean 'instruction'?"), ("labels", "unknown key 'labels'"), (1, "unknown key 1")],
)
def test_unknown_key(write: Callable[..., Path], refuses: Refuses, key: Any, remedy: str) -> None:
    path = write({**ENTRY, key: "x"})
    with refuses(path, "'faq'", remedy):
        load_build_file(path)


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ({"query": "a"}, "'passage' is missing"),
        ({"query": "a", "passage": "b", "langs": "c"}, "did you mean 'lang'?"),
        ({"query": "a", "passage": []}, "'passage' cannot be []"),
        ({"query": "a", "passage": 1}, "'passage' cannot be 1"),
        ({"query": "a", "passage": "b", "lang": ["c", "d"]}, "'lang' cannot be"),
    ],
)
def test_faulty_columns(write: Callable[..., Path], refuses: Refuses, columns: dict[str, Any], fault: str) -> None:
    path = write({**ENTRY, "columns": columns})
    with refuses(path, "'faq'", "columns", fault):
        load_build_file(path)


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden"])
def test_name_that_is_no_file_name(write: Callable[..., Path], refuses: Refuses, name: str) -> None:
    path = write({**ENTRY, "name": name})
    with refuses(path, repr(name), "file"):
        load_build_file(path)


def test_two_sources_of_one_name(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write(ENTRY, ENTRY)
    with refuses(path, "'faq'", "rename"):
        load_build_file(path)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"seed": "one"}, ("'seed'", "'one'")),
        ({"seed": -1}, ("'seed'", "-1")),
        ({"seeds": 1}, ("did you mean 'seed'?",)),
        ({"sources": []}, ("'sources'", "at least one")),
        ({"sources": ["faq"]}, ("source 1", "str")),
        (
            {"sources": [{**ENTRY, "format": "two_way", "columns": {"text": "a", "label": "b"}}]},
            ("'label_texts'", "missing"),
        ),
    ],
)
def test_faulty_file(
    write: Callable[..., Path], refuses: Refuses, keys: dict[str, Any], parts: tuple[str, ...]
) -> None:
    path = write(**keys) if "sources" in keys else write(ENTRY, **keys)
    with refuses(path, *parts):
        load_build_file(path)
