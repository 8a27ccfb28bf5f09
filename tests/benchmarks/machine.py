"""What is measured on: settings of a run and the sizes that follow from them, hardware, and memory."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
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
    """The choices of the command line; what is None follows from the device."""

    repeats: int = 3  # timed rounds of each comparison
    precisions: tuple[str, ...] = ("fp32", "bf16")
    compile: bool = True  # whether the compiled model takes part
    size: str | None = None  # a published shape
    rows: int | None = None  # of the training batch; as many of the published 16 as the machine can take
    step_layers: int | None = None  # of the model that is trained: two on a CPU and all on a GPU
    quick: bool = False  # sizes at which everything runs in seconds and no figure means anything
    openvino_python: str | None = None  # interpreter with sentence-transformers' OpenVINO backend
    distributions: tuple[str, ...] = ()  # of lengths that are encoded; all if empty

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
    flags = _field("/proc/cpuinfo", "flags").split()
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": [flag for flag in _FLAGS if flag in flags] or [torch.backends.cpu.get_cpu_capability()],
        "memory_gib": round(_kib("/proc/meminfo", "MemTotal") / 2**20, 1),
        "gpu": gpu.name if gpu else None,
        "gpu_memory_gib": round(gpu.total_memory / 2**30, 1) if gpu else None,
        "system": f"{platform.system()} on {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    return {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}}


def available_memory() -> int:
    """Return the free bytes of the device."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else _kib("/proc/meminfo", "MemAvailable") * 1024


def process_memory(field: str) -> float:
    """Return the MiB that this process holds (``VmRSS``) or held at most (``VmHWM``)."""
    # Not the peak of getrusage: it is no less than that of the parent.
    return _kib("/proc/self/status", field) / 1024


def _kib(path: str, name: str) -> int:
    return int(_field(path, name).split()[0])


def _field(path: str, name: str) -> str:
    """Return the value of the first ``name: value`` line of a file in /proc, or nothing."""
    lines = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
