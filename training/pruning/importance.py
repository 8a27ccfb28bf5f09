"""How much each part of a model matters: statistics of its activations, or of its weights where there are no texts.

A model that was measured once can be cut to any shape by any of the methods in ``plan.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from modeling_f2llm.modeling_f2llm import F2LLMModel
from training.common.errors import UserError
from training.common.keyed import keyed_bits, text_key
from training.common.outputs import whole_file
from training.common.run_folder import IMPORTANCE_FILE
from training.data.prepared import PreparedSource
from training.models.encoding import packed_texts
from training.models.model_folder import user_error

# The draw of texts that calibrate, and tokens of a pass over them.
_CALIBRATION, TOKENS_AT_ONCE = 41, 8192


@dataclass(frozen=True)
class Importance:
    """Statistics of a model of ``L`` layers, width ``h`` and MLP size ``i``, all fp32 on the CPU, over all tokens."""

    # ``(2L + 1, h)`` mean square of each channel of the norms' outputs. Rows ``2l`` and ``2l + 1`` are
    # ``input_layernorm`` and ``post_attention_layernorm`` of layer ``l``, the last is the final norm.
    norms: Tensor
    neurons: Tensor  # ``(L, i)`` mean square of each MLP neuron, ``silu(gate(x)) * up(x)``
    change: Tensor | None = None  # ``(L,)`` mean of 1 - cosine(input, output) of each layer; None if not measured
    model: str = ""  # the caller's name of the model, such as a hash of its weights

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        with whole_file(path) as partial:
            save_file(tensors, partial, {"model": self.model})

    @classmethod
    def load(cls, path: Path, model: str) -> Importance:
        """Read what :meth:`save` wrote, or ``importance.safetensors`` in a folder, of the model of this name."""
        path = path / IMPORTANCE_FILE if path.is_dir() else path
        with user_error(f"{path}: holds no importance of a model", "measure the model again"):
            with safe_open(path, framework="pt") as file:
                loaded = cls(**{name: file.get_tensor(name) for name in file.keys()}, model=file.metadata()["model"])
        if loaded.model != model:
            raise UserError(f"{path}: was measured on {loaded.model!r}, not on {model!r}; measure this model")
        return loaded

    def channels(self, layers: Iterable[int]) -> Tensor:
        """``(h,)`` importance of the hidden channels to a model of these layers.

        The root mean square over tokens at each norm, summed over the norms of the kept layers and the final norm: L2
        over batch and sequence, as in Minitron (Muralidharan et al., arXiv 2407.14679, section 2.2).
        """
        rows = [row for layer in layers for row in (2 * layer, 2 * layer + 1)]
        return self.norms[[*rows, len(self.norms) - 1]].sqrt().sum(dim=0)


def calibrate(
    model: F2LLMModel, batches: Iterable[tuple[Tensor, list[int]]], model_name: str = "", autocast: bool = False
) -> Importance:
    """Measure activations over a small calibration set.

    With ``x`` the value of a channel at a token and ``T`` tokens in all: mean square ``sum(x ** 2) / T`` of the outputs
    of norms and of the inputs of ``down_proj``, whose roots are the L2 norms that Minitron prunes width by (arXiv
    2407.14679); and ``1 - mean(cos(input, output))`` of each layer, the block influence of ShortGPT (Men et al., arXiv
    2403.03853). All sums are fp32 in any precision of the model, which does not change.
    """
    config, layers = model.config, model.config.num_hidden_layers
    sums = {
        "norms": torch.zeros(2 * layers + 1, config.hidden_size, device=model.device),
        "neurons": torch.zeros(layers, config.intermediate_size, device=model.device),
        "change": torch.zeros(layers, device=model.device),
    }
    tokens = 0
    with torch.no_grad(), _observed(model, sums), torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        for number, (input_ids, lengths) in enumerate(batches):
            model(input_ids=input_ids.to(model.device), sequence_lengths=lengths)
            # A sum that has become NaN or infinite stays so.
            if not all(total.isfinite().all() for total in sums.values()):
                raise UserError(f"calibration, batch {number}: activations are NaN or infinite; check the weights")
            tokens += input_ids.numel()
    if not tokens:
        raise UserError("calibration: the texts hold no token; give texts to measure activations on")
    return Importance(**{name: total.cpu() / tokens for name, total in sums.items()}, model=model_name)


@contextmanager
def _observed(model: F2LLMModel, sums: dict[str, Tensor]) -> Iterator[None]:
    """Put the model in eval mode with hooks that add to the sums; restore its state afterwards."""

    def add_output(row: int, module: nn.Module, inputs: Any, output: Tensor) -> None:
        sums["norms"][row] += _sum_of_squares(output)

    def add_input(layer: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sums["neurons"][layer] += _sum_of_squares(inputs[0])

    def add_change(layer: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sums["change"][layer] += (1 - torch.cosine_similarity(inputs[0].float(), output.float(), dim=-1)).sum()

    training, compiled = model.training, [layer.compiled for layer in model.layers]
    handles = [model.norm.register_forward_hook(partial(add_output, 2 * len(model.layers)))]
    for number, layer in enumerate(model.layers):
        # A compiled half of a layer would not call the hooks inside.
        layer.compiled = False
        handles += [
            layer.input_layernorm.register_forward_hook(partial(add_output, 2 * number)),
            layer.post_attention_layernorm.register_forward_hook(partial(add_output, 2 * number + 1)),
            layer.mlp.down_proj.register_forward_pre_hook(partial(add_input, number)),
            layer.register_forward_hook(partial(add_change, number)),
        ]
    try:
        model.eval()
        yield
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
        for layer, was_compiled in zip(model.layers, compiled, strict=True):
            layer.compiled = was_compiled


def _sum_of_squares(activations: Tensor) -> Tensor:
    """``(1, T, n)`` → ``(n,)``, in fp32."""
    return activations.float().square().flatten(0, -2).sum(dim=0)


@torch.no_grad()
def weight_importance(model: F2LLMModel, model_name: str = "") -> Importance:
    """Estimate the statistics from weights alone, where there is no text to calibrate on; ``change`` stays None.

    They are those of inputs with independent components of unit variance at every matrix: a channel has the mean square
    of its embeddings, plus the squared norms of the rows of ``o_proj`` and ``down_proj`` that write to it, normed; a
    neuron the squared norms of its rows of ``gate_proj`` and ``up_proj`` and its column of ``down_proj``, multiplied.
    """
    embeddings = model.embed_tokens.weight
    stream = _squared_norm(embeddings, 0) / len(embeddings)
    norms, neurons = [], []
    for layer in model.layers:
        norms.append(_normed(layer.input_layernorm, stream))
        stream = stream + _squared_norm(layer.self_attn.o_proj.weight, 1)
        norms.append(_normed(layer.post_attention_layernorm, stream))
        scale = layer.post_attention_layernorm.weight
        gate, up = (_squared_norm(each.weight * scale, 1) for each in (layer.mlp.gate_proj, layer.mlp.up_proj))
        neurons.append(gate * up * _squared_norm(layer.mlp.down_proj.weight, 0))
        stream = stream + _squared_norm(layer.mlp.down_proj.weight, 1)
    norms.append(_normed(model.norm, stream))
    return Importance(torch.stack(norms).cpu(), torch.stack(neurons).cpu(), model=model_name)


def _squared_norm(weight: Tensor, dim: int) -> Tensor:
    """Squared L2 norms along a dimension, in fp32, without a copy of the matrix."""
    return torch.linalg.vector_norm(weight.detach(), dim=dim, dtype=torch.float32).square()


def _normed(norm: nn.Module, stream: Tensor) -> Tensor:
    """``(h,)`` mean square of a norm's output for channels of these mean squares."""
    return norm.weight.detach().float().square() * stream / stream.mean().clamp_min(torch.finfo(torch.float32).tiny)


def calibration_batches(
    sources: Sequence[PreparedSource], texts: int, seed: int, max_tokens: int | None = None
) -> Iterator[tuple[Tensor, list[int]]]:
    """Pack ``texts`` texts, as many of every source, drawn by key, into batches of token ids and lengths."""
    for source, drawn in calibration_texts(sources, texts, seed):
        for batch in packed_texts(source, drawn, max_tokens or TOKENS_AT_ONCE):
            yield batch.input_ids, batch.lengths


def calibration_texts(
    sources: Sequence[PreparedSource], texts: int, seed: int
) -> Iterator[tuple[PreparedSource, np.ndarray]]:
    """Yield each source with the positions of the texts that are drawn from it."""
    each = -(-texts // len(sources))
    for source in sources:
        draws = keyed_bits(seed, _CALIBRATION, text_key(source.name), np.arange(source.description["texts"]))
        yield source, np.sort(np.argsort(draws, kind="stable")[:each])
