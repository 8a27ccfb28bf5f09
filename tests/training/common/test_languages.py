"""Codes of languages, from one standard to another, and languages in the names of files."""

from __future__ import annotations

from collections.abc import Sequence

import langcodes
import pytest
from babel import Locale

from training.common.languages import iso639_1, language_name, languages_in_name


def test_two_letters_where_there_are_two() -> None:
    assert {code: iso639_1(code) for code in ("deu", "nob", "tgl", "heb", "ceb", "hbs", "azj", "mul")} == {
        **{"deu": "de", "nob": "nb", "tgl": "tl", "heb": "he"},
        **{"ceb": None, "hbs": None, "azj": None, "mul": None},
    }
    # ISO 639-1 has 183 codes.
    codes = {code for code in Locale("en").languages if len(code) == 2} - {"sh"}
    three = {langcodes.Language.get(code, normalize=False).to_alpha3() for code in codes}
    assert len(three) == 183 and {iso639_1(code) for code in three} == codes


def test_names() -> None:
    expected = {"deu": "German", "ceb": "Cebuano", "hbs": "Serbo-Croatian", "qqq": "qqq"}
    assert {code: language_name(code) for code in expected} == expected


@pytest.mark.parametrize(
    ("stem", "among", "expected"),
    [
        ("webfaq_kor", [], ["kor"]),
        ("mqa_ko", [], ["kor"]),
        ("mqa_no", [], ["nor"]),
        ("webfaq_tgl", [], ["tgl"]),
        ("mrtidy_korean", [], ["kor"]),
        ("nordic_sts_norwegian", [], ["nor"]),
        ("mlsum_retrieval_de", [], ["deu"]),
        ("mqa_ko_part2", [], ["kor"]),
        ("paracrawl_tl-en", [], ["tgl", "eng"]),
        ("paracrawl_azj-en", [], ["azj", "eng"]),
        ("unpc_ar2en", [], ["ara", "eng"]),
        # Only languages that are asked for; `tw` is Twi, too.
        ("mkqa_zh_tw", ["zho", "eng"], ["zho"]),
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
def test_languages_that_a_name_ends_with(stem: str, among: Sequence[str], expected: list[str]) -> None:
    assert languages_in_name(stem, among) == expected


@pytest.mark.parametrize(
    "stem",
    [
        *("komagpie", "ko", "paq_part2", "csn_go", "natural_reasoning", "arxiv_clustering_p2p", "a_", ""),
        *("synthetic_text2sql", "xcodeeval_code2code_C#", "xcodeeval_nl2code_PHP"),
        *("mix_ko-en-de", "mix_ko-", "mix_qqzz"),
    ],
)
def test_name_without_a_language(stem: str) -> None:
    assert languages_in_name(stem) == []
