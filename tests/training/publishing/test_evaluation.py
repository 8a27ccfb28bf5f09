"""Published scores are those of the very weights that are released, under public names."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.training.recipes import write_single_stage
from training.evaluation.records import Evaluation, ModelRecord, Score, load_evaluation
from training.merge import main as merge
from training.models.model_identity import model_revision
from training.publishing.evaluation import write_evaluation
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


def test_another_stage_gets_its_own_result(runs, output):
    (runs / "evaluation-stage2.json").rename(runs / "evaluation.json.aside")
    state = find_state(runs / "stage2")
    _write(state, output)
    assert not (output / "evaluation/results.json").exists()
    (runs / "evaluation.json.aside").rename(runs / "evaluation-stage2.json")
    _write(state, output)
    assert (output / "evaluation/results.json").exists()


def test_scores_of_another_state_of_the_model_are_left_out(runs, output, caplog):
    weights = runs / "student/model/model.safetensors"
    tensors = load_file(weights)
    tensors["norm.weight"] += 1
    save_file(tensors, weights, {"format": "pt"})
    assert _write(_state(runs), output).scores == []
    assert not (output / "evaluation").exists() and "as it is now" in caplog.text


def test_scores_of_another_state_that_were_given_are_refused(runs, output, refuses):
    given = _save(runs.parent / "given", ModelRecord(str(runs / "student"), identity="another"))
    with refuses(given, "as it is now", runs / "student/model"):
        _write(_state(runs), output, given)


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


def test_a_damaged_evaluation_is_no_missing_one(runs, output, refuses):
    (runs / "report/scores.json").write_text("{")
    with refuses(runs / "report", "no whole evaluation"):
        _write(_state(runs), output)


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


def test_the_report_of_a_recipe_of_one_stage_is_in_its_run(single: Path, tmp_path: Path):
    assert (single / "report/scores.json").is_file() and not (single.parent / "report").exists()
    packed = pack(single, tmp_path / "tiny", PackOptions("tiny"))
    assert {model.label for model in load_evaluation(packed / "evaluation").models} == {"tiny", "TF-IDF"}
    result = json.loads((single / "evaluation.json").read_text())
    assert json.loads((packed / "evaluation/results.json").read_text())["accuracy"] == result["accuracy"]
    card = (packed / "README.md").read_text()
    assert "HeldOutPairs" in card and "No score of this model" not in card


def test_a_card_names_a_result_that_stands_alone(single: Path, tmp_path: Path):
    run = Path(shutil.copytree(single, tmp_path / "run"))
    shutil.rmtree(run / "report")
    card = (pack(run, tmp_path / "tiny", PackOptions("tiny")) / "README.md").read_text()
    assert "`evaluation/results.json` has its accuracy on held-out pairs" in card and "No score of this" not in card
    (run / "evaluation.json").unlink()
    card = (pack(run, tmp_path / "tiny", PackOptions("tiny")) / "README.md").read_text()
    assert "No score of this model came with it" in card
