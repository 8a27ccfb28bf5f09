"""Cards: templates rendered from plain data, with nothing left out in silence."""

from __future__ import annotations

import re

import pytest
from huggingface_hub import DatasetCard, DatasetCardData
from jinja2 import UndefinedError

from hub_cards.markdown import one_line
from hub_cards.metadata import header
from hub_cards.render import render_dataset_card
from tests.hub_cards.markdown_pages import HOSTILE, structure


@pytest.fixture
def facts():
    """The facts of a card of one source."""
    return {
        "metadata": "language:\n- en\npretty_name: Pandas\n",
        "name": "Pandas",
        "repository": "pandas",
        "rows": 1234,
        "size": "1 MB",
        "language_count": 1,
        "more_columns": ["origin"],
        "several_positives": True,
        "sources": [{"name": "bears", "rows": 1234}],
        "source_rows": [["bears", "retrieval", "no", "eng", None, 1234, 2, "Find a | b\n<b>bear</b>."]],
        "task_types": [["retrieval", 1, 1234, "100.0 %"]],
        "categories": [],
        "licences": [["not stated", 1, 1234]],
        "licence_note": None,
        "languages": [["eng", "English", 1234, "100.00 %"]],
        "faulty": [],
        "origin": None,
        "provenance": [],
        "contamination": None,
    }


def test_cells_hold_no_markup(facts):
    card = render_dataset_card(facts)
    assert "| bears | retrieval | no | eng | – | 1,234 | 2 | Find a \\| b &lt;b>bear&lt;/b>. |\n" in card
    assert "| `origin` |" in card


def test_tables_are_whole(facts):
    facts["contamination"] = {
        "rows": [["bears", 1234, 1, None, None, 2, 3, None]],
        "sets": [{"name": "exam", "texts": 5}],
        "unchecked": ["owls"],
    }
    facts["provenance"] = [["bears", "built", None, 3, "seed 0"]]
    facts["categories"] = [["QA", 1, 1234, "100.0 %"]]
    lines = render_dataset_card(facts).splitlines()
    heads = [number for number, line in enumerate(lines) if line.startswith("| ---")]
    assert len(heads) == 8
    for number in heads:
        # A table stands apart from the text, and its rows have as many cells as its head.
        end = next(place for place in range(number, len(lines)) if not lines[place].startswith("|"))
        assert lines[number - 2] == "" and lines[end] == "" and end > number + 1
        assert len({line.replace("\\|", "").count("|") for line in lines[number - 1 : end]}) == 1


def test_long_tables_are_folded(facts):
    assert "<details>" not in render_dataset_card(facts)
    facts["languages"] = [[f"q{number:02d}", "A language", 1, "1.00 %"] for number in range(41)]
    card = render_dataset_card(facts)
    assert "<summary>All 41 languages</summary>\n\n| code |" in card.replace("\n\n\n", "\n\n")
    assert card.count("<details>") == card.count("</details>") == 1


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_change_no_structure(facts, text):
    def card(added):
        named = [f"bears {added}", "retrieval", "no", "eng", added, 1234, 2, added]
        changed = {
            "metadata": header(DatasetCardData(pretty_name=f"Pandas {added}", license_name=added)),
            "name": f"Pandas {added}",
            "repository": f"pandas {added}",
            "more_columns": [f"origin {added}"],
            "sources": [{"name": f"bears {added}", "rows": 1234}],
            "source_rows": [named],
            "categories": [[added, 1, 1234, "100.0 %"]],
            "licences": [[added, 1, 1234]],
            "licence_note": f"The release is under {added}.",
            "faulty": [{"name": f"bears {added}", "rows": 3}],
            "origin": f"hf://{added}",
            "provenance": [[f"bears {added}", added, None, 3, added]],
            "contamination": {
                "rows": [[added, 1234, 1, None, None, 2, 3, None]],
                "sets": [{"name": f"exam {added}", "texts": 5}],
                "unchecked": [f"owls {added}"],
            },
        }
        return render_dataset_card(facts | changed)

    assert structure(card(text)) == structure(card("x"))
    read = DatasetCard(card(text)).data
    assert (read.pretty_name, read["license_name"]) == (one_line(f"Pandas {text}"), one_line(text))
    for block in re.findall(r"^```python\n(.*?)^```$", card(text), flags=re.MULTILINE | re.DOTALL):
        compile(block, "card", "exec")


def test_a_missing_fact_is_an_error(facts):
    del facts["licences"]
    with pytest.raises(UndefinedError, match="licences"):
        render_dataset_card(facts)
