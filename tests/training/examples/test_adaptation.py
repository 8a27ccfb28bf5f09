from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.config.recipe import load_recipe
from training.data.manifest import load_manifest
from training.examples.adaptation import RECIPE, another, compare_by_text, split_program, table


@pytest.fixture
def held_out(tmp_path):
    """Messages of two programs in two languages; ``quit`` has one English text that ``edit`` has, too."""
    rows = [
        {"query": f"{lang} {program} {n}", "passage": f"{program} {n}", "lang": lang, "domain": program}
        for program, size in (("edit", 40), ("quit", 8))
        for n in range(size)
        for lang in ("deu", "fra")
    ]
    rows.append({"query": "deu fort", "passage": "edit 1", "lang": "deu", "domain": "quit"})
    pq.write_table(pa.Table.from_pylist([{**row, "script": "Latn"} for row in rows]), tmp_path / "held_out.parquet")
    return tmp_path / "held_out.parquet"


@pytest.fixture
def data(tmp_path, held_out):
    assert split_program(held_out, tmp_path / "data", None, held_out) == "edit"
    return tmp_path / "data"


def _passages(path):
    return set(pq.read_table(path).column("passage").to_pylist())


def test_no_text_is_on_two_sides_and_the_split_is_repeatable(data, held_out, tmp_path, refuses):
    names = ("train", "program", "elsewhere_validation", "elsewhere")
    trained, tested, validation, elsewhere = (_passages(data / f"{name}.parquet") for name in names)
    assert trained | tested == {f"edit {n}" for n in range(40)} and len(tested) == 12
    assert not trained & tested and not validation & elsewhere
    assert validation and elsewhere and validation | elsewhere == {f"quit {n}" for n in range(8)}
    with refuses(held_out, "edit, quit", "--program"):
        split_program(held_out, tmp_path / "other", "emacs", held_out)
    split_program(held_out, tmp_path / "other", "edit", held_out)
    assert _passages(tmp_path / "other/program.parquet") == tested


def test_only_stages_that_replay_read_the_replayed_source_and_negatives_are_other_texts(data):
    for stage in load_recipe(RECIPE, {"manifest": str(data / "manifest.yaml")}).stages:
        sources = load_manifest(data / "manifest.yaml", stage=stage.arguments.manifest_stage)
        assert ("replayed" in [source.name for source in sources]) == stage.name.endswith("_replay")
    (source,) = load_manifest(data / "manifest.yaml", stage="alone")
    assert source.name == "edit"
    rows = pq.read_table(source.files[0]).to_pylist()
    trained = {row["passage"] for row in rows}
    negatives = [(row["passage"], row[f"negative_{k}"]) for row in rows for k in range(1, 5)]
    assert all(negative in trained and negative != passage for passage, negative in negatives)
    # Another spelling of the passage is not a negative.
    texts = ["File", "FILE", "file.", "Edit"]
    assert [another(texts, start, "file") for start in range(4)] == ["Edit"] * 4
    assert another(texts, 3, "Quit") == "Edit"


def test_the_change_is_that_over_messages_and_translations_of_one_text_count_once():
    labels, before = np.array([7, 7, 7, 2]), np.array([1.0, 0.0, 1.0, 0.0])
    compared = compare_by_text(np.ones(4), before, labels)
    assert compared.difference.mean == pytest.approx(0.5) and compared.first == 1.0
    assert compared.difference.examples == 2
    rng = np.random.default_rng(0)
    after, before = (rng.integers(2, size=200).astype(float) for _ in range(2))
    once = compare_by_text(after, before, np.arange(200)).difference
    tenfold = compare_by_text(after.repeat(10), before.repeat(10), np.arange(200).repeat(10)).difference
    assert (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high))


def test_the_table_has_both_measures_with_the_change_of_each():
    before = {"program": {"accuracy": 0.25}, "elsewhere": {"accuracy": 0.5}, "megabytes": 17.0}
    change = {"accuracy": 0.375, "change": 0.125, "low": 0.1, "high": 0.15}
    written = table("edit", {"before": before, "full": {**before, "program": change}})
    assert "| before | 0.250 |  | 0.500 |  | 17.00 MB |" in written
    assert "| full | 0.375 | +12.5 (+10.0 to +15.0) | 0.500 |" in written
    # Validating does not show the program.
    validated = table("edit", {"before": {name: before[name] for name in ("elsewhere", "megabytes")}})
    assert "| before | not measured |  | 0.500 |" in validated
