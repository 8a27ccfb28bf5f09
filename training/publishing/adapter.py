"""An adapter that is released or was merged into a released model, and its base on the Hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.errors import UserError
from training.common.run_folder import FINAL_MODEL, numbered_checkpoints, public_name
from training.models.adapters import expected_shapes
from training.models.merging import trained_widths
from training.models.model_folder import user_error
from training.models.model_ref import MERGED_ADAPTER, AdapterFolder, base_revision, find_adapter
from training.publishing.model_files import (
    ADAPTER_CONFIG,
    CONFIG,
    ModelFiles,
    Weights,
    adapter_weights,
    read_sentence_files,
    read_weights,
)
from training.publishing.record import AdapterRecord, Reference
from training.publishing.states import COMMIT, ModelState, is_hub_name, read_json

logger = logging.getLogger("training")


@dataclass(frozen=True)
class BaseModel:
    """A local model that adapters adapt; its weights are not loaded."""

    folder: Path
    config: F2LLMConfig
    weights: Weights

    @property
    def code(self) -> tuple[str, ...]:
        """The files of remote code that ``auto_map`` names."""
        named = read_json(self.folder / CONFIG).get("auto_map") or {}
        return tuple(sorted({f"{target.rpartition('.')[0]}.py" for target in named.values()}))


def read_base(folder: Path) -> BaseModel:
    """Look at the folder of a base, which must hold a whole model."""
    with user_error(f"{folder}: holds no model that can be a base"):
        config = F2LLMConfig.from_pretrained(folder, local_files_only=True)
        return BaseModel(folder, config, read_weights(folder, config))


def cached_base(name: str, revision: str | None = None) -> BaseModel | None:
    """Return a complete model in the Hub's cache, at a commit or the latest one seen; None if there is none."""
    # The exception of the Hub's client depends on what is missing and on its version.
    with suppress(Exception):
        return read_base(Path(snapshot_download(name, revision=revision, local_files_only=True)))
    return None


def find_base(adapter: AdapterFolder, given: str | None = None) -> tuple[Reference, str, BaseModel | None]:
    """Find an adapter's base on the Hub, ``given`` by name for one that was trained on a folder.

    Return it, how it is known to be what the adapter was trained on (as in :class:`AdapterRecord`), and the model of
    that name in the Hub's cache.
    """
    name = given or adapter.base
    if not is_hub_name(name):
        raise UserError(f"{adapter.name}: its base {name!r} is not a name on the Hub; give it with --base ORG/NAME")
    if name == adapter.base:
        commit = adapter.base_revision if COMMIT.fullmatch(adapter.base_revision or "") else None
        return Reference("hub", name, commit), "trained", cached_base(name, commit)
    model = cached_base(name)
    if model is None:
        return Reference("hub", name), "stated", None
    return Reference("hub", name, model.folder.name), _match(adapter, name, model), model


def _trained_on(adapter: AdapterFolder) -> BaseModel | None:
    here = Path(adapter.base).is_dir()
    unchanged = here and adapter.base_revision in (None, base_revision(adapter.base, "the base"))
    return read_base(Path(adapter.base)) if unchanged else None


def _match(adapter: AdapterFolder, name: str, model: BaseModel) -> str:
    noted = adapter.base_revision
    if noted is not None and base_revision(str(model.folder), "--base") == noted:
        return "same"
    trained_on = _trained_on(adapter)
    if trained_on is None and noted is None:
        return "stated"
    if trained_on is None or not _equal(trained_on.weights, model.weights):
        raise UserError(
            f"--base {name}: its weights are not those that {adapter.name} was trained on, or {adapter.base} is gone, "
            "with which they would be compared; give another --base"
        )
    return "same" if model.weights.dtype == trained_on.weights.dtype else "rounded"


def _equal(ours: Weights, theirs: Weights) -> bool:
    """Whether weights are equal after rounding to the dtype of ``theirs``; one of each is in memory at a time."""
    dtype = getattr(torch, theirs.dtype)
    return ours.shapes == theirs.shapes and all(
        torch.equal(ours.load(name).to(dtype), theirs.load(name)) for name in ours.shapes
    )


