"""Codes of languages, from one standard to another."""

from __future__ import annotations

import langcodes
from babel import Locale

from training.common.languages import iso639_1, language_name


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
    assert [language_name(code) for code in ("deu", "ceb", "hbs", "qqq")] == [
        "German",
        "Cebuano",
        "Serbo-Croatian",
        "qqq",
    ]
