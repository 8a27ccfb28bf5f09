"""The page holds its tables and figures and loads nothing, and Markdown and JSON have the same content."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.training.evaluation.synthetic import evaluation, many_languages
from training.evaluate import main
from training.evaluation.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """The tables of a page by title, the number of its figures, and all that it would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.fetched: list[str] = []
        self.figures, self._title, self._inside = 0, "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.figures += tag == "svg"
        self._inside = tag
        if tag == "h2":
            self._title = ""
        if tag == "table":
            self.tables[self._title] = []
        if tag == "tr":
            self.tables[self._title].append([])
        if tag in ("td", "button"):
            self.tables[self._title][-1].append("")
        values = [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        self.fetched += [value for value in values if not value.startswith(("#", "data:"))]
        assert tag not in ("link", "iframe", "img")

    def handle_data(self, data: str) -> None:
        if self._inside == "h2":
            self._title += data.strip()
        elif self._inside in ("td", "button"):
            self.tables[self._title][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    rows = {"deu": 1000, "fra": 5}
    write_report(evaluation(many_languages()), folder, compare=("large", "small"), rows=rows, title="A <small> & large")
    return folder


def test_the_page_has_every_table_and_figure_and_loads_nothing(written: Path) -> None:
    page, text = Page(written / "report.html"), (written / "report.html").read_text(encoding="utf-8")
    assert page.figures == 4 and not page.fetched and "url(http" not in text and "@import" not in text
    assert "<h1>A &lt;small&gt; &amp; large</h1>" in text
    tables, of_large = page.tables, "large, 64 dimensions, float32: "
    assert len(tables[f"{of_large}languages"]) > 100
    assert len(tables[f"{of_large}the 10 worst languages"]) == 11
    assert {row[0] for row in tables[f"{of_large}bitexts"][1:]} == {"English-centred", "any-to-any"}
    assert [row[0] for row in tables[f"{of_large}resource classes, by share of training rows"][1:]] == ["none"]
    assert len(tables[f"{of_large}scripts"]) > 15
    assert tables["large (first) against small (second)"][-1][-1] == "the first is better"
    # Two models, three tasks, two widths, two precisions.
    assert len(tables["Dimensions and precisions"]) == 1 + 2 * 3 * 4
    assert ["small", "Names", "16", "binary", "2"] in [row[:5] for row in tables["Dimensions and precisions"]]
    assert tables["Failed"][1] == ["<Broken & task>", "offline"]


def test_numbers_are_those_of_the_evaluation(tmp_path: Path) -> None:
    made = evaluation()
    write_report(made, tmp_path)
    named = [score.value for score in made.select(model="small", task="Names", dimension=64, precision="float32")]
    tasks = Page(tmp_path / "report.html").tables["small, 64 dimensions, float32: tasks"]
    (row,) = [row for row in tasks if row[0] == "Names"]
    assert row[3] == f"{100 * sum(named) / len(named):.1f}" and float(row[4]) < float(row[3]) < float(row[5])


def test_markdown_and_json_have_the_same_content(written: Path) -> None:
    page, text = Page(written / "report.html"), (written / "report.md").read_text(encoding="utf-8")
    assert [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")] == list(page.tables)
    for rows in page.tables.values():
        assert all(f"| {' | '.join(row)} |" in text for row in rows[1:])
    content = json.loads((written / "report.json").read_text())
    assert content["comparison"]["verdict"] == "the first is better"
    assert [len(summary["worst"]) for summary in content["summaries"]] == [10, 10]
    for image in ("dimensions.png", "pareto.png", "languages-0.png"):
        assert f"]({image})" in text and (written / image).stat().st_size


def test_the_command_writes_it_again_with_a_comparison_and_the_curves_of_a_run(tmp_path: Path, capsys) -> None:
    evaluation().save(tmp_path)
    log = [{"step": step, "loss_source/names": 1 / step, "eval_source/names": 2 / step} for step in range(1, 5)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    options = ["--run", str(tmp_path), "--compare", "large", "small", "--output", str(tmp_path / "page")]
    assert main(["--report", str(tmp_path), *options]) == 0
    shown = capsys.readouterr().out
    assert "large (first) against small (second)" in shown and shown.endswith(f"{tmp_path / 'page/report.html'}\n")
    assert Page(tmp_path / "page/report.html").figures == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([".", "--compare", "large", "huge"], "no scores of model 'huge'"),
        ([".", "--run", "none"], "none"),
        ([".", "--manifest", "none.yaml"], "none.yaml"),
        (["nowhere"], "holds no whole evaluation"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path: Path, capsys, monkeypatch) -> None:
    evaluation().save(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["--report", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_and_sorts_it(written: Path, tmp_path: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    click = "document.querySelector('table:nth-of-type(2) th:last-child button').click()"
    (tmp_path / "page.html").write_text(text.replace("</body>", f"<script>{click}</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", (tmp_path / "page.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    (tmp_path / "shown.html").write_text(shown)
    assert 'aria-sort="ascending"' in shown and Page(tmp_path / "shown.html").figures == 4
