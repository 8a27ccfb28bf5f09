"""An adapter that is released or was merged into a released model, and its base on the Hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import AutoTokenizer

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.errors import UserError, in_one_line
from training.common.run_folder import FINAL_MODEL, numbered_checkpoints, public_name
from training.models.adapters import ADAPTER_WEIGHTS, expected_shapes
from training.models.merging import trained_widths
from training.models.model_folder import user_error
from training.models.model_ref import MERGED_ADAPTER, AdapterFolder, base_revision, find_adapter
from training.publishing.model_files import (
    ADAPTER_CONFIG,
    CONFIG,
    ModelToPack,
    copy_sentence_files,
    model_fields,
    read_sentence_files,
)
from training.publishing.record import AdapterRecord, Reference
from training.publishing.states import COMMIT, ModelState, is_hub_name, read_json
from training.publishing.weights import SAVED_DTYPES, Weights, read_weights, weights_digest

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

    @property
    def has_code(self) -> bool:
        """Whether these files are here; the Hub's client downloads them only on demand."""
        return all((self.folder / file).is_file() for file in self.code)


@dataclass(frozen=True)
class FoundBase:
    """The base of an adapter."""

    reference: Reference
    match: str  # as in AdapterRecord
    model: BaseModel | None = None  # the model of that name in the Hub's cache
    trained_on: BaseModel | None = None  # the model that the adapter was trained on, if it is on this machine


def read_base(folder: Path) -> BaseModel:
    """Look at the folder of a base, which must hold a whole model."""
    try:
        config = F2LLMConfig.from_pretrained(folder, local_files_only=True)
        return BaseModel(folder, config, read_weights(folder, config))
    # `from_pretrained` can raise any exception on a corrupt folder.
    except Exception as error:
        # The remedy in our own errors is about a run to be packed.
        why = in_one_line(error).partition("; ")[0]
        raise UserError(f"{folder}: holds no model that can be a base ({why})") from None


def cached_base(name: str, revision: str | None = None) -> BaseModel | None:
    """Return a complete model in the Hub's cache, at a commit or the latest one seen; None if there is none."""
    try:
        return read_base(Path(snapshot_download(name, revision=revision, local_files_only=True)))
    # The exception of the Hub's client depends on what is missing and on its version.
    except Exception as error:
        logger.debug("%s is not in the cache (%s)", name, in_one_line(error))
        return None


def find_base(adapter: AdapterFolder, given: str | None = None) -> FoundBase:
    """Find an adapter's base on the Hub, ``given`` by name for one that was trained on a folder, and compare both."""
    name = given or adapter.base
    if not is_hub_name(name):
        raise UserError(
            f"{adapter.name}: its base {name!r} is not a name on the Hub; give the owner and the name: --base ORG/NAME"
        )
    if name == adapter.base:
        commit = _commit(adapter)
        model = cached_base(name, commit)
        return FoundBase(Reference("hub", name, commit), "trained", model, model)
    model, trained_on = cached_base(name), _trained_on(adapter)
    if model is None:
        return FoundBase(Reference("hub", name), "stated", None, trained_on)
    return FoundBase(
        Reference("hub", name, model.folder.name), _match(adapter, name, model, trained_on), model, trained_on
    )


def _commit(adapter: AdapterFolder) -> str | None:
    """The commit of an adapter's base on the Hub, if training noted one."""
    return adapter.base_revision if COMMIT.fullmatch(adapter.base_revision or "") else None


def _trained_on(adapter: AdapterFolder) -> BaseModel | None:
    """The model that an adapter was trained on, if it is here and unchanged."""
    if not Path(adapter.base).is_dir():
        commit = _commit(adapter)
        return cached_base(adapter.base, commit) if commit and is_hub_name(adapter.base) else None
    if adapter.base_revision not in (None, base_revision(adapter.base, "the base")):
        logger.warning("%s: was changed since %s was trained on it", adapter.base, adapter.name)
        return None
    return read_base(Path(adapter.base))


def _match(adapter: AdapterFolder, name: str, model: BaseModel, trained_on: BaseModel | None) -> str:
    if adapter.base_revision is not None and base_revision(str(model.folder), "--base") == adapter.base_revision:
        return "same"
    if trained_on is None:
        if adapter.base_revision is None:
            return "stated"
        raise UserError(
            f"--base {name}: its weights are not those that {adapter.name} was trained on, byte by byte, and "
            f"{adapter.base} no longer exists to compare them one by one; restore it, or give another --base"
        )
    ours, theirs = trained_on.weights, model.weights
    # After rounding to the published dtype; one weight of each is in memory at a time.
    for weight in sorted({*ours.shapes, *theirs.shapes}):
        if ours.shapes.get(weight) != theirs.shapes.get(weight) or not torch.equal(
            ours.load(weight).to(getattr(torch, theirs.dtype)), theirs.load(weight)
        ):
            raise UserError(
                f"--base {name}: {weight} differs from that of {adapter.base}, which {adapter.name} was trained on; "
                "give the name of that model"
            )
    return "same" if theirs.dtype == ours.dtype else "rounded"


