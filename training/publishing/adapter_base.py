"""The base of an adapter that is released: its name on the Hub, and whether that is what the adapter was trained on."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.errors import UserError, in_one_line
from training.models.adapter_folder import AdapterFolder, base_revision
from training.publishing.record import Reference
from training.publishing.states import COMMIT, read_json
from training.publishing.weights import DTYPES, Weights, read_weights

logger = logging.getLogger("training")


@dataclass(frozen=True)
class BaseModel:
    """A model on this machine that adapters adapt.

    Attributes:
        folder: Where it lies.
        config: Its shape.
        weights: Its weights, not loaded.
    """

    folder: Path
    config: F2LLMConfig
    weights: Weights

    @property
    def code(self) -> tuple[str, ...]:
        """The files of remote code that ``auto_map`` names."""
        named = read_json(self.folder / "config.json").get("auto_map") or {}
        return tuple(sorted({f"{target.rpartition('.')[0]}.py" for target in named.values()}))

    @property
    def has_code(self) -> bool:
        """Whether they are here: the Hub's client fetches them when they are asked for."""
        return all((self.folder / file).is_file() for file in self.code)


@dataclass(frozen=True)
class FoundBase:
    """What the release of an adapter says of its base.

    Attributes:
        reference: Its name on the Hub; of a merged adapter's base also another.
        match: As in :class:`~training.publishing.record.AdapterRecord`.
        model: The model of that name; None if it is not at hand.
        trained_on: What the adapter was trained on, if that is at hand.
    """

    reference: Reference
    match: str
    model: BaseModel | None = None
    trained_on: BaseModel | None = None


def is_hub_name(name: str) -> bool:
    """Whether a name is formed like one on the Hub, owner and all, and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not Path(name).is_dir()


def read_base(folder: Path) -> BaseModel:
    """Looks at a base's folder.

    Raises:
        UserError: If it holds no whole model of these shapes.
    """
    try:
        config = F2LLMConfig.from_pretrained(folder, local_files_only=True)
        return BaseModel(folder, config, read_weights(folder, config))
    # Damaged files come out of the library as anything.
    except Exception as error:
        # What an error of our own says to do is for a run that is packed.
        why = in_one_line(error).partition("; ")[0]
        raise UserError(f"{folder}: holds no model that can be a base ({why})") from None


def base_at_hand(name: str, revision: str | None = None) -> BaseModel | None:
    """A model of the Hub in the client's cache; None if it is not there, or not whole.

    Args:
        name: On the Hub.
        revision: Commit; the main branch as it was last seen if None.
    """
    try:
        return read_base(Path(snapshot_download(name, revision=revision, local_files_only=True)))
    # What the Hub's client raises differs with what is missing and the version.
    except Exception as error:
        logger.debug("%s is not at hand (%s)", name, in_one_line(error))
        return None


def find_base(adapter: AdapterFolder, given: str | None = None) -> FoundBase:
    """The name on the Hub of an adapter's base.

    Args:
        adapter: The adapter.
        given: The name, where the adapter names a folder.

    Raises:
        UserError: If there is no such name, or the model of that name has other weights.
    """
    name = given or adapter.base
    if not is_hub_name(name):
        if given is None:
            raise UserError(
                f"{adapter.name}: adapts {adapter.base}, which is a folder of this machine; say under which name that "
                "model is on the Hub: --base ORG/NAME"
            )
        raise UserError(f"--base {given!r}: is no name on the Hub; give the owner and the name: --base ORG/NAME")
    if name == adapter.base:
        commit = adapter.base_revision if COMMIT.fullmatch(adapter.base_revision or "") else None
        model = base_at_hand(name, commit)
        return FoundBase(Reference("hub", name, commit), "trained", model, model)
    model, trained_on = base_at_hand(name), _trained_on(adapter)
    match = "stated" if model is None else _match(adapter, name, model, trained_on)
    commit = None if model is None else model.folder.name
    return FoundBase(Reference("hub", name, commit), match, model, trained_on)


def _trained_on(adapter: AdapterFolder) -> BaseModel | None:
    """What an adapter was trained on, if it is at hand as it was then."""
    if not Path(adapter.base).is_dir():
        noted = adapter.base_revision or ""
        return base_at_hand(adapter.base, noted) if is_hub_name(adapter.base) and COMMIT.fullmatch(noted) else None
    if adapter.base_revision not in (None, base_revision(adapter.base, "the base")):
        logger.warning("%s: was changed since %s was trained on it", adapter.base, adapter.name)
        return None
    return read_base(Path(adapter.base))


def _match(adapter: AdapterFolder, name: str, model: BaseModel, trained_on: BaseModel | None) -> str:
    if adapter.base_revision is not None and base_revision(str(model.folder), "--base") == adapter.base_revision:
        return "same"
    if trained_on is None and adapter.base_revision is None:
        return "stated"
    if trained_on is None:
        raise UserError(
            f"--base {name}: its weights are not those that {adapter.name} was trained on, byte by byte, and "
            f"{adapter.base} is no longer there to compare them one by one; put it back, or give its own base"
        )
    different = _difference(trained_on.weights, model.weights)
    if different is not None:
        raise UserError(
            f"--base {name}: {different} differs from that of {adapter.base}, which {adapter.name} was trained on; "
            "give the name of that model"
        )
    return "same" if model.weights.dtype == trained_on.weights.dtype else "rounded"


def _difference(trained: Weights, published: Weights) -> str | None:
    """The first weight that is another one when it is rounded to the published dtype; no more than one is in memory."""
    with ExitStack() as stack:
        opened = {
            (weights.folder, file): stack.enter_context(safe_open(weights.folder / file, framework="pt"))
            for weights in (trained, published)
            for file in set(weights.files.values())
        }
        for name in sorted({*trained.shapes, *published.shapes}):
            if trained.shapes.get(name) != published.shapes.get(name):
                return f"the shape of {name}"
            one, other = (opened[each.folder, each.files[name]].get_tensor(name) for each in (trained, published))
            if not torch.equal(one.to(DTYPES.get(published.dtype, other.dtype)), other):
                return name
    return None
