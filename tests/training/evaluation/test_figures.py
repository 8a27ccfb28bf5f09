"""Figures show the numbers of the evaluation and of the log; nothing overlaps, is cut or depends on colour alone."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from matplotlib.text import Text

from tests.training.evaluation.synthetic import LANGUAGES, evaluation, many_languages, score
from training.evaluation.figures import (
    MEAN,
    curves_figure,
    dimension_points,
    dimensions_figure,
    languages_figure,
    lay_out,
    learning_figure,
    learning_points,
    line_style,
    load_curves,
    pareto_figure,
    pareto_front,
    save,
    short_labels,
    shortened,
)
from training.evaluation.records import Evaluation, ModelRecord, find_sweeps, task_mean
from training.evaluation.summary import GroupScore, summarize

SWEEP = {"dimensions": (64, 32, 8), "precisions": ("binary", "float32")}
STEPS = (100, 200, 1000)
# Name, parameters, texts per second, quality: a family and two models that others trained.
FAMILY = [
    ("org/F2LLM-v2-80M", 80e6, 2900, 0.52),
    ("org/F2LLM-v2-1.7B", 1.72e9, 380, 0.64),
    ("org/F2LLM-v2-14B", 14e9, 50, 0.69),
    ("other/multilingual-e5-large-instruct", 560e6, 850, 0.605),
    ("other/Qwen3-Embedding-8B", 7.57e9, 88, 0.685),
]


def learning(tasks, model="org/m", final=0.7, revision="step-{}"):
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


def family(models):
    records = [ModelRecord(name, None, int(parameters), 64, rate) for name, parameters, rate, _ in models]
    return Evaluation(records, [score(model=name, value=quality) for name, _, _, quality in models])


def curves(sources, steps=40, name="data/source-{:02}"):
    """The losses fall; every third source has no validation, and later sources have higher losses."""
    found = {}
    for number in range(sources):
        line = [(step, 2 * math.exp(-step / 20) + number / 100) for step in range(1, steps + 1)]
        found[name.format(number)] = {"training": line}
        if number % 3 != 2:
            found[name.format(number)]["validation"] = [(step, loss + 0.2) for step, loss in line[9::10]]
    return found


def write_log(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": lines}))
    return folder


def texts(items):
    return [item.get_text() for item in items]


def drawn(axes):
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


@pytest.mark.parametrize(
    "figure",
    [
        lambda: dimensions_figure(evaluation(qualities={"a" * 90: 0.5, "large": 0.8}, **SWEEP)),
        lambda: learning_figure(learning({f"T{n}": f"MultilabelClassification{n}" for n in range(11)})),
        *(lambda count=count: pareto_figure(family(FAMILY[:count])) for count in (2, 5)),
        lambda: pareto_figure(family([(f"m/model-{n}", 10 ** (8 + n / 40), 1 + n, n / 80) for n in range(40)])),
        *(lambda count=count: curves_figure(curves(count, name="{:02}-of-" + 40 * "word-")) for count in (1, 5, 30)),
    ],
)
def test_nothing_overlaps_or_is_cut(figure):
    made = figure()
    made.draw_without_rendering()
    legends = [*made.legends, *(axes.get_legend() for axes in made.axes if axes.get_legend() and len(made.axes) == 1)]
    titles = [title for axes in made.axes for title in (axes.title, axes._left_title) if title.get_text()]
    boxes = [each.get_window_extent() for each in (*titles, *legends)] + [axes.bbox for axes in made.axes]
    for number, box in enumerate(boxes):
        assert made.bbox.contains(*box.p0) and made.bbox.contains(*box.p1)
        assert not box.count_overlaps(boxes[number + 1 :])
    for axes in made.axes:
        for text in (axes.xaxis.label, axes.yaxis.label, *axes.texts):
            assert made.bbox.contains(*text.get_window_extent().p0) and made.bbox.contains(*text.get_window_extent().p1)


def test_nothing_is_drawn_of_too_little(tmp_path):
    made = learning({"A": "STS"})
    one = Evaluation(made.models, [found for found in made.scores if found.model in ("org/m", "org/m@step-100")])
    apart = family(FAMILY[:2])
    apart.scores[1] = score(model=FAMILY[1][0], task="Another")
    unpriced = family([("a", 1e6, 100, 0.5), ("b", 0, 0, 0.6)])
    assert dimensions_figure(evaluation(dimensions=(64,), precisions=("float32",))) is None
    assert learning_figure(one) is learning_figure(evaluation()) is None
    assert [pareto_figure(each) for each in (apart, unpriced, Evaluation())] == [None] * 3
    assert curves_figure(load_curves(write_log(tmp_path / "run", {"step": 1, "loss": 2.0}))) is None
    clustering = evaluation(dimensions=(64,), precisions=("float32",))
    clustering.scores = clustering.select(task="Groups")
    assert languages_figure(summarize(clustering, "large")) is None
    assert save(None, tmp_path / "none", "none") == [] and not (tmp_path / "none").exists()


def test_dimensions_are_means_over_the_tasks_that_were_scored_everywhere():
    made = evaluation(**SWEEP)
    points = dimension_points(made, "small")
    assert {precision: [x for x, _ in line] for precision, line in points.items()} == {
        precision: [8, 32, 64] for precision in ("float32", "binary")
    }
    for precision, line in points.items():
        for dimension, value in line:
            scores = made.select(model="small", dimension=dimension, precision=precision)
            assert value == pytest.approx(100 * task_mean(scores))
    made.scores += [score(task="B", value=0.1), score(task="B", dimension=8, value=0.1)]
    assert dimension_points(made, "small") == points and dimension_points(made, "unknown") == {}


def test_dimensions_are_drawn_over_bytes_of_packed_vectors_too():
    left, right = dimensions_figure(evaluation(qualities={"one": 0.8}, **SWEEP)).axes
    for axes, label, full, bits in (
        (left, "Dimensions kept (log scale)", [8, 32, 64], [8, 32, 64]),
        (right, "Bytes per vector (log scale)", [32, 128, 256], [1, 4, 8]),
    ):
        found = {name: [x for x, _ in line] for name, line in drawn(axes).items()}
        assert found == {"32-bit float": full, "1 bit": bits}
        assert axes.get_xlabel() == label
    assert left.get_ylabel() == "Mean score over tasks (%)" and left.get_title("left") == "one"
    # Finished models with several views have a row, up to six.
    made = evaluation(qualities={"m@step-1": 0.5, "m@step-2": 0.6, "m": 0.7}, **SWEEP)
    made.models = [ModelRecord("m", revision) for revision in ("step-1", "step-2", None)] + [ModelRecord("plain")]
    made.scores += [score(model="plain")]
    assert [axes.get_title("left") for axes in dimensions_figure(made).axes] == ["m", ""]
    many = dimensions_figure(evaluation(qualities={f"m{number}": 0.5 for number in range(9)}, **SWEEP))
    assert len(many.axes) == 12 and many.get_suptitle() == "The first 6 of 9 models"


def learnt(made):
    return learning_points(made, *find_sweeps(made))


def test_learning_curves_are_by_task_or_by_type_of_many_tasks():
    curve = learnt(learning({"A": "Retrieval", "B": "Retrieval", "C": "STS"}))
    expected = {MEAN: [30, 35, 40], "A": [20, 25, 30], "B": [30, 35, 40], "C": [40, 45, 50]}
    assert list(curve[0]) == list(expected) and curve[1] == pytest.approx(80)
    for name, line in curve[0].items():
        assert [step for step, _ in line] == list(STEPS)
        assert [value for _, value in line] == pytest.approx(expected[name])
    tasks = {f"T{number}": ("Retrieval", "STS")[number % 2] for number in range(6)}
    curve = learnt(learning(tasks))
    assert list(curve[0]) == [MEAN, "Retrieval", "STS"]
    assert [value for _, value in curve[0]["Retrieval"]] == pytest.approx([40, 45, 50])
    assert list(learnt(learning(dict.fromkeys(tasks, "STS")))[0]) == [MEAN]
    # They are over the tasks that all steps and the finished model have.
    made = learning({"A": "STS", "B": "STS", "C": "STS"})
    lacking = {("org/m@step-200", "B"), ("org/m", "C")}
    made.scores = [found for found in made.scores if (found.model, found.task) not in lacking]
    curve = learnt(made)
    assert list(curve[0]) == [MEAN] and curve[1] == pytest.approx(70)
    assert [value for _, value in curve[0][MEAN]] == pytest.approx([20, 25, 30])
    apart = learning({"A": "STS", "B": "STS"}, final=None)
    apart.scores = [found for found in apart.scores if (found.model == "org/m@step-200") == (found.task == "A")]
    assert not learnt(apart)[0] and learning_figure(apart) is None


@pytest.mark.parametrize("more_is_better", [False, True])
def test_the_front_is_what_no_other_point_dominates(more_is_better):
    rng, sign = np.random.default_rng(0), 1 if more_is_better else -1

    def dominates(one, other):
        return sign * one[0] >= sign * other[0] and one[1] >= other[1] and one != other

    for _ in range(200):
        # Few values, so that many are equal.
        points = [tuple(point) for point in rng.integers(0, 6, (rng.integers(1, 12), 2)).tolist()]
        expected = {n for n, point in enumerate(points) if not any(dominates(other, point) for other in points)}
        front = pareto_front(points, more_is_better)
        assert set(front) == expected and len(front) == len(expected)
        assert [points[n][0] for n in front] == sorted(points[n][0] for n in front)


def test_models_are_drawn_by_cost_and_mean_over_the_tasks_that_all_have():
    made = family([("a", 1e6, 100, 0.5), ("b", 4e6, 30, 0.7), ("runs/x/c", 9e6, 20, 0.6), ("runs/y/c", 9e6, 0, 0.1)])
    made.scores.append(score(model="a", task="Only of a", value=1.0))
    # Other widths and precisions, and steps of a training, do not count.
    made.scores += [score(model="a", dimension=8, value=0.0), score(model="a", precision="binary", value=1.0)]
    made.models += [ModelRecord("b", f"step-{step}", 10**6, 64, 101.0) for step in (1, 2)]
    made.scores += [score(model=f"b@step-{step}", value=0.3) for step in (1, 2)]
    figure, near = pareto_figure(made), pytest.approx
    size, rate = figure.axes
    points = {"b": [near((4e6, 70))], "x/c": [near((9e6, 60))], "a": [near((1e6, 50))], "y/c": [near((9e6, 10))]}
    assert drawn(size) == {"Pareto front": [near((1e6, 50)), near((4e6, 70))], **points}
    assert drawn(rate)["Pareto front"] == [near((30, 70)), near((100, 50))] and "y/c" not in drawn(rate)
    hollow = {line.get_label() for line in size.get_lines() if line.get_markerfacecolor() == "white"}
    assert hollow == {"x/c", "y/c"}
    # From the best to the worst.
    (legend,) = figure.legends
    assert texts(legend.get_texts()) == ["Pareto front", "b", "x/c", "a", "y/c"]
    assert size.get_xlabel() == "Parameters (log scale)" and size.get_ylabel() == "Mean score over tasks (%)"
    assert rate.get_xlabel() == "Texts encoded per second (log scale)"


def test_the_log_is_divided_by_source_and_kind_or_refused(tmp_path, refuses):
    with refuses(tmp_path, "no trainer_state.json"):
        load_curves(tmp_path)
    for folder, loss in (("checkpoint-900", 9.0), ("checkpoint-1000", 10.0)):
        write_log(tmp_path / folder, {"step": 1, "loss_source/a": loss})
    (tmp_path / "checkpoint-2000").mkdir()
    assert load_curves(tmp_path) == {"a": {"training": [(1, 10.0)]}}
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
    for content in ("{", "[]", "{}", '{"log_history": [{"loss_source/a": 1}]}', '{"log_history": [3]}'):
        (tmp_path / "trainer_state.json").write_text(content)
        with refuses(tmp_path / "trainer_state.json", "holds no log"):
            load_curves(tmp_path)


@pytest.mark.parametrize(("sources", "columns"), [(1, 1), (4, 4), (38, 5), (90, 5)])
def test_every_source_has_a_panel_and_all_have_one_legend(sources, columns):
    made = curves(sources)
    figure = curves_figure(made, "run")
    if sources > 40:
        assert figure.get_suptitle() == "run\nThe 40 of 90 sources with the most logged losses"
        # Those with validation.
        sources, made = 40, dict([each for each in made.items() if len(each[1]) == 2][:40])
    for axes, (source, kinds) in zip(figure.axes, sorted(made.items()), strict=True):
        assert axes.get_title() == source.removeprefix("data/") and axes.get_legend() is None
        assert [list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()] == list(kinds.values())
    (legend,) = figure.legends
    assert texts(legend.get_texts()) == ["Training", "Validation"]
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("Training step", "Loss (nats)")
    assert len({axes.get_subplotspec().colspan.start for axes in figure.axes}) == columns
    # Every column ends in steps.
    labelled = [axes.xaxis.get_tick_params()["labelbottom"] for axes in figure.axes]
    assert labelled == [False] * (sources - columns) + [True] * columns


def lightness(colour):
    return np.dot(colour[:3], [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("languages", [LANGUAGES, many_languages(40), many_languages()], ids=len)
def test_every_language_has_a_cell_the_darker_the_higher_its_score(languages):
    # Scripts with more languages come first, and the lowest score in each.
    groups = [GroupScore(name, value, 1, 10) for name, value in (("a-X", 0.3), ("b-Y", 0.9), ("c-Y", 0.1))]
    assert lay_out(groups) == ["Y", groups[2], groups[1], "X", groups[0]]
    found = summarize(evaluation(languages, dimensions=(64,), precisions=("float32",)), "large")
    figure = languages_figure(found)
    figure.draw_without_rendering()
    grid, scale = figure.axes
    assert {language.partition("-")[0] for language in languages} <= {text.get_text() for text in grid.texts}
    thick = [patch for patch in grid.patches if patch.get_linewidth() > 2]
    assert len(grid.patches) == len(languages) and len(thick) == (10 if len(languages) > 10 else 0)
    assert len({patch.get_xy() for patch in grid.patches}) == len(languages)
    # In grey, too; the black frame can be seen on low scores.
    scores = [cell.macro for cell in lay_out(found.languages) if not isinstance(cell, str)]
    shades = dict(zip(scores, (lightness(patch.get_facecolor()) for patch in grid.patches), strict=True))
    assert [shades[score] for score in sorted(shades)] == sorted(shades.values(), reverse=True)
    assert all(lightness(patch.get_facecolor()) > 0.4 and lightness(patch.get_edgecolor()) == 0 for patch in thick)
    assert scale.get_xlim() == pytest.approx((100 * found.languages[0].macro, 100 * found.languages[-1].macro))
    (title,) = [text for text in grid.findobj(Text) if "languages by script" in text.get_text()]
    for text in (*grid.texts, title, scale.xaxis.label):
        extent = text.get_window_extent()
        assert figure.bbox.contains(*extent.p0) and figure.bbox.contains(*extent.p1), text.get_text()


def test_names_are_short_and_begin_no_formula_and_neighbouring_lines_differ_in_every_trait():
    assert short_labels(["codefuse-ai/F2LLM-v2-80M", "intfloat/e5"]) == ["F2LLM-v2-80M", "e5"]
    assert short_labels(["runs/a/model", "runs/b/model/", "c"]) == ["a/model", "b/model", "c"]
    assert short_labels(["same", "same", "/"]) == ["same", "same", ""]
    assert shortened("abcdefghijklmnop", 8) == "abc…mnop"
    assert shortened("abcdefgh", 8) == "abcdefgh"
    assert shortened("$5 and $6", 20) == r"\$5 and \$6"
    styles = [line_style(number) for number in range(28)]
    assert len({(style["linestyle"], style["marker"]) for style in styles}) == 28
    assert all(styles[n][trait] != styles[n + 1][trait] for n in range(27) for trait in styles[0])
