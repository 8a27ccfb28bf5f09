"""The shipped manifest of the published data: the paper's sources and sizes, and the file names that training lists."""

from __future__ import annotations

from pathlib import Path

import langcodes
import pytest

from training.data.manifest import file_languages, read_manifest
from training.data.survey import survey

PATH = Path(__file__).parents[3] / "training" / "data" / "manifests" / "f2llm-v2.yaml"

# Collections whose names and languages are easily mistaken, by the names in the released training code.
PAIRS = [(code, "en") for code in "so sw tg azj th tl hi uk vi hy zh id km ko lo my ne ps ru si".split()]
PAIRS += [pair.split("-") for pair in "es-ca es-eu es-gl nl-fr pl-cs pl-de".split()]
MKQA = "ar da de en es fi fr he hu it ja km ko ms nl no pl pt ru sv th tr vi zh_cn zh_hk zh_tw"
MQA = """ca lt nl sr es he id de lv vi it sk ms hi zh hr th no is bg ru pl ja ro da sv uk el pt et cs tr fr fa hu ko ar
    fi"""
CLIRMATRIX = """af-bg cv-fa fi-ht ku-mk pnb-sk th-uk ar-fr en hu-ko ml-nl ru-it ur-yo bn-cs es-pt ja-de nn-pms sl-tg
    zh"""
MRTIDY = "arabic bengali finnish indonesian japanese korean russian swahili telugu thai"
UN = "ar en es fr ru zh".split()
FILES = {
    "paracrawl": [f"paracrawl_{a}-{b}" for pair in PAIRS for a, b in (pair, pair[::-1])],
    "unpc": [f"unpc_{a}2{b}" for a in UN for b in UN if a != b],
    "mqa": [f"mqa_{code}" for code in MQA.split()],
    "mkqa": [f"mkqa_{code}" for code in MKQA.split()],
    "clirmatrix": [f"clirmatrix_{part}" for part in CLIRMATRIX.split()],
    "mrtidy": [*(f"mrtidy_{name}" for name in MRTIDY.split()), "mrtidy"],
    "mlsum_retrieval": [f"mlsum_retrieval_{code}" for code in "de es fr ru tr".split()],
    "codesearchnet": [f"csn_{name}" for name in "go java javascript php python ruby".split()],
    "codesearchnet_ccr": [f"csn_ccr_{name}" for name in "go java javascript php python ruby".split()],
    "xcodeeval_nl2code": ["xcodeeval_nl2code_C#", "xcodeeval_nl2code_C++"],
    "wildchat": ["wildchat", "wildchat_part2", "wildchat_part3"],
    "nordic_sts": [f"nordic_sts_{name}" for name in "danish norwegian swedish".split()],
}


@pytest.fixture(scope="module")
def manifest():
    return read_manifest(PATH)


def test_sources_and_sizes_are_the_papers_and_every_entry_is_described(manifest):
    assert len(manifest.entries) == 157
    rows = [entry.published_rows for entry in manifest.entries]
    assert all(rows) and sum(rows) == 60_147_938  # "60 M"
    stage1 = manifest.of_stage("stage1")
    names = "codesearchnet codesearchnet_ccr opencodegeneticinstruct webfaq mmarco clirmatrix paracrawl"
    assert {entry.name for entry in stage1} == set(names.split())
    assert sum(entry.published_rows for entry in stage1) == 26_693_280
    assert manifest.of_stage("stage2") == manifest.entries
    assert {manifest.cap_of(entry, "stage1") for entry in stage1} == {None}
    assert {manifest.cap_of(entry, "stage2") for entry in manifest.entries} == {80_000}
    codes = set(manifest.published_language_rows)
    for entry in manifest.entries:
        symmetric = entry.task_type == "clustering" or entry.category in ("bitext", "STS", "paraphrase")
        assert entry.symmetric == symmetric, entry.name
        assert entry.instruction_from in ("v1", "mteb", "written")
        assert entry.instruction == entry.instruction.strip() and "\n" not in entry.instruction
        assert entry.languages
        codes |= set(entry.languages)
    for code in codes:
        assert len(code) == 3 and langcodes.tag_is_valid(code), code
        assert langcodes.Language.get(code, normalize=False).to_alpha3() == code, code


def test_every_published_file_is_a_source_of_one_entry(manifest, tmp_path):
    assert sum(entry.published_files if entry.each_file else 1 for entry in manifest.entries) == 502
    for stem in (stem for stems in FILES.values() for stem in stems):
        (tmp_path / f"{stem}.parquet").touch()
    found = survey(PATH, tmp_path)
    # Empty files are no parquet files: each is a fault of its entry.
    counts = {each.entry.name: len(each.faults) for each in found.collections if each.faults}
    assert counts == {name: len(stems) for name, stems in FILES.items()} and found.unclaimed == []


def test_names_tell_the_language_of_the_files(manifest):
    entries = {entry.name: entry for entry in manifest.entries}
    for name, stems in FILES.items():
        told = [file_languages(entries[name], Path(f"{stem}.parquet")) for stem in stems]
        pairs = entries[name].category == "bitext"
        if name not in ("clirmatrix", "wildchat", "mrtidy"):
            assert all(len(languages) == 1 + pairs for languages in told), name
            assert {code for languages in told for code in languages} == set(entries[name].languages), name
    assert file_languages(entries["mkqa"], Path("mkqa_zh_tw.parquet")) == ["zho"]
    assert file_languages(entries["paracrawl"], Path("paracrawl_ko-en.parquet")) == ["kor", "eng"]
