"""A packed folder is complete by itself, tells nothing private, and is the same whenever it is packed."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

import modeling_f2llm
from tests.training.recipes import write_recipe
from training.evaluation.records import load_evaluation
from training.model_identity import model_revision
from training.publish import main
from training.publishing.pack import PackOptions, pack
from training.publishing.record import load_release
from training.run_stage import main as run_stage

NAME = "f2llm-v2-tiny"


@pytest.fixture(scope="module")
def packed(trained_runs, tmp_path_factory) -> Path:
    """The student, packed; not to be changed."""
    folder = tmp_path_factory.mktemp("packed") / NAME
    return pack(trained_runs / "student", folder, PackOptions(NAME))


def _content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _pack(run: Path, *words: str, name: str = NAME) -> int:
    return main(["pack", str(run), "--name", name, *words])


def test_everything_that_belongs_to_a_release_is_there(packed):
    assert _content(packed).keys() >= {
        *("README.md", "LICENSE", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("modules.json", "1_Pooling/config.json", "2_Normalize/config.json", "config_sentence_transformers.json"),
        *("configuration_f2llm.py", "modeling_f2llm.py", "packing.py", "layers.py", "training_arguments.json"),
        *("release.json", "evaluation/scores.json", "evaluation/examples.npz", "evaluation/results.json"),
    }
    assert list((packed / "figures").glob("*.svg")) and not list(packed.rglob("*.bin")) + list(packed.rglob("*.pt"))
    assert "Apache License" in (packed / "LICENSE").read_text()
    assert NAME in (packed / "README.md").read_text()


def test_the_record_says_what_is_there(packed, trained_runs):
    release = load_release(packed)
    config = json.loads((packed / "config.json").read_text())
    assert (release.name, release.licence, release.dtype, release.family) == (NAME, "apache-2.0", "float32", None)
    assert release.dimension == release.dimensions[0] == config["hidden_size"] == 16 and 8 in release.dimensions
    assert release.parameters == sum(each.numel() for each in load_file(packed / "model.safetensors").values())
    assert release.shape["num_hidden_layers"] == 1 and release.languages == ("eng",)
    assert release.prompts["query"].startswith("Instruct: ") and release.prompts["document"] == ""
    assert [stage.name for stage in release.stages] == ["stage1", "stage2", "pruned", "student"]
    assert release.files == {path: len(held) for path, held in _content(packed).items() if path != "release.json"}
    assert json.loads((packed / "training_arguments.json").read_text()) == release.stages[-1].arguments
    assert {model.label for model in load_evaluation(packed / "evaluation").models} == {NAME, "stage2", "TF-IDF"}


def test_the_model_is_the_runs_own_for_every_loader(packed, trained_runs, sentences):
    own = SentenceTransformer(str(trained_runs / "student/model"))
    expected = torch.from_numpy(own.encode(sentences))
    for options in ({}, {"trust_remote_code": True}):
        found = torch.from_numpy(SentenceTransformer(str(packed), **options).encode(sentences))
        assert torch.allclose(found, expected, atol=1e-6)
    tokens = AutoTokenizer.from_pretrained(packed)(sentences, padding=True, return_tensors="pt")
    states = AutoModel.from_pretrained(packed)(**tokens).last_hidden_state
    last = states[torch.arange(len(sentences)), tokens.attention_mask.sum(1) - 1]
    assert torch.allclose(torch.nn.functional.normalize(last), expected, atol=1e-5)


def test_in_bfloat16_weights_and_configuration_agree(trained_runs, tmp_path, sentences, no_figures):
    folder = pack(trained_runs / "student", tmp_path / NAME, PackOptions(NAME, dtype="bfloat16", max_shard_size="8KB"))
    weights = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    assert {each.dtype for each in weights.values()} == {torch.bfloat16} and len(weights) > 5
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    release = load_release(folder)
    assert (release.dtype, release.trained_dtype) == ("bfloat16", "float32")
    assert "model.safetensors.index.json" in release.files and "model.safetensors" not in release.files
    assert AutoModel.from_pretrained(folder).dtype == torch.bfloat16
    own = SentenceTransformer(str(trained_runs / "student/model")).encode(sentences)
    found = SentenceTransformer(str(folder)).encode(sentences, convert_to_numpy=True)
    assert ((own * found).sum(1) > 0.999).all()


def test_packed_again_it_is_left_alone_and_from_elsewhere_too(packed, runs, caplog):
    before = {path: path.stat().st_mtime_ns for path in packed.rglob("*")}
    content = _content(packed)
    with caplog.at_level("INFO"):
        assert _pack(runs / "student", "--output", str(packed)) == 0
    assert {path: path.stat().st_mtime_ns for path in packed.rglob("*")} == before and _content(packed) == content
    assert "holds this release already" in caplog.text
    assert [path.name for path in packed.parent.iterdir()] == [NAME]


def test_other_options_and_a_changed_run_are_packed_anew(runs, no_figures):
    folder = runs / "packed" / NAME
    assert _pack(runs / "student") == 0
    assert _pack(runs / "student", "--author", "The Authors") == 0
    assert load_release(folder).author == "The Authors"
    recipe = runs / "student/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("learning_rate: 0.001", "learning_rate: 0.5"))
    assert _pack(runs / "student") == 0
    assert load_release(folder).author is None and load_release(folder).stages[-1].written["learning_rate"] == 0.5


def test_other_weights_of_the_same_size_are_packed_anew(runs, no_figures):
    assert _pack(runs / "pruned") == 0
    weights = runs / "pruned/model/model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "norm.weight": tensors["norm.weight"] + 1}, weights, {"format": "pt"})
    sizes = load_release(runs / "packed" / NAME).files
    assert _pack(runs / "pruned") == 0
    assert load_release(runs / "packed" / NAME).files == sizes
    found = load_file(runs / "packed" / NAME / "model.safetensors")
    assert torch.equal(found["norm.weight"], tensors["norm.weight"] + 1)


def test_a_pruned_model_and_a_checkpoint_can_be_packed(runs, no_figures):
    assert _pack(runs / "pruned", name="cut") == 0
    release = load_release(runs / "packed/cut")
    assert [stage.name for stage in release.stages] == ["stage1", "pruned"] and release.stages[-1].steps is None
    assert json.loads((runs / "packed/cut/training_arguments.json").read_text())["prune_to"]["hidden_size"] == 16
    checkpoint = next((runs / "student").glob("checkpoint-*")).name
    assert _pack(runs / "student", "--checkpoint", checkpoint, name="half") == 0
    assert load_release(runs / "packed/half").stages[-1].name == f"student@{checkpoint}"
    assert not {"optimizer.pt", "scheduler.pt", "trainer_state.json"} & _content(runs / "packed/half").keys()


def test_another_licence_comes_with_its_text(runs, capsys, no_figures):
    assert _pack(runs / "student", "--licence", "cc-by-nc-4.0") == 2
    assert "--licence-file" in capsys.readouterr().err
    text = runs / "licence.txt"
    text.write_text("You may.\n")
    assert _pack(runs / "student", "--licence", "cc-by-nc-4.0", "--licence-file", str(text)) == 0
    assert (runs / "packed" / NAME / "LICENSE").read_text() == "You may.\n"
    assert load_release(runs / "packed" / NAME).licence == "cc-by-nc-4.0"


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Spares the drawing, which takes most of the time, where nothing depends on it."""
    monkeypatch.setattr("training.publishing.figures.draw_figures", lambda folder: [])


