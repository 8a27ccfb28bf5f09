"""Manifests: what they may say, which files they find, what they refuse, and how they are written."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import fsspec
import pytest
import yaml

from training.data.manifest import Source, load_manifest, read_manifest, select_sources, write_manifest

ENTRY = {"name": "faq", "files": "a.parquet", "task_type": "retrieval", "instruction": "Find the answer."}


@pytest.fixture
def write(tmp_path):
    """Writes a manifest of entries beside a few (empty) data files."""
    for name in ("a.parquet", "b_10.parquet", "b_2.parquet", "deep/c.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def write(*entries, **top):
        path = tmp_path / "manifest.yaml"
        path.write_text(yaml.safe_dump({**top, "sources": list(entries)}))
        return path

    return write


def test_all_keys_arrive(write, tmp_path):
    given = {"symmetric": True, "languages": ["kor", "eng"], "cap": 80_000, "licence": "CC-BY-4.0", "category": "QA"}
    given |= {"task_type": "clustering", "stages": ["one"], "instruction_from": "v1", "weight": 2.5}
    path = write({**ENTRY, **given, "published_rows": 5, "published_files": 1})
    (source,) = load_manifest(path)
    assert asdict(source) == {**ENTRY, **given, "files": [tmp_path / "a.parquet"]}
    (entry,) = read_manifest(path).entries
    assert (entry.published_rows, entry.published_files) == (5, 1)
    nulls = dict.fromkeys(
        ("cap", "licence", "category", "published_rows", "published_files", "instruction_from", "instruction")
    )
    (source,) = load_manifest(str(write({**ENTRY, **nulls}, root=None, stage_caps=None)))
    assert (source.symmetric, source.languages, source.cap, source.licence, source.weight) == (False, [], None, None, 1)


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("name", 5, ["5"]),
        ("files", [1], ["[1]"]),
        ("languages", [False], ["[False]"]),  # YAML reads the language code `no` as false
        ("cap", "80k", ["'80k'"]),
        ("cap", True, ["True"]),
        ("published_rows", 0, ["at least 1"]),
        *(("weight", weight, [repr(weight), "more than 0"]) for weight in (0, -1.5, math.inf, math.nan)),
        *(("weight", weight, [repr(weight), "manifest format"]) for weight in ("2", True, [1])),
        *(("name", name, [repr(name), "folder"]) for name in ("a/b", "..")),
        ("task_type", "reranking", ["'reranking'", "retrieval, clustering, classification"]),
        *((key, None, ["missing"]) for key in ("name", "files", "task_type")),
        ("instruction", "", ["leave it out"]),
        ("task-type", "x", ["did you mean 'task_type'?"]),
        ("zzz", "x", ["known keys are cap, "]),
    ],
)
def test_wrong_key_or_value(write, refuses, key, value, parts):
    path = write({**ENTRY, key: value})
    with refuses(path, "source", key, *parts):
        load_manifest(path)


def test_faulty_entries_and_files(write, refuses, tmp_path):
    with refuses("manifest.yaml", "source 2", "b.parquet"):
        load_manifest(write(ENTRY, "b.parquet"))
    with refuses("manifest.yaml", "'faq'", "rename"):
        load_manifest(write(ENTRY, {**ENTRY, "files": "b_2.parquet"}))
    path = tmp_path / "faulty.yaml"
    with refuses(path, "no such file"):
        load_manifest(path)
    faults = {"sources: [\n": "not valid YAML", "source: []\n": "'source'; did you mean 'sources'?"}
    for content, part in {**faults, "sources: []": "missing", "sources: {a: b}": "'sources'"}.items():
        path.write_text(content)
        with refuses(path, part):
            load_manifest(path)
    faults = [("root", 5, "5"), ("stage_rows", {"two": 5}, "two"), ("published_language_rows", {"eng": "many"}, "many")]
    for key, value, named in [*faults, ("stage_caps", {"stageX": 5}, "stageX"), ("stage_caps", {"one": 0}, "one")]:
        path = write({**ENTRY, "stages": ["one"]}, **{key: value})
        with refuses(path, repr(key), named):
            read_manifest(path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("a.parquet", ["a.parquet"]),
        ("b_*.parquet", ["b_10.parquet", "b_2.parquet"]),
        ("**/*.parquet", ["a.parquet", "b_10.parquet", "b_2.parquet", "deep/c.parquet"]),
        (["deep/c.parquet", "a.parquet"], ["deep/c.parquet", "a.parquet"]),
        # A file that two patterns match is read once; folders are left out.
        (["*.parquet", "a.parquet"], ["a.parquet", "b_10.parquet", "b_2.parquet"]),
        (["b_2.parquet", "*"], ["b_2.parquet", "a.parquet", "b_10.parquet", "manifest.yaml"]),
        ("{}/d*/c.parquet", ["deep/c.parquet"]),
    ],
)
def test_files_are_found_in_reading_order(write, tmp_path, files, expected):
    files = files.format(tmp_path) if isinstance(files, str) else files
    (source,) = load_manifest(write({**ENTRY, "files": files}))
    assert [file.relative_to(tmp_path).as_posix() for file in source.files] == expected


def test_missing_file(write, refuses):
    for files in ("none_*.parquet", "none.parquet", "deep"):
        path = write({**ENTRY, "files": ["a.parquet", files]})
        with refuses(path, "'faq'", path.parent / files, "'files'"):
            load_manifest(path)


def collection(tmp_path, *names, root="data [v2]", **keys):
    """A manifest of one collection of the files named, in a folder whose name is no pattern."""
    for name in names:
        (tmp_path / "data [v2]").mkdir(exist_ok=True)
        (tmp_path / "data [v2]" / name).touch()
    path = tmp_path / "manifest.yaml"
    entry = {**ENTRY, "files": "*.parquet", "each_file": True, **keys}
    path.write_text(yaml.safe_dump({"root": root, "sources": [entry]}))
    return path


def test_each_file_of_a_collection_is_a_source_in_any_folder(tmp_path, refuses):
    path = collection(tmp_path, "faq_kor.parquet", "faq_de-en.parquet", "faq_part2.parquet", cap=7, symmetric=True)
    sources = load_manifest(path)
    languages = {source.name: source.languages for source in sources}
    assert languages == {"faq_de-en": ["deu", "eng"], "faq_kor": ["kor"], "faq_part2": []}
    for source in sources:
        assert source.files == [tmp_path / "data [v2]" / f"{source.name}.parquet"]
        assert (source.cap, source.symmetric, source.instruction) == (7, True, ENTRY["instruction"])
    content = yaml.safe_load(path.read_text())
    content["sources"].append({**content["sources"][0], "name": "other"})
    path.write_text(yaml.safe_dump(content))
    with refuses(path, "'faq_de-en'", "'other'", "narrow its 'files'"):
        load_manifest(path)
    path = collection(tmp_path, "faq_kor.parquet")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "faq_deu.parquet").touch()
    assert [source.name for source in load_manifest(path, tmp_path / "elsewhere")] == ["faq_deu"]
    fsspec.filesystem("memory").pipe("/manifest/faq_kor.parquet", b"PAR1")
    (source,) = load_manifest(collection(tmp_path, root="memory://manifest"))
    assert (source.name, str(source.files[0])) == ("faq_kor", "memory://manifest/faq_kor.parquet")


def test_file_whose_name_has_no_language_gets_those_of_the_collection(tmp_path):
    path = collection(tmp_path, "faq_kor.parquet", "faq_x.parquet", "faq_fra.parquet", languages=["kor", "deu"])
    languages = {source.name: source.languages for source in load_manifest(path)}
    assert languages == {"faq_kor": ["kor"], "faq_x": ["kor", "deu"], "faq_fra": ["kor", "deu"]}
    path = collection(tmp_path, languages=["kor", "deu"], name_tells_language=False)
    assert [source.languages for source in load_manifest(path)] == [["kor", "deu"]] * 3


def test_stage_takes_its_sources_under_its_cap(write, refuses):
    both, missing = {"stages": ["one", "two"], "cap": 5}, {"files": "missing.parquet", "stages": ["three"]}
    named = {"a": both, "b": {"stages": ["two"]}, "c": {}, "d": missing}
    path = write(*({**ENTRY, "name": name, **keys} for name, keys in named.items()), stage_caps={"two": 3})
    assert [(source.name, source.cap) for source in load_manifest(path, stage="one")] == [("a", 5), ("c", None)]
    assert [(source.name, source.cap) for source in load_manifest(path, stage="two")] == [("a", 3), ("b", 3), ("c", 3)]
    with refuses(path, "'d'", "missing.parquet"):
        load_manifest(path)
    with refuses(path, "'four'", "one, three, two"):
        load_manifest(path, stage="four")


TYPES = {"web_kor": "retrieval", "web_deu": "retrieval", "sts": "clustering", "polarity": "classification"}
SOURCES = [Source(name, [], task_type, "Find.") for name, task_type in TYPES.items()]


@pytest.mark.parametrize(
    ("patterns", "task_types", "expected"),
    [
        (None, None, ["web_kor", "web_deu", "sts", "polarity"]),
        (["sts", "web_kor"], None, ["web_kor", "sts"]),  # the manifest's order
        (["*", "sts"], None, ["web_kor", "web_deu", "sts", "polarity"]),
        (None, ["classification", "clustering"], ["sts", "polarity"]),
        (["w*", "s*"], ["clustering"], ["sts"]),
    ],
)
def test_select_sources(patterns, task_types, expected):
    assert [source.name for source in select_sources(SOURCES, patterns, task_types)] == expected


def test_selection_that_is_refused(refuses):
    with refuses("no source fits 'webb_*'", "web_kor, web_deu, sts, polarity"):
        select_sources(SOURCES, ["sts", "webb_*"])
    with refuses("unknown task type 'sts'", "retrieval, clustering, classification"):
        select_sources(SOURCES, None, ["retrieval", "sts"])
    with refuses("no source is left of 4", "task types"):
        select_sources(SOURCES, ["web_*"], ["clustering"])


def test_a_written_manifest_is_read_again(tmp_path):
    (tmp_path / "wh[a]t*.parquet").touch()
    source = Source("q", [tmp_path / "wh[a]t*.parquet"], "retrieval", "Où?", True, ["fra"], None, "MIT", None, ["one"])
    entry = {**asdict(source), "files": ["wh[a]t*.parquet"]}
    write_manifest(tmp_path / "manifest.yaml", [entry], stage_caps={"one": 5, "gone": 6}, stage_rows={})
    text = (tmp_path / "manifest.yaml").read_text(encoding="utf-8")
    assert "Où?" in text and "cap: " not in text and "stage_rows" not in text and "weight" not in text
    assert load_manifest(tmp_path / "manifest.yaml") == [source]
    assert read_manifest(tmp_path / "manifest.yaml").stage_caps == {"one": 5}
    write_manifest(tmp_path / "manifest.yaml", [{**entry, "weight": 0.5}])
    assert load_manifest(tmp_path / "manifest.yaml") == [replace(source, weight=0.5)]
