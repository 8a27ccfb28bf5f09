"""What every loaded model is checked for: a tokenizer with words, and weights that are finite.

What is wrong with a model in memory is a ``ValueError``: who loaded it knows its name and what to do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from training.common.errors import UserError, in_one_line

_NO_WORDS = "its tokenizer knows no token but special ones"
_SAVE_IT = "put the tokenizer.json of this model beside it"


def check_tokenizer(tokenizer: Any) -> None:
    """Refuses the tokenizer without words that transformers makes, without a message, where a folder has none.

    Args:
        tokenizer: The model's; only one of transformers is looked at.

    Raises:
        ValueError: If it has none but special and added tokens.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        added = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        if set(tokenizer.get_vocab()) <= added:
            raise ValueError(f"{_NO_WORDS}; {_SAVE_IT}")


def check_tokenizer_file(folder: Path) -> None:
    """The same for a folder whose tokenizer is copied or converted, but not loaded.

    Raises:
        UserError: If ``tokenizer.json`` is missing, damaged or has no words.
    """
    path = folder / "tokenizer.json"
    try:
        words = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    except FileNotFoundError:
        raise UserError(f"{folder}: the model has no tokenizer.json; {_SAVE_IT}") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: is no tokenizer ({in_one_line(error)}); {_SAVE_IT}") from None
    if not words:
        raise UserError(f"{path}: {_NO_WORDS}; {_SAVE_IT}")


def check_finite(model: nn.Module) -> None:
    """Refuses weights that are NaN or infinite.

    Every weight is read once, which costs a part of what loading did: 0.04 s for a GB, 1.3 s for 8 billion in fp32.

    Raises:
        ValueError: If one is not finite.
    """
    for name, weight in model.named_parameters():
        if not is_finite(weight.detach()):
            raise ValueError(
                f"its weight {name} is NaN or infinite in {weight.dtype}; take an earlier state of the model"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether no element of a tensor is NaN or infinite; one of whole numbers is."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # Both ends are NaN if one element is; isfinite itself would need a copy of the tensor.
    return bool(torch.stack(tensor.aminmax()).isfinite().all())
