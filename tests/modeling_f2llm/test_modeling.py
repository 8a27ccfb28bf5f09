"""F2LLMModel equals Qwen3Model: the same numbers for every input, without computing a padded token."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from modeling_f2llm import F2LLMConfig, F2LLMModel
from modeling_f2llm.packing import boundary_kwargs, packed_position_ids

LENGTHS = [7, 3, 5, 3, 1]
Batch = dict[str, Tensor]


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within ``tolerance`` of the largest expected number."""
    atol = tolerance * expected.detach().abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def real(hidden: Tensor, batch: Batch) -> Tensor:
    """Zeros at padding, where Qwen3Model leaves numbers that mean nothing."""
    mask = batch.get("attention_mask")
    return hidden if mask is None else hidden * mask[..., None]


def gradients_of(model: nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
    """Gradients of a weighted sum over the real tokens."""
    hidden = real(model(**inputs).last_hidden_state, inputs)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((hidden * weights).sum(), parameters), strict=True))


@pytest.fixture(params=["right", "left", "both", "all-ones", "no-mask", "single", "single-padded", "tokens"])
def batch(request: pytest.FixtureRequest, random_batch: Callable[..., Batch]) -> Batch:
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


@pytest.fixture(params=["right", "left"])
def padded(request: pytest.FixtureRequest, random_batch: Callable[..., Batch]) -> Batch:
    return random_batch(LENGTHS, request.param)


# -- padded batches ----------------------------------------------------------------------------------------------------


def test_last_hidden_state_equals_stock(tiny_model: F2LLMModel, stock_model: Qwen3Model, batch: Batch):
    assert_same(tiny_model(**batch).last_hidden_state, real(stock_model(**batch).last_hidden_state, batch))


def test_padding_comes_out_as_zeros(tiny_model: F2LLMModel, padded: Batch):
    hidden = tiny_model(**padded).last_hidden_state
    assert hidden[padded["attention_mask"] == 0].count_nonzero() == 0
    assert hidden[padded["attention_mask"] == 1].abs().amax(dim=-1).min() > 0


