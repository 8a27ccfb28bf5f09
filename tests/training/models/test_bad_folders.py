"""Every command that is given a model refuses a broken folder in one line that names it, before anything is written."""

from __future__ import annotations

import json
import shutil
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.models.starts import edit_json
from tests.training.recipes import only_stage, write_single_stage
from training.common.errors import UserError
from training.config.recipe import load_recipe
from training.distillation.distillation import inspect_teacher
from training.distillation.teacher import load_teacher, load_text_teacher
from training.models import export as export_module
from training.models.encoders import find_miner
from training.models.export import export_graph
from training.models.gguf import export_gguf
from training.models.loading import load_base
from training.models.merging import merge
from training.models.model_ref import AdapterFolder
from training.publishing.model_files import copy_weights, read_model_files
from training.stages.setup import make_model, make_tokenizer

WEIGHTS, CHANGED = "model.safetensors", "layers.1.mlp.up_proj.weight"


def _with(value):
    def damage(folder):
        weights = load_file(folder / WEIGHTS)
        changed = weights.pop(CHANGED)
        if value is not None:
            changed[0, 0] = value
            weights[CHANGED] = changed
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def _pickled(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02garbage")


def _with_index(content):
    def damage(folder):
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


# What breaks a folder, each of which some library ignores or reports with a traceback, and a word of the message.
BAD_FOLDERS = {
    "no tokenizer.json": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "lacks a tensor": (_with(None), "layers.1.mlp.up_proj"),
    "NaN": (_with(torch.nan), "layers.1.mlp.up_proj"),
    "infinite": (_with(torch.inf), "layers.1.mlp.up_proj"),
    "cut": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000]), ""),
    "pickled": (_pickled, ""),
    "index is a list": (_with_index([1, 2]), ""),
    "weight map is a list": (_with_index({"metadata": {}, "weight_map": ["a"]}), ""),
}


def _stage(folder, tmp_path, **keys):
    new = {"model_config": None, "tokenizer": None, "tokenizer_vocab_size": None}
    return only_stage(load_recipe(write_single_stage(tmp_path, model=str(folder), **{**new, **keys})))


def start(folder, tmp_path):
    stage = _stage(folder, tmp_path)
    make_model(stage, make_tokenizer(stage, []))


def teacher(folder, tmp_path):
    stage = _stage(tmp_path / "whole", tmp_path, teacher=str(folder))
    load_teacher(inspect_teacher(stage, make_tokenizer(stage, []), 32).ref)


def evaluation(folder, tmp_path):
    pytest.importorskip("mteb")
    from training.evaluation.models import load_model

    load_model(str(folder), None, 8192)


def merging(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "same")
    merge([str(folder), str(tmp_path / "same")], tmp_path / "out")


def gguf(folder, tmp_path):
    pytest.importorskip("gguf")
    export_gguf(folder, tmp_path / "out")


def onnx(folder, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("optimum", "optimum.onnxruntime"):
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setattr(export_module, "_write_onnx", lambda *_: pytest.fail("a graph was made"))
        export_graph(folder, tmp_path / "out", "onnx")


def pack(folder, tmp_path):
    model = read_model_files(folder)
    (tmp_path / "packed").mkdir()
    copy_weights(model.weights, tmp_path / "packed", "float32")


LOADING = {
    **{"start": start, "teacher": teacher, "evaluation": evaluation},
    "text teacher": lambda folder, _: load_text_teacher(str(folder), device="cpu"),
    "mining": lambda folder, _: find_miner(str(folder)).embed_passages(["a"]),
}
WHOLE = {**LOADING, "merging": merging, "pack": pack}
COMMANDS = {**WHOLE, "gguf": gguf, "onnx": onnx}
COMMANDS["base"] = lambda folder, _: load_base(AdapterFolder("adapter", str(folder)))


def test_a_good_folder_is_taken_and_a_run_for_its_model(whole, tmp_path):
    for command in WHOLE.values():
        command(whole, tmp_path)
    shutil.copytree(whole, tmp_path / "run/model")
    stage = _stage(whole, tmp_path, teacher=str(tmp_path / "run"))
    choice = inspect_teacher(stage, make_tokenizer(stage, []), 32)
    assert choice.ref.place == str(tmp_path / "run/model") and choice.by_text is None


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("bad", BAD_FOLDERS)
def test_a_bad_folder_is_refused(whole, tmp_path, refuses, command, bad):
    if (command, bad) == ("base", "no tokenizer.json"):
        pytest.skip("the tokenizer of an adapter's base is not read")
    folder = tmp_path / "models" / "broken"
    shutil.copytree(whole, folder)
    damage, word = BAD_FOLDERS[bad]
    damage(folder)
    with refuses("broken", word):
        COMMANDS[command](folder, tmp_path)
    assert not (tmp_path / "out").exists()


def test_nobody_is_asked_whether_code_may_run(whole, tmp_path, monkeypatch):
    """transformers asks on the terminal where it is not told."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    monkeypatch.setattr("transformers.dynamic_module_utils.signal.alarm", lambda *_: pytest.fail("the user was asked"))
    edit_json(whole / "tokenizer_config.json", auto_map={"AutoTokenizer": "code.Class"}, tokenizer_class="Unknown")
    edit_json(whole / "config.json", auto_map={"AutoConfig": "code.Class"}, model_type="unknown")
    (whole / "code.py").write_text("class Class: ...")
    for command in LOADING.values():
        with pytest.raises(UserError):
            command(whole, tmp_path)
