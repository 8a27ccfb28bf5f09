from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.data.manifest import load_manifest
from training.evaluation.adaptation import split_program, table


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Messages of two programs in two languages; ``quit`` has one English text that ``edit`` has, too."""
    rows = [
        (f"{lang} {program} {n}", f"{program} {n}", lang, "Latn", program)
        for program, size in (("edit", 40), ("quit", 8))
        for n in range(size)
        for lang in ("deu", "fra")
    ]
    rows.append(("deu fort", "edit 1", "deu", "Latn", "quit"))
    names = ("query", "passage", "lang", "script", "domain")
    pq.write_table(
        pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)}), tmp_path / "held_out.parquet"
    )
    return tmp_path / "held_out.parquet"


def _passages(path: Path) -> set[str]:
    return set(pq.read_table(path).column("passage").to_pylist())


def test_no_text_is_on_two_sides(tmp_path: Path, held_out: Path) -> None:
    assert split_program(held_out, tmp_path / "data", None) == "edit"
    trained, tested, elsewhere = (
        _passages(tmp_path / "data" / f"{name}.parquet") for name in ("train", "program", "elsewhere")
    )
    assert trained | tested == {f"edit {n}" for n in range(40)} and len(tested) == 12
    assert not trained & tested and elsewhere == {f"quit {n}" for n in range(8)}


def test_negatives_are_other_texts_of_the_training(tmp_path: Path, held_out: Path) -> None:
    split_program(held_out, tmp_path / "data", "edit")
    (source,) = load_manifest(tmp_path / "data/manifest.yaml")
    rows = pq.read_table(source.files[0]).to_pylist()
    trained = {row["passage"] for row in rows}
    negatives = [(row["passage"], row[f"negative_{k}"]) for row in rows for k in range(1, 5)]
    assert all(negative in trained and negative != passage for passage, negative in negatives)


def test_the_split_is_repeatable(tmp_path: Path, held_out: Path) -> None:
    for folder in ("one", "other"):
        split_program(held_out, tmp_path / folder, "edit")
    assert _passages(tmp_path / "one/program.parquet") == _passages(tmp_path / "other/program.parquet")


def test_an_unknown_program_is_refused(tmp_path: Path, held_out: Path, refuses: Callable) -> None:
    with refuses(held_out, "edit, quit", "--program"):
        split_program(held_out, tmp_path / "data", "emacs")


def test_the_table_names_every_model() -> None:
    written = table("edit", {"before": {"program": 0.25, "elsewhere": 0.5, "megabytes": 17.0}})
    assert "| before | 0.250 | 0.500 | 17.00 MB |" in written and "messages of edit" in written
