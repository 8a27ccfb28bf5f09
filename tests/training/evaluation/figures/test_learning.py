"""The learning curve is made of the tasks that all steps and the finished model have."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.evaluation.synthetic import evaluation, score
from training.evaluation.figures.learning import MEAN, draw_learning, learning_figure, learning_points
from training.evaluation.records import Evaluation, ModelRecord
from training.evaluation.sweeps import find_sweeps

STEPS = (100, 200, 1000)


def sweep(
    tasks: dict[str, str], model: str = "org/m", final: float | None = 0.7, revision: str = "step-{}"
) -> Evaluation:
    """Each task scores 0.1 more than the one before, each step 0.05 more, at two widths."""
    qualities = {revision.format(step): 0.2 + 0.05 * number for number, step in enumerate(STEPS)}
    made = Evaluation()
    for name, quality in {**qualities, **({} if final is None else {None: final})}.items():
        record = ModelRecord(model, name)
        made.models.append(record)
        for number, (task, task_type) in enumerate(tasks.items()):
            fields = {"model": record.label, "task": task, "task_type": task_type}
            made.scores.append(score(value=quality + 0.1 * number, **fields))
            made.scores.append(score(value=0.01, dimension=16, **fields))
    return made


def points(made: Evaluation):
    (found,) = find_sweeps(made)
    return learning_points(made, found)


def test_a_few_tasks_have_a_line_each_beside_their_mean() -> None:
    curve = points(sweep({"A": "Retrieval", "B": "Retrieval", "C": "STS"}))
    assert list(curve.lines) == [MEAN, "A", "B", "C"]
    assert [step for step, _ in curve.lines[MEAN]] == list(STEPS)
    assert [value for _, value in curve.lines["A"]] == pytest.approx([20, 25, 30])
    assert [value for _, value in curve.lines["C"]] == pytest.approx([40, 45, 50])
    assert [value for _, value in curve.lines[MEAN]] == pytest.approx([30, 35, 40])
    assert curve.final == pytest.approx(80) and curve.tasks == ["A", "B", "C"]


def test_many_tasks_are_drawn_by_their_type() -> None:
    tasks = {f"T{number}": ("Retrieval", "STS")[number % 2] for number in range(6)}
    curve = points(sweep(tasks))
    assert list(curve.lines) == [MEAN, "Retrieval", "STS"]
    assert [value for _, value in curve.lines["Retrieval"]] == pytest.approx([40, 45, 50])
    assert [value for _, value in curve.lines[MEAN]] == pytest.approx([45, 50, 55])
    assert list(points(sweep(dict.fromkeys(tasks, "STS"))).lines) == [MEAN]


def test_tasks_that_a_step_or_the_finished_model_lacks_do_not_count() -> None:
    made = sweep({"A": "STS", "B": "STS", "C": "STS"})
    lacking = {("org/m@step-200", "B"), ("org/m", "C")}
    made.scores = [found for found in made.scores if (found.model, found.task) not in lacking]
    curve = points(made)
    assert curve.tasks == ["A"] and list(curve.lines) == [MEAN]
    assert [value for _, value in curve.lines[MEAN]] == pytest.approx([20, 25, 30])
    assert curve.final == pytest.approx(70)


def test_steps_that_share_no_task_give_no_curve(tmp_path: Path) -> None:
    made = sweep({"A": "STS", "B": "STS"}, final=None)
    made.scores = [found for found in made.scores if (found.model == "org/m@step-200") == (found.task == "A")]
    assert points(made) is None and draw_learning(made, tmp_path) == []
    # Those without scores at full precision are no points of a curve, either.
    binary = sweep({"A": "STS"}, final=None)
    binary.scores = [
        found if found.model == "org/m@step-100" else score(model=found.model, precision="binary")
        for found in binary.scores
    ]
    assert points(binary) is None


def test_the_finished_model_is_a_line_across() -> None:
    (axes,) = learning_figure(sweep({"A": "STS", "B": "STS"})).axes
    *_, across = axes.get_lines()
    assert across.get_ydata() == pytest.approx([75, 75])
    assert [text.get_text() for text in axes.texts] == ["final"]
    (alone,) = learning_figure(sweep({"A": "STS", "B": "STS"}, final=None)).axes
    assert len(alone.get_lines()) == 3 and not alone.texts


def test_axes_say_what_they_show() -> None:
    (axes,) = learning_figure(sweep({"A": "STS", "B": "STS"})).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", "mean score over 2 tasks (%)")
    assert axes.get_title("left") == "org/m"
    # In the order in which the lines end.
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["B", MEAN, "A"]
    (axes,) = learning_figure(sweep({"STS22.v2": "STS"}, revision="epoch-{}")).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "score in STS22.v2 (%)")
    assert axes.get_legend() is None


def test_lines_of_many_types_are_told_apart_in_grey() -> None:
    (axes,) = learning_figure(sweep({f"T{number}": f"Type{number}" for number in range(11)})).axes
    traits = [
        (line.get_linestyle(), line.get_marker(), line.get_markerfacecolor(), line.get_color())
        for line in axes.get_lines()[:-1]
    ]
    assert len(set(traits)) == len(traits) == 12


def test_nothing_overlaps_or_is_cut() -> None:
    figure = learning_figure(sweep({f"T{number}": f"MultilabelClassification{number}" for number in range(11)}))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [axes.bbox, axes.texts[0].get_window_extent(), axes.get_legend().get_window_extent()]
    for number, box in enumerate(boxes):
        assert figure.bbox.contains(*box.p0) and figure.bbox.contains(*box.p1)
        assert not box.count_overlaps(boxes[number + 1 :])


def test_each_model_has_a_row() -> None:
    made = Evaluation()
    for number in range(8):
        more = sweep({"A": "STS"}, f"m{number}")
        made.models += more.models
        made.scores += more.scores
    figure = learning_figure(made)
    assert [axes.get_title("left") for axes in figure.axes] == [f"m{number}" for number in range(6)]
    assert figure.get_suptitle() == "6 of 8 models"


def test_files_are_the_same_when_drawn_twice(tmp_path: Path) -> None:
    made = sweep({"A": "STS", "B": "STS"})
    once, again = (draw_learning(made, tmp_path / each) for each in ("once", "again"))
    assert [path.name for path in once] == ["learning.svg", "learning.png"]
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_nothing_is_drawn_without_two_steps(tmp_path: Path) -> None:
    made = sweep({"A": "STS"})
    one = Evaluation(made.models, [found for found in made.scores if found.model in ("org/m", "org/m@step-100")])
    assert draw_learning(one, tmp_path) == draw_learning(evaluation(), tmp_path) == []
    assert not list(tmp_path.iterdir())
