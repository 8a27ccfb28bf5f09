"""Whole runs of the command: what they leave, what they refuse, and that a run is not repeated nor overwritten."""

from __future__ import annotations

import json
import logging
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from tests.training.data.gettext_catalogs.gettext_folders import write_catalogs
from tests.training.recipes import NO_NEW_MODEL, error_of, state_of, write_graded, write_recipe, write_single_stage
from training.common.outputs import locked
from training.evaluation.records import load_evaluation
from training.run_stage import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the tiny recipe ran to its end."""
    folder = tmp_path_factory.mktemp("finished")
    assert main([str(write_recipe(folder))]) == 0
    return folder


def test_both_stages_train_and_end_in_a_released_folder(finished):
    for stage in ("stage1", "stage2"):
        folder = finished / "run" / stage / "model"
        files = {path.name for path in folder.iterdir()}
        assert {"model.safetensors", "config.json", "modules.json", "tokenizer.json", "modeling_f2llm.py"} <= files
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
        config = json.loads((folder / "config.json").read_text())
        assert config["is_matryoshka"] and config["matryoshka_dimensions"] == [32, 16, 8]
        assert config["architectures"] == ["Qwen3Model"]
        assert not list(folder.parent.glob(".*partial"))
    raw = SentenceTransformer(str(finished / "run/stage1/model"), truncate_dim=16)
    instructed = SentenceTransformer(str(finished / "run/stage2/model"))
    assert raw.encode_query("the red river").shape == (16,)
    assert raw.prompts["query"] == "" and instructed.prompts["query"].startswith("Instruct: ")
    result = json.loads((finished / "run/evaluation.json").read_text())
    assert list(result["accuracy"]) == ["32", "16", "8"]
    assert result["pairs"] == 2 and list(result["languages"]) == ["eng"]
    assert 0 <= result["tfidf"] <= 1
    assert result["model"] == str(finished / "run/stage2/model")
    # The loss falls; terms and sources are logged.
    history = state_of(finished / "run/stage2")["log_history"]
    training = [line for line in history if "loss" in line]
    assert training[-1]["loss"] < 0.5 * training[0]["loss"]
    logged = set().union(*training)
    assert {"loss_hard", "loss_in_batch", "learning_rate", "grad_norm"} <= logged
    assert {f"loss_source/tiny_{kind}" for kind in ("retrieval", "clustering", "classification")} <= logged
    kinds = {"eval_retrieval", "eval_clustering", "eval_classification"}
    assert kinds <= set().union(*(line for line in history if "eval_loss" in line))


def test_a_finished_run_is_not_repeated_and_not_overwritten(finished, capsys):
    before = time.time_ns()
    assert "holds another run" in error_of([finished / "recipe.yaml"], capsys)
    assert main([str(finished / "recipe.yaml"), "--resume"]) == 0
    written = [path for path in (finished / "run").rglob("*") if path.is_file() and path.stat().st_mtime_ns > before]
    # The finished model is evaluated again.
    assert {path.name for path in written if path.parent.name != "report"} <= {"evaluation.json"}


def test_another_seed_gives_other_weights(finished, tmp_path):
    assert main([str(write_recipe(tmp_path)), "--stage", "stage1", "--seed", "5"]) == 0
    one, other = (load_file(folder / "run/stage1/model/model.safetensors") for folder in (finished, tmp_path))
    assert (one["norm.weight"] != other["norm.weight"]).any()


@pytest.mark.parametrize(
    ("save_steps", "expected"),
    [("100", "stopped: the loss became "), ("1", "stopped: weights (embed_tokens.weight, …)")],
)
def test_a_training_that_diverges_stops_and_saves_nothing_broken(tmp_path, capsys, save_steps, expected):
    words = ["--learning_rate", "1e38", "--warmup_steps", "4", "--max_grad_norm", "0", "--save_steps", save_steps]
    error = error_of([write_recipe(tmp_path), *words], capsys, 1)
    assert error.startswith(expected) and "step" in error and "last good checkpoint: " in error
    assert save_steps == "1" or "'tiny_retrieval'" in error
    assert not (tmp_path / "run/stage1/model").exists()
    for weights in (tmp_path / "run/stage1").glob("checkpoint-*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(weights).values())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--matryoshka_dimensions 64 8", "do not fit a model of 32 dimensions"),
        ("--num_hard_negatives_retrieval 9", "write 'num_hard_negatives_retrieval: 4'"),
        ("--num_hard_negatives_clustering 0 --task_types clustering", "num_hard_negatives_clustering: 9"),
        ("--tokenizer /nowhere/at/all", "tokenizer '/nowhere/at/all'"),
        ("--stage stage9", "no stage 'stage9'"),
        ("--builder osm", "unknown builder 'osm'"),
        ('--builder cldr --builder_options {"names":3}', "unknown key 'names'"),
        ("--attn_implementation torch_varlen", "torch_varlen"),
        ("--stage stage2", "stage1/model"),
        ("--evaluation_pairs /nowhere.parquet", "/nowhere.parquet"),
        ("--lr_scheduler_type cosine_with_min_lr", "cannot be set up"),
        ("--optim adamw_bnb_8bit", "cannot be set up"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, words, expected):
    error = error_of([write_recipe(tmp_path), *words.split()], capsys)
    assert error.startswith("error: ") and expected in error
    assert not (tmp_path / "run/stage1/model").exists()


def test_folders_that_lack_or_hold_something_else(tmp_path, capsys):
    recipe, data = write_recipe(tmp_path), tmp_path / "data/retrieval.parquet"
    files = {"evaluation.json": "holds the evaluation of another model", "stage1/thesis": "holds something else"}
    for name, expected in files.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text('{"model": "another"}')
        assert expected in error_of([recipe], capsys)
        (tmp_path / "run" / name).unlink()
    data.unlink()
    assert "no file matches" in error_of([recipe], capsys)


def test_a_faulty_recipe_can_be_corrected_and_run_again(tmp_path, capsys):
    for key, value in {"hidden_size": "abc", "num_key_value_heads": 3, "family": "f2llm-v2-9b"}.items():
        error = error_of([write_single_stage(tmp_path, model_config={key: value})], capsys)
        assert {"family": "f2llm-v2-8b"}.get(key, key) in error
    recipe = str(write_single_stage(tmp_path, max_steps=1))
    assert main([recipe, "--matryoshka_min_dim", "64"]) == 2
    assert main([recipe, "--lr_scheduler_type", "cosine_with_min_lr"]) == 2
    assert main([recipe, "--tokenizer_vocab_size", "300"]) == 0
    assert json.loads((tmp_path / "run/model/config.json").read_text())["vocab_size"] == 300


def test_a_folder_that_is_no_prepared_source_is_left_alone(tmp_path, capsys):
    recipe, prepared = write_single_stage(tmp_path, max_steps=1), tmp_path / "prepared"
    assert main([str(recipe), "--prepared_dir", str(prepared)]) == 0
    (source,) = prepared.glob("tiny_retrieval-*")
    (source / "source.json").unlink()
    (source / "corpus.txt").write_text("mine")
    words = [recipe, "--output_dir", tmp_path / "other", "--prepared_dir", prepared]
    assert "give another prepared_dir" in error_of(words, capsys)
    assert (source / "corpus.txt").read_text() == "mine"


def test_a_run_that_is_at_work_is_not_started_twice(tmp_path, capsys):
    recipe = write_single_stage(tmp_path, max_steps=1)
    for more in ([], ["--resume"]):
        # As the first process of a run holds it from its start to its end.
        with locked(tmp_path / "run/model"):
            line = error_of([recipe, *more], capsys)
        assert "another process trains there" in line and "another output_dir" in line
        # Nothing was written beside what is at work.
        assert [path.name for path in (tmp_path / "run").iterdir()] == []
    assert main([str(recipe)]) == 0
    assert not list((tmp_path / "run").glob("*.lock"))


def test_bad_rows_that_are_put_aside_are_counted(tmp_path, capsys, caplog):
    recipe = write_single_stage(tmp_path, max_steps=1, on_bad_row="quarantine")
    path = tmp_path / "data/retrieval.parquet"
    columns = pq.read_table(path).to_pydict()
    columns["query"][3] = columns["query"][4] = " "
    columns["passage"][70] = None
    pq.write_table(pa.table(columns), path)
    again = ["--output_dir", str(tmp_path / "again"), "--prepared_dir", str(tmp_path / "run/prepared")]
    # The tokenizer is trained on the other rows, too. Data that was prepared before tells it as well.
    for words in ([], again):
        caplog.clear()
        assert main([str(recipe), *words]) == 0
        assert "3 of 80 rows (3.8%) were put aside (2 is empty, 1 is null)" in caplog.text
    pq.write_table(pa.table({**columns, "query": [""] * 80}), path)
    keys = {"model": str(tmp_path / "run/model"), **NO_NEW_MODEL, "on_bad_row": "quarantine"}
    recipe = write_single_stage(tmp_path / "none", **keys)
    line = error_of([recipe, "--manifest", tmp_path / "data/manifest.yaml"], capsys)
    assert "no row is left to train on" in line and "80 of 80 rows (100.0%) were put aside (80 is empty)" in line


def test_help_documents_the_options_and_the_keys(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{key}" in text for key in ("resume", "dry-run", "global_batch_size", "learning_rate", "matryoshka"))


def test_query_and_passage_are_enough(tmp_path):
    # The first file of a new user: no negatives, and no key about them.
    path = write_single_stage(tmp_path, num_hard_negatives_retrieval=None, max_steps=3)
    source = tmp_path / "data/retrieval.parquet"
    pq.write_table(pq.read_table(source, columns=["query", "passage"]), source)
    assert main([str(path)]) == 0
    first = state_of(tmp_path / "run")["log_history"][0]
    assert first["loss_in_batch"] > 0 == first["loss_hard"]


def test_what_a_dry_run_made_in_the_output_folder_is_no_other_run(tmp_path):
    catalogs = write_catalogs(tmp_path / "locale", ["de", "fr"])
    built = {"builder": "gettext", "builder_options": {"locale_dirs": [str(catalogs)]}}
    places = {"manifest": str(tmp_path / "run/data/manifest.yaml"), "prepared_dir": str(tmp_path / "run/tokens/first")}
    keys = {"max_steps": 1, "global_batch_size": 4, "num_hard_negatives_retrieval": 0}
    recipe = str(write_single_stage(tmp_path, **built, **places, **keys))
    assert main([recipe, "--dry-run"]) == 0
    assert {"data", "tokens"} <= {path.name for path in (tmp_path / "run").iterdir()}
    (tmp_path / "run/other").touch()
    assert main([recipe]) == 2
    (tmp_path / "run/other").unlink()
    assert main([recipe]) == 0


def results(folder):
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("evaluation-stage2", "evaluation")]


def test_quickstart_runs_to_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--cap", "300", "--max_steps", "2", "--report_to", "none"]) == 0
    printed = capsys.readouterr().out
    assert "TF-IDF" in printed and "from sentence_transformers import SentenceTransformer" in printed
    folder = tmp_path / "runs/quickstart"
    large, small = results(folder)
    assert [" ".join(of["accuracy"]) for of in (large, small)] == ["128 64 32 16 8", "40 32 16 8"]
    assert large["pairs"] > 10000 and len(large["languages"]) > 200
    # The baseline does not depend on the training; it is the number that the README compares with.
    assert large["tfidf"] == pytest.approx(0.287, abs=0.002)
    assert large["model"] == "runs/quickstart/stage2/model"
    assert SentenceTransformer(large["model"], truncate_dim=32).encode_query("Deutschland").shape == (32,)
    sizes = [sum(each.numel() for each in SentenceTransformer(of["model"]).parameters()) for of in (small, large)]
    assert 0.2 < sizes[0] / sizes[1] < 0.3
    report = load_evaluation(folder / "report")
    assert [model.label for model in report.models] == ["runs/quickstart/stage2", "TF-IDF", "runs/quickstart/student"]
    scores = report.select(model="runs/quickstart/stage2", dimension=64, precision="float32")
    mean = sum(score.value * score.examples for score in scores) / large["pairs"]
    assert mean == pytest.approx(large["accuracy"]["64"], abs=1e-4)
    page = (folder / "report/report.html").read_text()
    assert "runs/quickstart/student (first) against TF-IDF (second)" in page and page.count("<svg") >= 6


@pytest.mark.slow
def test_quickstart_beats_the_baseline_and_truncates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    large, small = results(tmp_path / "runs/quickstart")
    accuracy = large["accuracy"]
    assert accuracy["128"] >= 1.4 * large["tfidf"] and accuracy["32"] >= 0.85 * accuracy["128"]
    assert small["accuracy"]["40"] >= 1.1 * small["tfidf"]


def test_graded_pairs_are_trained_beside_other_sources(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    recipe = write_single_stage(tmp_path, task_types=None, num_train_epochs=6, min_hard_negatives=0)
    graded = write_graded(tmp_path / "data")
    assert main([str(recipe), "--manifest", str(graded)]) == 0
    history = state_of(tmp_path / "run")["log_history"]
    training = [line for line in history if "loss" in line]
    assert {"loss_similarity", "loss_source/tiny_graded", "loss_in_batch", "loss_hard"} <= set().union(*training)
    validation = [line for line in history if "eval_loss" in line]
    assert validation[-1]["eval_similarity"] == validation[-1]["eval_source/tiny_graded"]
    assert validation[-1]["eval_similarity"] < validation[0]["eval_similarity"]
    assert any("similarity" in line and "hard" in line for line in caplog.messages if line.startswith("step"))
