"""Static models: what a token's embedding is made of, that training computes what is used, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from tests.training.models.starts import edit_json
from tests.training.recipes import NO_NEW_MODEL, error_of, write_single_stage
from training.common.errors import UserError
from training.evaluation.models import load_model
from training.export import main as export
from training.models.encoders import find_miner
from training.models.encoding import embed_chunk
from training.models.loading import load_tokenizer
from training.models.model_folder import WeightFiles
from training.models.model_ref import ModelRef
from training.models.static import distil_static, embed_tokens, is_static, load_static, save_static, sif_weights
from training.publishing.pack import PackOptions, pack
from training.run_stage import main

TEXTS = ["the red river", "größer 東京", "", "a<|im_end|>b", "🙂 window"]


@pytest.fixture
def static(folder, tmp_path):
    """A static model of 16 dimensions."""
    distil_static(folder, tmp_path / "static", 16)
    return tmp_path / "static"


def embeddings_in(folder):
    return WeightFiles(folder).read("embedding.weight").numpy()


def test_tokens_are_embedded_alone_as_documents(folder, tmp_path):
    edit_json(folder / "config_sentence_transformers.json", prompts={"query": "Query: ", "document": "seven "})
    model = SentenceTransformer(str(folder), device="cpu")
    words = [" orbit", " paper", " quiet"]
    ids = [model.tokenizer(f"seven{word}", add_special_tokens=False).input_ids for word in words]
    assert all(each[:-1] == ids[0][:-1] for each in ids)
    alone = embed_tokens(model, np.array([each[-1] for each in ids]), "seven")
    np.testing.assert_allclose(alone, model.encode([f"seven{word}" for word in words], prompt=""), atol=1e-5)
    # With all its dimensions, PCA turns embeddings and moves their mean to zero; then they are weighted.
    distil_static(folder, tmp_path / "static", 32)
    special = set(model.tokenizer.all_special_ids) | set(model.tokenizer.added_tokens_decoder)
    tokens = np.array([token for token in range(len(model.tokenizer)) if token not in special])
    ranks = 1 / np.arange(2, len(tokens) + 2)
    rows, plain = embeddings_in(tmp_path / "static"), embed_tokens(model, tokens, "seven ")
    assert not rows[sorted(special)].any() and rows.shape == (len(model.tokenizer), 32)
    turned = rows[tokens] / sif_weights(ranks / ranks.sum())[:, None]
    plain -= plain.mean(axis=0)
    np.testing.assert_allclose(turned @ turned.T, plain @ plain.T, atol=1e-3)
    variances = turned.var(axis=0)
    assert (np.diff(variances) <= 1e-6).all() and variances[0] > 2 * variances[15]


def test_known_frequencies_take_the_place_of_ranks(folder, prepared_sources, tmp_path):
    prepared = prepared_sources[0].folder.parent
    words = ["--backend", "static", "--dimensions", "16", "--output", str(tmp_path / "known")]
    assert export([str(folder), *words, "--prepared", str(prepared)]) == 0
    distil_static(folder, tmp_path / "ranked", 16)
    counts = np.bincount(np.concatenate([block for each in prepared_sources for block in each.token_blocks()]))
    known, ranked = embeddings_in(tmp_path / "known"), embeddings_in(tmp_path / "ranked")
    tokens = np.flatnonzero(ranked.any(axis=1))
    ratio = np.linalg.norm(known[tokens], axis=1) / np.linalg.norm(ranked[tokens], axis=1)
    counts = np.pad(counts, (0, len(known) - len(counts)))
    ranks = 1 / np.arange(2, len(tokens) + 2)
    wanted = sif_weights(counts[tokens] / counts[tokens].sum()) / sif_weights(ranks / ranks.sum())
    np.testing.assert_allclose(ratio, wanted, rtol=1e-3)


def test_a_model_is_read_in_training_as_by_stock_sentence_transformers(static, tmp_path):
    assert is_static(str(static)) and not list(static.glob("*.py"))
    stock = SentenceTransformer(str(static), device="cpu", trust_remote_code=False)
    assert [type(module).__name__ for module in stock] == ["StaticEmbedding", "Normalize"]
    assert stock.prompts == {"query": "", "document": ""} and stock.similarity_fn_name == "cosine"
    tokenizer = load_tokenizer(str(static))
    model = load_static(ModelRef("static", str(static)), "key 'model'", tokenizer)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    packed = torch.tensor([token for each in ids for token in each])[None]
    found = torch.nn.functional.normalize(embed_chunk(model, packed, [len(each) for each in ids]))
    np.testing.assert_allclose(found.detach().numpy(), stock.encode(TEXTS), atol=1e-6)
    assert not found[2].any()
    # Saved again, it is the same.
    tokenizer("a text", truncation=True, max_length=3)
    save_static(tmp_path / "again", model, tokenizer, stock.prompts)
    np.testing.assert_array_equal(
        SentenceTransformer(str(tmp_path / "again"), device="cpu").encode(TEXTS), stock.encode(TEXTS)
    )
    assert Tokenizer.from_file(str(tmp_path / "again/tokenizer.json")).truncation is None


def test_an_export_is_whole_and_says_what_it_is_of(folder, static, tmp_path, refuses):
    before = (static / "model.safetensors").stat().st_mtime_ns
    distil_static(folder, static, 16)
    assert (static / "model.safetensors").stat().st_mtime_ns == before
    with refuses(static, "holds something else"):
        distil_static(folder, static, 8)
    with refuses(static, "is a static model already"):
        distil_static(static, tmp_path / "other")
    for dimensions in (0, 33):
        with refuses(f"--dimensions {dimensions}", "give at most 32"):
            distil_static(folder, tmp_path / "other", dimensions)
    with refuses(f"--prepared {tmp_path}", "holds no prepared source"):
        distil_static(folder, tmp_path / "other", 16, tmp_path)
    assert not (tmp_path / "other").exists()


def test_options_and_sources_that_do_not_fit(folder, whole, prepared_sources, tmp_path, capsys, refuses, monkeypatch):
    for backend, option in (("static", "--dtype=f16"), ("static", "--precision=int8"), ("gguf", "--dimensions=8")):
        assert export([str(folder), "--backend", backend, option, "--output", str(tmp_path / "out")]) == 2
        assert f"{option.split('=')[0]} has no effect with --backend {backend}" in capsys.readouterr().err
    # That model has fewer tokens.
    with refuses("holds tokens that the model does not know"):
        distil_static(whole, tmp_path / "out", 16, prepared_sources[0].folder.parent)
    monkeypatch.setattr("training.models.static.PreTrainedTokenizerFast", type(None))
    with refuses(folder, "has no fast tokenizer"):
        distil_static(folder, tmp_path / "out", 16)


def test_static_models_are_measured_and_mine(static):
    measured = load_model(str(static), None, max_length=2)
    text = "seven orbit paper quiet window"
    assert (measured.record.parameters, measured.record.dimension) == (embeddings_in(static).size, 16)
    ids = measured.store.model.tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) == 2 and measured.store.encode([text], "").shape == (1, 16)
    miner = find_miner(str(static), max_length=2)
    np.testing.assert_allclose(miner.embed_passages([text]), measured.store.encode([text], ""), atol=1e-6)
    miner.close()
    for option, expected in (({"rank": 8}, "--ranks"), ({"layers": [1]}, "--layers")):
        with pytest.raises(UserError, match=expected):
            load_model(str(static), None, max_length=2, **option)


@pytest.mark.parametrize("content", [{"a": 1}, [1], [], None])
def test_a_damaged_list_of_modules_is_no_static_model(static, content):
    (static / "modules.json").write_text(json.dumps(content))
    assert not is_static(str(static))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--lora true", "key 'lora' does not go with a static model"),
        ("--compile true", "key 'compile' does not go with a static model"),
        ('--prune_to {"hidden_size":8}', "key 'prune_to' does not go with a static model"),
        ("--dry-run", "is static; its training, of seconds, is not planned"),
        ("--matryoshka_dimensions 32", "do not fit a model of 16 dimensions"),
    ],
)
def test_a_stage_says_what_a_static_model_cannot_do(static, tmp_path, capsys, words, expected):
    recipe = write_single_stage(tmp_path, **NO_NEW_MODEL, model=str(static))
    assert expected in error_of([recipe, *words.split()], capsys)


def test_launches_and_folders_that_are_refused(static, tmp_path, capsys, monkeypatch, refuses):
    recipe = write_single_stage(tmp_path, **NO_NEW_MODEL, model=str(static))
    with monkeypatch.context() as patched:
        patched.setenv("ACCELERATE_USE_FSDP", "true")
        assert "is static and not sharded" in error_of([recipe], capsys)
    with refuses(static, "is static and not packed", "push_to_hub"):
        pack(static, tmp_path / "packed", PackOptions("name"))
    tokenizer = load_tokenizer(str(static))
    stock = SentenceTransformer(str(static), device="cpu")
    dense = SentenceTransformer(modules=[stock[0], Dense(16, 8), Normalize()], device="cpu")
    dense.save_pretrained(str(tmp_path / "dense"), create_model_card=False)
    with refuses("has the module Dense after its token embeddings"):
        load_static(ModelRef("dense", str(tmp_path / "dense")), "key 'model'", tokenizer)
    fewer = SentenceTransformer(modules=[StaticEmbedding(stock[0].tokenizer, torch.ones(300, 4))], device="cpu")
    fewer.save_pretrained(str(tmp_path / "fewer"), create_model_card=False)
    with refuses("tokens but 300 embeddings"):
        load_static(ModelRef("fewer", str(tmp_path / "fewer")), "key 'model'", tokenizer)


def test_a_stage_trains_and_saves_a_static_model(static, tmp_path, caplog):
    assert main([str(write_single_stage(tmp_path, **NO_NEW_MODEL, model=str(static), learning_rate=0.05))]) == 0
    trained, start = (load_file(each / "model.safetensors") for each in (tmp_path / "run/model", static))
    assert trained.keys() == start.keys() == {"embedding.weight"} and "static model alike" not in caplog.text
    assert json.loads((tmp_path / "run/model/config.json").read_text())["matryoshka_dimensions"] == [16, 8]
    history = json.loads((next((tmp_path / "run").glob("checkpoint-10")) / "trainer_state.json").read_text())
    training = [line["loss"] for line in history["log_history"] if "loss" in line]
    assert training[-1] < 0.8 * training[0]
    # Rows of special tokens stay what they are.
    ends = load_tokenizer(str(static)).eos_token_id
    assert not trained["embedding.weight"][ends].any()
    model = SentenceTransformer(str(tmp_path / "run/model"), device="cpu", truncate_dim=8)
    assert model.encode_query("the red river").shape == (8,)
    shutil.rmtree(tmp_path / "run")
    recipe = write_single_stage(tmp_path, **NO_NEW_MODEL, model=str(static), instructions=True, max_steps=1)
    assert main([str(recipe)]) == 0 and "write 'instructions: false'" in caplog.text


def test_a_tokenizer_that_begins_texts_is_refused(static, tmp_path, refuses):
    tokenizer = load_tokenizer(str(static))
    end, number = tokenizer.eos_token, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[end, "$A", end], pair=[end, "$A", "$B", end], special_tokens=[(end, number)]
    )
    with pytest.raises(UserError, match="puts tokens before a text"):
        load_static(ModelRef("static", str(static)), "key 'model'", tokenizer)
