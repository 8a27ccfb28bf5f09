"""A tiny stage that evaluates a sample of pairs while it trains."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq

from tests.training.recipes import write_single_stage
from training.evaluation.pairs import load_pairs, sample_pairs

# Ten steps; every second one is evaluated and saved.
WATCHED = {
    "evaluation_sample": 30,
    "evaluation_sample_candidates": 40,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "instructions": True,
    "query_instruction": "Invert the phrase.",
    # Several chunks.
    "max_tokens_per_forward": 200,
    "learning_rate": 5e-3,
}


def pairs_keys(folder):
    """The keys that name the files of :func:`write_pairs`."""
    names = {"evaluation_pairs": "found", "evaluation_candidates": "candidates"}
    return {key: str(folder / f"data/{name}.parquet") for key, name in names.items()}


def write_pairs(folder):
    """Sixty pairs of the kind that is trained on, in two languages by turns of three, and twenty more candidates."""
    columns = pq.read_table(folder / "data/retrieval.parquet", columns=["query", "passage"]).to_pydict()
    kept = {name: values[:60] for name, values in columns.items()}
    kept["lang"] = ["eng" if row % 3 else "deu" for row in range(60)]
    kept["script"] = ["Latn"] * 60
    pq.write_table(pa.table({"passage": columns["passage"][::-1]}), folder / "data/candidates.parquet")
    pq.write_table(pa.table(kept), folder / "data/found.parquet")
    return folder / "data/found.parquet"


def write_watched(folder, **keys):
    """Writes the stage as a recipe; ``keys`` replace those of ``WATCHED``, None takes one out."""
    recipe = write_single_stage(folder, **{**pairs_keys(folder), **WATCHED, **keys})
    write_pairs(folder)
    return recipe


def sample(folder):
    """What the stage evaluates."""
    pairs = load_pairs(*pairs_keys(folder).values())
    return sample_pairs(pairs, WATCHED["evaluation_sample"], WATCHED["evaluation_sample_candidates"])


def history(run):
    """The metrics of pairs by step, from the newest checkpoint's state."""
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    lines = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return {
        line["step"]: {key: value for key, value in line.items() if key.startswith("eval_pairs")}
        for line in lines
        if "eval_loss" in line
    }
