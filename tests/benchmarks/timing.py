"""Times contestants side by side, so that all see the same disturbances, and collects the results of a suite."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Contestant:
    """One way to do the work."""

    run: Callable[[], Any]  # does it once
    warm_ups: int = 1  # calls before the first that counts
    reports_seconds: bool = False  # whether run returns the seconds: only a part counts, or another process works
    optional: bool = False  # whether the others go on without it if its first call fails

    @classmethod
    def compiled(cls, run, compiled):
        """A model: a compiled one takes two calls to warm up, and not every machine can compile."""
        return cls(run, warm_ups=2 if compiled else 1, optional=compiled)


def spread(values):
    """Return median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def time_call(run):
    """Return the seconds of a call, including the device's work, and its result."""
    _synchronise()
    start = time.perf_counter()
    result = run()
    _synchronise()
    return time.perf_counter() - start, result


def _synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(case, contestants, repeats, *, precision=None, check=lambda results: None, facts=None):
    """Warm all contestants up, ``check`` that their first results agree, then time them in turn, ``repeats`` times.

    Returns:
        A measurement for the JSON file; :func:`add_ratio` adds to its ``ratios``.
    """
    warm_ups: dict[str, float] = {}
    first_results: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, contestant in contestants.items():
        try:
            calls = [time_call(contestant.run) for _ in range(contestant.warm_ups)]
            warm_ups[name], first_results[name] = sum(elapsed for elapsed, _ in calls), calls[0][1]
        except Exception as error:
            if not contestant.optional:
                raise
            left_out[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    check(first_results)
    seconds: dict[str, list[float]] = {name: [] for name in first_results}
    for repeat in range(repeats):
        # Every other round runs backwards: nobody always follows the same neighbour.
        for name in seconds if repeat % 2 == 0 else reversed(seconds):
            elapsed, result = time_call(contestants[name].run)
            seconds[name].append(result if contestants[name].reports_seconds else elapsed)
    timed: dict[str, dict[str, Any]] = {name: {**spread(values), "samples": values} for name, values in seconds.items()}
    for name, found in timed.items():
        if not contestants[name].reports_seconds:
            # What the warm-up calls took above the same number of timed ones: mostly compilation.
            found["warm_up_extra"] = max(0.0, warm_ups[name] - contestants[name].warm_ups * found["median"])
    known = {"case": case, "precision": precision, "facts": dict(facts or {})}
    return {**known, "contestants": timed, "ratios": [], "left_out": left_out}


def add_ratio(measurement, baseline, contestant, label="times as fast", scale=1.0):
    """Add the spread of ``scale * baseline seconds / contestant seconds`` by repeat, if both took part."""
    present = measurement["contestants"]
    if baseline in present and contestant in present:
        pairs = zip(present[baseline]["samples"], present[contestant]["samples"], strict=True)
        ratio = spread([scale * base / own for base, own in pairs])
        measurement["ratios"].append({"label": label, "baseline": baseline, "contestant": contestant, **ratio})


@dataclass
class Suite:
    """Results of one suite; ``on_result`` is called after each, so that a run that is cut short keeps them."""

    measurements: list[dict[str, Any]] = field(default_factory=list)  # what measure returned
    points: list[dict[str, Any]] = field(default_factory=list)  # of growth, each with its axis and value
    notes: list[str] = field(default_factory=list)  # what a reader must know to read the figures
    skipped: list[dict[str, str]] = field(default_factory=list)  # what was left out and why
    on_result: Callable[[], None] = lambda: None

    def skip(self, what, why):
        """Record that something could not be measured."""
        self.skipped.append({"what": what, "why": why})

    def compare(self, case, contestants, repeats, pairs, **how):
        """Record a measurement with the ratios of ``pairs``: baseline, contestant and perhaps a label."""
        measurement = measure(case, contestants, repeats, **how)
        for pair in pairs:
            add_ratio(measurement, *pair)
        self.add(measurement)

    def add(self, measurement):
        """Record a measurement and the contestants that were left out."""
        self.measurements.append(measurement)
        for name, why in measurement["left_out"].items():
            self.skip(f"{name}, {measurement['case']}, {measurement['precision']}", why)
        self.on_result()

    def add_point(self, point):
        """Record a point of growth."""
        self.points.append(point)
        self.on_result()

    def results(self):
        """Return what the JSON file holds; its lists grow with the suite."""
        return {name: getattr(self, name) for name in ("measurements", "points", "notes", "skipped")}
