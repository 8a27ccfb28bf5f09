"""The lines over dimensions and bytes are the means over the tasks that were scored everywhere."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.training.evaluation.synthetic import evaluation, score
from training.evaluation.figures.dimensions import dimension_points, dimensions_figure, draw_dimensions
from training.evaluation.records import Evaluation, ModelRecord
from training.evaluation.selection import model_scores, task_mean

SWEEP = {"dimensions": (64, 32, 8), "precisions": ("binary", "float32")}


def test_points_are_means_by_precision_and_dimension() -> None:
    made = evaluation(**SWEEP)
    points = dimension_points(made, "small")
    assert {precision: [x for x, _ in line] for precision, line in points.items()} == {
        "float32": [8, 32, 64],
        "binary": [8, 32, 64],
    }
    for precision, line in points.items():
        for dimension, value in line:
            assert value == pytest.approx(100 * task_mean(model_scores(made, "small", dimension, precision)))


def test_a_task_counts_only_if_it_was_scored_everywhere() -> None:
    made = Evaluation(
        scores=[
            score(task="A", dimension=64, value=0.8),
            score(task="A", dimension=8, value=0.4),
            score(task="A", dimension=8, precision="int8", value=0.3),
            score(task="B", dimension=64, value=0.1),
            score(task="B", dimension=8, value=0.1),
        ]
    )
    points = dimension_points(made, "small")
    assert points == {"float32": [(8, pytest.approx(40)), (64, pytest.approx(80))], "int8": [(8, pytest.approx(30))]}
    assert dimension_points(made, "unknown") == {}


def test_bytes_are_those_of_a_packed_vector() -> None:
    figure = dimensions_figure(evaluation(qualities={"one": 0.8}, **SWEEP))
    left, right = figure.axes
    drawn = {
        axes.get_xlabel(): {line.get_label(): [int(x) for x in line.get_xdata()] for line in axes.get_lines()}
        for axes in (left, right)
    }
    assert drawn == {
        "dimensions kept (log scale)": {"float32": [8, 32, 64], "binary": [8, 32, 64]},
        "bytes per vector (log scale)": {"float32": [32, 128, 256], "binary": [1, 4, 8]},
    }
    assert left.get_ylabel() == "mean score over tasks (%)" and left.get_title("left") == "one"
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["float32", "binary"]


def test_tick_labels_do_not_overlap() -> None:
    dimensions = (8, 16, 32, 64, 128, 256, 320, 384)
    figure = dimensions_figure(evaluation(dimensions=dimensions, precisions=("float32", "int8", "binary")))
    figure.draw_without_rendering()
    # That of 320 has no room.
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == "8 16 32 64 128 256 384".split()
    for axes in figure.axes:
        labels = [label for label in axes.get_xticklabels() if label.get_text()]
        assert len(labels) >= 7
        # They are turned: their upper right corners are where they stand.
        ends = sorted(label.get_window_extent().x1 for label in labels)
        height = labels[0].get_fontsize() * figure.dpi / 72
        assert all(after - before > height for before, after in pairwise(ends))


def test_models_without_a_sweep_and_more_than_fit_are_left_out(tmp_path: Path) -> None:
    plain = evaluation(dimensions=(64,), precisions=("float32",))
    assert draw_dimensions(plain, tmp_path) == [] and not list(tmp_path.iterdir())
    many = evaluation(qualities={f"m{number}": 0.5 for number in range(8)}, **SWEEP)
    many.scores += [score(model="plain")]
    figure = dimensions_figure(many)
    assert len(figure.axes) == 12 and figure.get_suptitle() == "6 of 8 models"


def test_of_a_training_the_finished_model_is_drawn() -> None:
    made = evaluation(qualities={"m@step-1": 0.5, "m@step-2": 0.6, "m": 0.7}, **SWEEP)
    made.models = [ModelRecord("m", revision) for revision in ("step-1", "step-2", None)]
    assert [axes.get_title("left") for axes in dimensions_figure(made).axes] == ["m", ""]


def test_files_are_the_same_when_drawn_twice(tmp_path: Path) -> None:
    once, again = (draw_dimensions(evaluation(**SWEEP), tmp_path / each) for each in ("once", "again"))
    assert [path.name for path in once] == ["dimensions.svg", "dimensions.png"]
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]
