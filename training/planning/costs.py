"""What a stage costs: operations, memory and traffic by formula, time from ten measured steps.

The forward pass of a token takes two operations for each weight outside the embeddings (Kaplan et al., "Scaling Laws
for Neural Language Models", 2020, section 2.1) and, in each layer, ``4 * heads * head_dim`` for each token of its text
(Chowdhery et al., "PaLM", 2022, appendix B: scores and their sum over values, without a discount for causality). The
backward pass takes twice as many, or as many if only an adapter is trained, whose own operations are left out. The
gradient cache encodes all chunks but the last twice, and gradient checkpointing takes a second forward pass (an upper
bound: PyTorch may skip the end of each layer). A teacher without a cache, and evaluations, take forward passes.

Between the matrix products tensors are read and written. This traffic is counted in the bytes that a forward pass keeps
for its backward pass, as often as its operations are; how long a device takes for them is in ``devices.py``.
"""

from __future__ import annotations

import time
from copy import deepcopy
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.losses import MOST_COSINES
from modeling_f2llm.modeling_f2llm import F2LLMModel
from training.config.arguments import StageArguments
from training.config.recipe import Stage
from training.data.prepared import PreparedSource
from training.distillation.distillation import Distillation, make_projection, read_width
from training.distillation.teacher import Teacher
from training.models.adapters import adapter_config, add_adapter
from training.models.encoding import embed_chunk
from training.models.model_folder import count_looked_up, count_parameters, forward_flops
from training.planning.batches import Batches
from training.stages.setup import make_trainer, model_options
from training.trainer.monitor import peak_memory, reset_peak_memory
from training.trainer.trainer import F2LLMTrainer

if TYPE_CHECKING:
    from peft import LoraConfig

# Bytes of a frozen fp32 weight; of a trained one with its gradient and AdamW's two moments; of gradient buckets under
# way between several processes.
_BYTES_PER_FROZEN, _BYTES_PER_PARAMETER, _BYTES_OF_BUCKETS = 4, 16, 4
# Copies of the batch's embeddings that the loss and its gradient hold: own, gathered, by role, by width, gradients.
_COPIES_OF_EMBEDDINGS, _COPIES_WITH_TEACHER = 6, 2
# fp32 matrices, a number for each query and positive of the batch, that autograd keeps of each width: of the in-batch
# loss, also on quantized embeddings, dot products, half scaled ones and logarithms of chances; then of other terms.
_OF_IN_BATCH, _OF_SPREAD, _OF_SCORES = 3, 2.5, 4
# Under FSDP: layers, and tables of embeddings, that are whole on a device for a while.
_GATHERED_LAYERS, _GATHERED_TABLES = 4, 3
# The first steps allocate, compile and fill caches.
_WARM_UP, _STEPS = 2, 10


class KeptBytes(NamedTuple):
    """Bytes per token that a forward pass keeps for the backward pass, without weights."""

    outside: float  # of the layers; with what the last one keeps, which computes little but keys and values
    layer: float

    def of(self, config: F2LLMConfig) -> float:
        """Return those of all layers together."""
        return self.outside + (config.num_hidden_layers - 1) * self.layer


def _passes(batches: Batches, gradient_checkpointing: bool, adapter: bool) -> float:
    """Return the forward passes of a batch's tokens that a step is worth."""
    repeated = batches.repeated_tokens / batches.tokens if batches.tokens else 0.0
    return (2 if adapter else 3) + repeated + gradient_checkpointing


def step_flops(config: F2LLMConfig, batches: Batches, gradient_checkpointing: bool, adapter: bool = False) -> float:
    """Return the operations of an average step over all processes, without those of a teacher."""
    forward = forward_flops(config, batches.texts, batches.tokens, batches.squared_tokens)
    return forward * _passes(batches, gradient_checkpointing, adapter)


def stage_flops(
    args: StageArguments,
    config: F2LLMConfig,
    teacher: F2LLMConfig | None,  # if it embeds in every step
    steps: int,
    training: Batches,
    validation: Batches,
    evaluations: int,
) -> float:
    """Return the operations of a training stage with so many steps and evaluations."""
    step = step_flops(config, training, args.activation_checkpointing, args.lora)
    if teacher is not None:
        step += forward_flops(teacher, training.texts, training.tokens, training.squared_tokens)
    evaluation = validation.count * forward_flops(
        config, validation.texts, validation.tokens, validation.squared_tokens
    )
    return steps * step + evaluations * evaluation


