"""A packed folder is complete, the same each time, and has the licence that follows from what the model was made of."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

import modeling_f2llm
from tests.training.publishing.packed import QUICK, change_weights, content_of, put_in_cache, rewrite_recipe
from training.data.cldr.sources import LICENCE as CLDR
from training.data.gettext_catalogs.sources import LICENCE as GETTEXT
from training.evaluation.records import load_evaluation
from training.merge import main as merge
from training.publish import main
from training.publishing.pack import PERMISSIVE, PackOptions, pack
from training.publishing.record import load_release
from training.publishing.verify import examine
from training.run_stage import main as run_stage
from training.stages.continuation import check_data, note_changes

NAME = "f2llm-v2-tiny"


@pytest.fixture(scope="module")
def packed(trained_runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / NAME
    return pack(trained_runs / "student", folder, PackOptions(NAME))


def _pack(run, *words, name=NAME):
    return main(["pack", str(run), "--name", name, *words])


def test_everything_that_belongs_to_a_release_is_there_and_in_its_record(packed, trained_runs, sentences):
    assert content_of(packed).keys() >= {
        *("README.md", "LICENSE", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("modules.json", "1_Pooling/config.json", "2_Normalize/config.json", "config_sentence_transformers.json"),
        *(
            "attention.py",
            "configuration_f2llm.py",
            "modeling_f2llm.py",
            "packing.py",
            "layers.py",
            "training_arguments.json",
        ),
        *("release.json", "evaluation/scores.json", "evaluation/examples.npz", "evaluation/results.json"),
    }
    assert list((packed / "figures").glob("*.svg")) and not list(packed.rglob("*.bin")) + list(packed.rglob("*.pt"))
    assert "Apache License" in (packed / "LICENSE").read_text()
    assert NAME in (packed / "README.md").read_text()
    release = load_release(packed)
    config = json.loads((packed / "config.json").read_text())
    assert (release.name, release.licence, release.dtype) == (NAME, "apache-2.0", "float32")
    assert release.dimension == release.dimensions[0] == config["hidden_size"] == 16 and 8 in release.dimensions
    assert release.parameters == sum(each.numel() for each in load_file(packed / "model.safetensors").values())
    assert release.shape["num_hidden_layers"] == 1 and release.languages == ("eng",)
    assert release.prompts["query"].startswith("Instruct: ") and release.prompts["document"] == ""
    assert release.files == {path: len(held) for path, held in content_of(packed).items() if path != "release.json"}
    assert json.loads((packed / "training_arguments.json").read_text()) == release.stages[-1].arguments
    assert {model.label for model in load_evaluation(packed / "evaluation").models} == {NAME, "stage2", "TF-IDF"}
    # The model is the run's own.
    expected = SentenceTransformer(str(trained_runs / "student/model")).encode(sentences)
    # That plain transformers give the same is what `verify` checks.
    for options in ({}, {"trust_remote_code": True}):
        found = SentenceTransformer(str(packed), **options).encode(sentences)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert examine(packed).faults == ()


def test_packed_again_it_is_left_alone_and_from_elsewhere_too(packed, runs, caplog):
    # What `hf upload-large-folder` leaves.
    (packed / ".cache/huggingface").mkdir(parents=True)
    (packed / ".cache/huggingface/upload").write_text("half way")
    before = {path: path.stat().st_mtime_ns for path in packed.rglob("*")}
    content = content_of(packed)
    with caplog.at_level("INFO"):
        assert _pack(runs / "student", "--output", str(packed)) == 0
    assert {path: path.stat().st_mtime_ns for path in packed.rglob("*")} == before and content_of(packed) == content
    assert "holds this release already" in caplog.text
    assert [path.name for path in packed.parent.iterdir()] == [NAME]
    shutil.rmtree(packed / ".cache")


def test_other_options_and_another_or_a_changed_run_are_packed_again(runs, no_figures, capsys):
    folder = runs / "packed" / NAME
    assert _pack(runs / "student") == 0
    assert _pack(runs / "student", "--author", "The Authors") == 0
    assert load_release(folder).author == "The Authors"
    recipe = runs / "student/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("learning_rate: 0.001\n", ""))
    assert _pack(runs / "student") == 0
    assert load_release(folder).author is None and "learning_rate" not in load_release(folder).stages[-1].given
    # So are another licence with its text, a pruned model and a checkpoint.
    words = ["--licence", "cc-by-nc-4.0"]
    assert _pack(runs / "student", *words) == 2
    assert "--licence-file" in capsys.readouterr().err
    (runs / "licence.txt").write_text("You may.\n")
    assert _pack(runs / "student", *words, "--licence-file", str(runs / "licence.txt")) == 0
    assert (folder / "LICENSE").read_text() == "You may.\n" and load_release(folder).licence == "cc-by-nc-4.0"
    assert _pack(runs / "pruned", name="cut") == 0
    release = load_release(runs / "packed/cut")
    assert [stage.name for stage in release.stages] == ["stage1", "pruned"] and release.stages[-1].steps is None
    assert json.loads((runs / "packed/cut/training_arguments.json").read_text())["prune_to"]["hidden_size"] == 16
    checkpoint = next((runs / "student").glob("checkpoint-*")).name
    assert _pack(runs / "student", "--checkpoint", checkpoint, name="half") == 0
    assert load_release(runs / "packed/half").stages[-1].name == f"student@{checkpoint}"
    assert not {"optimizer.pt", "scheduler.pt", "trainer_state.json"} & content_of(runs / "packed/half").keys()


def test_a_prompt_that_was_set_after_training_is_packed_and_on_the_card(trained_runs, runs, monkeypatch, no_figures):
    shutil.copyfile(trained_runs.parent / "recipe.yaml", runs.parent / "recipe.yaml")
    monkeypatch.chdir(runs.parent)
    words = ["recipe.yaml", "--stage", "student", "--resume", "--query_instruction", "Turn it around."]
    assert run_stage(words) == 0
    folder = pack(runs / "student", runs.parent / NAME, PackOptions(NAME))
    assert load_release(folder).prompts["query"] == "Instruct: Turn it around.\nQuery: "
    card = (folder / "README.md").read_text()
    assert '| `query` | `"Instruct: Turn it around.\\nQuery: "` |' in card
    # What was measured was measured with it.
    assert load_evaluation(folder / "evaluation").scores
    assert examine(folder, QUICK).faults == ()


def test_two_that_pack_at_once_wait_for_one_another(runs, no_figures, caplog):
    output = runs / "packed" / NAME
    with caplog.at_level("INFO"), ThreadPoolExecutor(2) as pool:
        both = [pool.submit(pack, runs / "student", output, PackOptions(NAME)) for _ in range(2)]
        assert [each.result() for each in both] == [output, output]
    assert "another command is writing it" in caplog.text and "holds this release already" in caplog.text
    assert load_release(output).files.keys() == content_of(output).keys() - {"release.json"}
    assert [path.name for path in output.parent.iterdir()] == [NAME]


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


SAVED = ["config.json", "modules.json", "tokenizer.json", "config_sentence_transformers.json"]
SAVED += ["1_Pooling/config.json", "training_arguments.json", "model.safetensors"]


@pytest.mark.parametrize("content", [None, "{"])
@pytest.mark.parametrize("name", SAVED)
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
    for name in ("attention.py", "packing.py", "modeling_f2llm.py", "configuration_f2llm.py", "layers.py"):
        assert (output / name).read_bytes() == (Path(modeling_f2llm.__file__).parent / name).read_bytes()
    config = runs / "student/model/config.json"
    config.write_text(config.read_text().replace("modeling_f2llm.F2LLMModel", "my_code.F2LLMModel"))
    with refuses(config, "my_code.F2LLMModel"):
        pack(runs / "student", tmp_path / "other", PackOptions(NAME))


def test_only_a_release_is_replaced(runs, tmp_path, refuses, no_figures):
    output, thesis = tmp_path / "out", tmp_path / "other/thesis.tex"
    output.mkdir()
    pack(runs / "student", output, PackOptions(NAME))
    (output / "README.md").write_text("My own card.\n")
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    for folder, part in (
        (output, "README.md was changed since it was packed"),
        (thesis.parent, "no packed model"),
        (thesis, "no packed model"),
        (runs / "student", "holds model, which is read"),
    ):
        with refuses(folder, part):
            pack(runs / "student", folder, PackOptions(NAME))
    assert (output / "README.md").read_text() == "My own card.\n"
    assert [*thesis.parent.iterdir()] == [thesis] and thesis.read_text() == "years of work"


def test_a_fault_leaves_the_release_before_and_no_half_of_one(runs, tmp_path, monkeypatch, capsys, refuses, no_figures):
    output = pack(runs / "stage2", tmp_path / "before", PackOptions(NAME))
    before = content_of(output)
    change_weights(runs / "stage2/model/model.safetensors", lambda _, tensor: tensor * float("nan"))
    with refuses("NaN"):
        pack(runs / "stage2", output, PackOptions(NAME))
    assert content_of(output) == before and not list(tmp_path.glob(".*"))

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.publishing.model_files.save_file", full)
    assert main(["pack", str(runs / "pruned"), "--name", NAME, "--output", str(tmp_path / "out")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


# Licences


def relicense(runs, **licences):
    path = runs.parent / "data/manifest.yaml"
    content = yaml.safe_load(path.read_text())
    for source in content["sources"]:
        given = licences.get(source["task_type"], source.get("licence"))
        source.pop("licence", None) if given is None else source.update(licence=given)
    path.write_text(yaml.safe_dump(content))


def card(folder, named):
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{f'license: {named}' if named else 'tags: [a]'}\n---\n\n# A model\n")
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "given"),
    [("retrieval", "CC-BY-NC-4.0"), ("classification", GETTEXT), ("classification", None)],
)
def test_other_sources_are_asked_about(runs, capsys, kind, given, no_figures):
    relicense(runs, **{kind: given})
    assert _pack(runs / "student") == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and "--licence is missing" in told and "--licence-file" in told
    assert f"source tiny_{kind} ({given or 'no licence in the manifest'})" in told
    assert not (runs / "packed" / NAME).exists()
    assert CLDR.lower() in PERMISSIVE and GETTEXT.lower() not in PERMISSIVE
    relicense(runs, retrieval=CLDR, clustering="MIT", classification="CC0-1.0")
    assert _pack(runs / "student") == 0
    assert load_release(runs / "packed" / NAME).licence == "apache-2.0"


def test_a_collection_of_another_folder_tells_no_licence(runs, capsys, no_figures):
    data = runs.parent / "data"
    content = yaml.safe_load((data / "manifest.yaml").read_text())
    (retrieval,) = (each for each in content["sources"] if each["task_type"] == "retrieval")
    content["sources"].remove(retrieval)
    other, source = data / "free/other.parquet", data / "bought/tiny_retrieval.parquet"
    for file, given in ((other, "MIT"), (source, "proprietary")):
        file.parent.mkdir()
        file.touch()
        name = file.parent.name
        collection = {"name": name, "files": [f"{name}/*.parquet"], "licence": given, "each_file": True}
        content["sources"].append({**retrieval, **collection})
    (data / "manifest.yaml").write_text(yaml.safe_dump(content))
    assert _pack(runs / "student") == 2
    assert "source tiny_retrieval (proprietary)" in capsys.readouterr().err
    # Nor does it when the files of both are gone, or the right entry is.
    for gone in (other, source):
        gone.unlink()
        assert _pack(runs / "student") == 2
        assert "source tiny_retrieval (" in capsys.readouterr().err
    other.touch()
    content["sources"].pop()
    (data / "manifest.yaml").write_text(yaml.safe_dump(content))
    assert _pack(runs / "student") == 2
    assert "source tiny_retrieval (no licence in the manifest)" in capsys.readouterr().err


def test_earlier_data_and_sources_of_an_earlier_stage_and_of_the_teacher_count(runs, capsys, no_figures):
    # Stage 1 alone reads this source; the student has it from there and from its teacher.
    rewrite_recipe(runs / "student", sources="tiny_c*")
    relicense(runs, retrieval="proprietary")
    assert _pack(runs / "student") == 2
    assert "source tiny_retrieval (proprietary)" in capsys.readouterr().err
    # Neither recipe nor manifest names what was read before a change.
    relicense(runs, retrieval="MIT")
    note_changes(runs / "stage1", check_data(runs / "stage1/data.json", {"other": "0"}, True), None)
    assert _pack(runs / "student") == 2
    assert "the data of stage1 (changed while it was trained)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "named"), [("model", "mit"), ("model", None), ("teacher", "apache-2.0"), ("teacher", "llama3")]
)
def test_what_it_started_or_learnt_from_must_allow_it(runs, tmp_path, capsys, key, named, no_figures):
    rewrite_recipe(runs / "stage1", **{key: card(tmp_path / "their-model", named)})
    assert _pack(runs / "stage1") == (0 if named in PERMISSIVE else 2)
    refused = f"model their-model ({named or 'no licence on a card here'})" in capsys.readouterr().err
    assert refused == (named not in PERMISSIVE)


def test_a_start_on_the_hub_is_known_by_its_card_in_the_cache(runs, tmp_path, capsys, hub_cache, no_figures):
    rewrite_recipe(runs / "stage1", model="org/tiny-base")
    assert _pack(runs / "stage1") == 2
    assert "model org/tiny-base (no licence on a card here)" in capsys.readouterr().err
    put_in_cache(Path(card(tmp_path / "card", "apache-2.0")))
    assert _pack(runs / "stage1") == 0


def test_a_merged_model_has_the_sources_of_its_parents(runs, capsys, no_figures):
    assert merge([str(runs / "stage2"), "--output", str(runs / "soup")]) == 0
    assert _pack(runs / "soup") == 0
    relicense(runs, clustering="proprietary")
    assert _pack(runs / "soup") == 2
    assert "source tiny_clustering (proprietary)" in capsys.readouterr().err
    # Of a parent that is gone nothing is known.
    relicense(runs, clustering="MIT")
    (runs / "stage2/model/config.json").unlink()
    assert _pack(runs / "soup") == 2
    assert "model stage2/model (no licence on a card here)" in capsys.readouterr().err
