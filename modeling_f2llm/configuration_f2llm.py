"""Configuration of F2LLM models: a Qwen3 configuration that also states its matryoshka dimensions.

This file travels with every released model as remote code: it imports transformers (and huggingface_hub, which
transformers itself is built on) only.
"""

from __future__ import annotations

import os
from dataclasses import is_dataclass
from typing import Any

from transformers import Qwen3Config
from transformers import __version__ as transformers_version

if tuple(int(part) for part in transformers_version.split(".")[:2]) < (4, 55):
    # The first that keeps packed texts apart in every attention; earlier ones would run, with other numbers.
    raise ImportError(
        f"the code of F2LLM models needs transformers 4.55 or newer (found {transformers_version}): leave out "
        "trust_remote_code, which gives the same embeddings, or pip install -U transformers"
    )

__all__ = ["FAMILY", "F2LLMConfig", "keep_layers", "matryoshka_dims", "usual_exits"]

# The eight published shapes (arXiv 2603.19223, Table 1):
# hidden size, MLP intermediate size, layers, attention heads; 8 KV heads of 128 in all of them.
FAMILY: dict[str, tuple[int, int, int, int]] = {
    "f2llm-v2-80m": (320, 2048, 8, 16),
    "f2llm-v2-160m": (640, 1536, 9, 16),
    "f2llm-v2-330m": (896, 2560, 16, 16),
    "f2llm-v2-0.6b": (1024, 3072, 28, 16),
    "f2llm-v2-1.7b": (2048, 6144, 28, 16),
    "f2llm-v2-4b": (2560, 9728, 36, 32),
    "f2llm-v2-8b": (4096, 12288, 36, 32),
    "f2llm-v2-14b": (5120, 17408, 40, 40),
}

# Embeddings of the Qwen3 models and special tokens of their post-trained tokenizer.
_QWEN3_VOCABULARY = 151936
_QWEN3_TOKENS = {"pad_token_id": 151643, "bos_token_id": 151643, "eos_token_id": 151645}


def matryoshka_dims(hidden_size: int, min_dim: int = 8) -> list[int]:
    """Returns the embedding widths trained by matryoshka learning, widest first.

    The published rule: every power of two from ``min_dim`` up that is smaller than the width, and the width itself.

    Args:
        hidden_size: Width of the embedding.
        min_dim: Smallest width trained (a power of two).

    Raises:
        ValueError: If ``min_dim`` is not a power of two between 1 and ``hidden_size``.

    Example:
        >>> matryoshka_dims(320)
        [320, 256, 128, 64, 32, 16, 8]
    """
    if not 1 <= min_dim <= hidden_size:
        raise ValueError(f"min_dim must lie between 1 and the model's width {hidden_size}, got {min_dim}")
    if min_dim & (min_dim - 1):
        raise ValueError(f"min_dim must be a power of two, got {min_dim}")
    dims = [hidden_size]
    dim = min_dim
    while dim < hidden_size:
        dims.append(dim)
        dim *= 2
    return sorted(dims, reverse=True)


def usual_exits(layers: int) -> list[int]:
    """Return the numbers of layers after which a model of so many ends: 1, 2, 4, 8, 16, 24, … and all (ML-Embed)."""
    return sorted({*(each for each in (1, 2, 4, *range(8, layers, 8)) if each < layers), layers})


def keep_layers(config: Qwen3Config, count: int) -> None:
    """Makes a configuration, in place, that of a model's first ``count`` layers.

    Raises:
        ValueError: If there are not so many.
    """
    if not 1 <= count <= len(config.layer_types):
        raise ValueError(f"num_hidden_layers must lie between 1 and the model's {len(config.layer_types)}, got {count}")
    config.num_hidden_layers, config.layer_types = count, list(config.layer_types[:count])
    config.max_window_layers = min(config.max_window_layers, count)
    if exits := getattr(config, "exit_layers", None):
        config.exit_layers = [layer for layer in exits if layer <= count]


