"""Models that embed texts: read as they were trained, whole, and without running anyone's code."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from transformers import AutoModel, AutoTokenizer, Qwen3ForCausalLM, Qwen3Model

from modeling_f2llm import F2LLMModel, build_sentence_transformer
from modeling_f2llm.prompts import DEFAULT_PROMPTS, instruct
from tests.training.foreign_teacher import save_foreign_teacher
from tests.training.models.starts import QWEN3_PROMPTS, edit_json, save_like_qwen3_embedding, save_plain
from training.distillation.teacher import load_text_teacher
from training.models.adapters import ADAPTER_WEIGHTS
from training.models.encoders import TRUST_OPTION, exit_sizes, find_miner, load_encoder, runs_own_code, with_exits
from training.models.model_ref import ModelRef, prompts_of, reads_as_ours, resolve

TEXTS = ["Where do giant pandas live?", "大熊猫生活在四川的山林里。", "a"]


@pytest.fixture
def plain(tmp_path, tiny_config, tiny_tokenizer):
    return save_plain(tmp_path / "plain", tiny_config, tiny_tokenizer)


def ref(place):
    return ModelRef(str(place), str(place))


def load(place, **options):
    return load_encoder(resolve(str(place), "MODEL"), "MODEL", device="cpu", **options)


def expected_of(plain, texts):
    """As the teacher over the student's tokens reads it: at the last token, EOS appended."""
    model = F2LLMModel.from_pretrained(plain, dtype=torch.float32).eval()
    return build_sentence_transformer(model, AutoTokenizer.from_pretrained(plain)).encode(texts, prompt="")


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "language model"])
def test_a_plain_qwen3_is_read_as_one_is_trained(plain, causal):
    if causal:
        # sentence-transformers itself takes the last token of these, which is then no EOS.
        Qwen3ForCausalLM.from_pretrained(plain).save_pretrained(plain)
    read = load(plain)
    np.testing.assert_allclose(read.encode(TEXTS, prompt=""), expected_of(plain, TEXTS), atol=1e-6)
    assert read.prompts == DEFAULT_PROMPTS
    assert reads_as_ours(str(plain))


def test_one_pass_gives_the_embeddings_of_all_exits(whole, refuses):
    model, shorter = load(whole), SentenceTransformer(str(whole), config_kwargs={"num_hidden_layers": 1})
    own = SentenceTransformer(str(whole), trust_remote_code=True, model_kwargs={"num_hidden_layers": 1})
    wanted = [each.encode_query(TEXTS) for each in (shorter, model)]
    np.testing.assert_allclose(own.encode_query(TEXTS), wanted[0], atol=1e-6)
    exits = with_exits(pickle.loads(pickle.dumps(model)), [1, 2], "MODEL")
    np.testing.assert_allclose(exits.encode_query(TEXTS), np.concatenate(wanted, axis=1), atol=1e-6)
    sizes = [sum(weights.numel() for weights in each.parameters()) for each in (shorter, model)]
    assert exit_sizes(exits) == dict(zip((1, 2), sizes, strict=True)) and not exit_sizes(model)
    with refuses("MODEL", [3], "2 layers"):
        with_exits(model, [1, 3], "MODEL")


