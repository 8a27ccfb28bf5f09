"""The lineage of a release is what its runs' own files say."""

from __future__ import annotations

import json
import shutil

from sentence_transformers import SentenceTransformer

from tests.training.publishing.packed import BASE, COMMIT, metadata_of, put_in_cache, rewrite_json, rewrite_recipe
from training.common.run_folder import TEACHER_DATA
from training.data.instructions import TextFormat
from training.distillation.teacher import load_text_teacher
from training.merge import main as merge
from training.publishing.lineage import Lineage
from training.publishing.pack import PackOptions, pack
from training.publishing.record import Reference, load_release
from training.publishing.states import find_state

OPTIONS = PackOptions("tiny-soup", licence="apache-2.0")


def _records(run, checkpoint=None):
    return Lineage(find_state(run, checkpoint)).records


def test_stages_come_before_what_was_made_of_them_and_tell_how(runs):
    records = {record.name: record for record in _records(runs / "student")}
    assert list(records) == ["stage1", "stage2", "pruned", "student"]
    assert [record.kind for record in records.values()] == ["training", "training", "pruning", "training"]
    assert records["stage1"].start == Reference("scratch")
    assert records["pruned"].start == records["stage2"].start == Reference("stage", "stage1")
    assert records["student"].start == Reference("stage", "pruned")
    assert records["student"].teacher == Reference("stage", "stage2") and records["stage2"].teacher is None
    assert records["student"].parameters == records["pruned"].parameters < records["stage1"].parameters
    stage1, stage2, pruned, student = records.values()
    assert student.sources == stage2.sources and len(stage2.sources) == 3
    retrieval = next(source for source in stage2.sources if source.name == "tiny_retrieval")
    assert retrieval.rows + retrieval.validation_rows == 80 and retrieval.validation_rows > 0
    assert (retrieval.task_type, retrieval.languages, retrieval.licence) == ("retrieval", ("eng",), "CC0-1.0")
    assert retrieval.instruction == "Given a phrase, retrieve its inversion."
    # Raw text has none.
    assert [(source.name, source.instruction) for source in pruned.sources] == [("tiny_retrieval", None)]
    # Arguments are those in effect.
    assert student.arguments["temperature"] == 0.05 and student.arguments["distillation_weight"] == 1.0
    assert "distillation_weight" not in stage1.arguments and "prune_layers" not in student.arguments
    # How channels were chosen was not given: the stage's plan says it.
    assert pruned.arguments["prune_hidden"] == "leading" and "prune_hidden" not in pruned.given
    assert pruned.arguments["prune_layers"] == "first" and pruned.arguments["prune_to"]["hidden_size"] == 16
    assert "learning_rate" not in pruned.arguments and "learning_rate" not in pruned.given
    assert "model_config" in stage1.given and stage1.arguments["model_config"]["hidden_size"] == 32
    assert not {"output_dir", "manifest", "model", "teacher", "prepared_dir"} & {*student.given, *student.arguments}
    # Steps and metrics are those of the last step.
    state = json.loads(next((runs / "student").glob("checkpoint-*/trainer_state.json")).read_text())
    assert (student.steps, student.epochs) == (state["global_step"], 1.0)
    logged = [entry for entry in state["log_history"] if "eval_loss" in entry][-1]
    assert student.metrics["eval_loss"] == logged["eval_loss"] and "eval_runtime" not in student.metrics
    assert student.metrics["eval_source/tiny_retrieval"] == logged["eval_source/tiny_retrieval"]
    assert student.metrics["train_loss"] == [each["loss"] for each in state["log_history"] if "loss" in each][-1]


