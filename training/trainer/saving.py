"""Checkpoints and models as SentenceTransformer folders or adapters, whole or absent, and going on from them."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments

from modeling_f2llm.modeling_f2llm import F2LLMModel
from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.common import run_folder
from training.common.errors import NonFiniteError, OutputError, StoppedError, UserError, in_one_line, lost_contact
from training.common.outputs import move_into_place
from training.common.run_folder import STAGING, checkpoints, last_checkpoint, missing_part, options_of, step_of
from training.config.arguments import StageArguments
from training.distillation.distillation import Projection
from training.models.adapters import ADAPTER_NAME, ADAPTER_WEIGHTS, add_adapter, has_adapter, mend_saved, read_adapter
from training.models.model_folder import read_json, user_error
from training.models.model_ref import note_base
from training.models.static import StaticModel, save_static
from training.trainer.stopping import EarlyStopping

logger = logging.getLogger(__name__)

GO_ON = "run the same command with --resume"


def checkpoint_to_resume(output_dir: Path) -> Path | None:
    """Return the newest checkpoint with all its parts, after a look at each; newer ones without are warned of."""
    newest = last_checkpoint(output_dir)
    if newest is None:
        return None
    for passed in run_folder.numbered_checkpoints(output_dir):
        if step_of(passed) > step_of(newest):
            logger.warning("%s lacks %s; going on from %s", passed, missing_part(passed), newest.name)
    with reading_checkpoint(newest):
        tensors = sorted([*newest.glob("*.safetensors"), *newest.glob("*.pt"), *newest.glob("rng_state*.pth")])
        for path in (newest / "trainer_state.json", *tensors):
            try:
                # Their structure, not the values of tensors.
                if path.suffix == ".json":
                    TrainerState.load_from_json(str(path))
                elif path.suffix == ".safetensors":
                    with safe_open(path, "pt"):
                        pass
                elif not zipfile.is_zipfile(path):
                    raise ValueError("it is cut or overwritten")
            except Exception as error:
                raise ValueError(f"{path.name} cannot be read ({in_one_line(error)})") from None
    return newest


@contextmanager
def writing(what: str, output_dir: Path) -> Iterator[None]:
    """Turn an error of the block, which writes ``what``, into a StoppedError that names the run's last checkpoint."""
    try:
        yield
    # torch, safetensors and tokenizers raise other errors than OSError for a full disk.
    except Exception as error:
        if isinstance(error, UserError | StoppedError | torch.OutOfMemoryError) or lost_contact(error):
            raise
        saved = last_checkpoint(output_dir) or "none yet"
        what = f"{what} could not be written ({in_one_line(error)}); last good checkpoint: {saved}"
        raise StoppedError(what, f"Mend that and {GO_ON}") from error


@contextmanager
def reading_checkpoint(checkpoint: Path | str | None, best: bool = False) -> Iterator[None]:
    """Let an error of the block, which reads a checkpoint if one is given, say how to go on without it.

    ``best`` says that it is read at the end, as the best one.
    """
    try:
        # Trainer would pass over a best one without weights.
        if best and (missing := missing_part(Path(checkpoint))) is not None:
            raise ValueError(f"it lacks {missing}")
        yield
    except Exception as error:
        others = (UserError, StoppedError, OSError, MemoryError, torch.OutOfMemoryError)
        # Libraries can raise any other exception on a damaged file.
        if checkpoint is None or isinstance(error, others) or lost_contact(error):
            raise
        checkpoint = Path(checkpoint)
        before = [each for each in checkpoints(checkpoint.parent) if step_of(each) < step_of(checkpoint)]
        what = "is the best checkpoint, but cannot be read" if best else "cannot be resumed from"
        remedy = "no other checkpoint is before it: start again with another output_dir"
        if best or before:
            goal = "end in the last one" if best else f"go on from {before[-1].name}"
            remedy = f"move that folder elsewhere and {GO_ON} to {goal}"
        raise OutputError(f"{checkpoint}: {what}: {in_one_line(error)}", remedy) from error


def follow_arguments(state: TrainerState, args: TrainingArguments, checkpoint: Path) -> None:
    """Let a training state that was read from a checkpoint follow the stage as it is now."""
    if state.global_step > state.max_steps:
        raise OutputError(
            f"{checkpoint}: is of step {step_of(checkpoint)}, but the stage now ends at step {state.max_steps}",
            f"undo the change, or start again from 'model: {checkpoint}' with another output_dir",
        )
    state.compute_steps(args, state.max_steps)
    before = read_json(checkpoint / "training_arguments.json")
    same = all(before.get(key) == getattr(args, key) for key in ("metric_for_best_model", "greater_is_better"))
    if not same and state.best_metric is not None:
        logger.warning("another metric chooses the best model: it is looked for from step %d on", state.global_step)
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        state.stateful_callbacks.pop(EarlyStopping.__name__, None)


