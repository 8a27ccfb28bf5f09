"""What a suite fills in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Suite"]


@dataclass
class Suite:
    """Results of one suite.

    Attributes:
        measurements: What :func:`~tests.benchmarks.timing.measure` returned.
        points: Points of growth, each with its axis and value.
        notes: What a reader must know to read the figures.
        skipped: What was left out and why.
        on_result: Called after each measurement and point: a run that is cut short keeps what it has.
    """

    measurements: list[dict[str, Any]] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    on_result: Callable[[], None] = lambda: None

    def skip(self, what: str, why: str) -> None:
        """Records something that could not be measured, once."""
        entry = {"what": what, "why": why}
        if entry not in self.skipped:
            self.skipped.append(entry)

    def add(self, measurement: dict[str, Any]) -> None:
        """Records a measurement and the contestants that fell out of it."""
        self.measurements.append(measurement)
        for name, why in measurement["left_out"].items():
            self.skip(f"{name}, {measurement['case']}, {measurement['precision']}", why)
        self.on_result()

    def add_point(self, point: dict[str, Any]) -> None:
        """Records a point of growth."""
        self.points.append(point)
        self.on_result()

    def results(self) -> dict[str, Any]:
        """What the JSON file holds; its lists grow with the suite."""
        return {name: getattr(self, name) for name in ("measurements", "points", "notes", "skipped")}
