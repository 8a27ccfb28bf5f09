"""The shape of a model within a budget of parameters or megabytes: those possible, and the loss of each untrained.

The shapes are uniform: all layers have the same MLP size. Each uses the budget as fully as it can, so that a wider one
is shallower, has a smaller MLP or a smaller vocabulary.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn.functional import log_softmax, normalize
from transformers import PreTrainedTokenizerBase

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.modeling_f2llm import F2LLMModel
from training.common.errors import UserError
from training.common.outputs import write_whole
from training.common.run_folder import PRUNING_SEARCH
from training.common.yaml_file import unknown_key
from training.config.arguments import StageArguments
from training.data.prepared import PreparedSource, text_table
from training.models.encoding import balanced_chunks, embed_chunk
from training.pruning.importance import TOKENS_AT_ONCE, calibration_texts
from training.pruning.plan import BUDGET_KEYS, PRUNED_FIELDS, PruningPlan, pruned_config
from training.pruning.pruning import apply_plan
from training.pruning.vocabulary import rank_tokens, trim_vocabulary

logger = logging.getLogger("training")

# Names of dtypes in safetensors files, and bytes of a number.
_DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
# How many sizes of each dimension are tried: neighbours of a finer grid differ by less than the score can tell.
_DEPTHS, _WIDTHS = 6, 4
_VOCABULARIES = (1.0, 0.75, 0.5, 0.25)
# Texts whose similarities are held at once.
_MOST_COMPARED = 1024
# MLP sizes are multiples of it where the model's is: GPUs multiply such matrices fastest.
_MLP_STEP = 8


class Shape(NamedTuple):
    """What a model is cut to."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int

    def parameters(self, config: F2LLMConfig) -> int:
        """Count the parameters of a model with the heads of ``config`` in this shape, tied embeddings once.

        ``V h + L (2 h n d + 2 h k d + 2 d + 3 h i + 2 h) + h``, and with biases ``L (n d + 2 k d + h)`` more.
        """
        vocabulary, width, mlp, depth = self
        queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        layer = 2 * width * (queries + keys) + 2 * config.head_dim + 3 * width * mlp + 2 * width
        layer += (queries + 2 * keys + width) * config.attention_bias
        return vocabulary * width + depth * layer + width

    def cut(self, config: F2LLMConfig) -> F2LLMConfig:
        """Return the configuration of a model that is cut to this shape, without its vocabulary."""
        return pruned_config(config, {name: getattr(self, name) for name in PRUNED_FIELDS})

    def __str__(self) -> str:
        layers = f"{self.num_hidden_layers} layer{'s' * (self.num_hidden_layers > 1)}"
        return f"{self.vocab_size:,} tokens, width {self.hidden_size}, MLP {self.intermediate_size}, {layers}"


