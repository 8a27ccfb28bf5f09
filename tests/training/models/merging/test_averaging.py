from __future__ import annotations

import math

import pytest
import torch

from training.models.merging.averaging import angle, slerp, weighted_mean


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_mean_is_that_of_numpy_in_fp64():
    tensors = [_random(7, 5, seed=seed) for seed in range(4)]
    weights = [0.1, 0.2, 0.3, 0.4]
    expected = sum(weight * tensor.double() for weight, tensor in zip(weights, tensors, strict=True))
    torch.testing.assert_close(weighted_mean(tensors, weights), expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_mean_of_equal_tensors_is_that_tensor_bit_for_bit(count):
    tensor = _random(100, 100)
    assert torch.equal(weighted_mean([tensor] * count, [1 / count] * count), tensor)


def test_the_mean_leaves_its_inputs_alone_and_is_fp32():
    tensors = [_random(3, seed=seed).bfloat16() for seed in range(2)]
    before = [tensor.clone() for tensor in tensors]
    assert weighted_mean(tensors, [0.5, 0.5]).dtype == torch.float32
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


def test_the_mean_of_bf16_is_rounded_once():
    # In bf16, 256 + 1 is 256 and the mean of the three would come out as 256.
    tensors = [torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 258.0, 264.0)]
    assert weighted_mean(tensors, [1 / 3] * 3).bfloat16().item() == torch.tensor(778 / 3).bfloat16().item()


def test_slerp_goes_along_the_circle():
    start, end = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for t in (0.0, 0.25, 0.5, 1.0):
        expected = torch.tensor([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)])
        torch.testing.assert_close(slerp(start, end, t), expected)


def test_slerp_keeps_the_norm_and_divides_the_angle():
    start, end = (torch.nn.functional.normalize(_random(9, 6, seed=seed).flatten(), dim=0) for seed in (0, 1))
    between = slerp(start, end, 0.3)
    assert between.norm().item() == pytest.approx(1, abs=1e-6)
    assert angle(start, between) == pytest.approx(0.3 * angle(start, end), abs=1e-6)


def test_slerp_of_nearly_equal_tensors_is_their_mean():
    start = _random(50)
    end = start * (1 + 1e-6)
    torch.testing.assert_close(slerp(start, end, 0.5), (start + end) / 2)
    assert torch.equal(slerp(start, start, 0.3), start)
    assert torch.equal(slerp(torch.zeros(3), torch.ones(3), 0.5), torch.full((3,), 0.5))


def test_slerp_of_opposite_tensors_does_not_exist():
    with pytest.raises(ValueError, match="opposite"):
        slerp(_random(5), -_random(5), 0.5)


def test_the_angle_of_large_tensors_is_summed_in_fp64():
    start = _random(3_000_000)
    end = start + 0.01 * _random(3_000_000, seed=1)
    expected = torch.nn.functional.cosine_similarity(start.double(), end.double(), dim=0).acos().item()
    assert angle(start, end) == pytest.approx(expected, rel=1e-7)
