"""Holds what ``run_stage.py --dry-run --devices N --device cpu`` predicts against trainings on this machine's CPU.

    python tests/benchmarks/prediction.py [--only "one chunk" sharded] [--output runs/prediction] [--quick]

Each case takes four steps with random weights on random texts, one thread a process, several processes over gloo.
`--quick` takes tiny shapes: no figure of it means anything.
Memory is what torch's allocator has handed out at most in the last step, with weights and optimizer. Time is the
processor time of a step of the first process: others' work does not lengthen it, and two processes may share a core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from modeling_f2llm import F2LLMConfig
from tests.benchmarks.common import NEGATIVES, VOCAB_SIZE, word_tokenizer, write_texts
from tests.training.distributed_recipe import save_model
from tests.training.distributed_worker import _shard
from tests.training.processes import accelerate, run_bounded, torchrun
from training.config.recipe import load_recipe
from training.planning.devices import Fleet, this_cpu
from training.planning.plan import make_plan
from training.run_stage import main as run_stage
from training.trainer import trainer

_STEPS = 4
_SHAPE = {"hidden_size": 320, "intermediate_size": 2048, "num_hidden_layers": 3, "head_dim": 128}
_SHAPE |= {"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 1024}
_SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 32}
_SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
_WIDE = {**_SHAPE, "hidden_size": 1024, "intermediate_size": 3072}
_TINY = {**_SMALL, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
_CHUNKS = {"max_tokens_per_forward": 1024}
_BF16, _RECOMPUTED = {**_CHUNKS, "bf16": True}, {**_CHUNKS, "activation_checkpointing": True}
# Of random weights, too, under the keys that name models.
_LORA = {**_CHUNKS, "model": _WIDE, "model_config": None, "lora": True}
# Name → processes, whether weights are sharded, rows of a batch, median tokens of a text, keys of the stage.
CASES = {
    "one chunk": (1, False, 2, 90, {}),
    "chunks": (1, False, 4, 90, _CHUNKS),
    "small model": (1, False, 32, 12, {**_CHUNKS, "model_config": _SMALL}),
    "bf16": (1, False, 4, 90, _BF16),
    "checkpointing": (1, False, 4, 90, _RECOMPUTED),
    "bf16, checkpointing": (1, False, 4, 90, {**_BF16, **_RECOMPUTED}),
    "many rows": (1, False, 1024, 4, {**_CHUNKS, "model_config": _SMALL}),
    "many rows, exits": (1, False, 1024, 4, {**_CHUNKS, "model_config": _SMALL, "exit_layers": ["auto"]}),
    "adapter": (1, False, 4, 90, _LORA),
    "adapter, bf16, checkpointing": (1, False, 4, 90, {**_LORA, **_BF16, **_RECOMPUTED}),
    "teacher": (1, False, 4, 90, {**_CHUNKS, "teacher": _WIDE}),
    "DDP": (2, False, 4, 90, _CHUNKS),
    "DDP, adapter": (2, False, 4, 90, _LORA),
    "FSDP": (2, True, 4, 90, _CHUNKS),
}


def write_case(folder, name, quick=False):
    """Write the recipe of a case, its models and its data, rows of the same lengths; return the path."""
    _, sharded, rows, median, keys = CASES[name]
    keys, tokenizer = {"model_config": _SHAPE, **keys}, word_tokenizer()
    if quick:
        rows, median = 2, 8
        keys |= {key: _TINY for key in ("model_config", "model", "teacher") if keys.get(key)}
    shutil.rmtree(folder / "run", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for key in {"model", "teacher"} & keys.keys():
        ids = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
        save_model(folder / key, F2LLMConfig(**ids, **keys[key]), tokenizer)
        keys[key] = str(folder / key)
    texts = 2 + NEGATIVES
    lengths = np.random.default_rng(0).lognormal(np.log(median), 0.5, texts).clip(3, 1000).astype(int)
    words = np.array(write_texts(np.tile(lengths, _STEPS * rows))).reshape(-1, texts)
    columns = ["query", "passage", *(f"negative_{number}" for number in range(1, 1 + NEGATIVES))]
    pq.write_table(pa.table(dict(zip(columns, words.T.tolist(), strict=True))), folder / "random.parquet")
    source = {"name": "random", "files": "random.parquet", "task_type": "retrieval", "symmetric": False}
    source |= {"instruction": "none", "languages": ["eng"], "licence": "CC0-1.0"}
    (folder / "manifest.yaml").write_text(yaml.safe_dump({"sources": [source]}))
    tokenizer.save_pretrained(folder / "tokenizer")
    recipe = {
        **{"output_dir": str(folder / "run"), "manifest": str(folder / "manifest.yaml"), "instructions": False},
        **{"tokenizer": str(folder / "tokenizer"), "max_length": 1024, "global_batch_size": rows, "max_steps": _STEPS},
        **{"validation_share": 0, "report_to": "none", "save_strategy": "no", "use_cpu": not sharded},
        **keys,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "stages": {"train": {}}}))
    return path


def measure(folder, name, quick=False):
    """Train a case; return what its first process measured."""
    processes, sharded, *_ = CASES[name]
    recipe, result = write_case(folder, name, quick), folder / "measured.json"
    words = ("sharded" if sharded else "whole", str(result), str(recipe))
    if processes == 1:
        assert work(*words) == 0
    else:
        launch = (folder, processes) if sharded else (processes,)
        command = (accelerate if sharded else torchrun)(*launch, __file__, "--worker", *words)
        ended = run_bounded(command, 900)
        assert ended.returncode == 0, ended.stdout[-3000:]
    return json.loads(result.read_text())


class _Watch(TrainerCallback):
    """Times all steps but the first and the last, and profiles the memory of the last."""

    def __init__(self, trainer, result):
        self.trainer, self.result, self.ends = trainer, result, []
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == _STEPS - 1:
            self.held = _held(self.trainer)
            self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.process_time())
        if state.global_step == _STEPS:
            self.profiler.stop()
            seconds = (self.ends[-2] - self.ends[0]) / (_STEPS - 2)
            if not int(os.environ.get("RANK", 0)):
                peak = self.held + _most(self.profiler)
                self.result.write_text(json.dumps({"bytes": peak, "seconds": seconds}))


def _held(trainer):
    """Return the bytes of weights, optimizer and teacher, of shards what this process has."""
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    models = [trainer.model, *([trainer.distillation.teacher.model] if trainer.distillation else [])]
    weights = [weight for model in models for weight in model.parameters()]
    tensors = [getattr(each, "_local_tensor", each) for each in (*weights, *states)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def _most(profiler):
    """Return the most bytes that torch's allocator handed out and had not got back."""
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return int(np.cumsum([0, *(event.nbytes() for event in events if event.name() == "[memory]")]).max())


