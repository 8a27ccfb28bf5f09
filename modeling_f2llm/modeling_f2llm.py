"""F2LLM's encoder: Qwen3 without padding.

This file travels with every released model as remote code: it imports torch, transformers and its neighbours only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._pytree import tree_map_only
from transformers import Cache, Qwen3Model
from transformers.modeling_outputs import BaseModelOutputWithPast

from .attention import PACKED_ATTENTION, check_available
from .configuration_f2llm import F2LLMConfig, keep_layers
from .layers import LowRankEmbedding, adopt_layers, records_graph
from .packing import (
    BOUNDARY_NAMES,
    FewShapes,
    PaddedLayout,
    boundary_kwargs,
    compiles_each_shape,
    integers_on,
    packed_position_ids,
    rounded_up,
    sequence_lengths_of,
)

__all__ = ["F2LLMModel"]


class F2LLMModel(Qwen3Model):
    """Qwen3 encoder with the inputs and outputs of :class:`~transformers.Qwen3Model` that computes no padded token.

    A padded batch is packed into one flat sequence, run through the Qwen3 layers with positions that start again at
    every text, and unpacked. Parameters, their names and the numbers are those of ``Qwen3Model``; released folders load
    as either class.

    ``attn_implementation`` chooses how attention keeps the texts apart: left out, the fastest that the device can run
    (flash-attn if installed, torch's variable-length kernel on CUDA, else scaled-dot-product attention per text);
    ``"sdpa"``, ``"torch_varlen"`` and ``"flash_attention_2"`` name one. Every other implementation of transformers
    (``"eager"``, ``"flex_attention"``) runs packed too, under transformers' own block-diagonal mask.

    ``compile=True`` compiles what each layer does around its attention; the first batches then wait for the compiler,
    all others are faster. It can be given wherever a model is made: ``F2LLMModel.from_pretrained(folder,
    compile=True)``, ``SentenceTransformer(folder, trust_remote_code=True, model_kwargs={"compile": True})``. A saved
    folder does not remember it. Calls that do not run packed are stock Qwen3Model's, compiled or not.

    ``num_hidden_layers=8``, given in the same places, loads the first eight layers alone: of a model with exits
    (``config.exit_layers``) a whole smaller model. Stock Qwen3 takes it as a field of its configuration.

    A model with ``config.embedding_ranks`` has its token embeddings as two factors, of which ``embedding_rank=64`` uses
    the leading 64 columns and rows. Its folder also has their product, which stock Qwen3 loads.

    A graph of the whole model, as ``torch.compile``, ``torch.export``, ``torch.jit.trace`` and exporters for ONNX and
    OpenVINO record it, is stock Qwen3Model's, padding and all, and right for texts of all lengths. So is a call
    under ``torch.func``. Second derivatives need ``attn_implementation="eager"``.

    Args:
        config: The shape of the model.
        compile: Whether to compile with ``torch.compile``. On a CPU that needs a C++ compiler.
        num_hidden_layers: Layers to keep, the first ones; all of the configuration's if None.
        embedding_rank: Rank of the token embeddings to use; all that there is if None.

    Raises:
        ValueError: If the model has not so many layers, or no factors of such a rank.

    Example:
        >>> import torch
        >>> from modeling_f2llm import F2LLMConfig, F2LLMModel
        >>> config = F2LLMConfig.from_family("f2llm-v2-80m", vocab_size=64, hidden_size=32, num_hidden_layers=2)
        >>> model = F2LLMModel(config).eval()
        >>> ids, mask = torch.tensor([[5, 6, 1], [7, 1, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> model(input_ids=ids, attention_mask=mask).last_hidden_state.shape
        torch.Size([2, 3, 32])
    """

    config_class = F2LLMConfig
    _no_split_modules = ("F2LLMDecoderLayer",)

    def __init__(
        self,
        config: F2LLMConfig,
        compile: bool = False,
        num_hidden_layers: int | None = None,
        embedding_rank: int | None = None,
    ) -> None:
        count = config.num_hidden_layers if num_hidden_layers is None else num_hidden_layers
        # `from_pretrained` changes the number alone, if that is what it was given.
        left_out = range(count, len(config.layer_types))
        if count != len(config.layer_types):
            config = deepcopy(config)
            keep_layers(config, count)
        super().__init__(config)
        if left_out:
            # Otherwise transformers warns of each of their weights.
            own = {rf"layers\.{layer}\." for layer in left_out}
            self._keys_to_ignore_on_load_unexpected = own.union(self._keys_to_ignore_on_load_unexpected or ())
        # No padding is embedded here, and a tokenizer may end texts with the token that it pads with: torch would never
        # update that token's embedding.
        self.embed_tokens.padding_idx = None
        ranks = getattr(config, "embedding_ranks", None) or [0]
        if embedding_rank is not None and not 1 <= embedding_rank <= max(ranks):
            what = f"from 1 to {max(ranks)}" if max(ranks) else "for the model: its token embeddings have no factors"
            raise ValueError(f"there is no embedding_rank of {embedding_rank} {what}")
        if max(ranks):
            self.embed_tokens = LowRankEmbedding(config.vocab_size, max(ranks), config.hidden_size)
            self.embed_tokens.rank = embedding_rank or max(ranks)
            ignored = {r"embed_tokens\.weight"}
            self._keys_to_ignore_on_load_unexpected = ignored.union(self._keys_to_ignore_on_load_unexpected or ())
        adopt_layers(self, compile)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            # Of zeros, with which padding would start, the norm has a thousand times the gradient of other embeddings.
            module.padding_idx = None
        super()._init_weights(module)

    def factorize_embeddings(self, ranks: Sequence[int] | None) -> None:
        """Replaces the token embeddings by the nearest product of two factors of the largest rank; None: by one matrix.

        Raises:
            ValueError: If a rank is less than 1 or exceeds width or vocabulary.
        """
        most = min(self.config.hidden_size, self.config.vocab_size)
        if ranks is not None and not (ranks and 1 <= min(ranks) and max(ranks) <= most):
            raise ValueError(f"ranks of token embeddings must lie between 1 and {most}, got {ranks}")
        weight = self.embed_tokens.weight.detach()
        if ranks is None:
            self.embed_tokens = nn.Embedding(*weight.shape, _weight=weight.clone())
        else:
            self.embed_tokens = LowRankEmbedding.nearest(weight, max(ranks))
        self.config.embedding_ranks = ranks and sorted({*ranks})

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Writes the model; beside factors of its token embeddings their product, which stock Qwen3 reads."""
        if isinstance(self.embed_tokens, LowRankEmbedding) and not getattr(self, "_hf_peft_config_loaded", False):
            state = kwargs.get("state_dict") or self.state_dict()
            kwargs["state_dict"] = {**state, "embed_tokens.weight": self.embed_tokens.weight.detach()}
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Maps the name that was asked for to a packed implementation.

        Raises:
            ImportError: If what was asked for by name is not installed.
            ValueError: If no such implementation exists.
        """
        implementation = PACKED_ATTENTION.get(requested_attention)
        if implementation is None:
            return self._standard_attn_implementation(requested_attention, is_init_check)
        check_available(implementation)
        return implementation

    def _standard_attn_implementation(self, requested_attention: str, is_init_check: bool) -> str:
        try:
            return super().get_correct_attn_implementation(requested_attention, is_init_check)
        except ImportError as error:
            raise ImportError(
                f"attn_implementation={requested_attention!r} cannot be used: {error} Install it (flash-attn: "
                '`pip install "f2llm[flash]"`), or leave attn_implementation out.'
            ) from error
        except ValueError as error:
            raise ValueError(f"{error} F2LLMModel adds 'packed' (the default) and 'torch_varlen'.") from error

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Tensor, ...]:
        """Encodes a padded or an already packed batch.

        Args:
            input_ids: ``(batch, width)`` token ids, padded on either side; or ``(1, T)`` packed ids.
            attention_mask: ``(batch, width)``, non-zero at real tokens. None means that nothing is padded.
            position_ids: As for Qwen3Model. Without a mask they may mark several texts in a row: a position that does
                not follow the one before it starts a new text.
            past_key_values: With a cache (as with ``use_cache=True``, attention weights to be returned, a ready-made
                mask, padding between real tokens, or a graph being recorded) the call is Qwen3Model's own, padding and
                all.
            inputs_embeds: ``(batch, width, hidden_size)`` or ``(1, T, hidden_size)``, instead of ``input_ids``.
            use_cache: See ``past_key_values``.
            **kwargs: ``sequence_lengths`` (``n`` lengths) or ``cu_seq_lens_q`` (``(n + 1,)`` boundaries) marks a packed
                batch. ``output_hidden_states`` and ``return_dict`` work as in Qwen3Model. With ``exit_layers``, numbers
                of layers, ``hidden_states`` are what models of only so many layers put out: the states after each,
                through the final norm. ``last_token_only=True`` asks for the last token of each text of a packed
                batch: what EOS pooling needs, without most of the last layer's work.

        Returns:
            ``last_hidden_state`` of shape ``(batch, width, hidden_size)``, zeros at padding unless the call is
            Qwen3Model's, or ``(1, T, hidden_size)`` for a packed batch, of last tokens ``(1, n, hidden_size)``; hidden
            states, if asked for, in the same shape.

        Raises:
            ValueError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given, the boundaries of a packed
                batch do not fit it, a packed batch is traced, or last tokens are asked for of a padded batch or of a
                text without tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        inputs = inputs_embeds if input_ids is None else input_ids
        ready_made = attention_mask is not None and not (
            isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
        )
        cached = past_key_values is not None or use_cache
        lengths = _packed_lengths(inputs, kwargs)
        if lengths is not None:
            if cached or attention_mask is not None:
                raise ValueError("a packed batch takes no cache and no attention mask: its boundaries say everything")
            if torch.jit.is_tracing():
                raise ValueError(
                    "torch.jit.trace would make constants of a packed batch's boundaries: trace a padded batch instead"
                )
            if position_ids is None:
                position_ids = packed_position_ids(lengths, inputs.device)
            return self._forward_packed(input_ids, inputs_embeds, position_ids, lengths, kwargs)
        if kwargs.pop("last_token_only", False):
            raise ValueError("last_token_only takes a packed batch: give sequence_lengths")
        wants_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        layout = None
        if not (cached or ready_made or wants_attentions or records_graph()):
            layout = _padded_layout(inputs, attention_mask, position_ids)
        if layout is not None and layout.index is None and position_ids is None and self._as_fast_in_rows(inputs):
            layout, attention_mask = None, None
        if layout is not None and sum(layout.lengths):
            return self._forward_padded(input_ids, inputs_embeds, position_ids, layout, kwargs)
        return self._run_layers(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _as_fast_in_rows(self, inputs: Tensor) -> bool:
        """Whether texts of one length gain nothing from being packed.

        On a CPU rows share the table of rotary positions, which a packed batch has once for every token. Compiled
        layers and the kernels of a GPU take packed batches only.
        """
        implementation = self.config._attn_implementation
        runs_sdpa = implementation in (PACKED_ATTENTION[None], PACKED_ATTENTION["sdpa"])
        return inputs.device.type == "cpu" and runs_sdpa and not any(layer.compiled for layer in self.layers)

    def _forward_padded(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        position_ids: Tensor | None,
        layout: PaddedLayout,
        kwargs: dict[str, Any],
    ) -> BaseModelOutputWithPast | tuple[Tensor, ...]:
        """Packs a padded batch, encodes it and brings every output back to ``(batch, width, …)``."""
        return_dict = kwargs.pop("return_dict", None)
        outputs = self._forward_packed(
            None if input_ids is None else layout.pack(input_ids),
            None if inputs_embeds is None else layout.pack(inputs_embeds),
            layout.position_ids if position_ids is None else layout.pack(position_ids.expand(layout.shape)),
            layout.lengths,
            {**kwargs, "return_dict": True},
        )
        outputs.last_hidden_state = layout.unpack(outputs.last_hidden_state)
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(
                None if states is None else layout.unpack(states) for states in outputs.hidden_states
            )
        if return_dict is None:
            return_dict = self.config.return_dict
        return outputs if return_dict else outputs.to_tuple()

    def _forward_packed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        position_ids: Tensor,
        lengths: list[int],
        kwargs: dict[str, Any],
    ) -> BaseModelOutputWithPast:
        """Runs the layers over one flat sequence of ``T`` tokens."""
        device = position_ids.device
        implementation = self.config._attn_implementation
        # A dict as attention_mask reaches the layers untouched. Backends without boundaries get None: transformers then
        # builds the block-diagonal mask from positions that start again.
        reads_boundaries = implementation in PACKED_ATTENTION.values() or implementation.startswith("flash_attention")
        mask = dict.fromkeys(self.config.layer_types) if reads_boundaries else None
        boundaries = boundary_kwargs(lengths, device) if reads_boundaries else {}
        others = {name: value for name, value in kwargs.items() if name not in BOUNDARY_NAMES}
        if others.pop("last_token_only", False):
            if not min(lengths, default=1):
                raise ValueError("last_token_only: a text without tokens has no last token")
            others["last_tokens"] = integers_on(device, lengths).cumsum(0) - 1
        if not reads_boundaries:
            # Rotary embeddings are relative: a text may start at any position, but all must start at one.
            position_ids = position_ids - _first_positions(position_ids, lengths)
        tokens, inputs = position_ids.shape[1], {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        if compiles_each_shape(device) and implementation in PACKED_ATTENTION.values():
            # Tokens of no text follow, for their number to be one of few.
            more = rounded_up(tokens, 4) - tokens
            inputs["input_ids"] = None if input_ids is None else pad(input_ids, (0, more))
            inputs["inputs_embeds"] = None if inputs_embeds is None else pad(inputs_embeds, (0, 0, 0, more))
            position_ids = pad(position_ids, (0, more))
            boundaries["few_shapes"] = FewShapes.of(lengths, tokens + more, device)
        outputs = self._run_layers(
            attention_mask=mask, position_ids=position_ids, use_cache=False, **inputs, **boundaries, **others
        )
        if position_ids.shape[1] == tokens:
            return outputs
        return tree_map_only(Tensor, lambda states: states[:, :tokens], outputs)

    def _run_layers(
        self, exit_layers: Sequence[int] | None = None, last_tokens: Tensor | None = None, **inputs: Any
    ) -> BaseModelOutputWithPast | tuple[Tensor, ...]:
        """Runs Qwen3Model; see :meth:`forward` for ``exit_layers``. Given ``(n,)`` last tokens, returns theirs only."""
        if exit_layers is None and last_tokens is None:
            return super().forward(**inputs)
        found: dict[int, Tensor] = {}
        # transformers' own hooks are gone where FSDP has changed the model's class.
        hooks = [
            self.layers[number - 1].register_forward_hook(lambda _, __, states, n=number: found.update({n: states}))
            for number in exit_layers or ()
        ]
        # Only the packed implementations know of queries that are fewer than keys. A layer knows by its number that it
        # is the last, unless someone has taken layers out.
        places = [layer.self_attn.layer_idx for layer in self.layers]
        trims = last_tokens is not None and "few_shapes" not in inputs
        trims = trims and places == [*range(self.config.num_hidden_layers)]
        trims = trims and self.config._attn_implementation in PACKED_ATTENTION.values()
        return_dict = inputs.pop("return_dict", None)
        try:
            inputs |= {"return_dict": True, **({"last_tokens": last_tokens} if trims else {})}
            outputs = super().forward(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        every = slice(None) if last_tokens is None else last_tokens
        last, depth = outputs.last_hidden_state, len(self.layers)
        outputs.last_hidden_state = last = last if trims else last[:, every]
        if exit_layers is not None:
            outputs.hidden_states = tuple(last if n == depth else self.norm(found[n][:, every]) for n in exit_layers)
        elif outputs.hidden_states is not None:
            outputs.hidden_states = (*(states[:, every] for states in outputs.hidden_states[:-1]), last)
        return outputs if return_dict or (return_dict is None and self.config.return_dict) else outputs.to_tuple()


def _first_positions(position_ids: Tensor, lengths: list[int]) -> Tensor:
    """``(1, T)`` position at which the text of each token starts."""
    counts = torch.tensor([length for length in lengths if length], device=position_ids.device)
    return position_ids[:, counts.cumsum(0) - counts].repeat_interleave(counts, dim=1)


def _packed_lengths(inputs: Tensor, kwargs: dict[str, Any]) -> list[int] | None:
    """Lengths of the texts if the caller gives the boundaries of a packed batch, else None.

    Raises:
        ValueError: If the boundaries do not fit the batch.
    """
    lengths, ends = kwargs.get("sequence_lengths"), kwargs.get("cu_seq_lens_q")
    if lengths is None and ends is None:
        return None
    lengths = (
        ends.diff(prepend=ends.new_zeros(1)).tolist()[1:] if lengths is None else torch.as_tensor(lengths).tolist()
    )
    starts_at_zero = ends is None or not int(ends[0])
    if inputs.shape[0] != 1 or not starts_at_zero or min(lengths, default=0) < 0 or sum(lengths) != inputs.shape[1]:
        raise ValueError(
            f"the boundaries of a packed batch must divide its (1, {inputs.shape[1]}) tokens: got sequence lengths "
            f"{lengths} for a batch of shape {tuple(inputs.shape[:2])}"
        )
    return lengths


def _padded_layout(inputs: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> PaddedLayout | None:
    """Where the texts lie in the rows of a batch; None for masks that are not about padding."""
    batch, width = inputs.shape[:2]
    if attention_mask is not None:
        return PaddedLayout.from_mask(attention_mask) if attention_mask.shape == (batch, width) else None
    layout = PaddedLayout.without_padding(batch, width, inputs.device)
    if position_ids is None:
        return layout
    return replace(layout, lengths=sequence_lengths_of(position_ids.expand(batch, width)))


F2LLMModel.register_for_auto_class("AutoModel")
