"""Labels lie inside the axes and on nothing while there is room, by the extents of the written text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text

from training.evaluation.figures.labels import draw_labels, find_places
from training.evaluation.figures.style import new_figure


def axes_with(points: list[tuple[float, float]]) -> Any:
    axes = new_figure(6, 4).subplots()
    axes.plot(*zip(*points, strict=True), "o", markersize=6)
    axes.margins(0.15)
    return axes


def labelled(points: list[tuple[float, float]], texts: list[str], path: list[tuple[float, float]] = ()) -> Any:
    axes = axes_with(points)
    places = find_places(axes, points, texts, path)
    draw_labels(axes, places)
    axes.figure.draw_without_rendering()
    return axes, places


def text_boxes(axes: Any) -> list[Any]:
    # The extent of an annotation holds the line to it, too.
    return [Text.get_window_extent(text) for text in axes.texts]


@pytest.mark.parametrize("seed", range(5))
def test_labels_hide_neither_one_another_nor_a_marker(seed: int) -> None:
    points = [tuple(point) for point in np.random.default_rng(seed).random((12, 2)).tolist()]
    axes, places = labelled(points, [f"model-{number}" for number in range(12)])
    assert [place.hides for place in places] == [0] * 12
    boxes = text_boxes(axes)
    centres = axes.transData.transform(points)
    for number, box in enumerate(boxes):
        assert axes.bbox.contains(*box.p0) and axes.bbox.contains(*box.p1)
        assert not box.count_overlaps(boxes[number + 1 :])
        assert not any(box.contains(*centre) for centre in centres)


def test_a_lonely_label_is_above_its_point() -> None:
    axes, (place,) = labelled([(1, 1)], ["name"])
    (box,), (centre,) = text_boxes(axes), axes.transData.transform([(1, 1)])
    assert not place.led and abs((box.x0 + box.x1) / 2 - centre[0]) < 1
    assert 3 < (box.y0 - centre[1]) * 72 / axes.figure.dpi < 10


def test_a_label_without_room_beside_its_point_is_led_to_it() -> None:
    close = [(0.45 + 0.1 * (number % 2), 0.5 + number // 2 / 25) for number in range(4)]
    axes, places = labelled([(0.0, 0.0), (1.0, 1.0), *close], [f"a-name-that-is-long-{number}" for number in range(6)])
    assert not any(place.hides for place in places) and any(place.led for place in places)
    assert [text.arrow_patch is not None for text in axes.texts] == [place.led for place in places]
    boxes = text_boxes(axes)
    assert not any(box.count_overlaps(boxes[number + 1 :]) for number, box in enumerate(boxes))


def test_labels_keep_clear_of_the_path() -> None:
    points = [(0.2, 0.2), (0.8, 0.8)]
    path = [(0.2, 0.2), (0.2, 0.8), (0.8, 0.8)]
    axes, places = labelled(points, ["first", "second"], path)
    assert not any(place.hides for place in places)
    above, across = axes.transData.transform([(0.2, 0.5), (0.5, 0.8)])
    for box in text_boxes(axes):
        assert not box.x0 <= above[0] <= box.x1 or box.y1 <= axes.transData.transform((0.2, 0.2))[1]
        assert not box.y0 <= across[1] <= box.y1 or box.x0 >= axes.transData.transform((0.8, 0.8))[0]


def test_it_is_told_when_there_is_no_room() -> None:
    points = [(0.5, 0.5 + number / 1000) for number in range(40)]
    axes = axes_with([(0.0, 0.0), (1.0, 1.0), *points])
    places = find_places(axes, points, ["a-name-that-is-quite-long"] * 40)
    assert len(places) == 40 and sum(place.hides > 0 for place in places) > 5
    # Even then none is cut off while there is room inside.
    assert all(place.hides < 1000 for place in places)


def test_labels_do_not_move_the_axes() -> None:
    points = [(0.0, 0.0), (1.0, 1.0)]
    axes = axes_with(points)
    axes.figure.draw_without_rendering()
    before = axes.bbox.bounds
    draw_labels(axes, find_places(axes, points, ["x" * 30, "y" * 30]))
    axes.figure.draw_without_rendering()
    assert axes.bbox.bounds == before
