"""What is measured on: settings of a run and the sizes that follow from them, hardware, and memory."""

from __future__ import annotations

import os
import platform
import resource
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PACKAGES = ("torch", "transformers", "sentence-transformers", "datasets", "numpy")
# The instructions that decide how fast a matrix product can be.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_fp16")

_Value = TypeVar("_Value")


def device() -> torch.device:
    """Return the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Settings:
    """The choices of the command line.

    Attributes:
        repeats: Timed rounds of each comparison.
        precisions: Names among ``PRECISIONS``.
        compile: Whether the compiled model takes part.
        size: A published shape; one that suits the device if None.
        rows: Rows of the training batch; as many of the published 16 as the machine can take if None.
        step_layers: Layers of the model that is trained; two on a CPU and all on a GPU if None.
        quick: Sizes at which everything runs in seconds and no figure means anything.
        distributions: Distributions of lengths that are encoded; all if empty.
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
        """Return the value that fits the run and the device."""
        if self.quick:
            return quick
        return cuda if device().type == "cuda" else cpu

    @property
    def family_name(self) -> str:
        """The published shape that is measured."""
        return self.size or self.pick(quick="f2llm-v2-80m", cpu="f2llm-v2-80m", cuda="f2llm-v2-0.6b")

    @property
    def step_shape(self) -> dict[str, int]:
        """Changes to the shape of the model that is trained: a stock step of all layers is too much for a CPU."""
        layers = self.step_layers or self.pick(quick=None, cpu=2, cuda=None)
        return {} if layers is None else {"num_hidden_layers": layers}


def describe_hardware() -> dict[str, Any]:
    """Return processor, GPU, memory and threads."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    total = _memory_field("MemTotal")
    flags = _field("/proc/cpuinfo", "flags").split()
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": [flag for flag in _FLAGS if flag in flags] or [torch.backends.cpu.get_cpu_capability()],
        "memory_gib": round(total / 2**30, 1) if total else None,
        "gpu": gpu.name if gpu else None,
        "gpu_memory_gib": round(gpu.total_memory / 2**30, 1) if gpu else None,
        "system": f"{platform.system()} on {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that matter; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def available_memory() -> int | None:
    """Return the free bytes of the device; None if unknown."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else _memory_field("MemAvailable")


def process_memory(field: str) -> float:
    """Return the MiB that this process holds (``VmRSS``) or held at most (``VmHWM``).

    On Linux, the peak of ``getrusage`` is no less than that of the parent.
    """
    value = _field("/proc/self/status", field)
    if value:
        return int(value.split()[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def _memory_field(name: str) -> int | None:
    value = _field("/proc/meminfo", name)
    return int(value.split()[0]) * 1024 if value else None


def _field(path: str, name: str) -> str:
    """Return the value of the first ``name: value`` line of a file in /proc, or nothing."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
