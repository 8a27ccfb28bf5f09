"""The release: the sources' rows unchanged, a card that tells the truth about them, whole or absent."""

from __future__ import annotations

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import DatasetCard

from hub_cards.hub_terms import hub_language, hub_licence
from tests.training.data.prepared_rows import contents, write_rows
from training.data.cldr.sources import build_cldr
from training.data.cleaning.decontamination import COUNTS
from training.data.manifest import load_manifest
from training.data.published import ROW_GROUP_ROWS
from training.data.releasing import plot_languages, release, size_category
from training.data.survey import survey
from training.release import main

LONG = 25_000
COUNTED = [("polarity", 60, 4, None, 2, 3, 2, 10), ("code", 7, 1, None, None, None, None, None)]
CONTAMINATION = {
    "evaluation_sets": {"exam": 42},
    "sources": [dict(zip(("name", *COUNTS), counts, strict=True)) for counts in COUNTED],
}


def entry(name, task_type, languages, **keys):
    told = {"task_type": task_type, "instruction": f"Find {name}.", "languages": languages}
    return {"name": name, "files": f"{name}.parquet", **told, **keys}


EACH = {"each_file": True}
ENTRIES = [
    entry("polarity", "classification", ["eng"], licence="MIT", category="sentiment", stages=["two"]),
    entry("faq", "retrieval", ["kor", "deu"], **EACH, files="faq_*.parquet", licence="CC-BY-4.0", category="QA"),
    entry("crawl", "retrieval", ["kor", "eng"], **EACH, files="crawl_*.parquet", symmetric=True),
    entry("world", "clustering", ["mul", "tok"], files=["world_a.parquet", "world_b.parquet"], licence="My Own", cap=9),
    entry("code", "retrieval", ["zxx"], licence="MIT", weight=0.5, instruction=None),
]
NAMES = ["polarity", "faq_kor", "crawl_ko-en", "world", "code"]


