"""Languages in the names of published files."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from training.common.file_names import languages_in_name


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("webfaq_kor", ["kor"]),
        ("mqa_ko", ["kor"]),
        ("mqa_no", ["nor"]),
        ("paracrawl_tl-en", ["tgl", "eng"]),
        ("webfaq_tgl", ["tgl"]),
        ("mrtidy_korean", ["kor"]),
        ("nordic_sts_norwegian", ["nor"]),
        ("mlsum_retrieval_de", ["deu"]),
        ("paracrawl_ko-en", ["kor", "eng"]),
        ("paracrawl_azj-en", ["azj", "eng"]),
        ("unpc_ar2en", ["ara", "eng"]),
        ("mqa_ko_part2", ["kor"]),
    ],
)
def test_language_that_the_name_ends_with(stem: str, expected: list[str]) -> None:
    assert languages_in_name(stem) == expected


@pytest.mark.parametrize(
    "stem",
    [
        "komagpie",
        "ko",
        "paq_part2",
        "csn_go",
        "natural_reasoning",
        "arxiv_clustering_p2p",
        "synthetic_text2sql",
        "a_",
        "",
        "xcodeeval_code2code_C#",
        "xcodeeval_nl2code_PHP",
        "mix_ko-en-de",
        "mix_ko-",
        "mix_qqzz",
    ],
)
def test_name_without_a_language(stem: str) -> None:
    assert languages_in_name(stem) == []


@pytest.mark.parametrize(
    ("stem", "among", "expected"),
    [
        ("mkqa_zh_tw", ["zho", "eng"], ["zho"]),  # `tw` is Twi, too
        ("mkqa_zh_cn", ["zho", "eng"], ["zho"]),
        ("mkqa_zh_tw", ["twi", "zho"], ["twi"]),
        ("medqa_en", ["eng", "zho"], ["eng"]),
        ("paracrawl_ko-en", ["eng", "deu"], []),
        ("webfaq_kor", ["deu"], []),
        ("csn_ruby", ["zxx"], []),
        ("webfaq_kor", ["mul"], ["kor"]),
        ("mkqa_zh_cn", ["mul"], []),
    ],
)
def test_languages_that_may_come_out(stem: str, among: Sequence[str], expected: list[str]) -> None:
    assert languages_in_name(stem, among) == expected
