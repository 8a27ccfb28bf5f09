"""What the tests of pruning share: a model of three layers and its importance."""

from __future__ import annotations

import pytest
import torch

from tests.training.pruning.pruned_models import make_model
from training.pruning.importance import calibrate


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(scope="session")
def batches():
    """Two packed batches of 61 tokens in seven texts."""
    generator = torch.Generator().manual_seed(0)
    lengths = [[9, 1, 13], [5, 17, 2, 14]]
    return [(torch.randint(2, 320, (1, sum(each)), generator=generator), each) for each in lengths]


@pytest.fixture(scope="session")
def importance(batches):
    return calibrate(make_model(), batches, "the model of the tests")


@pytest.fixture(scope="session")
def embed_packed(batches):
    """``(61, d)`` what a model puts out for all tokens of both batches."""

    @torch.no_grad()
    def embed(model):
        hidden = [model(input_ids=ids, sequence_lengths=each).last_hidden_state for ids, each in batches]
        return torch.cat(hidden, dim=1)[0]

    return embed
