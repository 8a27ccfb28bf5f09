"""A summary's means are those of plain loops over the scores; classes follow the rows of the manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.training.evaluation.synthetic import evaluation, score
from training.evaluation.records import Evaluation
from training.evaluation.summary import languages_of, resource_class, summarize, training_rows

PUBLISHED = Path(__file__).parents[3] / "training" / "data" / "manifests"
HAND = Evaluation(
    scores=[
        score(("deu-Latn",), 10, value=0.2),
        score(("rus-Cyrl",), 30, value=0.6),
        score(("eng-Latn", "deu-Latn"), 10, task="Pairs", task_type="BitextMining", value=0.4),
        score(("deu-Latn", "rus-Cyrl"), 50, task="Pairs", task_type="BitextMining", value=0.9),
        score(("eng-Latn",), 100, task="Pairs", value=1.0),
    ]
)


def test_languages_scripts_classes_and_means_by_hand():
    summary = summarize(HAND, "small", {"deu": 999_000, "rus": 500})
    # German: retrieval 0.2, bitexts (0.4 + 0.9) / 2; Russian: 0.6 and 0.9; English: its own texts alone.
    german = (0.2 + 0.65) / 2
    found = [(group.name, group.macro) for group in (*summary.languages, *summary.scripts)]
    assert found[:3] == [("deu-Latn", pytest.approx(german)), ("rus-Cyrl", 0.75), ("eng-Latn", 1.0)]
    assert found[3:] == [("Latn", pytest.approx((german + 1.0) / 2)), ("Cyrl", 0.75)]
    assert [group.name for group in summary.classes] == ["high", "low", "none"]
    latin = next(group for group in summary.scripts if group.name == "Latn")
    assert (latin.languages, latin.examples) == (2, 170)
    assert summary.macro == pytest.approx(((0.2 + 0.6) / 2 + (0.4 + 0.9 + 1.0) / 3) / 2)
    assert summary.micro == pytest.approx((0.2 * 10 + 0.6 * 30 + 0.4 * 10 + 0.9 * 50 + 100) / 200)
    assert summary.language_macro == pytest.approx((0.425 + 0.75 + 1.0) / 3)
    assert summarize(HAND, "small").classes == []


def test_languages_of_a_score():
    assert languages_of(score(("eng-Latn", "deu-Latn"))) == ("deu-Latn",)
    assert languages_of(score(("deu-Latn", "rus-Cyrl"))) == ("deu-Latn", "rus-Cyrl")
    assert languages_of(score(("eng-Latn", "eng-Latn"))) == ("eng-Latn",)
    assert languages_of(score(("a", "b", "c"))) == languages_of(score(())) == ()


def test_tasks_have_intervals_where_examples_have_scores():
    made = evaluation()
    tasks = {task.task: task for task in summarize(made, "large").tasks}
    scores = made.select(model="large", task="Names", dimension=64, precision="float32")
    mean, names = np.mean([made.examples[found.key].mean() for found in scores]), tasks["Names"]
    assert tasks["Groups"].interval is None
    assert names.value == pytest.approx(mean) == names.interval.mean and names.interval.low < mean < names.interval.high


ROWS = {"eng": 9_890, "isl": 50, "fao": 5, "srp-Cyrl": 5, "srp-Latn": 50, "tlh": 0}
# Rows without script count for each script.
MIXED = {"deu": 2, "deu-Latn": 98, "srp-Cyrl": 1, "srp": 1, "eng": 99_898}


@pytest.mark.parametrize(
    ("language", "rows", "expected"),
    [
        *[("eng-Latn", ROWS, "high"), ("isl-Latn", ROWS, "middle"), ("srp-Latn", ROWS, "middle")],
        *[("fao-Latn", ROWS, "low"), ("srp-Cyrl", ROWS, "low"), ("tlh-Latn", ROWS, "none")],
        *[("deu-Latn", MIXED, "middle"), ("deu-Runr", MIXED, "low")],
    ],
)
def test_classes_are_shares_of_the_rows(language, rows, expected):
    assert resource_class(language, rows) == expected


def _manifest(folder, *sources):
    shared = {"task_type": "retrieval", "instruction": "Find it"}
    path = folder / "manifest.yaml"
    path.write_text(yaml.safe_dump({"sources": [{**shared, **source} for source in sources]}), encoding="utf-8")
    return path


def _source(name, *languages, files="", **more):
    return {"name": name, "files": files or f"{name}.parquet", "languages": list(languages), **more}


def _write(folder, name, *counts, columns=("lang", "script")):
    rows = [cells for count, *cells in counts for _ in range(count)]
    more = {column: [cells[number] for cells in rows] for number, column in enumerate(columns)}
    pq.write_table(pa.table({"query": ["q"] * len(rows), "passage": ["p"] * len(rows), **more}), folder / name)


def test_rows_are_those_of_the_files_under_their_caps_or_the_published_ones(tmp_path):
    for name, count in (("a", 30), ("b", 50), ("c", 70)):
        _write(tmp_path, f"{name}.parquet", (count,), columns=())
    sources = [_source("a", "deu"), _source("b", "fra", cap=20), _source("c", "deu", "fra", "rus")]
    assert training_rows(_manifest(tmp_path, *sources)) == {"deu": 30, "fra": 20}
    rows = training_rows(next(PUBLISHED.glob("*.yaml")))
    assert resource_class("eng-Latn", rows) == "high" and len(rows) > 20


def test_files_have_the_languages_of_sources_in_several(tmp_path):
    _write(tmp_path, "a_0.parquet", (20, "de", "Latn"), (9_000, "sr", "Cyrl"), (1_000, "sr", "Latn"))
    _write(tmp_path, "a_1.parquet", (9_979, "fra", "Latn"), (1, "isl", None), (20, None, None))
    _write(tmp_path, "b.parquet", (3, "zh-Hant"), (4, "pt-BR"), columns=("lang",))
    _write(tmp_path, "c.parquet", (5, "de"), columns=("lang",))
    several = _source("a", "deu", "fra", "srp", files="a_*.parquet", cap=1000)
    # A twentieth of the first source's rows; the manifest's language of a source in one language counts.
    assert training_rows(_manifest(tmp_path, several, _source("b"), _source("c", "nld"))) == {
        **{"deu-Latn": 1, "srp-Cyrl": 450, "srp-Latn": 50, "fra-Latn": 499, "isl": 1},
        **{"zho-Hant": 3, "por": 4, "nld": 5},
    }


def test_missing_and_unknown_languages_are_refused(tmp_path, refuses):
    with refuses("has no rows by language"):
        training_rows(_manifest(tmp_path, _source("a")))
    _write(tmp_path, "a.parquet", (2, "de"), (1, "English"), columns=("lang",))
    with refuses(tmp_path / "a.parquet", "column 'lang' holds 'English'"):
        training_rows(_manifest(tmp_path, _source("a")))
