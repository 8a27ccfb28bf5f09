"""F2LLMTrainer: transformers' Trainer over global batches of one source, with F2LLM's objective."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.arguments import StageArguments
from training.collator import PackedCollator, PreparedRows
from training.data.prepared import PreparedSource
from training.objective import Objective
from training.sampler import GlobalBatchSampler

__all__ = ["F2LLMTrainer", "NonFiniteLossError", "embed", "last_checkpoint"]


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message says when, on which source and where the last good checkpoint is."""


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end: its state file comes last."""
    checkpoints = [path.parent for path in output_dir.glob("checkpoint-*/trainer_state.json")]
    return max(checkpoints, key=lambda path: int(path.name.split("-")[1]), default=None)


def embed(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """``(n, d)`` unnormalised embeddings of the ``n`` texts of a packed batch: the last token of each."""
    hidden = model(input_ids=batch["input_ids"], sequence_lengths=batch["sequence_lengths"]).last_hidden_state[0]
    last = torch.tensor(batch["sequence_lengths"], device=hidden.device).cumsum(0) - 1
    return hidden[last]


class _EpochLoader(DataLoader):
    """A loader that passes the epoch on to its batch sampler, where Trainer looks for the method."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class F2LLMTrainer(Trainer):
    """Trains an F2LLMModel on prepared sources.

    Each step is one global batch of one source. The log shows the mean of every loss term and of every source's loss
    since the last line. Checkpoints are folders that SentenceTransformer loads, with the optimizer's state beside.

    Args:
        model: The model to train, fp32; ``bf16: true`` computes in bf16 by autocast.
        args: The stage.
        sources: Prepared sources.
        tokenizer: Saved with every checkpoint.
        prompts: Prompts of the saved model by name.

    Raises:
        NonFiniteLossError: In training, when the loss becomes NaN or infinite.
    """

    args: StageArguments

    def __init__(
        self,
        model: PreTrainedModel,
        args: StageArguments,
        sources: Sequence[PreparedSource],
        tokenizer: PreTrainedTokenizerBase,
        prompts: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.sources = list(sources)
        self.prompts = prompts
        dims = args.train_dims(model.config.hidden_size)
        self.objective = Objective(args.temperature, dims, args.mask_duplicates)
        # Validation measures the contrastive task itself, at full width, as the published training does.
        self.validation_objective = Objective(args.temperature, None, args.mask_duplicates)
        model.config.is_matryoshka = dims is not None
        model.config.matryoshka_dimensions = dims
        self._since_last_log: dict[str, list[Tensor]] = defaultdict(list)
        super().__init__(
            model=model,
            args=args,
            train_dataset=PreparedRows(self.sources, "train"),
            eval_dataset=PreparedRows(self.sources, "validation"),
            data_collator=PackedCollator(self.sources, args.num_hard_negatives, args.seed),
            processing_class=tokenizer,
            **kwargs,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Loads this process's share of each global batch; nothing is sharded again by accelerate."""
        return self._loader("train")

    def _loader(self, split: str) -> DataLoader:
        sampler = GlobalBatchSampler(
            [len(source.rows[split]) for source in self.sources],
            self.args.global_batch_size,
            seed=self.args.seed,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        return _EpochLoader(
            PreparedRows(self.sources, split),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Sum of the objective's terms for one batch; keeps each term for the log."""
        terms = self.objective.terms(embed(model, inputs), inputs)
        loss = torch.stack(list(terms.values())).sum()
        if not math.isfinite(loss.item()):
            raise NonFiniteLossError(self._non_finite_message(loss, inputs["source"]))
        for name, term in terms.items():
            self._since_last_log[f"loss_{name}"].append(term.detach())
        self._since_last_log[f"loss_source/{inputs['source']}"].append(loss.detach())
        return (loss, terms) if return_outputs else loss

    def _non_finite_message(self, loss: Tensor, source: str) -> str:
        checkpoint = last_checkpoint(Path(self.args.output_dir))
        start = f"'model: {checkpoint}'" if checkpoint else "the same model"
        return (
            f"the loss became {loss.item()} at step {self.state.global_step + 1}, on a batch of source {source!r}; "
            f"last good checkpoint: {checkpoint or 'none yet'}. Look at the source's rows, or start anew from {start} "
            "with a lower learning_rate and another output_dir"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean of every term and source since the last training line."""
        if "loss" in logs:
            for name, values in sorted(self._since_last_log.items()):
                logs[name] = torch.stack(values).mean().item()
            self._since_last_log.clear()
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss on the validation rows: per source, per task type (mean of its sources) and overall."""
        self.model.eval()
        losses: dict[str, list[tuple[float, int]]] = defaultdict(list)
        for batch in self._loader("validation") if len(self.eval_dataset) else ():
            batch = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                terms = self.validation_objective.terms(embed(self.model, batch), batch)
            losses[batch["source"]].append((sum(terms.values()).item(), len(batch["query"])))
        by_source = {
            name: sum(loss * rows for loss, rows in batches) / sum(rows for _, rows in batches)
            for name, batches in losses.items()
        }
        metrics = {f"{metric_key_prefix}_source/{name}": loss for name, loss in by_source.items()}
        metrics |= self._task_type_means(by_source, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _task_type_means(self, by_source: dict[str, float], prefix: str) -> dict[str, float]:
        groups: dict[str, list[float]] = defaultdict(list)
        for source in self.sources:
            if source.name in by_source:
                groups[source.task_type].append(by_source[source.name])
        means = {f"{prefix}_{task_type}": sum(values) / len(values) for task_type, values in groups.items()}
        if by_source:
            means[f"{prefix}_loss"] = sum(by_source.values()) / len(by_source)
        return means

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes a complete SentenceTransformer folder with the stage's arguments."""
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        broken = [name for name, weights in model.named_parameters() if not weights.isfinite().all()]
        if broken:
            checkpoint = last_checkpoint(Path(self.args.output_dir))
            raise NonFiniteLossError(
                f"weights ({broken[0]}, …) became NaN or infinite by step {self.state.global_step} and were not saved; "
                f"last good checkpoint: {checkpoint or 'none yet'}. Start anew with a lower learning_rate"
            )
        folder.mkdir(parents=True, exist_ok=True)
        sentence_transformer = build_sentence_transformer(model, self.processing_class, self.prompts)
        sentence_transformer.save_pretrained(str(folder), create_model_card=False)
        (folder / "training_arguments.json").write_text(json.dumps(self.args.to_dict(), indent=2, default=str))
