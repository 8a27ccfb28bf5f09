"""The layers equal Qwen3's, compiled or not; compilation happens once for all layers and lengths, and is not saved."""

from __future__ import annotations

import json
import pickle
from copy import deepcopy
from functools import partial

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch._dynamo.utils import counters
from transformers import AutoModel, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from modeling_f2llm import F2LLMConfig, F2LLMModel
from modeling_f2llm.layers import F2LLMDecoderLayer, F2LLMRMSNorm
from tests.modeling_f2llm.comparing import assert_same

BATCHES = ([3, 5, 7], [4, 4, 9, 30], [11])
HALVES = 2  # what a layer does before and after attention


def packed(lengths, vocab_size=64):
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(2, vocab_size, (1, sum(lengths)), generator=generator)
    return {"input_ids": ids, "sequence_lengths": lengths}


def run(model, inputs):
    """Hidden states and the gradients of a weighted sum over them."""
    hidden = model(**inputs).last_hidden_state
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    return [hidden, *torch.autograd.grad((hidden * weights).sum(), list(model.parameters()))]


def tiny_config_of_width(width):
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    return F2LLMConfig(vocab_size=64, hidden_size=width, intermediate_size=16, num_hidden_layers=2, **heads)


def run_last(model, inputs):
    return run(model, {**inputs, "last_token_only": True})


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "modeling_f2llm.layers"]


