"""LoRA and DoRA adapters: peft's layers in the place of a model's projections, whose own weights stay as they are.

peft changes an :class:`~modeling_f2llm.modeling_f2llm.F2LLMModel` in place, through transformers' ``add_adapter`` and
``load_adapter``: it stays one, runs packed, and its ``save_pretrained`` writes the adapter alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from training.common.errors import UserError, in_one_line
from training.config.lora_arguments import LORA_TARGETS
from training.models.adapter_folder import AdapterFolder, find_adapter
from training.models.model_identity import model_file

if TYPE_CHECKING:
    from peft import LoraConfig

    from training.config.arguments import StageArguments

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Of a model's only adapter, in peft and here.
ADAPTER_NAME = "default"
_RANK = 16
# Of peft, in the names of saved weights.
_PREFIX = "base_model.model."
_MAGNITUDE, _WEIGHT = ".lora_magnitude_vector", ".weight"
# Keys of a recipe and what peft calls them.
_FIELDS = {
    **{"lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"},
    **{"lora_target_modules": "target_modules", "lora_dora": "use_dora", "lora_rslora": "use_rslora"},
}


def require_peft() -> None:
    """Makes sure that adapters can be used.

    Raises:
        UserError: If peft is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(f'adapters need peft ({error}); install it with: pip install -e ".[train,lora]"') from None


def adapter_config(args: StageArguments) -> LoraConfig | None:
    """What a stage's adapter is like: that of ``model`` if it is one, else as the keys say; None without ``lora``.

    Raises:
        UserError: If peft is not installed, or a key contradicts the adapter whose training goes on.
    """
    if not args.lora:
        return None
    require_peft()
    from peft import LoraConfig

    started = find_adapter(args.model)
    if started is not None:
        return _config_of(started, args)
    rank = args.lora_rank or _RANK
    return LoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=rank,
        lora_alpha=args.lora_alpha or 2 * rank,
        lora_dropout=args.lora_dropout or 0.0,
        target_modules=sorted(args.lora_target_modules or LORA_TARGETS),
        use_dora=args.lora_dora,
        use_rslora=args.lora_rslora,
    )


def _config_of(adapter: AdapterFolder, args: StageArguments) -> LoraConfig:
    config = _lora_config(adapter)
    for key in args.lora_keys:
        wanted, found = getattr(args, key), getattr(config, _FIELDS[key])
        if key == "lora_target_modules":
            wanted, found = sorted(wanted), sorted(found)
        if wanted != found:
            raise UserError(
                f"key {key!r} is {wanted}, but the adapter {adapter.name}, whose training is to go on, has {found}; "
                "take the key out, or start from its base"
            )
    return config


def add_adapter(model: PreTrainedModel, config: LoraConfig) -> None:
    """Gives a model a new adapter, at first without effect; all its other weights are frozen.

    Args:
        model: Changed in place.
        config: The adapter's; it names the model as its base, unless it names one already.

    Raises:
        UserError: If the model has no linear layer of a name that is to be adapted.
    """
    _check_targets(model, config)
    base = config.base_model_name_or_path or _place(model.name_or_path)
    model.add_adapter(config, ADAPTER_NAME)
    _settle(model, base)


def attach_adapter(model: PreTrainedModel, adapter: AdapterFolder, trainable: bool) -> None:
    """Gives a model an adapter that was saved.

    Args:
        model: The adapter's base, changed in place.
        adapter: The adapter.
        trainable: Whether it is to be trained further; otherwise nothing is.

    Raises:
        UserError: If the adapter is damaged or does not fit the model.
    """
    require_peft()
    config, weights = _lora_config(adapter), model_file(adapter.name, ADAPTER_WEIGHTS, adapter.revision)
    if weights is None:
        raise UserError(f"{adapter.name}: the adapter lacks {ADAPTER_WEIGHTS}; save it again")
    try:
        model.add_adapter(config, ADAPTER_NAME)
        read_adapter(model, weights)
    # Shapes that do not fit, targets that are not there: each comes out of the libraries as an error of its own.
    except Exception as error:
        raise UserError(
            f"{adapter.name}: the adapter does not fit {model.name_or_path} ({in_one_line(error)}); it was trained on "
            f"{adapter.base}: give that model, or an adapter of this one"
        ) from None
    _settle(model, adapter.base)
    if not trainable:
        model.requires_grad_(False)


