"""The shipped manifest of the published data: the paper's sources and sizes, and the file names that training lists."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import langcodes
import pytest

from training.data.manifest import file_languages, load_manifest, read_manifest
from training.data.survey import survey

PATH = Path(__file__).parents[3] / "training" / "data" / "manifests" / "f2llm-v2.yaml"

WEBFAQ = """ara aze ben bul cat ces dan deu ell eng est fas fin fra heb hin hrv hun ind isl ita jpn kat kaz kor lav lit
    mar msa nld nor pol por ron rus slk slv spa sqi srp swe tgl tha tur ukr urd uzb vie zho"""
PARACRAWL = "so sw tg azj th tl hi uk vi hy zh id km ko lo my ne ps ru si"
MQA = (
    "ca lt nl sr es he id de lv vi it sk ms hi zh hr th no is bg ru pl ja ro da sv uk el pt et cs tr fr fa hu ko ar fi"
)
MKQA = "ar da de en es fi fr he hu it ja km ko ms nl no pl pt ru sv th tr vi zh_cn zh_hk zh_tw"
CLIRMATRIX = """af-bg cv-fa fi-ht ku-mk pnb-sk th-uk ar-fr en hu-ko ml-nl ru-it ur-yo bn-cs es-pt ja-de nn-pms sl-tg
    zh"""
MMARCO = """arabic chinese dutch french german hindi indonesian italian japanese portuguese russian spanish
    vietnamese"""
MRTIDY = "arabic bengali finnish indonesian japanese korean russian swahili telugu thai"
CODE = "C# C++ C D Go Haskell Java Javascript Kotlin Ocaml PHP Pascal Perl Python Ruby Rust Scala"
CSN = "go java javascript php python ruby"
NORDIC = "danish norwegian swedish"

# The collections of several files, by the names in the released training code.
FILES = {
    "webfaq": [f"webfaq_{code}" for code in WEBFAQ.split()],
    "paracrawl": [
        *(f"paracrawl_{pair}" for code in PARACRAWL.split() for pair in (f"{code}-en", f"en-{code}")),
        *(f"paracrawl_{a}-{b}" for a, b in [("es", "ca"), ("es", "eu"), ("es", "gl"), ("nl", "fr"), ("pl", "cs")]),
        *(f"paracrawl_{b}-{a}" for a, b in [("es", "ca"), ("es", "eu"), ("es", "gl"), ("nl", "fr"), ("pl", "cs")]),
        "paracrawl_pl-de",
        "paracrawl_de-pl",
    ],
    "unpc": [f"unpc_{a}2{b}" for a in "ar en es fr ru zh".split() for b in "ar en es fr ru zh".split() if a != b],
    "mqa": [f"mqa_{code}" for code in MQA.split()],
    "mkqa": [f"mkqa_{code}" for code in MKQA.split()],
    "clirmatrix": [f"clirmatrix_{part}" for part in CLIRMATRIX.split()],
    "mmarco": [*(f"mmarco_{name}" for name in MMARCO.split()), "msmarco"],
    "mrtidy": [*(f"mrtidy_{name}" for name in MRTIDY.split()), "mrtidy"],
    "miracl": [f"miracl_{code}" for code in "ar bn en es fa fi fr hi id ja ko ru sw te th zh".split()],
    "mldr": [f"mldr_{code}" for code in "ar de en es fr hi it ja ko pt ru th zh".split()],
    "xnli": [f"xnli_{code}" for code in "ar bg de el es fr hi ru sw th tr ur vi zh".split()],
    "pawsx": [f"pawsx_{code}" for code in "de en es fr ja ko zh".split()],
    "mlsum_retrieval": [f"mlsum_retrieval_{code}" for code in "de es fr ru tr".split()],
    "mlsum_clustering": [f"mlsum_clustering_{code}" for code in "de es fr ru".split()],
    "codesearchnet": [f"csn_{name}" for name in CSN.split()],
    "codesearchnet_ccr": [f"csn_ccr_{name}" for name in CSN.split()],
    "xcodeeval_code2code": [f"xcodeeval_code2code_{name}" for name in CODE.split()],
    "xcodeeval_nl2code": [f"xcodeeval_nl2code_{name}" for name in CODE.split()],
    "opencodereasoning2": ["ocr2_cpp", "ocr2_python"],
    "opencodegeneticinstruct": ["ocgi", "ocgi_part2"],
    "wildchat": ["wildchat", "wildchat_part2", "wildchat_part3"],
    "infinstruct": ["infinstruct", "infinstruct_part2"],
    "medqa": ["medqa_en", "medqa_zh"],
    **{name: [name, f"{name}_part2"] for name in "paq stackexchange muri natural_reasoning openorca medi2".split()},
    **{
        f"nordic_{task}": [f"nordic_{task}_{name}" for name in NORDIC.split()]
        for task in "classification retrieval sts text_matching".split()
    },
}


@pytest.fixture(scope="module")
def manifest():
    return read_manifest(PATH)


@pytest.fixture
def folder(manifest, tmp_path):
    """The published folder with nothing in its files."""
    for entry in manifest.entries:
        for name in FILES.get(entry.name, [entry.files[0].removesuffix(".parquet").replace("*", "")]):
            (tmp_path / f"{name}.parquet").touch()
    return tmp_path


def test_sources_and_sizes_are_the_papers(manifest):
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


def test_every_entry_is_described(manifest):
    codes = set(manifest.published_shares.language_rows)
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


def test_shares_of_the_categories_are_the_papers(manifest):
    paper = manifest.published_shares.category_percent
    rows = Counter()
    for entry in manifest.entries:
        rows[entry.category] += entry.published_rows
    listed = sum(rows[name] for name in paper)
    for name, percent in paper.items():
        assert 100 * rows[name] / listed == pytest.approx(percent, abs=0.06), name


def test_every_published_file_is_a_source_of_one_entry(manifest, folder):
    sources = load_manifest(PATH, folder)
    assert {file.name for source in sources for file in source.files} == {file.name for file in folder.iterdir()}
    assert len(sources) == 502
    each = {entry.name: entry for entry in manifest.entries if entry.each_file}
    assert each.keys() == FILES.keys()
    for name, entry in each.items():
        assert entry.published_files == len(FILES[name]), name
    found = survey(PATH, folder)
    assert found.unclaimed == [] and all(not collection.missing for collection in found.collections)


def test_names_tell_the_language_of_the_files(manifest):
    entries = {entry.name: entry for entry in manifest.entries}
    untold = {"clirmatrix", "muri", "wildchat", "infinstruct"}
    for name, stems in FILES.items():
        told = [file_languages(entries[name], Path(f"{stem}.parquet")) for stem in stems]
        pairs = entries[name].category == "bitext"
        if name not in untold and name not in ("mmarco", "mrtidy"):
            assert all(len(languages) == 1 + pairs for languages in told), name
            assert {code for languages in told for code in languages} == set(entries[name].languages), name
    assert file_languages(entries["mkqa"], Path("mkqa_zh_tw.parquet")) == ["zho"]
    assert file_languages(entries["paracrawl"], Path("paracrawl_ko-en.parquet")) == ["kor", "eng"]
