"""What the figures share: lines that differ in grey, and how a figure is saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.common.errors import UserError

# Line style, marker and grey; neighbours differ in all three.
LINES: Sequence[dict[str, Any]] = (
    {"linestyle": "-", "marker": "o", "color": "0.0"},
    {"linestyle": "--", "marker": "s", "color": "0.35"},
    {"linestyle": ":", "marker": "^", "color": "0.2"},
    {"linestyle": "-.", "marker": "D", "color": "0.5"},
)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of the given inches.

    Raises:
        UserError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib; install it with pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Writes ``name.svg`` and ``name.png``; the same figure gives the same bytes."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.svg", folder / f"{name}.png"]
    # Text stays text, to be searched and read aloud; ids are salted by name, since figures share a page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(files[0], metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        figure.savefig(files[1], dpi=110)
    return files


def short_labels(names: Sequence[str], most: int = 28) -> list[str]:
    """Short labels of several names: as many last parts of each as tell it from all others, cut if they are long."""
    parts = [name.rstrip("/").split("/") for name in names]
    labels = []
    for number, own in enumerate(parts):
        others = [other for place, other in enumerate(parts) if place != number and other != own]
        alike = max((_shared_end(own, other) for other in others), default=0)
        labels.append(shortened("/".join(own[-1 - alike :]), most))
    return labels


def _shared_end(first: Sequence[str], second: Sequence[str]) -> int:
    """Number of last parts in which two names agree."""
    pairs = zip(reversed(first), reversed(second), strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def shortened(name: str, most: int) -> str:
    """A name cut in its middle if it is long, as matplotlib writes it."""
    # A dollar sign would begin mathematics.
    shown = name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"
    return shown.replace("$", r"\$")
