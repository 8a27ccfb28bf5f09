"""Models without a run are packed, too, and weights are the run's own, in the dtype and the shards asked for."""

from __future__ import annotations

import json
import shutil
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from modeling_f2llm.modeling_f2llm import F2LLMModel
from tests.training.foreign_teacher import save_foreign_teacher
from tests.training.models.starts import QWEN3_PROMPTS, save_like_qwen3_embedding
from tests.training.publishing.packed import QUICK, content_of, metadata_of, rewrite_json
from training.publish import main
from training.publishing.model_files import copy_weights, read_weights
from training.publishing.record import Reference, load_release
from training.publishing.verify import examine

NAME, SENTENCES = "their-embedder", "config_sentence_transformers.json"

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def tuned(tmp_path, tiny_config, tiny_tokenizer):
    """A model like Qwen3-Embedding, with the card and the settings that others save."""
    folder = save_like_qwen3_embedding(tmp_path / "elsewhere", tiny_config, tiny_tokenizer)
    (folder / "README.md").write_text(
        "---\nbase_model: Qwen/Qwen3-Embedding-0.6B\nlicense: apache-2.0\n---\n\n# Mine\n"
    )
    config = json.loads((folder / "config.json").read_text())
    for key in ("matryoshka_dimensions", "is_matryoshka", "auto_map"):
        config.pop(key, None)
    # As transformers 4 wrote it.
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps({**config, "max_window_layers": 28}))
    rewrite_json(folder / "tokenizer_config.json", padding_side="left")
    return folder


def pack(folder, *words):
    output = ["--output", str(folder.parent / "packed"), "--licence", "apache-2.0"]
    return main(["pack", str(folder), "--name", NAME, *output, *words])


def test_a_model_tuned_elsewhere_is_packed_verified_and_the_same(tuned, sentences):
    before = content_of(tuned)
    own = SentenceTransformer(str(tuned), device="cpu")
    assert pack(tuned) == 0
    packed = tuned.parent / "packed"
    assert examine(packed).faults == ()
    for options in ({}, {"trust_remote_code": True}):
        model = SentenceTransformer(str(packed), device="cpu", **options)
        for encode in ("encode_query", "encode_document"):
            expected, found = (getattr(each, encode)(sentences) for each in (own, model))
            np.testing.assert_allclose(found, expected, atol=1e-5)
        assert model.prompts == QWEN3_PROMPTS and model.max_seq_length == own.max_seq_length
    assert content_of(tuned) == before
    # Record and card say what is not known.
    release = load_release(packed)
    (stage,) = release.stages
    assert (stage.kind, stage.start) == ("unknown", Reference("hub", "Qwen/Qwen3-Embedding-0.6B"))
    assert (stage.arguments, stage.sources) == ({}, ())
    assert release.dimensions == (32,) and release.languages == ()
    text, metadata = (packed / "README.md").read_text(), metadata_of(packed)
    assert metadata["base_model"] == "Qwen/Qwen3-Embedding-0.6B" and metadata["license"] == "apache-2.0"
    assert "matryoshka" not in metadata["tags"] and "datasets" not in metadata
    assert "No score of this model came with it" in text and "what its training data allows is not known" in text
    assert "This model was made by" not in text and "author = {Zhang" not in text
    # Nothing says what it was made from.
    (tuned / "README.md").unlink()
    assert pack(tuned) == 0
    assert "base_model" not in metadata_of(packed) and examine(packed, QUICK).faults == ()
    assert "| made from | not recorded |" in (packed / "README.md").read_text()


def test_a_model_of_ours_without_its_run(trained_runs, tmp_path):
    model = Path(shutil.copytree(trained_runs / "student/model", tmp_path / "moved"))
    assert pack(model) == 0
    packed = model.parent / "packed"
    assert examine(packed, QUICK).faults == ()
    (stage,) = load_release(packed).stages
    assert stage.kind == "unknown" and stage.arguments["learning_rate"] == 1e-3
    assert json.loads((packed / "training_arguments.json").read_text()) == stage.arguments
    assert load_release(packed).dimensions == (16, 8)


def without_norm(folder):
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:2]))


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: rewrite_json(folder / "tokenizer.json", post_processor=None), "puts no token after a text"),
        (without_norm, "does not normalise its embeddings"),
        (lambda each: rewrite_json(each / SENTENCES, default_prompt_name="query"), "puts a prompt before documents"),
    ],
)
def test_what_is_not_whole_or_of_another_kind_is_refused(tuned, capsys, spoil, part):
    spoil(tuned)
    assert pack(tuned) == 2
    error = capsys.readouterr().err
    assert part in error and len(error.splitlines()) == 1
    assert not (tuned.parent / "packed").exists()


def test_other_architectures_and_poolings_are_refused(tmp_path, tiny_config, tiny_tokenizer, capsys):
    mean = save_like_qwen3_embedding(tmp_path / "mean", tiny_config, tiny_tokenizer, pooling="mean")
    dense = save_like_qwen3_embedding(tmp_path / "dense", tiny_config, tiny_tokenizer, dense=True)
    bert = save_foreign_teacher(tmp_path / "bert", 16)
    for folder, part in ((bert, "only Qwen3"), (mean, "pooled by mean"), (dense, "Dense")):
        assert pack(folder) == 2
        assert part in capsys.readouterr().err


