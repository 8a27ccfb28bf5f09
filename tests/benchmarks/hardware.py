"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["available_memory", "describe_hardware", "versions"]

_PACKAGES = ("torch", "transformers", "sentence-transformers", "datasets", "numpy")
# The instructions that decide how fast a matrix product can be.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_fp16")


def describe_hardware() -> dict[str, Any]:
    """Processor, GPU, memory and threads."""
    cuda = torch.cuda.is_available()
    gpu = torch.cuda.get_device_properties(0) if cuda else None
    total = _memory_field("MemTotal")
    flags = _cpu_field("flags").split()
    return {
        "processor": _cpu_field("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": [flag for flag in _FLAGS if flag in flags] or [torch.backends.cpu.get_cpu_capability()],
        "memory_gib": round(total / 2**30, 1) if total else None,
        "gpu": gpu.name if gpu else None,
        "gpu_memory_gib": round(gpu.total_memory / 2**30, 1) if gpu else None,
        "system": f"{platform.system()} on {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Python and the packages that matter here; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def available_memory() -> int | None:
    """Bytes that the device can still give, None if nobody says."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else _memory_field("MemAvailable")


def _cpu_field(name: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _memory_field(name: str) -> int | None:
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
