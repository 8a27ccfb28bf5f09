"""Ten steps of a stage, timed: real batches through the real trainer, on a model of random weights."""

from __future__ import annotations

import resource
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.modeling_f2llm import F2LLMModel
from training.common.outputs import locked, scratch_folder
from training.config.recipe import Stage
from training.data.prepared import PreparedSource
from training.distillation.distillation import Distillation
from training.distillation.projection import Projection
from training.distillation.teacher import Teacher
from training.models.adapter import adapter_config, add_adapter
from training.models.encoding import embed_batch
from training.stages.setup import make_trainer, model_options
from training.trainer.trainer import F2LLMTrainer

# The first steps allocate, compile and fill caches.
_WARM_UP, _STEPS = 2, 10


@dataclass(frozen=True)
class Measurement:
    """How long things took.

    Attributes:
        seconds: Of each measured step.
        tokens: Of each measured step's batch, over all processes.
        warm_up: Seconds that the first steps took longer than the others.
        seconds_per_token: Of a forward pass.
        checkpoint: Seconds of writing one.
        peak_bytes: Most memory in use: on the GPU if there is one, else by the process.
    """

    seconds: list[float]
    tokens: list[int]
    warm_up: float
    seconds_per_token: float
    checkpoint: float
    peak_bytes: int

    def step_seconds(self, tokens: float) -> float:
        """Time of a step of so many tokens: a line through the measured ones, never falling nor starting below 0."""
        seconds, counts = np.asarray(self.seconds), np.asarray(self.tokens, dtype=float)
        proportional = float(seconds.sum() / counts.sum())
        if np.ptp(counts) < 0.2 * counts.mean():
            return proportional * tokens
        slope, start = np.polyfit(counts, seconds, 1)
        if slope < 0 or start < 0:
            return proportional * tokens
        return float(start + slope * tokens)


class _Clock(TrainerCallback):
    """Notes when each step ended and how many tokens it had."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.tokens: list[int] = []
        self.trainer: F2LLMTrainer | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        of_this_process = self.trainer.last_batch["input_ids"].numel()
        self.tokens.append(of_this_process * args.world_size)


def measure_stage(
    stage: Stage,
    config: F2LLMConfig,
    sources: list[PreparedSource],
    tokenizer: PreTrainedTokenizerBase,
    teacher: F2LLMConfig | None = None,
) -> Measurement:
    """Runs the first steps of a stage on random weights, and one checkpoint, in a folder that is thrown away."""
    # On the disk that the checkpoints of the stage will go to. Each process has a folder of its own.
    scratch = stage.arguments.prepared_folder / f"measure-{stage.arguments.process_index}"
    with locked(scratch, busy="another command measures there; wait for it to end"), scratch_folder(scratch) as folder:
        trainer = _trainer(stage, str(folder), config, sources, tokenizer, teacher)
        clock = _Clock()
        clock.trainer = trainer
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        _reset_peak()
        trainer.train()
        if trainer.interruption.signal:
            raise KeyboardInterrupt(trainer.interruption.signal)
        seconds = np.diff(clock.ends)
        start = time.perf_counter()
        trainer._save_checkpoint(trainer.model, None)
        checkpoint = time.perf_counter() - start
        usual = float(np.mean(seconds[_WARM_UP:]))
        return Measurement(
            seconds=seconds[_WARM_UP:].tolist(),
            tokens=clock.tokens[_WARM_UP:],
            warm_up=max(float(sum(seconds[:_WARM_UP])) - _WARM_UP * usual, 0.0),
            seconds_per_token=_forward_seconds(trainer) / clock.tokens[-1],
            checkpoint=checkpoint,
            peak_bytes=_peak_bytes(),
        )


def _trainer(
    stage: Stage,
    folder: str,
    config: F2LLMConfig,
    sources: list[PreparedSource],
    tokenizer: PreTrainedTokenizerBase,
    teacher: F2LLMConfig | None,
) -> F2LLMTrainer:
    args = deepcopy(stage.arguments)
    args.output_dir, args.max_steps = folder, _WARM_UP + _STEPS
    args.save_strategy, args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    args.logging_strategy, args.logging_first_step, args.report_to = IntervalStrategy.NO, False, []
    args.load_best_model_at_end = False
    options = model_options(args)
    model = F2LLMModel._from_config(deepcopy(config), dtype=torch.float32, **options)
    adapter = adapter_config(args)
    if adapter is not None:
        add_adapter(model, adapter)
    guide = None
    # With a cache, steps are without the teacher: what is left of it is a read.
    if teacher is not None and args.teacher_cache_dir is None:
        guide = Distillation(
            config.hidden_size,
            Teacher(F2LLMModel._from_config(teacher, dtype=torch.float32, **options)),
            projection=Projection(config.hidden_size, teacher.hidden_size, args) if args.teacher_projection else None,
        )
    return make_trainer(Stage(stage.name, stage.keys, args), model, sources, tokenizer, guide)


def _forward_seconds(trainer: F2LLMTrainer) -> float:
    """Time of encoding the last batch once more."""
    start = time.perf_counter()
    with trainer.accelerator.autocast():
        embed_batch(trainer.model, trainer.last_batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # Linux: forgets the process's peak, that of preparing data for example.
    elif (reset := Path("/proc/self/clear_refs")).exists():
        reset.write_text("5")


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return peak if sys.platform == "darwin" else peak * 1024