@dataclass(frozen=True)
class Budget:
    """The most that a model may have; None for no limit."""

    parameters: int | None
    megabytes: float | None  # of the weights file in ``dtype``, in 10^6 bytes as on the Hub
    dtype: str
    where: str  # what errors call it

    @classmethod
    def read(cls, given: Mapping[str, Any], where: str) -> Budget | None:
        """Read ``max_parameters`` or ``max_megabytes`` with ``dtype``; None if neither is there: then it is a shape."""
        if not {"max_parameters", "max_megabytes"} & given.keys():
            return None
        if other := [key for key in given if key in (*PRUNED_FIELDS, "family")]:
            raise UserError(f"{where}: gives a budget and {other[0]}, which follows from the budget; give one of them")
        if unknown := [key for key in given if key not in BUDGET_KEYS]:
            raise unknown_key(where, unknown[0], list(BUDGET_KEYS))
        megabytes, dtype = given.get("max_megabytes"), given.get("dtype", "float32")
        if megabytes is None and "dtype" in given:
            raise UserError(f"{where}: dtype has no effect without max_megabytes; take it out")
        if dtype not in _DTYPES:
            raise UserError(f"{where}: dtype cannot be {dtype!r}; use one of {', '.join(_DTYPES)}")
        is_number = isinstance(megabytes, int | float) and not isinstance(megabytes, bool)
        if "max_megabytes" in given and not (is_number and 0 < megabytes < float("inf")):
            raise UserError(f"{where}: max_megabytes must be a number above 0, got {megabytes!r}")
        count = _read_count(given["max_parameters"], where) if "max_parameters" in given else None
        return cls(count, megabytes, dtype, where)

    def most_parameters(self, config: F2LLMConfig, depth: int) -> int:
        """Return the most parameters that a model of ``depth`` of the layers of ``config`` may have."""
        limits = [] if self.parameters is None else [self.parameters]
        if self.megabytes is not None:
            of_weights = int(Decimal(str(self.megabytes)) * 10**6) - header_bytes(config, depth, self.dtype)
            limits.append(of_weights // _DTYPES[self.dtype][1])
        return min(limits)

    def size(self, config: F2LLMConfig, shape: Shape) -> float:
        """Return the megabytes of a weights file in ``dtype``, at most."""
        number = shape.parameters(config) * _DTYPES[self.dtype][1]
        return (number + header_bytes(config, shape.num_hidden_layers, self.dtype)) / 1e6

    def __str__(self) -> str:
        limits = [] if self.parameters is None else [f"{self.parameters:,} parameters"]
        limits += [] if self.megabytes is None else [f"{self.megabytes:g} MB in {self.dtype}"]
        return " and ".join(limits)


def _read_count(value: Any, where: str) -> int:
    """Read a number of parameters: an integer, or text such as ``20M``, ``1.5M`` or ``2_000_000``."""
    found = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)([KMB]?)", str(value).strip(), re.IGNORECASE)
    number = Decimal(found[1].replace("_", "")) * _UNITS[found[2].upper()] if found else Decimal(0)
    if isinstance(value, bool) or number < 1 or number != int(number):
        raise UserError(f"{where}: max_parameters must be a number such as 20M, 1.5M or 2_000_000, got {value!r}")
    return int(number)


def header_bytes(config: F2LLMConfig, depth: int, dtype: str) -> int:
    """Return the most bytes that a safetensors file of ``depth`` of a model's layers, of any size, has beside weights.

    A file starts with the length of its header, 8 bytes, and the header, JSON of the name, dtype, shape and place of
    each tensor, padded to a multiple of 8: those of the whole model have the most digits.
    """
    shallow = deepcopy(config)
    shallow.num_hidden_layers, shallow.layer_types = depth, config.layer_types[:depth]
    with torch.device("meta"):
        shapes = {name: [*weight.shape] for name, weight in F2LLMModel(shallow).named_parameters()}
    code, width = _DTYPES[dtype]
    end = sum(width * int(np.prod(shape)) for shape in shapes.values())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end]}
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8


def vocabulary_sizes(used: int, fewest: int) -> list[int]:
    """Return the sizes of vocabulary to try where ``used`` tokens are used and ``fewest`` must stay, largest first."""
    return sorted({max(fewest, round(share * used)) for share in _VOCABULARIES}, reverse=True)


def possible_shapes(config: F2LLMConfig, budget: Budget, vocabularies: Sequence[int]) -> list[Shape]:
    """Return shapes within a budget that use it as fully as they can, of these sizes of vocabulary.

    Of every depth and vocabulary: some widths from the widest with the whole MLP, for a narrower one would leave
    budget unused, to the widest with any MLP, each with the largest MLP that fits. Shapes that are smaller than
    another in every dimension are left out. A UserError says the smallest shape if none is within the budget.
    """
    heads, widest, whole = config.num_attention_heads, config.hidden_size, config.intermediate_size
    step = _MLP_STEP if whole % _MLP_STEP == 0 else 1
    every_width = sorted({*range(heads, widest + 1, heads), widest})
    found: set[Shape] = set()
    for depth in _spread(range(1, config.num_hidden_layers + 1), _DEPTHS):
        most = budget.most_parameters(config, depth)
        for vocabulary in vocabularies:
            fitting: list[Shape] = []
            for width in every_width:
                left = most - Shape(vocabulary, width, 0, depth).parameters(config)
                mlp = min(left // (3 * width * depth) // step * step, whole)
                if mlp > 0:
                    # With the whole MLP, only the widest.
                    fitting = (
                        [Shape(vocabulary, width, mlp, depth)]
                        if mlp == whole
                        else [*fitting, Shape(vocabulary, width, mlp, depth)]
                    )
            found |= {*_spread(fitting, _WIDTHS)}
    if not found:
        smallest = Shape(min(vocabularies), every_width[0], step, 1)
        needs = f"{smallest.parameters(config):,} parameters"
        if budget.megabytes is not None:
            needs += f", {budget.size(config, smallest):.3g} MB in {budget.dtype}"
        raise UserError(f"{budget.where}: {budget} is below the smallest possible shape: {smallest} ({needs})")
    return sorted(
        shape
        for shape in found
        if not any(other != shape and all(a >= b for a, b in zip(other, shape, strict=True)) for other in found)
    )


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """Return at most ``count`` of the values, evenly spread, with the first and the last."""
    places = np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int))
    return [values[place] for place in places]


