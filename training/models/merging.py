"""Average models of one architecture, tensor by tensor, into a complete folder.

``find_parent`` finds each model, ``mean_of`` or ``slerp_of`` checks the method, and ``merge`` writes the folder. Memory
holds one shard, however large the models are.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.errors import UserError
from training.common.outputs import check_output, locked, new_folder
from training.common.run_folder import FINAL_MODEL, public_name, run_of
from training.models.model_folder import (
    ADAPTER,
    WeightFiles,
    check_tokenizer_file,
    load_json,
    read_json,
    user_error,
    wrong_weight,
)
from training.models.model_ref import find_model

logger = logging.getLogger("training")

MAX_SHARD_SIZE = "5GB"
# File in a merged folder, and key of its config.json. The file alone has the digests of the parents' weights.
MERGE, MERGED_FROM = "merge.json", "merged_from"
# Files taken from a repository: no other formats of the same weights, no evaluation.
_FETCHED = ["*.json", "*.safetensors", "*.py", "*.txt", "*.jinja", "LICENSE*"]
_NOT_FETCHED = ["onnx/*", "openvino/*", "evaluation/*", "figures/*"]
# Files copied from the first parent, besides the folders of its modules; nothing about its training.
_COPIED = (
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "*.py", "LICENSE*"),
)
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
    """Return the angle between two tensors as vectors, in radians; 0 if one of them is zero.

    Products are summed in fp64: in fp32 the angle of a large tensor's small change would be lost.
    """
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

    Raises:
        ValueError: If the tensors point in opposite directions, where the great circle is not unique.
    """
    theta = angle(start, end)
    if math.pi - theta < _PARALLEL:
        raise ValueError("they point in opposite directions, between which the great circle is not unique")
    if theta < _PARALLEL:
        return weighted_mean([start, end], [1 - t, t])
    of_start, of_end = math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
    return (start.float() * of_start).add_(end.float(), alpha=of_end)


@dataclass(frozen=True)
class Method:
    """A way to average: ``mean`` or ``slerp``, and the shares of the parents, which sum to 1."""

    name: str
    shares: tuple[float, ...]

    def average(self, tensors: Iterable[Tensor]) -> Tensor:
        """Return the average of the parents' tensors in fp32; ValueError if it does not exist."""
        return slerp(*tensors, t=self.shares[1]) if self.name == "slerp" else weighted_mean(tensors, self.shares)


def mean_of(models: int, weights: Sequence[float] | None = None) -> Method:
    """Return the weighted mean of a number of models; equal weights if None."""
    weights = [1.0] * models if weights is None else weights
    if len(weights) != models:
        raise UserError(f"--weights: {len(weights)} weights for {models} models; give one for each")
    wrong = [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]
    if wrong:
        raise UserError(f"--weights: {wrong[0]} is not a positive number; leave out the models that shall not count")
    total = math.fsum(weights)
    return Method("mean", tuple(weight / total for weight in weights))


def slerp_of(models: int, t: float) -> Method:
    """Return the spherical interpolation at ``t`` between two models."""
    if models != 2:
        raise UserError(f"--slerp goes from one model to another, not {models}; merge two at a time, or use the mean")
    if not 0 <= t <= 1:
        raise UserError(f"--slerp: {t} does not lie between 0 (the first model) and 1 (the second)")
    return Method("slerp", (1 - t, t))


@dataclass(frozen=True)
class Parent:
    """A model to be merged: its folder, its public name, and its commit if it comes from the Hub."""

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

    def record(self) -> dict[str, Any]:
        """Return what the merged model records of it: name, revision, and its own parents if it is merged itself."""
        known = {"name": self.name, "revision": self.revision, MERGED_FROM: self.config.get(MERGED_FROM)}
        return {key: value for key, value in known.items() if value}