@pytest.fixture
def graphs(request, monkeypatch):
    """Counts what was compiled. All but one test leave out the C++ compiler, which takes seconds for each function."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=getattr(request, "param", "eager")))
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.fixture
def compiled(tiny_model, graphs):
    model = F2LLMModel._from_config(deepcopy(tiny_model.config), compile=True)
    model.load_state_dict(tiny_model.state_dict())
    return model.train(tiny_model.training)


# -- norm --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_the_norm_in_bf16_is_as_exact_as_stock(weights):
    norms = [F2LLMRMSNorm(128), Qwen3RMSNorm(128), Qwen3RMSNorm(128)]
    scale = torch.linspace(-2, 2, 128).bfloat16().float()
    states = torch.randn(50, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    for norm in norms:
        norm.weight.data = scale.to(weights)
    exact = norms[2].float()(states.float())
    ours, stock = norms[0](states), norms[1](states)
    assert ours.dtype == stock.dtype
    assert (ours.float() - exact).abs().mean() <= 1.001 * (stock.float() - exact).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_rotary_embedding_have_the_gradients_of_stock(tiny_model, stock_model, dtype):
    ids = packed([9, 4])["input_ids"]
    gradients = []
    for model, boundaries in ((tiny_model, {"sequence_lengths": [13]}), (stock_model, {})):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            gradients.append(run(model, {"input_ids": ids, **boundaries}))
    assert len(gradients[0]) > 20
    for ours, theirs in zip(*gradients, strict=True):
        assert_same(ours, theirs, 1e-5 if dtype == torch.float32 else 0.05)


def test_a_frozen_norm_passes_its_gradient_on(tiny_model):
    states, norm = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), tiny_model.norm
    found = []
    for frozen in (False, True):
        norm.weight.requires_grad_(not frozen)
        states = states.detach().requires_grad_()
        found.append(torch.autograd.grad(norm(states).square().sum(), states)[0])
    assert torch.equal(*found) and norm.weight.grad is None


def per_text_gradients(model, ids):
    """``(texts, …)`` gradient of every parameter, of each text alone, by torch.func."""

    def loss(parameters, text):
        return torch.func.functional_call(model, parameters, (text,)).last_hidden_state.pow(3).sum()

    parameters = {name: weight.detach() for name, weight in model.named_parameters()}
    return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, ids[:, None]).values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_torch_func_takes_the_model_as_it_takes_stock(tiny_model, stock_model, dtype):
    ids = packed([12])["input_ids"].view(3, 4)
    gradients = [per_text_gradients(model.to(dtype), ids) for model in (tiny_model, stock_model)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_same(ours, theirs, 1e-5 if dtype == torch.float32 else 0.05)


def second_derivative(model):
    states = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0), dtype=model.dtype).requires_grad_()
    hidden = model(inputs_embeds=states, **({"sequence_lengths": [5]} if isinstance(model, F2LLMModel) else {}))
    [first] = torch.autograd.grad(hidden.last_hidden_state.pow(3).sum(), states, create_graph=True)
    return torch.autograd.grad(first.square().sum(), [states, *model.parameters()], allow_unused=True)


def test_second_derivatives_are_those_of_stock(tiny_model, stock_model):
    for model in (tiny_model, stock_model):
        model.set_attn_implementation("eager")
    found = [[each for each in second_derivative(model) if each is not None] for model in (tiny_model, stock_model)]
    for ours, theirs in zip(*found, strict=True):
        assert_same(ours, theirs, 1e-4)


def test_attention_that_has_no_second_derivative_says_so(tiny_model, monkeypatch):
    monkeypatch.setattr("modeling_f2llm.attention._MOST_SHORT_TOKENS", 256)
    with pytest.raises(RuntimeError, match="attn_implementation='eager'"):
        second_derivative(tiny_model.bfloat16())


# -- last tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[1], [1, 1], [1, 2, 2, 5, 9], [9]], ids=str)
@pytest.mark.parametrize("window", [None, 3])
def test_the_last_layer_gives_the_same_of_last_tokens_alone(tiny_config, lengths, window):
    config = deepcopy(tiny_config)
    if window:
        config.use_sliding_window, config.sliding_window = True, window
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    model, batch = F2LLMModel(config), packed(lengths)
    ends = torch.tensor(lengths).cumsum(0) - 1
    parameters = list(model.parameters())
    for implementation in ("packed", "eager") if window is None else ("packed",):
        model.set_attn_implementation(implementation)
        whole = model(**batch, exit_layers=[1, 2]).hidden_states
        last = model(**batch, exit_layers=[1, 2], last_token_only=True)
        assert torch.equal(last.last_hidden_state, last.hidden_states[1])
        for all_tokens, ours in zip(whole, last.hidden_states, strict=True):
            assert_same(ours, all_tokens[:, ends])
            gradients = [
                torch.autograd.grad(states.pow(3).sum(), parameters, retain_graph=True, materialize_grads=True)
                for states in (ours, all_tokens[:, ends])
            ]
            for each in zip(*gradients, strict=True):
                assert_same(*each, tolerance=1e-4)


@pytest.mark.parametrize("implementation", ["packed", "eager"])
def test_all_outputs_are_of_last_tokens(tiny_model, implementation):
    tiny_model.set_attn_implementation(implementation)
    whole = tiny_model(**packed([3, 5]), output_hidden_states=True)
    last, hidden_states = tiny_model(
        **packed([3, 5]), output_hidden_states=True, return_dict=False, last_token_only=True
    )
    assert_same(last, whole.last_hidden_state[:, [2, 7]])
    for ours, theirs in zip(hidden_states, whole.hidden_states, strict=True):
        assert_same(ours, theirs[:, [2, 7]])


@pytest.mark.parametrize("taken_out", [0, 1])
def test_a_model_that_lacks_a_layer_gives_the_same_of_last_tokens(tiny_model, taken_out):
    del tiny_model.layers[taken_out]
    whole, last = (tiny_model(**packed([3, 5]), last_token_only=each).last_hidden_state for each in (False, True))
    assert_same(last, whole[:, [2, 7]])


def test_the_last_layer_computes_nothing_else(tiny_model):
    seen = {}
    for name in ("self_attn.k_proj", "self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        tiny_model.layers[1].get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output.shape[1]})
        )
    assert tiny_model(**packed([4, 4, 9, 30]), last_token_only=True).last_hidden_state.shape == (1, 4, 32)
    assert seen == {"self_attn.k_proj": 47, "self_attn.q_proj": 4, "self_attn.o_proj": 4, "mlp.down_proj": 4}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, "takes a packed batch: give sequence_lengths"),
        (packed([0, 3]), "a text without tokens has no last token"),
    ],
)
def test_last_tokens_need_packed_texts_with_tokens(tiny_model, call, message):
    with pytest.raises(ValueError, match=f"^last_token_only:? {message}$"):
        tiny_model(**call, last_token_only=True)


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", ["inductor"], indirect=True)
def test_the_compiler_changes_no_number(tiny_model, compiled, graphs):
    for lengths in BATCHES:
        for take in (run, run_last):
            for actual, expected in zip(
                take(compiled, packed(lengths)), take(tiny_model, packed(lengths)), strict=True
            ):
                assert_same(actual, expected)
    # Of last tokens, what the last layer does before attention; both halves once more for a single text.
    assert graphs() == HALVES + 1 + HALVES


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_each_mode_compiles_once(tiny_model, compiled, graphs):
    def assert_compiled(times, tolerance=1e-5):
        for lengths in BATCHES:
            actual, expected = compiled(**packed(lengths)), tiny_model(**packed(lengths))
            assert_same(actual.last_hidden_state, expected.last_hidden_state, tolerance)
        assert graphs() == HALVES * times

    assert_compiled(1)
    compiled.train()
    assert_compiled(1)
    with torch.no_grad():
        assert_compiled(2)
    with torch.inference_mode():
        assert_compiled(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_compiled(4, tolerance=0.02)
    with torch.no_grad():
        assert_compiled(4)
    compiled.gradient_checkpointing_enable()
    assert_compiled(4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tiny_model, compiled, use_reentrant):
    compiled.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    runs = []
    compiled.layers[0].register_forward_hook(lambda *_: runs.append(1))
    for model in (tiny_model, compiled):
        hidden = model(**packed([3, 5, 7])).last_hidden_state
        (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    for actual, expected in zip(compiled.parameters(), tiny_model.parameters(), strict=True):
        assert_same(actual.grad, expected.grad)
    assert runs == [1]  # as a module, so that hooks of a wrapper run


@torch._dynamo.config.patch(recompile_limit=2)
def test_models_of_one_process_do_not_use_up_each_others_compilations(graphs, caplog):
    for models in range(1, 5):
        config = tiny_config_of_width(8 * models)
        compiled, plain = (F2LLMModel._from_config(deepcopy(config), compile=each).eval() for each in (True, False))
        plain.load_state_dict(compiled.state_dict())
        actual, expected = compiled(**packed([3, 5])), plain(**packed([3, 5]))
        assert_same(actual.last_hidden_state, expected.last_hidden_state)
        assert graphs() == HALVES * models
    assert not messages(caplog)


@torch._dynamo.config.patch(recompile_limit=1)
def test_a_model_that_torch_compiles_no_further_is_told_of_once(tiny_model, compiled, graphs, caplog):
    expected = tiny_model(**packed([3, 5])).last_hidden_state
    assert_same(compiled(**packed([3, 5])).last_hidden_state, expected)
    assert not messages(caplog)
    for _ in range(2):
        with torch.no_grad():
            assert_same(compiled(**packed([3, 5])).last_hidden_state, expected)
    assert graphs() == HALVES
    [told] = messages(caplog)
    assert "run uncompiled" in told and "recompile_limit (1)" in told
    # Another model is compiled all the same, and so is a copy.
    for other in (deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        before = graphs()
        assert_same(other(**packed([3, 5])).last_hidden_state, expected)
        assert graphs() == before + HALVES


@pytest.mark.parametrize("arguments", [{"use_cache": True}, {"output_attentions": True}])
def test_calls_that_do_not_run_packed_equal_stock(compiled, stock_model, graphs, random_batch, arguments):
    compiled.set_attn_implementation("eager")
    stock_model.set_attn_implementation("eager")
    batch = random_batch([5, 3])
    actual, expected = compiled(**batch, **arguments), stock_model(**batch, **arguments)
    assert_same(actual.last_hidden_state, expected.last_hidden_state)
    assert len(actual.attentions or ()) == len(expected.attentions or ())
    assert graphs() == 0


def test_replaced_projections_are_used(compiled, tiny_model):
    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, states):
            return 2 * self.inner(states)

    compiled(**packed([3, 5]))
    for model in (compiled, tiny_model):
        for layer in model.layers:
            layer.self_attn.v_proj, layer.mlp.up_proj = Doubled(layer.self_attn.v_proj), Doubled(layer.mlp.up_proj)
    for actual, expected in zip(run(compiled, packed([3, 5])), run(tiny_model, packed([3, 5])), strict=True):
        assert_same(actual, expected)


def test_a_machine_without_a_compiler_is_told_what_to_do(compiled, monkeypatch):
    def broken(graph, inputs):
        raise FileNotFoundError("no g++")

    monkeypatch.setattr(torch, "compile", partial(torch.compile.func, backend=broken))
    with pytest.raises(
        RuntimeError, match=r"(?s)compile=True failed: .*apt install g\+\+.*leave compile out.*no g\+\+"
    ):
        compiled(**packed([3, 5]))


# -- loading and saving ------------------------------------------------------------------------------------------------


def test_compilation_is_off_by_default_and_not_saved(saved_folder, tiny_config, tmp_path):
    assert all(layer.compiled for layer in F2LLMModel(deepcopy(tiny_config), compile=True).layers)
    model = F2LLMModel.from_pretrained(saved_folder, compile=True)
    assert all(type(layer) is F2LLMDecoderLayer and layer.compiled for layer in model.layers)
    model.save_pretrained(tmp_path)
    assert "compile" not in json.loads((tmp_path / "config.json").read_text())
    assert not any(layer.compiled for layer in F2LLMModel.from_pretrained(tmp_path).layers)
    assert type(AutoModel.from_pretrained(tmp_path)) is Qwen3Model
    # The layer that must not be split is in the tree.
    assert set(model._no_split_modules) == {type(layer).__name__ for layer in model.layers}


def test_remote_code_compiles_too(released_folder, sentences, graphs):
    embeddings = []
    for compile in (False, True):
        model = SentenceTransformer(
            str(released_folder), device="cpu", trust_remote_code=True, model_kwargs={"compile": compile}
        )
        embeddings.append(torch.from_numpy(model.encode(sentences)))
        assert graphs() == HALVES * compile
    assert type(model[0].auto_model).__module__.startswith("transformers_modules")
    assert_same(*embeddings)