def write_manifest(folder, *entries, **top):
    path = folder / "manifest.yaml"
    path.write_text(yaml.safe_dump({**top, "sources": list(entries)}))
    return path


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """A manifest and its data: sources of different columns, a collection, a pair of languages, two files."""
    folder = tmp_path_factory.mktemp("generated")
    write_rows(folder / "polarity.parquet", 50, 1)
    tags = pa.array(["ko", "kor", None, "?"] * (LONG // 4)).dictionary_encode()
    write_rows(folder / "faq_kor.parquet", LONG, 2, lang=tags, score=list(range(LONG)))
    write_rows(folder / "crawl_ko-en.parquet", 21, 3, lang=["ko"] * 21)
    write_rows(folder / "world_a.parquet", 30, 2, lang=["tl", "hbs", "tok"] * 10)
    write_rows(folder / "world_b.parquet", 40, 2, lang=pa.nulls(40))
    write_rows(folder / "code.parquet", 7, 1, query=["a", "b", "c", " ", "e", "f", "g"])
    return write_manifest(folder, *ENTRIES, stage_caps={"two": 20})


@pytest.fixture(scope="module")
def released(manifest, tmp_path_factory):
    return release(manifest, tmp_path_factory.mktemp("out") / "set", name="Generated")


@pytest.fixture(scope="module")
def cldr(tmp_path_factory):
    return build_cldr(tmp_path_factory.mktemp("cldr") / "data", languages=["de", "sw"], num_negatives=3)


@pytest.fixture(scope="module")
def cldr_release(cldr, tmp_path_factory):
    return release(cldr / "manifest.yaml", tmp_path_factory.mktemp("out") / "names", name="CLDR names")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def card_of(folder):
    return (folder / "README.md").read_text()


def metadata(folder):
    return DatasetCard.load(folder / "README.md").data.to_dict()


def table(folder, head):
    """The rows of one table of the card by their first cell."""
    lines = card_of(folder).split(f"\n| {head} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def row_groups(path):
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"
        file.read()
        return [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]


def test_rows_columns_and_keys_are_unchanged(manifest, released):
    before, after = load_manifest(manifest), load_manifest(released / "manifest.yaml", stage="two")
    assert [source.name for source in after] == NAMES
    for old, new in zip(before, after, strict=True):
        rows = [row for file in old.files for row in pq.read_table(file).to_pylist()]
        assert [row for file in new.files for row in pq.read_table(file).to_pylist()] == rows
        # Stages and their caps go with the sources.
        cap = min(20, old.cap or 20)
        assert replace(new, files=[]) == replace(old, files=[], cap=cap)
    assert not any(each.missing or each.faults for each in survey(released / "manifest.yaml").collections)
    assert pq.read_schema(after[1].files[0]).names == ["query", "passage", "negative_1", "negative_2", "lang", "score"]


def test_row_groups_stream_and_large_sources_have_several_files(released, tmp_path, manifest, cache):
    groups = row_groups(released / "data" / "faq_kor.parquet")
    assert len(groups) > 2 and max(groups) <= ROW_GROUP_ROWS
    # Those of long texts are small.
    text = pa.array(["word " * 20_000] * 1000)
    pq.write_table(pa.table({"query": [str(row) for row in range(1000)], "passage": text}), tmp_path / "long.parquet")
    release(write_manifest(tmp_path, entry("long", "retrieval", ["eng"])), tmp_path / "long")
    assert max(row_groups(tmp_path / "long" / "data" / "long.parquet")) * 100_000 < 40 << 20
    out = release(manifest, tmp_path / "out", sources=["faq_kor", "code"], max_file_bytes=1000)
    files = sorted(path.name for path in (out / "data/faq_kor").iterdir())
    assert len(files) > 2 and files == [f"train-{n:05d}-of-{len(files):05d}.parquet" for n in range(len(files))]
    expected = pq.read_table(manifest.parent / "faq_kor.parquet").to_pylist()
    assert datasets.load_dataset(str(out), "faq_kor", split="train").to_list() == expected
    assert [file.name for file in load_manifest(out / "manifest.yaml")[0].files] == files


@pytest.mark.parametrize("streaming", [False, True])
def test_every_configuration_loads(released, cldr_release, cache, streaming):
    for folder in (released, cldr_release):
        for source in load_manifest(folder / "manifest.yaml"):
            rows = datasets.load_dataset(str(folder), source.name, split="train", streaming=streaming)
            assert list(rows) == pq.read_table(source.files[0]).to_pylist()


def test_metadata_and_tables(released, cldr_release, cldr):
    found = metadata(released)
    # faq_kor's rows without a code of their own are in the language of its name.
    assert found["language"] == ["code", "en", "hbs", "ko", "multilingual", "tl", "tok"]
    assert found["license"] == ["cc-by-4.0", "mit", "unknown", "other"] and found["license_name"] == "my-own"
    assert found["size_categories"] == ["10K<n<100K"]
    tasks = ["feature-extraction", "sentence-similarity", "text-classification", "text-retrieval"]
    assert found["task_categories"] == tasks
    assert [config["config_name"] for config in found["configs"]] == NAMES
    real = metadata(cldr_release)
    assert (real["language"], real["license"], real["license_name"]) == (["de", "en", "sw"], "other", "unicode-3.0")
    assert real["pretty_name"] == "CLDR names"
    languages = {code: cells[1] for code, cells in table(released, "code | language").items()}
    expected = {"kor": f"{LONG + 11:,}", "eng": "60", "mul": "40", "tgl": "10", "hbs": "10", "tok": "10", "zxx": "7"}
    assert languages == expected
    counts = [["50", "1"], [f"{LONG:,}", "2"], ["21", "3"], ["70", "2"], ["7", "1"]]
    sources = table(released, "source")
    assert [*sources] == NAMES and [cells[4:6] for cells in sources.values()] == counts
    assert table(released, "task type")["clustering"][:2] == ["1", "70"]
    assert table(released, "category")["QA"][:2] == ["1", f"{LONG:,}"]
    assert table(released, "licence")["MIT"] == ["2", "57"]
    assert "leaves out" in card_of(released) and "1 of `code`" in card_of(released)
    counts = Counter()
    for source in load_manifest(cldr / "manifest.yaml"):
        counts.update(pq.read_table(source.files[0])["lang"].to_pylist())
    languages = table(cldr_release, "code | language")
    assert {code: int(cells[1].replace(",", "")) for code, cells in languages.items()} == counts
    assert json.loads((cldr_release / "release.json").read_text())["languages"] == counts


def test_provenance(cldr, cldr_release, released, tmp_path, refuses):
    dropped = json.loads((cldr / "build.json").read_text())["dropped"]
    card = card_of(cldr_release).split("## Provenance")[1]
    for name, count in dropped.items():
        assert re.search(rf"\| {name} \| built from CLDR \| – \| {count:,} \| babel .*seed 0", card)
    assert "No record of how" in card_of(released)
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "a.parquet", 5, 1)
    write_manifest(data, entry("a", "retrieval", ["eng"]))
    built = {"read": 9, "rows": 5, "dropped": {"no label": 3, "empty": 1}}
    (data / "build.json").write_text(json.dumps({"sources": {"a": built}}))
    mined = {"rows": 7, "kept": 5, "dropped": 2, "model": "/home/me/miner", "revision": None, "options": {"top": 100}}
    (data / "mining.json").write_text(json.dumps({"sources": {"a": mined}}))
    card = card_of(release(data / "manifest.yaml", tmp_path / "out"))
    assert "| a | built from raw data | 9 | 4 | no label 3, empty 1 |\n" in card
    assert "| a | negatives mined | 7 | 2 | by miner, top 100 |\n" in card
    (data / "build.json").write_text('{"rows": 5}')
    with refuses(data / "build.json", "remove it"):
        release(data / "manifest.yaml", tmp_path / "other")


def test_contamination(manifest, released, tmp_path, refuses):
    assert "**not checked**" in card_of(released)
    path = tmp_path / "contamination.json"
    path.write_text(json.dumps(CONTAMINATION))
    card = card_of(release(manifest, tmp_path / "out", contamination=path))
    assert "| polarity | 60 | 4 | – | 2 | 3 | 2 | 10 |\n" in card and "`exam` (42\ntexts)" in card
    assert "| code | 7 | 1 | – | – | – | – | – |\n" in card and "| all | 67 | 5 | – | 2 | 3 | 2 | 10 |\n" in card
    assert "Not checked: `faq_kor`, `crawl_ko-en`, `world`." in card and "**not checked**" not in card
    # A report of other data, and no report.
    path.write_text(json.dumps(CONTAMINATION).replace('"removed": 10', '"removed": 9'))
    with refuses("'polarity' had 60 rows", "50 are released"):
        release(manifest, tmp_path / "other", contamination=path)
    for faulty in ("{", "[]", '{"sources": []}', '{"evaluation_sets": {}, "sources": [{"name": "polarity"}]}'):
        path.write_text(faulty)
        with refuses("contamination.json"):
            release(manifest, tmp_path / "other", contamination=path)
    # Neither a release nor a beginning of one.
    assert {each.name for each in tmp_path.iterdir()} == {"contamination.json", "out"}


def test_bytes_repeat(manifest, released, tmp_path):
    """Two commands at once make one release, whatever a killed one left behind."""
    (tmp_path / ".set.partial").mkdir()
    (tmp_path / ".set.partial" / "README.md").write_text("half a c")
    output = tmp_path / released.name
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: release(manifest, output, name="Generated"), range(2))) == [output, output]
    assert contents(output) == contents(released)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_an_unchanged_release_is_left_alone(cldr, tmp_path, capsys, refuses):
    out, words = tmp_path / "out", ["--manifest", str(cldr / "manifest.yaml"), "--output", str(tmp_path / "out")]
    words += ["--licence", "CC0-1.0", "--sources", "cldr_is*"]
    assert main([*words, "cldr_kind"]) == 0
    assert metadata(out)["license"] == "cc0-1.0"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main([*words, "cldr_kind"]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert main([*words, "nothing"]) == 2
    assert "error: no source fits" in capsys.readouterr().err
    with refuses(out, "not this release"):
        release(cldr / "manifest.yaml", out, licence="MIT")


@pytest.mark.parametrize("more", [{"score": [1, 2, 3], "negative_1": ["n"] * 3}, {}])
def test_names_and_columns_that_make_no_configuration(tmp_path, refuses, more):
    write_rows(tmp_path / "a.parquet", 3, 1)
    write_rows(tmp_path / "b.parquet", 3, 0, **more)
    manifest = write_manifest(tmp_path, entry("both", "retrieval", ["eng"], files=["a.parquet", "b.parquet"]))
    with refuses("'both'", "score" if more else "negative_1", "each_file"):
        release(manifest, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    with refuses("cannot be a configuration"):
        release(write_manifest(tmp_path, entry("a[0]", "retrieval", ["eng"], files="a.parquet")), tmp_path / "out")


@pytest.mark.parametrize("count", [1, 280])
def test_plot(tmp_path, count):
    plot_languages({f"q{n}": 1000 // (n + 1) for n in range(count)}, tmp_path, "A $ set")
    assert (tmp_path / "languages.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "languages.svg").read_text()


def test_identifiers_of_the_hub():
    hub = {"deu": "de", "ceb": "ceb", "hbs": "hbs", "mul": "multilingual", "zxx": "code"}
    assert {code: hub_language(code) for code in hub} == hub
    known = {"Apache-2.0": "apache-2.0", "CC0-1.0": "cc0-1.0", "GPL-3.0-or-later": "gpl-3.0", "ODC-By-1.0": "odc-by"}
    known |= {"Unicode-3.0": None, None: "unknown"}
    assert {licence: hub_licence(licence) for licence in known} == known
    sizes = {999: "n<1K", 1000: "1K<n<10K", 60_000_000: "10M<n<100M", 10**12: "n>1T"}
    assert {rows: size_category(rows) for rows in sizes} == sizes
