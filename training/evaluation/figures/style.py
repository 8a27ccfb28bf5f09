"""Shared style of the figures: told apart by colour, by line style and by marker, so also in grey.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), which colour-blind readers can tell apart, ordered
so that neighbours also differ in lightness. Their yellow is too pale for lines on white.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.common.errors import UserError

COLOURS = ("#0072B2", "#E69F00", "#000000", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")


def line_style(number: int) -> dict[str, Any]:
    """Return colour, line style and marker of the line with a number; the first 28 differ, neighbours in all three."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
    }


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure, its size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib; install it with pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write ``name.svg`` and ``name.png``, or nothing without a figure; the same figure gives the same bytes."""
    if figure is None:
        return []
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.svg", folder / f"{name}.png"]
    # Text stays text, to be searched and read aloud; ids are salted by name, since figures share a page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(files[0], metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        figure.savefig(files[1], dpi=110)
    return files


def short_labels(names: Sequence[str], most: int = 28) -> list[str]:
    """Return the last parts of names, as many as tell all of them apart, shortened."""
    parts = [name.rstrip("/").split("/") for name in names]
    counts = range(1, max(map(len, parts), default=1) + 1)
    labels = (["/".join(each[-count:]) for each in parts] for count in counts)
    found = next((each for each in labels if len(set(each)) == len(set(names))), list(names))
    return [shortened(label, most) for label in found]


def shortened(name: str, most: int) -> str:
    """Return a name without its middle if it is longer than ``most``, escaped for matplotlib."""
    # A dollar sign would begin a formula.
    shown = name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"
    return shown.replace("$", r"\$")