def test_without_its_data_a_run_still_names_its_sources(runs, caplog):
    (description,) = runs.glob("stage2/prepared/tiny_retrieval-*/source.json")
    description.write_text(description.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    found = {source.name: source for source in _records(runs / "student")[-1].sources}
    assert found["tiny_retrieval"].rows is None and found["tiny_retrieval"].licence == "CC0-1.0"
    assert found["tiny_clustering"].rows and "tiny_retrieval" in caplog.text
    shutil.rmtree(runs / "stage2/prepared")
    shutil.rmtree(runs.parent / "data")
    sources = _records(runs / "student")[-1].sources
    assert [source.name for source in sources] == ["tiny_retrieval", "tiny_clustering", "tiny_classification"]
    assert {(source.rows, source.task_type, source.licence) for source in sources} == {(None, None, None)}


def test_steps_are_those_of_the_best_model_and_unknown_without_the_last_checkpoint(runs):
    path = next((runs / "student").glob("checkpoint-*/trainer_state.json"))
    content = json.loads(path.read_text())
    first, last = ({"step": step, "epoch": step / 8, "eval_loss": float(step)} for step in (4, content["global_step"]))
    rewrite_json(path, best_global_step=4, log_history=[first, last])
    assert _records(runs / "student")[-1].metrics["eval_loss"] == content["global_step"]
    rewrite_recipe(runs / "student", load_best_model_at_end=True)
    student = _records(runs / "student")[-1]
    assert (student.steps, student.epochs, student.metrics) == (4, 0.5, {"eval_loss": 4.0})
    rewrite_json(path, max_steps=content["max_steps"] + 1)
    assert _records(runs / "student")[-1].steps is None
    shutil.rmtree(path.parent)
    student = _records(runs / "student")[-1]
    assert (student.steps, student.epochs, student.metrics) == (None, None, {})


def test_a_stage_may_be_and_start_from_a_checkpoint(runs):
    checkpoint = next((runs / "stage2").glob("checkpoint-*")).name
    record = _records(runs / "stage2", checkpoint)[-1]
    assert record.name == f"stage2@{checkpoint}" and record.steps == int(checkpoint.removeprefix("checkpoint-"))
    checkpoint = next((runs / "stage1").glob("checkpoint-*")).name
    rewrite_recipe(runs / "stage2", model=f"run/stage1/{checkpoint}")
    names = [record.name for record in _records(runs / "student")]
    # The pruning still starts from the finished model.
    assert names == [f"stage1@{checkpoint}", "stage2", "stage1", "pruned", "student"]
    # Stages of one name are told apart.
    rewrite_recipe(runs / "stage2", model="run/stage1/model")
    shutil.copytree(runs / "stage2", runs / "old/student")
    rewrite_recipe(runs / "old/student", output_dir="run/old/student")
    rewrite_recipe(runs / "student", teacher="run/old/student/model")
    records = _records(runs / "student")
    assert [record.name for record in records] == ["stage1", "student", "pruned", "student-2"]
    assert records[-1].teacher == Reference("stage", "student")


def test_what_is_not_at_hand_ends_the_lineage(runs):
    rewrite_recipe(runs / "student", teacher=None)
    paths = {"run/gone/model": "gone", "/somewhere/else/good-model": "good-model", "data/weights": "weights"}
    starts = {path: Reference("local", name) for path, name in paths.items()}
    for written, start in {**starts, "Qwen/Qwen3-0.6B": Reference("hub", "Qwen/Qwen3-0.6B")}.items():
        rewrite_recipe(runs / "pruned", model=written)
        records = _records(runs / "student")
        assert [record.name for record in records] == ["pruned", "student"] and records[0].start == start


def test_a_teacher_is_the_one_that_taught_with_the_same_texts(runs, caplog):
    modules = runs / "stage2/model/modules.json"
    modules.write_text(modules.read_text() + " ")
    records = _records(runs / "student")
    assert [record.name for record in records] == ["stage1", "pruned", "student"]
    assert records[-1].teacher == Reference("local", "stage2") and "is gone or changed" in caplog.text
    rewrite_recipe(runs / "student", teacher="org/teacher")
    rewrite_json(runs / "student/data.json", **{TEACHER_DATA: "0123456789" * 4})
    assert _records(runs / "student")[-1].teacher == Reference("hub", "org/teacher", "0123456789" * 4)
    rewrite_recipe(runs / "student", teacher="run/stage2/model")
    template, model = "Find: {text}", str(runs / "stage2/model")
    identity = load_text_teacher(model, TextFormat(query_template=template), device="cpu").identity
    rewrite_json(runs / "student/data.json", **{TEACHER_DATA: identity})
    assert _records(runs / "student")[-1].teacher == Reference("local", "stage2")
    rewrite_recipe(runs / "student", teacher_query_template=template)
    assert _records(runs / "student")[-1].teacher == Reference("stage", "stage2")


def test_predecessors_whose_weights_are_gone_are_told_without_parameters(runs):
    (runs / "pruned/model/model.safetensors").unlink()
    (runs / "stage1/model/model.safetensors").write_bytes(b"half")
    found = {record.name: record.parameters for record in _records(runs / "student")}
    assert found["pruned"] is None and found["stage1"] is None and found["student"] and found["stage2"]


def test_data_on_the_hub_is_named_and_a_model_that_comes_from_itself_is_refused(runs, refuses):
    rewrite_recipe(runs / "stage1", data_dir="hf://datasets/org/corpus@main")
    (record,) = _records(runs / "stage1")
    assert {source.dataset for source in record.sources} == {"org/corpus"}
    # Settings without effect are not told.
    unread = ("lora", "teacher", "early_stopping", "evaluation_sample", "prune")
    assert "learning_rate" in record.arguments and not [key for key in record.arguments if key.startswith(unread)]
    rewrite_recipe(runs / "stage1", model="run/stage2/model")
    with refuses(runs / "stage1", "from itself"):
        _records(runs / "stage1")


def test_a_soup_of_checkpoints_is_packed_with_their_lineage(runs, tmp_path):
    (checkpoint,) = (runs / "stage2").glob("checkpoint-*")
    words = [str(runs / "stage2"), str(checkpoint), "--weights", "1", "3", "--output", str(runs / "soup")]
    assert merge(words) == 0
    packed = pack(runs / "soup", tmp_path / "packed", OPTIONS)
    release = load_release(packed)
    own = release.stages[-1]
    # States of one run came about in one training.
    kinds = {"stage1": "training", "stage2": "training", "soup": "merging"}
    assert [(stage.name, stage.kind) for stage in release.stages] == [*kinds.items()]
    assert own.parents == (Reference("stage", "stage2"),)
    names = ["stage2/model", f"stage2/{checkpoint.name}"]
    assert own.arguments == {"method": "mean", "models": names, "weights": [0.25, 0.75]}
    assert release.languages == ("eng",)
    told = json.loads((packed / "config.json").read_text())["merged_from"]["parents"]
    assert [parent["name"] for parent in told] == names
    card = (packed / "README.md").read_text()
    assert f"Mean of the weights of `stage2/model` (0.25), `stage2/{checkpoint.name}` (0.75)." in card
    assert str(tmp_path) not in card
    assert SentenceTransformer(str(packed)).encode(["the red river"]).shape == (1, 32)
    before = (packed / "release.json").read_bytes()
    assert (pack(runs / "soup", packed, OPTIONS) / "release.json").read_bytes() == before


def test_a_soup_names_parents_that_are_gone_and_links_published_ones(runs, tmp_path, hub_cache):
    assert merge([str(runs / "stage1"), "--output", str(tmp_path / "elsewhere" / "soup")]) == 0
    (stage,) = load_release(pack(tmp_path / "elsewhere/soup", tmp_path / "packed", OPTIONS)).stages
    assert (stage.kind, stage.parents) == ("merging", (Reference("local", "stage1/model"),))
    put_in_cache(runs / "stage1/model")
    assert merge([f"{BASE}@main", "--output", str(tmp_path / "soup")]) == 0
    packed = pack(tmp_path / "soup", tmp_path / "published", OPTIONS)
    metadata = metadata_of(packed)
    assert metadata["base_model"] in (BASE, [BASE]) and metadata["base_model_relation"] == "merge"
    assert load_release(packed).stages[0].parents == (Reference("hub", BASE, COMMIT),)


def test_a_soup_of_runs_tells_of_each_and_of_the_last_state_of_each(runs, tmp_path):
    (checkpoint,) = (runs / "stage2").glob("checkpoint-*")
    shutil.copytree(runs / "stage2", runs / "other")
    words = [str(checkpoint), str(runs / "other"), str(runs / "stage2"), "--output", str(runs / "soup")]
    assert merge(words) == 0
    assert merge([str(runs / "soup"), str(runs / "stage2"), "--output", str(runs / "stew")]) == 0
    release = load_release(pack(runs / "stew", tmp_path / "packed", OPTIONS))
    assert [stage.name for stage in release.stages] == ["stage1", "stage2", "other", "soup", "stew"]
    assert release.stages[3].parents == (Reference("stage", "stage2"), Reference("stage", "other"))
    assert release.stages[4].parents == (Reference("stage", "soup"), Reference("stage", "stage2"))
