"""What cannot be packed is refused in one line, and costs nothing that was there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import modeling_f2llm
from tests.training.publishing.packed import change_weights, content_of
from training.publish import main
from training.publishing.pack import PackOptions, pack

NAME = "f2llm-v2-tiny"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        *(({"name": name}, ["--name", repr(name)]) for name in ("org/name", "na me", "", "größe", "..")),
        ({"dtype": "float8"}, ["--dtype 'float8'", "bfloat16, float32"]),
        ({"max_shard_size": "large"}, ["'large'", "5GB"]),
        ({"licence": "my own"}, ["--licence 'my own'"]),
        ({"licence_file": Path("nowhere")}, ["--licence-file nowhere", "cannot be read"]),
        ({"checkpoint": "checkpoint-1000"}, ["holds no checkpoint-1000", "--checkpoint (checkpoint-"]),
        ({"evaluation": Path("nowhere")}, ["nowhere", "scores.json"]),
    ],
)
def test_faulty_options_are_refused(trained_runs, tmp_path, refuses, options, parts):
    with refuses(*parts):
        pack(trained_runs / "student", tmp_path / "packed", PackOptions(**{"name": NAME, **options}))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_finished_run_is_refused(runs, tmp_path, refuses):
    options, output = PackOptions(NAME), tmp_path / "out"
    for folder in (runs / "nowhere", runs.parent / "data"):
        with refuses(folder, "holds no finished model", "stage (none)"):
            pack(folder, output, options)
    with refuses(runs, "holds no finished model", "stage (pruned, stage1, stage2, student)"):
        pack(runs, output, options)
    checkpoint = next((runs / "student").glob("checkpoint-*")).name
    shutil.rmtree(runs / "student/model")
    with refuses("holds no finished model", "--resume", f"--checkpoint ({checkpoint})"):
        pack(runs / "student", output, options)
    assert not output.exists()


@pytest.mark.parametrize("content", [None, "{"])
@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "modules.json", "tokenizer.json", "config_sentence_transformers.json"),
        *("1_Pooling/config.json", "training_arguments.json", "model.safetensors"),
    ],
)
def test_a_model_with_a_missing_or_damaged_file_is_refused(runs, tmp_path, refuses, name, content):
    path = runs / "student/model" / name
    path.unlink() if content is None else path.write_text(content)
    # A folder without a configuration counts as no model at all.
    with refuses(runs / ("student" if name == "config.json" else "student/model")):
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


def test_only_a_release_is_replaced(runs, tmp_path, refuses, no_figures):
    output = tmp_path / "out"
    output.mkdir()
    pack(runs / "student", output, PackOptions(NAME))
    (output / "README.md").write_text("My own card.\n")
    with refuses(output, "README.md was changed since it was packed"):
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
    with refuses(runs / "student", "holds model, which is read"):
        pack(runs / "student", runs / "student", PackOptions(NAME))


def test_a_fault_leaves_the_release_before_and_no_half_of_one(runs, tmp_path, monkeypatch, capsys, refuses, no_figures):
    output = pack(runs / "stage2", tmp_path / "before", PackOptions(NAME))
    before = content_of(output)
    change_weights(runs / "stage2/model/model.safetensors", lambda _, tensor: tensor * torch.nan)
    with refuses("NaN"):
        pack(runs / "stage2", output, PackOptions(NAME))
    assert content_of(output) == before and not list(tmp_path.glob(".*"))

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.publishing.model_files.save_file", full)
    assert main(["pack", str(runs / "pruned"), "--name", NAME, "--output", str(tmp_path / "out")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