def test_an_empty_row_comes_out_as_zeros(tiny_model: F2LLMModel, random_batch: Callable[..., Batch]):
    batch = random_batch([4, 2, 3])
    without = tiny_model(input_ids=batch["input_ids"][[0, 2]], attention_mask=batch["attention_mask"][[0, 2]])
    batch["attention_mask"][1] = 0
    hidden = tiny_model(**batch).last_hidden_state
    assert hidden[1].count_nonzero() == 0
    assert_same(hidden[[0, 2]], without.last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_other_dtypes_equal_the_integer_mask(tiny_model: F2LLMModel, padded: Batch, dtype: torch.dtype):
    expected = tiny_model(**padded).last_hidden_state
    mask = padded["attention_mask"].to(dtype)
    assert torch.equal(tiny_model(input_ids=padded["input_ids"], attention_mask=mask).last_hidden_state, expected)


def test_gradients_equal_stock(tiny_model: F2LLMModel, stock_model: Qwen3Model, batch: Batch):
    actual, expected = gradients_of(tiny_model, **batch), gradients_of(stock_model, **batch)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_same(actual[name], expected[name])


def test_inputs_embeds_equal_stock(tiny_model: F2LLMModel, stock_model: Qwen3Model, batch: Batch):
    actual, expected = (tiny_model.embed_tokens(batch["input_ids"]).detach().requires_grad_() for _ in range(2))
    others = {name: value for name, value in batch.items() if name != "input_ids"}
    hidden = tiny_model(inputs_embeds=actual, **others).last_hidden_state
    stock_hidden = real(stock_model(inputs_embeds=expected, **others).last_hidden_state, batch)
    assert_same(hidden, stock_hidden)
    for states in (hidden, stock_hidden):
        (states * torch.arange(states.shape[-1])).sum().backward()
    assert_same(actual.grad, expected.grad)


def test_hidden_states_equal_stock(tiny_model: F2LLMModel, stock_model: Qwen3Model, batch: Batch):
    actual = tiny_model(**batch, output_hidden_states=True).hidden_states
    expected = stock_model(**batch, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected) == 3
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same(ours, real(theirs, batch))


def test_hidden_states_can_be_asked_for_in_the_config(tiny_model: F2LLMModel, padded: Batch):
    expected = tiny_model(**padded, output_hidden_states=True).hidden_states
    tiny_model.config.output_hidden_states = True
    for ours, theirs in zip(tiny_model(**padded).hidden_states, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("asked_in", ["call", "config"])
def test_return_dict_false_gives_the_tuple_of_stock(
    tiny_model: F2LLMModel, stock_model: Qwen3Model, batch: Batch, asked_in: str
):
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
def test_given_position_ids_equal_stock(tiny_model: F2LLMModel, stock_model: Qwen3Model, padded: Batch, rows: str):
    batch, width = padded["input_ids"].shape
    position_ids = 3 * torch.arange(width)[None] + 2  # stretched: positions that change the numbers
    if rows == "each-its-own":
        position_ids = position_ids * torch.arange(1, batch + 1)[:, None]
    expected = real(stock_model(**padded, position_ids=position_ids).last_hidden_state, padded)
    assert_same(tiny_model(**padded, position_ids=position_ids).last_hidden_state, expected)
    assert (tiny_model(**padded).last_hidden_state - expected).abs().max() > 0.01


@pytest.mark.parametrize("rows", ["one-for-all", "each-its-own"])
def test_given_position_ids_without_a_mask_equal_stock(
    tiny_model: F2LLMModel, stock_model: Qwen3Model, random_batch: Callable[..., Batch], rows: str
):
    input_ids = random_batch([5, 5])["input_ids"]
    position_ids = torch.tensor([[4, 5, 6, 7, 8], [0, 1, 2, 3, 4]])[: 1 if rows == "one-for-all" else 2]
    expected = stock_model(input_ids=input_ids, position_ids=position_ids).last_hidden_state
    assert_same(tiny_model(input_ids=input_ids, position_ids=position_ids).last_hidden_state, expected)


@pytest.mark.parametrize("position_ids", [[[0, 1, 0, 1, 2]], [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]])
def test_several_packed_rows_equal_stock(
    tiny_model: F2LLMModel,
    stock_model: Qwen3Model,
    random_batch: Callable[..., Batch],
    position_ids: list[list[int]],
):
    inputs = {"input_ids": random_batch([5, 5])["input_ids"], "position_ids": torch.tensor(position_ids)}
    assert_same(tiny_model(**inputs).last_hidden_state, stock_model(**inputs).last_hidden_state)


def test_eager_keeps_texts_apart_whatever_their_positions(
    tiny_model: F2LLMModel, stock_model: Qwen3Model, random_batch: Callable[..., Batch]
):
    batch = random_batch([2, 3, 5], "right")
    left = random_batch([2, 3, 5], "left")
    for name in batch:
        batch[name][1] = left[name][1]
    position_ids = torch.arange(5)[None]  # Qwen3Model's own: the second text begins where the first ends
    tiny_model.set_attn_implementation("eager")
    actual = tiny_model(**batch, position_ids=position_ids).last_hidden_state
    assert_same(actual, real(stock_model(**batch, position_ids=position_ids).last_hidden_state, batch))


def test_no_padded_token_is_computed(tiny_model: F2LLMModel, batch: Batch):
    computed = []
    for layer in tiny_model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: computed.append(inputs[0].shape[:-1].numel()))
    tiny_model(**batch)
    tokens = int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
    assert computed == [tokens] * 2


@pytest.mark.parametrize("implementation", ["packed", "sdpa"])
def test_no_mask_is_built(tiny_model: F2LLMModel, padded: Batch, implementation: str):
    tiny_model.set_attn_implementation(implementation)
    masks = []
    for layer in tiny_model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, inputs, arguments: masks.append(arguments["attention_mask"]), with_kwargs=True
        )
    tiny_model(**padded)
    assert masks == [None, None]


def test_an_embedding_does_not_depend_on_the_rest_of_the_batch(
    tiny_model: F2LLMModel, random_batch: Callable[..., Batch]
):
    lengths = [7, 3, 12, 3, 1, 7, 9]
    batch = random_batch(lengths)
    together = tiny_model(**batch).last_hidden_state
    for row, length in enumerate(lengths):
        alone = tiny_model(input_ids=batch["input_ids"][row : row + 1, :length]).last_hidden_state
        assert_same(together[row, :length], alone[0])