def test_a_packed_folder_and_a_runs_own_model_are_told_apart(tuned, runs, capsys):
    assert main(["pack", str(tuned), "--name", NAME, "--output", str(tuned.parent / "x")]) == 2
    assert "--licence is missing" in capsys.readouterr().err
    assert pack(tuned) == 0
    assert main(["pack", str(tuned.parent / "packed"), "--name", NAME]) == 2
    assert "is packed already" in capsys.readouterr().err
    for folder, output in ((runs / "student", "of run"), (runs / "student/model", "of model")):
        assert main(["pack", str(folder), "--name", NAME, "--output", str(runs.parent / output)]) == 0
    assert content_of(runs.parent / "of run") == content_of(runs.parent / "of model")


@pytest.fixture
def saved(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "saved")
    (tmp_path / "target").mkdir()
    return tmp_path / "saved"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_copied_or_rounded_to_the_nearest(saved, tmp_path, tiny_model, dtype):
    # Nothing but the weights goes along.
    save_file(load_file(saved / "model.safetensors"), saved / "model.safetensors", {"format": "pt", "by": "alice@host"})
    weights = read_weights(saved, tiny_model.config)
    copy_weights(weights, tmp_path / "target", dtype)
    assert weights.dtype == "float32" and weights.parameters == tiny_model.num_parameters()
    (file,) = (tmp_path / "target").iterdir()
    copied, expected = load_file(file), dict(tiny_model.named_parameters())
    assert copied.keys() == expected.keys() and file.name == "model.safetensors"
    assert all(torch.equal(copied[name], expected[name].to(getattr(torch, dtype))) for name in expected)
    with safe_open(file, "pt") as stored:
        assert stored.metadata() == {"format": "pt"}


def test_shards_are_small_and_load_as_one_model(saved, tmp_path, tiny_model, random_batch):
    target = tmp_path / "target"
    copy_weights(read_weights(saved, tiny_model.config), target, "float32", "20KB")
    tiny_model.config.save_pretrained(target)
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(target / file)
        assert len(tensors) == 1 or sum(each.nbytes for each in tensors.values()) <= 20_000
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in tiny_model.parameters())
    batch = random_batch([5, 9])
    loaded = F2LLMModel.from_pretrained(target, dtype=torch.float32).eval()
    assert torch.equal(loaded(**batch).last_hidden_state, tiny_model(**batch).last_hidden_state)
    # Shards are read as they are written.
    again = read_weights(target, tiny_model.config)
    assert again.parameters == tiny_model.num_parameters() and set(again.files.values()) == set(files)


def test_no_more_than_a_shard_is_held_and_all_is_finite(saved, tmp_path, tiny_model, monkeypatch, refuses):
    alive, most, total = [], 0, 0

    def save(tensors, path, metadata):
        nonlocal most, total
        # Those of the shard before must be gone by now.
        assert not [each for each in alive if each() is not None]
        alive[:] = [weakref.ref(each) for each in tensors.values()]
        most, total = max(most, len(tensors)), total + len(tensors)

    monkeypatch.setattr("training.publishing.model_files.save_file", save)
    copy_weights(read_weights(saved, tiny_model.config), tmp_path / "target", "bfloat16", "10KB")
    assert total == len(list(tiny_model.parameters())) > most
    # What is not finite in the dtype is refused.
    tensors = load_file(saved / "model.safetensors")
    tensors["norm.weight"][3] = torch.finfo(torch.float32).max
    save_file(tensors, saved / "model.safetensors")
    with refuses(saved, "norm.weight is NaN or infinite in bfloat16", "earlier checkpoint"):
        copy_weights(read_weights(saved, tiny_model.config), tmp_path / "target", "bfloat16")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda each: {k: v for k, v in each.items() if k != "norm.weight"}, ["norm.weight", "absent"]),
        (lambda each: {**each, "norm.weight": torch.ones(3)}, ["norm.weight", "(3,)", "(32,)"]),
        (lambda each: {**each, "norm.weight": each["norm.weight"].half()}, ["float16, float32"]),
        (lambda each: {k: v.double() for k, v in each.items()}, ["float64"]),
    ],
)
def test_weights_of_another_model_are_refused(saved, tiny_model, refuses, change, parts):
    save_file(change(load_file(saved / "model.safetensors")), saved / "model.safetensors")
    with refuses(saved, *parts):
        read_weights(saved, tiny_model.config)


def test_reading_leaves_what_another_thread_makes_alone(saved, tiny_model, monkeypatch):
    # As when a checkpoint is uploaded while its run trains.
    made = []

    def model_while_another_thread_works(config):
        thread = threading.Thread(target=lambda: made.append(torch.nn.Linear(2, 2)))
        thread.start()
        thread.join()
        return F2LLMModel(config)

    monkeypatch.setattr("training.models.model_folder.F2LLMModel", model_while_another_thread_works)
    read_weights(saved, tiny_model.config)
    assert [each.weight.is_meta for each in made] == [False]
