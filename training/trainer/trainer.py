"""F2LLMTrainer: transformers' Trainer over global batches of one source, with F2LLM's objective."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback

from training.common.errors import NonFiniteError
from training.common.run_folder import last_checkpoint, remove_leftovers
from training.config.arguments import StageArguments
from training.data.prepared import PreparedSource
from training.distillation.distillation import Distillation, cache_share
from training.models.encoding import embed_batch
from training.trainer.batches import PackedCollator, PreparedRows, batch_sampler
from training.trainer.monitor import Console, StepWatch
from training.trainer.saving import SavingTrainer
from training.trainer.step import CachedStep, Objective, draw_rank, draws_dropout
from training.trainer.stopping import Interruption, outlive_signals

logger = logging.getLogger(__name__)


class _EpochLoader(DataLoader):
    """Passes the epoch on to the batch sampler; Trainer looks for the method at the loader."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class F2LLMTrainer(SavingTrainer):
    """Trains an F2LLMModel in fp32 weights on prepared sources; ``bf16: true`` computes in bf16 by autocast.

    Each step is one global batch of one source, encoded by all processes in chunks of ``max_tokens_per_forward``. The
    log has the mean of every loss term and of every source's loss since the last line. The tokenizer and the
    ``prompts`` are saved with every checkpoint; ``distillation`` is the teacher to learn from, if there is one.
    """

    args: StageArguments

    def __init__(
        self,
        model: PreTrainedModel,
        args: StageArguments,
        sources: Sequence[PreparedSource],
        tokenizer: PreTrainedTokenizerBase,
        prompts: dict[str, str] | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        self.sources = list(sources)
        self.distillation = distillation
        dims = args.train_dims(model.config.hidden_size)
        self.exits = args.train_exits(model.config.num_hidden_layers)
        named = ("mask_duplicates", "gather_gradients", "mask_false_negatives", "spread_weight")
        keys = {name: getattr(args, name) for name in (*named, "distillation_weight", "score_distillation_weight")}
        keys["quantized"] = {name: weight for name, weight in args.mapping("quantized").items() if weight}
        keys["teacher_temperature"] = args.teacher_temperature or (1.0 if distillation is None else args.temperature)
        self.objective = Objective(args.temperature, dims, **keys)
        # Validation measures the contrastive task itself, at full width, as the published training does.
        self.validation_objective = Objective(args.temperature, None, args.mask_duplicates)
        model.config.is_matryoshka = dims is not None
        model.config.matryoshka_dimensions = dims
        model.config.exit_layers = self.exits
        if model.config.embedding_ranks:
            # Without the key, factors are trained as a whole.
            model.config.embedding_ranks = sorted({*(args.embedding_ranks or model.config.embedding_ranks[-1:])})
        self.watch = StepWatch(Path(args.output_dir), self.sources, tokenizer, writes=args.process_index == 0)
        # Sum and number of each term, each source's loss, and what else is noted of a step.
        self._since_last_log: dict[str, tuple[Tensor | float, int]] = {}
        self.last_batch: dict[str, Any] = {}
        self._gradients = torch.empty(0)
        super().__init__(
            prompts,
            model=model,
            args=args,
            train_dataset=PreparedRows(self.sources, "train"),
            eval_dataset=PreparedRows(self.sources, "validation"),
            processing_class=tokenizer,
        )
        if self.accelerator.is_fsdp2:
            # Weights and gradients stay fp32 and layers compute in bf16 by autocast, as without sharding.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        self.interruption = Interruption(self.accelerator)
        kinds = {source.task_type for source in self.sources}
        terms = {"in_batch": "retrieval" in kinds, "hard": kinds != {"similarity"}, "similarity": "similarity" in kinds}
        terms |= dict.fromkeys(self.objective.quantized, True)
        terms["spread"] = args.spread_weight > 0 and "retrieval" in kinds
        terms["distillation"] = distillation is not None and args.distillation_weight > 0
        terms["score_distillation"] = args.score_distillation_weight > 0
        self.console = Console([term for term, there in terms.items() if there])
        self.projection = None if distillation is None else distillation.projection
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        for callback in filter(None, (self.interruption, self.console, self.projection)):
            self.add_callback(callback)

    def fill_teacher_cache(self) -> None:
        """Embed with the teacher what its cache misses, on all processes together, before the training."""
        if self.distillation is None:
            return
        with self.accelerator.autocast():
            self.distillation.fill_cache(self.args.device, *cache_share(self.args))
        self.accelerator.wait_for_everyone()

    def get_train_dataloader(self) -> DataLoader:
        """Load this process's share of each global batch, which accelerate must not divide again."""
        return self._loader("train")

    def _loader(self, split: str) -> DataLoader:
        args = self.args
        process = (args.seed, args.process_index, args.world_size, args.max_tokens_per_forward)
        # Validation learns nothing from a teacher.
        taught = split == "train" and self.distillation is not None
        teacher = (self.distillation.cache, self.distillation.width) if taught else ()
        return _EpochLoader(
            PreparedRows(self.sources, split),
            batch_sampler=batch_sampler(args, self.sources, split),
            collate_fn=PackedCollator(self.sources, args.num_hard_negatives, *process, *teacher),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=outlive_signals,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train to the end, or until a signal asks to stop: see :attr:`interruption`."""
        if self.args.should_save:
            remove_leftovers(Path(self.args.output_dir))
        if draws_dropout(self.accelerator.unwrap_model(self.model)):
            logger.warning(
                "dropout is drawn per chunk: max_tokens_per_forward and the number of processes change weights"
            )
        with self.interruption.watching(), self.console:
            return super().train(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that had ended is resumed only to save its model.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Accumulate the gradient of one global batch and return its loss; keep each term for the log."""
        model.train()
        # Optimizers without a schedule average weights in between.
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        batch = self._prepare_inputs(inputs)
        teacher = None
        if self.distillation is not None:
            with self.accelerator.autocast():
                teacher = self.distillation.targets(batch)
        key = (self.args.seed, self.state.global_step)
        whole = self.accelerator.unwrap_model(model)
        if ranks := whole.config.embedding_ranks:
            whole.embed_tokens.rank = draw_rank(ranks, *key)
        step = CachedStep(self.accelerator, model, self.accelerator.autocast, key, self.exits)
        loss, self._gradients = step.run(batch, lambda embeddings: self._loss(embeddings, batch, teacher))
        if ranks:
            whole.embed_tokens.rank = ranks[-1]
        self.last_batch = batch
        self.console.count(batch["tokens"])
        self.watch.loss(self.state.global_step + 1, batch, loss.item(), self._gradients)
        return loss

    def _loss(self, embeddings: Tensor, batch: dict[str, Any], teacher: Tensor | None) -> Tensor:
        noted: dict[str, Tensor] = {}
        # The mean over the exits, as ML-Embed (arXiv 2605.15081) has it; without, all is of the last layer.
        exits = embeddings.chunk(len(self.exits or [0]), dim=1)
        if self.projection is not None and teacher is not None:
            self.projection.start(exits[-1], teacher)
        by_exit: dict[str, list[Tensor]] = defaultdict(list)
        for states in exits:
            projected = None if self.projection is None or teacher is None else self.projection(states)
            for name, term in self.objective.terms(states, batch, teacher, projected, noted, exits[-1]).items():
                by_exit[name].append(term)
        terms = {name: torch.stack(own).mean() for name, own in by_exit.items()}
        for number, layer in enumerate(self.exits or ()):
            noted[f"loss_exit/{layer}"] = torch.stack([own[number].detach() for own in by_exit.values()]).sum()
        loss = torch.stack(list(terms.values())).sum()
        if not math.isfinite(loss.item()):
            scores = torch.where(embeddings.detach().isfinite().all(dim=1), 0.0, math.inf)
            raise self._non_finite("loss", loss.item(), batch, scores)
        noted |= {f"loss_{name}": term.detach() for name, term in terms.items()}
        noted[f"loss_source/{batch['source']}"] = loss.detach()
        for name, value in noted.items():
            total, count = self._since_last_log.get(name, (0.0, 0))
            self._since_last_log[name] = (total + value, count + 1)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """Return the norm of the gradient that the optimizer is about to apply, if it is finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # The scaler of fp16 may have scaled the loss too far.
        if not math.isfinite(float(norm)) and self.accelerator.scaler is None:
            raise self._non_finite("gradient", float(norm), self.last_batch, self._gradients)
        return norm

    def _non_finite(self, what: str, value: float, batch: dict[str, Any], scores: Tensor) -> NonFiniteError:
        """Record the batch, and return the error with the way on."""
        step, saved = self.state.global_step + 1, last_checkpoint(Path(self.args.output_dir))
        self.watch.record(f"non-finite {what}", step, batch, scores, **{what: value})
        start = f"'model: {saved}'" if saved else "the same model"
        return NonFiniteError(
            f"the {what} became {value} at step {step}, on a batch of source {batch['source']!r}; last good "
            f"checkpoint: {saved or 'none yet'}. Look at the rows in {self.watch.path}, or start again from {start} "
            "with a lower learning_rate and another output_dir"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of every term and source since the last log step."""
        if "loss" in logs:
            for name, (total, count) in sorted(self._since_last_log.items()):
                logs[name] = float(total) / count
            self._since_last_log.clear()
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the mean loss on the validation rows, as the first process measures it, and what callbacks add.

        It is the mean per source, per task type (mean of its sources) and overall.
        """
        self.model.eval()
        # The counterpart of what a training step does to such optimizers.
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()
        # Sum over rows, and rows, of each source.
        losses: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
        for batch in self._loader("validation") if len(self.eval_dataset) else ():
            batch = self._prepare_inputs(batch)
            with self.accelerator.autocast():
                embeddings = embed_batch(self.model, batch)
            terms = self.validation_objective.terms(embeddings, batch)
            rows = len(batch["query"])
            losses[batch["source"]] += sum(terms.values()).item() * rows, rows
        by_source = {name: float(total / rows) for name, (total, rows) in losses.items()}
        metrics = broadcast_object_list([self._metrics(by_source, "eval")])[0]
        # Callbacks may add metrics: the log, and what chooses the best model, come after them.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.log(metrics)
        return metrics

    @property
    def metric_names(self) -> list[str]:
        """Names of what an evaluation and its callbacks report."""
        measured = {source.name: 0.0 for source in self.sources if len(source.rows["validation"])}
        of_callbacks = (getattr(each, "metric_names", []) for each in self.callback_handler.callbacks)
        return [*self._metrics(measured, "eval"), *chain.from_iterable(of_callbacks)]

    def _metrics(self, by_source: dict[str, float], prefix: str) -> dict[str, float]:
        means = {f"{prefix}_source/{name}": loss for name, loss in by_source.items()}
        groups: dict[str, list[float]] = defaultdict(list)
        for source in self.sources:
            if source.name in by_source:
                groups[source.task_type].append(by_source[source.name])
        means |= {f"{prefix}_{task_type}": sum(values) / len(values) for task_type, values in groups.items()}
        if by_source:
            means[f"{prefix}_loss"] = sum(by_source.values()) / len(by_source)
        return means
