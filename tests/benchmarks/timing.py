"""Timing contestants side by side: every repeat runs all of them, so that all see the same disturbances."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Contestant", "add_ratio", "measure", "spread", "time_call"]


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    Attributes:
        run: Does it once.
        warm_ups: Calls before the first that counts.
        reports_seconds: Whether ``run`` returns the seconds it took by a clock of its own, for work of which only a
            part counts or that another process does.
        optional: Whether the others go on without it if its first call fails.
    """

    run: Callable[[], Any]
    warm_ups: int = 1
    reports_seconds: bool = False
    optional: bool = False


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def time_call(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, the device's work included, and what it returned."""
    _synchronise()
    start = time.perf_counter()
    result = run()
    _synchronise()
    return time.perf_counter() - start, result


def measure(
    case: str,
    contestants: Mapping[str, Contestant],
    repeats: int,
    *,
    precision: str | None = None,
    check: Callable[[dict[str, Any]], None] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Warms all contestants up, checks that they agree, then times them in turn.

    Args:
        case: What is measured.
        contestants: By name.
        repeats: Timed rounds.
        precision: Name of the precision, if all share one.
        check: Called with the first result of each contestant, before anything is timed; raises if they disagree.
        facts: Anything else to record.

    Returns:
        A measurement for the JSON file; :func:`add_ratio` adds to its ``ratios``.
    """
    warm_ups, first_results, left_out = _warm_up(contestants)
    if check is not None:
        check(first_results)
    names = list(first_results)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        # Every other round runs backwards: nobody always follows the same neighbour.
        for name in names if repeat % 2 == 0 else reversed(names):
            elapsed, result = time_call(contestants[name].run)
            seconds[name].append(result if contestants[name].reports_seconds else elapsed)
    return {
        "case": case,
        "precision": precision,
        "contestants": {
            name: {**spread(values), "samples": values, **_warm_up_cost(contestants[name], values, warm_ups[name])}
            for name, values in seconds.items()
        },
        "ratios": [],
        "left_out": left_out,
        "facts": dict(facts or {}),
    }


def add_ratio(
    measurement: dict[str, Any], baseline: str, contestant: str, label: str = "times as fast", scale: float = 1.0
) -> None:
    """Adds the spread of ``scale * baseline seconds / contestant seconds``, repeat by repeat, if both took part."""
    present = measurement["contestants"]
    if baseline in present and contestant in present:
        pairs = zip(present[baseline]["samples"], present[contestant]["samples"], strict=True)
        ratio = spread([scale * base / own for base, own in pairs])
        measurement["ratios"].append({"label": label, "baseline": baseline, "contestant": contestant, **ratio})


def _warm_up(contestants: Mapping[str, Contestant]) -> tuple[dict[str, float], dict[str, Any], dict[str, str]]:
    """Seconds of all warm-up calls and first results by name, and who was left out and why."""
    seconds: dict[str, float] = {}
    results: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, contestant in contestants.items():
        try:
            calls = [time_call(contestant.run) for _ in range(contestant.warm_ups)]
        except Exception as error:
            if not contestant.optional:
                raise
            left_out[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        seconds[name], results[name] = sum(elapsed for elapsed, _ in calls), calls[0][1]
    return seconds, results, left_out


def _warm_up_cost(contestant: Contestant, values: Sequence[float], warm_up: float) -> dict[str, float]:
    """What the warm-up calls took above the same number of timed ones: compilation, mostly."""
    if contestant.reports_seconds:
        return {}
    return {"warm_up_extra": max(0.0, warm_up - contestant.warm_ups * statistics.median(values))}


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