@pytest.mark.parametrize("inputs", [(), ("input_ids", "inputs_embeds")])
def test_exactly_one_input_is_needed(tiny_model: F2LLMModel, inputs: tuple[str, ...]):
    values = {"input_ids": torch.ones(1, 2, dtype=torch.long), "inputs_embeds": torch.ones(1, 2, 32)}
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        tiny_model(**{name: values[name] for name in inputs})


# -- packed batches ----------------------------------------------------------------------------------------------------

PACKED = [3, 1, 4, 4, 2]
MARKS: dict[str, Callable[[], dict]] = {
    "sequence_lengths": lambda: {"sequence_lengths": PACKED},
    "cu_seq_lens": lambda: {"cu_seq_lens_q": torch.tensor([0, *PACKED]).cumsum(0).to(torch.int32)},
    "position_ids": lambda: {"position_ids": packed_position_ids(PACKED)},
    "flash-arguments": lambda: boundary_kwargs(PACKED, torch.device("cpu")),
    "flash-arguments-and-position_ids": lambda: {
        **boundary_kwargs(PACKED, torch.device("cpu")),
        "position_ids": packed_position_ids(PACKED),
    },
}


@pytest.fixture
def flat_ids(random_batch: Callable[..., Batch]) -> Tensor:
    return random_batch([sum(PACKED)], seed=3)["input_ids"]


@pytest.fixture(params=MARKS.values(), ids=MARKS)
def marks(request: pytest.FixtureRequest) -> dict:
    return request.param()


@pytest.mark.parametrize("implementation", ["packed", "sdpa", "eager"])
def test_a_packed_batch_equals_stock_text_by_text(
    tiny_model: F2LLMModel, stock_model: Qwen3Model, flat_ids: Tensor, marks: dict, implementation: str
):
    tiny_model.set_attn_implementation(implementation)
    hidden = tiny_model(input_ids=flat_ids, **marks).last_hidden_state
    assert hidden.shape == (1, sum(PACKED), 32)
    for ids, states in zip(flat_ids[0].split(PACKED), hidden[0].split(PACKED), strict=True):
        assert_same(states, stock_model(input_ids=ids[None]).last_hidden_state[0])


def test_packed_inputs_embeds_equal_packed_ids(tiny_model: F2LLMModel, flat_ids: Tensor, marks: dict):
    embeds = tiny_model.embed_tokens(flat_ids)
    expected = tiny_model(input_ids=flat_ids, **marks).last_hidden_state
    assert torch.equal(tiny_model(inputs_embeds=embeds, **marks).last_hidden_state, expected)


def test_packed_hidden_states_and_tuples_stay_packed(tiny_model: F2LLMModel, flat_ids: Tensor, marks: dict):
    last, states = tiny_model(input_ids=flat_ids, output_hidden_states=True, return_dict=False, **marks)
    assert [layer.shape for layer in states] == [last.shape] * 3
    assert torch.equal(states[-1], last)
    assert torch.equal(last, tiny_model(input_ids=flat_ids, **marks).last_hidden_state)


def test_packed_gradients_equal_padded_gradients(tiny_model: F2LLMModel, random_batch: Callable[..., Batch]):
    batch = random_batch(LENGTHS)
    mask = batch["attention_mask"].bool()
    flat = {"input_ids": batch["input_ids"][mask][None], "sequence_lengths": LENGTHS}
    weights = torch.randn(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(2))
    parameters = list(tiny_model.parameters())
    padded = (tiny_model(**batch).last_hidden_state[mask] * weights).sum()
    packed = (tiny_model(**flat).last_hidden_state[0] * weights).sum()
    for ours, theirs in zip(
        torch.autograd.grad(packed, parameters), torch.autograd.grad(padded, parameters), strict=True
    ):
        assert_same(ours, theirs)


def test_empty_texts_take_no_room_in_a_packed_batch(tiny_model: F2LLMModel, flat_ids: Tensor):
    with_empty = [0, *PACKED[:2], 0, *PACKED[2:], 0]
    assert torch.equal(
        tiny_model(input_ids=flat_ids, sequence_lengths=with_empty).last_hidden_state,
        tiny_model(input_ids=flat_ids, sequence_lengths=PACKED).last_hidden_state,
    )


