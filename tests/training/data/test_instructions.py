"""Instructions that published files carry inside the query: seen, kept once, taken off."""

from __future__ import annotations

import pytest

from modeling_f2llm.prompts import instruct
from training.data.instructions import split_instruction, with_instruction, without_instruction

BARE = ["Why?", "", "Instruct: the art", "What is\nQuery: for?", " Instruct: a\nQuery: b", "Instruct:\nQuery: "]
OTHER_TEMPLATES = {
    "Instruct: Find.\nQuery:Why?": "Why?",
    "Instruct: Find.\nQuery:": "",
    "Instruct: Find.\nQuery:two\nlines": "two\nlines",
    "Instruct: Find.\nQuery:  Why?": " Why?",
    "Instruct: Find.\nQuery:Instruct: a\nQuery:b": "Instruct: a\nQuery:b",
    "Instruct: Find.\r\nQuery: Why?": "Why?",
}


@pytest.mark.parametrize("text", [*BARE, "two\nlines", "Instruct: a\nQuery: b"])
def test_instruction_is_taken_off_as_it_was_put_on(text):
    if text in BARE:
        assert split_instruction(text) == (None, text) and without_instruction(text) == text
        assert with_instruction("Find.", text) == instruct("Find.", text)
    for instruction in ("Find.", "Find {it}.", "Find\nit.", "找到它。"):
        assert split_instruction(instruct(instruction, text)) == (instruction, text)
        assert with_instruction("Another.", instruct(instruction, text)) == instruct(instruction, text)


def test_other_templates_are_instructions_too():
    for whole, text in OTHER_TEMPLATES.items():
        assert split_instruction(whole) == ("Find.", text)
        assert with_instruction("Another.", whole) == whole
        assert without_instruction(whole) == text
