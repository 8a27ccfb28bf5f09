"""Local files evaluated by mteb with a tiny model, and what an independent computation needs."""

from __future__ import annotations

import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.evaluation.local_tasks import local_tasks
from training.evaluation.records import Evaluation, Score

WORDS = "river größer 東京 ответ lamp čaj window שלום sugar नमस्ते seven orbit paper quiet green tower".split()


def text(kind, number):
    """A different text for each kind and number."""
    return f"{kind} {WORDS[number % 16]} {WORDS[(3 * number + len(kind)) % 16]} {number}"


def write(path, **columns):
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
    return path


def evaluate(model, path):
    """The scores of all tasks of a path, by mteb alone."""
    found = Evaluation()
    for task in local_tasks(path):
        (result,) = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False).task_results
        for split, subsets in result.scores.items():
            for scores in subsets:
                data = task.dataset.get(scores["hf_subset"], task.dataset)[split]
                examples = len(data["queries"] if isinstance(data, dict) else data)
                of_task = ("tiny", result.task_name, task.metadata.type, scores["hf_subset"])
                metric = (task.metadata.main_score, scores["main_score"])
                found.scores.append(Score(*of_task, tuple(scores["languages"]), 32, "float32", *metric, examples))
    return found


def cosines(model, queries, documents):
    """``(queries, documents)`` cosines."""
    one, other = model.encode(list(queries)), model.encode(list(documents))
    return one @ other.T / (np.linalg.norm(one, axis=1)[:, None] * np.linalg.norm(other, axis=1))
