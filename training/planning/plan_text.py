"""How plans are written: sizes, time spans, operations, and what a stage reads and writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from training.config.inputs import Input


def input_lines(inputs: Sequence[Input], data: str, output: str) -> Iterator[str]:
    """What a stage reads, each with where it comes from, and the folder of the model that it makes."""
    for each in inputs:
        yield f"  {each.key:<12} {each.described()}"
    yield f"  {'data':<12} {data}"
    yield f"  {'output':<12} {output}"
