"""Instructions before texts: published files may contain one in the query, and teachers may want other templates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from modeling_f2llm.prompts import DEFAULT_PROMPTS, TEMPLATE, instruct
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


def with_instruction(instruction: str | None, text: str, prompt: str = DEFAULT_PROMPTS["query"]) -> str:
    """Put an instruction, or a prompt if there is none, before a text without one; an existing one stays."""
    if _INSTRUCTED.match(text):
        return text
    return prompt + text if instruction is None else instruct(instruction, text)


def without_prompts(text: str, prompts: Sequence[str]) -> str:
    """Take the longest of some prompts that a text starts with off it."""
    return text[max((len(prompt) for prompt in prompts if text.startswith(prompt)), default=0) :]


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
        for name, known in (("query_template", {"text", "instruction"}), ("document_template", {"text"})):
            template = getattr(self, name)
            try:
                list(Formatter().parse(template))
            except ValueError as error:
                what = f"key 'teacher_{name}': {template!r} is no template ({error})"
                raise UserError(f"{what}; write {{{{ and }}}} for braces") from None
            fields = set(re.findall("{([^{}]*)}", template.replace("{{", "").replace("}}", "")))
            if "text" not in fields or not fields <= known:
                may = " and ".join(f"{{{each}}}" for each in sorted(known, reverse=True))
                what = f"key 'teacher_{name}': {template!r} lacks {{text}} or has another field"
                raise UserError(f"{what}; it may have {may} only")

    def apply(self, text: str) -> str:
        """Return a text of the student, with or without an instruction, as the teacher reads it."""
        instruction, bare = split_instruction(text)
        if instruction is None:
            return self.document_template.format(text=text)
        # Also if its instruction has another template.
        if self.query_template == _UNCHANGED:
            return text
        return self.query_template.format(text=bare, instruction=instruction)
