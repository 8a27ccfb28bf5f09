"""The teacher of a distillation: embeds the texts of each batch as the student meets them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from training.errors import UserError, in_one_line
from training.gradient_cache import embed_batch
from training.loading import load_whole_model

__all__ = ["Teacher", "load_teacher"]


class Teacher:
    """A frozen model over the student's own tokens.

    Args:
        model: The teacher; it must know the student's tokens.
        width: Leading dimensions that the student learns from.

    Raises:
        UserError: If the teacher has fewer dimensions.
    """

    def __init__(self, model: PreTrainedModel, width: int) -> None:
        if model.config.hidden_size < width:
            raise UserError(
                f"key 'teacher': its {model.config.hidden_size} dimensions do not cover the student's {width}; "
                "choose a wider teacher"
            )
        self.model = model.eval().requires_grad_(False)
        self.width = width

    def embed(self, batch: dict[str, Any]) -> Tensor:
        """``(n, width)`` embeddings of the batch's distinct texts, on every process."""
        self.model.to(batch["input_ids"].device)
        return embed_batch(self.model, batch, self.width)


def load_teacher(name: str, tokenizer: PreTrainedTokenizerBase, width: int, **model_options: Any) -> Teacher:
    """Loads a teacher and makes sure that the same ids mean the same tokens to it.

    Args:
        name: Folder or Hub name.
        tokenizer: The student's tokenizer.
        width: The student's width.
        **model_options: Those of ``F2LLMModel.from_pretrained``.

    Raises:
        UserError: If the teacher cannot be loaded, reads other tokens, or is narrower than the student.
    """
    try:
        model = load_whole_model(name, **model_options)
        vocabulary = AutoTokenizer.from_pretrained(name).get_vocab()
    # Damaged folders come out of the libraries as anything.
    except Exception as error:
        raise UserError(f"key 'teacher': {name!r} cannot be used: {in_one_line(error)}") from None
    if vocabulary != tokenizer.get_vocab():
        raise UserError(f"key 'teacher': {name!r} reads other tokens than the student; both need one tokenizer")
    return Teacher(model, width)
