"""What the tests of the formats share: raw rows in memory, as a format sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset

from training.data.building.formats import FORMATS
from training.data.building.formats.format import Row
from training.data.building.raw import RawRows

Built = tuple[list[Row], dict[str, int]]


@pytest.fixture
def build() -> Callable[..., Built]:
    """``build(format, data, seed=0, **keys)``: its rows and what was dropped; columns are named as roles."""

    def build(name: str, data: dict[str, list[Any]], seed: int = 0, **keys: Any) -> Built:
        kind = FORMATS[name]
        raw = RawRows(
            Dataset.from_dict(data),
            {role: role for role in data},
            "build.yaml: source 'some'",
            texts=kind.texts,
            values=kind.values,
            optional=kind.optional,
            name="some",
            seed=seed,
        )
        rows = list(kind.rows(raw, **{key: told.default for key, told in kind.keys.items()} | keys))
        return rows, {reason: count for reason, count in raw.dropped.items() if count}

    return build
