"""How the tests of the model compare it with stock Qwen3Model."""

from __future__ import annotations

import torch
from torch import Tensor

Batch = dict[str, Tensor]

# Tokens of the texts of most batches.
LENGTHS = [7, 3, 5, 3, 1]


def assert_same(actual, expected, tolerance=1e-5):
    """Equal within ``tolerance`` of the largest expected number."""
    atol = tolerance * expected.detach().abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def real(hidden, batch):
    """Zeros at padding, where Qwen3Model leaves numbers that mean nothing."""
    mask = batch.get("attention_mask")
    return hidden if mask is None else hidden * mask[..., None]


def gradients_of(model, **inputs):
    """Gradients of a weighted sum over the real tokens."""
    hidden = real(model(**inputs).last_hidden_state, inputs)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((hidden * weights).sum(), parameters), strict=True))
