"""Merge models into a complete folder: an average of one architecture, tensor by tensor, or an adapter in its base.

:func:`merge_named` is the work of ``merge.py``. An average holds one shard in memory, however large the models are.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer
from torch import Tensor

from modeling_f2llm.configuration_f2llm import F2LLMConfig, matryoshka_dims, usual_exits
from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.common.errors import UserError
from training.common.outputs import check_output
from training.common.run_folder import FINAL_MODEL, public_name, run_of
from training.models.adapters import attach_adapter, merge_into_base
from training.models.loading import load_base, load_tokenizer
from training.models.model_folder import (
    WeightFiles,
    check_tokenizer_file,
    copy_settings,
    load_json,
    read_json,
    recorded_folder,
    user_error,
    write_json,
    wrong_weight,
)
from training.models.model_ref import (
    MERGED_ADAPTER,
    AdapterFolder,
    base_revision,
    find_adapter,
    find_model,
    model_file,
    model_revision,
    prompts_of,
    why_not_last_token,
)

MAX_SHARD_SIZE = "5GB"
# File in a merged folder, and key of its config.json. The file alone has the digests of the parents' weights.
MERGE, MERGED_FROM = "merge.json", "merged_from"
_ARGUMENTS = "training_arguments.json"
# Files taken from a repository: no other formats of the same weights, no evaluation.
_FETCHED = ["*.json", "*.safetensors", "*.py", "*.txt", "*.jinja", "LICENSE*"]
_NOT_FETCHED = ["onnx/*", "openvino/*", "evaluation/*", "figures/*"]
# Keys of config.json that shape no embedding: what wrote the file, and how the model is loaded.
_NO_SHAPE = frozenset({MERGED_FROM, "_name_or_path", "auto_map", "dtype", "transformers_version", "use_cache"})
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_SENTENCE_KEYS = ("prompts", "default_prompt_name", "similarity_fn_name")
# Elements of a tensor that are held in fp64 at a time.
_CHUNK = 1 << 20
# Below this angle, in radians, slerp and the straight line differ by less than fp32 rounds.
_PARALLEL = 1e-3


def weighted_mean(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted mean in fp32, holding one tensor at a time.

    ``m += w_i / (w_1 + … + w_i) · (x_i - m)`` (West, 1979, "Updating mean and variance estimates: an improved method"):
    the mean of equal tensors is that tensor, bit for bit.
    """
    first, *others = weights
    tensors = iter(tensors)
    mean, total = next(tensors).to(torch.float32, copy=True), first
    for tensor, weight in zip(tensors, others, strict=True):
        total += weight
        mean.lerp_(tensor.float(), weight / total)
    return mean


def angle(start: Tensor, end: Tensor) -> float:
    """Return the angle between two tensors as vectors, in radians, summed in fp64; 0 if one of them is zero."""
    sums = torch.zeros(3, dtype=torch.float64)
    for one, other in zip(start.flatten().split(_CHUNK), end.flatten().split(_CHUNK), strict=True):
        one, other = one.double(), other.double()
        sums += torch.stack([one @ other, one @ one, other @ other]).cpu()
    product, one, other = sums.tolist()
    norms = math.sqrt(one) * math.sqrt(other)
    return math.acos(max(-1.0, min(1.0, product / norms))) if norms else 0.0


def slerp(start: Tensor, end: Tensor, t: float) -> Tensor:
    """Return the point at ``t`` (0 to 1) of the great circle from one tensor to another, as vectors, in fp32.

    ``sin((1 - t) θ) / sin θ · start + sin(t θ) / sin θ · end``, with ``θ`` the angle between them (Shoemake, 1985,
    "Animating rotation with quaternion curves"). Tensors of equal norm keep it, where a mean is shorter. Where the
    angle vanishes this is the straight line, its limit.
    """
    theta = angle(start, end)
    if math.pi - theta < _PARALLEL:
        raise UserError("--slerp: weights point in opposite directions, between which no way is shortest; use the mean")
    if theta < _PARALLEL:
        return weighted_mean([start, end], [1 - t, t])
    of_start, of_end = math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
    return (start.float() * of_start).add_(end.float(), alpha=of_end)


