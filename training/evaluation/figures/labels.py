"""Labels of points, each at the nearest place where it hides nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

FONT_SIZE = 8
# Points, of 1/72 inch. From the second distance on, a thin line leads to the label.
_DISTANCES = (6.0, 16.0, 28.0, 42.0)
_DIRECTIONS = ((0, 1), (0, -1), (-1, 1), (1, -1), (1, 1), (-1, -1), (-1, 0), (1, 0))
_MARKER, _GAP, _EDGE = 4.0, 1.0, 2.0
# A label that hides others is better than one that is cut off.
_OUTSIDE = 1000


@dataclass(frozen=True)
class Place:
    """Where a label goes.

    Attributes:
        text: The label.
        point: What it labels, in data coordinates.
        offset: From there to the lower left corner of the text, in points.
        led: Whether it is so far away that a line leads to it.
        hides: How many things are under it.
    """

    text: str
    point: tuple[float, float]
    offset: tuple[float, float]
    led: bool
    hides: int


def find_places(
    axes: Any, points: Sequence[tuple[float, float]], texts: Sequence[str], path: Sequence[tuple[float, float]] = ()
) -> list[Place]:
    """Finds places inside the axes, which have to be drawn but for their labels; earlier labels choose first.

    Args:
        axes: The axes.
        points: In data coordinates.
        texts: Their labels.
        path: Corners of a line of horizontal and vertical pieces that labels keep clear of, in data coordinates.

    Returns:
        A place each; where nothing is free, the one that hides least.
    """
    from matplotlib.path import Path
    from matplotlib.transforms import Bbox

    # Settles the layout, on which the distances between the points depend.
    axes.figure.draw_without_rendering()
    taken = _Taken(axes, points, path)
    places = []
    for number, (point, text) in enumerate(zip(points, texts, strict=True)):
        width, height = _size(axes, text)
        centre = taken.centres[number]
        candidates = []
        for offset, led in _offsets(width, height):
            box = Bbox.from_bounds(*(centre + offset), width, height)
            line = Path([centre, (box.p0 + box.p1) / 2]) if led else None
            candidates.append((taken.under(number, box, line), offset, box, line))
            if not candidates[-1][0]:
                break
        hides, offset, box, line = min(candidates, key=lambda candidate: candidate[0])
        places.append(Place(text, point, offset, line is not None, hides))
        taken.add(box, line)
    return places


class _Taken:
    """What labels may not hide, in points from the lower left corner of the figure."""

    def __init__(self, axes: Any, points: Sequence[tuple[float, float]], path: Sequence[tuple[float, float]]) -> None:
        from matplotlib.transforms import Affine2D, Bbox

        scale = Affine2D().scale(72 / axes.figure.dpi)
        self.inside = axes.bbox.transformed(scale).padded(-_EDGE)
        self.centres = (axes.transData + scale).transform(points)
        self.markers = [Bbox([centre - _MARKER, centre + _MARKER]) for centre in self.centres]
        corners = (axes.transData + scale).transform(path) if path else []
        self.pieces = [Bbox([start, end]) for start, end in pairwise(corners)]
        self.texts: list[Any] = []
        self.lines: list[Any] = []

    def under(self, number: int, box: Any, line: Any) -> int:
        """How many things the label of a point would lie on, with the line that leads to it if there is one."""
        found = box.padded(_GAP).count_overlaps([*self.markers, *self.pieces, *self.texts])
        found += sum(other.intersects_bbox(box) for other in self.lines)
        if line is not None:
            others = [marker for place, marker in enumerate(self.markers) if place != number]
            found += sum(line.intersects_bbox(other) for other in (*others, *self.texts))
            found += sum(line.intersects_path(other) for other in self.lines)
        outside = not (self.inside.contains(*box.p0) and self.inside.contains(*box.p1))
        return found + _OUTSIDE * outside

    def add(self, box: Any, line: Any) -> None:
        """Takes the room of a label."""
        self.texts.append(box)
        if line is not None:
            self.lines.append(line)


def draw_labels(axes: Any, places: Sequence[Place]) -> None:
    """Writes the labels; they do not change the layout that their places were found in."""
    for place in places:
        line = {"arrowstyle": "-", "color": "0.45", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            place.text,
            place.point,
            xytext=place.offset,
            textcoords="offset points",
            fontsize=FONT_SIZE,
            arrowprops=line if place.led else None,
        ).set_in_layout(False)


def _size(axes: Any, text: str) -> tuple[float, float]:
    """Width and height of a text in points."""
    written = axes.text(0, 0, text, fontsize=FONT_SIZE, transform=None)
    extent = written.get_window_extent()
    written.remove()
    return extent.width * 72 / axes.figure.dpi, extent.height * 72 / axes.figure.dpi


def _offsets(width: float, height: float) -> Iterator[tuple[tuple[float, float], bool]]:
    """From a point to the lower left corner of its text, in points, the nearest first; and whether they are far."""
    for number, distance in enumerate(_DISTANCES):
        for right, up in _DIRECTIONS:
            # A diagonal one begins beside the marker rather than in its corner.
            along = distance * (0.7 if right and up else 1)
            x = {-1: -along - width, 0: -width / 2, 1: along}[right]
            y = {-1: -along - height, 0: -height / 2, 1: along}[up]
            yield (x, y), number > 0