def read_adapter(state: ModelState, base: str | None = None) -> ModelToPack:
    """Look at the adapter of a run, and check that it fits its base; ``base`` is its name on the Hub, if not known."""
    folder = state.folder
    # A damaged adapter is reported before its base is searched.
    adapter_weights(folder)
    found = find_base(find_adapter(str(folder)), base)
    known = found.model or found.trained_on
    if known is None:
        logger.warning("%s: its base is not on this machine, so nothing is checked against it", folder)
    model = read_adapter_files(folder, known, found.reference.name)
    record = AdapterRecord(
        base=found.reference,
        match=found.match,
        **adapter_fields(read_json(folder / ADAPTER_CONFIG)),
        parameters=model.weights.parameters,
        base_weights=None if found.model is None else weights_digest(found.model.folder),
        base_code=known is not None and bool(known.code),
    )
    return replace(model, fields={**model.fields, "adapter": record})


def read_adapter_files(folder: Path, base: BaseModel | None, name: str | None = None) -> ModelToPack:
    """Look at an adapter, and check that it fits its base if that is known; ``name`` is what to call the base."""
    weights, config = adapter_weights(folder), read_json(folder / ADAPTER_CONFIG)
    sentences, modules = read_sentence_files(folder)
    with user_error(f"{folder}: cannot be read", "pack another state of the run"):
        length = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).model_max_length
        pooling = read_json(folder / "1_Pooling/config.json")
        width = pooling.get("embedding_dimension", pooling.get("word_embedding_dimension"))
    widths = trained_widths(read_json(folder / "training_arguments.json"), width)
    if base is not None:
        _check_fit(folder, weights, width, base)
        length = min(length, base.config.max_position_embeddings)
        widths = base.config.matryoshka_dimensions if widths is None else widths
    widths = (width, *(each for each in widths or () if each != width))
    versions = {**(sentences.get("__version__") or {}), "peft": config.get("peft_version") or "unknown"}
    prompts = dict(sentences.get("prompts") or {})
    fields = model_fields(weights, widths, int(length), base and base.config, prompts, versions)

    def copy_files(output: Path, _dtype: str) -> None:
        # The base is referenced by its name on the Hub, and has the code.
        named = {"base_model_name_or_path": name} if name else {}
        content = json.dumps({**config, **named, "inference_mode": True}, indent=2, sort_keys=True)
        (output / ADAPTER_CONFIG).write_text(f"{content}\n", encoding="utf-8")
        copy_sentence_files(folder, modules, output)

    return ModelToPack(weights, fields, copy_files)


def adapter_weights(folder: Path) -> Weights:
    """Look at the weights of an adapter."""
    path = folder / ADAPTER_WEIGHTS
    with user_error(f"{path}: damaged", "pack another state of the run"):
        tensors = load_file(path)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(SAVED_DTYPES):
        raise UserError(f"{path}: has weights of {', '.join(sorted(dtypes)) or 'no dtype'}; pack another state")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Weights(folder, dict.fromkeys(shapes, ADAPTER_WEIGHTS), shapes, dtypes.pop())


def _check_fit(folder: Path, weights: Weights, width: int, base: BaseModel) -> None:
    if base.config.hidden_size != width:
        raise UserError(
            f"{folder}: embeddings of {width} dimensions, but {base.folder} is {base.config.hidden_size} wide; give "
            "the adapter's own base"
        )
    expected = expected_shapes(folder, base.config)
    for name in sorted({*weights.shapes, *expected}):
        has, wants = (each.get(name, "absent") for each in (weights.shapes, expected))
        if has != wants:
            raise UserError(f"{folder}: weight {name} is {has}, its base wants {wants}; give the adapter's own")


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
        if base is not None:
            raise UserError(
                f"--base {base}: {state.folder} is not an adapter and has none merged into it; leave it out"
            )
        return None
    with user_error(f"{path}: is damaged", "merge the adapter again"):
        noted = read_json(path)["base"]
        merged = AdapterFolder(str(state.folder), noted["name"], noted["revision"])
    if base is not None:
        found = find_base(merged, base)
    elif is_hub_name(merged.base):
        found = FoundBase(Reference("hub", merged.base, _commit(merged)), "trained")
    else:
        found = FoundBase(local_reference(merged.base), "trained")
    fields: dict[str, Any] = {}
    # All states of a run have the same kind of adapter.
    for folder in (state.run / FINAL_MODEL, *numbered_checkpoints(state.run)):
        if (folder / ADAPTER_CONFIG).is_file():
            fields = adapter_fields(read_json(folder / ADAPTER_CONFIG))
            fields["parameters"] = adapter_weights(folder).parameters
            break
    return AdapterRecord(found.reference, found.match, **fields, merged=True)


def local_reference(path: str) -> Reference:
    """Return what may be published of a local model; ``runs/big/model`` is called ``big``."""
    folder = Path(path)
    return Reference("local", public_name(str(folder.parent if folder.name == FINAL_MODEL else folder)))
