"""Packing: what goes in comes out, in its place, and attention never looks past the end of a text."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import Qwen3Model

from modeling_f2llm import F2LLMConfig, F2LLMModel
from modeling_f2llm.packing import (
    BOUNDARY_NAMES,
    _torch_varlen,
    boundary_kwargs,
    packed_position_ids,
)
from tests.modeling_f2llm.comparing import assert_same

CPU = torch.device("cpu")


@pytest.mark.parametrize("lengths", [[3, 1, 4], [2], [1, 1, 1], [0, 2, 0, 3], []])
def test_boundaries_are_those_of_the_flash_kernels(lengths):
    boundaries = boundary_kwargs(lengths, CPU)
    assert set(boundaries) == set(BOUNDARY_NAMES)
    assert boundaries["sequence_lengths"] == lengths
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert boundaries[name].dtype == torch.int32
        assert boundaries[name][0] == 0
        assert boundaries[name].diff().tolist() == lengths
    assert boundaries["max_length_q"] == boundaries["max_length_k"] == max(lengths, default=0)


class AttentionCalls(TorchFunctionMode):
    """Counts the sequences in each call of torch's scaled_dot_product_attention."""

    def __init__(self):
        super().__init__()
        self.sequences = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is scaled_dot_product_attention:
            self.sequences.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("side", ["right", "left", "both"])
@torch.no_grad()
def test_texts_of_equal_length_share_an_attention_call(tiny_model, random_batch, side):
    # A packed batch keeps the order of the caller.
    packed = {"input_ids": random_batch([13])["input_ids"], "sequence_lengths": [2, 2, 3, 2, 4]}
    for inputs, expected in [
        (random_batch([5, 3, 5, 3, 2, 5], side), [1, 2, 3]),
        ({"input_ids": random_batch([4, 4, 4])["input_ids"]}, [3]),
        (packed, [2, 1, 1, 1]),
    ]:
        with AttentionCalls() as calls:
            tiny_model(**inputs)
        assert calls.sequences == expected * 2  # layers


@pytest.mark.parametrize("window", [1, 3, 6, 50])
@pytest.mark.parametrize("implementation", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_sliding_window_layers_equal_stock(tiny_model, tiny_config, random_batch, window, implementation, side):
    fields = deepcopy(tiny_config).to_dict() | {"layer_types": None, "max_window_layers": 1}
    config = F2LLMConfig(**fields | {"use_sliding_window": True, "sliding_window": window})
    assert config.layer_types == ["full_attention", "sliding_attention"]
    model, stock = F2LLMModel(deepcopy(config)).eval(), Qwen3Model(deepcopy(config)).eval()
    for each in (model, stock):
        each.load_state_dict(tiny_model.state_dict())
    model.set_attn_implementation(implementation)

    batch = random_batch([9, 4, 6, 4, 1], side)
    with torch.no_grad():
        expected = stock(**batch).last_hidden_state * batch["attention_mask"][..., None]
        torch.testing.assert_close(model(**batch).last_hidden_state, expected, rtol=0, atol=1e-5 * expected.abs().max())
        if window < 9:  # the window shows
            unbounded = tiny_model(**batch).last_hidden_state
            assert (unbounded - expected).abs().max() > 0.01


@pytest.mark.parametrize("window", [None, 3])
def test_torchs_kernel_takes_the_arguments_it_is_given(window):
    # Without a GPU only the call can be checked: tensors without data have shapes.
    query, key = torch.empty(7, 4, 8, device="meta"), torch.empty(7, 2, 8, device="meta")
    options = {**boundary_kwargs([3, 4], CPU), "sliding_window": window, "scaling": 8**-0.5, "dropout": 0.0}
    assert _torch_varlen(query, key, key.clone(), options).shape == query.shape


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
def flat_ids(random_batch):
    return random_batch([sum(PACKED)], seed=3)["input_ids"]


@pytest.fixture(params=MARKS.values(), ids=MARKS)
def marks(request):
    return request.param()


@pytest.mark.parametrize("implementation", ["packed", "sdpa", "eager"])
def test_a_packed_batch_equals_stock_text_by_text(tiny_model, stock_model, flat_ids, marks, implementation):
    tiny_model.set_attn_implementation(implementation)
    hidden = tiny_model(input_ids=flat_ids, **marks).last_hidden_state
    assert hidden.shape == (1, sum(PACKED), 32)
    for ids, states in zip(flat_ids[0].split(PACKED), hidden[0].split(PACKED), strict=True):
        assert_same(states, stock_model(input_ids=ids[None]).last_hidden_state[0])


def test_packed_hidden_states_and_tuples_stay_packed(tiny_model, flat_ids, marks):
    last, states = tiny_model(input_ids=flat_ids, output_hidden_states=True, return_dict=False, **marks)
    assert [layer.shape for layer in states] == [last.shape] * 3
    embeds = tiny_model.embed_tokens(flat_ids)
    assert torch.equal(tiny_model(inputs_embeds=embeds, **marks).last_hidden_state, last)
    assert torch.equal(states[-1], last)
    assert torch.equal(last, tiny_model(input_ids=flat_ids, **marks).last_hidden_state)


def test_empty_texts_take_no_room_in_a_packed_batch(tiny_model, flat_ids):
    with_empty = [0, *PACKED[:2], 0, *PACKED[2:], 0]
    assert torch.equal(
        tiny_model(input_ids=flat_ids, sequence_lengths=with_empty).last_hidden_state,
        tiny_model(input_ids=flat_ids, sequence_lengths=PACKED).last_hidden_state,
    )


@pytest.mark.parametrize("position_ids", [[4, 5, 6, 7, 8], [3, 4, 0, 1, 2], [0, 1, 0, 1, 2]])
def test_positions_of_a_single_row_equal_stock(tiny_model, stock_model, random_batch, position_ids):
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
def test_faulty_boundaries_are_refused(tiny_model, rows, boundaries, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(input_ids=torch.ones(rows, 5, dtype=torch.long), **boundaries)


def test_a_batch_that_is_all_padding_comes_out_as_from_qwen3(tiny_model):
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}
    stock = Qwen3Model._from_config(tiny_model.config, attn_implementation="sdpa").eval()
    stock.load_state_dict(tiny_model.state_dict())
    actual = tiny_model(**batch).last_hidden_state
    assert actual.isfinite().all()
    assert_same(actual, stock(**batch).last_hidden_state)


def test_attention_weights_of_a_packed_batch_come_with_its_hidden_state(tiny_model, flat_ids):
    tiny_model.set_attn_implementation("eager")
    expected = tiny_model(input_ids=flat_ids, sequence_lengths=PACKED).last_hidden_state
    actual = tiny_model(input_ids=flat_ids, sequence_lengths=PACKED, output_attentions=True).last_hidden_state
    assert_same(actual, expected)
