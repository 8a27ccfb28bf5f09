from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from tests.training.data.gettext_catalogs.gettext_folders import write_catalogs
from tests.training.recipes import write_recipe, write_single_stage
from training.common.outputs import locked
from training.data.manifest_file import read_manifest
from training.run_stage import main

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny recipe ran to its end."""
    folder = tmp_path_factory.mktemp("finished")
    assert main([str(write_recipe(folder))]) == 0
    return folder


def test_both_stages_end_in_a_released_folder(finished: Path) -> None:
    for stage in ("stage1", "stage2"):
        folder = finished / "run" / stage / "model"
        files = {path.name for path in folder.iterdir()}
        assert {"model.safetensors", "config.json", "modules.json", "tokenizer.json", "modeling_f2llm.py"} <= files
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
        config = json.loads((folder / "config.json").read_text())
        assert config["is_matryoshka"] and config["matryoshka_dimensions"] == [32, 16, 8]
        assert config["architectures"] == ["Qwen3Model"]
        assert not list(folder.parent.glob(".*partial"))


def test_the_model_loads_and_carries_its_prompt(finished: Path) -> None:
    raw = SentenceTransformer(str(finished / "run/stage1/model"), truncate_dim=16)
    instructed = SentenceTransformer(str(finished / "run/stage2/model"))
    assert raw.encode_query("the red river").shape == (16,)
    assert raw.prompts["query"] == ""
    assert instructed.prompts["query"].startswith("Instruct: ")


def test_every_checkpoint_is_a_sentence_transformer(finished: Path) -> None:
    checkpoints = sorted((finished / "run/stage1").glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        assert SentenceTransformer(str(checkpoint)).encode("a text").shape == (32,)


def test_evaluation_is_saved_with_the_model_it_is_of(finished: Path) -> None:
    result = json.loads((finished / "run/evaluation.json").read_text())
    assert list(result["accuracy"]) == ["32", "16", "8"]
    assert result["pairs"] == 2 and list(result["languages"]) == ["eng"]
    assert 0 <= result["tfidf"] <= 1
    assert result["model"] == str(finished / "run/stage2/model")


def test_training_lowers_the_loss_and_logs_terms_and_sources(finished: Path) -> None:
    checkpoints = sorted((finished / "run/stage2").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    history = json.loads((checkpoints[-1] / "trainer_state.json").read_text())["log_history"]
    training = [line for line in history if "loss" in line]
    assert training[-1]["loss"] < 0.5 * training[0]["loss"]
    logged = set().union(*training)
    assert {"loss_hard", "loss_in_batch", "learning_rate", "grad_norm"} <= logged
    assert {f"loss_source/tiny_{kind}" for kind in ("retrieval", "clustering", "classification")} <= logged
    kinds = {"eval_retrieval", "eval_clustering", "eval_classification"}
    assert kinds <= set().union(*(line for line in history if "eval_loss" in line))


def test_a_finished_run_is_not_repeated_and_not_overwritten(finished: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "run").rglob("*") if path.is_file()}
    assert main([str(finished / "recipe.yaml")]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert main([str(finished / "recipe.yaml"), "--resume"]) == 0
    after = {path: path.stat().st_mtime_ns for path in (finished / "run").rglob("*") if path.is_file()}
    # The finished model is evaluated again.
    changed = {path.name for path in after if before.get(path) != after[path] and path.parent.name != "report"}
    assert changed <= {"evaluation.json"}


def test_resuming_with_other_keys_is_refused(finished: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(finished / "recipe.yaml"), "--resume", "--learning_rate", "0.5"]) == 2
    assert "learning_rate: 0.001 → '0.5'" in capsys.readouterr().err


class _KilledError(BaseException):
    """Ends a training the way a killed process ends it: nothing gets to clean up."""


def _interrupt(monkeypatch: pytest.MonkeyPatch, at_step: int) -> None:
    """Makes the next training end as ``at_step`` begins."""
    from training.trainer.trainer import F2LLMTrainer

    training_step = F2LLMTrainer.training_step

    def dying(self, *args, **kwargs):
        if self.state.global_step == at_step:
            raise _KilledError
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(F2LLMTrainer, "training_step", dying)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at_step", [4, 8])
def test_a_resumed_run_ends_in_the_same_weights(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, at_step: int
) -> None:
    recipe = write_recipe(tmp_path)
    words = [str(recipe), "--stage", "stage1", "--dataloader_num_workers", str(workers)]
    with monkeypatch.context() as patch, pytest.raises(_KilledError):
        _interrupt(patch, at_step)
        main(words)
    checkpoints = sorted((tmp_path / "run/stage1").glob("checkpoint-*"))
    assert checkpoints and not (tmp_path / "run/stage1/model").exists()
    assert main([*words, "--resume"]) == 0
    resumed = load_file(tmp_path / "run/stage1/model/model.safetensors")
    uninterrupted = load_file(finished / "run/stage1/model/model.safetensors")
    assert resumed.keys() == uninterrupted.keys()
    for name, weights in uninterrupted.items():
        assert torch.equal(resumed[name], weights), name


def test_a_checkpoint_without_its_end_is_not_resumed_from(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    words = [str(recipe), "--stage", "stage1"]
    with monkeypatch.context() as patch, pytest.raises(_KilledError):
        _interrupt(patch, 8)
        main(words)
    torn = tmp_path / "run/stage1/checkpoint-6"
    (torn / "trainer_state.json").unlink()
    (torn / "model.safetensors").write_bytes(b"")
    assert main([*words, "--resume"]) == 0
    resumed = load_file(tmp_path / "run/stage1/model/model.safetensors")
    uninterrupted = load_file(finished / "run/stage1/model/model.safetensors")
    assert all(torch.equal(resumed[name], weights) for name, weights in uninterrupted.items())


def test_another_seed_gives_other_weights(finished: Path, tmp_path: Path) -> None:
    assert main([str(write_recipe(tmp_path)), "--stage", "stage1", "--seed", "5"]) == 0
    other = load_file(tmp_path / "run/stage1/model/model.safetensors")
    weights = load_file(finished / "run/stage1/model/model.safetensors")
    assert not torch.equal(other["norm.weight"], weights["norm.weight"])


@pytest.mark.parametrize(
    ("save_steps", "expected"),
    [("100", "stopped: the loss became "), ("1", "stopped: weights (embed_tokens.weight, …)")],
)
def test_a_training_that_diverges_stops_and_saves_nothing_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture, save_steps: str, expected: str
) -> None:
    words = ["--learning_rate", "1e38", "--warmup_steps", "4", "--max_grad_norm", "0", "--save_steps", save_steps]
    assert main([str(write_recipe(tmp_path)), *words]) == 1
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith(expected) and "step" in error and "last good checkpoint: " in error
    assert save_steps == "1" or "'tiny_retrieval'" in error
    assert not (tmp_path / "run/stage1/model").exists()
    for weights in (tmp_path / "run/stage1").glob("checkpoint-*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(weights).values())


def _break_parquet(folder: Path) -> None:
    path = folder / "data/retrieval.parquet"
    path.write_bytes(path.read_bytes()[:-50])


def _occupy(folder: Path) -> None:
    (folder / "run/stage1").mkdir(parents=True)
    (folder / "run/stage1/thesis.txt").write_text("mine")


@pytest.mark.parametrize(
    ("words", "damage", "expected"),
    [
        ([], lambda folder: (folder / "data/retrieval.parquet").unlink(), "no file matches"),
        ([], lambda folder: (folder / "data/retrieval.parquet").write_bytes(b""), "the file is empty"),
        ([], _break_parquet, "not a readable parquet file"),
        ([], _occupy, "holds something else"),
        (["--learning_rat", "1"], None, "did you mean 'learning_rate'?"),
        (["--task_types", "ranking"], None, "unknown task type 'ranking'"),
        (["--matryoshka_dimensions", "64", "8"], None, "do not fit a model of 32 dimensions"),
        (["--matryoshka_min_dim", "64"], None, "matryoshka_min_dim"),
        (["--learning_rate", "fast"], None, "learning_rate"),
        (["--num_hard_negatives_retrieval", "9"], None, "write 'num_hard_negatives_retrieval: 4'"),
        (["--tokenizer", "/nowhere/at/all"], None, "tokenizer '/nowhere/at/all'"),
        (["--manifest", "/nowhere/manifest.yaml"], None, "no such file"),
        (["--stage", "stage9"], None, "no stage 'stage9'"),
        (["--builder", "osm"], None, "unknown builder 'osm'"),
        (["--builder", "cldr", "--builder_options", '{"names": 3}'], None, "unknown key 'names'"),
        (["--sources", "nothing*"], None, "no source fits 'nothing*'"),
        (["--attn_implementation", "torch_varlen"], None, "torch_varlen"),
        (["--per_device_train_batch_size", "4"], None, "global_batch_size"),
        (["--stage", "stage2"], None, "stage1/model"),
        (["--evaluation_pairs", "/nowhere.parquet"], None, "/nowhere.parquet"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], None, "cannot be set up"),
        (["--optim", "adamw_bnb_8bit"], None, "cannot be set up"),
        (["--seed", "-1"], None, "seed"),
        (["--tokenizer", "train", "--model", "somewhere"], None, "tokenizer"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], damage, expected: str
) -> None:
    recipe = write_recipe(tmp_path)
    if damage is not None:
        damage(tmp_path)
    assert main([str(recipe), *words]) == 2
    error = capsys.readouterr().err.splitlines()
    lines = [line for line in error if line.startswith("error: ")]
    assert len(lines) == 1 and expected in lines[0]
    assert "Traceback" not in "\n".join(error)
    assert not (tmp_path / "run/stage1/model").exists()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"hidden_size": "abc"}, "hidden_size"),
        ({"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads"),
        ({"family": "f2llm-v2-9b"}, "f2llm-v2-8b"),
        ({"family": 3}, "cannot be used"),
    ],
)
def test_an_impossible_shape_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, fields: dict, expected: str
) -> None:
    assert main([str(write_single_stage(tmp_path, model_config=fields))]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and expected in error


def test_a_tokenizer_without_eos_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(finished / "run/stage1/tokenizer", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["eos_token"] = None
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))
    assert main([str(write_recipe(tmp_path)), "--tokenizer", str(folder)]) == 2
    assert "has no EOS token" in capsys.readouterr().err


def test_a_faulty_recipe_can_be_corrected_and_run_again(tmp_path: Path) -> None:
    words = [str(write_recipe(tmp_path)), "--stage", "stage1", "--max_steps", "1"]
    assert main([*words, "--matryoshka_min_dim", "64"]) == 2
    assert main([*words, "--lr_scheduler_type", "cosine_with_min_lr"]) == 2
    assert main([*words, "--tokenizer_vocab_size", "300"]) == 0
    config = json.loads((tmp_path / "run/stage1/model/config.json").read_text())
    assert config["vocab_size"] == 300


def test_a_folder_that_is_no_prepared_source_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = write_recipe(tmp_path)
    corpus = tmp_path / "prepared/tiny_retrieval"
    corpus.mkdir(parents=True)
    (corpus / "corpus.txt").write_text("mine")
    words = [str(recipe), "--stage", "stage1", "--max_steps", "1"]
    assert main([*words, "--prepared_dir", str(tmp_path / "prepared")]) == 0
    assert [path.name for path in corpus.iterdir()] == ["corpus.txt"]
    # Not even in the place of a prepared source.
    (prepared,) = (tmp_path / "prepared").glob("tiny_retrieval-*")
    (prepared / "source.json").unlink()
    (prepared / "corpus.txt").write_text("mine")
    words = [*words, "--output_dir", str(tmp_path / "other")]
    assert main([*words, "--prepared_dir", str(tmp_path / "prepared")]) == 2
    assert "give another prepared_dir" in capsys.readouterr().err
    assert (prepared / "corpus.txt").read_text() == "mine"


def test_a_run_that_is_at_work_is_not_started_twice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = write_single_stage(tmp_path, max_steps=1)
    for more in ([], ["--resume"]):
        # As the first process of a run holds it from its start to its end.
        with locked(tmp_path / "run/model"):
            assert main([str(recipe), *more]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "another process trains there" in line and "another output_dir" in line
        # Nothing was written beside what is at work.
        assert [path.name for path in (tmp_path / "run").iterdir()] == []
    assert main([str(recipe)]) == 0
    assert not list((tmp_path / "run").glob("*.lock"))
    with locked(tmp_path / "run/model"):
        assert main([str(recipe), "--resume"]) == 2


def test_bad_rows_that_are_put_aside_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = write_single_stage(tmp_path, max_steps=1, on_bad_row="quarantine")
    path = tmp_path / "data/retrieval.parquet"
    columns = pq.read_table(path).to_pydict()
    columns["query"][3] = columns["query"][4] = " "
    columns["passage"][70] = None
    pq.write_table(pa.table(columns), path)
    # The tokenizer is trained on the other rows, too.
    assert main([str(recipe)]) == 0
    said = "source 'tiny_retrieval': 3 of 80 rows (3.8%) were put aside (2 is empty, 1 is null), see "
    assert said in caplog.text
    # Data that was prepared before tells it as well.
    caplog.clear()
    assert (
        main([str(recipe), "--output_dir", str(tmp_path / "again"), "--prepared_dir", str(tmp_path / "run/prepared")])
        == 0
    )
    assert said in caplog.text

    columns["query"] = ["" for _ in columns["query"]]
    pq.write_table(pa.table(columns), path)
    model = str(tmp_path / "run/model")
    recipe = write_single_stage(
        tmp_path / "none", model=model, model_config=None, tokenizer=None, on_bad_row="quarantine"
    )
    assert main([str(recipe), "--manifest", str(tmp_path / "data/manifest.yaml")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "no row is left to train on" in line and "80 of 80 rows (100.0%) were put aside (80 is empty)" in line


def test_a_model_that_lacks_weights_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "lacking"
    shutil.copytree(finished / "run/stage1/model", folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("layers.1.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = write_single_stage(tmp_path, model=str(folder), model_config=None, tokenizer=None)
    assert main([str(recipe)]) == 2
    assert "its weights lack layers.1." in capsys.readouterr().err
    (folder / "model.safetensors").write_bytes(b"broken")
    assert main([str(recipe)]) == 2
    assert "cannot be used" in capsys.readouterr().err


def test_an_evaluation_of_another_model_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/evaluation.json").write_text('{"model": "another"}')
    assert main([str(recipe)]) == 2
    assert "holds the evaluation of another model" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/evaluation.json").read_text()) == {"model": "another"}


def test_resuming_over_changed_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import pyarrow.parquet as pq

    words = [str(write_recipe(tmp_path)), "--stage", "stage1"]
    with monkeypatch.context() as patch, pytest.raises(_KilledError):
        _interrupt(patch, 4)
        main(words)
    path = tmp_path / "data/retrieval.parquet"
    pq.write_table(pq.read_table(path).slice(0, 40), path)
    assert main([*words, "--resume"]) == 2
    assert "the data changed since the run started (tiny_retrieval)" in capsys.readouterr().err


def test_help_documents_every_key(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for key in ("--resume", "--global_batch_size", "--learning_rate", "--manifest", "--matryoshka", "--output_dir"):
        assert key in text


def test_the_script_runs_from_another_folder_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "training/run_stage.py"), "missing.yaml"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == "error: missing.yaml: no such file; check the path"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "training/recipes/f2llm-v2").glob("stage?-*.yaml")), ids=lambda p: p.stem
)
def test_published_recipes_are_complete(path: Path) -> None:
    from training.config.recipe import load_recipe

    # The recipes compute in bf16 on a GPU; their keys must hold on any machine.
    arguments = load_recipe(path, {"bf16": False, "use_cpu": True}).stages[0].arguments
    size = path.stem.split("-")[1]
    published = {
        "80m": (4e-5, 4), "160m": (3e-5, 3), "330m": (2e-5, 3), "0.6b": (1e-5, 2),
        "1.7b": (9e-6, 2), "4b": (7e-6, 2), "8b": (6e-6, 2), "14b": (5e-6, 2),
    }  # fmt: skip
    assert (arguments.learning_rate, arguments.num_train_epochs) == published[size]
    assert arguments.global_batch_size == 512 and arguments.warmup_steps == 500
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.weight_decay) == (0.9, 0.98, 0.01)
    assert arguments.num_hard_negatives == {"retrieval": 7, "clustering": 9, "classification": 1}
    assert arguments.lr_scheduler_kwargs == {"min_lr": 1e-7}
    published = yaml.safe_load((path.parent / "published.yaml").read_text())
    assert published["bf16"] is True
    # A blank text among 60 million rows does not end a run.
    assert published["on_bad_row"] == "quarantine"
    manifest = read_manifest(ROOT / arguments.manifest)
    entries = manifest.of_stage(arguments.manifest_stage)
    if path.stem.startswith("stage1"):
        assert not arguments.instructions and arguments.cap is None and len(entries) == 7
    else:
        assert arguments.instructions and arguments.cap == 80000 and len(entries) == len(manifest.entries)


def test_all_sizes_have_their_stages() -> None:
    stems = {path.stem for path in (ROOT / "training/recipes/f2llm-v2").glob("stage?-*.yaml")}
    assert {f"stage1-{size}" for size in ("0.6b", "1.7b", "4b", "8b", "14b")} <= stems
    assert {f"stage2-{size}" for size in ("80m", "160m", "330m", "0.6b", "1.7b", "4b", "8b", "14b")} <= stems


def test_accuracy_is_what_numpy_says() -> None:
    from training.evaluation.pairs import nearest

    generator = torch.Generator().manual_seed(0)
    queries, candidates = torch.randn(50, 16, generator=generator), torch.randn(20, 16, generator=generator)
    for dim in (16, 8):
        a, b = queries[:, :dim].numpy(), candidates[:, :dim].numpy()
        cosines = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
        assert (nearest(queries, candidates, dim, rows_per_block=7) == cosines.argmax(axis=1)).all()


def test_query_and_passage_are_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first file of a new user: no negatives, and no key about them."""
    caplog.set_level("INFO")
    path = write_single_stage(tmp_path, num_hard_negatives_retrieval=None, max_steps=3)
    source = tmp_path / "data" / "retrieval.parquet"
    pq.write_table(pq.read_table(source, columns=["query", "passage"]), source)
    assert main([str(path)]) == 0
    assert "tiny_retrieval: no negative columns" in caplog.text
    history = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["loss_in_batch"] > 0 and history[0]["loss_hard"] == 0


def test_what_a_dry_run_made_in_the_output_folder_is_no_other_run(tmp_path: Path) -> None:
    catalogs = write_catalogs(tmp_path / "locale", ["de", "fr"])
    built = {"builder": "gettext", "builder_options": {"locale_dirs": [str(catalogs)]}}
    places = {"manifest": str(tmp_path / "run/data/manifest.yaml"), "prepared_dir": str(tmp_path / "run/tokens/first")}
    keys = {"max_steps": 1, "global_batch_size": 4, "num_hard_negatives_retrieval": 0}
    recipe = str(write_single_stage(tmp_path, **built, **places, **keys))
    assert main([recipe, "--dry-run"]) == 0
    assert {"data", "tokens"} <= {path.name for path in (tmp_path / "run").iterdir()}
    (tmp_path / "run/other").touch()
    assert main([recipe]) == 2
    (tmp_path / "run/other").unlink()
    assert main([recipe]) == 0
