"""Instructions that published files carry inside the query: seen, kept once, taken off."""

from __future__ import annotations

import pytest

from modeling_f2llm.prompts import instruct
from training.data.instructions import split_instruction, with_instruction, without_instruction

BARE = ["Why?", "", "Instruct: the art", "What is\nQuery: for?", " Instruct: a\nQuery: b", "Instruct:\nQuery: "]


@pytest.mark.parametrize("text", BARE)
def test_text_without_an_instruction(text):
    assert split_instruction(text) == (None, text) and without_instruction(text) == text
    assert with_instruction("Find.", text) == instruct("Find.", text)


@pytest.mark.parametrize("text", [*BARE, "two\nlines", "Instruct: a\nQuery: b"])
@pytest.mark.parametrize("instruction", ["Find.", "Find {it}.", "Find\nit.", "找到它。"])
def test_instruction_is_taken_off_as_it_was_put_on(instruction, text):
    assert split_instruction(instruct(instruction, text)) == (instruction, text)
    assert with_instruction("Another.", instruct(instruction, text)) == instruct(instruction, text)


@pytest.mark.parametrize(
    ("whole", "text"),
    [
        ("Instruct: Find.\nQuery:Why?", "Why?"),
        ("Instruct: Find.\nQuery:", ""),
        ("Instruct: Find.\nQuery:two\nlines", "two\nlines"),
        ("Instruct: Find.\nQuery:  Why?", " Why?"),
        ("Instruct: Find.\nQuery:Instruct: a\nQuery:b", "Instruct: a\nQuery:b"),
        ("Instruct: Find.\r\nQuery: Why?", "Why?"),
    ],
)
def test_other_templates_are_instructions_too(whole, text):
    assert split_instruction(whole) == ("Find.", text)
    assert with_instruction("Another.", whole) == whole
    assert without_instruction(whole) == text
