"""Merged models, packed: they tell what they were merged from, and what that was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml
from huggingface_hub import constants
from sentence_transformers import SentenceTransformer

from training.merge import main as merge
from training.publish import main as publish
from training.publishing.record import Reference, load_release


def _pack(soup: Path, output: Path) -> Path:
    words = ["--name", "tiny-soup", "--output", str(output), "--licence", "apache-2.0"]
    assert publish(["pack", str(soup), *words]) == 0
    return output


def _metadata(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_a_soup_of_checkpoints_is_packed_with_their_lineage(runs, tmp_path):
    (checkpoint,) = (runs / "stage2").glob("checkpoint-*")
    words = [str(runs / "stage2"), str(checkpoint), "--weights", "1", "3", "--output", str(runs / "soup")]
    assert merge(words) == 0
    packed = _pack(runs / "soup", tmp_path / "packed")
    release = load_release(packed)
    own = release.stages[-1]
    # States of one run came about in one training.
    assert [(stage.name, stage.kind) for stage in release.stages] == [
        *(("stage1", "training"), ("stage2", "training"), ("soup", "merging"))
    ]
    assert own.parents == (Reference("stage", "stage2"),)
    names = ["stage2/model", f"stage2/{checkpoint.name}"]
    assert own.arguments == {"method": "mean", "models": names, "weights": [0.25, 0.75]}
    assert release.languages == ("eng",)
    told = json.loads((packed / "config.json").read_text())["merged_from"]["parents"]
    assert [parent["name"] for parent in told] == names
    card = (packed / "README.md").read_text()
    assert f"Mean of the weights of `stage2/model` (0.25), `stage2/{checkpoint.name}` (0.75)." in card
    assert str(tmp_path) not in card
    assert SentenceTransformer(str(packed)).encode(["the red river"]).shape == (1, 32)
    before = (packed / "release.json").read_bytes()
    assert (_pack(runs / "soup", packed) / "release.json").read_bytes() == before


def test_a_soup_whose_parents_are_gone_names_them(runs, tmp_path):
    assert merge([str(runs / "stage1"), "--output", str(tmp_path / "elsewhere" / "soup")]) == 0
    (stage,) = load_release(_pack(tmp_path / "elsewhere" / "soup", tmp_path / "packed")).stages
    assert (stage.kind, stage.parents) == ("merging", (Reference("local", "stage1/model"),))


def test_other_weights_in_a_parents_place_are_no_parent(runs, tmp_path):
    assert merge([str(runs / "stage1"), "--output", str(runs / "soup")]) == 0
    shutil.rmtree(runs / "stage1" / "model")
    shutil.copytree(runs / "stage2" / "model", runs / "stage1" / "model")
    (stage,) = load_release(_pack(runs / "soup", tmp_path / "packed")).stages
    assert stage.parents == (Reference("local", "stage1/model"),)


def test_the_card_of_a_soup_of_published_models_links_them(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("b" * 40)
    shutil.copytree(runs / "stage1" / "model", repository / "snapshots" / ("b" * 40))
    assert merge(["some/model@main", "--output", str(tmp_path / "soup")]) == 0
    packed = _pack(tmp_path / "soup", tmp_path / "packed")
    assert _metadata(packed)["base_model"] in ("some/model", ["some/model"])
    assert _metadata(packed)["base_model_relation"] == "merge"
    assert load_release(packed).stages[0].parents == (Reference("hub", "some/model", "b" * 40),)


def test_a_soup_of_runs_tells_of_each_and_of_the_last_state_of_each(runs, tmp_path):
    (checkpoint,) = (runs / "stage2").glob("checkpoint-*")
    shutil.copytree(runs / "stage2", runs / "other")
    words = [str(checkpoint), str(runs / "other"), str(runs / "stage2"), "--output", str(runs / "soup")]
    assert merge(words) == 0
    assert merge([str(runs / "soup"), str(runs / "stage2"), "--output", str(runs / "stew")]) == 0
    release = load_release(_pack(runs / "stew", tmp_path / "packed"))
    assert [stage.name for stage in release.stages] == ["stage1", "stage2", "other", "soup", "stew"]
    assert release.stages[3].parents == (Reference("stage", "stage2"), Reference("stage", "other"))
    assert release.stages[4].parents == (Reference("stage", "soup"), Reference("stage", "stage2"))


def test_a_soup_of_checkpoints_alone_stands_on_the_newest_of_them(runs, tmp_path):
    (checkpoint,) = (runs / "stage2").glob("checkpoint-*")
    shutil.copytree(checkpoint, runs / "stage2" / "checkpoint-1")
    words = [str(runs / "stage2" / name) for name in ("checkpoint-1", checkpoint.name)]
    assert merge([*words, "--output", str(runs / "soup")]) == 0
    stages = load_release(_pack(runs / "soup", tmp_path / "packed")).stages
    assert stages[-1].parents == (Reference("stage", f"stage2@{checkpoint.name}"),)