@dataclass(frozen=True)
class Parent:
    """A model to be averaged: its folder, its public name, and its commit if it comes from the Hub."""

    folder: Path
    name: str
    revision: str | None = None

    @cached_property
    def weights(self) -> WeightFiles:
        """Its weights."""
        return WeightFiles(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of its ``config.json``."""
        return load_json(self.folder / "config.json")

    def read(self, name: str) -> Tensor:
        """Read a tensor of the model; a UserError if it is not finite."""
        tensor = self.weights.read(name)
        if not tensor.isfinite().all():
            raise UserError(f"{self.name}: {name} holds NaN or infinite weights; leave the model out")
        return tensor


def _named(word: str) -> tuple[str, str | None]:
    """Return what a word names: the folder of a model, also of a run's, or the name and revision of one on the Hub."""
    name, _, revision = (word, "", "") if Path(word).is_dir() else word.partition("@")
    return find_model(name, revision or None)


def find_parent(word: str) -> Parent:
    """Find a folder, a run (its finished model), a checkpoint, or ``ORG/NAME[@REVISION]`` on the Hub."""
    name, revision = _named(word)
    if Path(name).is_dir():
        # The name of its run comes first if it is the model or a checkpoint of one.
        path = Path(name).resolve()
        parts = path.parts[-2:] if run_of(str(path)) == path.parent else path.parts[-1:]
        parent = Parent(Path(name), "/".join(filter(None, map(public_name, parts))) or FINAL_MODEL)
    else:
        patterns = {"allow_patterns": _FETCHED, "ignore_patterns": _NOT_FETCHED}
        with user_error(f"{word}: no such folder, and not to be had from the Hub", "correct the name"):
            fetched = Path(snapshot_download(name, revision=revision, **patterns))
        # The folder of a snapshot is named after its commit.
        parent = Parent(fetched, name, fetched.name)
    # An adapter or a pickled model lacks other files, too, and a message about those says less.
    _ = parent.weights
    return parent


def _settings(parent: Parent) -> dict[str, Any]:
    """Return what must be equal in models that are averaged, by file and key, as the libraries read it."""
    folder = parent.folder
    if (kind := parent.config.get("model_type")) != "qwen3":
        raise UserError(f"{folder}: its model_type is {kind!r}; only qwen3 models can be merged")
    with user_error(f"{folder / 'config.json'}: faulty", "correct it"):
        config = F2LLMConfig.from_dict(dict(parent.config))
    if (wrong := wrong_weight(parent.weights.shapes, config)) is not None:
        raise UserError(f"{parent.name}: {wrong}; fetch or save the model again")
    check_tokenizer_file(folder)
    # Every call of a tokenizer sets padding and truncation.
    tokenizer = json.loads(Tokenizer.from_file(str(folder / "tokenizer.json")).to_str())
    tokenizer |= {"padding": None, "truncation": None, **tokenizer.pop("model")}
    tokens, sentence = (
        load_json(folder / name) for name in ("tokenizer_config.json", "config_sentence_transformers.json")
    )
    special = {key: token["content"] if isinstance(token, dict) else token for key, token in tokens.items()}
    modules, pooling = {}, {}
    for module in load_json(folder / "modules.json"):
        kind, path = module["type"].rpartition(".")[2], module["path"]
        modules[module["name"]] = (kind, path)
        if path and list((folder / path).glob("*.safetensors")):
            raise UserError(f"{folder}: module {path} has weights, which cannot be merged")
        if kind == "Pooling":
            pooling |= Pooling.load(str(folder), subfolder=path).get_config_dict()
    files = {
        "config.json": {key: value for key, value in config.to_dict().items() if key not in _NO_SHAPE},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {key: special.get(key) for key in _SPECIAL_TOKENS},
        "modules.json": modules,
        "pooling": pooling,
        "config_sentence_transformers.json": {key: sentence.get(key) for key in _SENTENCE_KEYS},
    }
    return {f"{file}, {key}": value for file, content in files.items() for key, value in content.items()}


def _shares(models: int, weights: Sequence[float] | None, t: float | None) -> list[float]:
    """Return each model's share of the mean, or of the way to ``t`` from one to another."""
    if t is not None:
        if models != 2:
            raise UserError(f"--slerp goes from one model to another, not {models}; merge two, or use the mean")
        if not 0 <= t <= 1:
            raise UserError(f"--slerp: {t} does not lie between 0 (the first model) and 1 (the second)")
        return [1 - t, t]
    weights = [1.0] * models if weights is None else weights
    if len(weights) != models:
        raise UserError(f"--weights: {len(weights)} weights for {models} models; give one for each")
    if wrong := [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]:
        raise UserError(f"--weights: {wrong[0]} is not a positive number; leave out the models that shall not count")
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def merge(
    models: Sequence[str],
    output: Path,
    weights: Sequence[float] | None = None,
    slerp: float | None = None,
    dtype: str | None = None,
    max_shard_size: str | None = None,
) -> dict[str, Any]:
    """Average models in fp32 and write a folder with the files of the first one, whole or not at all.

    ``slerp``, from 0 to 1, interpolates between two models instead of taking the mean by ``weights``. ``dtype`` is such
    as ``bfloat16``, the models' own if None. ``config.json`` records parents and weights, ``merge.json``, which is
    returned, their digests, too. Nothing is done if the same folder is there already.
    """
    shares = _shares(len(models), weights, slerp)
    parents = [find_parent(model) for model in models]
    check_output(output, [parent.folder for parent in parents])
    expected = _settings(parents[0])
    for other in parents[1:]:
        found = _settings(other)
        for key in {**expected, **found}:
            one, two = expected.get(key), found.get(key)
            if one != two:
                raise UserError(
                    f"{other.name} cannot be merged with {parents[0].name}: {key}: {brief(two)} is not {brief(one)}; "
                    "merge models of one architecture and tokenizer"
                )
    method, dtype = "mean" if slerp is None else "slerp", dtype or _common_dtype(parents)
    counted, digests = [], []
    for parent, share in zip(parents, shares, strict=True):
        known = {"name": parent.name, "revision": parent.revision, MERGED_FROM: parent.config.get(MERGED_FROM)}
        counted.append({**{key: value for key, value in known.items() if value}, "weight": share})
        digests.append({**counted[-1], "digest": parent.weights.digest()})
    record = {"method": method, "dtype": dtype, "max_shard_size": max_shard_size or MAX_SHARD_SIZE, "parents": digests}
    with recorded_folder(output, MERGE, record) as partial:
        if partial is not None:
            copy_settings(parents[0].folder, partial, "generation_config.json", "*.py")
            # Older versions of the library call the key dtype torch_dtype.
            config = {
                key: value for key, value in parents[0].config.items() if key not in ("torch_dtype", "embedding_ranks")
            }
            merged_from = {"method": method, "parents": counted}
            write_json(partial / "config.json", {**config, "dtype": dtype, MERGED_FROM: merged_from})
            _write_average(parents, method, shares, dtype, partial, record["max_shard_size"])
    return record


def _common_dtype(parents: Sequence[Parent]) -> str:
    of_dtype = {info.dtype: parent.name for parent in parents for info in parent.weights.tensors.values()}
    names = {str(dtype).removeprefix("torch."): name for dtype, name in of_dtype.items()}
    if len(names) > 1:
        (one, first), (two, second), *_ = names.items()
        raise UserError(f"weights of {first} are {one}, of {second} {two}; choose the dtype to write with --dtype")
    return next(iter(names))


def _write_average(
    parents: Sequence[Parent], method: str, shares: Sequence[float], dtype: str, folder: Path, max_shard_size: str
) -> None:
    """Write the average as ``model.safetensors``, or as shards and their index, as transformers shards a model."""
    kind = getattr(torch, dtype)
    planned = {name: torch.empty(shape, dtype=kind, device="meta") for name, shape in parents[0].weights.shapes.items()}
    try:
        plan = split_torch_state_dict_into_shards(planned, max_shard_size=max_shard_size)
    except ValueError:
        raise UserError(f"--max-shard-size: {max_shard_size!r} is not a size; write it as 5GB or 500MB") from None

    def average(name: str) -> Tensor:
        tensors = (parent.read(name) for parent in parents)
        whole = slerp(*tensors, t=shares[1]) if method == "slerp" else weighted_mean(tensors, shares)
        rounded = whole.to(kind)
        if not rounded.isfinite().all():
            raise UserError(f"{name}: the average is too large for {dtype}; choose another --dtype")
        return rounded

    for file, names in plan.filename_to_tensors.items():
        shard = {name: average(name) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        # Before the next shard is made.
        del shard
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def read_merge(folder: Path) -> dict[str, Any]:
    """Read the record of a merged folder."""
    return load_json(folder / MERGE, "merge the models again")


def find_beside(folder: Path, parent: Mapping[str, Any]) -> Path | None:
    """Return a parent's folder, if it lies beside the merged folder or its run and still has the merged weights."""
    for beside in (folder.absolute().parent, folder.absolute().parent.parent):
        found = beside / parent["name"]
        if (found / "config.json").is_file() and WeightFiles(found).digest() == parent["digest"]:
            return found
    return None


def merge_adapter(adapter: AdapterFolder, output: Path) -> None:
    """Write an adapter's base with the adapter added, in fp32, with its tokenizer and prompts if it has them."""
    check_output(output, [Path(adapter.name), Path(adapter.base)])
    record = {
        "adapter": {"name": adapter.name, "revision": model_revision(adapter.name, "the adapter", adapter.revision)},
        "base": {"name": adapter.base, "revision": base_revision(adapter.base, "the adapter's base")},
    }
    with recorded_folder(output, MERGED_ADAPTER, record) as partial:
        if partial is None:
            return
        described = adapter.name if model_file(adapter.name, "modules.json") else adapter.base
        if (other := why_not_last_token(described)) is not None:
            raise UserError(f"{described}: {other}; only an adapter of a model with last-token pooling is merged")
        model = load_base(adapter)
        attach_adapter(model, adapter, trainable=False)
        merge_into_base(model)
        arguments = model_file(adapter.name, _ARGUMENTS, adapter.revision)
        trained = read_json(arguments) if arguments else {}
        widths = trained_widths(trained, model.config.hidden_size)
        if widths is not None:
            model.config.is_matryoshka = len(widths) > 1
            model.config.matryoshka_dimensions = widths if len(widths) > 1 else None
        if "exit_layers" in trained:
            model.config.exit_layers = _trained_exits(trained["exit_layers"], model.config.num_hidden_layers)
        if model.config.embedding_ranks:
            # An adapter is trained at the largest rank alone.
            model.config.embedding_ranks = model.config.embedding_ranks[-1:]
        merged = build_sentence_transformer(model, load_tokenizer(described), prompts_of(described) or {})
        merged.save_pretrained(str(partial), create_model_card=False)
        # With them it can be packed as a state of the adapter's run.
        if arguments is not None:
            shutil.copyfile(arguments, partial / _ARGUMENTS)


def trained_widths(arguments: Mapping[str, Any], width: int) -> list[int] | None:
    """Return the embedding widths that a stage was trained at, the full one first; None if its arguments do not say."""
    if not arguments.get("matryoshka"):
        return [width] if "matryoshka" in arguments else None
    given = arguments["matryoshka_dimensions"]
    return matryoshka_dims(width, arguments["matryoshka_min_dim"]) if given is None else sorted({*given, width})[::-1]


def _trained_exits(given: Sequence[str] | None, layers: int) -> list[int] | None:
    """Return the numbers of layers of a stage's key ``exit_layers``, the last included."""
    if not given:
        return None
    return usual_exits(layers) if given == ["auto"] else sorted({*map(int, given), layers})


def merge_named(models: list[str], output: Path, **averaging: Any) -> str:
    """Average models (with options of :func:`merge`), or merge the one named adapter into its base; return a line."""
    adapter = find_adapter(*_named(models[0])) if len(models) == 1 else None
    if adapter is not None:
        if given := [key.replace("_", "-") for key, value in averaging.items() if value is not None]:
            raise UserError(f"--{given[0]}: {models[0]} is an adapter, which is merged in fp32; leave the option out")
        merge_adapter(adapter, output)
        return f"{output} ({MERGED_ADAPTER} records adapter and base)"
    record = merge(models, output, **averaging)
    counted = ", ".join(f"{each['weight']:.4g} {each['name']}" for each in record["parents"])
    return f"{output}: {record['method']} of {counted}, in {record['dtype']}"
