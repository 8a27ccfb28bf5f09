"""Building from raw data: a file a source, a manifest that loads, and what is kept, rebuilt or refused."""

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

from training.data.build import build_from_file, main
from training.data.manifest import load_manifest
from training.data.published import PublishedFile

Refuses = Callable[..., AbstractContextManager[None]]
ROOT = Path(__file__).resolve().parents[3]

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


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a build file of entries beside a few sets of raw data."""
    german, english = Locale("de"), Locale("en")
    raw = tmp_path / "raw"
    raw.mkdir()
    kinds = [(name, kind) for kind in ("languages", "scripts") for name in getattr(german, kind).values()]
    datasets.Dataset.from_list([{"name": name, "kind": kind} for name, kind in kinds]).to_csv(raw / "kinds.csv")
    hypotheses = [{"one": f"premise {i // 4}", "two": f"hypothesis {i}", "gold": i % 4 % 3} for i in range(40)]
    (raw / "nli.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hypotheses))
    names = [{"de": name, "en": english.territories[code]} for code, name in german.territories.items()]
    datasets.Dataset.from_list([{"names": pair, "code": "deu"} for pair in names]).to_parquet(
        raw / "translations.parquet"
    )

    def write(*entries: Any, **keys: Any) -> Path:
        path = tmp_path / "build.yaml"
        path.write_text(yaml.safe_dump({"sources": list(entries), **keys}))
        return path

    return write


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "build.json").read_text(encoding="utf-8"))["sources"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_manifest_and_files(write: Callable[..., Path], tmp_path: Path) -> None:
    manifest = build_from_file(write(KINDS, NLI, TRANSLATIONS), tmp_path / "out")
    kinds, nli, translations = load_manifest(manifest)
    assert [(source.name, source.task_type, source.symmetric) for source in (kinds, nli, translations)] == [
        ("kinds", "clustering", True),
        ("nli", "retrieval", False),
        ("translations", "retrieval", True),
    ]
    assert (nli.cap, nli.licence, nli.languages, nli.instruction) == (10, "CC0-1.0", [], NLI["instruction"])
    assert (kinds.cap, kinds.licence, kinds.languages) == (None, None, ["deu"])
    rows = {}
    for source, negatives in ((kinds, 5), (nli, 24), (translations, 0)):
        (file,) = source.files
        assert len(PublishedFile(file).negatives) == negatives
        rows[source.name] = sum(len(batch) for batch in PublishedFile(file).batches())
        assert rows[source.name] == report(tmp_path / "out")[source.name]["rows"]
    assert rows["nli"] == 20
    told = report(tmp_path / "out")["translations"]
    assert rows["translations"] == 2 * (told["read"] - sum(told["dropped"].values()))
    assert list(told["dropped"]) == ["query and passage are identical"]
    assert sorted(contents(tmp_path / "out")) == [
        "build.json",
        "kinds.parquet",
        "manifest.yaml",
        "nli.parquet",
        "translations.parquet",
    ]


def test_own_negatives_come_first_and_the_rest_is_missing(write: Callable[..., Path], tmp_path: Path) -> None:
    build_from_file(write({**NLI, "num_negatives": 3}), tmp_path / "out")
    table = pq.read_table(tmp_path / "out/nli.parquet")
    assert table.column_names == ["query", "passage", "negative_1", "negative_2", "negative_3"]
    assert list(table.slice(0, 1).to_pylist()[0].values()) == [
        "premise 0",
        "hypothesis 0",
        "hypothesis 2",
        "hypothesis 1",
        None,
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
def test_lang_is_that_of_the_row_or_the_only_one(
    write: Callable[..., Path], tmp_path: Path, entry: dict[str, Any], lang: Any
) -> None:
    build_from_file(write({**entry}), tmp_path / "out")
    table = pq.read_table(tmp_path / f"out/{entry['name']}.parquet")
    found = {*table["lang"].to_pylist()} if "lang" in table.column_names else None
    assert (len(found) if isinstance(lang, int) else found) == lang


def test_same_build_is_byte_identical_and_another_seed_is_not(write: Callable[..., Path], tmp_path: Path) -> None:
    build_from_file(write(KINDS, NLI, seed=1), tmp_path / "a")
    build_from_file(write(KINDS, NLI, seed=1), tmp_path / "b")
    build_from_file(write(KINDS, NLI, seed=2), tmp_path / "c")
    first, other = contents(tmp_path / "a"), contents(tmp_path / "c")
    assert contents(tmp_path / "b") == first
    assert other["kinds.parquet"] != first["kinds.parquet"]
    assert other["nli.parquet"] == first["nli.parquet"]


def inodes(folder: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_ino for path in folder.glob("*.parquet")}


@pytest.mark.parametrize(
    ("change", "rebuilt"),
    [
        ({}, set()),
        ({"instruction": "Another."}, set()),
        ({"num_negatives": 6}, {"kinds"}),
        ({"languages": ["eng"]}, {"kinds"}),
        ({"columns": {"text": "kind", "label": "name"}}, None),
    ],
)
def test_only_what_changed_is_built_again(
    write: Callable[..., Path], tmp_path: Path, change: dict[str, Any], rebuilt: set[str] | None
) -> None:
    out = tmp_path / "out"
    build_from_file(write(KINDS, NLI), out)
    before, told = inodes(out), report(out)
    if rebuilt is None:
        # What was built stays, whole.
        manifest = (out / "manifest.yaml").read_bytes()
        assert main([str(write({**KINDS, **change}, NLI)), "--output", str(out)]) == 2
        assert inodes(out) == before
        assert report(out) == told
        assert (out / "manifest.yaml").read_bytes() == manifest
        build_from_file(write(KINDS, NLI), out)
        assert inodes(out) == before
    else:
        sources = load_manifest(build_from_file(write({**KINDS, **change}, NLI), out))
        assert {name for name, inode in inodes(out).items() if inode != before[name]} == rebuilt
        assert sources[0].instruction == {**KINDS, **change}["instruction"]


def test_changed_or_damaged_files_are_built_again(write: Callable[..., Path], tmp_path: Path) -> None:
    out, build_file = tmp_path / "out", write(KINDS, NLI)
    build_from_file(build_file, out)
    raw = tmp_path / "raw/nli.jsonl"
    raw.write_text(raw.read_text().replace("hypothesis", "sentence"))
    os.utime(raw, (1, 1))
    (out / "kinds.parquet").write_bytes(b"PAR1")
    build_from_file(build_file, out)
    assert pq.read_table(out / "nli.parquet")["passage"][0].as_py() == "sentence 0"
    assert pq.read_metadata(out / "kinds.parquet").num_rows == report(out)["kinds"]["rows"]


def test_fault_in_one_source_leaves_those_before_it(
    write: Callable[..., Path], tmp_path: Path, refuses: Refuses
) -> None:
    out = tmp_path / "out"
    with refuses("source 'nli'", "nli.jsonl: line 1,", "'labels'"):
        build_from_file(write(KINDS, {**NLI, "labels": {"yes": "entailment"}}), out)
    assert [*report(out)] == ["kinds"]
    assert sorted(contents(out)) == ["build.json", "kinds.parquet"]
    before = inodes(out)
    build_from_file(write(KINDS, NLI), out)
    assert inodes(out)["kinds"] == before["kinds"]


def test_no_row_is_left(write: Callable[..., Path], tmp_path: Path, refuses: Refuses) -> None:
    with refuses("source 'nli'", "no row is left of 40", "10: premise entails no hypothesis", "'columns'"):
        build_from_file(
            write({**NLI, "labels": {0: "neutral", 1: "neutral", 2: "neutral", 7: "entailment"}}), tmp_path / "out"
        )
    assert sorted(contents(tmp_path / "out")) == ["build.json"]


def test_column_that_is_not_there(write: Callable[..., Path], tmp_path: Path, refuses: Refuses) -> None:
    columns = {**NLI["columns"], "premise": "premise"}
    with refuses(tmp_path / "build.yaml", "source 'nli'", "'premise'", "one, two, gold"):
        build_from_file(write({**NLI, "columns": columns}), tmp_path / "out")


@pytest.mark.parametrize("name", ["other.txt", "manifest.yaml"])
def test_folder_of_something_else_is_left_alone(
    write: Callable[..., Path], tmp_path: Path, refuses: Refuses, name: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("precious")
    with refuses(tmp_path / "out", "another folder"):
        build_from_file(write(NLI), tmp_path / "out")
    assert contents(tmp_path / "out") == {name: b"precious"}


def test_output_that_is_a_file(write: Callable[..., Path], tmp_path: Path, refuses: Refuses) -> None:
    with refuses("build.yaml", "is read"):
        build_from_file(write(NLI), tmp_path / "build.yaml")
    (tmp_path / "thesis.txt").write_text("mine")
    with refuses("thesis.txt", "give a folder"):
        build_from_file(write(NLI), tmp_path / "thesis.txt")


def test_exit_status_and_lines(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path, out = write(NLI, {**NLI, "name": "faulty", "data_files": "none.jsonl"}), tmp_path / "out"
    assert main([str(path), "--output", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: source 'faulty': cannot load")
    assert main([str(write(NLI)), "--output", str(out)]) == 0
    assert caplog.messages == ["nli: 20 rows of 40 read", "nli: kept, 20 rows"]


@pytest.mark.slow
def test_command_line(write: Callable[..., Path], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "training/data/build.py"), "build.yaml", "--output", "out"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    write(NLI, {**NLI, "name": "faulty", "data_files": "none.jsonl"})
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if line.startswith("error: build.yaml: source 'faulty'")]
    assert "nli: 20 rows of 40 read" in result.stderr
    assert (tmp_path / "out/nli.parquet").is_file()


ODD = ["[]", "3", "{}", '{"sources": 3}', '{"sources": {"kinds": 3}}', '{"sources": {"kinds": {}}}', "[" * 100_000]
ODD += ['{"sources": {"kinds": {"fingerprint": "x"}}}', '{"sources": [["kinds", 1]]}']


@pytest.mark.parametrize("record", ODD, ids=lambda record: record[:40])
def test_an_odd_report_is_refused(write: Callable[..., Path], tmp_path: Path, refuses: Refuses, record: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "build.json").write_text(record)
    with refuses(out, "something else than a build"):
        build_from_file(write(KINDS), out)
    assert (out / "build.json").read_text() == record


def test_rows_that_are_not_text(write: Callable[..., Path], tmp_path: Path, refuses: Refuses) -> None:
    """One number in a column is one bad row: the other texts are what they were."""
    lines = [{"query": "大熊猫", "pos": "竹"}, {"query": 42, "pos": ["x"]}]
    (tmp_path / "raw" / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {
        "name": "pairs",
        "dataset": "json",
        "data_files": "raw/pairs.jsonl",
        "format": "pairs",
        "columns": {"query": "query", "passage": "pos"},
        "instruction": "Find.",
    }
    with refuses("source 'pairs'", "pairs.jsonl: line 2", "'query'", "42"):
        build_from_file(write(source), tmp_path / "out")
    build_from_file(write({**source, "on_bad_row": "quarantine"}), tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist() == [{"query": "大熊猫", "passage": "竹"}]
    assert report(tmp_path / "out")["pairs"]["dropped"] == {"query is not text": 1}
    with refuses("'on_bad_row'", "error, quarantine"):
        build_from_file(write({**source, "on_bad_row": "drop"}), tmp_path / "out")


@pytest.mark.parametrize("content", [b"sources: \xff\n", b"\xff\xfes\x00"])
def test_a_build_file_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (tmp_path / "build.yaml").write_bytes(content)
    assert main([str(tmp_path / "build.yaml"), "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "build.yaml" in line and "utf-8" in line