@pytest.mark.parametrize("position_ids", [[4, 5, 6, 7, 8], [3, 4, 0, 1, 2]])
def test_positions_of_a_single_row_equal_stock(
    tiny_model: F2LLMModel, stock_model: Qwen3Model, random_batch: Callable[..., Batch], position_ids: list[int]
):
    inputs = {"input_ids": random_batch([5])["input_ids"], "position_ids": torch.tensor([position_ids])}
    assert_same(tiny_model(**inputs).last_hidden_state, stock_model(**inputs).last_hidden_state)


def test_a_masked_single_row_is_one_text_whatever_its_positions(
    tiny_model: F2LLMModel, stock_model: Qwen3Model, random_batch: Callable[..., Batch]
):
    inputs = {**random_batch([5]), "position_ids": torch.tensor([[0, 1, 0, 1, 2]])}
    assert_same(tiny_model(**inputs).last_hidden_state, stock_model(**inputs).last_hidden_state)


@pytest.mark.parametrize(
    "boundaries",
    [
        {"sequence_lengths": [2, 4]},
        {"sequence_lengths": [2, 2]},
        {"sequence_lengths": []},
        {"cu_seq_lens_q": torch.tensor([0, 2, 6])},
        {"cu_seq_lens_q": torch.tensor([0, 2, 4])},
    ],
)
def test_boundaries_that_do_not_add_up_are_refused(tiny_model: F2LLMModel, boundaries: dict):
    with pytest.raises(ValueError, match=r"must divide its \(1, 5\) tokens"):
        tiny_model(input_ids=torch.ones(1, 5, dtype=torch.long), **boundaries)


def test_boundaries_of_more_than_one_row_are_refused(tiny_model: F2LLMModel):
    with pytest.raises(ValueError, match=r"shape \(2, 5\)"):
        tiny_model(input_ids=torch.ones(2, 5, dtype=torch.long), sequence_lengths=[5, 5])


@pytest.mark.parametrize(
    "boundaries",
    [{"cu_seq_lens_q": torch.tensor([1, 3, 6])}, {"sequence_lengths": [4, -2, 3]}],
    ids=["not-from-zero", "negative"],
)
def test_boundaries_outside_the_batch_are_refused(tiny_model: F2LLMModel, boundaries: dict):
    with pytest.raises(ValueError, match="a packed batch"):
        tiny_model(input_ids=torch.ones(1, 5, dtype=torch.long), **boundaries)


def test_a_batch_that_is_all_padding_comes_out_as_zeros(tiny_model: F2LLMModel):
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}
    assert tiny_model(**batch).last_hidden_state.count_nonzero() == 0


def test_attention_weights_of_a_packed_batch_come_with_its_hidden_state(tiny_model: F2LLMModel, flat_ids: Tensor):
    tiny_model.set_attn_implementation("eager")
    expected = tiny_model(input_ids=flat_ids, sequence_lengths=PACKED).last_hidden_state
    actual = tiny_model(input_ids=flat_ids, sequence_lengths=PACKED, output_attentions=True).last_hidden_state
    assert_same(actual, expected)


# -- calls that are Qwen3Model's own -----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, None])
@pytest.mark.parametrize("masked", [True, False])
def test_decoding_with_a_cache_equals_stock(
    tiny_model: F2LLMModel,
    stock_model: Qwen3Model,
    random_batch: Callable[..., Batch],
    masked: bool,
    use_cache: bool | None,
):
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
def test_attention_weights_equal_stock(tiny_model: F2LLMModel, stock_model: Qwen3Model, padded: Batch, asked_in: str):
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


def test_a_four_dimensional_mask_equals_stock(
    tiny_model: F2LLMModel, stock_model: Qwen3Model, random_batch: Callable[..., Batch]
):
    input_ids = random_batch([5, 5])["input_ids"]
    allowed = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(4)) > 0.5
    mask = torch.zeros(2, 1, 5, 5).masked_fill(~(allowed.tril() | torch.eye(5, dtype=torch.bool)), -1e9)
    for attention_mask in (mask, {"full_attention": mask}):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        assert_same(tiny_model(**inputs).last_hidden_state, stock_model(**inputs).last_hidden_state)


