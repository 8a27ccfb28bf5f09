"""The examples that are checked in: made by the templates of now, with the figures that they show."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from huggingface_hub import ModelCard

from hub_cards.snippets import snippets
from hub_cards.update_examples import CHECKPOINT, EXAMPLES, update_examples
from tests.hub_cards.library_calls import expected_calls, library_calls
from tests.training.publishing.releases import evaluate, make_release, write_release
from training.common.errors import UserError
from training.publishing.evaluation import draw_figures


@pytest.fixture(scope="module")
def renewed(tmp_path_factory):
    """Examples of another model, which the templates of now make."""
    folder = write_release(tmp_path_factory.mktemp("packed"), make_release(trained_dtype=None), evaluate())
    draw_figures(folder)
    examples = tmp_path_factory.mktemp("examples")
    update_examples(folder, examples)
    return examples


def skeleton(path):
    """Headings, heads of tables, languages of code and names of figures, without what depends on the model."""
    text = re.sub(r"^(```\w*)\n.*?^```$", r"\1", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = []
    for line, after in pairwise([*ModelCard(text).text.splitlines(), ""]):
        if line.startswith(("```", "## ", "### ")):
            found.append(line)
        # Stages have columns of their own; the table of failures is there only if something failed.
        elif after.startswith("| ---") and line != "| task | reason |":
            found.append(" | ".join(cell for cell in line.strip("| ").split(" | ") if not cell.startswith("`")))
        # One figure a stage.
        elif line.startswith("!["):
            found.append(re.sub(r"-\d+|^!\[.*\]", "", line))
    return [line for place, line in enumerate(found) if line not in found[:place] or line.startswith("```")]


@pytest.mark.parametrize("name", ["README.md", CHECKPOINT])
def test_examples_are_those_of_the_templates(renewed, name):
    hint = "render them again: python hub_cards/update_examples.py PACKED"
    assert skeleton(EXAMPLES / name) == skeleton(renewed / name), hint


def test_the_figures_of_the_example_are_there():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\]\((figures/[^)]*)\)", text))
    assert shown == {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.glob("figures/*")} and shown


def test_the_code_of_the_examples_is_python():
    for name, count in (("README.md", 3), (CHECKPOINT, 1)):
        found = snippets((EXAMPLES / name).read_text(encoding="utf-8"))
        assert len(found) == count
        for code in found.values():
            compile(code, name, "exec")


def test_the_example_gives_other_libraries_its_prompt():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    prompt = "Instruct: Retrieve the English name.\nQuery: "
    assert library_calls(text) == expected_calls("example-org/f2llm-quickstart", prompt, "")


def test_a_model_that_was_not_trained_is_no_example(tmp_path):
    folder = write_release(tmp_path / "packed", make_release(stages=()), losses=False)
    with pytest.raises(UserError, match="pack a run that trained"):
        update_examples(folder, tmp_path / "examples")
    assert not (tmp_path / "examples").exists()


def test_examples_are_not_written_over_the_model(tmp_path):
    folder = write_release(tmp_path / "packed", make_release(trained_dtype=None), evaluate())
    draw_figures(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="is read"):
        update_examples(folder, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
