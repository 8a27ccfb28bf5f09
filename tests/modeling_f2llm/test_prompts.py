"""The instruction template and the instructions of the published models, to the letter."""

from __future__ import annotations

from modeling_f2llm import DEFAULT_PROMPTS, TASK_INSTRUCTIONS, instruct


def test_template_is_the_published_one():
    assert instruct("Find it.", "What?") == "Instruct: Find it.\nQuery: What?"
    assert instruct("Find it.") + "What?" == instruct("Find it.", "What?")


def test_braces_are_text():
    assert instruct("Match {json}.", "{instruction} {0}") == "Instruct: Match {json}.\nQuery: {instruction} {0}"


def test_default_prompts_are_the_published_ones():
    assert DEFAULT_PROMPTS == {
        "query": "Instruct: Given a question, retrieve passages that can help answer the question.\nQuery: ",
        "document": "",
    }


def test_task_instructions_are_the_published_ones():
    question = "Given a question, retrieve passages that can help answer the question."
    topic = "Classify the topic of the given text."
    assert TASK_INSTRUCTIONS == {
        "Retrieval": question,
        "Reranking": question,
        "STS": "Retrieve semantically similar text.",
        "BitextMining": "Retrieve translations of the following text.",
        "Classification": topic,
        "MultilabelClassification": topic,
        "Clustering": topic,
        "PairClassification": "Retrieve semantically entailed text.",
    }