def test_evaluation_mining_and_teacher_read_it_the_same_way(plain, whole):
    pytest.importorskip("mteb")
    from training.evaluation.models import load_model

    expected = expected_of(plain, TEXTS)
    found = load_model(str(plain), None, 512)
    np.testing.assert_allclose(found.store.encode(TEXTS, ""), expected, atol=1e-6)
    assert found.prompts.template == "Instruct: {instruction}\nQuery: "
    assert found.prompts.default == DEFAULT_PROMPTS["query"]
    assert "pooling lasttoken" in found.record.label
    np.testing.assert_allclose(find_miner(str(plain)).embed_passages(TEXTS), expected, atol=1e-6)
    queries, mined = [instruct("Find.", text) for text in TEXTS], find_miner(str(plain)).embed_queries(TEXTS, "Find.")
    np.testing.assert_allclose(mined, expected_of(plain, queries), atol=1e-6)
    taught = load_text_teacher(str(plain), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(torch.nn.functional.normalize(taught).numpy(), expected, atol=1e-6)


def test_another_plain_model_is_pooled_as_sentence_transformers_does(tmp_path, caplog):
    bert = save_foreign_teacher(tmp_path / "foreign", 16) / "bert"
    with caplog.at_level("INFO", logger="training"):
        read = load(bert)
    assert read[1].pooling_mode == "mean" and not read.prompts.get("query")
    (line,) = [each for each in caplog.messages if "modules.json" in each]
    assert str(bert) in line and "by mean" in line


def test_pickled_weights_are_loaded_as_transformers_does(whole):
    before = load(whole).encode(TEXTS)
    torch.save(load_file(whole / "model.safetensors"), whole / "pytorch_model.bin")
    (whole / "model.safetensors").unlink()
    np.testing.assert_array_equal(load(whole).encode(TEXTS), before)


def test_other_code_is_not_run_by_default(whole, tmp_path, caplog):
    caplog.set_level("INFO", logger="training")
    assert runs_own_code(ref(whole)) and type(load(whole)[0].auto_model).__name__ == "F2LLMModel"
    model, trace = SentenceTransformer(str(whole), device="cpu"), tmp_path / "trace"
    expected = model.encode(TEXTS)
    # sentence-transformers saves the names of classes whose code it has not run.
    model.save_pretrained(str(tmp_path / "tuned"), create_model_card=False)
    np.testing.assert_array_equal(load(tmp_path / "tuned").encode(TEXTS), expected)
    assert "is not run" not in caplog.text
    with (whole / "configuration_f2llm.py").open("a") as file:
        file.write(f"\nopen({str(trace)!r}, 'w').close()\n")
    assert not runs_own_code(ref(whole))
    stock = load(whole, trust=TRUST_OPTION)
    assert type(stock[0].auto_model) is Qwen3Model and not trace.exists()
    assert "is not run; add --trust-remote-code" in caplog.text
    np.testing.assert_array_equal(stock.encode(TEXTS), expected)
    find_miner(str(whole)).embed_passages(["a"])
    load_text_teacher(str(whole), device="cpu")
    assert not trace.exists()
    assert type(load(whole, trust_remote_code=True)[0].auto_model).__name__ == "F2LLMModel" and trace.exists()


def test_a_model_that_needs_its_code_is_refused(whole, refuses):
    edit_json(whole / "config.json", model_type="other")
    (whole / "modeling_f2llm.py").write_text("raise SystemExit")
    with refuses("--model", whole, "add --trust-remote-code if you trust it"):
        find_miner(str(whole)).embed_passages(["a"])
    with refuses("key 'teacher'", whole, "use a model that needs none"):
        load_text_teacher(str(whole), device="cpu")


def test_code_elsewhere_is_not_this_packages(whole):
    for file, change in (
        ("config.json", lambda config: config.update(auto_map={"AutoModel": "org/other--modeling_f2llm.F2LLMModel"})),
        ("tokenizer_config.json", lambda config: config.update(auto_map={"AutoTokenizer": ["org/o--t.T", None]})),
        ("modules.json", lambda modules: modules[0].update(type="elsewhere.Module")),
    ):
        assert runs_own_code(ref(whole)) and not runs_own_code(ref("org/name"))
        before = (whole / file).read_text()
        content = json.loads(before)
        change(content)
        (whole / file).write_text(json.dumps(content))
        assert not runs_own_code(ref(whole))
        (whole / file).write_text(before)
    (whole / "1_Pooling" / "packing.py").write_bytes((whole / "packing.py").read_bytes())
    assert not runs_own_code(ref(whole))


def test_what_the_settings_of_a_module_name_is_not_called(whole, tmp_path, monkeypatch):
    pipeline, folder = SentenceTransformer(str(whole), device="cpu", trust_remote_code=True), tmp_path / "dense"
    modules = [pipeline[0], pipeline[1], Dense(32, 16)]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder), create_model_card=False)
    before = load(folder).encode(TEXTS)
    edit_json(folder / "2_Dense/config.json", activation_function="os.abort")
    monkeypatch.setattr("os.abort", lambda: pytest.fail("it was called"))
    assert not runs_own_code(ref(folder))
    # sentence-transformers warns and takes its default, which it was.
    np.testing.assert_array_equal(load(folder).encode(TEXTS), before)


def save_adapter(base, folder, **options):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peft.get_peft_model(AutoModel.from_pretrained(base), lora).save_pretrained(folder)


@pytest.fixture
def adapter(whole, tmp_path):
    save_adapter(whole, tmp_path / "adapter", init_lora_weights=False)
    for name in ("modules.json", "tokenizer.json", "tokenizer_config.json", "config_sentence_transformers.json"):
        shutil.copyfile(whole / name, tmp_path / "adapter" / name)
    shutil.copytree(whole / "1_Pooling", tmp_path / "adapter/1_Pooling")
    return tmp_path / "adapter"


@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_an_adapter_without_modules_is_read_as_its_base(tmp_path, tiny_config, tiny_tokenizer, pooling):
    base = save_like_qwen3_embedding(tmp_path, tiny_config, tiny_tokenizer, pooling, dense=True)
    # As it starts, it adds nothing.
    save_adapter(base, tmp_path / "adapter")
    read, expected = load(tmp_path / "adapter"), SentenceTransformer(str(base), device="cpu")
    assert read.prompts == QWEN3_PROMPTS == prompts_of(str(tmp_path / "adapter"))
    np.testing.assert_allclose(read.encode_document(TEXTS), expected.encode_document(TEXTS), atol=1e-6)
    assert not reads_as_ours(str(tmp_path / "adapter"))
    # Its weights are there.
    with torch.no_grad():
        for name, weight in read[0].auto_model.named_parameters():
            weight.add_(0.1 * ("lora_B" in name))
    assert abs(read.encode_document(TEXTS) - expected.encode_document(TEXTS)).max() > 1e-4


@pytest.mark.parametrize("part", ["adapter", "base"])
def test_an_adapter_runs_the_code_of_its_base_and_is_refused_if_a_weight_is_missing(adapter, whole, refuses, part):
    assert runs_own_code(ref(adapter)) and type(load(adapter)[0].auto_model).__name__ == "F2LLMModel"
    path, lacking = adapter / ADAPTER_WEIGHTS, "layers.1.self_attn.q_proj.lora_B"
    if part == "base":
        path, lacking = whole / "model.safetensors", "layers.1.self_attn.q_proj"
    weights = {name: each for name, each in load_file(path).items() if lacking not in name}
    save_file(weights, path, metadata={"format": "pt"})
    with refuses("MODEL", adapter, f"its weights lack 0.{lacking}"):
        load(adapter)
    with (whole / "packing.py").open("a") as file:
        file.write("\n")
    assert not runs_own_code(ref(adapter))
