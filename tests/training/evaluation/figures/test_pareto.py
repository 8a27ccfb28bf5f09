"""The front is what nothing beats, and every model of a family can be told by its label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text

from tests.training.evaluation.synthetic import evaluation, score
from training.evaluation.figures.pareto import draw_pareto, pareto_figure, pareto_front
from training.evaluation.records import Evaluation, ModelRecord

# Name, parameters, texts per second, quality: a family and four models that others trained.
FAMILY = [
    ("org/F2LLM-v2-80M", 80e6, 2900, 0.52),
    ("org/F2LLM-v2-160M", 160e6, 2100, 0.55),
    ("org/F2LLM-v2-330M", 330e6, 1300, 0.58),
    ("org/F2LLM-v2-0.6B", 596e6, 800, 0.61),
    ("org/F2LLM-v2-1.7B", 1.72e9, 380, 0.64),
    ("org/F2LLM-v2-4B", 4.02e9, 150, 0.66),
    ("org/F2LLM-v2-8B", 7.57e9, 90, 0.68),
    ("org/F2LLM-v2-14B", 14e9, 50, 0.69),
    ("other/multilingual-e5-small", 118e6, 2500, 0.53),
    ("other/multilingual-e5-large-instruct", 560e6, 850, 0.605),
    ("other/Qwen3-Embedding-0.6B", 596e6, 790, 0.63),
    ("other/Qwen3-Embedding-8B", 7.57e9, 88, 0.685),
]


def of(models: list[tuple[str, float, float, float]]) -> Evaluation:
    records = [ModelRecord(name, None, int(parameters), 64, rate) for name, parameters, rate, _ in models]
    return Evaluation(records, [score(model=name, value=quality) for name, _, _, quality in models])


def beats(one: tuple[float, float], other: tuple[float, float], more_is_better: bool) -> bool:
    sign = 1 if more_is_better else -1
    no_worse = sign * one[0] >= sign * other[0] and one[1] >= other[1]
    return no_worse and one != other


@pytest.mark.parametrize("more_is_better", [False, True])
def test_the_front_is_what_no_other_point_beats(more_is_better: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        # Few values, so that many are equal.
        points = [tuple(point) for point in rng.integers(0, 6, (rng.integers(1, 12), 2)).tolist()]
        expected = {
            place
            for place, point in enumerate(points)
            if not any(beats(other, point, more_is_better) for other in points)
        }
        front = pareto_front(points, more_is_better)
        assert set(front) == expected and len(front) == len(expected)
        assert [points[place][0] for place in front] == sorted(points[place][0] for place in front)


def marked(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def test_points_are_costs_and_means_over_the_tasks_that_all_have() -> None:
    made = of([("a", 1e6, 100, 0.5), ("b", 4e6, 30, 0.7), ("c", 9e6, 20, 0.6)])
    made.scores.append(score(model="a", task="Only of a", value=1.0))
    # Other widths and precisions do not count.
    made.scores += [score(model="a", dimension=8, value=0.0), score(model="a", precision="binary", value=1.0)]
    size, rate = pareto_figure(made).axes
    near = pytest.approx
    assert marked(size) == {"Pareto front": [near((1e6, 50)), near((4e6, 70))], "beaten": [near((9e6, 60))]}
    assert marked(rate) == {"Pareto front": [near((30, 70)), near((100, 50))], "beaten": [near((20, 60))]}
    assert size.get_xlabel() == "parameters (log scale)" and size.get_ylabel() == "mean score over tasks (%)"
    assert rate.get_xlabel() == "texts encoded per second (log scale)"


def test_steps_of_a_training_are_left_out() -> None:
    made = of([("m", 1e6, 100, 0.7), ("n", 2e6, 50, 0.8)])
    made.models += [ModelRecord("m", f"step-{step}", 10**6, 64, 101.0) for step in (1, 2)]
    made.scores += [score(model=f"m@step-{step}", value=0.3) for step in (1, 2)]
    assert len(marked(pareto_figure(made).axes[1])["Pareto front"]) == 2


def written(figure: Any) -> list[list[tuple[str, Any]]]:
    """By axes, the labels of the points and their extents."""
    figure.draw_without_rendering()
    # The extent of an annotation holds the line to it, too.
    return [[(text.get_text(), Text.get_window_extent(text)) for text in axes.texts] for axes in figure.axes]


def check_clear(figure: Any) -> None:
    for axes, labels in zip(figure.axes, written(figure), strict=True):
        boxes = [box for _, box in labels]
        centres = axes.transData.transform([point for points in marked(axes).values() for point in points])
        for number, box in enumerate(boxes):
            assert axes.bbox.contains(*box.p0) and axes.bbox.contains(*box.p1)
            assert not box.count_overlaps(boxes[number + 1 :])
            assert not any(box.contains(*centre) for centre in centres)
    for legend in figure.legends:
        extent = legend.get_window_extent()
        assert figure.bbox.contains(*extent.p0) and figure.bbox.contains(*extent.p1)
        assert not extent.count_overlaps([axes.bbox for axes in figure.axes])


@pytest.mark.parametrize("count", [2, 4, 8, 12])
def test_a_family_has_its_names_beside_its_points(count: int) -> None:
    figure = pareto_figure(of(FAMILY[:count]))
    check_clear(figure)
    names = {name.split("/")[1] for name, *_ in FAMILY[:count]}
    for labels in written(figure):
        assert {text for text, _ in labels} == {
            "multilingual-e…-large-instruct" if "instruct" in name and len(name) > 32 else name for name in names
        }


def test_models_that_crowd_have_numbers_and_a_list() -> None:
    rng = np.random.default_rng(0)
    many = [(f"m/model-of-a-name-{n}", 10 ** rng.uniform(8, 9), 10 ** rng.uniform(1, 2), n / 80) for n in range(40)]
    figure = pareto_figure(of(many))
    check_clear(figure)
    for labels in written(figure):
        assert {text for text, _ in labels} == {str(number) for number in range(1, 41)}
    # From the best to the worst.
    listed = [text.get_text() for text in figure.legends[-1].get_texts()]
    assert [text.split()[1] for text in listed] == [f"model-of-a-name-{n}" for n in reversed(range(40))]
    assert [int(text.split()[0]) for text in listed] == list(range(1, 41))


def test_folders_of_one_name_are_told_apart() -> None:
    (labels,) = written(pareto_figure(of([("runs/a/model", 1e6, 0, 0.5), ("runs/b/model", 2e6, 0, 0.6)])))
    assert {text for text, _ in labels} == {"a/model", "b/model"}


@pytest.mark.parametrize(
    ("costs", "ticks"),
    [
        ((80e6, 14e9), ["50M", "100M", "200M", "500M", "1B", "2B", "5B", "10B", "20B"]),
        ((1e6, 4e6), ["1M", "1.2M", "1.5M", "2M", "2.5M", "3M", "4M"]),
        ((1e3, 1e9), ["1,000", "10,000", "100k", "1M", "10M", "100M", "1B"]),
    ],
)
def test_ticks_are_round(costs: tuple[float, float], ticks: list[str]) -> None:
    figure = pareto_figure(of([("a", costs[0], 0, 0.5), ("b", costs[1], 0, 0.6)]))
    figure.draw_without_rendering()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ticks


@pytest.mark.parametrize("costs", [(596e6, 596e6), (596e6, 597e6), (1, 2), (3e-3, 4e-3)])
def test_costs_that_hardly_differ_have_ticks(costs: tuple[float, float]) -> None:
    figure = pareto_figure(of([("a", 0, costs[0], 0.5), ("b", 0, costs[1], 0.6)]))
    check_clear(figure)
    texts = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert len(texts) >= 2 and len(set(texts)) == len(texts)


def test_nothing_is_drawn_for_less_than_two_models(tmp_path: Path) -> None:
    one = of([("a", 1e6, 100, 0.5), ("b", 0, 0, 0.6)])
    apart = of([("a", 1e6, 100, 0.5), ("b", 1e6, 100, 0.6)])
    apart.scores[1] = score(model="b", task="Another")
    for made in (one, apart, Evaluation()):
        assert draw_pareto(made, tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_files_are_the_same_when_drawn_twice(tmp_path: Path) -> None:
    once, again = (draw_pareto(evaluation(), tmp_path / each) for each in ("once", "again"))
    assert [path.name for path in once] == ["pareto.svg", "pareto.png"]
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]
