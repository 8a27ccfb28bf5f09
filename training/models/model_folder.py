"""A model's folder on disk: weights read tensor by tensor, checks of its files, and settings for older readers.

Nothing here loads a model. The export environments import this file with transformers 4.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.modeling_f2llm import F2LLMModel
from training.common.errors import StoppedError, UserError, in_one_line
from training.common.outputs import locked, new_folder, write_whole

logger = logging.getLogger("training")

# File that says that a folder holds an adapter.
ADAPTER = "adapter_config.json"
# Files of a SentenceTransformer besides weights, configuration and the folders of its modules.
_SETTINGS = (
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "LICENSE*"),
)
NO_WORDS = "its tokenizer knows no token but special ones; put the tokenizer.json of this model beside it"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Names of the token embeddings, and of two factors of them.
EMBEDDINGS, FACTORS = "embed_tokens.weight", ("embed_tokens.left.weight", "embed_tokens.right.weight")
# As safetensors calls them.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


@contextmanager
def user_error(what: str, remedy: str | None = None) -> Iterator[None]:
    """Turn any exception of the block into one UserError that says what failed, the library's message and the remedy.

    ``from_pretrained`` can raise anything on a corrupt folder.
    """
    try:
        yield
    except Exception as error:
        reason = in_one_line(error)
        raise UserError(f"{what}: {reason}" if remedy is None else f"{what} ({reason}); {remedy}") from None


def read_json(path: Path, kind: type = dict) -> Any:
    """Return the content of a JSON file; an empty ``kind`` if it is missing, damaged or of another kind."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return kind()
    return content if isinstance(content, kind) else kind()


def load_json(path: Path, remedy: str = "fetch or save the model again") -> Any:
    """Return the content of a JSON file; a UserError if it is missing or damaged."""
    with user_error(f"{path}: cannot be read", remedy):
        return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file with sorted keys."""
    write_whole(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


@contextmanager
def recorded_folder(output: Path, file: str, record: Mapping[str, Any]) -> Iterator[Path | None]:
    """Give an empty folder that becomes ``output``, with the record of what is made in a file, unless the block fails.

    None if the output is there already with the same record; a UserError if it holds something else.
    """
    with locked(output):
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            if read_json(output / file) != record:
                raise UserError(f"{output}: is there and holds something else; name another --output, or remove it")
            logger.info("%s: is there already, nothing to do", output)
            yield None
            return
        try:
            with new_folder(output) as partial:
                yield partial
                write_json(partial / file, record)
        # The library's error for a full disk.
        except SafetensorError as error:
            raise StoppedError(f"{output}: the model could not be written ({in_one_line(error)})") from error


def copy_settings(folder: Path, target: Path, *more: str) -> None:
    """Copy the settings of a model, the folders of its modules, and files of more patterns; not its ``config.json``."""
    for path in (path for pattern in (*_SETTINGS, *more) for path in folder.glob(pattern)):
        shutil.copyfile(path, target / path.name)
    with user_error(f"{folder / 'modules.json'}: damaged", "fetch or save the model again"):
        paths = [module["path"] for module in load_json(folder / "modules.json")]
    # A module without settings may have no folder: a repository keeps no empty ones.
    for path in filter(lambda path: path and (folder / path).is_dir(), paths):
        shutil.copytree(folder / path, target / path)


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightFiles:
    """The safetensors of a model's folder (one file, or shards with an index): paths and tensors, in order of names.

    Factors of token embeddings are left out where their product lies beside them: without them it is stock Qwen3.
    """

    def __init__(self, folder: Path) -> None:
        self.file_of: Mapping[str, Path] = _files_of_tensors(folder)
        self.paths = sorted(set(self.file_of.values()))
        found = {name: info for path in self.paths for name, info in _read_header(path).items()}
        if missing := sorted(set(self.file_of) - set(found)):
            raise UserError(f"{folder}: its weights lack {missing[0]}, which the index promises; fetch the model again")
        hidden = FACTORS if EMBEDDINGS in found else ()
        self.tensors: Mapping[str, TensorInfo] = {
            name: found[name] for name in sorted(self.file_of) if name not in hidden
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        return {name: info.shape for name, info in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        """Read one tensor; nothing else of its file stays in memory."""
        # An open file keeps all that was read from it mapped, so it is opened for each tensor.
        with safe_open(self.file_of[name], framework="pt") as handle:
            return handle.get_tensor(name)

    def digest(self) -> str:
        """Return a digest of the files' bytes, whatever folder they lie in."""
        digest = blake2b(digest_size=16)
        for path in self.paths:
            update_digest(digest, path)
        return digest.hexdigest()


def update_digest(digest: Any, path: Path) -> None:
    """Add a file's bytes to a ``hashlib`` digest."""
    with path.open("rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    if (folder / _INDEX).is_file():
        with user_error(f"{folder / _INDEX}: damaged", "fetch the model again"):
            files = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in files.items()}
    if (folder / _SINGLE).is_file():
        return dict.fromkeys(_read_header(folder / _SINGLE), folder / _SINGLE)
    if (folder / ADAPTER).is_file():
        raise UserError(f"{folder}: an adapter without a model's weights; merge it into its base first (merge.py)")
    if list(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder}: its weights are pickled; load it with transformers and save it as safetensors")
    raise UserError(f"{folder}: the folder holds no weights as safetensors; it lacks {_SINGLE}")


