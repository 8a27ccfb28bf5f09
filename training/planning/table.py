"""What the stages of a recipe would take on a fleet of devices, as a table for people, and how to make them fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

from training.config.arguments import StageArguments
from training.planning.costs import MemoryEstimate
from training.planning.devices import DEVICES, Fleet

_PARTS = ("state", "gathered", "activations", "loss", "teacher")
_MOST_DEVICES = 1024


class Row(NamedTuple):
    """One stage."""

    name: str
    args: StageArguments
    steps: int  # 0 for pruning
    memory: MemoryEstimate  # on each device
    estimate: partial[MemoryEstimate] | None  # the same, by the keys of `estimate_memory`; None for pruning
    seconds_on: Callable[[Fleet], float]


def table(fleet: Fleet, rows: Sequence[Row]) -> list[str]:
    """Return the lines of the table, of what does not fit, and of the sums on other devices."""
    device, count, fraction = fleet
    reached = f"{device.reached:g} of it in matrix products, memory traffic added (assumed; --fraction: measured)"
    if fraction is not None:
        reached = f"{fraction:g} of it reached by a step, as given"
    hours = [row.seconds_on(fleet) / 3600 for row in rows]
    unit = "CPU-hours" if device.name == "CPU" else "GPU-hours"
    head = ["stage", "steps", "s/step", "hours", unit, *_PARTS, "GiB in all", ""]
    body = [
        [row.name, f"{row.steps:,}", f"{3600 * each / row.steps:.3g}" if row.steps else "", *_times(each, fleet, row)]
        + [_gib(getattr(row.memory, part)) for part in _PARTS]
        + [_gib(row.memory.total), "" if fleet.holds(row.memory.total) else "too much"]
        for row, each in zip(rows, hours, strict=True)
    ]
    total = sum(each * _used(fleet, row) for row, each in zip(rows, hours, strict=True))
    if len(rows) > 1:
        body.append(["all stages", "", "", _number(sum(hours)), _number(total), *[""] * (len(_PARTS) + 2)])
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [
        f"predicted for {count} x {device.name} of {device.memory / 2**30:.0f} GiB and {device.bf16 / 1e12:.4g} dense "
        f"bf16 teraflops ({device.source}), {reached}; memory in GiB on each device",
        *("  ".join(_aligned(cells, widths)).rstrip() for cells in (head, *body)),
        *(f"{row.name} does not fit: {remedy(row, fleet)}" for row in rows if not fleet.holds(row.memory.total)),
    ]
    others = [_summary(fleet._replace(device=each, fraction=None), rows) for each in DEVICES.values() if each != device]
    return [*lines, f"on other devices, {count} of each: {'; '.join(others)}"]


def _used(fleet: Fleet, row: Row) -> int:
    # Pruning is not divided.
    return fleet.count if row.steps else 1


def _times(hours: float, fleet: Fleet, row: Row) -> list[str]:
    return [_number(hours), _number(hours * _used(fleet, row))]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}" if size else ""


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    # Names and remarks to the left, numbers to the right.
    return [
        cell.ljust(width) if number in (0, len(cells) - 1) else cell.rjust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]


def _summary(fleet: Fleet, rows: Sequence[Row]) -> str:
    hours = sum(row.seconds_on(fleet) / 3600 * _used(fleet, row) for row in rows)
    wrong = sum(not fleet.holds(row.memory.total) for row in rows)
    return f"{fleet.device.name} {_number(hours)} GPU-hours" + (
        f" ({wrong} of {len(rows)} stages do not fit)" if wrong else ""
    )


def remedy(row: Row, fleet: Fleet) -> str:
    """Return the fewest keys with which a stage that does not fit would, or what else to do."""
    if row.estimate is None:
        return "prune on a device with more memory, or on the CPU (use_cpu: true)"
    changes: dict[str, dict[str, Any]] = {}
    if not row.args.activation_checkpointing:
        changes["activation_checkpointing: true"] = {"gradient_checkpointing": True}
    if row.memory.teacher:
        changes["teacher_cache_dir: FOLDER"] = {"teacher": 0}
    if fleet.count > 1 and not row.memory.gathered:
        changes["fsdp: true"] = {"sharded": True}
    for number in range(len(changes) + 1):
        for names in combinations(changes, number):
            keys = {key: value for name in names for key, value in changes[name].items()}
            if (tokens := _tokens_that_fit(row, fleet, keys)) is not None:
                return "give " + " and ".join([*names, *tokens])
    everything = {key: value for change in changes.values() for key, value in change.items()}
    count = 2 * fleet.count
    while count <= _MOST_DEVICES:
        keys = {**everything, "sharded": True, "processes": count}
        if (tokens := _tokens_that_fit(row, fleet, keys)) is not None:
            return f"take {count} devices (--devices {count}) with " + " and ".join(
                [*{**changes, "fsdp: true": 0}, *tokens]
            )
        count *= 2
    if row.memory.loss > row.memory.total / 2:
        return "give a smaller global_batch_size"
    return "no number of these devices suffices; train an adapter (lora: true)"


def _tokens_that_fit(row: Row, fleet: Fleet, keys: Mapping[str, Any]) -> list[str] | None:
    """Return the key that limits a chunk, none if the stage fits with these keys alone, or None if it never does."""
    found = row.estimate(**keys)
    if fleet.holds(found.total):
        return []
    chunk = row.estimate.keywords["chunk_tokens"]
    room = fleet.room - (found.total - found.activations)
    tokens = 2 ** int(math.log2(max(room * chunk / found.activations, 1))) if chunk else 0
    # A longest text has to fit.
    if tokens < max(row.args.max_length, 1024) or not fleet.holds(
        row.estimate(**{**keys, "chunk_tokens": tokens}).total
    ):
        return None
    return [f"max_tokens_per_forward: {tokens}"]
