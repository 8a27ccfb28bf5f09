"""Steps of a training are told from commits and from models whose names end in numbers."""

from __future__ import annotations

import pytest

from tests.training.evaluation.synthetic import score
from training.evaluation.records import Evaluation, ModelRecord
from training.evaluation.sweeps import find_sweeps, finished_models


def of(*models: tuple[str, str | None]) -> Evaluation:
    records = [ModelRecord(*model) for model in models]
    return Evaluation(records, [score(model=record.label) for record in records])


@pytest.mark.parametrize(
    ("revisions", "unit"),
    [
        (("step-200", "step-1000"), "step"),
        (("checkpoint_200", "checkpoint_01000"), "checkpoint"),
        (("step200", "step1000"), "step"),
        (("runs/Step/200", "runs/Step/1000"), "Step"),
        (("global_step200", "global_step1000"), "step"),
    ],
)
def test_a_step_is_the_number_after_a_word(revisions: tuple[str, str], unit: str) -> None:
    (sweep,) = find_sweeps(of(("m", revisions[1]), ("m", revisions[0])))
    assert (sweep.unit, sweep.final) == (unit, None)
    assert sweep.steps == [(200, f"m@{revisions[0]}"), (1000, f"m@{revisions[1]}")]


@pytest.mark.parametrize(
    "revisions",
    [
        ("stage1", "stage2"),
        ("5e1f0aa4c1d20c4d3a7a1b0bbf7a0f6f1d9c1234", "0f6f1d9c12345e1f0aa4c1d20c4d3a7a1b0bb125"),
        ("abcdef12", "abcdef13"),
        ("main", None),
        ("2024-01", "2024-02"),
        ("v1.0", "v2.0"),
        ("step-1", "step-01"),
        ("step-10", None),
    ],
)
def test_other_revisions_are_no_steps(revisions: tuple[str | None, ...]) -> None:
    made = of(*(("m", revision) for revision in revisions))
    assert find_sweeps(made) == []
    assert len(finished_models(made)) == 2


def test_each_model_and_each_stage_has_steps_of_its_own() -> None:
    stages = [("a", f"stage{stage}-step-{step}") for stage in (1, 2) for step in (5, 10)]
    sweeps = find_sweeps(of(*stages, ("b", "step-5"), ("b", "step-10"), ("b", None), ("c", "step-5")))
    assert [(sweep.name, sweep.final) for sweep in sweeps] == [
        ("a@stage1-step", None),
        ("a@stage2-step", None),
        ("b", "b"),
    ]
    assert all([step for step, _ in sweep.steps] == [5, 10] for sweep in sweeps)


@pytest.mark.parametrize("final", ["runs/mine/stage2/model", "runs/mine/stage2/", None])
def test_folders_of_a_run_are_steps(final: str | None) -> None:
    folders = ["runs/mine/stage2/checkpoint-900", "runs/mine/stage2/checkpoint-1000/"]
    (sweep,) = find_sweeps(of(*((name, None) for name in (*folders, final) if name)))
    assert sweep.name == "runs/mine/stage2" and sweep.final == final
    assert sweep.steps == [(900, folders[0]), (1000, folders[1])]


def test_models_that_are_called_by_numbers_are_no_steps() -> None:
    assert find_sweeps(of(("org/model-1", None), ("org/model-2", None), ("checkpoint-1", None))) == []


def test_models_without_scores_are_left_out() -> None:
    made = of(("m", "step-1"), ("m", "step-2"))
    made.scores.pop()
    assert find_sweeps(made) == []


def test_a_finished_model_stands_for_its_steps_and_the_last_one_where_there_is_none() -> None:
    steps = [(name, f"step-{step}") for name in ("done", "not-done") for step in (1, 3, 2)]
    made = of(*steps, ("done", None), ("other", "main"))
    assert finished_models(made) == ["not-done@step-3", "done", "other@main"]