def _lora_config(adapter: AdapterFolder) -> LoraConfig:
    from peft import LoraConfig, PeftConfig

    try:
        config = PeftConfig.from_pretrained(adapter.name, revision=adapter.revision)
    # Damaged files come out of the library as anything.
    except Exception as error:
        raise UserError(f"{adapter.name}: the adapter cannot be used: {in_one_line(error)}") from None
    if not isinstance(config, LoraConfig):
        raise UserError(f"{adapter.name}: an adapter of type {config.peft_type.value}; only LoRA and DoRA are known")
    # Adapters are saved as finished ones.
    config.inference_mode = False
    return config


def _settle(model: PreTrainedModel, base: str) -> None:
    config = model.peft_config[ADAPTER_NAME]
    config.base_model_name_or_path = base
    # A set, whose order changes from run to run.
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)


def _place(name: str) -> str:
    """A folder by its whole path, from wherever the adapter is loaded; a Hub name as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _check_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    known = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    unknown = sorted(set(config.target_modules) - set(known))
    if unknown:
        raise UserError(
            f"key 'lora_target_modules': the model has no linear layer {unknown[0]!r}; it has {', '.join(known)}"
        )


def has_adapter(model: Any) -> bool:
    """Whether a model, not wrapped, has an adapter."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def adapter_draws_dropout(model: Any) -> bool:
    """Whether an adapter of the model draws dropout in training."""
    return has_adapter(model) and any(config.lora_dropout for config in model.peft_config.values())


def read_adapter(model: PreTrainedModel, path: Path) -> None:
    """Puts saved weights into a model's adapter.

    Raises:
        ValueError: If they are not those of such an adapter.
        RuntimeError: If their shapes do not fit.
    """
    from peft import set_peft_model_state_dict

    weights = {key.removeprefix(_PREFIX): value for key, value in load_file(path).items()}
    if {_as_peft_saves(key) for key in weights} != model.get_adapter_state_dict(ADAPTER_NAME).keys():
        raise ValueError(f"{path}: holds the weights of another adapter")
    set_peft_model_state_dict(model, weights, ADAPTER_NAME)


def lacking_weight(model: PreTrainedModel, path: Path) -> str | None:
    """A weight of a model's adapter that a saved file lacks; None if it has all."""
    with safe_open(path, framework="pt") as stored:
        held = {_as_peft_saves(key.removeprefix(_PREFIX)) for key in stored.keys()}
    wanted = map(_as_peft_saves, model.get_adapter_state_dict(ADAPTER_NAME))
    return min((key for key in wanted if key not in held), default=None)


def mend_saved(folder: Path) -> None:
    """Makes an adapter's folder, just saved, one that all libraries load.

    peft leaves the last part of the names of DoRA's magnitudes out. It reads them with and without; transformers, and
    sentence-transformers through it, reads them only with, and takes the base's where it finds none.
    """
    weights = load_file(folder / ADAPTER_WEIGHTS)
    if any(key.endswith(_MAGNITUDE) for key in weights):
        whole = {_whole_name(key): value for key, value in weights.items()}
        save_file(whole, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    # The base brings the code.
    for path in folder.glob("*.py"):
        path.unlink()


def saved_name(name: str) -> str:
    """How a weight of an adapter's state is called in a file."""
    return _PREFIX + _whole_name(name)


def _whole_name(name: str) -> str:
    return f"{name}{_WEIGHT}" if name.endswith(_MAGNITUDE) else name


def _as_peft_saves(key: str) -> str:
    return key.removesuffix(_WEIGHT) if key.endswith(_MAGNITUDE + _WEIGHT) else key


def merge(model: PreTrainedModel) -> None:
    """Adds an adapter to the weights that it adapts; the model is then one without adapter, in the same classes.

    Raises:
        ValueError: If a sum is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, layer in layers.items():
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    model.delete_adapter(ADAPTER_NAME)