def _read_header(path: Path) -> dict[str, TensorInfo]:
    with user_error(f"{path}: not a readable safetensors file", "fetch it again"), safe_open(path, "pt") as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}
    found = {}
    for name, each in slices.items():
        if (dtype := each.get_dtype()) not in _DTYPES:
            raise UserError(f"{path}: {name} holds {dtype}; only floating-point weights can be used")
        found[name] = TensorInfo(tuple(each.get_shape()), _DTYPES[dtype])
    return found


def is_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or infinite; an integer tensor always is finite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # Both ends are NaN if one element is; isfinite itself would need a copy of the tensor.
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def check_tokenizer_file(folder: Path) -> None:
    """Refuse a folder whose ``tokenizer.json``, which is copied or converted, is missing, damaged or has no words."""
    path = folder / "tokenizer.json"
    with user_error(f"{path}: is not a tokenizer", "put the tokenizer.json of this model beside it"):
        words = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    if not words:
        raise UserError(f"{path}: {NO_WORDS}")


def wrong_weight(shapes: Mapping[str, tuple[int, ...]], config: F2LLMConfig) -> str | None:
    """Return the first weight that is missing, left over or of another shape than configured, and how; else None."""
    if EMBEDDINGS in shapes and config.embedding_ranks:
        config = deepcopy(config)
        config.embedding_ranks = None
    # The device of this thread only: a training may build models in another thread meanwhile.
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in F2LLMModel(config).named_parameters()}
    for name in sorted({*shapes, *expected}):
        if shapes.get(name) != expected.get(name):
            has, wants = (each.get(name, "absent") for each in (shapes, expected))
            return f"weight {name} is {has}, the configuration wants {wants}"
    return None


def count_parameters(config: F2LLMConfig) -> int:
    """Return the parameters of a model of this shape, embeddings included."""
    with torch.device("meta"):
        return F2LLMModel(deepcopy(config)).num_parameters()


def count_looked_up(config: F2LLMConfig) -> int:
    """Return the parameters that a token looks up and does not multiply: the embeddings, or their first factor."""
    return config.vocab_size * max(config.embedding_ranks or [config.hidden_size])


def forward_flops(config: F2LLMConfig, texts: float, tokens: float, squared_tokens: float) -> float:
    """Return the floating-point operations of embedding texts, given their number and sums of (squared) token counts.

    All tokens go through all layers, but of the last layer only keys and values of all, the rest of the last tokens.
    """
    weights, width = count_parameters(config) - count_looked_up(config), config.num_attention_heads * config.head_dim
    whole = 2 * weights * tokens + 4 * config.num_hidden_layers * width * squared_tokens
    of_last = 2 * config.hidden_size * (2 * width + 3 * config.intermediate_size)
    return whole - of_last * (tokens - texts) - 4 * width * (squared_tokens - tokens)


def write_for_older_readers(folder: Path) -> None:
    """Rewrite the settings of a SentenceTransformer folder with last-token pooling in the form that all versions read.

    transformers 5 and sentence-transformers 5.4 moved and renamed settings; they still read the old form. Older
    versions, and servers that parse the files themselves, read the old form alone:

    - ``config.json``: ``rope_theta`` moved into ``rope_parameters``. transformers 4 assumes 10000 without it and
      computes other embeddings without an error; text-embeddings-inference (until early 2026) and MLX stop.
    - ``tokenizer_config.json``: transformers 4 cannot read ``extra_special_tokens`` as a list.
    - ``modules.json``: the classes moved. sentence-transformers before 5.4 and llama.cpp's converter do not find them.
    - ``1_Pooling/config.json``: one ``pooling_mode`` replaced a flag for each mode.
    - ``sentence_bert_config.json``: text-embeddings-inference and vLLM read ``max_seq_length``.

    A second call changes nothing. A missing file raises OSError, a damaged one ValueError.
    """

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    tokenizer, pooling = read("tokenizer_config.json"), read("1_Pooling/config.json")
    changed = {
        "sentence_bert_config.json": {"max_seq_length": tokenizer["model_max_length"], "do_lower_case": False},
        "modules.json": [
            {**entry, "type": f"sentence_transformers.models.{entry['type'].rpartition('.')[2]}"}
            for entry in read("modules.json")
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": pooling.get("word_embedding_dimension", pooling.get("embedding_dimension")),
            **{f"pooling_mode_{mode}": mode == "lasttoken" for mode in _POOLING_MODES},
            "include_prompt": pooling["include_prompt"],
        },
    }
    if (folder / "config.json").is_file():
        config = read("config.json")
        changed["config.json"] = dict(sorted({**config, "rope_theta": config["rope_parameters"]["rope_theta"]}.items()))
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
        tokenizer = dict(sorted(tokenizer.items()))
    changed["tokenizer_config.json"] = tokenizer
    for name, content in changed.items():
        write_whole(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
