"""What a merged model was merged from: states of runs, and models of which no more than the name is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.common.run_folder import FINAL_MODEL
from training.models.merging.record import find_beside, read_merge
from training.publishing.record import Reference
from training.publishing.states import ModelState, state_of


@dataclass(frozen=True)
class MergedParent:
    """A model that was merged.

    Attributes:
        reference: What may be told of it, if it is no stage of the lineage.
        state: The model itself, if a run or a merge made it and it is on this machine as it was.
        place: Folder or name on the Hub; empty if neither is known.
    """

    reference: Reference
    state: ModelState | None
    place: str


def merged_parents(merged: ModelState) -> list[MergedParent]:
    """The models that were merged, in order.

    Raises:
        UserError: If the record of the merge, or a model in a parent's place, is damaged.
    """
    return [_parent(merged.folder, told) for told in read_merge(merged.folder)["parents"]]


def _parent(folder: Path, told: Mapping[str, Any]) -> MergedParent:
    reference = Reference("hub" if "revision" in told else "local", told["name"], told.get("revision"))
    place = find_beside(folder, told)
    named = told["name"] if "revision" in told else ""
    return MergedParent(reference, None if place is None else state_of(place), str(place or named))


def newest_of_runs(states: Iterable[ModelState]) -> dict[Path, ModelState]:
    """Of each run the last of its states: earlier ones came about in the same training."""
    newest: dict[Path, ModelState] = {}
    for state in states:
        known = newest.get(state.run.resolve())
        if known is None or _age(state) > _age(known):
            newest[state.run.resolve()] = state
    return newest


def _age(state: ModelState) -> float:
    """Steps of a checkpoint; a finished model is later than any."""
    name = state.folder.name
    return float(name.rpartition("-")[2]) if name != FINAL_MODEL and not state.merges else float("inf")


def merge_arguments(merged: ModelState) -> dict[str, Any]:
    """How models were merged, and what each of them counts."""
    record = read_merge(merged.folder)
    parents = record["parents"]
    return {
        "method": record["method"],
        "models": [parent["name"] for parent in parents],
        "weights": [parent["weight"] for parent in parents],
    }