class SavingTrainer(Trainer):
    """A Trainer whose checkpoints and models are SentenceTransformer folders.

    A checkpoint is written to a hidden folder and renamed when it is whole, by all processes together. Where an adapter
    is trained, folders hold it and not its base; only the sharded state beside them, under FSDP, has all weights.
    """

    args: StageArguments

    def __init__(self, prompts: dict[str, str] | None = None, **kwargs: Any) -> None:
        self.prompts = prompts
        self.projection: Projection | None = None
        self.base_revision: str | None = None  # of the base of a trained adapter
        self._staged, self._saved_step = False, -1
        self._options: list[dict[str, Any]] = []
        super().__init__(**kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        output_dir = super()._get_output_dir(trial)
        return str(Path(output_dir) / STAGING) if self._staged else output_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(super()._get_output_dir(trial))
        final = output_dir / f"checkpoint-{self.state.global_step}"
        # The end of an epoch may ask again. Every process must decide the same, so none looks at a shared disk for it.
        if self._saved_step == self.state.global_step:
            return
        self._staged = True
        try:
            with writing(f"{final}: the checkpoint", output_dir):
                if self.args.should_save:
                    # Fails if the run's folder has vanished: what is left could not be resumed.
                    (output_dir / STAGING).mkdir()
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.state.best_global_step == self.state.global_step:
                    self.state.best_model_checkpoint = str(final)
                if self.args.should_save:
                    partial, best = output_dir / STAGING / final.name, self.state.best_model_checkpoint
                    # Trainer wrote down the hidden folder as that of the best model.
                    self.state.save_to_json(str(partial / "trainer_state.json"))
                    move_into_place(partial, final)
                    run_folder.rotate(output_dir, self.args.save_total_limit, Path(best) if best else None)
        finally:
            self._staged = False
            if self.args.should_save:
                run_folder.remove_leftovers(output_dir)
        self._saved_step = self.state.global_step
        self.accelerator.wait_for_everyone()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = super()._determine_best_metric(metrics, trial)
        # One that is to be loaded at the end is always saved.
        self.control.should_save |= best and self.args.load_best_model_at_end
        return best

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.projection is not None and self.args.should_save:
            self.projection.save(Path(output_dir))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer and remember the options that the stage gives it."""
        with user_error("the optimizer cannot be set up", "correct 'optim' and the keys that it reads"):
            optimizer = super().create_optimizer(*args, **kwargs)
        self._options = self._options or options_of(optimizer)
        return optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Create the schedule, and refuse one that cannot be computed to its end."""
        with user_error(
            f"a schedule of {num_training_steps} steps cannot be set up",
            f"correct 'lr_scheduler_type', 'lr_scheduler_kwargs' or 'warmup_steps: {self.args.warmup_steps:g}'",
        ):
            scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
            for function in getattr(scheduler, "lr_lambdas", ()):
                function(num_training_steps)
        return scheduler

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        with reading_checkpoint(checkpoint):
            start = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
            if checkpoint:
                follow_arguments(self.state, self.args, Path(checkpoint))
        return start

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with reading_checkpoint(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if self.projection is not None:
                self.projection.load(Path(checkpoint))
        # Learning rate, decay and schedule of the checkpoint are those of the stage as it was then. A schedule that
        # follows a metric has no rates by step: a stage cannot change it (training.stages.continuation).
        run_folder.apply_options(self.optimizer, self._options)
        scheduler, groups = self.lr_scheduler, self.optimizer.param_groups
        if isinstance(scheduler, LambdaLR) and len(groups) == len(self._options):
            scheduler.base_lrs = [own["lr"] for own in self._options]
            for group, base, function in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
                group["initial_lr"], group["lr"] = base, base * function(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in groups]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with reading_checkpoint(resume_from_checkpoint):
            if not self._read_adapter(Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _read_adapter(self, checkpoint: Path) -> bool:
        """Read an adapter, which Trainer knows only as models of peft's own class; return whether there is one."""
        if not has_adapter(self.model) or self.is_fsdp_enabled:
            return False
        read_adapter(self.model, checkpoint / ADAPTER_WEIGHTS)
        return True

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        with reading_checkpoint(best, best=True):
            if not self._read_adapter(best):
                super()._load_best_model()
            if self.projection is not None:
                self.projection.load(best)

    def _finalize_training(self, *args: Any) -> Any:
        # With a limit of 1, Trainer would delete the newest checkpoint in favour of the best one: the newest is what
        # an interrupted run goes on from, or one whose finished model is still to be written.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = limit

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a complete SentenceTransformer folder; sharded weights are gathered first."""
        if self.is_fsdp_enabled:
            self._save(output_dir, self.accelerator.get_state_dict(self.model))
        else:
            super().save_model(output_dir, _internal_call=_internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a complete SentenceTransformer folder with the stage's arguments."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        model = model if state_dict is None else _with_weights(model, state_dict)
        broken = [name for name, weights in model.named_parameters() if not weights.isfinite().all()]
        if broken:
            saved = last_checkpoint(Path(self.args.output_dir)) or "none yet"
            raise NonFiniteError(
                f"weights ({broken[0]}, …) became NaN or infinite by step {self.state.global_step} and were not saved; "
                f"last good checkpoint: {saved}. Start again with a lower learning_rate"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(model, StaticModel):
            save_static(folder, model, self.processing_class, self.prompts)
        else:
            sentence_transformer = build_sentence_transformer(model, self.processing_class, self.prompts)
            sentence_transformer.save_pretrained(str(folder), create_model_card=False)
        if self.base_revision is not None:
            mend_saved(folder)
            note_base(folder, model.peft_config[ADAPTER_NAME].base_model_name_or_path, self.base_revision)
        (folder / "training_arguments.json").write_text(json.dumps(self.args.to_dict(), indent=2, default=str))


def _with_weights(model: PreTrainedModel, state_dict: dict[str, Tensor]) -> F2LLMModel:
    """Return the model, unwrapped, with the given weights."""
    # Buffers that no state holds (rotary frequencies) are made; weights are not.
    with init_empty_weights(include_buffers=False):
        whole = F2LLMModel(model.config)
        if has_adapter(model):
            add_adapter(whole, model.peft_config[ADAPTER_NAME])
    whole.load_state_dict(state_dict, assign=True)
    return whole
