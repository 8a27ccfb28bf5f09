"""The instruction template of F2LLM and the instructions that models are released with.

Queries carry an instruction; documents carry none. Symmetric tasks (similarity, clustering, bitext mining) were trained
with and without an instruction on the document side and work either way.
"""

from __future__ import annotations

__all__ = ["DEFAULT_INSTRUCTION", "DEFAULT_PROMPTS", "TASK_INSTRUCTIONS", "instruct"]

TEMPLATE = "Instruct: {instruction}\nQuery: "

DEFAULT_INSTRUCTION = "Given a question, retrieve passages that can help answer the question."

# Defaults by task type, as registered with mteb for the published models.
TASK_INSTRUCTIONS: dict[str, str] = {
    "Retrieval": DEFAULT_INSTRUCTION,
    "Reranking": DEFAULT_INSTRUCTION,
    "STS": "Retrieve semantically similar text.",
    "BitextMining": "Retrieve translations of the following text.",
    "Classification": "Classify the topic of the given text.",
    "MultilabelClassification": "Classify the topic of the given text.",
    "Clustering": "Classify the topic of the given text.",
    "PairClassification": "Retrieve semantically entailed text.",
}


def instruct(instruction: str, text: str = "") -> str:
    r"""Puts an instruction before a text; without a text, returns the prompt that goes before any.

    Template and text must be tokenised together: a space or newline may merge with what follows it.

    Example:
        >>> instruct("Retrieve semantically similar text.", "A cat sleeps.")
        'Instruct: Retrieve semantically similar text.\nQuery: A cat sleeps.'
    """
    return TEMPLATE.format(instruction=instruction) + text


DEFAULT_PROMPTS: dict[str, str] = {"query": instruct(DEFAULT_INSTRUCTION), "document": ""}
