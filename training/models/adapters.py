"""LoRA and DoRA adapters: peft's layers in a model, through transformers' ``add_adapter``.

The model keeps its class and weights, runs packed, and its ``save_pretrained`` writes the adapter alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3Model

from training.common.errors import UserError
from training.config.arguments import LORA_TARGETS
from training.models.model_folder import user_error
from training.models.model_ref import AdapterFolder, find_adapter, model_file

if TYPE_CHECKING:
    from peft import LoraConfig

    from training.config.arguments import StageArguments

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# The name that peft and this package give to a model's only adapter.
ADAPTER_NAME = "default"
_DEFAULT_RANK = 16
# In peft's names of saved weights.
_PREFIX = "base_model.model."
_MAGNITUDE = ".lora_magnitude_vector"
# peft's field of each key of a recipe.
_FIELDS = {"lora_rank": "r", "lora_target_modules": "target_modules", "lora_dora": "use_dora"}
_FIELDS |= {"lora_rslora": "use_rslora", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}


def require_peft() -> None:
    """Refuse to go on if peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(f'adapters need peft ({error}); install it with: pip install -e ".[train,lora]"') from None


def adapter_config(args: StageArguments) -> LoraConfig | None:
    """Return the configuration of a stage's adapter: that of ``model`` if it is one, else from the keys; or None."""
    if not args.lora:
        return None
    require_peft()
    from peft import LoraConfig

    given = {_FIELDS[key]: getattr(args, key) for key in args.lora_keys}
    started = find_adapter(args.model)
    if started is None:
        given = {"r": _DEFAULT_RANK, "target_modules": LORA_TARGETS, **given}
        given = {"lora_alpha": 2 * given["r"], **given, "target_modules": sorted(given["target_modules"])}
        return LoraConfig(task_type="FEATURE_EXTRACTION", **given)
    config = _saved_config(started)
    for key in args.lora_keys:
        wanted, found = given[_FIELDS[key]], getattr(config, _FIELDS[key])
        if (sorted(wanted) != sorted(found)) if key == "lora_target_modules" else (wanted != found):
            raise UserError(
                f"key {key!r} is {wanted}, but the adapter {started.name}, whose training is to go on, has {found}; "
                "take the key out, or start from its base"
            )
    return config


def add_adapter(model: PreTrainedModel, config: LoraConfig) -> None:
    """Give a model a new adapter, at first without effect, and freeze all its other weights."""
    known = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    if unknown := sorted(set(config.target_modules) - set(known)):
        raise UserError(f"key 'lora_target_modules': no linear layer is {unknown[0]!r}; there are {', '.join(known)}")
    # The whole path, so that the adapter can be loaded from any working directory.
    base = str(Path(model.name_or_path).resolve()) if Path(model.name_or_path).is_dir() else model.name_or_path
    base = config.base_model_name_or_path or base
    model.add_adapter(config, ADAPTER_NAME)
    _set_base(model, base)


def attach_adapter(model: PreTrainedModel, adapter: AdapterFolder, trainable: bool) -> None:
    """Give a model a saved adapter."""
    require_peft()
    config, weights = _saved_config(adapter), model_file(adapter.name, ADAPTER_WEIGHTS, adapter.revision)
    if weights is None:
        raise UserError(f"{adapter.name}: the adapter lacks {ADAPTER_WEIGHTS}; save it again")
    with user_error(f"{adapter.name}: the adapter does not fit {model.name_or_path}", "give it its own base"):
        model.add_adapter(config, ADAPTER_NAME)
        read_adapter(model, weights)
    _set_base(model, adapter.base)
    if not trainable:
        model.requires_grad_(False)


def _saved_config(adapter: AdapterFolder) -> LoraConfig:
    from peft import LoraConfig, PeftConfig

    with user_error(f"{adapter.name}: the adapter cannot be used"):
        config = PeftConfig.from_pretrained(adapter.name, revision=adapter.revision)
    if not isinstance(config, LoraConfig):
        raise UserError(f"{adapter.name}: an adapter of type {config.peft_type.value}; only LoRA and DoRA are known")
    # Adapters are saved with True.
    config.inference_mode = False
    return config


def _set_base(model: PreTrainedModel, base: str) -> None:
    config = model.peft_config[ADAPTER_NAME]
    config.base_model_name_or_path = base
    # peft makes names a set, whose order changes from run to run.
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)


def has_adapter(model: Any) -> bool:
    """Return whether an unwrapped model has an adapter."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def adapter_draws_dropout(model: Any) -> bool:
    """Return whether an adapter of the model draws dropout in training."""
    return has_adapter(model) and any(config.lora_dropout for config in model.peft_config.values())


def read_adapter(model: PreTrainedModel, path: Path) -> None:
    """Load saved weights into a model's adapter; ValueError or RuntimeError if they do not fit."""
    from peft import set_peft_model_state_dict

    weights = {key.removeprefix(_PREFIX): value for key, value in load_file(path).items()}
    found = set_peft_model_state_dict(model, weights, ADAPTER_NAME)
    if found.unexpected_keys or any("lora_" in key for key in found.missing_keys):
        raise ValueError(f"{path}: holds the weights of another adapter")


def mend_saved(folder: Path) -> None:
    """Make a folder that ``save_pretrained`` wrote for an adapter one that all libraries load.

    peft leaves ``.weight`` out of the names of DoRA's magnitudes. transformers reads them only with it, and silently
    keeps the base's otherwise.
    """
    weights = load_file(folder / ADAPTER_WEIGHTS)
    if any(key.endswith(_MAGNITUDE) for key in weights):
        whole = {_file_name(key): value for key, value in weights.items()}
        save_file(whole, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    # The base brings the code.
    for path in folder.glob("*.py"):
        path.unlink()


def _file_name(name: str) -> str:
    return f"{name}.weight" if name.endswith(_MAGNITUDE) else name


def expected_shapes(folder: Path, config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's weights, by their names in a file, without allocating them."""
    require_peft()
    from peft import PeftConfig

    with user_error(f"{folder}: the adapter does not fit its base"), torch.device("meta"):
        model = Qwen3Model(config)
        model.add_adapter(PeftConfig.from_pretrained(folder), ADAPTER_NAME)
        weights = model.get_adapter_state_dict(ADAPTER_NAME)
    return {_PREFIX + _file_name(name): tuple(weight.shape) for name, weight in weights.items()}


def merge_into_base(model: PreTrainedModel) -> None:
    """Add an adapter to the weights that it adapts, if they stay finite; the model is then one without adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, layer in layers.items():
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    model.delete_adapter(ADAPTER_NAME)