def find_parent(word: str) -> Parent:
    """Find a folder, a run (its finished model), a checkpoint of it, or ``ORG/NAME[@REVISION]`` on the Hub.

    What the Hub's cache holds is used without network.
    """
    if Path(word).is_dir():
        adapters = [path for path in (Path(word), Path(word, FINAL_MODEL)) if (path / ADAPTER).is_file()]
        folder = adapters[0] if adapters else Path(find_model(word, None)[0])
        # The name of its run comes first if it is the model or a checkpoint of one.
        path = folder.resolve()
        parts = path.parts[-2:] if run_of(str(path)) == path.parent else path.parts[-1:]
        parent = Parent(folder, "/".join(filter(None, map(public_name, parts))) or FINAL_MODEL)
    else:
        name, _, revision = word.partition("@")
        patterns = {"allow_patterns": _FETCHED, "ignore_patterns": _NOT_FETCHED}
        with user_error(f"{word}: no such folder, and not to be had from the Hub", "correct the name"):
            fetched = snapshot_download(name, revision=revision or None, **patterns)
        # The folder of a snapshot is named after its commit.
        parent = Parent(Path(fetched), name, Path(fetched).name)
    # An adapter or a pickled model lacks other files, too, and a message about those says less.
    _ = parent.weights
    return parent


def check_compatible(parents: Sequence[Parent]) -> None:
    """Refuse models that differ in more than their weights: in which key or tensor."""
    first, *others = parents
    expected = _settings(first)
    for other in others:
        found = _settings(other)
        for file, key in {**expected, **found}:
            one, two = expected.get((file, key)), found.get((file, key))
            if one != two:
                raise UserError(
                    f"{other.name} cannot be merged with {first.name}: {file} differs in {key!r} "
                    f"({brief(two)}, not {brief(one)}); merge models of one architecture and tokenizer"
                )
    # A tensor that all lack would be missing in the merged model, too.
    if (wrong := wrong_weight(first.weights.shapes, F2LLMConfig.from_dict(dict(first.config)))) is not None:
        raise UserError(f"{first.name}: {wrong}; fetch or save the model again")


def _settings(parent: Parent) -> dict[tuple[str, str], Any]:
    """Return all that must be equal, by file and key."""
    if parent.config.get("model_type") != "qwen3":
        raise UserError(
            f"{parent.folder}: its model_type is {parent.config.get('model_type')!r}; only qwen3 models can be merged"
        )
    # As the model class reads it, so that the version of the library that wrote it does not count.
    with user_error(f"{parent.folder / 'config.json'}: faulty", "correct it"):
        config = F2LLMConfig.from_dict(dict(parent.config)).to_dict()
    check_tokenizer_file(parent.folder)
    # As the library reads it: older files have other forms. Every call sets padding and truncation.
    tokenizer = json.loads(Tokenizer.from_file(str(parent.folder / "tokenizer.json")).to_str())
    tokenizer = {key: value for key, value in tokenizer.items() if key not in ("padding", "truncation")}
    model = tokenizer.pop("model")
    tokens = load_json(parent.folder / "tokenizer_config.json")
    special = {key: tokens.get(key) for key in _SPECIAL_TOKENS}
    pipeline, pooling = {}, {}
    for module in load_json(parent.folder / "modules.json"):
        kind = module["type"].rpartition(".")[2]
        pipeline[module["name"]] = (kind, module["path"])
        if module["path"] and list((parent.folder / module["path"]).glob("*.safetensors")):
            raise UserError(f"{parent.folder}: module {module['path']} has weights of its own; that cannot be merged")
        if kind == "Pooling":
            pooling |= Pooling.load(str(parent.folder), subfolder=module["path"]).get_config_dict()
    sentence = load_json(parent.folder / "config_sentence_transformers.json")
    files = {
        "config.json": {key: value for key, value in config.items() if key not in _NO_SHAPE},
        "tokenizer.json": tokenizer | {f"model.{key}": value for key, value in model.items()},
        "tokenizer_config.json": {
            key: token["content"] if isinstance(token, dict) else token for key, token in special.items()
        },
        "modules.json": pipeline,
        "Pooling": pooling,
        "config_sentence_transformers.json": {key: sentence.get(key) for key in _SENTENCE_KEYS},
        "the shape of the weights": parent.weights.shapes,
    }
    return {(file, key): value for file, content in files.items() for key, value in sorted(content.items())}


