"""Keys of transformers with other defaults or other ways to write them, and what their values then mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers.integrations import is_tensorboard_available

from training.common.errors import UserError
from training.common.yaml_file import unknown_key

_CHECKPOINTING = (
    ("activation_checkpointing", "gradient_checkpointing"),
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
)
# Of torch.utils.checkpoint, but for what would draw other dropout when layers are computed again.
_CHECKPOINT_OPTIONS = ("use_reentrant", "determinism_check", "debug", "early_stop")
# Packed texts have no padding.
_TOKENS_SEEN = {"true": "all", "all": "all", "non_padding": "all", "false": "no", "no": "no"}


@dataclass
class TransformersArguments:
    """The keys of transformers' ``TrainingArguments`` that are declared again.

    Some have another default. Others are of a type of which HfArgumentParser reads a part only: a list or a text, a
    text or false.
    """

    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step."})
    report_to: list[str] | None = field(
        default=None,
        metadata={"help": "Trackers to log to, 'all' or 'none'; TensorBoard if it is installed and this is left out."},
    )
    include_num_input_tokens_seen: str = field(
        default="no",
        metadata={"help": "Count the tokens trained on: 'all' or 'non_padding', the same in packed texts, or 'no'."},
    )
    optim_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that GaLore, APOLLO and their like adapt: names, or one pattern."}
    )
    # Releases of transformers before 5.23 have them under their older names alone.
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "Compute layers again in the backward pass: less memory, a third more time."}
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of torch.utils.checkpoint as JSON, such as use_reentrant."}
    )
    liger_kernel_config: str | None = field(
        default=None, metadata={"help": "Which Liger kernels are used, as JSON: name to true or false."}
    )
    # All weights are used in every step and no buffer changes: what DDP would do about either costs time for nothing.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "See DDP."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "See DDP."})

    def _settle(self) -> None:
        """Gives the keys the values that transformers reads."""
        if self.report_to is None:
            self.report_to = ["tensorboard"] if is_tensorboard_available() else []
        self._settle_checkpointing()
        self._settle_tokens_seen()
        if str(self.fsdp).lower() in ("true", "false"):
            # Documented as a truth value, but declared as a text.
            self.fsdp = str(self.fsdp).lower() == "true"
        # Transformers takes anything for it, and fails in the training.
        self._mapping("lr_scheduler_kwargs")
        if isinstance(self.optim_target_modules, list) and len(self.optim_target_modules) == 1:
            # A text alone is a pattern or 'all-linear'.
            (self.optim_target_modules,) = self.optim_target_modules
        if self.trackio_static_space_id == "false":
            self.trackio_static_space_id = False
        if self.use_liger_kernel or self.liger_kernel_config is not None:
            # The default of Liger's that replaces the forward pass of a language model by one that computes its loss.
            kernels = {"fused_linear_cross_entropy": False, **self._mapping("liger_kernel_config")}
            for kernel in ("cross_entropy", "fused_linear_cross_entropy"):
                if kernels.get(kernel):
                    raise UserError(f"key 'liger_kernel_config': an embedding model has no {kernel!r}; give false")
            self.liger_kernel_config = kernels

    def _settle_checkpointing(self) -> None:
        for key, older in _CHECKPOINTING:
            if getattr(self, key) is None:
                setattr(self, key, getattr(self, older))
        options = self._mapping("activation_checkpointing_kwargs")
        for name in options:
            if name not in _CHECKPOINT_OPTIONS:
                raise unknown_key("key 'activation_checkpointing_kwargs'", name, _CHECKPOINT_OPTIONS)
        self.activation_checkpointing_kwargs = options or None
        for key, older in _CHECKPOINTING:
            setattr(self, older, getattr(self, key))

    def _settle_tokens_seen(self) -> None:
        counted = str(self.include_num_input_tokens_seen).lower()
        if counted not in _TOKENS_SEEN:
            raise UserError(
                f"key 'include_num_input_tokens_seen' cannot be {counted!r}; give 'all', 'non_padding' or 'no'"
            )
        self.include_num_input_tokens_seen = _TOKENS_SEEN[counted]
