"""Packing: what goes in comes out, in its place, and attention never looks past the end of a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import Qwen3Model

from modeling_f2llm import F2LLMConfig, F2LLMModel
from modeling_f2llm.packing import (
    BOUNDARY_NAMES,
    PaddedLayout,
    _torch_varlen,
    boundary_kwargs,
    packed_position_ids,
    sequence_lengths_of,
)

CPU = torch.device("cpu")
MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 1, 1, 1]],
    "both-sides": [[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1]],
    "full": [[1, 1, 1], [1, 1, 1]],
    "single-row": [[1, 1, 0]],
    "single-full-row": [[1, 1, 1]],
    "empty-row": [[1, 1, 0], [0, 0, 0], [0, 1, 1]],
    "all-empty": [[0, 0], [0, 0]],
    "width-one": [[1], [0], [1]],
}


@pytest.fixture(params=MASKS.values(), ids=MASKS)
def mask(request: pytest.FixtureRequest) -> Tensor:
    return torch.tensor(request.param)


@pytest.fixture
def layout(mask: Tensor) -> PaddedLayout:
    return PaddedLayout.from_mask(mask)


def texts_of(values: Tensor, mask: Tensor) -> list[list[float]]:
    return [row[real.bool()].tolist() for row, real in zip(values, mask, strict=True)]


def test_packing_keeps_every_text_whole_shortest_first(layout: PaddedLayout, mask: Tensor):
    values = torch.arange(mask.numel()).view(mask.shape)
    packed = layout.pack(values)
    assert packed.shape == (1, int(mask.sum()))
    expected = sorted(texts_of(values, mask), key=len)
    assert layout.lengths == [len(text) for text in expected]
    assert [text.tolist() for text in packed[0].split(layout.lengths)] == expected
    assert layout.position_ids.tolist() == [[position for length in layout.lengths for position in range(length)]]


@pytest.mark.parametrize("shape", [(), (6,), (2, 3)])
def test_unpacking_undoes_packing_and_leaves_zeros_at_padding(layout: PaddedLayout, mask: Tensor, shape: tuple):
    values = torch.randn(*mask.shape, *shape)
    expected = values * mask.view(*mask.shape, *[1] * len(shape))
    assert torch.equal(layout.unpack(layout.pack(values)), expected)
    packed = torch.randn(1, int(mask.sum()), *shape)
    assert torch.equal(layout.pack(layout.unpack(packed)), packed)


def test_gradients_reach_real_tokens_only(layout: PaddedLayout, mask: Tensor):
    values = torch.randn(*mask.shape, 6, requires_grad=True)
    layout.unpack(3 * layout.pack(values)).sum().backward()
    assert torch.equal(values.grad, 3.0 * mask[..., None].expand_as(values))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_of_any_dtype_gives_the_same_layout(mask: Tensor, dtype: torch.dtype):
    values = torch.arange(mask.numel()).view(mask.shape)
    layout, other = PaddedLayout.from_mask(mask), PaddedLayout.from_mask(mask.to(dtype))
    assert other.lengths == layout.lengths
    assert torch.equal(other.pack(values), layout.pack(values))


@pytest.mark.parametrize("holes", [[[1, 0, 1], [1, 1, 1]], [[1, 1, 0, 0], [0, 1, 0, 1]], [[1, 0, 0, 0, 1]]])
def test_padding_between_real_tokens_has_no_layout(holes: list[list[int]]):
    assert PaddedLayout.from_mask(torch.tensor(holes)) is None


def test_a_full_mask_needs_no_index():
    layout = PaddedLayout.from_mask(torch.ones(3, 4))
    other = PaddedLayout.without_padding(3, 4, CPU)
    assert layout.index is other.index is None
    assert (layout.shape, layout.lengths) == (other.shape, other.lengths) == ((3, 4), [4, 4, 4])
    assert torch.equal(layout.position_ids, other.position_ids)


@pytest.mark.parametrize("lengths", [[3, 1, 4], [2], [1, 1, 1], [0, 2, 0, 3], []])
def test_boundaries_are_those_of_the_flash_kernels(lengths: list[int]):
    boundaries = boundary_kwargs(lengths, CPU)
    assert set(boundaries) == set(BOUNDARY_NAMES)
    assert boundaries["sequence_lengths"] == lengths
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert boundaries[name].dtype == torch.int32
        assert boundaries[name][0] == 0
        assert boundaries[name].diff().tolist() == lengths
    assert boundaries["max_length_q"] == boundaries["max_length_k"] == max(lengths, default=0)


@pytest.mark.parametrize("lengths", [[3, 1, 4], [2], [1, 1, 1], [7, 7]])
def test_lengths_are_read_back_from_positions(lengths: list[int]):
    positions = packed_position_ids(lengths)
    assert positions.tolist() == [[position for length in lengths for position in range(length)]]
    assert sequence_lengths_of(positions) == lengths
    # Positions may begin anywhere.
    assert sequence_lengths_of(torch.tensor([[5, 6, 2, 3, 4, 9]])) == [2, 3, 1]


class AttentionCalls(TorchFunctionMode):
    """Counts the calls of torch's scaled_dot_product_attention and the sequences in each."""

    def __init__(self) -> None:
        super().__init__()
        self.sequences: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is scaled_dot_product_attention:
            self.sequences.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def attention_calls(model: F2LLMModel) -> Iterator[list[int]]:
    """The number of sequences in each attention call of one layer."""
    calls = AttentionCalls()
    per_layer: list[int] = []
    with torch.no_grad(), calls:
        yield per_layer
    layers = model.config.num_hidden_layers
    per_layer.extend(calls.sequences[: len(calls.sequences) // layers])
    assert calls.sequences == per_layer * layers


@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_texts_of_equal_length_share_an_attention_call(tiny_model: F2LLMModel, random_batch, side: str):
    with attention_calls(tiny_model) as sequences:
        tiny_model(**random_batch([5, 3, 5, 3, 2, 5], side))
    assert sequences == [1, 2, 3]
    with attention_calls(tiny_model) as sequences:
        tiny_model(input_ids=random_batch([4, 4, 4])["input_ids"])
    assert sequences == [3]


def test_a_packed_batch_keeps_the_order_of_the_caller(tiny_model: F2LLMModel, random_batch):
    input_ids = random_batch([13])["input_ids"]
    with attention_calls(tiny_model) as sequences:
        tiny_model(input_ids=input_ids, sequence_lengths=[2, 2, 3, 2, 4])
    assert sequences == [2, 1, 1, 1]


@pytest.mark.parametrize("window", [1, 3, 6, 50])
@pytest.mark.parametrize("implementation", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_sliding_window_layers_equal_stock(
    tiny_model: F2LLMModel, tiny_config: F2LLMConfig, random_batch, window: int, implementation: str, side: str
):
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
def test_torchs_kernel_takes_the_arguments_it_is_given(window: int | None):
    # Without a GPU only the call can be checked: tensors without data have shapes.
    query, key = torch.empty(7, 4, 8, device="meta"), torch.empty(7, 2, 8, device="meta")
    options = {**boundary_kwargs([3, 4], CPU), "sliding_window": window, "scaling": 8**-0.5, "dropout": 0.0}
    assert _torch_varlen(query, key, key.clone(), options).shape == query.shape