def test_a_mask_with_holes_equals_stock(
    tiny_model: F2LLMModel, stock_model: Qwen3Model, random_batch: Callable[..., Batch]
):
    batch = random_batch([6, 4])
    batch["attention_mask"][0, 2:4] = 0
    actual, expected = tiny_model(**batch).last_hidden_state, stock_model(**batch).last_hidden_state
    assert_same(real(actual, batch), real(expected, batch))


def test_a_mask_of_another_shape_fails_as_in_stock(
    tiny_model: F2LLMModel, stock_model: Qwen3Model, random_batch: Callable[..., Batch]
):
    batch = random_batch([6, 4])
    for model in (tiny_model, stock_model):
        with pytest.raises(RuntimeError, match="must match"):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"][:, :5])


# -- training and precision --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_gradient_checkpointing_changes_no_gradient(
    tiny_model: F2LLMModel, random_batch: Callable[..., Batch], use_reentrant: bool, form: str
):
    inputs = random_batch(LENGTHS)
    if form == "packed":
        mask = inputs["attention_mask"].bool()
        inputs = {"input_ids": inputs["input_ids"][mask][None], "sequence_lengths": LENGTHS}

    def gradients() -> list[Tensor]:
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


def test_autocast_is_as_close_to_fp32_as_stock(tiny_model: F2LLMModel, stock_model: Qwen3Model, padded: Batch):
    exact = tiny_model(**padded).last_hidden_state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = tiny_model(**padded).last_hidden_state
        stock = real(stock_model(**padded).last_hidden_state, padded)
    assert_same(actual, exact, tolerance=0.02)
    assert (actual - exact).abs().mean() < 1.5 * (stock - exact).abs().mean()


