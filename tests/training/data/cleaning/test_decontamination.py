"""The command: what it reports, what it removes, and that neither depends on where it runs."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import yaml

from modeling_f2llm import instruct
from tests.training.data.cleaning.planted import HERE, clean_rows, write_manifest
from training.common.executor import Executor
from training.data.cleaning.decontamination import COUNTS, decontaminate
from training.data.cleaning.duplicates import DeduplicationOptions
from training.data.cleaning.evaluation_texts import evaluation_file
from training.data.manifest import load_manifest
from training.decontaminate import main

ALL, NOTHING = DeduplicationOptions(exact=True, near=True, across=True), DeduplicationOptions(exact=False)
# Rows of the second file of `a`, the second source `b` and the third, `c`, that are not there in the clean sets.
EXACT, NEAR, ACROSS, WHOLE, OVERLAP = 10, 11, 12, 13, 14


@pytest.fixture
def manifest(tmp_path):
    """``a`` has two files, the second with a repeat of either kind; ``b`` repeats ``a`` and has two leaks."""
    one, two, three = clean_rows(0), clean_rows(1)[:-2], clean_rows(2)[:-2]
    long = one[14]
    two[EXACT] = [one[5][0].upper(), one[5][1] + "!"]
    two[NEAR] = [long[0], long[1] + " changed"]
    # An instruction that came along hides nothing.
    three[ACROSS] = [instruct("Find.", one[6][0]), one[6][1]]
    three[WHOLE][0] = instruct("Find.", "Who was first?")
    three[OVERLAP][1] = "so a b c d e f g h i j k l m n it is"
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "held_out.jsonl").write_text('{"text": "who was first"}\n{"text": "A b c d e f g h i j k l m n"}\n')
    sources = {"a": [one, two], "b": [three], "c": [clean_rows(3)[:-2]]}
    return write_manifest(folder, sources, cap=50, symmetric=True, weight=0.5)


def held_out(manifest):
    return [evaluation_file(f"{manifest.parent}/held_out.jsonl:text")]


def run(manifest, output, executor=HERE, remove=False):
    return decontaminate(manifest, output, ALL, held_out(manifest), remove=remove, executor=executor)


def written(output):
    files = (path.relative_to(output) for path in output.rglob("*") if path.is_file())
    return {str(path): (output / path).read_bytes() for path in files if path.parts[0] != ".work"}


def test_the_report_counts_what_was_planted(manifest, tmp_path):
    report = run(manifest, tmp_path / "clean")
    assert report == json.loads((tmp_path / "clean/contamination.json").read_text())
    assert report["evaluation_sets"] == {"held_out.jsonl": 2}
    a, b, c = report["sources"]
    assert [a[count] for count in COUNTS] == [162, 1, 1, 0, 0, 0, None]
    repeat = {"file": "a: a_1.parquet", "row": EXACT, "first_file": "a: a_0.parquet", "first_row": 5, "inside": True}
    assert a["examples"]["exact_duplicates"] == [repeat]
    assert [b[count] for count in COUNTS] == [b["rows"], 0, 0, 1, 1, 1, None]
    assert b["by_evaluation_set"] == {"held_out.jsonl": 2}
    leaks = [(leak["row"], leak["column"], leak["whole"]) for leak in b["examples"]["evaluation_texts"]]
    assert leaks == [(WHOLE, "query", True), (OVERLAP, "passage", False)]
    assert [c[count] for count in COUNTS] == [c["rows"], 0, 0, 0, 0, 0, None] and c["by_evaluation_set"] == {}
    assert {path.name for path in (tmp_path / "clean").iterdir()} == {".work", "contamination.json", "contamination.md"}
    lines = (tmp_path / "clean/contamination.md").read_text().splitlines()
    assert lines[2] == "| a | 162 | 1 | 1 | 0 | 0 | 0 | – |"
    assert lines[5] == f"| **all** | {a['rows'] + b['rows'] + c['rows']} | 1 | 1 | 1 | 1 | 1 | – |"


def test_removal_keeps_everything_else_and_is_done_once(manifest, tmp_path):
    output = tmp_path / "clean"
    run(manifest, output)
    report = run(manifest, output, remove=True)
    assert [source["removed"] for source in report["sources"]] == [2, 3, 0]
    left_out = {"a/00000": [], "a/00001": [EXACT, NEAR], "b/00000": [ACROSS, WHOLE, OVERLAP], "c/00000": []}
    for name, rows in left_out.items():
        original = manifest.parent / f"{name[0]}_{int(name[2:])}.parquet"
        before, after = pq.read_table(original), pq.read_table(output / f"{name}.parquet")
        kept = [row for row in range(len(before)) if row not in rows]
        assert after.equals(before.take(kept), check_metadata=True)
    for source, cleaned in zip(load_manifest(manifest), load_manifest(output / "manifest.yaml"), strict=True):
        assert replace(source, files=len(source.files)) == replace(cleaned, files=len(cleaned.files))
    # What was cleaned is clean.
    cleaned = decontaminate(output / "manifest.yaml", tmp_path / "again", ALL, held_out(manifest), executor=HERE)
    for source in cleaned["sources"]:
        assert [source[count] for count in COUNTS] == [source["rows"], 0, 0, 0, 0, 0, None]
    before, times = written(output), {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    run(manifest, output, remove=True)
    assert written(output) == before
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")} == times
    # A file that somebody deleted comes back.
    (output / "b/00000.parquet").unlink()
    run(manifest, output, remove=True)
    assert written(output) == before


@pytest.mark.slow
@pytest.mark.parametrize("executor", [Executor(workers=2), Executor("ray", workers=2)])
def test_where_it_runs_makes_no_difference(manifest, tmp_path, executor):
    run(manifest, tmp_path / "here", remove=True)
    run(manifest, tmp_path / "there", executor, remove=True)
    assert written(tmp_path / "there") == written(tmp_path / "here")


def test_files_that_lose_all_rows_are_left_out_unless_all_do(tmp_path, refuses):
    (tmp_path / "in").mkdir()
    rows = clean_rows(0)
    manifest = write_manifest(tmp_path / "in", {"a": [rows, rows[:3]], "b": [rows]}, stages=["one"])
    manifest.write_text("stage_caps: {one: 7}\n" + manifest.read_text())
    decontaminate(manifest, tmp_path / "clean", DeduplicationOptions(across=True), remove=True, executor=HERE)
    content = yaml.safe_load((tmp_path / "clean/manifest.yaml").read_text())
    (source,) = content["sources"]
    assert (source["name"], source["files"], content["stage_caps"]) == ("a", ["a/00000.parquet"], {"one": 7})
    names = ("a/00000.parquet", "manifest.yaml")
    before = [(tmp_path / "clean" / name).read_bytes() for name in names]
    (tmp_path / "all.txt").write_text("\n".join(query for query, *_ in rows))
    with refuses("no row of any source is left"):
        evaluation = [evaluation_file(str(tmp_path / "all.txt"))]
        decontaminate(manifest, tmp_path / "clean", NOTHING, evaluation, remove=True, executor=HERE)
    assert [(tmp_path / "clean" / name).read_bytes() for name in names] == before


def test_the_command_line_and_faulty_input(manifest, tmp_path, capsys, refuses):
    words = ["--manifest", str(manifest), "--output", str(tmp_path / "clean"), "--exact"]
    words += ["--evaluation", f"{manifest.parent}/held_out.jsonl:text", "--executor", '{"workers": 1}']
    assert main(words) == 0
    assert "| b | 80 | 0 | – | – | 1 | 1 | – |" in capsys.readouterr().out
    assert main(words[:4]) == 2
    assert "nothing to look for" in capsys.readouterr().err
    with refuses("--exact", "--across"):
        decontaminate(manifest, tmp_path / "clean", DeduplicationOptions(exact=False, across=True), [object()])
    with refuses(manifest.parent, "which is read"):
        run(manifest, manifest.parent)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("mine")
    with refuses(tmp_path / "other", "holds thesis.txt"):
        run(manifest, tmp_path / "other")
    run(manifest, tmp_path / "clean", remove=True)
    with refuses(tmp_path / "clean", "cleaned files", "--remove"):
        run(manifest, tmp_path / "clean")
