"""A whole model that is released: its files and its weights, as :mod:`adapter_model` has those of an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.publishing.merged_adapter import merged_adapter
from training.publishing.model_files import ModelFiles, copy_model_files, family_of, read_model_files, shape_of
from training.publishing.states import ModelState
from training.publishing.weights import Weights, copy_weights, read_weights


@dataclass(frozen=True)
class WholeModel:
    """A model's folder.

    Attributes:
        files: Of the folder, without weights.
        weights: Its weights, not loaded.
        fields: What a release says of the model, by the names of its record.
    """

    files: ModelFiles
    weights: Weights
    fields: dict[str, Any]

    @property
    def dtype(self) -> str:
        """Of its weights."""
        return self.weights.dtype

    def copy_files(self, folder: Path, dtype: str) -> None:
        """Copies all but the weights, which get ``dtype``."""
        copy_model_files(self.files, folder, dtype)

    def copy_weights(self, folder: Path, dtype: str, max_shard_size: str) -> None:
        """Copies the weights in a dtype and in files of at most a size."""
        copy_weights(self.weights, folder, dtype, max_shard_size)


def read_whole_model(state: ModelState, base: str | None = None, settings: Path | None = None) -> WholeModel:
    """Looks at a run's model.

    Args:
        state: The run's state.
        base: Name on the Hub of the base of an adapter that was merged into it.
        settings: Folder of its files but the weights, where that is another.

    Raises:
        UserError: If it is no model that can be packed, or ``base`` is given for one that no adapter was merged into.
    """
    files = read_model_files(settings or state.folder)
    weights = read_weights(state.folder, files.config)
    fields = {
        "parameters": weights.parameters,
        "dimension": files.config.hidden_size,
        "dimensions": files.dimensions,
        "max_length": files.max_length,
        "shape": shape_of(files.config),
        "prompts": files.prompts,
        "versions": files.versions,
        "family": family_of(files.config),
        "adapter": merged_adapter(state, base),
    }
    return WholeModel(files, weights, fields)