def shapes_line(shapes: Sequence[Shape]) -> str:
    """Say how many shapes there are, and between which sizes, by vocabulary, the largest first."""
    parts = []
    for size in sorted({shape.vocab_size for shape in shapes}, reverse=True):
        alike = [shape for shape in shapes if shape.vocab_size == size]
        ranges = [(min(values), max(values)) for values in list(zip(*alike, strict=True))[1:]]
        width, mlp, depth = (f"{low}" if low == high else f"{low} to {high}" for low, high in ranges)
        parts.append(f"{len(alike)} of {size:,} tokens (width {width}, MLP {mlp}, layers {depth})")
    return ", ".join(parts)


@torch.inference_mode()
def score_shapes(
    model: F2LLMModel,
    tokenizer: PreTrainedTokenizerBase,
    ranked: Sequence[int],
    shapes: Sequence[Shape],
    plan_of: Callable[[F2LLMConfig], PruningPlan],
    texts: Sequence[Sequence[np.ndarray]],
    max_length: int,
    max_tokens: int,
    temperature: float,
    autocast: bool = False,
) -> list[float]:
    """Return the loss of each shape: how a model that is cut to it, and not trained, tells the calibration texts apart.

    ``texts`` are the token ids of texts by source. ``ranked`` are token ids, of which a smaller vocabulary keeps the
    first; its tokenizer reads the texts again, at most ``max_length`` tokens of each. ``max_tokens`` are embedded at
    once. The loss is the mean over the sources of :func:`similarity_loss` between the cut model and the whole one.
    """
    expected = _embed(model, texts, max_tokens, autocast)
    losses: dict[Shape, float] = {}
    for size in sorted({shape.vocab_size for shape in shapes}):
        reader, read = model, texts
        if size < model.config.vocab_size:
            reader, trimmed, _ = trim_vocabulary(model, tokenizer, ranked[:size])
            read = [_read_again(source, tokenizer, trimmed, max_length) for source in texts]
        for shape in (shape for shape in shapes if shape.vocab_size == size):
            target = shape.cut(reader.config)
            found = _embed(apply_plan(reader, target, plan_of(target)), read, max_tokens, autocast)
            each = [similarity_loss(*pair, temperature) for pair in zip(found, expected, strict=True)]
            losses[shape] = float(np.mean(each))
    return [losses[shape] for shape in shapes]


