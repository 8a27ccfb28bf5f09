"""Recipes of several files and stages: what extends, what names and paths mean, and what a stage reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import training
from tests.training.recipes import ONE_STAGE, error_of, only_stage, recipe_writer
from training.common.yaml_file import RULE, load_yaml
from training.config.recipe import Stage, find_inputs, load_recipe, require_inputs
from training.stages.continuation import check_keys

SHAPE = {"hidden_size": 8}
RECIPES = Path(training.__file__).parent / "recipes"

DATA = {"manifest": "data/m.yaml", "data_dir": "data", "evaluation_pairs": "p.parquet"}
DATA |= {"evaluation_candidates": "c.csv"}
MODELS = {"model": "some/model", "teacher": "some/teacher"}


@pytest.fixture
def write(tmp_path):
    return recipe_writer(tmp_path)


def test_extends_replaces_keys_of_the_other_file(write):
    write({"seed": 1, "cap": 10, "max_length": 99}, "family/base.yaml")
    write({"extends": "family/base.yaml", "seed": 2}, "middle.yaml", base={})
    path = write({"extends": "../middle.yaml", "cap": None, "temperature": 0.1}, "own/recipe.yaml", base={})
    arguments = only_stage(load_recipe(path))
    assert (arguments.seed, arguments.cap, arguments.max_length, arguments.temperature) == (2, None, 99, 0.1)
    write({"stages": {"first": {"seed": 1}, "second": {"model": "first"}}}, "staged.yaml")
    stages = load_recipe(write({"extends": "staged.yaml", "max_length": 9}, base={})).stages
    assert [(stage.name, stage.arguments.max_length) for stage in stages] == [("first", 9), ("second", 9)]


def test_stage_extends_a_recipe_of_one_stage(write):
    write({"seed": 1, "cap": 10, "max_length": 99}, "sizes/base.yaml")
    write({"extends": "base.yaml", "output_dir": "runs/alone", "seed": 2, "cap": 7}, "sizes/small.yaml", base={})
    stages = {"a": {"extends": "sizes/small.yaml", "cap": 3}, "b": {"extends": "sizes/small.yaml", "model": "a"}}
    loaded = load_recipe(write({"seed": 5, "temperature": 0.5, "stages": stages}))
    first, second = (stage.arguments for stage in loaded.stages)
    assert (first.seed, first.cap, first.max_length, first.temperature) == (2, 3, 99, 0.5)
    assert (first.model, second.model, second.cap) == ("some/model", "runs/x/a/model", 7)
    # Where the other recipe writes by itself says nothing of where the stage does.
    assert [stage.arguments.output_dir for stage in loaded.stages] == ["runs/x/a", "runs/x/b"]
    # It lies beside the file that names it.
    write({"stages": {"a": {"extends": "small.yaml"}}}, "sizes/all.yaml")
    assert only_stage(load_recipe(write({"extends": "sizes/all.yaml"}, base={}))).seed == 2


@pytest.mark.parametrize(
    ("base", "parts"),
    [
        (None, ["base.yaml", "no such file"]),
        *(({"extends": f"{name}.yaml"}, ["extends itself"]) for name in ("base", "recipe")),
        ({"sed": 1}, ["base.yaml", "'sed'", "'seed'"]),
        ({"stages": {"b": {}}}, ["base.yaml", "has stages"]),
    ],
)
def test_stage_extends_a_faulty_recipe(write, refuses, base, parts):
    if base is not None:
        write(base, "base.yaml")
    with refuses(*parts):
        load_recipe(write({"stages": {"a": {"extends": "base.yaml"}}}))


def test_stages_inherit_shared_keys_and_have_their_own_folders(write):
    stages = {"first": {"max_length": 11}, "second": {"cap": None}, "third": {"output_dir": "elsewhere"}}
    loaded = load_recipe(write({"seed": 5, "max_length": 99, "cap": 7, "stages": stages}))
    assert [stage.name for stage in loaded.stages] == ["first", "second", "third"]
    found = [(a.seed, a.max_length, a.cap, a.output_dir) for a in (stage.arguments for stage in loaded.stages)]
    assert found == [(5, 11, 7, "runs/x/first"), (5, 99, None, "runs/x/second"), (5, 99, 7, "elsewhere")]


def test_keys_name_what_earlier_stages_leave(write):
    stages = {
        "a": {"model": "some/model"},
        "b": {"model": "a", "output_dir": "elsewhere"},
        "c": {"model": "b"},
        "d": {"model": "a"},
        "e": {"model": "a/b"},
        "f": {"model": None, "model_config": {"hidden_size": 8}},
        "g": {"model": "f", "tokenizer": "a", "importance": "a", "prepared_dir": "a", "prune_to": {"hidden_size": 8}},
    }
    arguments = {stage.name: stage.arguments for stage in load_recipe(write({"stages": stages})).stages}
    assert [arguments[name].model for name in "abcdef"] == [
        *("some/model", "runs/x/a/model", "elsewhere/model", "runs/x/a/model", "a/b", None)
    ]
    last = arguments["g"]
    assert (last.model, last.model_config, last.tokenizer) == ("runs/x/f/model", None, "runs/x/a/model")
    assert (last.importance, last.prepared_dir) == ("runs/x/a", "runs/x/a/prepared")


def test_names_that_could_be_mistaken(write):
    stages = {"train": {"tokenizer": "train", "model_config": {"hidden_size": 8}}}
    path = write({"output_dir": "out", "stages": stages}, base={})
    assert load_recipe(path).stages[0].keys["tokenizer"] == "train"
    for keys, folder in (({}, "5"), ({"stages": {"a": {}}}, "5/a")):
        loaded = load_recipe(write({**ONE_STAGE, "output_dir": 5, **keys}, base={}))
        assert loaded.output_dir == Path("5") and only_stage(loaded).output_dir == folder


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_loads(path):
    # Those without stages are to be extended, or given a model.
    lacking = {} if "stages" in load_yaml(path) else {"output_dir": "runs/x", "model": "some/model"}
    stages = load_recipe(path, {"bf16": False, "use_cpu": True, **lacking}).stages
    assert all(stage.arguments.lora for stage in stages) == (path.stem == "lora")
    # It lies in the checkout, or is made below the output.
    for manifest in filter(None, (stage.arguments.manifest for stage in stages)):
        assert Path(manifest).is_file() or Path(manifest).parts[0] == "runs" or path.parent.name == "claims"


def test_quickstart_is_the_whole_recipe():
    first, second, pruned, student = load_recipe(RECIPES / "quickstart/recipe.yaml").stages
    assert [stage.name for stage in (first, second, pruned, student)] == ["stage1", "stage2", "pruned", "student"]
    assert pruned.arguments.prunes and student.arguments.teacher == "runs/quickstart/stage2/model"
    assert student.arguments.prepared_dir == "runs/quickstart/stage2/prepared"
    assert second.arguments.model == "runs/quickstart/stage1/model"
    assert first.arguments.lr_scheduler_kwargs == second.arguments.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert (first.arguments.instructions, second.arguments.instructions) == (False, True)
    assert first.arguments.mapping("model_config")["hidden_size"] == 128


@pytest.fixture
def recipe(write, tmp_path):
    base = {"output_dir": str(tmp_path / "run"), "use_cpu": True}
    return lambda name="recipe.yaml", **stages: load_recipe(write({"stages": stages}, name, base))


def test_what_is_there_what_a_stage_makes_and_what_may_be_on_the_hub(recipe, tmp_path):
    (tmp_path / "there").mkdir()
    made = recipe(
        a={"model": str(tmp_path / "there"), "teacher": "some/model"},
        b={"model": "a", "prune_to": SHAPE},
        c={"model": "a", "prune_to": SHAPE, "importance": "b"},
        d={"model": "c", "tokenizer": "/nowhere/at/all"},
    )
    found = {(stage.name, each.key): each for stage in made.stages for each in find_inputs(made, stage)}
    assert found["a", "model"].there and not found["a", "model"].missing
    assert found["a", "teacher"].on_hub and not found["a", "teacher"].missing
    assert found["b", "model"].missing and found["b", "model"].maker.name == "a"
    assert found["c", "importance"].maker.name == "b"
    assert found["d", "model"].maker.name == "c"
    assert found["d", "tokenizer"].missing and found["d", "tokenizer"].maker is None
    require_inputs(made, made.stages[:3])


@pytest.mark.parametrize("key", ["model", "teacher", "tokenizer", "importance"])
def test_a_missing_input_names_stage_and_command(recipe, refuses, tmp_path, key):
    made_there = "importance.safetensors" if key == "importance" else "model/config.json"
    keys = {"model": "some/model"} | ({"prune_to": SHAPE} if key == "importance" else {})
    made = recipe(a=keys, b={**keys, key: "a"})
    require_inputs(made, made.stages)
    file = tmp_path / "run/a" / made_there
    # The folder of the run may be there without what is read.
    (tmp_path / "run/a").mkdir(parents=True)
    command = f"python training/run_stage.py {made.path} --stage a"
    with refuses("stage 'b'", f"{key} '{file.parent}' is missing; stage 'a' makes it: {command}"):
        require_inputs(made, made.stages[1:])
    require_inputs(made, made.stages[1:], finished=["b"])
    file.parent.mkdir(exist_ok=True)
    file.touch()
    require_inputs(made, made.stages[1:])


def test_recipes_beside_it_are_looked_through(recipe, refuses, tmp_path):
    recipe("all.yaml", first={"model": "some/model"}, second={"model": "first"})
    (tmp_path / "broken.yaml").write_text("sed: 1\n")
    (tmp_path / "notes.yaml").write_text("- a list\n")
    made = recipe("own.yaml", b={"model": str(tmp_path / "run/first/model")})
    with refuses("stage 'first' makes it", f"run_stage.py {tmp_path}/all.yaml --stage first"):
        require_inputs(made, made.stages)
    made = recipe(a={"model": str(tmp_path / "away")})
    with refuses(made.path, "stage 'a'", f"model '{tmp_path}/away' is missing, and no stage", "check the path"):
        require_inputs(made, made.stages)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Writes recipes into ``project``; the working directory is ``here``, beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return recipe_writer(tmp_path / "project")


def make(*paths):
    for path in paths:
        Path("../project", path).parent.mkdir(parents=True, exist_ok=True)
        Path("../project", path).touch()


def keys_of(path, **overrides):
    (stage,) = load_recipe(path, overrides).stages
    return stage.keys


def test_what_is_read_starts_at_the_file(here, monkeypatch):
    path = here(DATA | MODELS)
    found = {key: f"../project/{path}" for key, path in DATA.items()}
    # Even if a file of that name lies in the working directory, or none at all. A model may be on the Hub.
    Path("p.parquet").touch()
    assert keys_of(path).items() >= (found | MODELS).items()
    make("some/model", "some/teacher")
    assert keys_of(path).items() >= {key: f"../project/{path}" for key, path in (DATA | MODELS).items()}.items()
    # Paths of the command line start at the working directory, and so does what the recipe writes.
    assert keys_of(path, manifest="data/m.yaml")["manifest"] == "data/m.yaml"
    below = {"manifest": "./out/data/m.yaml", "evaluation_pairs": "out/p.parquet", "teacher": "out/teacher"}
    written = {"output_dir": "out", "prepared_dir": "prepared", "teacher_cache_dir": "cache", **below}
    make("out/x", "prepared/x", "cache/x")
    assert keys_of(here(written)).items() >= written.items()
    # The output may be named in the file that extends the other.
    here({"manifest": "out/m.yaml", "data_dir": "data"}, "base.yaml", base={})
    keys = keys_of(here({"output_dir": "out", "model": "m", "extends": "base.yaml"}, base={}))
    assert (keys["manifest"], keys["data_dir"]) == ("out/m.yaml", "../project/data")
    path = here(DATA | MODELS)
    monkeypatch.chdir(path.parent)
    assert keys_of(Path("recipe.yaml")).items() >= (DATA | MODELS).items()


@pytest.mark.parametrize("form", [dict, json.dumps])
@pytest.mark.parametrize("manifest", ["m.yaml", "built/m.yaml"])
def test_what_a_builder_reads_and_writes(here, form, manifest):
    options = {"locale_dirs": ["mine", "/usr/share/locale"]}
    built = {"builder": "gettext", "manifest": manifest, "evaluation_pairs": "built/p.parquet"}
    keys = keys_of(here({**built, "evaluation_candidates": "c.csv", "builder_options": form(options)}))
    assert keys["builder_options"] == {"locale_dirs": ["../project/mine", "/usr/share/locale"]}
    assert keys["manifest"] == manifest and keys["evaluation_candidates"] == "../project/c.csv"
    assert (keys["evaluation_pairs"] == "built/p.parquet") == ("/" in manifest)


def test_what_is_not_a_relative_path_stays(here):
    keys = {"data_dir": "hf://datasets/a/b", "manifest": "/data/m.yaml", "fsdp": True, "fsdp_config": '{"version": 2}'}
    assert keys_of(here(keys)).items() >= keys.items()
    make("train/x", "first/x")
    new = {"model": None, "model_config": {"hidden_size": 8}, "tokenizer": "train"}
    assert keys_of(here(new))["tokenizer"] == "train"
    # The name of a stage comes before a folder beside the recipe.
    stages = {"first": {"model": "some/model"}, "second": {"model": "first"}}
    for recipe in (here({"stages": stages}, "a.yaml"), here({"extends": "a.yaml", "teacher": "first"}, base={})):
        assert load_recipe(recipe, {"teacher": None}).stages[1].keys["model"] == "runs/x/first/model"


def test_each_file_of_a_chain_has_its_own_folder(here):
    here({"manifest": "m.yaml", "evaluation_pairs": "p.parquet"}, "family/base.yaml")
    here({"extends": "family/base.yaml", "data_dir": "data"}, "middle.yaml", base={})
    here({"extends": "../middle.yaml", "evaluation_pairs": "own.parquet"}, "own/leaf.yaml", base={})
    path = here({"stages": {"a": {"extends": "own/leaf.yaml", "evaluation_candidates": "c.csv"}}})
    keys, expected = keys_of(path), ("family/m.yaml", "data", "own/own.parquet", "c.csv")
    assert [keys[key] for key in DATA] == [f"../project/{each}" for each in expected]


def test_past_a_link_the_path_still_leads_to_the_file(here, tmp_path):
    real = here({"manifest": "../data/m.yaml"}, "deep/er/recipe.yaml")
    (tmp_path / "here/link").symlink_to(real.parent)
    keys = keys_of(Path("link/recipe.yaml"))
    assert Path(keys["manifest"]).resolve() == tmp_path / "project/deep/data/m.yaml"


def test_a_missing_model_tells_the_rule(here, capsys):
    Path("../project/folder.yaml").mkdir(parents=True)
    error = error_of([here({"model": "no/such/model"})], capsys)
    assert "model 'no/such/model' is missing" in error and RULE in error


def test_a_run_is_the_same_from_every_working_directory(here, tmp_path, monkeypatch, refuses):
    path = here({"output_dir": "runs/x", "manifest": "m.yaml", "model": "Org/model", "teacher": "runs/big/model"})
    (stage,) = load_recipe(path).stages
    run = tmp_path / "here/runs/x"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(stage.keys))
    monkeypatch.chdir(tmp_path)
    elsewhere = {"output_dir": "here/runs/x", "teacher": "here/runs/big/model"}
    (again,) = load_recipe(path, elsewhere).stages
    assert again.keys["manifest"] != stage.keys["manifest"]
    assert check_keys(run, again, accept_changes=False) == {}
    for key in ("manifest", "teacher", "model"):
        changed = Stage("x", {**again.keys, key: "other/model"}, again.arguments)
        with refuses(run, key):
            check_keys(run, changed, accept_changes=False)
