"""The build file and building from it: what it may say, one file per source, and what is kept, rebuilt or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from babel import Locale

from training.build import main
from training.data.building.build_file import build_from_file, load_build_file
from training.data.manifest import load_manifest
from training.data.published import PublishedFile

Refuses = Callable[..., AbstractContextManager[None]]
Write = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[4]

FAQ = {
    "name": "faq",
    "dataset": "json",
    "data_files": "faq.jsonl",
    "format": "pairs",
    "columns": {"query": "question", "passage": ["title", "answer"]},
    "instruction": "Find the answer.",
}
KINDS = {
    "name": "kinds",
    "dataset": "csv",
    "data_files": "raw/kinds.csv",
    "format": "labelled",
    "columns": {"text": "name", "label": "kind"},
    "instruction": "Identify the kind of a name.",
    "languages": ["deu"],
    "num_negatives": 5,
}
NLI = {
    "name": "nli",
    "dataset": "json",
    "data_files": ["raw/nli.jsonl"],
    "format": "nli",
    "columns": {"premise": "one", "hypothesis": "two", "label": "gold"},
    "labels": {0: "entailment", 1: "neutral", 2: "contradiction"},
    "instruction": "Given a premise, retrieve hypotheses that are entailed by the premise.",
    "licence": "CC0-1.0",
    "cap": 10,
}
TRANSLATIONS = {
    "name": "translations",
    "dataset": "parquet",
    "data_files": "raw/translations.parquet",
    "format": "pairs",
    "columns": {"query": "names.de", "passage": "names.en", "lang": "code"},
    "both_directions": True,
    "symmetric": True,
    "instruction": "Translate.",
    "languages": ["deu", "eng"],
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*entries: Any, **keys: Any) -> Path:
        path = tmp_path / "build.yaml"
        path.write_text(yaml.safe_dump({"sources": list(entries), **keys}))
        return path

    return write


# The keys of a build file


def test_defaults_and_values_of_keys(write: Write) -> None:
    loading = {"config": "main", "split": "test", "revision": "v1", "load_options": {"field": "data"}}
    described = {"languages": ["kor"], "licence": "CC0-1.0", "cap": 7, "symmetric": False}
    columns = {"query": "a", "passage": "b", "score": "c"}
    full = {**FAQ, **loading, **described, "name": "sts", "format": "sts", "columns": columns, "scale": [0, 1]}
    seed, (short, long) = load_build_file(write(FAQ, full))
    assert (seed, short.load_options) == (0, {"split": "train", "data_files": "faq.jsonl"})
    assert short.options == {"both_directions": False}
    defaults = {"languages": [], "licence": None, "cap": None, "symmetric": False}
    assert short.description == {"instruction": "Find the answer.", **defaults}
    assert (short.num_negatives, short.lang) == (0, None)
    options = {"name": "main", "split": "test", "revision": "v1", "data_files": "faq.jsonl", "field": "data"}
    assert long.load_options == options
    assert long.description == {"instruction": "Find the answer.", **described}
    assert long.options == {"threshold": 4, "scale": [0, 1]}
    assert (long.columns, long.lang) == (columns, "kor")


WRONG = {
    "name": [5],
    "dataset": [None],
    "config": [5],
    "split": [["train"]],
    "revision": [1.5],
    "data_files": [5, [], {"train": "a"}],
    "load_options": [{"streaming": True}, ["sep"]],
    "format": ["pair", ["pairs"]],
    "columns": ["query"],
    "both_directions": ["yes"],
    "instruction": [" "],
    "languages": ["kor", [False]],
    "licence": [4.0],
    "cap": [0, True],
    "symmetric": [1],
    "on_bad_row": ["drop"],
}


@pytest.mark.parametrize("key", WRONG)
def test_missing_and_wrong_values(write: Write, refuses: Refuses, key: str) -> None:
    for value in WRONG[key]:
        path = write({**FAQ, key: value})
        with refuses(path, "source", repr(key), repr(value), "give"):
            load_build_file(path)
    path = write({name: value for name, value in FAQ.items() if name != key})
    if key in ("name", "dataset", "format", "columns", "instruction"):
        with refuses(path, "source 1" if key == "name" else "'faq'", repr(key), "missing"):
            load_build_file(path)
    else:
        load_build_file(path)


def faq(**keys: Any) -> list[dict[str, Any]]:
    return [{**FAQ, **keys}]


@pytest.mark.parametrize(
    ("sources", "parts"),
    [
        (faq(instructions="x"), ("'faq'", "did you mean 'instruction'?")),
        (faq(labels="x"), ("'faq'", "unknown key 'labels'")),
        ([{**FAQ, 1: "x"}], ("'faq'", "unknown key 1")),
        (faq(format="two_way", columns={"text": "a", "label": "b"}), ("'label_texts'", "missing")),
        *((faq(name=name), (repr(name), "file")) for name in ("a/b", "..", ".hidden")),
        (faq(columns={"query": "a"}), ("'faq'", "columns", "'passage' is missing")),
        (faq(columns={"query": "a", "passage": "b", "langs": "c"}), ("columns", "did you mean 'lang'?")),
        (faq(columns={"query": "a", "passage": []}), ("columns", "'passage' cannot be []")),
        (faq(columns={"query": "a", "passage": 1}), ("columns", "'passage' cannot be 1")),
        (faq(columns={"query": "a", "passage": "b", "lang": ["c", "d"]}), ("columns", "'lang' cannot be")),
        ([], ("'sources'", "at least one")),
        (["faq"], ("source 1", "str")),
        ([FAQ, FAQ], ("'faq'", "rename")),
    ],
)
def test_faulty_sources(write: Write, refuses: Refuses, sources: list[Any], parts: tuple[str, ...]) -> None:
    path = write(*sources)
    with refuses(path, *parts):
        load_build_file(path)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [({"seed": "one"}, ("'seed'", "'one'")), ({"seed": -1}, ("'seed'", "-1")), ({"seeds": 1}, ("mean 'seed'?",))],
)
def test_faulty_file(write: Write, refuses: Refuses, keys: dict[str, Any], parts: tuple[str, ...]) -> None:
    path = write(FAQ, **keys)
    with refuses(path, *parts):
        load_build_file(path)


# Building


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output folder, beside a few raw data sets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    german, english, raw = Locale("de"), Locale("en"), tmp_path / "raw"
    raw.mkdir()
    kinds = [(name, kind) for kind in ("languages", "scripts") for name in getattr(german, kind).values()]
    datasets.Dataset.from_list([{"name": name, "kind": kind} for name, kind in kinds]).to_csv(raw / "kinds.csv")
    hypotheses = [{"one": f"premise {i // 4}", "two": f"hypothesis {i}", "gold": i % 4 % 3} for i in range(40)]
    (raw / "nli.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hypotheses))
    names = [{"de": name, "en": english.territories[code]} for code, name in german.territories.items()]
    pairs = datasets.Dataset.from_list([{"names": pair, "code": "deu"} for pair in names])
    pairs.to_parquet(raw / "translations.parquet")
    return tmp_path / "out"


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "build.json").read_text(encoding="utf-8"))["sources"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def inodes(folder: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_ino for path in folder.glob("*.parquet")}


def test_manifest_and_files(write: Write, out: Path) -> None:
    kinds, nli, translations = load_manifest(build_from_file(write(KINDS, NLI, TRANSLATIONS), out))
    assert [(source.name, source.task_type, source.symmetric) for source in (kinds, nli, translations)] == [
        ("kinds", "clustering", True),
        ("nli", "retrieval", False),
        ("translations", "retrieval", True),
    ]
    assert (nli.cap, nli.licence, nli.languages, nli.instruction) == (10, "CC0-1.0", [], NLI["instruction"])
    assert (kinds.cap, kinds.licence, kinds.languages) == (None, None, ["deu"])
    rows = {}
    for source, negatives in ((kinds, 5), (nli, 24), (translations, 0)):
        (file,) = map(PublishedFile, source.files)
        assert len(file.negatives) == negatives
        rows[source.name] = sum(map(len, file.batches()))
        assert rows[source.name] == report(out)[source.name]["rows"]
    assert rows["nli"] == 20
    about = report(out)["translations"]
    assert rows["translations"] == 2 * (about["read"] - sum(about["dropped"].values()))
    assert list(about["dropped"]) == ["query and passage are identical"]
    names = ["build.json", "kinds.parquet", "manifest.yaml", "nli.parquet", "translations.parquet"]
    assert sorted(contents(out)) == names


def test_own_negatives_come_first_and_the_others_are_missing(write: Write, out: Path) -> None:
    build_from_file(write({**NLI, "num_negatives": 3}), out)
    assert pq.read_table(out / "nli.parquet").slice(0, 1).to_pylist() == [
        {
            "query": "premise 0",
            "passage": "hypothesis 0",
            "negative_1": "hypothesis 2",
            "negative_2": "hypothesis 1",
            "negative_3": None,
        }
    ]


@pytest.mark.parametrize(
    ("entry", "lang"),
    [
        (TRANSLATIONS, {"deu"}),
        ({**NLI, "languages": ["eng"]}, {"eng"}),
        ({**NLI, "languages": ["eng", "kor"]}, None),
        ({**NLI, "languages": ["eng"], "columns": {**NLI["columns"], "lang": "two"}}, 20),
    ],
)
def test_lang_is_that_of_the_row_or_the_only_one(write: Write, out: Path, entry: dict[str, Any], lang: Any) -> None:
    build_from_file(write(entry), out)
    table = pq.read_table(out / f"{entry['name']}.parquet")
    found = {*table["lang"].to_pylist()} if "lang" in table.column_names else None
    assert (len(found) if isinstance(lang, int) else found) == lang


def test_same_build_is_byte_identical_and_another_seed_is_not(write: Write, out: Path) -> None:
    first, again, other = (
        contents(build_from_file(write(KINDS, NLI, seed=seed), out / name).parent)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert again == first
    assert other["kinds.parquet"] != first["kinds.parquet"]
    assert other["nli.parquet"] == first["nli.parquet"]


@pytest.mark.parametrize(
    ("change", "rebuilt"),
    [
        ({}, set()),
        ({"instruction": "Another."}, set()),
        ({"num_negatives": 6}, {"kinds"}),
        ({"languages": ["eng"]}, {"kinds"}),
    ],
)
def test_only_what_changed_is_built_again(write: Write, out: Path, change: dict[str, Any], rebuilt: set[str]) -> None:
    build_from_file(write(KINDS, NLI), out)
    before = inodes(out)
    sources = load_manifest(build_from_file(write({**KINDS, **change}, NLI), out))
    assert {name for name, inode in inodes(out).items() if inode != before[name]} == rebuilt
    assert sources[0].instruction == {**KINDS, **change}["instruction"]


def test_a_failed_rebuild_changes_nothing(write: Write, out: Path) -> None:
    build_from_file(write(KINDS, NLI), out)
    before = inodes(out), contents(out)
    changed = {**KINDS, "columns": {"text": "kind", "label": "name"}}
    assert main([str(write({**NLI, "num_negatives": 3}, changed)), "--output", str(out)]) == 2
    assert inodes(out) == before[0]
    build_from_file(write(KINDS, NLI), out)
    assert (inodes(out), contents(out)) == before


def test_changed_or_damaged_files_are_built_again(write: Write, tmp_path: Path, out: Path) -> None:
    build_file = write(KINDS, NLI)
    build_from_file(build_file, out)
    raw = tmp_path / "raw/nli.jsonl"
    raw.write_text(raw.read_text().replace("hypothesis", "sentence"))
    os.utime(raw, (1, 1))
    (out / "kinds.parquet").write_bytes(b"PAR1")
    build_from_file(build_file, out)
    assert pq.read_table(out / "nli.parquet")["passage"][0].as_py() == "sentence 0"
    assert pq.read_metadata(out / "kinds.parquet").num_rows == report(out)["kinds"]["rows"]


def test_a_fault_in_one_source_leaves_those_before_it(write: Write, out: Path, refuses: Refuses) -> None:
    with refuses("source 'nli'", "nli.jsonl: line 1,", "'labels'"):
        build_from_file(write(KINDS, {**NLI, "labels": {"yes": "entailment"}}), out)
    assert [*report(out)] == ["kinds"]
    assert sorted(contents(out)) == ["build.json", "kinds.parquet"]
    before = inodes(out)
    build_from_file(write(KINDS, NLI), out)
    assert inodes(out)["kinds"] == before["kinds"]


def test_no_row_is_left(write: Write, out: Path, refuses: Refuses) -> None:
    labels = {0: "neutral", 1: "neutral", 2: "neutral", 7: "entailment"}
    with refuses("source 'nli'", "no row is left of 40", "10: premise entails no hypothesis", "'columns'"):
        build_from_file(write({**NLI, "labels": labels}), out)
    assert sorted(contents(out)) == ["build.json"]


def test_rows_that_are_not_text(write: Write, tmp_path: Path, out: Path, refuses: Refuses) -> None:
    lines = [{"question": "大熊猫", "title": "竹"}, {"question": 42, "title": "x"}]
    (tmp_path / "faq.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {**FAQ, "columns": {"query": "question", "passage": "title"}}
    with refuses("source 'faq'", "faq.jsonl: line 2", "'question'", "42"):
        build_from_file(write(source), out)
    build_from_file(write({**source, "on_bad_row": "quarantine"}), out)
    assert pq.read_table(out / "faq.parquet").to_pylist() == [{"query": "大熊猫", "passage": "竹"}]
    assert report(out)["faq"]["dropped"] == {"query is not text": 1}


@pytest.mark.parametrize("name", ["other.txt", "manifest.yaml"])
def test_a_folder_of_something_else_is_left_alone(write: Write, out: Path, refuses: Refuses, name: str) -> None:
    out.mkdir()
    (out / name).write_text("precious")
    with refuses(out, "another folder"):
        build_from_file(write(NLI), out)
    assert contents(out) == {name: b"precious"}


ODD = ["[]", "3", "{}", '{"sources": 3}', '{"sources": {"kinds": 3}}', '{"sources": {"kinds": {}}}', "[" * 100_000]
ODD += ['{"sources": {"kinds": {"fingerprint": "x"}}}', '{"sources": [["kinds", 1]]}']


@pytest.mark.parametrize("record", ODD, ids=lambda record: record[:40])
def test_an_odd_report_is_refused(write: Write, out: Path, refuses: Refuses, record: str) -> None:
    out.mkdir()
    (out / "build.json").write_text(record)
    with refuses(out, "something else than a build"):
        build_from_file(write(KINDS), out)
    assert (out / "build.json").read_text() == record


def test_an_output_that_is_a_file(write: Write, tmp_path: Path, out: Path, refuses: Refuses) -> None:
    with refuses("build.yaml", "is read"):
        build_from_file(write(NLI), tmp_path / "build.yaml")
    out.write_text("mine")
    with refuses(out, "give a folder"):
        build_from_file(write(NLI), out)


# The command


def test_exit_status_and_lines(
    write: Write, out: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = write(NLI, {**NLI, "name": "faulty", "data_files": "none.jsonl"})
    assert main([str(path), "--output", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: source 'faulty': cannot load")
    assert main([str(write(NLI)), "--output", str(out)]) == 0
    assert caplog.messages == ["nli: 20 rows of 40 read", "nli: kept, 20 rows"]
    assert main(["--survey", str(out / "manifest.yaml")]) == 0
    assert "1 files found, 20 rows, 10 under the caps" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([str(path)])


@pytest.mark.parametrize("content", [b"sources: \xff\n", b"\xff\xfes\x00"])
def test_a_build_file_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (tmp_path / "build.yaml").write_bytes(content)
    assert main([str(tmp_path / "build.yaml"), "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "build.yaml" in line and "utf-8" in line


@pytest.mark.slow
def test_command_line(write: Write, tmp_path: Path, out: Path) -> None:
    command = [sys.executable, str(ROOT / "training/build.py"), "build.yaml", "--output", "out"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    write(NLI, {**NLI, "name": "faulty", "data_files": "none.jsonl"})
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if line.startswith("error: build.yaml: source 'faulty'")]
    assert "nli: 20 rows of 40 read" in result.stderr
    assert (out / "nli.parquet").is_file()
