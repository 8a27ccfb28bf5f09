"""What preparation may be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from training.common.errors import UserError

# Stop at the first bad row, or put bad rows aside with the reason.
ON_BAD_ROW = ("error", "quarantine")


def required_negatives(counts: Mapping[str, int], task_type: str, columns: int) -> int:
    """Negatives that every row of a source must have, and that are drawn for it.

    Retrieval learns from the other rows of a batch, too: a source without negative columns trains without.

    Args:
        counts: What was asked for, by task type.
        task_type: The source's.
        columns: Negative columns of the source.
    """
    return 0 if columns == 0 and task_type == "retrieval" else counts[task_type]


@dataclass(frozen=True)
class PreparationOptions:
    """How sources are prepared.

    Attributes:
        max_length: Tokens of a text at most, EOS included; longer texts are cut and still end with EOS.
        instructions: Whether queries carry their source's instruction (stage 2) or are raw (stage 1).
        document_instruction_share: Share of the documents of symmetric sources that carry it too.
        validation_share: Share of the rows kept for validation.
        num_hard_negatives: Negatives that a row must have, by task type; see :func:`required_negatives`.
        seed: Seed of all draws.
        on_bad_row: One of ``ON_BAD_ROW``.
        text_forms: Whether a number for the normal form of each text is kept, which texts in another spelling share.
            With ``mask_duplicates`` they count as one.
        keep_texts: Whether the texts themselves are kept beside their tokens, for teachers that read other tokens. It
            changes nothing else of what is prepared.

    Raises:
        UserError: If a value is out of its range.
    """

    max_length: int = 1024
    instructions: bool = True
    document_instruction_share: float = 0.3
    validation_share: float = 0.01
    num_hard_negatives: tuple[tuple[str, int], ...] = (("retrieval", 7), ("clustering", 9), ("classification", 1))
    seed: int = 0
    on_bad_row: str = "error"
    keep_texts: bool = False
    text_forms: bool = False

    def __post_init__(self) -> None:
        if self.on_bad_row not in ON_BAD_ROW:
            raise UserError(f"on_bad_row cannot be {self.on_bad_row!r}; use one of {', '.join(ON_BAD_ROW)}")
        if self.max_length < 1:
            raise UserError(f"max_length must be at least 1, got {self.max_length}")
        for name in ("validation_share", "document_instruction_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise UserError(f"seed must be at least 0, got {self.seed}")
        for task_type, number in self.num_hard_negatives:
            if number < 0:
                raise UserError(f"num_hard_negatives_{task_type} must be at least 0, got {number}")
