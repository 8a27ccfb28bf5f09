"""The form in which a model reads a text: as it is, or under its source's instruction."""

from __future__ import annotations

from training.common.keyed import keyed_uniform, text_key
from training.data.instructions import split_instruction, with_instruction, without_instruction
from training.data.manifest import Source
from training.data.options import PreparationOptions
from training.data.preparation.plan import DOCUMENT_INSTRUCTION


class TextForms:
    """Puts queries, and a share of the documents of symmetric sources, under the instruction.

    Whether a document carries it is drawn per text rather than per row: under one instruction a text keeps one form,
    and so stays one text.
    """

    def __init__(self, source: Source, options: PreparationOptions) -> None:
        self._instruction = source.instruction if options.instructions else None
        self._share = options.document_instruction_share if source.symmetric and options.instructions else 0.0
        self._key = (options.seed, DOCUMENT_INSTRUCTION, text_key(source.name))

    def query(self, text: str) -> str:
        """The form of a query."""
        # Published files may carry the instruction in the text already: it is neither added twice nor part of raw text.
        if self._instruction is None:
            return without_instruction(text)
        return with_instruction(self._instruction, text)

    def document(self, text: str, instruction: str | None = None) -> str:
        """The form of a passage or negative.

        Args:
            text: The text.
            instruction: What the query of its row brings along; the source's instruction if None.
        """
        if self._instruction is None:
            return without_instruction(text)
        drawn = self._share and keyed_uniform(*self._key, text_key(text)) < self._share
        return with_instruction(instruction or self._instruction, text) if drawn else text

    def brought(self, query: str) -> str | None:
        """The instruction that a query brings along, if documents are to carry it."""
        return split_instruction(query)[0] if self._share else None