def read_adapter(state: ModelState, base: str | None = None) -> tuple[ModelFiles, AdapterRecord]:
    """Look at the adapter of a run, and check that it fits its base; ``base`` is its name on the Hub, if not known."""
    folder = state.folder
    adapter = find_adapter(str(folder))
    reference, match, on_hub = find_base(adapter, base)
    known = on_hub or _trained_on(adapter)
    if known is None:
        logger.warning("%s: its base is not on this machine, so nothing is checked against it", folder)
    files = read_adapter_files(folder, known, reference.name)
    record = AdapterRecord(
        base=reference,
        match=match,
        **adapter_fields(files.adapter),
        parameters=files.weights.parameters,
        base_weights=None if on_hub is None else base_revision(str(on_hub.folder), "the base"),
        base_code=known is not None and bool(known.code),
    )
    return files, record


def read_adapter_files(folder: Path, base: BaseModel | None, name: str | None = None) -> ModelFiles:
    """Look at an adapter, and check that it fits its base if that is known; ``name`` is what to call the base."""
    weights, config = adapter_weights(folder), read_json(folder / ADAPTER_CONFIG)
    sentences, modules = read_sentence_files(folder)
    with user_error(f"{folder}: cannot be read", "pack another state of the run"):
        length = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).model_max_length
        pooling = read_json(folder / "1_Pooling/config.json")
        width = pooling.get("embedding_dimension", pooling.get("word_embedding_dimension"))
    widths = trained_widths(read_json(folder / "training_arguments.json"), width)
    if base is not None:
        expected = expected_shapes(folder, base.config)
        for weight in sorted({*weights.shapes, *expected}):
            has, wants = (each.get(weight, "absent") for each in (weights.shapes, expected))
            if has != wants:
                raise UserError(f"{folder}: {weight} is {has}, its base wants {wants}; give the adapter's own base")
        length = min(length, base.config.max_position_embeddings)
        widths = base.config.matryoshka_dimensions if widths is None else widths
    versions = {**(sentences.get("__version__") or {}), "peft": config.get("peft_version") or "unknown"}
    return ModelFiles(
        folder,
        weights,
        base and base.config,
        dimensions=(width, *(each for each in widths or () if each != width)),
        max_length=int(length),
        sentences={**sentences, "__version__": versions},
        modules=modules,
        # The base is referenced by its name on the Hub, and has the code.
        adapter={**config, "base_model_name_or_path": name} if name else config,
    )


def adapter_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an adapter's record that its ``adapter_config.json`` gives."""
    targets = config.get("target_modules") or ()
    return {
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": (targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        "dora": bool(config.get("use_dora")),
        "rslora": bool(config.get("use_rslora")),
    }


def merged_adapter(state: ModelState, base: str | None = None) -> AdapterRecord | None:
    """Return the record of the adapter that was merged into a model, of a ``base`` on the Hub; None if none was."""
    path = state.folder / MERGED_ADAPTER
    if not path.is_file():
        if base is None:
            return None
        raise UserError(f"--base {base}: {state.folder} has no adapter, merged or not; leave it out")
    noted = read_json(path)["base"]
    merged = AdapterFolder(str(state.folder), noted["name"], noted["revision"])
    reference, match = local_reference(merged.base), "trained"
    if base is not None or is_hub_name(merged.base):
        reference, match, _ = find_base(merged, base)
    # All states of a run have the same kind of adapter.
    states = (state.run / FINAL_MODEL, *numbered_checkpoints(state.run))
    trained = next((folder for folder in states if (folder / ADAPTER_CONFIG).is_file()), None)
    fields = adapter_fields(read_json(trained / ADAPTER_CONFIG)) if trained else {}
    fields["parameters"] = adapter_weights(trained).parameters if trained else None
    return AdapterRecord(reference, match, **fields, merged=True)


def local_reference(path: str) -> Reference:
    """Return what may be published of a local model; ``runs/big/model`` is called ``big``."""
    folder = Path(path)
    return Reference("local", public_name(str(folder.parent if folder.name == FINAL_MODEL else folder)))
