"""Batches that come packed: the numbers of stock Qwen3Model, text by text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Model

from modeling_f2llm import F2LLMModel
from modeling_f2llm.packing import boundary_kwargs, packed_position_ids
from tests.modeling_f2llm.comparing import LENGTHS, Batch, assert_same

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


def test_packed_hidden_states_and_tuples_stay_packed(tiny_model: F2LLMModel, flat_ids: Tensor, marks: dict):
    last, states = tiny_model(input_ids=flat_ids, output_hidden_states=True, return_dict=False, **marks)
    assert [layer.shape for layer in states] == [last.shape] * 3
    embeds = tiny_model.embed_tokens(flat_ids)
    assert torch.equal(tiny_model(inputs_embeds=embeds, **marks).last_hidden_state, last)
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


@pytest.mark.parametrize("position_ids", [[4, 5, 6, 7, 8], [3, 4, 0, 1, 2], [0, 1, 0, 1, 2]])
def test_positions_of_a_single_row_equal_stock(
    tiny_model: F2LLMModel, stock_model: Qwen3Model, random_batch: Callable[..., Batch], position_ids: list[int]
):
    inputs = {"input_ids": random_batch([5])["input_ids"], "position_ids": torch.tensor([position_ids])}
    assert_same(tiny_model(**inputs).last_hidden_state, stock_model(**inputs).last_hidden_state)
    # With a mask the row is one text, at any positions.
    inputs["attention_mask"] = torch.ones(1, 5, dtype=torch.long)
    assert_same(tiny_model(**inputs).last_hidden_state, stock_model(**inputs).last_hidden_state)


@pytest.mark.parametrize(
    ("rows", "boundaries", "message"),
    [
        (1, {"sequence_lengths": [2, 4]}, r"must divide its \(1, 5\) tokens"),
        (1, {"sequence_lengths": [2, 2]}, r"must divide its \(1, 5\) tokens"),
        (1, {"sequence_lengths": []}, r"must divide its \(1, 5\) tokens"),
        (1, {"cu_seq_lens_q": torch.tensor([0, 2, 6])}, r"must divide its \(1, 5\) tokens"),
        (1, {"cu_seq_lens_q": torch.tensor([0, 2, 4])}, r"must divide its \(1, 5\) tokens"),
        (1, {"cu_seq_lens_q": torch.tensor([1, 3, 6])}, "a packed batch"),
        (1, {"sequence_lengths": [4, -2, 3]}, "a packed batch"),
        (2, {"sequence_lengths": [5, 5]}, r"shape \(2, 5\)"),
    ],
)
def test_faulty_boundaries_are_refused(tiny_model: F2LLMModel, rows: int, boundaries: dict, message: str):
    with pytest.raises(ValueError, match=message):
        tiny_model(input_ids=torch.ones(rows, 5, dtype=torch.long), **boundaries)


def test_a_batch_that_is_all_padding_comes_out_as_from_qwen3(tiny_model: F2LLMModel):
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}
    stock = Qwen3Model._from_config(tiny_model.config, attn_implementation="sdpa").eval()
    stock.load_state_dict(tiny_model.state_dict())
    actual = tiny_model(**batch).last_hidden_state
    assert actual.isfinite().all()
    assert_same(actual, stock(**batch).last_hidden_state)


def test_attention_weights_of_a_packed_batch_come_with_its_hidden_state(tiny_model: F2LLMModel, flat_ids: Tensor):
    tiny_model.set_attn_implementation("eager")
    expected = tiny_model(input_ids=flat_ids, sequence_lengths=PACKED).last_hidden_state
    actual = tiny_model(input_ids=flat_ids, sequence_lengths=PACKED, output_attentions=True).last_hidden_state
    assert_same(actual, expected)
