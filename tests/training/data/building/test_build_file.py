"""The build file and building from it: what it may say, one file per source, and what is kept, rebuilt or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from babel import Locale

from training.build import main
from training.data.building import build_file
from training.data.building.build_file import build_from_file, load_build_file
from training.data.manifest import load_manifest
from training.data.published import PublishedFile

ROOT = Path(__file__).resolve().parents[4]


def source(name, dataset, data_files, kind, columns, **keys):
    keys = {"format": kind, "columns": columns, "instruction": f"Find {name}.", **keys}
    return {"name": name, "dataset": dataset, "data_files": data_files, **keys}


FAQ = source("faq", "json", "faq.jsonl", "pairs", {"query": "question", "passage": ["title", "answer"]})
NAMES = {"text": "name", "label": "kind"}
KINDS = source("kinds", "csv", "raw/kinds.csv", "labelled", NAMES, languages=["deu"], num_negatives=5)
LABELS = {0: "entailment", 1: "neutral", 2: "contradiction"}
PREMISES = {"premise": "one", "hypothesis": "two", "label": "gold"}
NLI = source("nli", "json", ["raw/nli.jsonl"], "nli", PREMISES, labels=LABELS, licence="CC0-1.0", cap=10)
NESTED = {"query": "names.de", "passage": "names.en", "lang": "code"}
BOTH = {"both_directions": True, "symmetric": True, "languages": ["deu", "eng"]}
TRANSLATIONS = source("translations", "parquet", "raw/translations.parquet", "pairs", NESTED, **BOTH)


@pytest.fixture
def write(tmp_path):
    def write(*entries, **keys):
        path = tmp_path / "build.yaml"
        path.write_text(yaml.safe_dump({"sources": list(entries), **keys}))
        return path

    return write


def test_defaults_and_values_of_keys(write):
    loading = {"config": "main", "split": "test", "revision": "v1", "load_options": {"field": "data"}}
    described = {"languages": ["kor"], "licence": "CC0-1.0", "cap": 7, "symmetric": False}
    columns = {"query": "a", "passage": "b", "score": "c"}
    full = {**FAQ, **loading, **described, "name": "sts", "format": "sts", "columns": columns, "scale": [0, 1]}
    seed, (short, long) = load_build_file(write(FAQ, full))
    assert (seed, short.load_options) == (0, {"split": "train", "data_files": "faq.jsonl"})
    assert (short.options, short.lang) == ({"both_directions": False}, None)
    options = {"name": "main", "split": "test", "revision": "v1", "data_files": "faq.jsonl", "field": "data"}
    assert (long.load_options, long.columns, long.lang) == (options, columns, "kor")
    about = {"task_type": "retrieval", "instruction": "Find faq."}
    assert long.entry == {"name": "sts", "files": ["sts.parquet"], **about, **described}
    assert long.options == {"threshold": 4, "scale": [0, 1]}


WRONG = {
    "name": [5, "a/b", "..", ".hidden"],
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
def test_missing_and_wrong_values(write, refuses, key):
    for value in WRONG[key]:
        path = write({**FAQ, key: value})
        with refuses(path, "source", key, repr(value)):
            load_build_file(path)
    path = write({name: value for name, value in FAQ.items() if name != key})
    if key in ("name", "dataset", "format", "columns"):
        with refuses(path, "source 1" if key == "name" else "'faq'", repr(key), "missing"):
            load_build_file(path)
    else:
        load_build_file(path)


@pytest.mark.parametrize(
    ("sources", "keys", "parts"),
    [
        ([{**FAQ, "instructions": "x"}], {}, ("'faq'", "did you mean 'instruction'?")),
        ([{**FAQ, "labels": "x"}], {}, ("'faq'", "unknown key 'labels'")),
        ([{**FAQ, "format": "two_way", "columns": NAMES}], {}, ("'label_texts'", "missing")),
        ([{**FAQ, "columns": {"query": "a"}}], {}, ("'faq'", "columns", "'passage' is missing")),
        ([{**FAQ, "columns": {"quer": "a", "passage": "b"}}], {}, ("columns", "did you mean 'query'?")),
        ([{**FAQ, "columns": {"query": "a", "passage": []}}], {}, ("columns", "'passage' cannot be []")),
        ([{**FAQ, "columns": {"query": "a", "passage": "b", "lang": ["c"]}}], {}, ("columns", "'lang' cannot be")),
        ([], {}, ("'sources'", "at least one")),
        (["faq"], {}, ("source 1", "str")),
        ([FAQ, FAQ], {}, ("'faq'", "rename")),
        ([FAQ], {"seed": -1}, ("'seed'", "-1")),
        ([FAQ], {"seeds": 1}, ("mean 'seed'?",)),
    ],
)
def test_faults(write, refuses, sources, keys, parts):
    path = write(*sources, **keys)
    with refuses(path, *parts):
        load_build_file(path)


@pytest.fixture
def out(tmp_path, monkeypatch):
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


def report(folder):
    return json.loads((folder / "build.json").read_text(encoding="utf-8"))["sources"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def inodes(folder):
    return {path.stem: path.stat().st_ino for path in folder.glob("*.parquet")}


def test_manifest_and_files(write, out):
    kinds, nli, translations = load_manifest(build_from_file(write(KINDS, NLI, TRANSLATIONS), out))
    assert [source.name for source in (kinds, nli, translations)] == ["kinds", "nli", "translations"]
    assert [source.task_type for source in (kinds, nli, translations)] == ["clustering", "retrieval", "retrieval"]
    assert [source.symmetric for source in (kinds, nli, translations)] == [True, False, True]
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
    # Own negatives come first, and the others are missing.
    row = list(pq.read_table(out / "nli.parquet").slice(0, 1).to_pylist()[0].values())
    assert row == ["premise 0", "hypothesis 0", "hypothesis 2", "hypothesis 1", *[None] * 22]
    names = ["build.json", "kinds.parquet", "manifest.yaml", "nli.parquet", "translations.parquet"]
    assert sorted(contents(out)) == names


@pytest.mark.parametrize(
    ("entry", "lang"),
    [
        (TRANSLATIONS, {"deu"}),
        ({**NLI, "languages": ["eng"]}, {"eng"}),
        ({**NLI, "languages": ["eng", "kor"]}, None),
        ({**NLI, "languages": ["eng"], "columns": {**NLI["columns"], "lang": "two"}}, 20),
    ],
)
def test_lang_is_that_of_the_row_or_the_only_one(write, out, entry, lang):
    build_from_file(write(entry), out)
    table = pq.read_table(out / f"{entry['name']}.parquet")
    found = {*table["lang"].to_pylist()} if "lang" in table.column_names else None
    assert (len(found) if isinstance(lang, int) else found) == lang


def test_only_what_changed_is_built_again(write, tmp_path, out):
    def build(first=KINDS, **keys):
        build_from_file(write(first, NLI, **keys), out)
        return contents(out), inodes(out)

    first, before = build()
    for change, rebuilt in (({"instruction": "Another."}, set()), ({"languages": ["eng"]}, {"kinds"})):
        written, after = build({**KINDS, **change})
        assert {name for name, inode in after.items() if inode != before[name]} == rebuilt
        assert written["manifest.yaml"] != first["manifest.yaml"]
        before = after
    # The same build has the same bytes; another seed changes what is drawn.
    assert build()[0] == first
    other, _ = build(seed=1)
    assert other["kinds.parquet"] != first["kinds.parquet"]
    assert other["nli.parquet"] == first["nli.parquet"]
    # So are changed and damaged files.
    raw = tmp_path / "raw/nli.jsonl"
    raw.write_text(raw.read_text().replace("hypothesis", "sentence"))
    os.utime(raw, (1, 1))
    (out / "kinds.parquet").write_bytes(b"PAR1")
    last, _ = build()
    assert last["kinds.parquet"] == first["kinds.parquet"]
    assert pq.read_table(out / "nli.parquet")["passage"][0].as_py() == "sentence 0"


def test_a_failed_rebuild_leaves_the_old_build_whole(write, out, refuses, monkeypatch):
    build_from_file(write(KINDS, NLI), out)
    before = contents(out)
    changed = {**KINDS, "columns": {"text": "kind", "label": "name"}}
    with refuses("source 'kinds'", "no row is left"):
        build_from_file(write({**NLI, "num_negatives": 3}, changed), out)
    assert contents(out) == before

    def killed(self, target):
        raise KeyboardInterrupt

    # Killed while files are replaced, there is no manifest.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_file, "write_manifest", killed)
        build_from_file(write(NLI, {**KINDS, "num_negatives": 3}), out)
    assert not (out / "manifest.yaml").exists() and len(pq.read_schema(out / "kinds.parquet").names) == 6
    build_from_file(write(KINDS, NLI), out)
    assert contents(out) == before


def test_a_fault_in_one_source_leaves_those_before_it(write, out, refuses):
    with refuses("source 'nli'", "nli.jsonl: line 1,", "'labels'"):
        build_from_file(write(KINDS, {**NLI, "labels": {"yes": "entailment"}}), out)
    labels = {0: "neutral", 1: "neutral", 2: "neutral", 7: "entailment"}
    with refuses("source 'nli'", "no row is left of 40", "10: premise entails no hypothesis", "'columns'"):
        build_from_file(write(KINDS, {**NLI, "labels": labels}), out)
    assert [*report(out)] == ["kinds"]
    assert sorted(contents(out)) == ["build.json", "kinds.parquet"]
    before = inodes(out)
    build_from_file(write(KINDS, NLI), out)
    assert inodes(out)["kinds"] == before["kinds"]


def test_rows_that_are_not_text(write, tmp_path, out, refuses):
    lines = [{"question": "大熊猫", "title": "竹"}, {"question": 42, "title": "x"}]
    (tmp_path / "faq.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {**FAQ, "columns": {"query": "question", "passage": "title"}}
    with refuses("source 'faq'", "faq.jsonl: line 2", "'question'", "42"):
        build_from_file(write(source), out)
    build_from_file(write({**source, "on_bad_row": "quarantine"}), out)
    assert pq.read_table(out / "faq.parquet").to_pylist() == [{"query": "大熊猫", "passage": "竹"}]
    assert report(out)["faq"]["dropped"] == {"query is not text": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [("other.txt", "precious"), ("manifest.yaml", "precious"), ("build.json", "[]"), ("build.json", '{"options": {}}')],
)
def test_a_folder_of_something_else_is_left_alone(write, out, refuses, name, content):
    out.mkdir()
    (out / name).write_text(content)
    with refuses(out, "another folder"):
        build_from_file(write(NLI), out)
    assert contents(out) == {name: content.encode()}
    with refuses("build.yaml", "is read"):
        build_from_file(write(NLI), out.parent / "build.yaml")
    with refuses(name, "is a file"):
        build_from_file(write(NLI), out / name)


def test_the_command(write, out, capsys, caplog):
    caplog.set_level("INFO")
    path = write(NLI, {**NLI, "name": "faulty", "data_files": "none.jsonl"})
    assert main([str(path), "--output", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: source 'faulty': cannot load")
    assert main([str(write(NLI)), "--output", str(out)]) == 0
    assert caplog.messages == ["nli: 20 rows of 40 read", "nli: kept, 20 rows"]
