"""Nothing of the place, the machine, the user or the environment gets into a packed folder."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.training.publishing.contents import content_of
from tests.training.recipes import write_recipe
from training.evaluation.records import load_evaluation
from training.models.model_identity import model_revision
from training.publishing.pack import PackOptions, pack
from training.run_stage import main as run_stage

NAME = "f2llm-v2-tiny"


@pytest.fixture(scope="module")
def private_run(tmp_path_factory) -> Path:
    """A run whose places, names and secrets all hold the word MARKER, or marker."""
    folder = tmp_path_factory.mktemp("MARKERhome") / "MARKERuser" / "project-MARKER"
    folder.mkdir(parents=True)
    keys = {
        "run_name": "MARKERrun",
        "project": "MARKERproject",
        "data_dir": str(folder / "data"),
        "prepared_dir": str(folder / "MARKERprepared"),
        "num_train_epochs": 1,
    }
    assert run_stage([str(write_recipe(folder, **keys))]) == 0
    return folder / "run"


@pytest.fixture
def marked(private_run, tmp_path_factory) -> Path:
    """A copy of the run, with the word in all that a run's files could hold besides."""
    run = tmp_path_factory.mktemp("MARKERcopy") / "run"
    shutil.copytree(private_run, run)
    model = run / "stage2/model"
    for name in ("config.json", "tokenizer_config.json", "1_Pooling/config.json"):
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**content, "_name_or_path": "/MARKER/a", "name_or_path": "/MARKER/b"}))
    arguments = json.loads((model / "training_arguments.json").read_text())
    more = {"hub_token": "hf_MARKERtoken", "logging_dir": "runs/Nov_MARKERhost", "deepspeed": "/MARKER/zero.json"}
    (model / "training_arguments.json").write_text(json.dumps({**arguments, **more}))
    save_file(load_file(model / "model.safetensors"), model / "model.safetensors", {"format": "pt", "by": "MARKER"})
    (model / "MARKER.txt").write_text("MARKER")
    (model / "notes.txt").write_text("MARKER")
    recipe = run / "stage2/recipe.yaml"
    more = {
        "builder": "gettext",
        "builder_options": {"locale_dirs": ["/MARKER/locale"], "min_pairs": 5},
        "executor": json.dumps({"name": "slurm", "partition": "MARKER", "venv": "/MARKER/venv"}),
        "fsdp_config": "/MARKER/fsdp.json",
        # Refused by now, but in the recipes of earlier runs.
        "hub_token": "hf_MARKERtoken",
        "hub_model_id": "MARKERorg/MARKERmodel",
    }
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **more}))
    # Scores belong to the model as it is now.
    evaluation = load_evaluation(run / "report")
    identity = model_revision(str(model), "RUN")
    evaluation.models = [
        replace(each, identity=identity) if each.name.endswith("stage2") else each for each in evaluation.models
    ]
    evaluation.failures["MARKER: Task"] = "MARKER"
    evaluation.save(run / "report")
    result = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps({**result, "identity": identity}))
    return run


def test_nothing_of_place_machine_user_or_environment_is_told(marked, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/MARKER")
    monkeypatch.setenv("HF_TOKEN", "hf_MARKERenvironment")
    monkeypatch.setattr("getpass.getuser", lambda: "MARKER")
    monkeypatch.setattr("platform.node", lambda: "MARKER")
    folder = pack(marked / "stage2", tmp_path / NAME, PackOptions(NAME))
    content = content_of(folder)
    assert content.keys() >= {"evaluation/scores.json", "evaluation/results.json", "README.md"}
    for path, held in content.items():
        assert b"marker" not in path.lower().encode() + held.lower(), path
    with zipfile.ZipFile(folder / "evaluation/examples.npz") as stored:
        assert stored.namelist()
        for name in stored.namelist():
            assert b"marker" not in name.lower().encode() + stored.read(name).lower()
    assert b"min_pairs" in content["release.json"]


def test_what_would_tell_a_place_all_the_same_is_refused(marked, tmp_path, refuses, no_figures):
    prompts = marked / "stage2/model/config_sentence_transformers.json"
    content = json.loads(prompts.read_text())
    prompts.write_text(json.dumps({**content, "prompts": {"query": f"from {marked}", "document": ""}}))
    with refuses("would tell", "the place of run"):
        pack(marked / "stage2", tmp_path / NAME, PackOptions(NAME))
    assert list(tmp_path.iterdir()) == []
