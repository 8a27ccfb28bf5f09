"""prepare.py, and a folder in the layout of the published data from its files to a training step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_f2llm.prompts import instruct
from tests.training.recipes import write_single_stage
from training.data.prepared import PreparedSource
from training.models.loading import load_tokenizer
from training.prepare import main as prepare_main
from training.run_stage import main

WORDS = "river mountain city island forest desert lake valley harbour village".split()
ROOT = Path(__file__).parents[3]
OWN = "Given a question, name the place."


MANIFEST = """
root: published
sources:
  - {name: polarity, files: polarity.parquet, task_type: classification, instruction: Classify.}
  - {name: places, files: places_*.parquet, each_file: true, task_type: retrieval, instruction: Answer.,
     languages: [kor, jpn]}
  - {name: topics, files: topics.parquet, task_type: clustering, instruction: Name the topic.}
"""


@pytest.fixture
def manifest(tmp_path):
    """Three files of 3, 26 and 28 columns with one row group each; the second brings its instruction along."""
    rows = range(40)
    texts = {name: [f"{name} {WORDS[row % 10]} {row}" for row in rows] for name in ("query", "passage")}
    negatives = {f"negative_{k}": [f"{WORDS[(row + k) % 10]} {k} {row % 13}" for row in rows] for k in range(1, 25)}
    own = {**texts, "query": [instruct(OWN, text) for text in texts["query"]]}
    tables = {
        "polarity": {**texts, "negative_1": negatives["negative_1"]},
        "places_kor": {**own, **negatives},
        "topics": {**texts, **negatives, "lang": ["eng"] * len(rows), "label": [WORDS[row % 10] for row in rows]},
    }
    (tmp_path / "published").mkdir()
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), tmp_path / f"published/{name}.parquet")
    (tmp_path / "manifest.yaml").write_text(MANIFEST)
    return tmp_path / "manifest.yaml"


def test_a_recipe_and_the_command_prepare_the_same(tmp_path, manifest, capsys):
    keys = {"num_hard_negatives_retrieval": 7, "num_hard_negatives_clustering": 9, "max_length": 64}
    keys |= {"task_types": None, "instructions": True, "max_steps": 2, "eval_strategy": "no", "manifest": str(manifest)}
    assert main([str(write_single_stage(tmp_path, **keys, validation_share=0.01))]) == 0
    folders = (tmp_path / "run/prepared").glob("[!.]*")
    prepared = {source.name: source for source in map(PreparedSource, folders)}
    widths = {name: source.num_negatives for name, source in prepared.items()}
    assert widths == {"polarity": 1, "places_kor": 24, "topics": 24}
    assert prepared["places_kor"].description["languages"] == ["kor"]
    tokenizer = load_tokenizer(str(tmp_path / "run/model"))
    first = {name: source.tokens(source.rows["train"][0, 0])[:-1] for name, source in prepared.items()}
    queries = {name: tokenizer.decode(tokens) for name, tokens in first.items()}
    assert queries["topics"].startswith(instruct("Name the topic."))
    assert queries["places_kor"].startswith(instruct(OWN)) and queries["places_kor"].count("Instruct: ") == 1
    words = ["--manifest", str(manifest), "--tokenizer", str(tmp_path / "run/model"), "--max-length", "64"]
    capsys.readouterr()
    assert prepare_main([*words, "--output", str(tmp_path / "apart")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["source", "polarity", "places_kor", "topics", "all"]
    for name in prepared:
        files = [sorted(tmp_path.glob(f"{folder}/{name}-*/*")) for folder in ("run/prepared", "apart")]
        assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_a_dry_run_reads_no_row(tmp_path, manifest, capsys):
    (tmp_path / "published/topics.parquet").unlink()
    assert prepare_main(["--manifest", str(manifest), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "topics" in said and "missing" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.yaml", "published"]


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ([], "--tokenizer is missing"),
        (["--tokenizer", "nowhere/none", "--output", "x"], "tokenizer 'nowhere/none' cannot be used"),
        (["--tokenizer", "t", "--output", "x", "--sources", "none*"], "no source fits 'none*'"),
        (["--tokenizer", "t", "--output", "x", "--executor", "dask"], "'dask'"),
        (["--tokenizer", "t", "--output", "x", "--cap", "0"], "--cap must be at least 1"),
        (["--tokenizer", "t", "--output", "x", "--max-length", "0"], "max_length must be at least 1"),
        (["--dry-run", "--cap", "5"], "leave out --sources, --task-types and --cap"),
    ],
)
def test_faulty_command_lines(manifest, capsys, words, wrong):
    assert prepare_main(["--manifest", str(manifest), *words]) == 2
    assert wrong in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_stops_with_a_line_and_keeps_what_is_done(tmp_path, manifest, small_tokenizer, workers):
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "training/prepare.py", "--manifest", str(manifest), "--output", str(tmp_path / "out")]
    command += ["--tokenizer", str(tmp_path / "tokenizer"), "--executor", json.dumps({"workers": workers})]
    command += ["--num-hard-negatives-retrieval", "3", "--num-hard-negatives-clustering", "3"]
    # One file of the second source outgrows the limit, none of the first.
    limit = ["bash", "-c", 'ulimit -f 24; exec "$@"', "limited"]
    done = subprocess.run([*limit, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("stopped: ") and "File too large" in last and "run the same command again" in last
    assert [PreparedSource(folder).name for folder in (tmp_path / "out").glob("[!.]*")] == ["polarity"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    prepared = [PreparedSource(folder).check().name for folder in (tmp_path / "out").glob("[!.]*")]
    assert sorted(prepared) == ["places_kor", "polarity", "topics"]
