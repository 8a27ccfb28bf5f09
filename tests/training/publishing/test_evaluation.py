"""Scores of a packed folder are those of exactly its weights, under public names; figures come from its numbers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.training.publishing.releases import NAME, evaluate, make_release, write_release
from tests.training.recipes import write_single_stage
from training.evaluation.records import Evaluation, ModelRecord, Score, load_evaluation
from training.merge import main as merge
from training.models.model_ref import model_revision
from training.publishing.evaluation import (
    FIGURES,
    LOSSES,
    draw_figures,
    drawn_figures,
    save_losses,
    write_evaluation,
)
from training.publishing.lineage import Lineage
from training.publishing.pack import PackOptions, pack
from training.publishing.states import ModelState, find_state
from training.run_stage import main as run_stage

COMMIT = "0123456789" * 4


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "packed").mkdir()
    return tmp_path / "packed"


def _state(runs: Path, checkpoint: str | None = None) -> ModelState:
    return find_state(runs / "student", checkpoint)


def _write(state: ModelState, output: Path, given: Path | None = None) -> Evaluation:
    write_evaluation(state, Lineage(state).states, "f2llm-v2-tiny", output, given)
    return load_evaluation(output / "evaluation", missing_ok=True)


def _score(label: str, value: float = 0.5, **fields) -> Score:
    return replace(
        Score(label, "Task", "Retrieval", "eng", ("eng-Latn",), 16, "float32", "accuracy", value, 3), **fields
    )


def _save(folder: Path, *records: ModelRecord, failures: dict[str, str] | None = None) -> Path:
    evaluation = Evaluation(failures=failures or {})
    for value, record in enumerate(records):
        evaluation.add_model(record)
        score = _score(record.label, value / 10)
        evaluation.put([score], {score.key: np.full(3, value / 10, np.float32)})
    evaluation.save(folder)
    return folder


def test_the_report_of_the_recipe_is_told_under_the_release_and_its_stages(runs, output):
    found = _write(_state(runs), output)
    assert [model.label for model in found.models] == ["stage2", "TF-IDF", "f2llm-v2-tiny"]
    before = load_evaluation(runs / "report")
    for old, new in (("run/student", "f2llm-v2-tiny"), ("run/stage2", "stage2"), ("TF-IDF", "TF-IDF")):
        expected = [replace(score, model=new) for score in before.select(model=old)]
        assert expected and found.select(model=new) == expected
        for score in expected:
            values = before.examples[replace(score, model=old).key]
            assert np.array_equal(found.examples[score.key], values)
    assert len(found.examples) == len(before.examples)
    own = next(model for model in found.models if model.name == "f2llm-v2-tiny")
    assert own.parameters and own.dimension == 16 and own.identity is None
    assert own.texts_per_second is None


def test_the_pairs_result_is_told_without_the_place(runs, output):
    _write(_state(runs), output)
    told = json.loads((output / "evaluation/results.json").read_text())
    result = json.loads((runs / "evaluation.json").read_text())
    assert told["model"] == "f2llm-v2-tiny" and told["accuracy"] == result["accuracy"]
    assert result.keys() - told.keys() == {"identity"}
    # Another stage has another result.
    shutil.rmtree(output / "evaluation")
    (runs / "evaluation-stage2.json").unlink()
    _write(find_state(runs / "stage2"), output)
    assert not (output / "evaluation/results.json").exists()


def test_scores_of_another_state_are_left_out_and_refused_if_given(runs, output, caplog, refuses):
    given = _save(runs.parent / "given", ModelRecord(str(runs / "student"), identity="another"))
    with refuses(given, "as it is now", runs / "student/model"):
        _write(_state(runs), output, given)
    weights = runs / "student/model/model.safetensors"
    tensors = load_file(weights)
    tensors["norm.weight"] += 1
    save_file(tensors, weights, {"format": "pt"})
    assert _write(_state(runs), output).scores == []
    assert not (output / "evaluation").exists() and "as it is now" in caplog.text


def test_a_stage_that_changed_since_is_left_out(runs, output, caplog):
    (runs / "stage2/model/modules.json").write_text("[]")
    assert [model.label for model in _write(_state(runs), output).models] == ["TF-IDF", "f2llm-v2-tiny"]
    assert "run/stage2" in caplog.text


def test_other_models_keep_public_names_or_go(runs, output):
    state = _state(runs)
    identity = model_revision(str(state.folder), "RUN")
    given = _save(
        runs.parent / "given",
        ModelRecord("org/model", "v1", identity=COMMIT, dimension=8),
        ModelRecord("/home/alice/private", identity="5f" * 16),
        ModelRecord("/home/alice/unknown"),
        ModelRecord("org/looks-public", identity="5f" * 16),
        ModelRecord("whatever", identity=identity, options="prompts model"),
        failures={"whatever: Task": "/home/alice/data: no such file"},
    )
    found = _write(state, output, given)
    assert [model.label for model in found.models] == ["org/model@v1", "f2llm-v2-tiny (prompts model)"]
    assert found.models[0].identity == COMMIT and found.failures == {}
    assert [(score.model, score.value) for score in found.scores] == [
        ("org/model@v1", 0.0),
        ("f2llm-v2-tiny (prompts model)", 0.4),
    ]
    assert "alice" not in (output / "evaluation/scores.json").read_text()


def test_a_model_that_was_evaluated_under_two_names_is_told_once(runs, output):
    state = _state(runs)
    identity = model_revision(str(state.folder), "RUN")
    given = _save(
        runs.parent / "given", ModelRecord("run/student", identity=identity), ModelRecord("copy", identity=identity)
    )
    found = _write(state, output, given)
    assert [model.label for model in found.models] == ["f2llm-v2-tiny"] and len(found.scores) == 1


def test_a_checkpoint_has_scores_of_its_own(runs, output, caplog):
    checkpoint = next((runs / "student").glob("checkpoint-*"))
    assert _write(_state(runs, checkpoint.name), output).scores == []
    identity = model_revision(str(checkpoint), "RUN")
    given = _save(runs.parent / "given", ModelRecord(str(runs / "student"), checkpoint.name, identity=identity))
    assert [model.label for model in _write(_state(runs, checkpoint.name), output, given).models] == ["f2llm-v2-tiny"]


def test_without_an_evaluation_there_is_none(runs, output, caplog, refuses):
    (runs / "report/scores.json").unlink()
    for path in runs.glob("evaluation*.json"):
        path.unlink()
    assert _write(_state(runs), output).scores == [] and not (output / "evaluation").exists()
    assert "--evaluation" in caplog.text
    with refuses(runs / "nowhere", "scores.json"):
        _write(_state(runs), output, runs / "nowhere")


def test_results_that_do_not_say_of_which_state_they_are_stay_out(runs, output):
    path = runs / "evaluation.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in content.items() if key != "identity"}))
    (runs / "evaluation-broken.json").write_text("{")
    _write(_state(runs), output)
    assert not (output / "evaluation/results.json").exists()


def test_an_evaluation_in_another_folder_is_found_for_a_checkpoint_and_a_merged_model(runs, output):
    checkpoint = next((runs / "student").glob("checkpoint-*"))
    assert merge([str(runs / "stage2"), "--output", str(runs / "soup")]) == 0
    for state in (_state(runs, checkpoint.name), find_state(runs / "soup")):
        identity = model_revision(str(state.folder), "RUN")
        record = ModelRecord(str(state.folder), identity=identity)
        _save(runs / f"evaluation of {state.folder.name}", record, ModelRecord("whatever", identity="5f" * 16))
        assert [model.label for model in _write(state, output).models] == ["f2llm-v2-tiny"]
    # One that is damaged is no matter where the right one is there.
    (runs / "a-broken-one").mkdir()
    (runs / "a-broken-one/scores.json").write_text("{")
    assert [model.label for model in _write(state, output).models] == ["f2llm-v2-tiny"]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a recipe of one stage, with pairs."""
    folder = tmp_path_factory.mktemp("single")
    assert run_stage([str(write_single_stage(folder, evaluation_pairs=str(folder / "data/pairs.parquet")))]) == 0
    return folder / "run"


