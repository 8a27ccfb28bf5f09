"""Which weights an adapter of a model has, without making them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3Model

from training.common.errors import UserError, in_one_line
from training.models.adapter import ADAPTER_NAME, require_peft, saved_name


def expected_shapes(folder: Path, config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's weights, by the names under which they are saved.

    Args:
        folder: The adapter's; its ``adapter_config.json`` says what it adapts.
        config: The base's shape.

    Raises:
        UserError: If peft is not installed, or cannot make such an adapter of that shape.
    """
    require_peft()
    from peft import PeftConfig

    try:
        own = PeftConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = Qwen3Model(config)
            model.add_adapter(own, ADAPTER_NAME)
            weights = model.get_adapter_state_dict(ADAPTER_NAME)
    # Each fault of a configuration comes out of the library as an error of its own.
    except Exception as error:
        raise UserError(f"{folder}: the adapter does not fit its base ({in_one_line(error)})") from None
    return {saved_name(name): tuple(weight.shape) for name, weight in weights.items()}
