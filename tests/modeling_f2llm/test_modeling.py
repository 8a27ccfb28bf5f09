"""F2LLMModel equals Qwen3Model: the same numbers for every input, without computing a padded token."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import Qwen3Model

from modeling_f2llm import F2LLMModel
from tests.modeling_f2llm.comparing import LENGTHS, assert_same, gradients_of, real


@pytest.fixture(params=["right", "left", "both", "all-ones", "no-mask", "single", "single-padded", "tokens"])
def batch(request, random_batch):
    if request.param in ("right", "left", "both"):
        return random_batch(LENGTHS, request.param)
    if request.param == "single":
        return random_batch([6])
    if request.param == "single-padded":
        return {name: rows[1:2] for name, rows in random_batch(LENGTHS, "left").items()}
    if request.param == "tokens":
        return random_batch([1, 1, 1])
    batch = random_batch([5, 5, 5])
    return batch if request.param == "all-ones" else {"input_ids": batch["input_ids"]}


def test_last_hidden_state_equals_stock(tiny_model, stock_model, batch):
    actual = tiny_model(**batch).last_hidden_state
    assert_same(actual, real(stock_model(**batch).last_hidden_state, batch))
    if "attention_mask" in batch:
        mask = batch["attention_mask"]
        assert actual[mask == 0].count_nonzero() == 0 and actual[mask == 1].abs().amax(dim=-1).min() > 0
        for dtype in (torch.bool, torch.float32):
            masked = tiny_model(input_ids=batch["input_ids"], attention_mask=mask.to(dtype))
            assert torch.equal(masked.last_hidden_state, actual)


def test_an_empty_row_comes_out_as_zeros(tiny_model, random_batch):
    batch = random_batch([4, 2, 3])
    without = tiny_model(input_ids=batch["input_ids"][[0, 2]], attention_mask=batch["attention_mask"][[0, 2]])
    batch["attention_mask"][1] = 0
    hidden = tiny_model(**batch).last_hidden_state
    assert hidden[1].count_nonzero() == 0
    assert_same(hidden[[0, 2]], without.last_hidden_state)


def test_gradients_equal_stock(tiny_model, stock_model, batch):
    actual, expected = gradients_of(tiny_model, **batch), gradients_of(stock_model, **batch)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_same(actual[name], expected[name])


def test_inputs_embeds_equal_stock(tiny_model, stock_model, batch):
    actual, expected = (tiny_model.embed_tokens(batch["input_ids"]).detach().requires_grad_() for _ in range(2))
    others = {name: value for name, value in batch.items() if name != "input_ids"}
    hidden = tiny_model(inputs_embeds=actual, **others).last_hidden_state
    stock_hidden = real(stock_model(inputs_embeds=expected, **others).last_hidden_state, batch)
    assert_same(hidden, stock_hidden)
    for states in (hidden, stock_hidden):
        (states * torch.arange(states.shape[-1])).sum().backward()
    assert_same(actual.grad, expected.grad)


def test_hidden_states_equal_stock(tiny_model, stock_model, batch):
    actual = tiny_model(**batch, output_hidden_states=True).hidden_states
    expected = stock_model(**batch, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected) == 3
    tiny_model.config.output_hidden_states = True
    assert torch.equal(tiny_model(**batch).hidden_states[1], actual[1])
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same(ours, real(theirs, batch))


def test_exits_equal_models_of_fewer_layers(tiny_model, saved_folder, batch):
    first, whole = tiny_model(**batch, exit_layers=[1, 2]).hidden_states
    assert torch.equal(whole, tiny_model(**batch).last_hidden_state)
    models = F2LLMModel.from_pretrained(saved_folder, num_hidden_layers=1), F2LLMModel(tiny_model.config, False, 1)
    models[1].load_state_dict(tiny_model.state_dict(), strict=False)
    for model in models:
        assert_same(model.eval()(**batch).last_hidden_state, first)
        assert (model.config.num_hidden_layers, model.config.layer_types) == (1, ["full_attention"])
    stock = Qwen3Model.from_pretrained(saved_folder, num_hidden_layers=1).eval()
    assert_same(real(stock(**batch).last_hidden_state, batch), first)
    assert tiny_model.config.num_hidden_layers == 2


def test_factors_of_token_embeddings_are_saved_with_their_product(tiny_model, tmp_path, random_batch):
    batch, weight = random_batch(LENGTHS), tiny_model.embed_tokens.weight.detach().clone()
    whole = tiny_model(**batch).last_hidden_state
    tiny_model.factorize_embeddings([32, 8])
    assert_same(tiny_model(**batch).last_hidden_state, whole)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    tiny_model.embed_tokens.rank = 8
    assert_same(tiny_model.embed_tokens.weight, u[:, :8] * s[:8] @ vt[:8])
    low = tiny_model(**batch).last_hidden_state
    tiny_model.embed_tokens.rank = 32
    tiny_model.save_pretrained(tmp_path)
    assert_same(real(Qwen3Model.from_pretrained(tmp_path).eval()(**batch).last_hidden_state, batch), whole)
    loaded = F2LLMModel.from_pretrained(tmp_path, embedding_rank=8).eval()
    assert torch.equal(loaded(**batch).last_hidden_state, low) and loaded.config.embedding_ranks == [8, 32]
    loaded = F2LLMModel.from_pretrained(tmp_path).eval()
    loaded.factorize_embeddings(None)
    assert_same(loaded(**batch).last_hidden_state, whole)
    assert not {"exit_layers", "embedding_ranks"} & loaded.config.to_dict().keys()
    with pytest.raises(ValueError, match="embedding_rank of 33 from 1 to 32"):
        F2LLMModel.from_pretrained(tmp_path, embedding_rank=33)
    with pytest.raises(ValueError, match="have no factors"):
        F2LLMModel(loaded.config, embedding_rank=8)
    for wrong in ([], [0, 8], [33]):
        with pytest.raises(ValueError, match="between 1 and 32"):
            loaded.factorize_embeddings(wrong)


@pytest.mark.parametrize("layers", [0, 3])
def test_layers_that_a_model_lacks_are_refused(saved_folder, layers):
    with pytest.raises(ValueError, match=f"between 1 and the model's 2, got {layers}"):
        F2LLMModel.from_pretrained(saved_folder, num_hidden_layers=layers)


@pytest.mark.parametrize("asked_in", ["call", "config"])
def test_return_dict_false_gives_the_tuple_of_stock(tiny_model, stock_model, batch, asked_in):
    arguments = {"return_dict": False} if asked_in == "call" else {}
    for model in (tiny_model, stock_model):
        model.config.return_dict = asked_in == "call"
    actual = tiny_model(**batch, output_hidden_states=True, **arguments)
    expected = stock_model(**batch, output_hidden_states=True, **arguments)
    assert type(actual) is type(expected) is tuple
    assert len(actual) == len(expected) == 2
    assert_same(actual[0], real(expected[0], batch))
    assert_same(actual[1][-1], real(expected[1][-1], batch))


@pytest.mark.parametrize("rows", ["one-for-all", "each-its-own"])
def test_given_position_ids_equal_stock(tiny_model, stock_model, padded, rows):
    batch, width = padded["input_ids"].shape
    position_ids = 3 * torch.arange(width)[None] + 2  # stretched: positions that change the numbers
    if rows == "each-its-own":
        position_ids = position_ids * torch.arange(1, batch + 1)[:, None]
    expected = real(stock_model(**padded, position_ids=position_ids).last_hidden_state, padded)
    assert_same(tiny_model(**padded, position_ids=position_ids).last_hidden_state, expected)
    assert (tiny_model(**padded).last_hidden_state - expected).abs().max() > 0.01


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("positions", [[4, 5, 6, 7, 8], [3, 4, 0, 1, 2], [0, 1, 0, 1, 2]])
def test_given_position_ids_without_padding_equal_stock(tiny_model, stock_model, random_batch, rows, positions):
    batch = random_batch([5] * rows)
    for position_ids in ([positions], [positions, [0, 1, 2, 0, 1]][:rows]):
        inputs = {"input_ids": batch["input_ids"], "position_ids": torch.tensor(position_ids)}
        assert_same(tiny_model(**inputs).last_hidden_state, stock_model(**inputs).last_hidden_state)
    # With a mask a row is one text, at any positions.
    inputs = {**batch, "position_ids": torch.tensor([positions])}
    assert_same(tiny_model(**inputs).last_hidden_state, stock_model(**inputs).last_hidden_state)


def test_eager_keeps_texts_apart_whatever_their_positions(tiny_model, stock_model, random_batch):
    batch = random_batch([2, 3, 5], "right")
    left = random_batch([2, 3, 5], "left")
    for name in batch:
        batch[name][1] = left[name][1]
    position_ids = torch.arange(5)[None]  # Qwen3Model's own: the second text begins where the first ends
    tiny_model.set_attn_implementation("eager")
    actual = tiny_model(**batch, position_ids=position_ids).last_hidden_state
    assert_same(actual, real(stock_model(**batch, position_ids=position_ids).last_hidden_state, batch))


def test_no_padded_token_is_computed(tiny_model, batch):
    computed = []
    for layer in tiny_model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: computed.append(inputs[0].shape[:-1].numel()))
    tiny_model(**batch)
    tokens = int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
    assert computed == [tokens] * 2


@pytest.mark.parametrize("implementation", ["packed", "sdpa"])
def test_no_mask_is_built(tiny_model, padded, implementation):
    tiny_model.set_attn_implementation(implementation)
    masks = []
    for layer in tiny_model.layers:
        layer.register_forward_pre_hook(
            lambda module, inputs, arguments: masks.append(arguments["attention_mask"]), with_kwargs=True
        )
    tiny_model(**padded)
    assert masks == [None, None]


def test_an_embedding_does_not_depend_on_the_rest_of_the_batch(tiny_model, random_batch):
    lengths = [7, 3, 12, 3, 1, 7, 9]
    batch = random_batch(lengths)
    together = tiny_model(**batch).last_hidden_state
    for row, length in enumerate(lengths):
        alone = tiny_model(input_ids=batch["input_ids"][row : row + 1, :length]).last_hidden_state
        assert_same(together[row, :length], alone[0])


@pytest.mark.parametrize("inputs", [(), ("input_ids", "inputs_embeds")])
def test_exactly_one_input_is_needed(tiny_model, inputs):
    values = {"input_ids": torch.ones(1, 2, dtype=torch.long), "inputs_embeds": torch.ones(1, 2, 32)}
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        tiny_model(**{name: values[name] for name in inputs})


@pytest.mark.parametrize("use_cache", [True, None])
@pytest.mark.parametrize("masked", [True, False])
def test_decoding_with_a_cache_equals_stock(tiny_model, stock_model, random_batch, masked, use_cache):
    batch = random_batch([5, 3 if masked else 5], "left")
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1) if masked else None
    outputs = []
    for model in (tiny_model, stock_model):
        prompt = model(**batch, use_cache=True)
        cache = prompt.past_key_values
        assert cache.get_seq_length() == 5
        next_ids = torch.tensor([[8], [9]])
        step = model(input_ids=next_ids, attention_mask=mask, past_key_values=cache, use_cache=use_cache)
        assert cache.get_seq_length() == 6
        outputs.append((real(prompt.last_hidden_state, batch), step.last_hidden_state))
    for ours, theirs in zip(*outputs, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("asked_in", ["call", "config"])
def test_attention_weights_equal_stock(tiny_model, stock_model, padded, asked_in):
    outputs = []
    for model in (tiny_model, stock_model):
        model.set_attn_implementation("eager")
        model.config.output_attentions = asked_in == "config"
        outputs.append(model(**padded, **({"output_attentions": True} if asked_in == "call" else {})))
    actual, expected = outputs
    assert_same(real(actual.last_hidden_state, padded), real(expected.last_hidden_state, padded))
    assert len(actual.attentions) == 2
    for ours, theirs in zip(actual.attentions, expected.attentions, strict=True):
        assert_same(ours, theirs)


def test_masks_with_holes_and_of_four_dimensions_equal_stock(tiny_model, stock_model, random_batch):
    input_ids = random_batch([5, 5])["input_ids"]
    allowed = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(4)) > 0.5
    mask = torch.zeros(2, 1, 5, 5).masked_fill(~(allowed.tril() | torch.eye(5, dtype=torch.bool)), -1e9)
    for attention_mask in (mask, {"full_attention": mask}):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        assert_same(tiny_model(**inputs).last_hidden_state, stock_model(**inputs).last_hidden_state)
    batch = random_batch([6, 4])
    batch["attention_mask"][0, 2:4] = 0
    actual, expected = tiny_model(**batch).last_hidden_state, stock_model(**batch).last_hidden_state
    assert_same(real(actual, batch), real(expected, batch))


def test_the_end_token_is_learnt_even_if_it_is_the_padding(tiny_config, tmp_path):
    config = deepcopy(tiny_config)
    config.pad_token_id = config.eos_token_id
    new = F2LLMModel(config)
    new.save_pretrained(tmp_path)
    assert new.embed_tokens.weight[config.eos_token_id].count_nonzero() > 0
    for model in (new, F2LLMModel.from_pretrained(tmp_path)):
        ids, mask = torch.tensor([[5, 6, 1], [7, 1, 1]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        assert model.embed_tokens.weight.grad[config.eos_token_id].count_nonzero() > 0


def test_a_new_model_can_end_texts_with_the_token_that_it_pads_with(tiny_model):
    """Qwen3-Embedding's tokenizer does so; its EOS is another token."""
    end = tiny_model.config.pad_token_id
    assert end != tiny_model.config.eos_token_id
    assert tiny_model.embed_tokens.weight[end].norm() > 0.5 * tiny_model.embed_tokens.weight.norm(dim=1).mean()
    tiny_model(input_ids=torch.tensor([[5, 6, end]])).last_hidden_state[0, -1, 0].backward()
    gradients = tiny_model.embed_tokens.weight.grad.norm(dim=1)
    # Of zeros it would be ten thousand times the others'.
    assert 0 < gradients[end] < 100 * gradients[5]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_gradient_checkpointing_changes_no_gradient(tiny_model, random_batch, use_reentrant, form):
    inputs = random_batch(LENGTHS)
    if form == "packed":
        mask = inputs["attention_mask"].bool()
        inputs = {"input_ids": inputs["input_ids"][mask][None], "sequence_lengths": LENGTHS}

    def gradients():
        tiny_model.zero_grad()
        tiny_model(**inputs).last_hidden_state.square().sum().backward()
        return [parameter.grad.clone() for parameter in tiny_model.parameters()]

    tiny_model.train()
    expected = gradients()
    tiny_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    runs = []
    tiny_model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert_same(ours, theirs)
    assert len(runs) == 2  # forward, and again in backward


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bf16_is_as_close_to_fp32_as_stock(tiny_model, stock_model, padded, weights):
    exact = tiny_model(**padded).last_hidden_state
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
        actual = deepcopy(tiny_model).to(weights)(**padded).last_hidden_state
        stock = real(stock_model.to(weights)(**padded).last_hidden_state, padded)
    assert weights == torch.float32 or actual.dtype == torch.bfloat16
    assert_same(actual.float(), exact, tolerance=0.02)
    assert (actual - exact).abs().mean() < 1.5 * (stock - exact).abs().mean()


def test_autocast_gradients_are_close_to_fp32(tiny_model, padded):
    expected = gradients_of(tiny_model, **padded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients_of(tiny_model, **padded)
    for name in expected:
        assert actual[name].dtype == torch.float32
        assert_same(actual[name], expected[name], tolerance=0.05)
