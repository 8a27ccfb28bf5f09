"""What a stage reads: found, made by another stage, on the Hub, or missing; and what an error says of it."""

from __future__ import annotations

import pytest
import yaml

from training.config.inputs import find_inputs, require_inputs
from training.config.recipe import load_recipe

SHAPE = {"hidden_size": 8}


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe of some stages and loads it."""

    def write(name="recipe.yaml", **stages):
        path = tmp_path / name
        path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), "use_cpu": True, "stages": stages}))
        return load_recipe(path)

    return write


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


@pytest.mark.parametrize(
    ("key", "made_there", "keys"),
    [
        *((key, "model/config.json", {}) for key in ("model", "teacher", "tokenizer")),
        ("importance", "importance.safetensors", {"prune_to": SHAPE}),
    ],
)
def test_a_missing_input_names_stage_and_command(recipe, refuses, tmp_path, key, made_there, keys):
    made = recipe(a={"model": "some/model", **keys}, b={"model": "some/model", **keys, key: "a"})
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
    # One that does nothing else is the shorter way.
    (tmp_path / "first.yaml").write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run/first"), "model": "m"}))
    with refuses("stage 'first' makes it", f"run_stage.py {tmp_path}/first.yaml"):
        require_inputs(made, made.stages)


def test_what_nothing_makes_is_said(recipe, refuses, tmp_path):
    made = recipe(a={"model": str(tmp_path / "away")})
    with refuses(made.path, "stage 'a'", f"model '{tmp_path}/away' is missing, and no stage", "check the path"):
        require_inputs(made, made.stages)
