"""Instructions inside texts: published files may carry one in the query already."""

from __future__ import annotations

import re

from modeling_f2llm.prompts import instruct

# Of the template of F2LLM and of that of Qwen3-Embedding, which has no space before the text; lines of Windows may end
# in two characters. The shortest instruction that fits: what follows the first "Query:" is the text.
_INSTRUCTED = re.compile(r"Instruct: (.*?)\r?\nQuery: ?", re.DOTALL)


def split_instruction(text: str) -> tuple[str | None, str]:
    r"""Takes the instruction off a text.

    Example:
        >>> split_instruction("Instruct: Find the answer.\nQuery: Why?")
        ('Find the answer.', 'Why?')
        >>> split_instruction("Instruct: Find the answer.\nQuery:Why?")
        ('Find the answer.', 'Why?')
        >>> split_instruction("Why?")
        (None, 'Why?')
    """
    found = _INSTRUCTED.match(text)
    return (found[1], text[found.end() :]) if found else (None, text)


def with_instruction(instruction: str, text: str) -> str:
    """Puts an instruction before a text that has none yet; one that is there stays, whatever it says."""
    return text if _INSTRUCTED.match(text) else instruct(instruction, text)


def without_instruction(text: str) -> str:
    """The text alone, as the stage that trains on raw text reads it."""
    return split_instruction(text)[1]
