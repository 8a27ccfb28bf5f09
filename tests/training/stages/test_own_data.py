"""Training on a user's own files in one command: data, scores before and after, the answer, replay, resume, faults."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.training.processes import launch
from tests.training.recipes import SMALL, killed
from training.common.run_folder import manifest_of
from training.config.recipe import load_recipe
from training.data.manifest import load_manifest
from training.data.published import PublishedFile
from training.models.model_ref import resolve
from training.run_stage import main
from training.stages import own_data

SHORT = {**SMALL, "validation_share": 0, "global_batch_size": 16, "save_steps": 3, "save_strategy": "steps"}
_WORDS = "river mountain city island forest desert lake valley harbour village".split()


def answer_of(run):
    return json.loads((run / "comparison.json").read_text())["scores"]


def words_of(keys):
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def write_pairs(path, rows=60, question="Frage"):
    """Inversions of two words, as a csv file."""
    pairs = [(f"{one} {other} {n}", f"{n} {other}, {one}") for n, one in enumerate(_WORDS) for other in _WORDS]
    lines = [f'{question} {query},"{passage}"' for query, passage in pairs[:rows]]
    path.write_text("\n".join(["question,answer", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def command(uninterrupted, tmp_path_factory):
    """Words of the command on a small file, which scores on another one, and the folder."""
    folder = tmp_path_factory.mktemp("own")
    data, other = write_pairs(folder / "my pairs.csv"), write_pairs(folder / "other.csv", question="Rätsel")
    keys = {"data": data, "model": uninterrupted / "model", "elsewhere": other, **SHORT, "max_length": 24}
    return folder, [*words_of(keys), "--num_train_epochs", "3"]


@pytest.fixture(scope="module")
def finished(command):
    folder, words = command
    assert main([*words, "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


def test_one_command_trains_and_answers(finished, command, capsys):
    _, words = command
    result = answer_of(finished)
    assert [*result] == ["your data", "elsewhere"]
    assert [*result["your data"]] == ["nDCG@10", "accuracy@1", "recall@10"]
    assert [*result["your data"]["nDCG@10"]] == ["32", "16", "8"]
    assert result["your data"]["nDCG@10"]["32"]["examples"] == 30
    manifest = finished / "data/manifest.yaml"
    assert manifest_of(finished) == manifest
    (source,) = load_manifest(manifest)
    assert (source.name, PublishedFile(source.files[0]).num_rows) == ("my_pairs", 30)
    # A finished run answers again.
    capsys.readouterr()
    assert main([*words, "--output_dir", str(finished), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "before" in printed and ("on your data" in printed) and "; " in printed.splitlines()[-3]
    assert answer_of(finished) == result


def test_the_scores_before_are_those_of_the_start(finished, uninterrupted, command):
    stage = load_recipe(finished / "recipe.yaml", {"output_dir": str(finished)}).stages[0]
    sets = own_data.held_out_sets(stage.arguments)
    scores = own_data._scores(resolve(str(uninterrupted / "model"), "model"), "model", stage.arguments, sets)
    result = answer_of(finished)
    for part, (own,) in scores.items():
        for (metric, dim), values in own.items():
            assert result[part][metric][str(dim)]["before"] == pytest.approx(100 * values.mean(), abs=0.006)


def test_a_killed_run_goes_on_to_the_same_weights_and_answer(finished, command, tmp_path, monkeypatch):
    _, words = command
    monkeypatch.setattr(own_data, "check_own_data", lambda args: None)
    run = tmp_path / "run"
    killed(words[0], 4, *words[1:], "--output_dir", str(run))
    assert main([*words, "--output_dir", str(run), "--resume"]) == 0
    one, other = (load_file(folder / "model/model.safetensors") for folder in (finished, run))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert answer_of(run) == answer_of(finished)


def test_other_data_is_scored_before_again(command, tmp_path):
    _, words = command
    data, run = write_pairs(tmp_path / "pairs.csv", rows=40), tmp_path / "run"
    words = [str(data) if word.endswith("my pairs.csv") else word for word in words]
    killed(words[0], 0, *words[1:], "--output_dir", str(run))
    first = (run / "before.npz").read_bytes()
    write_pairs(data, rows=50)
    killed(words[0], 0, *words[1:], "--output_dir", str(run))
    assert (run / "before.npz").read_bytes() != first


def test_replayed_rows_have_their_share(command, tmp_path):
    _, words = command
    more = write_pairs(tmp_path / "replayed.csv", rows=90, question="vorher")
    run = ["--output_dir", str(tmp_path / "run"), "--replay", "0.25", "--replay_data", str(more), "--max_steps", "1"]
    assert main([*words, *run]) == 0
    manifest = tmp_path / "run/mixed/manifest.yaml"
    assert manifest_of(tmp_path / "run") == manifest
    own, replayed = load_manifest(manifest)
    assert (own.cap, replayed.cap) == (None, 10) and PublishedFile(own.files[0]).num_rows == 30


def test_a_recipe_may_name_data_beside_it(command, tmp_path, uninterrupted):
    write_pairs(tmp_path / "mine.csv")
    keys = {"extends": None, "data": ["mine.csv"], "elsewhere": "none", "model": str(uninterrupted / "model"), **SHORT}
    keys |= {"output_dir": str(tmp_path / "run"), "max_steps": 1}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
    assert main([str(tmp_path / "r.yaml")]) == 0
    assert [*answer_of(tmp_path / "run")] == ["your data"]


def test_nothing_is_written_before_the_data_is_checked(command, tmp_path, capsys):
    _, words = command
    bad = tmp_path / "bad.csv"
    bad.write_text("question,answer\na,b\nc,\n")
    words = [str(bad) if word.endswith("my pairs.csv") else word for word in words]
    assert main([*words, "--output_dir", str(tmp_path / "out/run")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {bad}: row 1, column 'answer'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--manifest", "m.yaml"], ("'data'", "'manifest'", "one of them")),
        (["--replay", "1"], ("'replay'", "less than 1")),
        (["--replay_data", "x.csv"], ("'replay_data'", "'replay: SHARE'")),
        (["--learning_rate_by_size", '{"small": 1}'], ("'learning_rate_by_size'", "'small'")),
        (["--columns", "frage=x"], ("'columns'", "ROLE=COLUMN")),
    ],
)
def test_keys_that_do_not_fit(more, parts, command, tmp_path, capsys):
    _, words = command
    assert main([*words, "--output_dir", str(tmp_path / "run"), *more]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(part in line for part in parts), line
    assert not (tmp_path / "run").exists()


def test_keys_that_need_data(tmp_path, capsys):
    assert main(["--elsewhere", "x.csv"]) == 2
    assert "'elsewhere' has no effect without 'data: FILE'" in capsys.readouterr().err


def test_the_learning_rate_follows_the_size_unless_it_is_given(command, tmp_path):
    _, words = command
    words = [
        word for pair in zip(words[::2], words[1::2], strict=True) if pair[0] != "--learning_rate" for word in pair
    ]
    rates = [
        "--learning_rate_by_size",
        '{"1e3": 1e-1, "1e5": 3e-3, "1e9": 1e-5}',
        "--max_steps",
        "1",
        "--warmup_steps",
        "0",
    ]
    for name, more, expected in (("chosen", [], 3e-3), ("given", ["--learning_rate", "2e-4"], 2e-4)):
        assert main([*words, *rates, *more, "--output_dir", str(tmp_path / name), "--save_steps", "1"]) == 0
        state = json.loads((tmp_path / name / "checkpoint-1/trainer_state.json").read_text())
        assert state["log_history"][0]["learning_rate"] == pytest.approx(expected)
        shutil.rmtree(tmp_path / name)


def test_what_is_scored_is_not_replayed(command, tmp_path):
    _, words = command
    more = write_pairs(tmp_path / "replayed.csv", rows=90)
    run = ["--output_dir", str(tmp_path / "run"), "--replay", "0.25", "--replay_data", str(more), "--max_steps", "1"]
    assert main([*words, *run]) == 0
    queries = pd.read_parquet(tmp_path / "run/data/my_pairs.held_out.parquet")["query"]
    replayed = pd.read_parquet(tmp_path / "run/replay/replayed.parquet")["query"]
    assert len(replayed) == 60 and not {*queries} & {*replayed}


def test_the_start_is_scored_on_other_sets_if_these_are_named(command, tmp_path):
    _, words = command
    run = ["--output_dir", str(tmp_path / "run")]
    killed(words[0], 0, *words[1:], *run)
    assert main([*words, *run, "--elsewhere", "none", "--max_steps", "1"]) == 0
    assert [*answer_of(tmp_path / "run")] == ["your data"]


def test_a_plan_counts_own_data(command, tmp_path, capsys):
    _, words = command
    more = write_pairs(tmp_path / "replayed.csv", question="vorher")
    run = [*words, "--output_dir", str(tmp_path / "run"), "--replay", "0.25", "--replay_data", str(more)]
    assert main([*run, "--dry-run"]) == 0
    assert "mixed/manifest.yaml (local)" in capsys.readouterr().out
    assert main([*run, "--max_steps", "1"]) == 0


def test_what_is_scored_elsewhere_alone_cannot_be_replayed(command, tmp_path, capsys):
    _, words = command
    run = [*words, "--output_dir", str(tmp_path / "run"), "--replay", "0.25", "--replay_data", words[5]]
    assert main(run) == 2
    assert "held-out query; give other data" in capsys.readouterr().err


def test_two_processes_train_the_same_weights_and_answer_once(finished, command, tmp_path):
    _, words = command
    statuses, logs = launch(main, [*words, "--output_dir", tmp_path / "run"], tmp_path)
    assert statuses == [0, 0], "\n".join(logs)
    one, other = (load_file(folder / "model/model.safetensors") for folder in (finished, tmp_path / "run"))
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
    results = [answer_of(folder)["your data"]["nDCG@10"]["32"] for folder in (finished, tmp_path / "run")]
    assert results[0] == pytest.approx(results[1], abs=0.02)
    assert [log.count("on your data") for log in logs] == [1, 0]
