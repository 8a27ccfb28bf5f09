"""Two commands at once: they share what both need, and neither writes where the other is at work."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from tests.training.forked import start
from tests.training.processes import ROOT, run_bounded, torchrun
from tests.training.recipes import write_single_stage
from training.common.outputs import locked
from training.config.recipe import load_recipe
from training.data.prepared import PreparedSource
from training.stages.setup import make_tokenizer, read_sources


def test_two_recipes_prepare_into_one_folder_at_once(tmp_path: Path) -> None:
    shared, runs = tmp_path / "prepared", []
    for number, rate in enumerate((1e-3, 2e-3)):
        folder = tmp_path / str(number)
        keys = {"learning_rate": rate, "prepared_dir": str(shared), "manifest": str(tmp_path / "0/data/manifest.yaml")}
        runs.append((write_single_stage(folder, **keys), folder))
    started = [start([recipe], folder, []) for recipe, folder in runs]
    assert [run.wait() for run in started] == [0, 0], [run.output for run in started]
    (folder,) = shared.glob("[!.]*")
    source = PreparedSource(folder).check()
    assert sum(source.description["rows"].values()) == 80 and (source.lengths(source.rows["train"]) > 1).all()
    noted = [json.loads((folder / "run/data.json").read_text()) for _, folder in runs]
    assert noted == [{"tiny_retrieval": source.description["fingerprint"]}] * 2


def test_a_run_that_is_started_twice_goes_on_alone(tmp_path: Path, check_same_weights) -> None:
    recipe = write_single_stage(tmp_path)
    first = start([recipe], tmp_path, [])
    assert first.wait_for((tmp_path / "run/.model.lock").exists)
    second = start([recipe, "--resume"], tmp_path / "data", [])
    assert second.wait() == 2
    assert "another process trains there" in second.line()
    assert first.wait() == 0
    check_same_weights(tmp_path / "run")


def test_a_trained_tokenizer_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = load_recipe(write_single_stage(tmp_path)).stages[0].arguments
    sources, _ = read_sources(args)
    save, folder = PreTrainedTokenizerBase.save_pretrained, tmp_path / "run/tokenizer"

    def killed(self: PreTrainedTokenizerBase, place: Path, **keys: object) -> None:
        save(self, place, **keys)
        assert not folder.exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", killed)
        make_tokenizer(args, sources)
    assert not folder.exists()
    with ThreadPoolExecutor(2) as pool:
        vocabularies = list(pool.map(lambda _: make_tokenizer(args, sources).get_vocab(), range(2)))
    assert vocabularies[0] == vocabularies[1]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokenizer"]


@pytest.mark.slow
def test_all_processes_of_a_launch_are_refused(tmp_path: Path) -> None:
    recipe = write_single_stage(tmp_path)
    with locked(tmp_path / "run/model"):
        ended = run_bounded(torchrun(2, ROOT / "training/run_stage.py", recipe), seconds=120)
    assert ended.returncode
    said = [line for line in ended.stdout.splitlines() if "another process trains there" in line]
    assert sorted(line.split("error")[0] for line in said) == ["", "[process 1] "]
