"""The page holds its tables and figures and loads nothing; Markdown and JSON have the same content; scores of pairs."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from modeling_f2llm.sentence_transformer import build_sentence_transformer
from tests.training.evaluation.synthetic import evaluation, many_languages
from training.evaluate import main
from training.evaluation.pairs import Pairs, encode_pairs, evaluate_pairs
from training.evaluation.report import language_scores, table, usage, write_report


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


@pytest.fixture
def encoded(tiny_model, tiny_tokenizer, sentences):
    queries = [*sentences, *(text[: len(text) // 2] for text in sentences)]
    languages = ["en", "en", "de", "fr", "zh", "ja", "ru", "ar", "hi", "ko"] * 2
    scripts = ["Latn"] * 4 + ["Hans", "Jpan", "Cyrl", "Arab", "Deva", "Hang"]
    pairs = Pairs(queries, list(sentences), [(row % 10,) for row in range(20)], languages, scripts * 2)
    return encode_pairs(build_sentence_transformer(tiny_model, tiny_tokenizer), pairs)


def scores_of(encoded, dim, precision="float32"):
    return language_scores("model", encoded.pairs, encoded.hits(dim, precision), dim, precision)


@pytest.mark.parametrize("dim", [32, 8])
def test_the_scores_of_languages_average_to_the_accuracy_over_pairs(encoded, dim):
    assert encoded.texts_per_second > 0 and encoded.queries.shape == (20, 32) and encoded.candidates.shape == (10, 32)
    expected = evaluate_pairs(encoded, np.zeros(20, bool), [32, 8])["accuracy"][str(dim)]
    scores, examples = scores_of(encoded, dim)
    assert {score.subset for score in scores} >= {"eng-Latn", "zho-Hans", "kor-Hang"} and len(scores) == 9
    assert sum(score.value * score.examples for score in scores) / 20 == pytest.approx(expected, abs=1e-4)
    for score in scores:
        assert examples[score.key].mean() == pytest.approx(score.value, abs=1e-6)
        assert len(examples[score.key]) == score.examples == (4 if score.subset == "eng-Latn" else 2)
    # Languages may have other names.
    named = replace(encoded.pairs, languages=["Klingon!", *encoded.pairs.languages[1:]])
    assert "Klingon!-Latn" in {score.subset for score in scores_of(replace(encoded, pairs=named), dim)[0]}


def test_fewer_bits_are_other_scores_of_the_same_pairs_and_scripts_are_in_the_table(encoded):
    found = {precision: scores_of(encoded, 32, precision)[0] for precision in ("float32", "int8", "binary")}
    keys = {precision: {score.key for score in scores} for precision, scores in found.items()}
    assert not keys["float32"] & keys["int8"] and not keys["int8"] & keys["binary"]
    for full, stored in zip(found["float32"], found["int8"], strict=True):
        # Queries are compared with the decoded candidates: a thousandth does not change the ranks here.
        assert (full.subset, full.value) == (stored.subset, stored.value)
    shown = table(evaluate_pairs(encoded, np.arange(20) % 2 == 0, [32, 8]), most_scripts=2)
    assert "TF-IDF       0.500" in shown and "Latn" in shown and len(shown.splitlines()) == 8


def test_the_lines_to_use_a_model_rank_by_cosine_at_the_narrowest_width_that_keeps_95_percent(
    encoded, tmp_path, capsys, tiny_model, tiny_tokenizer
):
    model = build_sentence_transformer(tiny_model, tiny_tokenizer)
    model.save_pretrained(str(tmp_path / "model"))
    pairs = encoded.pairs
    code = usage(tmp_path / "model", pairs, {"32": 0.2, "8": 0.2})
    assert "truncate_dim=8)" in code
    exec(code, {})
    query, passages = model.encode_query(pairs.queries[0])[:8], model.encode_document(pairs.candidates[:3])[:, :8]
    cosines = passages @ query / np.linalg.norm(passages, axis=1) / np.linalg.norm(query)
    printed = [float(number) for number in re.findall(r"-?\d\.\d+", capsys.readouterr().out)]
    assert printed == pytest.approx(cosines.tolist(), abs=1e-3)
    assert (np.abs(passages @ query - cosines) > 1e-2).any()
    long = Pairs(["q" * 500], ["a" * 500, "b", "c", "d"], [(3,)])
    for narrow, shown in ((0.19, True), (0.18, False)):
        code = usage(tmp_path / "it's", long, {"32": 0.2, "16": narrow, "8": 0.0})
        compile(code, "usage", "exec")
        assert ("truncate_dim=16" in code) == shown and max(map(len, code.splitlines())) < 200
        assert "['d', '" in code and f"{'a' * 59}…" in code
