"""Mining from the command line: real names, and one line for each kind of faulty input."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from tests.training.data.mining.mining_helpers import random_vectors, read_output, save_vectors, write_pairs
from training import mine as command
from training.data.cldr.sources import build_cldr
from training.data.manifest import Source, load_manifest
from training.data.mining.corpus import form_ids
from training.data.mining.mining import Resources, mine
from training.data.mining.search import MiningOptions, find_translations
from training.data.published import PublishedFile
from training.models.encoders import find_miner
from training.models.loading import train_tokenizer

PAIRS = [(f"q{number}", f"p{number}") for number in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [word for pair in PAIRS for word in pair]
    return save_vectors(tmp_path_factory.mktemp("model") / "model", random_vectors(words))


def write_manifest(folder: Path, *sources: Source) -> Path:
    keys = ("name", "task_type", "symmetric", "instruction")
    entries = [
        {"files": [str(path) for path in source.files], **{key: getattr(source, key) for key in keys}}
        for source in sources
    ]
    path = folder / "manifest.yaml"
    path.write_text(yaml.safe_dump({"sources": entries}))
    return path


def test_names_of_cldr(tmp_path: Path) -> None:
    """Mined by spelling among English names, guarded by translations into two languages."""
    data = build_cldr(tmp_path / "cldr", languages=["de", "sw"])
    table = pq.read_table(data / "cldr_translation.parquet", columns=["query", "passage"])
    names = table["query"].to_pylist() + table["passage"].to_pylist()
    tokenizer = train_tokenizer(iter(names), vocab_size=600)
    weights = np.random.default_rng(0).standard_normal((len(tokenizer), 64)).astype(np.float32)
    bag = StaticEmbedding(tokenizer.backend_tokenizer, embedding_weights=weights)
    SentenceTransformer(modules=[bag], device="cpu").save(str(tmp_path / "model"))
    words = ["--manifest", str(data / "manifest.yaml"), "--model", str(tmp_path / "model"), "--replace"]
    words += ["--sources", "cldr_translation", "--output", str(tmp_path / "out")]
    words += ["--max-corpus-in-memory", "200", "--no-instruction"]
    assert command.main(words) == 0
    report = json.loads((tmp_path / "out" / "mining.json").read_text())
    assert report["sources"]["cldr_translation"]["options"]["top"] == 100
    counts = report["sources"]["cldr_translation"]
    assert counts["kept"] + counts["dropped"] == counts["rows"] == len(table)
    assert counts["kept"] > 0.5 * counts["rows"] and counts["refused"]["positive"] > 0.5 * counts["rows"]
    assert counts["texts"]["embedded"] == len(set(table["query"].to_pylist())) + len(set(table["passage"].to_pylist()))
    source, *others = load_manifest(tmp_path / "out" / "manifest.yaml")
    # What was not mined is still there to train on.
    before = {each.name: each for each in load_manifest(data / "manifest.yaml")}
    assert {each.name for each in (source, *others)} == set(before)
    assert all(each.files[0].samefile(before[each.name].files[0]) for each in others)
    assert source.instruction == "Retrieve the English name." and "deu" in source.languages
    assert sum(map(len, PublishedFile(source.files[0], required_negatives=24).batches())) == counts["kept"]
    guard = find_translations([s for s in load_manifest(data / "manifest.yaml") if s.name.startswith("cldr_trans")])
    for row in read_output(tmp_path / "out", "cldr_translation")[::7]:
        groups = guard.groups(form_ids(row[f"negative_{number}"] for number in range(1, 25)))
        assert (groups != guard.groups(form_ids([row["passage"]]))).all() and row["lang"]


def test_no_such_model(tmp_path: Path, refuses) -> None:
    with refuses("no/such-model", "--model"):
        find_miner("no/such-model")
    with refuses(tmp_path, "holds no model"):
        find_miner(str(tmp_path))
    model = tmp_path / "model"
    model.mkdir()
    (model / "modules.json").write_text("{")
    with refuses("--model", model, "cannot be used"):
        mine([write_pairs(tmp_path / "s", PAIRS)], find_miner(str(model)), tmp_path / "out", MiningOptions(top=50))


@pytest.mark.parametrize("options", [{"max_length": 0}, {"truncate_dim": -1}, {"batch_size": 0}, {"dtype": "int3"}])
def test_model_options(folder: Path, refuses, options: dict[str, object]) -> None:
    with refuses(next(iter(options)).replace("_", "-"), next(iter(options.values()))):
        find_miner(str(folder), **options)


def test_model_is_known_by_its_files(folder: Path, tmp_path: Path) -> None:
    words = [word for pair in PAIRS for word in pair]
    same, other = (save_vectors(tmp_path / str(seed), random_vectors(words, seed=seed)) for seed in (0, 1))
    made_by = [find_miner(str(path)).made_by() for path in (folder, same, other)]
    assert made_by[0] == made_by[1] != made_by[2]


def test_bad_sources(folder: Path, tmp_path: Path, refuses) -> None:
    miner = find_miner(str(folder))
    for name, pairs, parts in [
        ("small", PAIRS[:20], ("'small'", "20 distinct passages", "--top")),
        ("lonely", [*PAIRS, ("q", None)], ("lonely.parquet", "row 60", "'passage' is null")),
        ("blank", [*PAIRS, ("q", " ")], ("blank.parquet", "row 60", "'passage' is empty")),
    ]:
        good = write_pairs(tmp_path / "good", PAIRS, name="good")
        with refuses(*parts):
            mine([good, write_pairs(tmp_path / name, pairs, name=name)], miner, tmp_path / "out", MiningOptions(top=50))
        # Before anything was embedded.
        assert not list((tmp_path / "out").glob("embeddings/[!.]*"))
    empty = write_pairs(tmp_path / "empty", PAIRS, name="empty")
    pq.write_table(pq.read_table(empty.files[0])[:0], empty.files[0])
    with refuses("empty.parquet", "no rows"):
        mine([empty], miner, tmp_path / "out", MiningOptions(top=50))


def test_bad_folders_and_numbers(folder: Path, tmp_path: Path, refuses) -> None:
    miner, source, options = find_miner(str(folder)), write_pairs(tmp_path / "s", PAIRS), MiningOptions(top=50)
    (tmp_path / "file").touch()
    with refuses(tmp_path / "file", "cannot be written", "--cache"):
        mine([source], miner, tmp_path / "out", options, resources=Resources(cache=tmp_path / "file"))
    with refuses(tmp_path / "file", "cannot be written"):
        mine([source], miner, tmp_path / "file", options)
    with refuses("max-corpus-in-memory", 0):
        mine([source], miner, tmp_path / "out", options, resources=Resources(max_corpus_in_memory=0))
    (tmp_path / "out" / "mining.json").write_text("[]")
    with refuses("mining.json", "--output"):
        mine([source], miner, tmp_path / "out", options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sources", "no*"], "no source fits 'no*'"),
        (["--top", "10"], "top 10"),
        (["--executor", "{oops"], "executor: not valid JSON"),
        (["--executor", "moon"], "there is no 'moon'"),
        (["--model", "no/such-model"], "no/such-model"),
        (["--manifest", "missing.yaml"], "missing.yaml"),
    ],
)
def test_command_line_says_what_is_wrong(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    manifest = write_manifest(tmp_path, write_pairs(tmp_path / "s", PAIRS))
    usual = ["--manifest", str(manifest), "--model", str(folder), "--output", str(tmp_path / "out")]
    assert command.main([*usual, *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_command_line_guards_by_symmetric_sources(folder: Path, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "s", PAIRS)
    bitext = write_pairs(tmp_path / "b", [("p1", "p2"), ("p2", "p3")], name="bitext", symmetric=True)
    manifest = write_manifest(tmp_path, source, bitext)
    usual = ["--manifest", str(manifest), "--model", str(folder), "--sources", "pairs", "--top", "50"]
    usual += ["--negatives", "20", "--skip", "0", "--max-score", "1.01", "--relative", "2"]
    refused = {}
    for name, words in {"on": [], "off": ["--no-guard"], "named": ["--bitext", "bit*"]}.items():
        output = tmp_path / name
        more = ["--output", str(output), "--executor", json.dumps({"name": "local", "workers": 1})]
        assert command.main([*usual, *more, *words]) == 0
        refused[name] = json.loads((output / "mining.json").read_text())["sources"]["pairs"]["refused"]["translation"]
    assert refused["on"] == refused["named"] > 0 == refused["off"]


def test_only_retrieval_is_mined_unless_named(folder: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "s", PAIRS)
    topics = replace(write_pairs(tmp_path / "topics", PAIRS), name="topics", task_type="clustering")
    manifest = write_manifest(tmp_path, pairs, topics)
    words = ["--manifest", str(manifest), "--model", str(folder), "--output", str(tmp_path / "out"), "--top", "4"]
    words += ["--skip", "0", "--negatives", "1", "--keep-short", "--executor", '{"name": "local", "workers": 1}']
    assert command.main(words) == 0
    assert list(json.loads((tmp_path / "out" / "mining.json").read_text())["sources"]) == [pairs.name]
    sources = {source.name: source for source in load_manifest(tmp_path / "out" / "manifest.yaml")}
    assert sources["topics"].task_type == "clustering" and sources["topics"].files[0].samefile(topics.files[0])


def test_two_commands_mine_once(folder: Path, tmp_path: Path) -> None:
    miner, source = find_miner(str(folder)), write_pairs(tmp_path, PAIRS, name="pairs")
    options = MiningOptions(top=20, skip=0, max_score=1.0, relative=1.0, negatives=3)
    (tmp_path / "out").mkdir()
    # Left by a command that was killed.
    (tmp_path / "out" / ".gone.parquet.partial").write_text("half")
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda _: mine([source], miner, tmp_path / "out", options), range(2)))
    # The one that waited found what the other had made, to the second that it took.
    assert reports[0] == reports[1] and reports[0]["sources"]["pairs"]["kept"] > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("embeddings", "manifest.yaml", "mining.json", "pairs.parquet")
    ]
