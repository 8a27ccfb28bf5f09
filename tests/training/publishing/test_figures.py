"""Figures of a packed model: from its own numbers, the same bytes each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.training.publishing.releases import NAME, evaluate, make_release, write_release
from training.publishing.figures import FIGURES, LOSSES, draw_figures, drawn_figures, save_losses

NAMES = ("curves-0", "curves-1", "dimensions", "languages", "pareto")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / FIGURES).iterdir())}


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    drawn = {}
    for name in ("one", "two"):
        folder = write_release(tmp_path / name, evaluation=evaluate())
        files = draw_figures(folder)
        drawn[name] = contents(folder)
        assert sorted(path.name for path in files) == sorted(drawn[name])
    assert drawn["one"] == drawn["two"]
    assert list(drawn["one"]) == [f"{name}.{kind}" for name in NAMES for kind in ("png", "svg")]
    assert b"<svg" in drawn["one"]["dimensions.svg"] and drawn["one"]["dimensions.png"].startswith(b"\x89PNG")


def test_dimensions_are_of_this_model_alone(tmp_path: Path) -> None:
    folder = write_release(tmp_path, evaluation=evaluate())
    draw_figures(folder)
    svg = (folder / FIGURES / "dimensions.svg").read_text()
    assert NAME in svg and "large" not in svg
    assert "large" in (folder / FIGURES / "pareto.svg").read_text()


def test_what_there_is_nothing_of_is_not_drawn_and_is_taken_away(tmp_path: Path) -> None:
    folder = write_release(tmp_path, evaluation=evaluate())
    draw_figures(folder)
    assert drawn_figures(folder)["curves"] == [
        {"stage": "stage1", "path": "figures/curves-0.png"},
        {"stage": "student", "path": "figures/curves-1.png"},
    ]
    (folder / LOSSES).unlink()
    (folder / "evaluation/scores.json").unlink()
    assert draw_figures(folder) == [] and contents(folder) == {}
    assert drawn_figures(folder) == {
        "dimensions": None,
        "languages": None,
        "learning": None,
        "pareto": None,
        "curves": [],
    }


def test_losses_are_kept_by_stage(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    log = [{"step": 5, "loss": 2.0, "loss_source/names": 2.0}, {"step": 9, "eval_loss": 1.0, "eval_source/names": 1.0}]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    folder = write_release(tmp_path / "packed", make_release(), losses=False)
    save_losses({"stage1": run, "pruned": tmp_path / "gone"}, folder)
    assert json.loads((folder / LOSSES).read_text()) == {
        "stage1": {"names": {"training": [[5, 2.0]], "validation": [[9, 1.0]]}}
    }
    assert [path.name for path in draw_figures(folder)] == ["curves-0.svg", "curves-0.png"]


def test_without_a_log_no_losses_are_kept(tmp_path: Path) -> None:
    save_losses({"stage1": tmp_path}, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_damaged_losses_are_named(tmp_path: Path, refuses: Any) -> None:
    folder = write_release(tmp_path)
    (folder / LOSSES).write_text("[")
    with refuses(str(folder / LOSSES)):
        draw_figures(folder)


def test_figures_need_matplotlib(tmp_path: Path, refuses: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with refuses("pip install matplotlib"):
        draw_figures(write_release(tmp_path, evaluation=evaluate()))