def work(sharding, result, *words):
    """Train in this process."""
    if sharding == "sharded":
        _shard()
    torch.set_num_threads(1)
    train = trainer.F2LLMTrainer.train

    def watched(self, *arguments, **keys):
        self.add_callback(_Watch(self, Path(result)))
        return train(self, *arguments, **keys)

    # The table alone goes to the standard output.
    with mock.patch.object(trainer.F2LLMTrainer, "train", watched), redirect_stdout(sys.stderr):
        return run_stage(list(words))


def predict(recipe, processes, sharded, device):
    """Return the bytes and the seconds of a step that a plan says."""
    (stage,) = load_recipe(recipe, {"use_cpu": True, **({"fsdp": True} if sharded else {})}).stages
    plan = make_plan(stage, {}, processes=processes)
    return plan.memory.total, plan.seconds_on(Fleet(device, processes)) / plan.steps


def make_parser():
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases to train")
    parser.add_argument("--output", type=Path, default=Path("runs/prediction"), help="folder of the runs")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    return parser


def main(words=None):
    """Measure and predict every case; write the table."""
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["--worker"]:
        return work(*words[1:])
    arguments = make_parser().parse_args(words)
    torch.set_num_threads(1)
    device = this_cpu()
    rates = f"{device.fp32 / 1e9:.0f} fp32, {device.bf16 / 1e9:.0f} bf16 gigaflops; {device.bandwidth / 1e9:.1f} GB/s"
    sys.stdout.write(f"{rates}\n| case | memory, MB | predicted | ratio | s/step | predicted | ratio |\n")
    sys.stdout.write("| --- " * 7 + "|\n")
    for name in arguments.only:
        folder, (processes, sharded, *_) = arguments.output / name.replace(" ", "_"), CASES[name]
        found = measure(folder, name, arguments.quick)
        memory, seconds = predict(folder / "recipe.yaml", processes, sharded, device)
        cells = [f"{found['bytes'] / 1e6:,.0f}", f"{memory / 1e6:,.0f}", f"{memory / found['bytes']:.2f}"]
        cells += [f"{found['seconds']:.2f}", f"{seconds:.2f}", f"{seconds / found['seconds']:.2f}"]
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
