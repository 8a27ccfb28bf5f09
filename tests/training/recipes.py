"""A complete two-stage recipe that runs in seconds: three small sources, a two-layer model."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from training.common.run_folder import last_checkpoint, numbered_checkpoints, step_of
from training.run_stage import main
from training.trainer.trainer import F2LLMTrainer

# The least that a recipe must say.
ONE_STAGE = {"output_dir": "runs/x", "model": "some/model", "use_cpu": True}

# What `write_single_stage` says of a new model, left out.
NO_NEW_MODEL = {"model_config": None, "tokenizer": None, "tokenizer_vocab_size": None}
# What the small trainings have in common.
SMALL = {
    **{"num_hard_negatives_retrieval": 3, "num_hard_negatives_clustering": 4, "validation_share": 0.1},
    **{"max_length": 32, "learning_rate": 1e-3, "warmup_steps": 2, "save_strategy": "steps"},
    **{"report_to": "none", "use_cpu": True, "disable_tqdm": True},
}
_NAMES = ["river", "mountain", "city", "island", "forest", "desert", "lake", "valley", "harbour", "village"]
_COLOURS = ["red", "green", "blue", "white", "black", "grey", "golden", "silver"]


def _rows(negatives):
    """Eighty rows: "the red river" → "river, red"; negatives name other things."""
    pairs = [(colour, name) for colour in _COLOURS for name in _NAMES]
    passages = [f"{name}, {colour}" for colour, name in pairs]
    columns = {"query": [f"the {colour} {name}" for colour, name in pairs], "passage": passages}
    for k in range(1, negatives + 1):
        columns[f"negative_{k}"] = passages[7 * k % len(pairs) :] + passages[: 7 * k % len(pairs)]
    return columns


def write_sources(folder):
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for task_type, negatives in (("retrieval", 4), ("clustering", 5), ("classification", 1)):
        pq.write_table(pa.table(_rows(negatives)), folder / f"{task_type}.parquet")
        entry = {"name": f"tiny_{task_type}", "files": f"{task_type}.parquet", "task_type": task_type}
        entry |= {"symmetric": task_type == "clustering", "instruction": "Given a phrase, retrieve its inversion."}
        entries.append(entry | {"languages": ["eng"], "licence": "CC0-1.0"})
    manifest = folder / "manifest.yaml"
    manifest.write_text(yaml.safe_dump({"sources": entries}))
    return manifest


def write_graded(folder):
    """Writes a manifest of graded pairs, whose scores count equal words, and of rows of uneven length and documents."""
    rows = _rows(0)
    columns = {"query": rows["query"] * 2, "passage": rows["query"] + rows["query"][13:] + rows["query"][:13]}
    pairs = zip(columns["query"], columns["passage"], strict=True)
    columns["score"] = [float(len({*one.split()} & {*other.split()})) for one, other in pairs]
    pq.write_table(pa.table(columns), folder / "graded.parquet")
    rows = _rows(2)
    for number in range(len(rows["query"])):
        rows["negative_2"][number] = rows["negative_2"][number] if number % 2 else None
        rows["negative_1"][number] = rows["negative_1"][number] if number % 3 else None
    rows["positive_2"] = [f"{text}!?" if number % 4 else None for number, text in enumerate(rows["query"])]
    rows["passage_id"] = [text.split(",")[0] for text in rows["passage"]]
    pq.write_table(pa.table(rows), folder / "uneven.parquet")
    own = yaml.safe_load((folder / "manifest.yaml").read_text())["sources"][0]
    sources = [{**own, "name": f"tiny_{name}", "files": f"{name}.parquet"} for name in ("graded", "uneven")]
    sources[0] |= {"task_type": "similarity", "symmetric": True}
    (folder / "graded.yaml").write_text(yaml.safe_dump({"sources": sources}))
    return folder / "graded.yaml"


def write_recipe(folder, more=None, **keys):
    """Writes the sources and a recipe with two stages; ``keys`` are shared by both and replace the defaults.

    ``more``: keys of single stages by name, which may be further stages.
    """
    manifest, pairs = write_sources(folder / "data"), folder / "data/pairs.parquet"
    texts = {"query": ["the red river", "the blue lake"], "passage": ["river, red", "lake, blue"]}
    pq.write_table(pa.table({**texts, "lang": ["eng", "eng"], "script": ["Latn", "Latn"]}), pairs)
    shared = {
        **{"output_dir": str(folder / "run"), "manifest": str(manifest), **SMALL, "global_batch_size": 16},
        **{"num_train_epochs": 2, "logging_steps": 5, "eval_strategy": "epoch", "save_steps": 3},
    }
    model = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    model |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    stage1 = {"tokenizer": "train", "tokenizer_vocab_size": 400, "model_config": model}
    stage1 |= {"task_types": ["retrieval"], "instructions": False}
    stages = {"stage1": stage1, "stage2": {"model": "stage1", "evaluation_pairs": str(pairs)}}
    stages |= {name: {**stages.get(name, {}), **own} for name, own in (more or {}).items()}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**shared, **keys, "stages": stages}, sort_keys=False))
    return recipe


def write_single_stage(folder, **keys):
    """Writes the first stage as a recipe of its own, its keys replaced by ``keys``; None takes one out."""
    content = yaml.safe_load(write_recipe(folder).read_text())
    stage = {**content, **content.pop("stages")["stage1"], **keys}
    stage.pop("stages", None)
    recipe = folder / "single.yaml"
    recipe.write_text(yaml.safe_dump({key: value for key, value in stage.items() if value is not None}))
    return recipe


def recipe_writer(folder):
    """Makes a function that writes a recipe of the keys given, or of YAML text, over those of ``ONE_STAGE``."""

    def write(keys, name="recipe.yaml", base=ONE_STAGE):
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        own, text = ({}, keys) if isinstance(keys, str) else (keys, "")
        path.write_text(yaml.safe_dump({**base, **own}, sort_keys=False) + text)
        return path

    return write


class KilledError(BaseException):
    """Ends a training the way a killed process ends it: nothing cleans up."""


def at_step(patch, step, action):
    training_step = F2LLMTrainer.training_step

    def acting(self, *args, **kwargs):
        if self.state.global_step == step:
            action()
        return training_step(self, *args, **kwargs)

    patch.setattr(F2LLMTrainer, "training_step", acting)


def killed(recipe, step, *words):
    """Train until a step begins, as if the process was killed then."""

    def die():
        raise KilledError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        at_step(patch, step, die)
        main([str(recipe), *words])


def rewind(run, copy, step):
    """Copies a finished run as if it had been killed after a step."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    for checkpoint in numbered_checkpoints(copy):
        if step_of(checkpoint) != step:
            shutil.rmtree(checkpoint)


def state_of(run):
    """The trainer's state in the newest checkpoint."""
    return json.loads((last_checkpoint(run) / "trainer_state.json").read_text())


def error_of(words, capsys, status=2):
    """Return the last line of a run that ends with this status, without a traceback."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == status
    output = capsys.readouterr().err
    assert "Traceback" not in output
    return output.splitlines()[-1]


def grow_loss(patch):
    metrics = F2LLMTrainer._metrics

    def grown(self, by_source, prefix):
        return {**metrics(self, by_source, prefix), f"{prefix}_loss": float(self.state.global_step)}

    patch.setattr(F2LLMTrainer, "_metrics", grown)


def only_stage(recipe):
    (stage,) = recipe.stages
    return stage.arguments
