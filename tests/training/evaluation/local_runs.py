"""Local files evaluated by mteb with a tiny model, and what an independent computation needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase

from modeling_f2llm import F2LLMModel
from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.evaluation.local_tasks import local_tasks
from training.evaluation.records import Evaluation, Score

WORDS = "river größer 東京 ответ lamp čaj window שלום sugar नमस्ते seven orbit paper quiet green tower".split()


def without_prompts(model: F2LLMModel, tokenizer: PreTrainedTokenizerBase) -> SentenceTransformer:
    """A model that reads every text as it is."""
    return build_sentence_transformer(model, tokenizer, prompts={"query": "", "document": ""})


def text(kind: str, number: int) -> str:
    """A text of its own for each kind and number."""
    return f"{kind} {WORDS[number % 16]} {WORDS[(3 * number + len(kind)) % 16]} {number}"


def write(path: Path, **columns: Sequence[object]) -> Path:
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
    return path


def column_of(path: Path, name: str) -> list[str]:
    return pq.read_table(path)[name].to_pylist()


def evaluate(model: SentenceTransformer, place: Path) -> Evaluation:
    """The scores of all tasks of a place, by mteb alone."""
    found = Evaluation()
    for task in local_tasks(place):
        (result,) = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False).task_results
        for split, subsets in result.scores.items():
            for scores in subsets:
                data = task.dataset.get(scores["hf_subset"], task.dataset)[split]
                found.scores.append(
                    Score(
                        model="tiny",
                        task=result.task_name,
                        task_type=task.metadata.type,
                        subset=scores["hf_subset"],
                        languages=tuple(scores["languages"]),
                        dimension=32,
                        precision="float32",
                        metric=task.metadata.main_score,
                        value=scores["main_score"],
                        examples=len(data["queries"] if isinstance(data, dict) else data),
                    )
                )
    return found


def cosines(model: SentenceTransformer, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
    """``(queries, documents)`` cosines."""
    one, other = model.encode(list(queries)), model.encode(list(documents))
    return one @ other.T / (np.linalg.norm(one, axis=1)[:, None] * np.linalg.norm(other, axis=1))
