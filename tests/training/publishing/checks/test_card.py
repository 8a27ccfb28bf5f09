"""Faults of the card."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.training.publishing.broken import BrokenRelease
from tests.training.publishing.releases import evaluate, write_release
from training.publishing.card import model_card
from training.publishing.checks import card
from training.publishing.checks.packed import PackedFolder

CARD = "README.md"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("library_name: sentence-transformers", "library_name: f2llm", "library_name of the header is 'f2llm'"),
        ("license: apache-2.0", "license: mit", "license of the header is 'mit'"),
        ("library_name: ", "favourite_colour: red\nlibrary_name: ", "does not know: favourite_colour"),
        ("library_name: ", "broken: [\nlibrary_name: ", "has a header that the Hub cannot read"),
        ("---\n", "", "has no header of YAML"),
        ("| dimensions | 32, 16, 8 |", "| dimensions | 32, 16 |", "dimensions: 32, 16 on the card"),
        ("stored as `float32`", "stored as `bfloat16`", "dtype: bfloat16 on the card, float32 in the record"),
        ("| tokens of a text | ", "| tokens | ", "does not say the tokens of a text"),
        ("<!-- verify: remote-code -->\n", "", "has no example remote-code"),
        ('AutoModel.from_pretrained("tiny")', 'AutoModel.from_pretrained("other")', "the examples load other, tiny"),
        ("Given a question", "Given some question", "the example transformers has another prompt"),
        ("import torch\n", "import torch as\n", "the example transformers is no Python"),
        ("## Limits", "![a figure](figures/none.svg)\n\n## Limits", "links to figures/none.svg, which is not there"),
    ],
)
def test_a_fault(broken: BrokenRelease, old: str, new: str, said: str) -> None:
    broken.replace(CARD, old, new)
    broken.expect((CARD, said))


def test_links_elsewhere_and_in_code_are_left_alone(broken: BrokenRelease) -> None:
    text = "[a](https://example.org/x) [b](#limits) `[c](nowhere)`\n\n```\n[d](nowhere)\n```\n\n[e](LICENSE)\n"
    broken.replace(CARD, "## Limits", f"{text}\n## Limits")
    broken.expect()


def test_a_score_that_was_edited_is_found(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "tiny", evaluation=evaluate())
    text = model_card(folder, "org/tiny")
    (folder / "README.md").write_text(text)
    assert list(card.check_results(PackedFolder(folder))) == []
    section = text[text.index("## Results") :]
    row = next(line for line in section.splitlines() if line.startswith("| `"))
    score = re.search(r"\d+\.\d", row)[0]
    (folder / "README.md").write_text(text.replace(row, row.replace(score, "99.9")))
    (fault,) = card.check_results(PackedFolder(folder))
    assert "99.9" in str(fault) and score in str(fault)
    (folder / "README.md").write_text(text.replace(row + "\n", ""))
    assert len(list(card.check_results(PackedFolder(folder)))) == 1