def _read_again(
    texts: Sequence[np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    trimmed: PreTrainedTokenizerBase,
    max_length: int,
) -> list[np.ndarray]:
    """Return the ids of another tokenizer for texts; both append the same to a text."""
    appended = len(tokenizer("")["input_ids"])
    words = tokenizer.batch_decode([ids[: len(ids) - appended] for ids in texts])
    return [np.array(ids) for ids in trimmed(words, truncation=True, max_length=max_length)["input_ids"]]


def _embed(model: F2LLMModel, texts: Sequence[Sequence[np.ndarray]], max_tokens: int, autocast: bool) -> list[Tensor]:
    """``(n, d)`` normalised embeddings of the texts of each source, fp32."""
    embedded = []
    for source in texts:
        lengths = np.array([len(ids) for ids in source])
        embeddings = torch.empty(len(source), model.config.hidden_size, device=model.device)
        for chunk in balanced_chunks(np.argsort(lengths, kind="stable"), np.sort(lengths, kind="stable"), max_tokens):
            ids = torch.from_numpy(np.concatenate([source[text] for text in chunk]).astype(np.int64))[None]
            with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
                hidden = embed_chunk(model, ids.to(model.device), lengths[chunk].tolist())
            embeddings[torch.from_numpy(chunk).to(model.device)] = hidden.float()
        embedded.append(normalize(embeddings, dim=-1))
    return embedded


def similarity_loss(found: Tensor, expected: Tensor, temperature: float) -> float:
    """``(n, d)`` and ``(n, D)`` normalised embeddings of the same texts → how differently they tell the texts apart.

    The mean over texts of the KL divergence of ``softmax(cosines / temperature)`` over the other texts, from that of
    the expected ones to that of the found ones: what score distillation minimises. Widths compare fairly: only cosines
    enter, and a model that maps all texts to one place gains nothing. Texts beyond 1,024 are compared in blocks.
    """
    total = 0.0
    for ours, theirs in zip(found.split(_MOST_COMPARED), expected.split(_MOST_COMPARED), strict=True):
        others = ~torch.eye(len(ours), dtype=torch.bool, device=ours.device)
        cosines = ((each @ each.T)[others].view(len(ours), len(ours) - 1) / temperature for each in (ours, theirs))
        own, other = (log_softmax(each, dim=-1) for each in cosines)
        total += float((other.exp() * (other - own)).sum())
    return total / len(found)


@dataclass(frozen=True)
class Search:
    """The shapes that were tried and their losses, the best first."""

    budget: Budget
    shapes: tuple[Shape, ...]
    losses: tuple[float, ...]

    @classmethod
    def of(cls, budget: Budget, shapes: Iterable[Shape], losses: Iterable[float]) -> Search:
        """Order shapes by loss; of equal ones the smaller is first."""
        found = sorted(zip(losses, shapes, strict=True))
        return cls(budget, tuple(shape for _, shape in found), tuple(loss for loss, _ in found))

    def _rows(self, config: F2LLMConfig) -> list[dict[str, Any]]:
        return [
            {
                **shape._asdict(),
                "parameters": shape.parameters(config),
                "megabytes": round(self.budget.size(config, shape), 3),
                "loss": round(loss, 5),
            }
            for shape, loss in zip(self.shapes, self.losses, strict=True)
        ]

    def table(self, config: F2LLMConfig) -> str:
        """Lay out the shapes, the chosen one first, for a terminal; ``config`` is that of the whole model."""
        rows = [{"": "" if number else "chosen", **row} for number, row in enumerate(self._rows(config))]
        cells = [[value if isinstance(value, int) else str(value) for value in row.values()] for row in rows]
        return text_table([*rows[0]], cells, text_columns=1)

    def save(self, path: Path, config: F2LLMConfig) -> None:
        """Write YAML: the budget, the chosen shape and those rejected."""
        chosen, *rejected = self._rows(config)
        content = {"budget": str(self.budget), "dtype": self.budget.dtype, "chosen": chosen, "rejected": rejected}
        write_whole(path, yaml.safe_dump(content, sort_keys=False))


def search_shape(
    model: F2LLMModel,
    tokenizer: PreTrainedTokenizerBase,
    budget: Budget,
    plan_of: Callable[[F2LLMConfig], PruningPlan],
    sources: Sequence[PreparedSource],
    counts: np.ndarray,
    args: StageArguments,
) -> tuple[Shape, list[int]]:
    """Return the shape of the least loss within a budget, and the tokens that it keeps, given how often each occurs."""
    ranked, vocabularies = [], [model.config.vocab_size]
    if args.trim_vocabulary:
        ranked, fewest = rank_tokens(tokenizer, counts)
        vocabularies = vocabulary_sizes(len(ranked), fewest)
    shapes = possible_shapes(model.config, budget, vocabularies)
    texts = [
        [source.tokens(text) for text in drawn]
        for source, drawn in calibration_texts(sources, args.calibration_texts, args.seed)
    ]
    at_once = args.max_tokens_per_forward or TOKENS_AT_ONCE
    reads = (texts, args.max_length, at_once, args.temperature, args.bf16)
    losses = score_shapes(model.to(args.device), tokenizer, ranked, shapes, plan_of, *reads)
    model.cpu()
    search = Search.of(budget, shapes, losses)
    search.save(Path(args.output_dir) / PRUNING_SEARCH, model.config)
    logger.info("shapes of %s:\n%s", budget, search.table(model.config))
    return search.shapes[0], ranked[: search.shapes[0].vocab_size]
