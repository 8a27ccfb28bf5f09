"""What the command line chooses, and the sizes that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

__all__ = ["PRECISIONS", "Settings", "device"]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

_Value = TypeVar("_Value")


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Settings:
    """The choices that every suite reads.

    Attributes:
        repeats: Timed rounds of each comparison.
        precisions: Names among ``PRECISIONS``.
        compile: Whether the compiled model takes part.
        size: A published shape; left out, one that suits the device.
        rows: Rows of the training batch; left out, as many of the published 16 as the machine can take.
        step_layers: Layers of the model that is trained; left out, two on a CPU and all on a GPU.
        quick: Sizes at which everything runs in seconds and no figure means anything.
        distributions: Distributions of lengths that are encoded; all if there are none.
        openvino_python: Interpreter of an environment with sentence-transformers' OpenVINO backend.
    """

    repeats: int = 3
    precisions: tuple[str, ...] = ("fp32", "bf16")
    compile: bool = True
    size: str | None = None
    rows: int | None = None
    step_layers: int | None = None
    quick: bool = False
    openvino_python: str | None = None
    distributions: tuple[str, ...] = ()

    def pick(self, *, quick: _Value, cpu: _Value, cuda: _Value) -> _Value:
        """The value that fits the run and the device."""
        if self.quick:
            return quick
        return cuda if device().type == "cuda" else cpu

    @property
    def family_name(self) -> str:
        """The published shape that is measured."""
        return self.size or self.pick(quick="f2llm-v2-80m", cpu="f2llm-v2-80m", cuda="f2llm-v2-0.6b")

    @property
    def step_shape(self) -> dict[str, int]:
        """What is special to the model that is trained: a stock step of all layers is too much for a CPU."""
        layers = self.step_layers or self.pick(quick=None, cpu=2, cuda=None)
        return {} if layers is None else {"num_hidden_layers": layers}
