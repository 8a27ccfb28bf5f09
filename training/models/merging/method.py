"""How models are averaged: what the user asked for, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from training.common.errors import UserError
from training.models.merging.averaging import slerp, weighted_mean


@dataclass(frozen=True)
class Method:
    """A way to average.

    Attributes:
        name: ``mean`` or ``slerp``.
        shares: What each parent counts, summing to 1; for slerp ``1 - t`` and ``t``.
    """

    name: str
    shares: tuple[float, ...]

    def average(self, tensors: Iterable[Tensor]) -> Tensor:
        """The average of the parents' tensors, in fp32.

        Raises:
            ValueError: If it does not exist.
        """
        if self.name == "slerp":
            return slerp(*tensors, t=self.shares[1])
        return weighted_mean(tensors, self.shares)


def mean_of(models: int, weights: Sequence[float] | None = None) -> Method:
    """The mean of models, equally weighted without ``weights``.

    Raises:
        UserError: If there are not as many weights as models, or one is not a positive number.
    """
    weights = [1.0] * models if weights is None else weights
    if len(weights) != models:
        raise UserError(f"--weights: {len(weights)} weights for {models} models; give one for each")
    wrong = [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]
    if wrong:
        raise UserError(f"--weights: {wrong[0]} is not a positive number; leave out the models that shall not count")
    total = math.fsum(weights)
    return Method("mean", tuple(weight / total for weight in weights))


def slerp_of(models: int, t: float) -> Method:
    """The point ``t`` of the way from one model to another.

    Raises:
        UserError: If there are not two models, or ``t`` does not lie between 0 and 1.
    """
    if models != 2:
        raise UserError(f"--slerp goes from one model to another, not {models}; merge two at a time, or use the mean")
    if not 0 <= t <= 1:
        raise UserError(f"--slerp: {t} does not lie between 0 (the first model) and 1 (the second)")
    return Method("slerp", (1 - t, t))
