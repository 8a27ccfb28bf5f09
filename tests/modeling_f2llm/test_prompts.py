"""The instruction template and the instructions of the published models, to the letter."""

from __future__ import annotations

from modeling_f2llm import DEFAULT_PROMPTS, TASK_INSTRUCTIONS, instruct


def test_the_template_and_the_instructions_are_the_published_ones():
    assert instruct("Find it.", "What?") == instruct("Find it.") + "What?" == "Instruct: Find it.\nQuery: What?"
    # Braces are text.
    assert instruct("Match {json}.", "{instruction} {0}") == "Instruct: Match {json}.\nQuery: {instruction} {0}"
    question = "Given a question, retrieve passages that can help answer the question."
    topic = "Classify the topic of the given text."
    assert DEFAULT_PROMPTS == {"query": f"Instruct: {question}\nQuery: ", "document": ""}
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
