"""Many processes train what one does: the same losses, the same weights, whatever the sources."""

from __future__ import annotations

import sys
from itertools import product

import pytest
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from tests.training.distributed_recipe import STAGES, STEPS, save_model, write_distributed_recipe
from tests.training.foreign_teacher import save_foreign_teacher
from tests.training.processes import ROOT, accelerate, free_port, run_bounded, torchrun
from tests.training.recipes import rewind, state_of
from training.models.static import distil_static
from training.run_stage import main

SCRIPT = ROOT / "training/run_stage.py"
WORKER = ROOT / "tests/training/distributed_worker.py"
# The mix holds all task types; of few texts, two processes of four have none.
FOUR = ["mixed", "distillation", "cached", "few_texts"]
SHARDED = ["mixed", "distillation", "projected", "exits", "few_texts", "lora", "dora"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_config, tiny_tokenizer):
    """A student and its teachers: a wider, a narrower and a foreign one."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student", tiny_config, tiny_tokenizer)
    save_model(folder / "teacher", tiny_config, tiny_tokenizer, seed=1, hidden_size=48)
    save_model(folder / "narrow", tiny_config, tiny_tokenizer, seed=2, hidden_size=16, matryoshka_dimensions=[16])
    save_foreign_teacher(folder / "foreign", width=40)
    distil_static(folder / "teacher", folder / "static", 32)
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory, models):
    """All stages, trained by one process that encodes each batch at once."""
    folder = tmp_path_factory.mktemp("single")
    recipe = write_distributed_recipe(folder, models, list(STAGES), max_tokens_per_forward=None)
    assert main([str(recipe)]) == 0
    return folder / "run"


def train(command):
    ended = run_bounded(command)
    assert ended.returncode == 0, ended.stdout[-4000:]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, models):
    """All stages, trained by two processes in chunks."""
    folder = tmp_path_factory.mktemp("two")
    train(torchrun(2, SCRIPT, write_distributed_recipe(folder, models, list(STAGES))))
    return folder / "run"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, models):
    """Some stages, trained by two processes under FSDP2."""
    folder = tmp_path_factory.mktemp("sharded")
    recipe = write_distributed_recipe(folder, models, SHARDED, use_cpu=False)
    train(accelerate(folder, 2, WORKER, "sharded", recipe))
    return folder / "run"


def losses(stage):
    """What was logged of each step and each validation, times left out."""
    return [
        {key: value for key, value in line.items() if "loss" in key or key in ("grad_norm", "masked_candidates")}
        for line in state_of(stage)["log_history"]
    ]


def weights_of(model):
    return load_file(next(model.glob("*.safetensors")))


def largest_difference(stage, other):
    """Between the weights of two finished models or adapters."""
    weights, others = (weights_of(folder / "model") for folder in (stage, other))
    assert weights.keys() == others.keys()
    return max((weights[name] - others[name]).abs().max().item() for name in weights)


def assert_same_training(stage, other):
    history, wanted = losses(stage), losses(other)
    assert len(history) == len(wanted) == STEPS + 2
    for line, wanted_line in zip(history, wanted, strict=True):
        assert line == pytest.approx(wanted_line, rel=1e-4, abs=1e-4)
    assert largest_difference(stage, other) <= 1e-4


def go_on_with(run, stage, folder, models, **keys):
    """Rewinds a copy of a stage's run; returns the recipe that goes on with it."""
    rewind(run / stage, folder / "run" / stage, 4)
    data = {"manifest": str(run.parent / "data/manifest.yaml"), "prepared_dir": str(run.parent / "prepared")}
    return write_distributed_recipe(folder, models, [stage], **data, **keys)


def test_the_stages_train(single, models):
    start = weights_of(models / "student") | weights_of(models / "static")
    for stage in STAGES:
        weights = weights_of(single / stage / "model")
        # Of an adapter, the matrices that are zero at the start.
        trained = [name for name in weights if name in start or "lora_B" in name]
        assert max((weights[name] - start.get(name, 0)).abs().max().item() for name in trained) > 1e-3
    logged = set().union(*losses(single / "distillation"))
    assert {"loss_in_batch", "loss_hard", "loss_distillation", "loss_source/tiny_clustering"} <= logged
    assert {"loss_exit/1", "loss_exit/2"} <= set().union(*losses(single / "exits"))


@pytest.mark.parametrize(("run", "stage"), [*product(["two_processes"], STAGES), *product(["sharded"], SHARDED)])
def test_processes_train_as_one(request, single, run, stage):
    assert_same_training(request.getfixturevalue(run) / stage, single / stage)


@pytest.mark.slow
def test_four_processes_train_as_one(tmp_path, single, models):
    recipe = write_distributed_recipe(tmp_path, models, FOUR)
    train([sys.executable, str(WORKER), f"forks:4:{free_port()}", str(recipe)])
    for stage in FOUR:
        assert_same_training(tmp_path / "run" / stage, single / stage)


def test_sharded_checkpoints_are_sentence_transformers(sharded):
    checkpoint = sharded / "mixed/checkpoint-4"
    # It is a sharded state indeed, from which the training goes on, beside the whole model.
    assert len(list((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    assert len(list((checkpoint / "optimizer_0").glob("*.distcp"))) == 2
    assert not list(sharded.glob("*/.*partial"))
    embeddings = [SentenceTransformer(str(path)).encode("the red river") for path in sharded.glob("mixed/checkpoint-*")]
    assert len(embeddings) == 3 and all(embedding.shape == (32,) for embedding in embeddings)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["mixed", "dora"])
def test_a_sharded_run_resumes(tmp_path, sharded, models, stage):
    recipe = go_on_with(sharded, stage, tmp_path, models, use_cpu=False)
    train(accelerate(tmp_path, 2, WORKER, "sharded", recipe, "--resume"))
    assert largest_difference(tmp_path / "run" / stage, sharded / stage) <= 1e-6


@pytest.mark.parametrize("stage", ["mixed", "distillation", "projected", "exits", "dora", "static"])
def test_one_process_resumes_a_run_of_two(tmp_path, two_processes, models, stage):
    assert main([str(go_on_with(two_processes, stage, tmp_path, models)), "--resume"]) == 0
    assert_same_training(tmp_path / "run" / stage, two_processes / stage)


@pytest.mark.parametrize(("mode", "status"), [("dies:1:5", 9), ("terminated:1:5", 143)])
def test_death_of_or_signal_to_one_process_stops_the_others(tmp_path, two_processes, models, mode, status):
    recipe, run = write_distributed_recipe(tmp_path, models, ["mixed"]), tmp_path / "run/mixed"
    # Two processes of which no launcher takes care.
    ended = run_bounded([sys.executable, str(WORKER), f"{mode}+forks:2:{free_port()}", str(recipe)], seconds=120)
    assert ended.returncode == status and "Traceback" not in ended.stdout
    if status == 9:
        line = "stopped: lost contact with another process: look above for what ended that one"
        assert line in ended.stdout and "--resume" in ended.stdout
        assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]
    else:
        lines = [line for line in ended.stdout.splitlines() if "SIGTERM at step 6 of 10" in line]
        assert sorted(line.split("stopped")[0] for line in lines) == ["", "[process 1] "]
    assert main([str(recipe), "--resume"]) == 0
    assert_same_training(run, two_processes / "mixed")