def test_autocast_gradients_are_close_to_fp32(tiny_model: F2LLMModel, padded: Batch):
    expected = gradients_of(tiny_model, **padded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients_of(tiny_model, **padded)
    for name in expected:
        assert actual[name].dtype == torch.float32
        assert_same(actual[name], expected[name], tolerance=0.05)


def test_bf16_weights_are_as_close_to_fp32_as_stock(tiny_model: F2LLMModel, stock_model: Qwen3Model, padded: Batch):
    exact = deepcopy(tiny_model)(**padded).last_hidden_state
    actual = tiny_model.bfloat16()(**padded).last_hidden_state
    stock = real(stock_model.bfloat16()(**padded).last_hidden_state, padded)
    assert actual.dtype == torch.bfloat16
    assert_same(actual.float(), exact, tolerance=0.02)
    assert (actual - exact).abs().mean() < 1.5 * (stock - exact).abs().mean()


# -- attention implementations -----------------------------------------------------------------------------------------

# What was asked for -> what the config says.
AVAILABLE = {None: "packed", "packed": "packed", "sdpa": "packed_sdpa", "packed_sdpa": "packed_sdpa", "eager": "eager"}


@pytest.mark.parametrize("asked", AVAILABLE)
def test_every_available_implementation_equals_stock(
    saved_folder: Path, stock_model: Qwen3Model, padded: Batch, asked: str | None
):
    arguments = {} if asked is None else {"attn_implementation": asked}
    model = F2LLMModel.from_pretrained(saved_folder, **arguments)
    assert model.config._attn_implementation == AVAILABLE[asked]
    assert_same(model(**padded).last_hidden_state, real(stock_model(**padded).last_hidden_state, padded))


@pytest.mark.parametrize("asked", [name for name in AVAILABLE if name])
def test_implementation_can_be_set_after_loading(tiny_model: F2LLMModel, padded: Batch, asked: str):
    expected = tiny_model(**padded).last_hidden_state
    tiny_model.set_attn_implementation(asked)
    assert tiny_model.config._attn_implementation == AVAILABLE[asked]
    assert_same(tiny_model(**padded).last_hidden_state, expected)


@pytest.mark.parametrize("asked", [name for name in AVAILABLE if name])
def test_implementation_can_be_named_in_the_config(tiny_config: F2LLMConfig, asked: str):
    fields = {**tiny_config.to_dict(), "attn_implementation": asked}
    assert F2LLMModel(F2LLMConfig(**fields)).config._attn_implementation == AVAILABLE[asked]


def asking_for(implementation: str, model: F2LLMModel, folder: Path) -> list[Callable[[], object]]:
    """The ways to ask for an implementation."""
    return [
        lambda: F2LLMModel.from_pretrained(folder, attn_implementation=implementation),
        lambda: model.set_attn_implementation(implementation),
        lambda: F2LLMModel(F2LLMConfig(**{**model.config.to_dict(), "attn_implementation": implementation})),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA runs torch's variable-length kernel")
def test_torch_varlen_without_cuda_says_what_to_install(tiny_model: F2LLMModel, saved_folder: Path):
    for ask in asking_for("torch_varlen", tiny_model, saved_folder):
        with pytest.raises(ImportError, match=r"torch_varlen.*torch >= 2\.10.*install a CUDA build of torch"):
            ask()


def test_flash_attention_without_its_package_says_what_to_install(tiny_model: F2LLMModel, saved_folder: Path):
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        for ask in asking_for("flash_attention_2", tiny_model, saved_folder):
            with pytest.raises(ImportError, match=r"flash_attention_2.*pip install \"f2llm\[flash\]\""):
                ask()
    else:
        pytest.skip("flash-attn is installed")


def test_unknown_implementations_are_refused_and_the_own_ones_named(tiny_model: F2LLMModel, saved_folder: Path):
    for ask in asking_for("nonsense", tiny_model, saved_folder):
        with pytest.raises(ValueError, match=r"nonsense.*'packed' \(the default\) and 'torch_varlen'"):
            ask()


# -- loading and saving ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_causal_lm_folder_loads_as_its_encoder(
    tmp_path: Path, tiny_config: F2LLMConfig, random_batch: Callable[..., Batch], tied: bool
):
    names = Qwen3Config().to_dict().keys() & tiny_config.to_dict().keys() - {"architectures"}
    config = Qwen3Config(**{name: tiny_config.to_dict()[name] for name in names} | {"tie_word_embeddings": tied})
    causal = Qwen3ForCausalLM(config).eval()
    assert (causal.lm_head.weight is causal.model.embed_tokens.weight) == tied
    causal.save_pretrained(tmp_path)

    model, report = F2LLMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    expected = causal.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    batch = random_batch(LENGTHS)
    assert_same(model(**batch).last_hidden_state, real(causal.model(**batch).last_hidden_state, batch))


def test_state_dict_is_that_of_stock(tiny_model: F2LLMModel, stock_model: Qwen3Model):
    assert not any(name.startswith("model.") for name in tiny_model.state_dict())
    assert {n: w.shape for n, w in tiny_model.state_dict().items()} == {
        n: w.shape for n, w in stock_model.state_dict().items()
    }
    assert all(torch.equal(weight, tiny_model.state_dict()[n]) for n, weight in stock_model.state_dict().items())


def test_saved_folder_has_the_weights_as_safetensors_and_the_code(saved_folder: Path):
    assert sorted(path.name for path in saved_folder.iterdir()) == [
        "config.json",
        "configuration_f2llm.py",
        "layers.py",
        "model.safetensors",
        "modeling_f2llm.py",
        "packing.py",
    ]


def test_saving_and_loading_changes_nothing(tiny_model: F2LLMModel, saved_folder: Path, padded: Batch):
    loaded = F2LLMModel.from_pretrained(saved_folder)
    assert isinstance(loaded.config, F2LLMConfig)
    assert loaded.config.matryoshka_dimensions == [32, 16, 8]
    assert torch.equal(loaded(**padded).last_hidden_state, tiny_model(**padded).last_hidden_state)


def test_the_chosen_implementation_is_not_saved(saved_folder: Path, tmp_path: Path):
    F2LLMModel.from_pretrained(saved_folder, attn_implementation="eager").save_pretrained(tmp_path)
    assert F2LLMModel.from_pretrained(tmp_path).config._attn_implementation == "packed"
    assert "packed" not in (tmp_path / "config.json").read_text()


def test_stock_runs_on_the_config_of_a_loaded_model(tiny_model: F2LLMModel, saved_folder: Path, padded: Batch):
    # The config carries the name of the packed implementation along: it must work in Qwen3Model, mask and all.
    stock = Qwen3Model.from_pretrained(saved_folder, config=tiny_model.config).eval()
    expected = tiny_model(**padded).last_hidden_state
    assert_same(real(stock(**padded).last_hidden_state, padded), expected)


def test_a_copy_of_the_model_is_the_model(tiny_model: F2LLMModel, padded: Batch):
    copy = deepcopy(tiny_model)
    assert torch.equal(copy(**padded).last_hidden_state, tiny_model(**padded).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("stock", "Qwen3Model"),
        ("remote", "F2LLMModel"),
        ("resaved_stock", "Qwen3Model"),
        ("resaved_remote", "F2LLMModel"),
    ],
)
def test_folder_loads_without_the_package(
    tiny_model: F2LLMModel, loaded_elsewhere, token_batch: Batch, name: str, class_name: str
):
    arrays, facts = loaded_elsewhere
    assert facts[f"{name}_class"] == class_name
    assert facts[f"{name}_package"] == ("transformers" if class_name == "Qwen3Model" else "transformers_modules")
    assert facts[f"{name}_is_padding_zero"] == (class_name == "F2LLMModel")
    with torch.no_grad():
        expected = tiny_model(**token_batch).last_hidden_state
    np.testing.assert_allclose(arrays[f"{name}_hidden"], expected.numpy(), rtol=0, atol=1e-5 * expected.abs().max())


