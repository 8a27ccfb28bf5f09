"""Averages of tensors: the weighted mean, and the way along a great circle."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Numbers of a tensor that are held in fp64 at a time.
_CHUNK = 1 << 20
# Below this angle, in radians, slerp and the straight line differ by less than fp32 rounds.
_PARALLEL = 1e-3


def weighted_mean(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean, in fp32.

    Updated tensor by tensor, ``m += w_i / (w_1 + … + w_i) · (x_i - m)`` (West, 1979, "Updating mean and variance
    estimates: an improved method"): the mean of equal tensors is that tensor, to the bit.

    Args:
        tensors: Of one shape, in any floating-point dtype; one at a time is held.
        weights: As many numbers, none negative.

    Returns:
        fp32, of the same shape.
    """
    remaining = iter(tensors)
    mean = next(remaining).to(torch.float32, copy=True)
    total = weights[0]
    for tensor, weight in zip(remaining, weights[1:], strict=True):
        total += weight
        mean.lerp_(tensor.float(), weight / total)
    return mean


def angle(start: Tensor, end: Tensor) -> float:
    """The angle between two tensors taken as vectors, in radians; 0 if one of them is zero.

    Products are summed in fp64: in fp32 the angle of a large tensor's small change would be lost.
    """
    product = squares_of_start = squares_of_end = 0.0
    for one, other in zip(start.flatten().split(_CHUNK), end.flatten().split(_CHUNK), strict=True):
        one, other = one.double(), other.double()
        product += float(one @ other)
        squares_of_start += float(one @ one)
        squares_of_end += float(other @ other)
    norms = math.sqrt(squares_of_start) * math.sqrt(squares_of_end)
    return math.acos(max(-1.0, min(1.0, product / norms))) if norms else 0.0


def slerp(start: Tensor, end: Tensor, t: float) -> Tensor:
    """Spherical linear interpolation, in fp32: the point at ``t`` of the great circle from one tensor to another.

    ``sin((1 - t) θ) / sin θ · start + sin(t θ) / sin θ · end``, with ``θ`` the angle between them (Shoemake, 1985,
    "Animating rotation with quaternion curves"). Tensors of equal norm keep it, where a mean is shorter. Where the
    angle vanishes this is the straight line, its limit.

    Args:
        start: In any floating-point dtype; a vector, whatever its shape.
        end: Of the same shape.
        t: From 0 to 1.

    Returns:
        fp32, of the same shape.

    Raises:
        ValueError: If the tensors point in opposite directions: every great circle through one goes through the other.
    """
    theta = angle(start, end)
    if math.pi - theta < _PARALLEL:
        raise ValueError("they point in opposite directions, between which there is no one way")
    if theta < _PARALLEL:
        return weighted_mean([start, end], [1 - t, t])
    of_start, of_end = math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
    return (start.float() * of_start).add_(end.float(), alpha=of_end)
