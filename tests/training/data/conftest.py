"""Preparation of one source, as several tests do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from training.data.manifest import Source
from training.data.options import PreparationOptions
from training.data.preparation.pipeline import prepare
from training.data.prepared import PreparedSource


@pytest.fixture
def long(options: PreparationOptions) -> PreparationOptions:
    """Long enough for every text to be whole, without validation rows: rows stay in the order of the file."""
    return replace(options, max_length=2048, validation_share=0.0)


@pytest.fixture
def run(
    tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, long: PreparationOptions
) -> Callable[..., PreparedSource]:
    """Prepares one source."""

    def run(source: Source, options: PreparationOptions = long, folder: str = "prepared") -> PreparedSource:
        (prepared,) = prepare([source], small_tokenizer, tmp_path / folder, options)
        return prepared

    return run