def test_resaving_remote_code_keeps_the_code(loaded_elsewhere, saved_folder: Path):
    assert loaded_elsewhere.facts["config_class"] == "F2LLMConfig"
    assert loaded_elsewhere.facts["resaved_files"] == sorted(path.name for path in saved_folder.iterdir())


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def on_cuda(model: nn.Module, batch: Batch, implementation: str) -> tuple[nn.Module, Batch]:
    model = deepcopy(model)
    model.set_attn_implementation(implementation)
    return model.cuda(), {name: tensor.cuda() for name, tensor in batch.items()}


@pytest.mark.gpu
def test_cuda_chooses_a_kernel_that_equals_stock_in_fp32(
    tiny_model: F2LLMModel, stock_model: Qwen3Model, padded: Batch
):
    model, inputs = on_cuda(tiny_model, padded, "packed")
    expected = real(stock_model(**padded).last_hidden_state, padded)
    assert_same(model(**inputs).last_hidden_state.cpu(), expected, tolerance=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["packed", "torch_varlen"])
def test_cuda_bf16_kernel_equals_sdpa(tiny_model: F2LLMModel, random_batch: Callable[..., Batch], implementation: str):
    results = []
    for name in (implementation, "sdpa"):
        model, inputs = on_cuda(tiny_model.bfloat16(), random_batch([70, 3, 33, 3, 1]), name)
        hidden = model(**inputs).last_hidden_state
        hidden.float().square().sum().backward()
        results.append([hidden.float(), *(parameter.grad.float() for parameter in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert_same(ours, theirs, tolerance=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["packed", "torch_varlen", "sdpa"])
def test_cuda_autocast_is_close_to_fp32(
    tiny_model: F2LLMModel, random_batch: Callable[..., Batch], implementation: str
):
    batch = random_batch([70, 3, 33, 3, 1])
    expected = gradients_of(tiny_model, **batch)
    exact = tiny_model(**batch).last_hidden_state
    model, inputs = on_cuda(tiny_model, batch, implementation)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        hidden = model(**inputs).last_hidden_state
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).cuda()
        loss = (real(hidden, inputs) * weights).sum()
    assert_same(hidden.float().cpu(), exact, tolerance=0.03)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert_same(parameter.grad.cpu(), expected[name], tolerance=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["packed", "torch_varlen"])
def test_cuda_sliding_windows_equal_sdpa(
    tiny_model: F2LLMModel, tiny_config: F2LLMConfig, random_batch: Callable[..., Batch], implementation: str
):
    fields = {**tiny_config.to_dict(), "layer_types": None, "max_window_layers": 1}
    config = F2LLMConfig(**fields | {"use_sliding_window": True, "sliding_window": 5})
    sliding = F2LLMModel(config).eval().bfloat16()
    sliding.load_state_dict(tiny_model.state_dict())
    batch = random_batch([70, 3, 33])
    outputs = []
    for name in (implementation, "sdpa"):
        model, inputs = on_cuda(sliding, batch, name)
        outputs.append(model(**inputs).last_hidden_state.float())
    assert_same(*outputs, tolerance=0.03)
