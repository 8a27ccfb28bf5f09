r"""How a teacher with a tokenizer of its own wants its texts: where the instruction stands, if it reads one at all.

Texts are kept as the student reads them. The defaults hand them on unchanged; a teacher of another family wants other
templates, such as ``"query: {text}"`` and ``"passage: {text}"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter

from modeling_f2llm.prompts import TEMPLATE
from training.common.errors import UserError
from training.data.instructions import split_instruction

_UNCHANGED = TEMPLATE + "{text}"


@dataclass(frozen=True)
class TextFormat:
    r"""Templates of a teacher's texts.

    Attributes:
        query_template: Of texts that carry an instruction; ``{text}`` stands for the text without it and
            ``{instruction}``, which may be left out, for the instruction.
        document_template: Of texts that carry none; ``{text}`` stands for the text.

    Raises:
        UserError: If a template lacks ``{text}`` or has another field.

    Example:
        >>> form = TextFormat("query: {text}", "passage: {text}")
        >>> form.apply("Instruct: Find the answer.\nQuery: Why?"), form.apply("Because.")
        ('query: Why?', 'passage: Because.')
    """

    query_template: str = _UNCHANGED
    document_template: str = "{text}"

    def __post_init__(self) -> None:
        _check("teacher_query_template", self.query_template, ("text", "instruction"))
        _check("teacher_document_template", self.document_template, ("text",))

    def apply(self, text: str) -> str:
        """A text as the teacher reads it.

        Args:
            text: The text as the student reads it, with or without an instruction before it.
        """
        instruction, bare = split_instruction(text)
        if instruction is not None and self.query_template == _UNCHANGED:
            # A text may have brought its instruction in another template.
            return text
        if instruction is None:
            return self.document_template.format(text=text)
        return self.query_template.format(text=bare, instruction=instruction)


def _check(key: str, template: str, known: tuple[str, ...]) -> None:
    fields = " and ".join(f"{{{name}}}" for name in known)
    try:
        found = [field[1:] for field in Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise UserError(f"key {key!r}: {template!r} is no template ({error}); write {{{{ and }}}} for braces") from None
    for name, specification, conversion in found:
        if name not in known or specification or conversion:
            whole = name + (f"!{conversion}" if conversion else "") + (f":{specification}" if specification else "")
            raise UserError(f"key {key!r}: {template!r} has the field {{{whole}}}; it may have {fields} only")
    if "text" not in [name for name, _, _ in found]:
        raise UserError(f"key {key!r}: {template!r} lacks {{text}}, the place of the text; add it")
