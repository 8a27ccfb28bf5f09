"""What a suite hands back."""

from __future__ import annotations

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
    """

    measurements: list[dict[str, Any]] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

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
