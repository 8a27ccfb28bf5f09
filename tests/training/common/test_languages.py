"""Codes of languages, from one standard to another, and languages in the names of files."""

from __future__ import annotations

import langcodes
import pytest
from babel import Locale

from training.common.languages import iso639_1, language_name, languages_in_name


def test_two_letters_where_there_are_two():
    expected = {"deu": "de", "nob": "nb", "tgl": "tl", "heb": "he", "ceb": None, "hbs": None, "azj": None, "mul": None}
    assert {code: iso639_1(code) for code in expected} == expected
    # ISO 639-1 has 183 codes.
    codes = {code for code in Locale("en").languages if len(code) == 2} - {"sh"}
    three = {langcodes.Language.get(code, normalize=False).to_alpha3() for code in codes}
    assert len(three) == 183 and {iso639_1(code) for code in three} == codes
    expected = {"deu": "German", "ceb": "Cebuano", "hbs": "Serbo-Croatian", "qqq": "qqq"}
    assert {code: language_name(code) for code in expected} == expected


@pytest.mark.parametrize(
    ("stem", "among", "expected"),
    [
        *(("webfaq_kor", "", "kor"), ("mqa_no", "", "nor"), ("webfaq_tgl", "", "tgl"), ("mqa_ko_part2", "", "kor")),
        *(("nordic_sts_norwegian", "", "nor"), ("mlsum_retrieval_de", "", "deu"), ("unpc_ar2en", "", "ara eng")),
        *(("paracrawl_tl-en", "", "tgl eng"), ("paracrawl_azj-en", "", "azj eng")),
        # Only languages that are asked for; `tw` is Twi, too.
        *(("mkqa_zh_tw", "zho eng", "zho"), ("mkqa_zh_tw", "twi zho", "twi"), ("medqa_en", "eng zho", "eng")),
        *(("paracrawl_ko-en", "eng deu", ""), ("webfaq_kor", "deu", ""), ("csn_ruby", "zxx", "")),
        *(("webfaq_kor", "mul", "kor"), ("mkqa_zh_cn", "mul", "")),
        # Names without a language.
        *((stem, "", "") for stem in ("komagpie", "ko", "paq_part2", "csn_go", "natural_reasoning", "a_", "")),
        *((stem, "", "") for stem in ("arxiv_clustering_p2p", "synthetic_text2sql", "xcodeeval_code2code_C#")),
        *((stem, "", "") for stem in ("xcodeeval_nl2code_PHP", "mix_ko-en-de", "mix_ko-", "mix_qqzz")),
    ],
)
def test_languages_that_a_name_ends_with(stem, among, expected):
    assert languages_in_name(stem, among.split()) == expected.split()