class F2LLMConfig(Qwen3Config):
    """A Qwen3 configuration with the fields that embedding servers read.

    ``model_type`` stays ``"qwen3"``, so every library that loads Qwen3 loads them. The ids of the special tokens are
    None unless given, as in stock Qwen3: they depend on the tokenizer.

    Args:
        is_matryoshka: Whether the embeddings may be truncated. vLLM refuses its ``dimensions`` request field otherwise.
        matryoshka_dimensions: Widths that were trained, widest first; all powers of two from 8 up and ``hidden_size``
            when left out.
        exit_layers: Numbers of layers that make models of their own, ascending; None if only all of them do.
        embedding_ranks: Ranks at which factorised token embeddings were trained, ascending; None without factors.

    Raises:
        StrictDataclassClassValidationError: If a matryoshka dimension is larger than ``hidden_size`` or not positive.

    Example:
        >>> config = F2LLMConfig.from_family("f2llm-v2-330m")
        >>> config.hidden_size, config.matryoshka_dimensions[:3]
        (896, [896, 512, 256])
    """

    use_cache: bool = False
    tie_word_embeddings: bool = True
    is_matryoshka: bool = True
    matryoshka_dimensions: list[int] | None = None
    exit_layers: list[int] | None = None
    embedding_ranks: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._complete()

    def _complete(self) -> None:
        """Fills in what depends on other fields."""
        # Qwen3's default of 28 says nothing about a shallower model, but loaders have tripped over it.
        self.max_window_layers = min(self.max_window_layers, self.num_hidden_layers)
        if not self.is_matryoshka:
            self.matryoshka_dimensions = None
        elif self.matryoshka_dimensions is None:
            self.matryoshka_dimensions = (
                matryoshka_dims(self.hidden_size) if self.hidden_size >= 8 else [self.hidden_size]
            )

    def validate_matryoshka(self) -> None:
        """Checks the matryoshka dimensions against the width; runs with every ``validate()``."""
        wrong = [dim for dim in self.matryoshka_dimensions or [] if not 1 <= dim <= self.hidden_size]
        if wrong:
            raise ValueError(
                f"matryoshka_dimensions {wrong} do not fit a model of hidden_size {self.hidden_size}: "
                f"give dimensions from 1 to {self.hidden_size}"
            )

    def to_dict(self) -> dict[str, Any]:
        """As Qwen3Config's, without exits and ranks if there are none."""
        optional = ("exit_layers", "embedding_ranks")
        return {name: value for name, value in super().to_dict().items() if value or name not in optional}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes ``config.json`` under the architecture that every Qwen3 loader knows."""
        self.architectures = ["Qwen3Model"]
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_family(cls, name: str, **overrides: Any) -> F2LLMConfig:
        """Returns the configuration of a published size, with the special tokens of the post-trained Qwen3 tokenizer.

        Args:
            name: One of ``f2llm-v2-80m, -160m, -330m, -0.6b, -1.7b, -4b, -8b, -14b``, in any case.
            **overrides: Fields to change. Another ``vocab_size`` is that of another tokenizer: the special tokens are
                then those given here, or None.

        Raises:
            ValueError: If the name is unknown.
        """
        shape = FAMILY.get(name.lower())
        if shape is None:
            raise ValueError(f"unknown model {name!r}; the family is {', '.join(FAMILY)}")
        hidden_size, intermediate_size, layers, heads = shape
        published = {
            "vocab_size": _QWEN3_VOCABULARY,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": layers,
            "max_window_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "rms_norm_eps": 1e-6,
        }
        fields = {**published, **overrides}
        tokens = _QWEN3_TOKENS if fields["vocab_size"] == _QWEN3_VOCABULARY else {}
        return cls(**{**tokens, **fields})


def _init_without_dataclass(self: F2LLMConfig, **fields: Any) -> None:
    names = ("is_matryoshka", "matryoshka_dimensions", "exit_layers", "embedding_ranks")
    own = {name: fields.pop(name, getattr(F2LLMConfig, name)) for name in names}
    defaults = {name: getattr(F2LLMConfig, name) for name in ("use_cache", "tie_word_embeddings")}
    Qwen3Config.__init__(self, **{**defaults, **fields})
    self.__dict__.update(own)
    self._complete()
    self.validate_matryoshka()


if is_dataclass(Qwen3Config):
    from huggingface_hub.dataclasses import strict

    F2LLMConfig = strict(F2LLMConfig)
else:
    # Released folders load under versions of transformers before 5.4, too, whose configurations are plain classes.
    F2LLMConfig.__init__ = _init_without_dataclass

F2LLMConfig.register_for_auto_class()
