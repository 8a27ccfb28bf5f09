"""An adapter is what it says: nothing at first, the base when switched off, and its sum with the base when merged."""

from __future__ import annotations

import json
import sys
from copy import deepcopy

import pytest
import torch
from peft import AutoPeftModelForFeatureExtraction, LoraConfig, PeftModel
from sentence_transformers import SentenceTransformer

from modeling_f2llm import F2LLMConfig, F2LLMModel, build_sentence_transformer
from tests.training.models.starts import edit_json
from training.config.arguments import LORA_TARGETS
from training.merge import main
from training.models.adapters import (
    ADAPTER_WEIGHTS,
    add_adapter,
    attach_adapter,
    has_adapter,
    mend_saved,
    merge_into_base,
)
from training.models.loading import load_whole_model
from training.models.model_folder import count_parameters
from training.models.model_ref import AdapterFolder, base_of, base_revision, find_adapter, note_base
from training.planning.costs import count_adapter, estimate_memory

LENGTHS = [7, 3, 12]
KINDS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


def lora(dora=False, rank=4, **fields):
    targets = {"target_modules": list(LORA_TARGETS), **fields}
    return LoraConfig(task_type="FEATURE_EXTRACTION", r=rank, lora_alpha=2 * rank, use_dora=dora, **targets)


def disturb(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)


@torch.no_grad()
def hidden(model, batch):
    return model(**batch).last_hidden_state


@pytest.fixture
def batch(random_batch):
    return random_batch(LENGTHS)


@pytest.fixture
def save_adapter(whole, tmp_path, tiny_tokenizer):
    def save(name="adapter", dora=False, seed=1, **fields):
        model = F2LLMModel.from_pretrained(whole).eval()
        add_adapter(model, lora(dora, **fields))
        disturb(model, seed)
        folder = tmp_path / name
        build_sentence_transformer(model, deepcopy(tiny_tokenizer)).save_pretrained(str(folder))
        mend_saved(folder)
        note_base(folder, str(whole), base_revision(str(whole), "the base"))
        return folder

    return save