@pytest.fixture(scope="module")
def private_run(tmp_path_factory) -> Path:
    """A run whose places, names and secrets all hold the word MARKER, or marker."""
    folder = tmp_path_factory.mktemp("MARKERhome") / "MARKERuser" / "project-MARKER"
    folder.mkdir(parents=True)
    keys = {
        "run_name": "MARKERrun",
        "project": "MARKERproject",
        "hub_token": "hf_MARKERtoken",
        "hub_model_id": "MARKERorg/MARKERmodel",
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
    content = _content(folder)
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


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *(("org/name", "slash"), ("-name", "name"), ("na me", "name"), ("a--b", "--"), ("name.git", ".git")),
        *(("", "name"), ("größe", "name"), ("a" * 97, "name"), ("../name", "name"), ("..", "name")),
    ],
)
def test_a_name_that_no_repository_could_have_is_refused(packed, trained_runs, tmp_path, refuses, name, part):
    with refuses("--name", repr(name), part):
        pack(trained_runs / "student", tmp_path / "packed", PackOptions(name))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"dtype": "float8"}, ["--dtype 'float8'", "bfloat16, float32"]),
        ({"max_shard_size": "large"}, ["'large'", "5GB"]),
        ({"licence": "my own"}, ["--licence 'my own'"]),
        ({"licence_file": Path("nowhere")}, ["--licence-file nowhere", "cannot be read"]),
        ({"checkpoint": "checkpoint-1000"}, ["checkpoint-1000", "there are checkpoint-"]),
        ({"evaluation": Path("nowhere")}, ["nowhere", "scores.json"]),
    ],
)
def test_faulty_options_are_refused(trained_runs, tmp_path, refuses, options, parts):
    with refuses(*parts):
        pack(trained_runs / "student", tmp_path / "packed", PackOptions(NAME, **options))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_finished_run_is_refused(runs, tmp_path, refuses):
    options, output = PackOptions(NAME), tmp_path / "out"
    with refuses(runs / "nowhere", "no such folder"):
        pack(runs / "nowhere", output, options)
    with refuses(runs, "no run", "pruned, stage1, stage2, student"):
        pack(runs, output, options)
    with refuses("no run", f"give its run, {runs / 'student'}"):
        pack(runs / "student/model", output, options)
    (tmp_path / "empty").mkdir()
    with refuses("no run", "output_dir"):
        pack(tmp_path / "empty", output, options)
    checkpoint = next((runs / "student").glob("checkpoint-*")).name
    shutil.rmtree(runs / "student/model")
    with refuses("not finished", f"--checkpoint ({checkpoint})"):
        pack(runs / "student", output, options)
    assert not output.exists()


