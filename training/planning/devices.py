"""Devices that a stage may be planned for: what they hold, and how long they take.

A step takes as long as its matrix products at the rate that such products reach, and the traffic between them at the
memory's rate (the roofline of Williams, Waterman and Patterson, 2009, but with a sum, for hardly any of our kernels
overlap). The processes of a training share all but the loss, and the optimizer only where weights are sharded.
Communication is taken as hidden behind computation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import psutil
import torch

from training.common.errors import UserError
from training.config.arguments import StageArguments

# How often a byte that is kept for the backward pass is moved by each forward pass. It is assumed, as are the parts of
# the data sheets' rates that products reach: with both, our 8B shape takes at 8,192 tokens 0.37 of the rate of an H100
# and 0.55 of that of an A100; torchtitan reports 0.33 to 0.39 and 0.57 of Llama 3 8B (docs/performance.md).
_MOVES = 5.0
# On a CPU, whose rates are measured: fitted to the table in README.md, as is what a step in bf16 reaches of the rate of
# products in bf16, for attention is no faster in bf16 there than in fp32.
_MOVES_ON_CPU, _BF16_ON_CPU = 1.8, 0.6
# Of each parameter AdamW reads weight, gradient and both moments, and writes all but the gradient; the norm is read.
_BYTES_OF_ADAMW = 32
# The rest is left to the allocator, to the kernels' own memory and to the driver.
_USABLE = 0.9


class Device(NamedTuple):
    """One device, as its maker describes it: rates are dense, without sparsity."""

    name: str
    memory: float  # bytes
    bf16: float  # operations per second of matrix products
    fp32: float
    bandwidth: float  # bytes per second
    source: str
    reached: float  # what large matrix products reach of their rate
    moves: float = _MOVES

    def rate(self, args: StageArguments) -> float:
        """Return the operations per second of the stage's matrix products; TF32 has half the rate of bf16."""
        if args.bf16 or args.fp16:
            return self.bf16 * (_BF16_ON_CPU if self.name == "CPU" else 1)
        return self.bf16 / 2 if args.tf32 and self.name != "CPU" else self.fp32


def _gpu(name: str, gigabytes: float, *tera: float, reached: float, source: str) -> Device:
    # Makers' gigabytes of a GPU are those of 2**30 bytes.
    return Device(name, gigabytes * 2**30, *(each * 1e12 for each in tera), f"NVIDIA's {source}", reached)


DEVICES = {
    device.name: device
    for device in (
        _gpu("H200", 141, 989.5, 67, 4.8, reached=0.5, source="H200 data sheet (SXM)"),
        _gpu("H100", 80, 989.5, 67, 3.35, reached=0.5, source="H100 data sheet (SXM)"),
        _gpu("A100", 80, 312, 19.5, 2.039, reached=0.7, source="A100 data sheet (SXM, 80 GB)"),
        _gpu("RTX-4090", 24, 165.2, 82.6, 1.008, reached=0.7, source="Ada white paper (FP32 accumulate)"),
    )
}


class Fleet(NamedTuple):
    """Devices of one kind that train together."""

    device: Device
    count: int
    fraction: float | None = None  # of the data sheet's matrix rate that a step reaches, where it was measured

    def seconds(
        self,
        args: StageArguments,
        flops: float,  # of all devices together
        traffic: float = 0.0,  # bytes of all devices together
        steps: int = 0,
        loss: int = 0,  # bytes that each device keeps for it in a step
        trained: float = 0.0,  # parameters that each device's optimizer changes
    ) -> float:
        """Return the time of so many steps."""
        device, rate = self.device, self.device.rate(args)
        if self.fraction is not None:
            return flops / (rate * self.fraction * self.count)
        moved = device.moves * (traffic / self.count + 3 * steps * loss) + steps * _BYTES_OF_ADAMW * trained
        return flops / (rate * device.reached * self.count) + moved / device.bandwidth

    @property
    def room(self) -> float:
        """The bytes of a device that a plan may use."""
        return _USABLE * self.device.memory

    def holds(self, size: float) -> bool:
        """Return whether a device has room for so many bytes."""
        return size <= self.room


def find_fleet(name: str | None, count: int | None, fraction: float | None) -> Fleet:
    """Return the devices of ``--device``, ``--devices`` and ``--fraction``; by default one H200."""
    for option, value in (("devices", count), ("fraction", fraction)):
        if value is not None and value <= 0:
            raise UserError(f"--{option} {value:g}: give a number above 0")
    if fraction is not None and fraction > 1:
        raise UserError(f"--fraction {fraction:g}: give the part of the matrix rate that was reached, at most 1")
    wanted = (name or "H200").upper().replace("_", "-")
    if wanted != "CPU" and wanted not in DEVICES:
        raise UserError(f"--device {name}: there are {', '.join(DEVICES)}, and cpu for this machine's")
    return Fleet(this_cpu() if wanted == "CPU" else DEVICES[wanted], count or 1, fraction)


def this_cpu() -> Device:
    """Measure this machine's rates, with the threads that torch uses."""
    left, right = torch.randn(2, 1024, 1024)
    halves = left.bfloat16(), right.bfloat16()
    rates = [2 * 1024**3 / _least_seconds(lambda pair=pair: pair[0] @ pair[1]) for pair in (halves, (left, right))]
    # A new tensor's pages have to be found, which takes longer than to fill them.
    large = torch.randn(2**23)
    bandwidth = 3 * large.nbytes / _least_seconds(lambda: large * large)
    memory = psutil.virtual_memory().total
    return Device("CPU", memory, *rates, bandwidth, "a measurement here", 1.0, _MOVES_ON_CPU)


def _least_seconds(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        # Of this thread, which takes part in all of it: others' work on the machine does not lengthen it.
        start = time.thread_time()
        run()
        seconds.append(time.thread_time() - start)
    return min(seconds)
