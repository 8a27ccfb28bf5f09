"""Instructions before texts: published files may contain one in the query, and teachers may want other templates."""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import Formatter

from modeling_f2llm.prompts import TEMPLATE, instruct
from training.common.errors import UserError

# The templates of F2LLM and of Qwen3-Embedding (which has no space before the text); Windows lines end in \r\n. The
# shortest instruction is taken: what follows the first "Query:" is the text.
_INSTRUCTED = re.compile(r"Instruct: (.*?)\r?\nQuery: ?", re.DOTALL)
_UNCHANGED = TEMPLATE + "{text}"


def split_instruction(text: str) -> tuple[str | None, str]:
    r"""Split a text into its instruction, if it has one, and the text alone.

    Example:
        >>> split_instruction("Instruct: Find the answer.\nQuery: Why?")
        ('Find the answer.', 'Why?')
        >>> split_instruction("Why?")
        (None, 'Why?')
    """
    found = _INSTRUCTED.match(text)
    return (found[1], text[found.end() :]) if found else (None, text)


def with_instruction(instruction: str, text: str) -> str:
    """Put an instruction before a text that has none; an existing one stays."""
    return text if _INSTRUCTED.match(text) else instruct(instruction, text)


def without_instruction(text: str) -> str:
    """Return the text alone, as a stage that trains on raw text reads it."""
    return split_instruction(text)[1]


@dataclass(frozen=True)
class TextFormat:
    r"""Templates for a teacher that has another tokenizer; the defaults change nothing.

    Attributes:
        query_template: For texts with an instruction: ``{text}`` is the text without it and ``{instruction}``, which
            may be left out, the instruction.
        document_template: For texts without an instruction: ``{text}`` is the text.

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
        """Return a text of the student, with or without an instruction, as the teacher reads it."""
        instruction, bare = split_instruction(text)
        if instruction is None:
            return self.document_template.format(text=text)
        # Also if its instruction has another template.
        if self.query_template == _UNCHANGED:
            return text
        return self.query_template.format(text=bare, instruction=instruction)


def _check(key: str, template: str, known: tuple[str, ...]) -> None:
    try:
        found = [field[1:] for field in Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise UserError(f"key {key!r}: {template!r} is no template ({error}); write {{{{ and }}}} for braces") from None
    for name, specification, conversion in found:
        if name not in known or specification or conversion:
            whole = name + (f"!{conversion}" if conversion else "") + (f":{specification}" if specification else "")
            fields = " and ".join(f"{{{name}}}" for name in known)
            raise UserError(f"key {key!r}: {template!r} has the field {{{whole}}}; it may have {fields} only")
    if "text" not in [name for name, _, _ in found]:
        raise UserError(f"key {key!r}: {template!r} lacks {{text}}, where the text goes; add it")
