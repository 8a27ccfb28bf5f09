"""Scores of a packed folder are those of exactly its weights, under public names; figures come from its numbers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.training.publishing.releases import NAME, evaluate, make_release, write_release
from tests.training.recipes import write_single_stage
from training.evaluation.records import Evaluation, ModelRecord, Score, load_evaluation
from training.merge import main as merge
from training.models.model_ref import model_revision
from training.publishing.evaluation import FIGURES, LOSSES, draw_figures, drawn_figures, save_losses, write_evaluation
from training.publishing.lineage import Lineage
from training.publishing.pack import PackOptions, pack
from training.publishing.states import find_state
from training.run_stage import main as run_stage

COMMIT = "0123456789" * 4


@pytest.fixture
def output(tmp_path):
    (tmp_path / "packed").mkdir()
    return tmp_path / "packed"


def _write(state, output, given=None):
    write_evaluation(state, Lineage(state).states, "f2llm-v2-tiny", output, given)
    return load_evaluation(output / "evaluation", missing_ok=True)


def _save(folder, *records):
    evaluation = Evaluation(failures={"whatever: Task": "/home/alice/data: no such file"})
    for value, record in enumerate(records):
        evaluation.add_model(record)
        of_task = ("Task", "Retrieval", "eng", ("eng-Latn",), 16, "float32", "accuracy")
        score = Score(record.label, *of_task, value / 10, 3)
        evaluation.put([score], {score.key: np.full(3, value / 10, np.float32)})
    evaluation.save(folder)
    return folder


def test_a_model_with_factors_counts_the_token_embeddings_that_are_packed(runs, output, tmp_path):
    shutil.copytree(runs / "student", tmp_path / "student")
    path = tmp_path / "student/model/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "embedding_ranks": [2, 4]}))
    whole = ModelRecord("run", parameters=1_000, identity=model_revision(str(path.parent), "RUN"))
    given = _save(tmp_path / "scores", whole, whole.of_exit(1, 600), replace(whole, options="rank 2"))
    vocabulary, width = config["vocab_size"], config["hidden_size"]
    more = vocabulary * width - 4 * (vocabulary + width)
    found = _write(find_state(tmp_path / "student"), output, given)
    assert [each.parameters for each in found.models] == [1_000 + more, 600 + more, 1_000]


def test_the_report_of_the_recipe_is_told_under_the_release_and_its_stages(runs, output, caplog):
    found = _write(find_state(runs / "student"), output)
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
    assert own.parameters and own.dimension == 16 and own.identity is own.texts_per_second is None
    # The result of the pairs is told without the place.
    path = runs / "evaluation.json"
    told, result = json.loads((output / "evaluation/results.json").read_text()), json.loads(path.read_text())
    assert told["model"] == "f2llm-v2-tiny" and told["accuracy"] == result["accuracy"]
    assert result.keys() - told.keys() == {"identity"}
    # Results of another stage, of an unknown state, and damaged ones stay out.
    (runs / "evaluation-stage2.json").unlink()
    path.write_text(json.dumps({key: value for key, value in result.items() if key != "identity"}))
    (runs / "evaluation-broken.json").write_text("{")
    for stage in ("stage2", "student"):
        shutil.rmtree(output / "evaluation")
        _write(find_state(runs / stage), output)
        assert not (output / "evaluation/results.json").exists()
    # A stage that changed since is left out.
    (runs / "stage2/model/modules.json").write_text("[]")
    found = _write(find_state(runs / "student"), output)
    assert [model.label for model in found.models] == ["TF-IDF", "f2llm-v2-tiny"]
    assert "run/stage2" in caplog.text


def test_scores_of_another_state_are_left_out_and_refused_if_given(runs, output, caplog, refuses):
    given = _save(runs.parent / "given", ModelRecord(str(runs / "student"), identity="another"))
    for folder in (given, runs / "nowhere"):
        with refuses(folder, "has no scores.json of the model as it is now", runs / "student/model"):
            _write(find_state(runs / "student"), output, folder)
    weights = runs / "student/model/model.safetensors"
    tensors = load_file(weights)
    tensors["norm.weight"] += 1
    save_file(tensors, weights, {"format": "pt"})
    assert _write(find_state(runs / "student"), output).scores == []
    assert not (output / "evaluation").exists() and "give the output as --evaluation" in caplog.text


def test_other_models_keep_public_names_or_go(runs, output):
    state = find_state(runs / "student")
    identity = model_revision(str(state.folder), "RUN")
    given = _save(
        runs.parent / "given",
        ModelRecord("org/model", "v1", identity=COMMIT, dimension=8),
        ModelRecord("/home/alice/private", identity="5f" * 16),
        ModelRecord("/home/alice/unknown"),
        ModelRecord("org/looks-public", identity="5f" * 16),
        ModelRecord("whatever", identity=identity, options="prompts model"),
        # The same model under two names.
        ModelRecord("copy", identity=identity, options="prompts model"),
    )
    found = _write(state, output, given)
    own = "f2llm-v2-tiny (prompts model)"
    assert [model.label for model in found.models] == ["org/model@v1", own]
    assert found.models[0].identity == COMMIT and found.failures == {}
    assert [(score.model, score.value) for score in found.scores] == [("org/model@v1", 0.0), (own, 0.4)]
    assert "alice" not in (output / "evaluation/scores.json").read_text()


def test_an_evaluation_in_another_folder_is_found_for_a_checkpoint_and_a_merged_model(runs, output):
    checkpoint = next((runs / "student").glob("checkpoint-*"))
    # The report is of the finished model.
    assert _write(find_state(runs / "student", checkpoint.name), output).scores == []
    assert merge([str(runs / "stage2"), "--output", str(runs / "soup")]) == 0
    for state in (find_state(runs / "student", checkpoint.name), find_state(runs / "soup")):
        record = ModelRecord(str(state.folder), identity=model_revision(str(state.folder), "RUN"))
        _save(runs / f"evaluation of {state.folder.name}", record, ModelRecord("whatever", identity="5f" * 16))
        assert [model.label for model in _write(state, output).models] == ["f2llm-v2-tiny"]


def test_the_report_of_a_recipe_of_one_stage_is_in_its_run(tmp_path):
    recipe = write_single_stage(tmp_path, evaluation_pairs=str(tmp_path / "data/pairs.parquet"))
    assert run_stage([str(recipe)]) == 0
    run = tmp_path / "run"
    assert (run / "report/scores.json").is_file() and not (tmp_path / "report").exists()
    packed = pack(run, tmp_path / "tiny", PackOptions("tiny"))
    assert {model.label for model in load_evaluation(packed / "evaluation").models} == {"tiny", "TF-IDF"}
    card = (packed / "README.md").read_text()
    assert "HeldOutPairs" in card and "No score of this model" not in card
    # The result may stand alone.
    shutil.rmtree(run / "report")
    card = (pack(run, tmp_path / "tiny", PackOptions("tiny")) / "README.md").read_text()
    assert "`evaluation/results.json` has its accuracy on held-out pairs" in card and "No score of this" not in card


def test_figures_are_of_what_there_is_and_the_same_each_time(tmp_path):
    drawn = {}
    for name in ("one", "two"):
        folder = write_release(tmp_path / name, evaluation=evaluate())
        files = draw_figures(folder)
        drawn[name] = {path.name: path.read_bytes() for path in sorted((folder / FIGURES).iterdir())}
        assert sorted(path.name for path in files) == sorted(drawn[name])
    assert drawn["one"] == drawn["two"]
    names = ("curves-0", "curves-1", "dimensions", "languages", "pareto")
    assert list(drawn["one"]) == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert b"<svg" in drawn["one"]["dimensions.svg"] and drawn["one"]["dimensions.png"].startswith(b"\x89PNG")
    # Dimensions are of this model alone.
    dimensions = drawn["one"]["dimensions.svg"]
    assert NAME.encode() in dimensions and b"large" not in dimensions and b"large" in drawn["one"]["pareto.svg"]
    stages = {"stage1": "figures/curves-0.png", "student": "figures/curves-1.png"}
    assert drawn_figures(folder)["curves"] == [{"stage": stage, "path": path} for stage, path in stages.items()]
    empty = write_release(tmp_path / "empty", losses=False)
    assert draw_figures(empty) == [] and not any(drawn_figures(empty).values())
    # Losses come from the log of each stage.
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
