"""A recipe whose stages are the cases that must not depend on the number of processes: ten steps of each."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import yaml

from modeling_f2llm import F2LLMModel
from modeling_f2llm.sentence_transformer import build_sentence_transformer
from tests.training.recipes import SMALL, write_graded, write_sources

STEPS = 10
# By name, the keys in which a stage differs from the others.
STAGES: dict[str, dict[str, Any]] = {
    "mixed": {},
    "graded": {"manifest": "GRADED", "min_hard_negatives": 0, "mask_false_negatives": 0.0},
    "published": {"gather_gradients": False, "mask_duplicates": True},
    # Not int8: a value at the edge of a step may be rounded to either side.
    "compressed": {"spread_weight": 0.5, "quantized": '{"binary": 0.5}'},
    "distillation": {"teacher": "TEACHER", "teacher_projection": True},
    "cached": {"teacher": "TEACHER", "teacher_cache_dir": "CACHE"}
    | {"score_distillation_weight": 1.0, "mask_false_negatives": 0.0},
    "text_teacher": {"teacher": "FOREIGN", "teacher_query_template": "query : {text}"},
    "projected": {"teacher": "NARROW", "teacher_projection": True},
    "exits": {"exit_layers": "auto", "teacher": "TEACHER", "mask_false_negatives": 0.0} | {"embedding_ranks": [8, 16]},
    "lora": {"lora": True, "lora_rank": 4, "teacher": "TEACHER"},
    "dora": {"lora": True, "lora_rank": 4, "lora_dora": True},
    # Two texts: with four processes, two have none.
    "static": {"model": "STATIC", "instructions": False, "teacher": "TEACHER", "distillation_weight": 0.0}
    | {"score_distillation_weight": 1.0, "teacher_cache_dir": "CACHE"},
    "few_texts": {"global_batch_size": 1, "num_hard_negatives_classification": 0, "teacher": "TEACHER"}
    | {"task_types": ["classification"]},
}


def save_model(folder, config, tokenizer, seed=0, **fields):
    """Writes a new model, of the configuration with the given fields replaced, as a released folder."""
    config = deepcopy(config)
    for name, value in fields.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = F2LLMModel(config)
    build_sentence_transformer(model, deepcopy(tokenizer)).save_pretrained(str(folder), create_model_card=False)
    return model


def write_distributed_recipe(folder, models, stages, **keys):
    """Writes the recipe with the given stages; ``models`` holds the folders ``student``, ``teacher`` and others."""
    content = {
        **{"output_dir": str(folder / "run"), "prepared_dir": str(folder / "prepared")},
        **{"manifest": str(write_sources(folder / "data")), "model": str(models / "student"), **SMALL},
        **{"max_tokens_per_forward": 150, "global_batch_size": 12, "max_steps": STEPS, "logging_steps": 1},
        **{"eval_strategy": "steps", "eval_steps": 5, "save_steps": 4, **keys},
    }
    meant = {name: str(models / name.lower()) for name in ("TEACHER", "FOREIGN", "NARROW", "STATIC")}
    meant["GRADED"] = str(write_graded(folder / "data"))
    meant["CACHE"] = str(folder / "embeddings")
    content["stages"] = {
        name: {key: meant.get(value, value) if isinstance(value, str) else value for key, value in STAGES[name].items()}
        for name in stages
    }
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    return recipe