_JSON = (
    *("config.json", "modules.json", "tokenizer.json", "tokenizer_config.json", "config_sentence_transformers.json"),
    *("1_Pooling/config.json", "training_arguments.json"),
)


@pytest.mark.parametrize("name", [*_JSON, "model.safetensors"])
def test_a_model_that_lacks_a_file_is_refused(runs, tmp_path, refuses, name):
    (runs / "student/model" / name).unlink()
    with refuses(runs / "student/model"):
        pack(runs / "student", tmp_path / "out", PackOptions(NAME))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", _JSON)
def test_a_model_with_a_damaged_file_is_refused(runs, tmp_path, refuses, name):
    (runs / "student/model" / name).write_text("{")
    with refuses(runs / "student/model"):
        pack(runs / "student", tmp_path / "out", PackOptions(NAME))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_remote_code_is_that_of_this_checkout(runs, no_figures, tmp_path, refuses):
    (runs / "student/model/packing.py").write_text("# of another day, by alice")
    output = pack(runs / "student", tmp_path / "out", PackOptions(NAME))
    for name in ("packing.py", "modeling_f2llm.py", "configuration_f2llm.py", "layers.py"):
        assert (output / name).read_bytes() == (Path(modeling_f2llm.__file__).parent / name).read_bytes()
    config = runs / "student/model/config.json"
    config.write_text(config.read_text().replace("modeling_f2llm.F2LLMModel", "my_code.F2LLMModel"))
    with refuses(config, "my_code.F2LLMModel"):
        pack(runs / "student", tmp_path / "other", PackOptions(NAME))


def test_an_adapter_is_told_apart(runs, tmp_path, refuses):
    (runs / "student/model/adapter_config.json").write_text("{}")
    with refuses("adapter"):
        pack(runs / "student", tmp_path / "out", PackOptions(NAME))


def test_only_a_release_is_replaced(runs, tmp_path, refuses, no_figures):
    output = tmp_path / "out"
    output.mkdir()
    pack(runs / "student", output, PackOptions(NAME))
    (output / "README.md").write_text("My own card.\n")
    with refuses(output, "changed since it was packed (README.md)"):
        pack(runs / "student", output, PackOptions(NAME))
    assert (output / "README.md").read_text() == "My own card.\n"
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with refuses(other, "no packed model"):
        pack(runs / "student", other, PackOptions(NAME))
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]
    with refuses("thesis.tex", "no packed model"):
        pack(runs / "student", other / "thesis.tex", PackOptions(NAME))
    with refuses(runs / "student", "no packed model"):
        pack(runs / "student", runs / "student", PackOptions(NAME))


def test_weights_that_are_not_finite_cost_nothing(runs, tmp_path, refuses, no_figures):
    output = pack(runs / "student", tmp_path / "out", PackOptions(NAME))
    before = _content(output)
    weights = runs / "student/model/model.safetensors"
    tensors = load_file(weights)
    tensors["norm.weight"][0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    with refuses("norm.weight", "NaN"):
        pack(runs / "student", output, PackOptions(NAME))
    assert _content(output) == before and [path.name for path in tmp_path.glob(".*")] == []


def test_a_full_disk_leaves_no_half_of_a_release(runs, tmp_path, monkeypatch, capsys):
    def full(*_args, **_kwargs) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.publishing.weights.save_file", full)
    assert _pack(runs / "student", "--output", str(tmp_path / "out")) == 1
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_without_the_extra_the_error_names_it(runs, tmp_path, monkeypatch, refuses, module):
    monkeypatch.setitem(sys.modules, module, None)
    with refuses(module, ".[publish]"):
        pack(runs / "student", tmp_path / "out", PackOptions(NAME))