def test_the_report_of_a_recipe_of_one_stage_is_in_its_run(single, tmp_path):
    assert (single / "report/scores.json").is_file() and not (single.parent / "report").exists()
    packed = pack(single, tmp_path / "tiny", PackOptions("tiny"))
    assert {model.label for model in load_evaluation(packed / "evaluation").models} == {"tiny", "TF-IDF"}
    result = json.loads((single / "evaluation.json").read_text())
    assert json.loads((packed / "evaluation/results.json").read_text())["accuracy"] == result["accuracy"]
    card = (packed / "README.md").read_text()
    assert "HeldOutPairs" in card and "No score of this model" not in card


def test_a_card_names_a_result_that_stands_alone(single, tmp_path):
    run = Path(shutil.copytree(single, tmp_path / "run"))
    shutil.rmtree(run / "report")
    card = (pack(run, tmp_path / "tiny", PackOptions("tiny")) / "README.md").read_text()
    assert "`evaluation/results.json` has its accuracy on held-out pairs" in card and "No score of this" not in card


NAMES = ("curves-0", "curves-1", "dimensions", "languages", "pareto")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / FIGURES).iterdir())}


def test_figures_are_of_what_there_is_and_the_same_each_time(tmp_path, refuses, monkeypatch):
    drawn = {}
    for name in ("one", "two"):
        folder = write_release(tmp_path / name, evaluation=evaluate())
        files = draw_figures(folder)
        drawn[name] = contents(folder)
        assert sorted(path.name for path in files) == sorted(drawn[name])
    assert drawn["one"] == drawn["two"]
    assert list(drawn["one"]) == [f"{name}.{kind}" for name in NAMES for kind in ("png", "svg")]
    assert b"<svg" in drawn["one"]["dimensions.svg"] and drawn["one"]["dimensions.png"].startswith(b"\x89PNG")
    # Dimensions are of this model alone.
    dimensions = drawn["one"]["dimensions.svg"]
    assert NAME.encode() in dimensions and b"large" not in dimensions and b"large" in drawn["one"]["pareto.svg"]
    stages = {"stage1": "figures/curves-0.png", "student": "figures/curves-1.png"}
    assert drawn_figures(folder)["curves"] == [{"stage": stage, "path": path} for stage, path in stages.items()]
    with monkeypatch.context() as patch, refuses("pip install matplotlib"):
        patch.setitem(__import__("sys").modules, "matplotlib.figure", None)
        draw_figures(folder)
    (folder / LOSSES).write_text("[")
    with refuses(str(folder / LOSSES)):
        draw_figures(folder)
    # Figures without numbers are deleted.
    (folder / LOSSES).unlink()
    (folder / "evaluation/scores.json").unlink()
    assert draw_figures(folder) == [] and contents(folder) == {}
    assert not any(drawn_figures(folder).values())


def test_losses_are_kept_by_stage(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    save_losses({"stage1": run}, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    log = [{"step": 5, "loss": 2.0, "loss_source/names": 2.0}, {"step": 9, "eval_loss": 1.0, "eval_source/names": 1.0}]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    folder = write_release(tmp_path / "packed", make_release(), losses=False)
    save_losses({"stage1": run, "pruned": tmp_path / "gone"}, folder)
    curves = {"names": {"training": [[5, 2.0]], "validation": [[9, 1.0]]}}
    assert json.loads((folder / LOSSES).read_text()) == {"stage1": curves}
    assert [path.name for path in draw_figures(folder)] == ["curves-0.svg", "curves-0.png"]
