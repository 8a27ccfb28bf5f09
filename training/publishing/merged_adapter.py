"""The adapter that was merged into a run's model, as far as that is at hand."""

from __future__ import annotations

from pathlib import Path

from training.common.errors import UserError
from training.common.run_folder import FINAL_MODEL, numbered_checkpoints, public_name
from training.models.adapter_folder import MERGED_ADAPTER, AdapterFolder
from training.publishing.adapter_base import find_base, is_hub_name
from training.publishing.adapter_model import ADAPTER_CONFIG, adapter_fields, adapter_parameters
from training.publishing.record import AdapterRecord, Reference
from training.publishing.states import COMMIT, ModelState, read_json


def merged_adapter(state: ModelState, base: str | None = None) -> AdapterRecord | None:
    """What a release tells of the adapter that was merged; None if none was.

    Args:
        state: The run's state.
        base: Name of the adapter's base on the Hub, where it was a folder.

    Raises:
        UserError: If ``base`` is given and no adapter was merged, is no name, or has other weights.
    """
    path = state.folder / MERGED_ADAPTER
    if not path.is_file():
        if base is not None:
            raise UserError(f"--base {base}: {state.folder} is no adapter, nor was one merged into it; leave it out")
        return None
    try:
        told = read_json(path)["base"]
        name, revision = told["name"], told["revision"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({type(error).__name__}: {error}); merge the adapter again") from None
    reference, match = _base(AdapterFolder(str(state.folder), name, revision), base)
    # All states of a run have adapters of one kind.
    folders = [state.run / FINAL_MODEL, *numbered_checkpoints(state.run)]
    for folder in folders:
        if (folder / ADAPTER_CONFIG).is_file():
            fields = adapter_fields(read_json(folder / ADAPTER_CONFIG))
            return AdapterRecord(reference, match, **fields, parameters=adapter_parameters(folder), merged=True)
    return AdapterRecord(reference, match, merged=True)


def _base(merged: AdapterFolder, base: str | None) -> tuple[Reference, str]:
    if base is not None:
        found = find_base(merged, base)
        return found.reference, found.match
    if is_hub_name(merged.base):
        commit = merged.base_revision if COMMIT.fullmatch(merged.base_revision or "") else None
        return Reference("hub", merged.base, commit), "trained"
    # `runs/big/model` says more as `big`.
    place = Path(merged.base)
    return Reference("local", public_name(str(place.parent if place.name == FINAL_MODEL else place))), "trained"