def stage_traffic(
    args: StageArguments,
    own: float,  # bytes that a forward pass keeps of a token
    teacher: float,  # the same of a teacher that embeds in every step, or 0
    steps: int,
    training: Batches,
    validation: Batches,
    evaluations: int,
) -> float:
    """Return the bytes that a stage moves between its matrix products, without loss and optimizer."""
    step = training.tokens * (own * _passes(training, args.activation_checkpointing, args.lora) + teacher)
    return steps * step + evaluations * validation.count * validation.tokens * own


def loss_bytes(args: StageArguments, config: F2LLMConfig, rows: int, texts: int, teacher_width: int = 0) -> int:
    """Return what the loss of a retrieval batch of ``rows`` holds, on every process.

    ``texts`` are the batch's distinct ones; ``teacher_width`` is that of the teacher's embeddings, 0 without a teacher.
    """
    widths, pairs = len(args.train_dims(config.hidden_size) or [0]), rows**2
    in_batch = _OF_IN_BATCH * widths * (1 + sum(map(bool, args.mapping("quantized").values())))
    matrices = in_batch * min(pairs, MOST_COSINES)
    of_scores = bool(teacher_width and args.score_distillation_weight)
    matrices += widths * (_OF_SPREAD * bool(args.spread_weight) + _OF_SCORES * of_scores) * pairs
    if args.mask_duplicates or args.mask_false_negatives is not None:
        matrices += pairs / 4
    # Each exit has its own embeddings and cosines.
    exits = len(args.train_exits(config.num_hidden_layers) or [0])
    matrices *= exits
    if args.mask_false_negatives is not None:
        # Their cosines are compared at once, before the loss.
        matrices = max(matrices, (3 + 1 / 4) * pairs)
    if args.task_types is not None and not {"retrieval", "similarity"} & {*args.task_types}:
        matrices = 0
    copies = exits * _COPIES_OF_EMBEDDINGS * config.hidden_size
    if teacher_width:
        copies += _COPIES_WITH_TEACHER * (config.hidden_size + teacher_width)
    return int(4 * (matrices + copies * texts))


class MemoryEstimate(NamedTuple):
    """Bytes on one device."""

    state: int  # weights, gradients and optimizer
    activations: int  # what one chunk keeps for its backward pass
    loss: int = 0  # embeddings of the whole batch and what the loss derives from them
    teacher: int = 0
    gathered: int = 0  # of sharded weights and their gradients, for a while

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self)


def count_adapter(config: F2LLMConfig, adapter: LoraConfig) -> int:
    """Return the parameters of an adapter of a model of this shape."""
    with torch.device("meta"):
        model = F2LLMModel(deepcopy(config))
        add_adapter(model, deepcopy(adapter))
        return model.num_parameters(only_trainable=True)


def estimate_memory(
    config: F2LLMConfig,
    chunk_tokens: int,  # of the largest chunk
    loss: int,  # see `loss_bytes`
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    teacher: int = 0,  # parameters of one that stays in memory
    processes: int = 1,
    sharded: bool = False,  # processes share weights, gradients and optimizer (FSDP)
    adapter: LoraConfig | None = None,  # trained instead of the model
    kept: KeptBytes | None = None,  # if they are known, as
    parameters: int | None = None,  # of the model
) -> MemoryEstimate:
    """Estimate the memory of a training step of a model of this shape, on one device."""
    parameters = trained = parameters or count_parameters(config)
    state = parameters * _BYTES_PER_PARAMETER
    if adapter is not None:
        trained = count_adapter(config, adapter)
        state = parameters * _BYTES_PER_FROZEN + trained * _BYTES_PER_PARAMETER
    if processes > 1:
        state = state // processes if sharded else state + trained * _BYTES_OF_BUCKETS
    table = count_looked_up(config)
    if bf16:
        # Autocast keeps a copy of the weights of the layers; if these are frozen, the graph does, of what it has.
        recomputed = adapter is not None and gradient_checkpointing
        state += 2 * (parameters - table) // (config.num_hidden_layers if recomputed else 1)
    kept = kept or kept_bytes(config, bf16, adapter)
    per_token = kept.of(config)
    if gradient_checkpointing:
        per_token = kept.outside + config.num_hidden_layers * 4 * config.hidden_size + kept.layer
    activations, gathered = int(chunk_tokens * per_token), 0
    if processes > 1 and sharded:
        one = (parameters - table) // config.num_hidden_layers
        # The layer at work and the next, and their gradients; or the table, when there are no activations.
        gathered = max(_GATHERED_LAYERS * 4 * one, _GATHERED_TABLES * 4 * table - activations - loss)
    return MemoryEstimate(
        state=state,
        activations=activations,
        loss=loss,
        teacher=_BYTES_PER_FROZEN * teacher,
        gathered=gathered,
    )


