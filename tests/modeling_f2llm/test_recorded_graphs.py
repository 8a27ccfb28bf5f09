"""Graphs of the whole model, as compilers and exporters record them, hold for texts of other lengths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.modeling_f2llm.comparing import assert_same, real

# What is recorded is one of these, what is then computed all of them.
LENGTHS = {"equal": [5, 5], "unequal": [7, 3, 5, 3, 1], "one token": [1], "others": [9, 30, 4]}
Encode = Callable[[Tensor, Tensor], Tensor]


class HiddenStates(torch.nn.Module):
    """A model whose inputs and output are tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def traced(model, batch):
    return torch.jit.trace(model, tuple(batch.values()), check_trace=False)


def exported(model, batch):
    dynamic = {0: torch.export.Dim("texts"), 1: torch.export.Dim("width")}
    shapes = dict.fromkeys(batch, dynamic)
    return torch.export.export(model, tuple(batch.values()), dynamic_shapes=shapes, strict=False).module()


def in_one_graph(model, batch):
    return torch.compile(model, backend="eager", fullgraph=True, dynamic=True)


def in_place(model, batch):
    model.model.compile(backend="eager")
    return model


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("example", ["equal", "unequal"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("record", [traced, exported, in_one_graph, in_place])
@torch.no_grad()
def test_a_graph_is_right_for_every_length(record, side, example, tiny_model, stock_model, random_batch):
    encode = record(HiddenStates(tiny_model), random_batch(LENGTHS[example], side))
    for lengths in LENGTHS.values():
        batch = random_batch(lengths, side)
        assert_same(real(encode(*batch.values()), batch), real(stock_model(**batch).last_hidden_state, batch))


def test_a_compiled_model_has_the_gradients_of_stock(tiny_model, stock_model, random_batch):
    batch = random_batch(LENGTHS["unequal"])
    weights = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(1)) * batch["attention_mask"][..., None]
    gradients = []
    for model in (torch.compile(tiny_model, backend="aot_eager"), stock_model):
        hidden = model(**batch).last_hidden_state
        gradients.append(torch.autograd.grad((hidden * weights).sum(), list(model.parameters())))
    for ours, stock in zip(*gradients, strict=True):
        assert_same(ours, stock)


def test_a_model_with_compiled_layers_is_exported_as_stock(tiny_model, stock_model, random_batch):
    for layer in tiny_model.layers:
        layer.compiled = True
    encode = exported(HiddenStates(tiny_model), random_batch(LENGTHS["unequal"]))
    batch = random_batch(LENGTHS["others"])
    assert_same(real(encode(*batch.values()), batch), real(stock_model(**batch).last_hidden_state, batch))


def test_the_boundaries_of_a_packed_batch_are_not_traced(tiny_model):
    class Packed(torch.nn.Module):
        def forward(self, input_ids, ends):
            return tiny_model(input_ids=input_ids, cu_seq_lens_q=ends).last_hidden_state

    with pytest.raises(ValueError, match="trace a padded batch instead"):
        torch.jit.trace(Packed(), (torch.tensor([[5, 6, 1, 7, 1]]), torch.tensor([0, 3, 5])), check_trace=False)
