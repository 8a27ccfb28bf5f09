"""Packing: what goes in comes out, in its place, and attention never looks past the end of a text."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import Qwen3Model

from modeling_f2llm import F2LLMConfig, F2LLMModel, modeling_f2llm
from modeling_f2llm.packing import (
    BOUNDARY_NAMES,
    FewShapes,
    boundary_kwargs,
    packed_position_ids,
    rounded_up,
)
from tests.modeling_f2llm.comparing import LENGTHS, assert_same

CPU = torch.device("cpu")


@pytest.mark.parametrize("lengths", [[3, 1, 4], [2], [1, 1, 1], [0, 2, 0, 3], []])
def test_boundaries_are_those_of_the_flash_kernels(lengths):
    boundaries = boundary_kwargs(lengths, CPU)
    assert set(boundaries) == set(BOUNDARY_NAMES)
    assert boundaries["sequence_lengths"] == lengths
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert boundaries[name].dtype == torch.int32
        assert boundaries[name][0] == 0
        # An empty text has no boundaries of its own; a batch without tokens is one empty text.
        assert boundaries[name].diff().tolist() == ([length for length in lengths if length] or [0])
    assert boundaries["max_length_q"] == boundaries["max_length_k"] == max(lengths, default=0)


class AttentionCalls(TorchFunctionMode):
    """Counts the sequences in each call of torch's scaled_dot_product_attention, and the shapes of linear layers."""

    def __init__(self):
        super().__init__()
        self.sequences, self.shapes, self.linear = [], set(), set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is scaled_dot_product_attention:
            self.sequences.append(args[0].shape[0])
            self.shapes.add(args[0].shape)
        if func is linear:
            self.linear.add(args[0].shape)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fields", [{}, {"use_sliding_window": True, "sliding_window": 3, "layer_types": None}])
@pytest.mark.parametrize("lengths", [[9, 1, 40, 17, 17, 0, 18, 2], [1, 1, 1], [33]])
def test_calls_of_few_shapes_change_no_number(tiny_config, monkeypatch, fields, lengths):
    torch.manual_seed(0)
    model = F2LLMModel(F2LLMConfig(**{**tiny_config.to_dict(), "max_window_layers": 1, **fields}))
    ids, found = torch.randint(3, 320, (1, sum(lengths))), []
    weights = torch.randn(1, sum(lengths), model.config.hidden_size)
    for few in (False, True):
        monkeypatch.setattr(modeling_f2llm, "compiles_each_shape", lambda device, few=few: few)
        outputs = model(input_ids=ids, sequence_lengths=lengths, output_hidden_states=True)
        gradients = torch.autograd.grad((outputs.last_hidden_state * weights).sum(), list(model.parameters()))
        found.append([*outputs.hidden_states, *gradients])
    for ours, expected in zip(*found, strict=True):
        assert_same(ours, expected)


@pytest.mark.parametrize("return_dict", [True, False])
@torch.no_grad()
def test_calls_of_few_shapes_take_padded_batches(tiny_model, random_batch, monkeypatch, return_dict):
    batch = {**random_batch([11, 2, 20], "left"), "return_dict": return_dict}
    expected = tiny_model(**batch)[0]
    monkeypatch.setattr(modeling_f2llm, "compiles_each_shape", lambda device: True)
    assert_same(tiny_model(**batch)[0], expected)


@torch.no_grad()
def test_batches_of_any_lengths_have_few_shapes(tiny_model, monkeypatch):
    monkeypatch.setattr(modeling_f2llm, "compiles_each_shape", lambda device: True)
    generator = torch.Generator().manual_seed(2)
    with AttentionCalls() as calls:
        for _ in range(20):
            lengths = torch.randint(60, 120, (30,), generator=generator).tolist()
            tiny_model(input_ids=torch.ones(1, sum(lengths), dtype=torch.long), sequence_lengths=lengths)
    assert {width for _, _, width, _ in calls.shapes} == {64, 80, 96, 112, 128}
    # Powers of two of texts; the tokens of a batch are between 2,560 and 3,072 in steps of 256.
    assert len(calls.shapes) <= 5 * 4 and len({shape[1] for shape in calls.linear}) <= 3


@pytest.mark.parametrize(("number", "rounded"), [(1, 1), (8, 8), (9, 10), (64, 64), (65, 80), (81, 96), (1000, 1024)])
def test_rounding_keeps_three_binary_digits(number, rounded):
    assert rounded_up(number, 3) == rounded


def test_calls_of_few_shapes_read_every_token_of_a_text_once():
    few = FewShapes.of([3, 0, 9, 3, 3], 20, CPU)
    assert few.runs == [(2, 3), (1, 3), (1, 10)]
    read = torch.cat(few.index)[few.back]
    assert read.tolist() == [*range(18), 0, 0]


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


PACKED = [3, 1, 4, 4, 2]
MARKS: dict[str, Callable[[], dict]] = {
    "sequence_lengths": lambda: {"sequence_lengths": PACKED},
    "cu_seq_lens": lambda: {"cu_seq_lens_q": torch.tensor([0, *PACKED]).cumsum(0).to(torch.int32)},
    "position_ids": lambda: {"position_ids": packed_position_ids(PACKED)},
    "flash-arguments": lambda: boundary_kwargs(PACKED, CPU),
    "both": lambda: {**boundary_kwargs(PACKED, CPU), "position_ids": packed_position_ids(PACKED)},
    "with-empty-texts": lambda: {"sequence_lengths": [0, *PACKED[:2], 0, *PACKED[2:], 0]},
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
    for options in [{}, {"output_attentions": True}] if implementation == "eager" else [{}]:
        hidden = tiny_model(input_ids=flat_ids, **options, **marks).last_hidden_state
        assert hidden.shape == (1, sum(PACKED), 32)
        for ids, states in zip(flat_ids[0].split(PACKED), hidden[0].split(PACKED), strict=True):
            assert_same(states, stock_model(input_ids=ids[None]).last_hidden_state[0])


def test_packed_gradients_equal_padded_gradients(tiny_model, random_batch):
    batch = random_batch(LENGTHS)
    mask = batch["attention_mask"].bool()
    packed = tiny_model(input_ids=batch["input_ids"][mask][None], sequence_lengths=LENGTHS).last_hidden_state[0]
    padded = tiny_model(**batch).last_hidden_state[mask]
    weights = torch.randn(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(2))
    parameters = list(tiny_model.parameters())
    gradients = [torch.autograd.grad((states * weights).sum(), parameters) for states in (packed, padded)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_same(ours, theirs)


def test_packed_hidden_states_and_tuples_stay_packed(tiny_model, flat_ids, marks):
    last, states = tiny_model(input_ids=flat_ids, output_hidden_states=True, return_dict=False, **marks)
    assert [layer.shape for layer in states] == [last.shape] * 3
    embeds = tiny_model.embed_tokens(flat_ids)
    assert torch.equal(tiny_model(inputs_embeds=embeds, **marks).last_hidden_state, last)
    assert torch.equal(states[-1], last)
    assert torch.equal(last, tiny_model(input_ids=flat_ids, **marks).last_hidden_state)


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


def test_a_batch_that_is_all_padding_comes_out_as_from_qwen3(tiny_model, stock_model):
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}
    actual = tiny_model(**batch).last_hidden_state
    assert actual.isfinite().all()
    assert_same(actual, stock_model(**batch).last_hidden_state)
