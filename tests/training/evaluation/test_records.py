"""Records of an evaluation are read back as they were written; checkpoints of one training are found among models."""

from __future__ import annotations

import numpy as np
import pytest

from tests.training.evaluation.synthetic import score
from training.evaluation.records import (
    Evaluation,
    ModelRecord,
    find_sweeps,
    finished_models,
    load_evaluation,
    model_scores,
    shared_scores,
)


def test_an_evaluation_is_read_back(tmp_path):
    made, models = score(), [ModelRecord("m", None, 100, 64, 10.5)]
    written = Evaluation(models, [made], {made.key: np.array([0, 1, 0.5], np.float32)}, {"other": "offline"})
    written.save(tmp_path / "run")
    read = load_evaluation(tmp_path / "run")
    assert (read.models, read.scores, read.failures) == (written.models, written.scores, written.failures)
    np.testing.assert_array_equal(read.examples[made.key], written.examples[made.key])


def test_a_folder_without_an_evaluation_is_refused(tmp_path, refuses, caplog):
    with refuses(tmp_path, "holds no whole evaluation"):
        load_evaluation(tmp_path)
    (tmp_path / "scores.json").write_text("{}")
    with refuses(tmp_path, "run it again"):
        load_evaluation(tmp_path)
    Evaluation().save(tmp_path)
    (tmp_path / "examples.npz").write_bytes(b"PK")
    assert load_evaluation(tmp_path).examples == {} and "examples.npz: not read" in caplog.text


def test_the_largest_dimension_of_float32_is_the_default(refuses):
    binary = score(dimension=128, precision="binary")
    made = Evaluation(scores=[score(dimension=16), score(dimension=64), binary, score(model="x", precision="int8")])
    assert [found.dimension for found in model_scores(made, "small")] == [64]
    assert [found.dimension for found in model_scores(made, "small", 16)] == [16]
    for words, parts in ((["smalls"], ["'smalls'", "small"]), (["small", 65], ["64, 16"]), (["x"], ["none"])):
        with refuses(*parts):
            model_scores(made, *words)


def test_models_are_compared_by_the_tasks_that_all_have():
    made = Evaluation(
        scores=[
            *(score(model="a", task=task) for task in ("T1", "T2", "T3")),
            *(score(model="b", task=task) for task in ("T2", "T3", "T4")),
            # Neither another width nor another precision adds a task.
            score(model="a", task="T4", dimension=8),
            score(model="binary", task="T9", precision="binary"),
            score(model="apart", task="T5"),
        ]
    )
    shared = shared_scores(made, ["a", "b", "binary"])
    assert [(model, [each.task for each in own]) for model, own in shared.items()] == [(m, ["T2", "T3"]) for m in "ab"]
    assert [each.task for each in shared_scores(made, ["a"])["a"]] == ["T1", "T2", "T3"]
    assert shared_scores(made, ["a", "apart"]) == shared_scores(made, []) == {}


def of(*models):
    records = [ModelRecord(*model) for model in models]
    return Evaluation(records, [score(model=record.label) for record in records])


@pytest.mark.parametrize(
    ("revisions", "unit"),
    [
        (("checkpoint_200", "checkpoint_01000"), "checkpoint"),
        (("step200", "step1000"), "step"),
        (("runs/Step/200", "runs/Step/1000"), "Step"),
        (("global_step200", "global_step1000"), "step"),
    ],
)
def test_a_step_is_the_number_after_a_word(revisions, unit):
    (sweep,) = find_sweeps(of(("m", revisions[1]), ("m", revisions[0])))
    assert (sweep.unit, sweep.final) == (unit, None)
    assert sweep.steps == [(200, f"m@{revisions[0]}"), (1000, f"m@{revisions[1]}")]


@pytest.mark.parametrize(
    "revisions",
    [
        ("stage1", "stage2"),
        ("5e1f0aa4c1d20c4d3a7a1b0bbf7a0f6f1d9c1234", "0f6f1d9c12345e1f0aa4c1d20c4d3a7a1b0bb125"),
        ("2024-01", "2024-02"),
        ("v1.0", "v2.0"),
        ("step-10", None),
    ],
)
def test_other_revisions_are_not_steps(revisions):
    made = of(*(("m", revision) for revision in revisions))
    assert find_sweeps(made) == [] and len(finished_models(made)) == 2


def test_each_model_and_each_stage_has_its_own_steps_and_numbers_in_names_are_none():
    stages = [("a", f"stage{stage}-step-{step}") for stage in (1, 2) for step in (5, 10)]
    sweeps = find_sweeps(of(*stages, ("b", "step-5"), ("b", "step-10"), ("b", None), ("c", "step-5")))
    found = [(sweep.name, sweep.final) for sweep in sweeps]
    assert found == [("a@stage1-step", None), ("a@stage2-step", None), ("b", "b")]
    assert all([step for step, _ in sweep.steps] == [5, 10] for sweep in sweeps)
    assert find_sweeps(of(("org/model-1", None), ("org/model-2", None), ("checkpoint-1", None))) == []
    made = of(("m", "step-1"), ("m", "step-2"))
    made.scores.pop()
    assert find_sweeps(made) == []


@pytest.mark.parametrize("final", ["runs/mine/stage2/model", "runs/mine/stage2/", None])
def test_folders_of_a_run_are_steps(final):
    folders = ["runs/mine/stage2/checkpoint-900", "runs/mine/stage2/checkpoint-1000/"]
    (sweep,) = find_sweeps(of(*((name, None) for name in (*folders, final) if name)))
    assert sweep.name == "runs/mine/stage2" and sweep.final == final
    assert sweep.steps == [(900, folders[0]), (1000, folders[1])]


def test_a_finished_model_stands_for_its_steps_and_the_last_step_for_an_unfinished_one():
    steps = [(name, f"step-{step}") for name in ("done", "not-done") for step in (1, 3, 2)]
    made = of(*steps, ("done", None), ("other", "main"))
    assert finished_models(made) == ["not-done@step-3", "done", "other@main"]
