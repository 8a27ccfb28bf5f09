"""The page holds its tables and figures and loads nothing, and Markdown and JSON have the same content."""

from __future__ import annotations

import html
import json
import re

import pytest

from tests.training.evaluation.synthetic import evaluation, many_languages
from training.evaluate import main
from training.evaluation.report import write_report


class Page:
    """The tables of a page by title, and the number of its figures."""

    def __init__(self, path):
        self.text = path.read_text(encoding="utf-8")
        parts = re.split("<h2>(.*?)</h2>", self.text)[1:]
        self.tables = {
            html.unescape(title): [
                [html.unescape(cell) for cell in re.findall("<t[dh][^>]*>(.*?)</t[dh]>", row)]
                for row in re.findall("<tr>(.*?)</tr>", part, re.DOTALL)
            ]
            for title, part in zip(parts[::2], parts[1::2], strict=True)
        }
        self.figures = self.text.count("<svg")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rows = {"deu": 1000, "fra": 5}
    write_report(evaluation(many_languages()), folder, compare=("large", "small"), rows=rows, title="A <small> & large")
    return folder


def test_the_page_has_every_table_and_figure_and_loads_nothing(written):
    page = Page(written / "report.html")
    assert page.figures == 4 and "<h1>A &lt;small&gt; &amp; large</h1>" in page.text
    assert not re.search(r"<(script|link|iframe|img)|url\(http|@import|(src|href|srcset)=\"(?![#d])", page.text)
    tables, of_large = page.tables, "large, 64 dimensions, float32: "
    assert len(tables[f"{of_large}languages"]) > 100
    assert [row[0] for row in tables[f"{of_large}resource classes, by share of training rows"][1:]] == ["none"]
    assert len(tables[f"{of_large}scripts"]) > 15
    assert tables["large (first) against small (second)"][-1][-1] == "the first is better"
    # Two models, three tasks, two widths, two precisions.
    assert len(tables["Dimensions and precisions"]) == 1 + 2 * 3 * 4
    views = [row[:6] for row in tables["Dimensions and precisions"]]
    assert ["small", "Names", "16", "binary", "2", "ndcg_at_10"] in views
    assert tables["Failed"][1] == ["<Broken & task>", "offline"]
    fields = {"model": "large", "task": "Names", "dimension": 64, "precision": "float32"}
    named = [score.value for score in evaluation(many_languages()).select(**fields)]
    (row,) = [row for row in tables[f"{of_large}tasks"] if row[0] == "Names"]
    assert row[3] == f"{100 * sum(named) / len(named):.1f}" and float(row[4]) < float(row[3]) < float(row[5])


def test_markdown_and_json_have_the_same_content(written):
    page, text = Page(written / "report.html"), (written / "report.md").read_text(encoding="utf-8")
    assert [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")] == list(page.tables)
    for rows in page.tables.values():
        assert all(f"| {' | '.join(row)} |" in text for row in rows[1:])
    content = json.loads((written / "report.json").read_text())
    assert content["comparison"][-1]["verdict"] == "the first is better"
    assert [len(summary["languages"]) for summary in content["summaries"]] == [len(many_languages())] * 2
    for image in ("dimensions.png", "pareto.png", "languages-0.png"):
        assert f"]({image})" in text and (written / image).stat().st_size


def test_the_command_writes_it_again_with_a_comparison_and_the_curves_of_a_run(tmp_path, capsys):
    evaluation().save(tmp_path)
    log = [{"step": step, "loss_source/names": 1 / step, "eval_source/names": 2 / step} for step in range(1, 5)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    options = ["--run", str(tmp_path), "--compare", "large", "small", "--output", str(tmp_path / "page")]
    assert main(["--report", str(tmp_path), *options]) == 0
    shown = capsys.readouterr().out
    assert "large (first) against small (second)" in shown and shown.endswith(f"{tmp_path / 'page/report.html'}\n")
    assert Page(tmp_path / "page/report.html").figures == 5
    for words, message in (
        (["--compare", "large", "huge"], "model 'huge' is unknown; there are large"),
        (["--run", "none"], "none"),
        (["--manifest", "none.yaml"], "none.yaml"),
    ):
        assert main(["--report", str(tmp_path), *words]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
