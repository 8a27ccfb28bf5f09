"""What a training step needs of a device's memory, counted rather than measured."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.modeling_f2llm import F2LLMModel
from training.models.adapter import add_adapter
from training.models.model_size import count_parameters

if TYPE_CHECKING:
    from peft import LoraConfig

# A frozen weight; a trained one with its gradient and AdamW's two moments; with several processes, buckets of gradients
# under way. All fp32.
_BYTES_PER_FROZEN, _BYTES_PER_PARAMETER, _BYTES_OF_BUCKETS = 4, 16, 4
# Copies of the batch's embeddings that the loss and its gradient hold: own, gathered, by role, by width, gradients.
_COPIES_OF_EMBEDDINGS = 10


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device.

    Attributes:
        state: Weights, gradients and optimizer.
        activations: What one chunk keeps for its backward pass.
        loss: Embeddings of the whole batch and what the loss makes of them.
        teacher: Weights of the teacher.
        program: What the process holds already; on a GPU that is not the device's.
    """

    state: int
    activations: int
    loss: int
    teacher: int = 0
    program: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.activations + self.loss + self.teacher + self.program


def count_adapter(config: F2LLMConfig, adapter: LoraConfig) -> int:
    """Parameters of an adapter of a model of this shape.

    Raises:
        UserError: If the model has no layer of a name that is to be adapted.
    """
    with torch.device("meta"):
        model = F2LLMModel(deepcopy(config))
        add_adapter(model, deepcopy(adapter))
        return model.num_parameters(only_trainable=True)


def estimate_memory(
    config: F2LLMConfig,
    chunk_tokens: int,
    batch_texts: int,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    teacher: F2LLMConfig | None = None,
    processes: int = 1,
    sharded: bool = False,
    adapter: LoraConfig | None = None,
) -> MemoryEstimate:
    """Estimates a step's memory.

    Args:
        config: The model's shape.
        chunk_tokens: Tokens of the largest chunk.
        batch_texts: Distinct texts of the global batch.
        bf16: Whether layers compute in bf16 by autocast.
        gradient_checkpointing: Whether layers are computed again in the backward pass.
        teacher: The teacher's shape, if there is one.
        processes: Number of processes.
        sharded: Whether they share weights, gradients and optimizer (FSDP) or each holds its own (DDP).
        adapter: The adapter that is trained, if not the whole model is.
    """
    parameters = trained = count_parameters(config)
    state = parameters * _BYTES_PER_PARAMETER
    if adapter is not None:
        trained = count_adapter(config, adapter)
        state = parameters * _BYTES_PER_FROZEN + trained * _BYTES_PER_PARAMETER
    if processes > 1:
        state = state // processes if sharded else state + trained * _BYTES_OF_BUCKETS
    if bf16:
        # Autocast, or the graph where weights are frozen, keeps a copy of the weights of the layers.
        state += 2 * (parameters - config.vocab_size * config.hidden_size)
    outside, layer = _bytes_per_token(config, bf16, adapter)
    layers = config.num_hidden_layers
    if gradient_checkpointing:
        per_token = outside + layers * 4 * config.hidden_size + layer
    else:
        per_token = outside + layers * layer
    return MemoryEstimate(
        state=state,
        activations=int(chunk_tokens * per_token),
        loss=_COPIES_OF_EMBEDDINGS * 4 * batch_texts * config.hidden_size,
        teacher=0 if teacher is None else 4 * count_parameters(teacher),
        program=_program(),
    )


def estimate_pruning_memory(
    before: F2LLMConfig, after: F2LLMConfig, chunk_tokens: int, bf16: bool = False
) -> MemoryEstimate:
    """Estimates what calibrating and cutting a model needs: both models in fp32, and one layer's activations.

    Args:
        before: The shape of the model that is cut.
        after: The shape that is left.
        chunk_tokens: Tokens of a calibration pass, at most; 0 if the activations were measured before.
        bf16: Whether layers compute in bf16 by autocast.
    """
    outside, layer = _bytes_per_token(before, bf16)
    return MemoryEstimate(
        state=4 * (count_parameters(before) + count_parameters(after)),
        activations=int(chunk_tokens * (outside + layer)),
        loss=0,
        program=_program(),
    )


def _program() -> int:
    return 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss


def _bytes_per_token(config: F2LLMConfig, bf16: bool, adapter: LoraConfig | None = None) -> tuple[float, float]:
    """Bytes kept for the backward pass per token: outside of the layers, and by each layer."""
    short, long = 64, 128
    one, two = (
        (_kept_bytes(config, layers, long, bf16, adapter) - _kept_bytes(config, layers, short, bf16, adapter))
        / (long - short)
        for layers in (1, 2)
    )
    return 2 * one - two, two - one


def _kept_bytes(config: F2LLMConfig, layers: int, tokens: int, bf16: bool, adapter: LoraConfig | None = None) -> int:
    """Bytes that autograd keeps of a forward pass over one text, weights left out.

    What is kept grows with every width alike, so a model of one key-value head stands for all of them.
    """
    heads = config.num_key_value_heads
    small = F2LLMConfig.from_dict(
        {
            **config.to_dict(),
            **{
                "num_hidden_layers": layers,
                "layer_types": (2 * config.layer_types)[:layers],
                "max_window_layers": layers,
            },
            **{"matryoshka_dimensions": None, "is_matryoshka": False},
            **{"vocab_size": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1},
            **{"num_attention_heads": config.num_attention_heads // heads, "num_key_value_heads": 1},
            **{name: getattr(config, name) // heads for name in ("hidden_size", "intermediate_size")},
        }
    )
    model = F2LLMModel(small).train()
    if adapter is not None:
        narrow = deepcopy(adapter)
        narrow.r = max(adapter.r // heads, 1)
        add_adapter(model, narrow)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        # An output that keeps itself would never be freed.
        return tensor.detach()

    ids = torch.ones(1, tokens, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        # Held until everything is counted: memory that is freed is used again.
        output = model(input_ids=ids, sequence_lengths=[tokens])
    counted = sum(size for address, size in kept.items() if address not in weights)
    del output
    return counted * heads
