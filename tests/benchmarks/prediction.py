"""Holds what ``run_stage.py --dry-run --devices`` predicts against trainings on this machine's CPU.

    python tests/benchmarks/prediction.py [--only "one chunk" sharded] [--output runs/prediction]

Each case trains a few steps with random weights on random texts, one thread a process, and several processes over gloo.
Memory is what torch's allocator handed out for a step at most: weights, gradients and optimizer included. Time is the
processor time of a step, which others' work on the machine does not lengthen, so that two processes fit one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch.profiler import ProfilerActivity, profile, record_function

from tests.benchmarks.common import NEGATIVES, process_memory, word_tokenizer, write_texts
from tests.training.distributed_worker import _shard
from tests.training.processes import accelerate, run_bounded, torchrun
from training.config.recipe import load_recipe
from training.planning.plan import make_plan
from training.run_stage import main as run_stage
from training.trainer import trainer

_WARM_UP, _STEPS = 2, 4
_SHAPE = {"hidden_size": 320, "intermediate_size": 2048, "num_hidden_layers": 3, "head_dim": 128}
_SHAPE |= {"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 1024}
_SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 32}
_SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
_CHUNKS = {"max_tokens_per_forward": 2048}
# Name → processes, whether weights are sharded, rows of a batch, median tokens of a document, keys of the stage.
CASES = {
    "one chunk": (1, False, 4, 90, {}),
    "chunks": (1, False, 8, 90, _CHUNKS),
    "chunks, bf16": (1, False, 8, 90, {**_CHUNKS, "bf16": True}),
    "checkpointing": (1, False, 8, 90, {**_CHUNKS, "activation_checkpointing": True}),
    "small model": (1, False, 64, 12, {**_CHUNKS, "model_config": _SMALL}),
    "many rows": (1, False, 1024, 4, {"max_tokens_per_forward": 1024, "model_config": _SMALL}),
    "two processes": (2, False, 8, 90, _CHUNKS),
    "sharded": (2, True, 8, 90, _CHUNKS),
    "sharded, bf16": (2, True, 8, 90, {**_CHUNKS, "bf16": True}),
}


def write_case(folder, name):
    """Write the recipe of a case and its data; return its path."""
    processes, sharded, rows, median, keys = CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(np.log(median), 0.5, ((_WARM_UP + _STEPS) * rows, 2 + NEGATIVES)).clip(3, 1000)
    texts = np.array(write_texts(lengths.astype(int).ravel())).reshape(lengths.shape)
    columns = ["query", "passage", *(f"negative_{number}" for number in range(1, 1 + NEGATIVES))]
    pq.write_table(pa.table(dict(zip(columns, texts.T.tolist(), strict=True))), folder / "random.parquet")
    source = {"name": "random", "files": "random.parquet", "task_type": "retrieval", "symmetric": False}
    source |= {"instruction": "none", "languages": ["eng"], "licence": "CC0-1.0"}
    (folder / "manifest.yaml").write_text(yaml.safe_dump({"sources": [source]}))
    word_tokenizer().save_pretrained(folder / "tokenizer")
    recipe = {
        **{"output_dir": str(folder / "run"), "manifest": str(folder / "manifest.yaml"), "instructions": False},
        **{"tokenizer": str(folder / "tokenizer"), "model_config": _SHAPE, "max_length": 1024, "global_batch_size": rows},
        **{"validation_share": 0, "max_steps": _WARM_UP + _STEPS, "report_to": "none", "save_strategy": "no"},
        **{"use_cpu": not sharded, "learning_rate": 1e-4, **keys},
    }
    recipe["stages"] = {"train": {}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def measure(folder, name):
    """Train a case twice, for memory and for time; return bytes of the first process and seconds of a step."""
    processes, sharded, *_ = CASES[name]
    recipe, found = write_case(folder, name), {}
    for what in ("memory", "time"):
        words = (what, "sharded" if sharded else "whole", folder / f"{what}.json", recipe, "--output_dir", folder / what)
        if processes == 1:
            command = [sys.executable, __file__, "--worker", *map(str, words)]
        else:
            launch = (folder, processes) if sharded else (processes,)
            command = (accelerate if sharded else torchrun)(*launch, __file__, "--worker", *words)
        ended = run_bounded(command, 600)
        assert ended.returncode == 0, ended.stdout[-3000:]
        found |= json.loads((folder / f"{what}.json").read_text())
    return found


def work(what, sharding, result, *words):
    """Train in this process, and write what the first process of the case measured."""
    if sharding == "sharded":
        _shard()
    torch.set_num_threads(1)
    starts, step = [], trainer.F2LLMTrainer.training_step

    def marked(*arguments, **keys):
        starts.append((time.process_time(), process_memory("VmHWM")))
        with record_function("a step begins"):
            pass
        return step(*arguments, **keys)

    with mock.patch.object(trainer.F2LLMTrainer, "training_step", marked):
        if what == "time":
            before = process_memory("VmRSS")
            status = run_stage(list(words))
            seconds = np.diff([second for second, _ in starts])[_WARM_UP - 1 :]
            found = {"seconds": statistics.median(seconds), "resident": (process_memory("VmHWM") - before) * 2**20}
        else:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                status = run_stage(list(words))
            found = {"bytes": _most_held(profiler)}
    if not int(os.environ.get("RANK", 0)):
        Path(result).write_text(json.dumps(found))
    return status


def _most_held(profiler):
    """Return the most bytes that torch's allocator held from the second step on."""
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    steps = held = most = 0
    for event in events:
        steps += event.name() == "a step begins"
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held) if steps >= _WARM_UP else 0
    return most


def main(words=None):
    """Measure and predict every case; write the table."""
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["--worker"]:
        return work(*words[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, default=Path("runs/prediction"))
    arguments = parser.parse_args(words)
    for name in arguments.only:
        sys.stdout.write(f"{name}: {measure(arguments.output / name.replace(' ', '_'), name)}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