def estimate_pruning_memory(
    before: F2LLMConfig, after: F2LLMConfig, chunk_tokens: int, bf16: bool = False
) -> MemoryEstimate:
    """Estimate the memory of pruning: both models in fp32, and one layer's activations of a calibration pass."""
    activations = chunk_tokens * sum(kept_bytes(before, bf16))
    return MemoryEstimate(4 * (count_parameters(before) + count_parameters(after)), int(activations))


def kept_bytes(config: F2LLMConfig, bf16: bool, adapter: LoraConfig | None = None) -> KeptBytes:
    """Return the bytes per token that autograd keeps, as it keeps them for a narrow model."""
    one, two = (
        # Longer than what a CPU has a way of its own for.
        (_kept_bytes(config, layers, 600, bf16, adapter) - _kept_bytes(config, layers, 300, bf16, adapter)) / 300
        for layers in (1, 2)
    )
    return KeptBytes(one, two - one)


def _kept_bytes(config: F2LLMConfig, layers: int, tokens: int, bf16: bool, adapter: LoraConfig | None) -> int:
    """Return the bytes that autograd keeps of a forward pass over one text, without weights.

    They are proportional to every width, so a model with one key-value head is measured.
    """
    heads = config.num_key_value_heads
    fields = config.to_dict()
    fields |= {name: fields[name] // heads for name in ("num_attention_heads", "hidden_size", "intermediate_size")}
    fields |= {"num_key_value_heads": 1, "matryoshka_dimensions": None, "is_matryoshka": False}
    fields |= {"embedding_ranks": None, "vocab_size": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    fields |= {"num_hidden_layers": layers, "max_window_layers": layers}
    model = F2LLMModel(F2LLMConfig.from_dict({**fields, "layer_types": (2 * config.layer_types)[:layers]})).train()
    if adapter is not None:
        narrow = deepcopy(adapter)
        narrow.r = max(adapter.r // heads, 1)
        add_adapter(model, narrow)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        # An output that keeps itself would never be freed.
        return tensor.detach()

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        # Held until everything is counted: freed memory would be used, and counted, again.
        output = embed_chunk(model, torch.ones(1, tokens, dtype=torch.long), [tokens])
    for weight in model.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    del output
    return sum(kept.values()) * heads


class _Clock(TrainerCallback):
    """Records the end and the tokens of each step."""

    def __init__(self, trainer: F2LLMTrainer) -> None:
        self.trainer, self.steps = trainer, []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.steps.append((time.perf_counter(), self.trainer.last_batch["tokens"]))


def measure_stage(
    stage: Stage,
    config: F2LLMConfig,
    sources: list[PreparedSource],
    tokenizer: PreTrainedTokenizerBase,
    teacher: F2LLMConfig | None = None,  # if it embeds in every step
) -> tuple[float, int]:
    """Run the first steps of a stage with random weights; return seconds per token of a step, and the peak of memory.

    Tokens are those of all processes. Memory, in bytes, is that of the GPU or, without one, of the process.
    """
    args = deepcopy(stage.arguments)
    args.max_steps, args.load_best_model_at_end = _WARM_UP + _STEPS, False
    args.save_strategy, args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    args.logging_strategy, args.logging_first_step, args.report_to = IntervalStrategy.NO, False, []
    options = {"dtype": torch.float32, **model_options(args)}
    model = F2LLMModel._from_config(deepcopy(config), **options)
    if (adapter := adapter_config(args)) is not None:
        add_adapter(model, adapter)
    guide = None
    if teacher is not None:
        widths = (config.hidden_size, teacher.hidden_size)
        frozen, projection = Teacher(F2LLMModel._from_config(teacher, **options)), make_projection(args, *widths)
        guide = Distillation(read_width(args, *widths), frozen, projection=projection)
    # On the disk of the stage's checkpoints.
    with TemporaryDirectory(dir=args.prepared_folder, prefix=".measure-") as folder:
        args.output_dir = folder
        trainer = make_trainer(Stage(stage.name, stage.keys, args), model, sources, tokenizer, guide)
        clock = _Clock(trainer)
        trainer.add_callback(clock)
        reset_peak_memory()
        trainer.train()
        if trainer.interruption.signal:
            raise KeyboardInterrupt(trainer.interruption.signal)
    ends, tokens = np.array(clock.steps[_WARM_UP - 1 :]).T
    return float((ends[-1] - ends[0]) / tokens[1:].sum()), peak_memory()