@KINDS
def test_an_adapter_changes_nothing_at_first_runs_packed_and_can_be_switched_off_or_merged(tiny_model, batch, dora):
    before, names = hidden(tiny_model, batch), {type(module) for module in tiny_model.modules()}
    add_adapter(tiny_model, lora(dora))
    assert torch.equal(hidden(tiny_model, batch), before)
    trained = [name for name, weight in tiny_model.named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert len({name.split(".lora_")[0] for name in trained}) == 7 * tiny_model.config.num_hidden_layers
    disturb(tiny_model)
    adapted = hidden(tiny_model, batch)
    tiny_model.disable_adapters()
    assert torch.equal(hidden(tiny_model, batch), before) and not torch.allclose(adapted, before, atol=1e-3)
    tiny_model.enable_adapters()
    ids = torch.cat([row[:length] for row, length in zip(batch["input_ids"], LENGTHS, strict=True)])[None]
    with torch.no_grad():
        packed = tiny_model(input_ids=ids, sequence_lengths=LENGTHS).last_hidden_state[0]
    assert torch.allclose(packed, adapted[batch["attention_mask"].bool()], atol=1e-6)
    merge_into_base(tiny_model)
    assert (hidden(tiny_model, batch) - adapted).abs().max() < 1e-5
    assert not has_adapter(tiny_model) and {type(module) for module in tiny_model.modules()} == names


@KINDS
def test_everybody_loads_the_folder(whole, save_adapter, sentences, batch, dora):
    folder = save_adapter(dora=dora)
    assert not {"config.json", "model.safetensors", "modeling_f2llm.py"} & {path.name for path in folder.iterdir()}
    expected, real = hidden(load_whole_model(str(folder)).eval(), batch), batch["attention_mask"].bool()
    wrapped = PeftModel.from_pretrained(F2LLMModel.from_pretrained(whole), str(folder)).eval()
    for model in (
        wrapped,
        F2LLMModel.from_pretrained(folder).eval(),
        AutoPeftModelForFeatureExtraction.from_pretrained(folder).eval(),
    ):
        # Of padding, stock Qwen3 makes something.
        assert torch.allclose(hidden(model, batch)[real], expected[real], atol=1e-5)
    with wrapped.disable_adapter():
        assert torch.equal(hidden(wrapped, batch), hidden(F2LLMModel.from_pretrained(whole).eval(), batch))
    own = SentenceTransformer(str(folder), trust_remote_code=True)
    stock = SentenceTransformer(str(folder))
    assert type(own[0].auto_model).__name__ == "F2LLMModel" and type(stock[0].auto_model).__name__ == "Qwen3Model"
    assert own.encode(sentences) == pytest.approx(stock.encode(sentences), abs=1e-5)
    own.disable_adapters()
    unadapted = SentenceTransformer(str(whole), trust_remote_code=True).encode(sentences)
    assert (own.encode(sentences) == unadapted).all()


def test_a_folder_that_peft_saved_is_read(tmp_path, whole, save_adapter, batch):
    model = PeftModel.from_pretrained(F2LLMModel.from_pretrained(whole), str(save_adapter(dora=True)))
    model.save_pretrained(str(tmp_path / "saved"))
    read = load_whole_model(str(tmp_path / "saved")).eval()
    assert torch.allclose(hidden(read, batch), hidden(model.eval(), batch), atol=1e-6)


def test_the_folder_names_its_base_and_does_not_fit_another(whole, save_adapter, tiny_config, refuses):
    folder = save_adapter()
    adapter = find_adapter(str(folder))
    assert adapter == AdapterFolder(str(folder), str(whole), base_revision(str(whole), "the base"))
    assert base_of(str(folder)) == str(whole) and base_of(str(whole)) == str(whole)
    assert find_adapter(str(whole)) is None
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(LORA_TARGETS)
    for key, value, why in (("hidden_size", 16, "size mismatch"), ("num_hidden_layers", 1, "another adapter")):
        fields = {**tiny_config.to_dict(), "layer_types": None, "matryoshka_dimensions": None, key: value}
        with refuses(adapter.name, "does not fit", why, "its own base"):
            attach_adapter(F2LLMModel(F2LLMConfig(**fields)), adapter, trainable=False)


def test_a_base_that_changed_or_is_gone_and_missing_or_other_weights_are_refused(
    whole, save_adapter, tiny_config, refuses
):
    folder, moved = save_adapter(), whole.with_name("moved")
    whole.rename(moved)
    with refuses(folder, whole, "cannot be loaded", "base_model_name_or_path"):
        load_whole_model(str(folder))
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(moved))
    assert has_adapter(load_whole_model(str(folder)))
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(whole))
    F2LLMModel(deepcopy(tiny_config)).save_pretrained(whole)
    with refuses(folder, whole, "has other weights"):
        load_whole_model(str(folder))
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(moved))
    (folder / ADAPTER_WEIGHTS).unlink()
    with refuses(folder, ADAPTER_WEIGHTS):
        load_whole_model(str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    kept = {key: config[key] for key in ("base_model_name_or_path", "target_modules")}
    (folder / "adapter_config.json").write_text(json.dumps({**kept, "peft_type": "IA3", "feedforward_modules": []}))
    with refuses(folder, "IA3", "only LoRA and DoRA"):
        load_whole_model(str(folder))


def test_the_command_merges_an_adapter_into_its_base(whole, save_adapter, sentences, tmp_path, capsys):
    folder, output = save_adapter(), ["--output", str(tmp_path / "merged")]
    for _ in range(2):
        assert main([str(folder), *output]) == 0 and "adapter.json" in capsys.readouterr().out
    merged, adapted = (SentenceTransformer(str(each)).encode(sentences) for each in (tmp_path / "merged", folder))
    assert merged == pytest.approx(adapted, abs=1e-5)
    for words, part in (
        ([str(folder), "--slerp"], f"--slerp: {folder} is an adapter"),
        ([str(folder), str(whole)], "an adapter without a model's weights; merge it into its base first"),
    ):
        assert main([*words, "--output", str(tmp_path / "other")]) == 2 and part in capsys.readouterr().err


def test_a_merged_adapter_names_the_exits_and_the_rank_that_it_was_trained_at(whole, save_adapter, tmp_path):
    model = F2LLMModel.from_pretrained(whole)
    model.factorize_embeddings([8, 16])
    model.config.exit_layers = [1, 2]
    model.save_pretrained(whole)
    folder, found = save_adapter(), {}
    for given in (["auto"], ["1"], None, "unknown"):
        arguments = {} if given == "unknown" else {"exit_layers": given}
        (folder / "training_arguments.json").write_text(json.dumps(arguments))
        output = tmp_path / f"merged-{given}"
        assert main([str(folder), "--output", str(output)]) == 0
        config = F2LLMConfig.from_pretrained(output)
        assert config.embedding_ranks == [16]
        found[str(given)] = config.exit_layers
    assert found == {"['auto']": [1, 2], "['1']": [1, 2], "None": None, "unknown": [1, 2]}


def test_layers_that_are_not_there_and_a_missing_peft_are_named(tiny_model, save_adapter, monkeypatch, refuses):
    with refuses("lora_target_modules", "query_key_value", "q_proj", "down_proj"):
        add_adapter(tiny_model, lora(target_modules=["q_proj", "query_key_value"]))
    assert not has_adapter(tiny_model)
    folder = save_adapter()
    monkeypatch.setitem(sys.modules, "peft", None)
    with refuses("peft", "[train,lora]"):
        load_whole_model(str(folder))


@KINDS
def test_the_plan_counts_what_is_trained(tiny_model, dora):
    config, adapter = deepcopy(tiny_model.config), lora(dora)
    add_adapter(tiny_model, deepcopy(adapter))
    trained = tiny_model.num_parameters(only_trainable=True)
    assert count_adapter(config, adapter) == trained
    one, two = (estimate_memory(config, 1_000, 100, processes=each, adapter=adapter) for each in (1, 2))
    assert one.state == 4 * count_parameters(config) + 16 * trained and two.state == one.state + 4 * trained
