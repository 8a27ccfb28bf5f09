"""Every command that is given a model refuses a broken folder in one line that names it, before anything is written."""

from __future__ import annotations

import json
import shutil
import sys
from types import ModuleType

import pytest

from tests.training.models.bad_folders import BAD_FOLDERS
from tests.training.recipes import only_stage, write_single_stage
from training.common.errors import UserError
from training.config.recipe import load_recipe
from training.distillation.distillation import choose_teacher
from training.distillation.teacher import load_teacher, load_text_teacher
from training.models import export as onnx_command
from training.models.encoders import find_miner
from training.models.export import export_graph as export_onnx
from training.models.gguf import export_gguf
from training.models.loading import load_base
from training.models.merging import merge
from training.models.model_ref import AdapterFolder
from training.publishing.pack import read_whole_model
from training.publishing.states import ModelState
from training.publishing.weights import copy_weights
from training.stages.setup import make_model, make_tokenizer


def _stage(folder, tmp_path, **keys):
    new = {"model_config": None, "tokenizer": None, "tokenizer_vocab_size": None}
    return only_stage(load_recipe(write_single_stage(tmp_path, model=str(folder), **{**new, **keys})))


def start(folder, tmp_path):
    stage = _stage(folder, tmp_path)
    make_model(stage, make_tokenizer(stage, []))


def teacher(folder, tmp_path):
    stage = _stage(tmp_path / "whole", tmp_path, teacher=str(folder))
    choose_teacher(stage, make_tokenizer(stage, []), 32)
    load_teacher(str(folder))


def text_teacher(folder, tmp_path):
    load_text_teacher(str(folder), device="cpu")


def evaluation(folder, tmp_path):
    pytest.importorskip("mteb")
    from training.evaluation.models import load_model

    load_model(str(folder), None, 8192)


def mining(folder, tmp_path):
    find_miner(str(folder)).embed_passages(["a"])


def merging(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "same")
    merge([str(folder), str(tmp_path / "same")], tmp_path / "out")


def base_of_an_adapter(folder, tmp_path):
    load_base(AdapterFolder("adapter", str(folder)))


def gguf(folder, tmp_path):
    pytest.importorskip("gguf")
    export_gguf(folder, tmp_path / "out")


def onnx(folder, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "optimum", ModuleType("optimum"))
        patch.setitem(sys.modules, "optimum.onnxruntime", ModuleType("optimum.onnxruntime"))
        patch.setattr(onnx_command, "_write_onnx", lambda *_: pytest.fail("a graph was made"))
        export_onnx(folder, tmp_path / "out", "onnx")


def pack(folder, tmp_path):
    model = read_whole_model(ModelState(folder.parent, folder, {}))
    (tmp_path / "packed").mkdir()
    copy_weights(model.weights, tmp_path / "packed", "float32")


COMMANDS = [start, teacher, text_teacher, evaluation, mining, merging, gguf, onnx, pack]
# What an adapter's base says of its tokenizer is not read.
CASES = [(command, bad) for command in COMMANDS for bad in BAD_FOLDERS]
CASES += [(base_of_an_adapter, bad) for bad in BAD_FOLDERS if bad != "no tokenizer.json"]


@pytest.mark.parametrize("command", [each for each in COMMANDS if each not in (gguf, onnx)])
def test_a_good_folder_is_taken(whole, tmp_path, command):
    command(whole, tmp_path)


@pytest.mark.parametrize(("command", "bad"), CASES, ids=[f"{command.__name__}-{bad}" for command, bad in CASES])
def test_a_bad_folder_is_refused(whole, tmp_path, refuses, command, bad):
    folder = tmp_path / "models" / "broken"
    shutil.copytree(whole, folder)
    damage, told = BAD_FOLDERS[bad]
    damage(folder)
    with refuses("broken", told):
        command(folder, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_run_can_be_the_teacher(whole, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(whole, tmp_path / "run/model")
    stage = _stage(whole, tmp_path, teacher=str(tmp_path / "run"))
    choice = choose_teacher(stage, make_tokenizer(stage, []), 32)
    assert choice.place == str(tmp_path / "run/model") and choice.by_text is None


def test_nobody_is_asked_whether_code_may_run(whole, tmp_path, monkeypatch):
    """transformers asks on the terminal where it is not told."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    monkeypatch.setattr("transformers.dynamic_module_utils.signal.alarm", lambda *_: pytest.fail("the user was asked"))
    for file, key in (("tokenizer_config.json", "AutoTokenizer"), ("config.json", "AutoConfig")):
        path = whole / file
        settings = {**json.loads(path.read_text()), "auto_map": {key: "code.Class"}}
        settings |= {"tokenizer_class": "Unknown"} if key == "AutoTokenizer" else {"model_type": "unknown"}
        path.write_text(json.dumps(settings))
    (whole / "code.py").write_text("class Class: ...")
    for command in (start, teacher, text_teacher, evaluation, mining):
        with pytest.raises(UserError):
            command(whole, tmp_path)