def merge(
    parents: Sequence[Parent],
    method: Method,
    output: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> dict[str, Any]:
    """Average models in fp32 and write a folder with the files of the first one, whole or not at all.

    ``config.json`` records parents and weights, ``merge.json`` their digests, too. Nothing is done if the same folder
    is there already. Without ``dtype`` the weights have the parents' own.
    """
    check_output(output, [parent.folder for parent in parents])
    check_compatible(parents)
    dtype = dtype or _common_dtype(parents)
    counted = [{**parent.record(), "weight": share} for parent, share in zip(parents, method.shares, strict=True)]
    record = {
        "method": method.name,
        "dtype": _name(dtype),
        "max_shard_size": max_shard_size,
        "parents": [{**each, "digest": parent.weights.digest()} for each, parent in zip(counted, parents, strict=True)],
    }
    with locked(output):
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            if read_json(output / MERGE) != record:
                raise UserError(f"{output}: is there and holds something else; name another --output, or remove it")
            logger.info("%s: is there already, nothing to do", output)
            return record
        with new_folder(output) as partial:
            _copy_files(parents[0], partial)
            # Older versions of the library call the key dtype torch_dtype.
            config = {key: value for key, value in parents[0].config.items() if key != "torch_dtype"}
            merged_from = {"method": method.name, "parents": counted}
            _write_json(partial / "config.json", {**config, "dtype": record["dtype"], MERGED_FROM: merged_from})
            write_average(parents, method, dtype, partial, max_shard_size)
            _write_json(partial / MERGE, record)
    return record


def _common_dtype(parents: Sequence[Parent]) -> torch.dtype:
    of_dtype = {info.dtype: parent.name for parent in parents for info in parent.weights.tensors.values()}
    if len(of_dtype) > 1:
        (one, first), (two, second), *_ = of_dtype.items()
        raise UserError(
            f"weights of {first} are {_name(one)}, of {second} {_name(two)}; choose the dtype to write with --dtype"
        )
    return next(iter(of_dtype))


def _copy_files(parent: Parent, folder: Path) -> None:
    for pattern in _COPIED:
        for path in parent.folder.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    for module in load_json(parent.folder / "modules.json"):
        # A module without settings may have no folder: a repository keeps no empty ones.
        if module["path"] and (parent.folder / module["path"]).is_dir():
            shutil.copytree(parent.folder / module["path"], folder / module["path"])


def write_average(
    parents: Sequence[Parent], method: Method, dtype: torch.dtype, folder: Path, max_shard_size: str
) -> None:
    """Write the average as ``model.safetensors``, or as shards and their index; see :func:`merge`."""
    # The rule by which transformers shards a model needs only sizes.
    planned = {
        name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in parents[0].weights.shapes.items()
    }
    try:
        plan = split_torch_state_dict_into_shards(planned, max_shard_size=max_shard_size)
    except ValueError:
        raise UserError(f"--max-shard-size: {max_shard_size!r} is not a size; write it as 5GB or 500MB") from None
    for file, names in plan.filename_to_tensors.items():
        shard = {name: _average(parents, method, name, dtype) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        # Before the next shard is made.
        del shard
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _average(parents: Sequence[Parent], method: Method, name: str, dtype: torch.dtype) -> Tensor:
    try:
        average = method.average(_read(parents, name)).to(dtype)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{name} of {' and '.join(parent.name for parent in parents)}: {error}; use the mean") from None
    if not average.isfinite().all():
        raise UserError(f"{name}: the average is too large for {_name(dtype)}; choose another --dtype")
    return average


def _read(parents: Sequence[Parent], name: str) -> Iterator[Tensor]:
    for parent in parents:
        tensor = parent.weights.read(name)
        if not tensor.isfinite().all():
            raise UserError(f"{parent.name}: {name} holds NaN or infinite weights; leave the model out")
        yield tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


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
