"""What of a run may be published: nothing of the paths, the machine, the user or the environment."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.training.publishing.packed import content_of, rewrite_json, rewrite_recipe
from tests.training.recipes import write_recipe
from training.common.errors import UserError
from training.common.run_folder import public_name
from training.config.arguments import StageArguments
from training.evaluation.records import load_evaluation
from training.models.model_ref import model_revision
from training.publishing import states
from training.publishing.pack import PackOptions, pack
from training.run_stage import main as run_stage

NAME = "f2llm-v2-tiny"


def test_every_key_of_a_stage_is_public_or_withheld():
    assert states.PUBLIC_KEYS & states.WITHHELD_KEYS == set()
    # A new key: decide whether it changes what is learnt, and names no path.
    assert states.PUBLIC_KEYS | states.WITHHELD_KEYS == {each.name for each in fields(StageArguments)}
    assert not [key for key in states.PUBLIC_KEYS if key.endswith(("_dir", "_token", "_id", "_path"))]
    assert states.WITHHELD_KEYS >= {"output_dir", "manifest", "run_name", "report_to", "hub_token", "fsdp_config"}


def test_arguments_and_configurations_lose_what_names_paths():
    options = {"locale_dirs": ["/usr/share/alice"], "most": 5, "share": 0.1, "none": None}
    private = {"output_dir": "/home/alice/x", "something_new": "/home/alice/y"}
    given = {"learning_rate": 1e-3, **private, "source_caps": '{"mono_*": 5}', "builder_options": options}
    cleaned = {"builder_options": {"most": 5, "share": 0.1, "none": None}}
    assert states.clean_arguments(given) == {"learning_rate": 1e-3, "source_caps": {"mono_*": 5}, **cleaned}
    assert states.clean_arguments({"builder_options": json.dumps(options)}) == cleaned
    config = {"hidden_size": 8, "_name_or_path": "/home/alice/x", "name_or_path": "y", "tokenizer_file": "z"}
    assert states.clean_config(config) == {"hidden_size": 8}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        *(("/home/someone/models/big", "big"), ("big", "big"), ("runs/alice-best", ""), ("runs/Alice_7", "")),
        *(("runs/alicetta", "alicetta"), ("/data/gpu07", ""), ("/data/gpu07.cluster", "")),
    ],
)
def test_a_path_is_named_by_its_last_part_unless_that_names_user_or_machine(path, name, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    monkeypatch.setattr("platform.node", lambda: "gpu07.cluster")
    assert public_name(path) == name
    # The user of a container may have no name.
    monkeypatch.setattr("getpass.getuser", lambda: {}["no name"])
    assert public_name("runs/model") == "model"


def test_what_is_private_follows_from_recipe_home_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice-home")
    monkeypatch.setenv("SOME_API_KEY", "key-of-alice")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr("training.publishing.states.get_token", lambda: "hf_ofalice")
    keys = {"output_dir": "runs/alice/x", "executor": '{"name": "slurm", "logging_dir": "/scratch/logs"}'}
    keys |= {"builder_options": {"locale_dirs": ["/usr/share/catalogs"]}, "learning_rate": 1e-3}
    keys |= {"model": "Qwen/Qwen3-0.6B", "tokenizer": "train"}
    texts = states.private_texts([states.ModelState(tmp_path / "x", tmp_path / "x/model", keys)])
    assert texts.keys() >= {"/home/alice-home", "key-of-alice", "hf_ofalice", "runs/alice/x", "/scratch/logs"}
    assert texts.keys() >= {"/usr/share/catalogs", str(tmp_path / "x")}
    assert not texts.keys() & {"Qwen/Qwen3-0.6B", "false", "train", "slurm"}


@pytest.mark.parametrize("name", ["README.md", "evaluation/scores.json", "figures/a.svg", "keys.npz", "values.npz"])
def test_a_private_text_in_any_file_is_found_and_not_repeated(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x00" * 5000 + b"/secret/place" + b"\x00")
    if path.suffix == ".npz":
        text = np.frombuffer(b"see /secret/place for it")
        np.savez_compressed(path, **({"/secret/place|0": [1.0]} if path.stem == "keys" else {"a": text}))
    with pytest.raises(UserError, match="the place") as caught:
        states.check_nothing_private(tmp_path, {"/secret/place": "the place"})
    assert "/secret/place" not in str(caught.value) and path.name in str(caught.value)
    states.check_nothing_private(tmp_path, {"/another/place": "the place"})


def test_a_private_text_is_found_as_json_writes_it_but_not_in_a_vocabulary(tmp_path, refuses):
    (tmp_path / "tokenizer.json").write_text('{"/workspace": 7}')
    states.check_nothing_private(tmp_path, {"/workspace": "the working folder"})
    (tmp_path / "release.json").write_text(json.dumps({"a": "/home/josé/läufe"}))
    with refuses("release.json", "the place"):
        states.check_nothing_private(tmp_path, {"/home/josé/läufe": "the place"})


@pytest.fixture
def marked(tmp_path_factory):
    """A run with the word MARKER in all paths, names and secrets, and in all that its files could hold besides."""
    folder = tmp_path_factory.mktemp("MARKERhome") / "MARKERuser" / "project-MARKER"
    folder.mkdir(parents=True)
    keys = {"run_name": "MARKERrun", "project": "MARKERproject", "num_train_epochs": 1}
    keys |= {"data_dir": str(folder / "data"), "prepared_dir": str(folder / "MARKERprepared")}
    assert run_stage([str(write_recipe(folder, **keys))]) == 0
    run = Path(shutil.copytree(folder / "run", tmp_path_factory.mktemp("MARKERcopy") / "run"))
    model = run / "stage2/model"
    for name in ("config.json", "tokenizer_config.json", "1_Pooling/config.json"):
        rewrite_json(model / name, _name_or_path="/MARKER/a", name_or_path="/MARKER/b")
    more = {"hub_token": "hf_MARKERtoken", "logging_dir": "runs/Nov_MARKERhost", "deepspeed": "/MARKER/zero.json"}
    built = {"builder": "gettext", "builder_options": {"locale_dirs": ["/MARKER/locale"], "min_pairs": 5}}
    rewrite_json(model / "training_arguments.json", **more, **built)
    save_file(load_file(model / "model.safetensors"), model / "model.safetensors", {"format": "pt", "by": "MARKER"})
    for name in ("MARKER.txt", "notes.txt"):
        (model / name).write_text("MARKER")
    executor = json.dumps({"name": "slurm", "partition": "MARKER", "venv": "/MARKER/venv"})
    # Refused by now, but in the recipes of earlier runs.
    hub = {"hub_token": "hf_MARKERtoken", "hub_model_id": "MARKERorg/MARKERmodel"}
    rewrite_recipe(run / "stage2", **built, **hub, executor=executor, fsdp_config="/MARKER/fsdp.json")
    # Scores belong to the model as it is now.
    evaluation, identity = load_evaluation(run / "report"), model_revision(str(model), "RUN")
    own = {"identity": identity}
    evaluation.models = [replace(each, **own if "stage2" in each.name else {}) for each in evaluation.models]
    evaluation.failures["MARKER: Task"] = "MARKER"
    evaluation.save(run / "report")
    rewrite_json(run / "evaluation.json", identity=identity)
    return run


def test_nothing_of_path_machine_user_or_environment_is_packed(marked, tmp_path, monkeypatch, refuses):
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
        examples = {name: stored.read(name) for name in stored.namelist()}
    assert examples and b"marker" not in repr(examples).lower().encode()
    assert b"min_pairs" in content["release.json"]
    # What would name a path all the same is refused.
    prompts = {"query": f"from {marked}", "document": ""}
    rewrite_json(marked / "stage2/model/config_sentence_transformers.json", prompts=prompts)
    with refuses("would tell", "the place of run"):
        pack(marked / "stage2", tmp_path / "other", PackOptions(NAME))
    assert list(tmp_path.iterdir()) == [folder]
