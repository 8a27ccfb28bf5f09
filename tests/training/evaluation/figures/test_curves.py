"""The curves are those of the newest log, a panel a source, with one legend for all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from training.evaluation.figures.curves import Curves, curves_figure, draw_curves, load_curves

Refuses = Callable[..., AbstractContextManager[None]]


def curves(sources: int, steps: int = 40) -> Curves:
    """The losses fall; every third source has no validation, and later sources have higher losses."""
    found: Curves = {}
    for number in range(sources):
        line = [(step, 2 * math.exp(-step / 20) + number / 100) for step in range(1, steps + 1)]
        found[f"data/source-{number:02}"] = {"training": line}
        if number % 3 != 2:
            found[f"data/source-{number:02}"]["validation"] = [(step, loss + 0.2) for step, loss in line[9::10]]
    return found


def write_log(folder: Path, *lines: dict[str, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": lines}))


def test_lines_of_the_log_are_parted_by_source_and_kind(tmp_path: Path) -> None:
    write_log(
        tmp_path,
        {"step": 10, "loss": 1.0, "loss_source/a/b": 2.0, "loss_source/c": 3.0, "loss_retrieval": 9.0},
        {"step": 20, "eval_source/a/b": 1.5, "eval_loss": 1.5},
        {"step": 20, "loss_source/a/b": 1.0},
    )
    assert load_curves(tmp_path) == {
        "a/b": {"training": [(10, 2.0), (20, 1.0)], "validation": [(20, 1.5)]},
        "c": {"training": [(10, 3.0)]},
    }


def test_the_runs_own_log_comes_before_its_newest_checkpoint(tmp_path: Path) -> None:
    for folder, loss in (("checkpoint-900", 9.0), ("checkpoint-1000", 10.0)):
        write_log(tmp_path / folder, {"step": 1, "loss_source/a": loss})
    (tmp_path / "checkpoint-2000").mkdir()
    assert load_curves(tmp_path) == {"a": {"training": [(1, 10.0)]}}
    write_log(tmp_path, {"step": 1, "loss_source/a": 0.0})
    assert load_curves(tmp_path) == {"a": {"training": [(1, 0.0)]}}


def test_logs_that_cannot_be_read_are_refused(tmp_path: Path, refuses: Refuses) -> None:
    with refuses(tmp_path, "no trainer_state.json"):
        load_curves(tmp_path)
    for content in ("{", "[]", "{}", '{"log_history": [{"loss_source/a": 1}]}', '{"log_history": [3]}'):
        (tmp_path / "trainer_state.json").write_text(content)
        with refuses(tmp_path / "trainer_state.json", "holds no log"):
            load_curves(tmp_path)


@pytest.mark.parametrize(("sources", "columns"), [(1, 1), (2, 2), (4, 2), (6, 3), (12, 4), (20, 5), (30, 5), (58, 5)])
def test_every_source_has_a_panel_and_all_have_one_legend(sources: int, columns: int) -> None:
    made = curves(sources)
    figure = curves_figure(made)
    assert len(figure.axes) == sources
    for axes, (source, kinds) in zip(figure.axes, sorted(made.items()), strict=True):
        assert axes.get_title() == source.removeprefix("data/")
        assert [list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()] == list(kinds.values())
        assert axes.get_legend() is None
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["training", "validation"]
    assert (figure.get_supxlabel(), figure.get_supylabel(), figure.get_suptitle()) == (
        "training step",
        "loss (nats)",
        "",
    )
    assert len({axes.get_subplotspec().colspan.start for axes in figure.axes}) == columns


@pytest.mark.parametrize("sources", [1, 5, 6, 30])
def test_nothing_overlaps_or_is_cut(sources: int) -> None:
    made = {f"{name}-of-{40 * 'many-words-'}"[:60]: kinds for name, kinds in curves(sources).items()}
    figure = curves_figure(made)
    figure.draw_without_rendering()
    titles = [axes.title.get_window_extent() for axes in figure.axes]
    (legend,) = figure.legends
    boxes = [*titles, *(axes.bbox for axes in figure.axes), legend.get_window_extent()]
    for number, box in enumerate(boxes):
        assert figure.bbox.contains(*box.p0) and figure.bbox.contains(*box.p1)
        assert not box.count_overlaps(boxes[number + 1 :])


def test_every_column_ends_in_steps() -> None:
    figure = curves_figure(curves(8))
    labelled = [axes.xaxis.get_tick_params()["labelbottom"] for axes in figure.axes]
    assert labelled == [False] * 5 + [True] * 3


def test_of_too_many_sources_those_with_the_highest_loss_are_drawn() -> None:
    made = curves(70)
    made["data/source-00"]["validation"][-1] = (40, math.nan)
    figure = curves_figure(made)
    shown = {axes.get_title() for axes in figure.axes}
    # By the last validation, which is higher than the last loss of training.
    ordered = sorted(made, key=lambda source: -made[source].get("validation", made[source]["training"])[-1][1])
    expected = {"data/source-00", *[source for source in ordered if source != "data/source-00"][:59]}
    assert shown == {source.removeprefix("data/") for source in expected}
    assert figure.get_suptitle() == "60 of 70 sources: those whose last loss is the highest"


def test_a_legend_has_only_what_is_drawn() -> None:
    (legend,) = curves_figure({"a": {"validation": [(1, 2.0)]}}).legends
    assert [text.get_text() for text in legend.get_texts()] == ["validation"]


def test_files_are_the_same_when_drawn_twice(tmp_path: Path) -> None:
    write_log(tmp_path, *({"step": step, "loss_source/a": 1 / step, "eval_source/b": 1} for step in range(1, 9)))
    once, again = (draw_curves(tmp_path, tmp_path / each, "curves-0") for each in ("once", "again"))
    assert [path.name for path in once] == ["curves-0.svg", "curves-0.png"]
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_a_log_without_sources_gives_no_figure(tmp_path: Path) -> None:
    write_log(tmp_path, {"step": 1, "loss": 2.0})
    assert draw_curves(tmp_path, tmp_path / "figures") == [] and not (tmp_path / "figures").exists()
