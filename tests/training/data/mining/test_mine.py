"""Mining from the command line: real names, and one line for each kind of faulty input."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest

from tests.training.data.mining.mining_helpers import random_vectors, save_vectors, write_pairs
from training import mine as command
from training.data.manifest import load_manifest, write_manifest
from training.data.mining.mining import Resources, mine
from training.data.mining.search import MiningOptions
from training.models.encoders import find_miner

PAIRS = [(f"q{number}", f"p{number}") for number in range(60)]


@pytest.fixture(scope="module")
def miner(tmp_path_factory):
    words = [word for pair in PAIRS for word in pair]
    return find_miner(str(save_vectors(tmp_path_factory.mktemp("model") / "model", random_vectors(words))))


@pytest.fixture(scope="module")
def words(miner, tmp_path_factory):
    """The command for a manifest of pairs, bitext of their passages, and clustering."""
    data = tmp_path_factory.mktemp("data")
    sources = [
        write_pairs(data, PAIRS),
        write_pairs(data, [("p1", "p2"), ("p2", "p3")], name="bitext", symmetric=True),
        write_pairs(data, PAIRS, name="topics", task_type="clustering"),
    ]
    write_manifest(data / "manifest.yaml", [{**vars(source), "files": source.files} for source in sources])
    return ["--manifest", str(data / "manifest.yaml"), "--model", miner.model]


@pytest.mark.parametrize(
    ("pairs", "parts"),
    [
        (PAIRS[:20], ("'bad'", "20 distinct passages", "--top")),
        ([*PAIRS, ("q", " ")], ("bad.parquet", "row 60", "'passage' is empty")),
        ([], ("bad.parquet", "no rows")),
    ],
)
def test_bad_sources_are_refused_before_anything_is_embedded(miner, tmp_path, refuses, pairs, parts):
    good, bad = (write_pairs(tmp_path, pairs or PAIRS, name=name) for name, pairs in (("good", PAIRS), ("bad", pairs)))
    if not pairs:
        pq.write_table(pq.read_table(bad.files[0])[:0], bad.files[0])
    with refuses(*parts):
        mine([good, bad], miner, tmp_path / "out", MiningOptions(top=50))
    assert not list((tmp_path / "out").glob("embeddings/[!.]*"))


def test_bad_folders_and_numbers(miner, tmp_path, refuses):
    source, options = write_pairs(tmp_path / "s", PAIRS), MiningOptions(top=50)
    (tmp_path / "file").touch()
    with refuses(tmp_path / "file", "cannot be written"):
        mine([source], miner, tmp_path / "out", options, resources=Resources(cache=tmp_path / "file"))
    with refuses(tmp_path / "file", "cannot be written"):
        mine([source], miner, tmp_path / "file", options)
    with refuses("max-corpus-in-memory", 0):
        mine([source], miner, tmp_path / "out", options, resources=Resources(max_corpus_in_memory=0))
    (tmp_path / "out" / "mining.json").write_text("[]")
    with refuses("mining.json", "--output"):
        mine([source], miner, tmp_path / "out", options)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sources", "no*"], "no source fits 'no*'"),
        (["--top", "10"], "top must be"),
        (["--executor", "{oops"], "executor: not valid JSON"),
        (["--executor", "moon"], "there is no 'moon'"),
        (["--model", "no/such-model"], "no/such-model"),
        (["--max-length", "0"], "max-length must be at least 1"),
        (["--dtype", "int3"], "unknown dtype 'int3'"),
    ],
)
def test_command_line_says_what_is_wrong(words, tmp_path, capsys, more, message):
    assert command.main([*words, "--output", str(tmp_path / "out"), *more]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_command_line_guards_by_symmetric_sources(words, tmp_path):
    usual = [*words, "--sources", "pairs", "--top", "50", "--negatives", "20", "--skip", "0", "--max-score", "1.01"]
    usual += ["--relative", "2", "--executor", '{"name": "local", "workers": 1}']
    refused = {}
    for name, more in {"on": [], "off": ["--no-guard"], "named": ["--bitext", "bit*"]}.items():
        assert command.main([*usual, "--output", str(tmp_path / name), *more]) == 0
        report = json.loads((tmp_path / name / "mining.json").read_text())
        refused[name] = report["sources"]["pairs"]["refused"]["translation"]
    assert refused["on"] == refused["named"] > 0 == refused["off"]
    # Only retrieval is mined unless named.
    more = ["--output", str(tmp_path / "all"), "--top", "2", "--skip", "0", "--negatives", "1", "--keep-short"]
    assert command.main([*words, *more]) == 0
    assert list(json.loads((tmp_path / "all/mining.json").read_text())["sources"]) == ["pairs", "bitext"]
    (topics,) = (each for each in load_manifest(tmp_path / "all/manifest.yaml") if each.name == "topics")
    (before,) = (each for each in load_manifest(words[1]) if each.name == "topics")
    assert topics.task_type == "clustering" and topics.files[0].samefile(before.files[0])


def test_two_commands_mine_once(miner, tmp_path):
    source = write_pairs(tmp_path, PAIRS)
    options = MiningOptions(top=20, skip=0, max_score=1.0, relative=1.0, negatives=3)
    (tmp_path / "out").mkdir()
    # Left by a command that was killed.
    (tmp_path / "out" / ".gone.parquet.partial").write_text("half")
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda _: mine([source], miner, tmp_path / "out", options), range(2)))
    # The one that waited found what the other had made, which embedded all texts.
    assert reports[0] == reports[1] and reports[0]["sources"]["pairs"]["kept"] > 0
    names = ["embeddings", "manifest.yaml", "mining.json", "pairs.parquet"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
