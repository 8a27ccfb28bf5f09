"""Numbers that every process must have alike, for all of them decide by these."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast


def as_first_process(accelerator: Accelerator, metrics: dict[str, float]) -> dict[str, float]:
    """The first process's metrics, on every process; all call this together, with the same names in the same order."""
    if accelerator.num_processes == 1 or not metrics:
        return metrics
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(metrics, broadcast(values).tolist(), strict=True))
