"""Batches without padding: sequences laid end to end, and where each of them ends.

A packed batch is one flat sequence of shape ``(1, T)`` that holds ``n`` texts one after the other, together with their
lengths. Everything in a Qwen3 layer but attention works token by token, so only attention needs to know where a text
ends. The names of the boundary arguments (``cu_seq_lens_q``, ``max_length_q``, …) are those of
``transformers``' ``FlashAttentionKwargs``; ``sequence_lengths`` adds the same numbers as Python integers, so that no
layer waits for the device to learn them.

This file travels with every released model as remote code: it imports torch and transformers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "BOUNDARY_NAMES",
    "FewShapes",
    "PaddedLayout",
    "boundary_kwargs",
    "compiles_each_shape",
    "integers_on",
    "packed_position_ids",
    "rounded_up",
    "sequence_lengths_of",
]


@dataclass(frozen=True)
class PaddedLayout:
    """Where the real tokens of a padded batch lie, in the order in which they are packed.

    Sequences are packed shortest first, so that equal lengths are neighbours and share one attention call.

    Attributes:
        shape: ``(batch, width)`` of the padded batch.
        index: ``(T,)`` position of each packed token in the flattened padded batch; ``None`` if nothing is padded.
        position_ids: ``(1, T)`` position of each token within its own sequence.
        lengths: Length of each packed sequence, zero for a row that is all padding.
    """

    shape: tuple[int, int]
    index: Tensor | None
    position_ids: Tensor
    lengths: list[int]

    @classmethod
    def from_mask(cls, attention_mask: Tensor) -> PaddedLayout | None:
        """Reads the layout from a ``(batch, width)`` mask that is non-zero at real tokens.

        Returns ``None`` if real tokens of a row are interrupted by padding: that is a mask, not a padded batch.
        """
        mask = attention_mask.bool()
        batch, width = mask.shape
        lengths = mask.sum(dim=1)
        first = mask.int().argmax(dim=1)
        last = width - 1 - mask.flip(1).int().argmax(dim=1)
        contiguous = (last - first + 1 == lengths) | (lengths == 0)
        *host, whole = torch.cat([lengths, contiguous.all()[None].long()]).tolist()
        if not whole:
            return None
        if min(host, default=0) == width:
            return cls.without_padding(batch, width, mask.device)
        order = lengths.argsort(stable=True)
        row, column = mask[order].nonzero(as_tuple=True)
        return cls(
            shape=(batch, width),
            index=order[row] * width + column,
            position_ids=(column - first[order][row])[None],
            lengths=sorted(host),
        )

    @classmethod
    def without_padding(cls, batch: int, width: int, device: torch.device) -> PaddedLayout:
        """The layout of a batch whose rows all have the full width."""
        position_ids = torch.arange(width, device=device).repeat(batch)[None]
        return cls(shape=(batch, width), index=None, position_ids=position_ids, lengths=[width] * batch)

    def pack(self, padded: Tensor) -> Tensor:
        """``(batch, width, …)`` → ``(1, T, …)``."""
        flat = padded.flatten(0, 1)
        return (flat if self.index is None else flat[self.index])[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """``(1, T, …)`` → ``(batch, width, …)`` with zeros at padding."""
        flat = packed[0]
        if self.index is not None:
            flat = flat.new_zeros(self.shape[0] * self.shape[1], *flat.shape[1:]).index_copy(0, self.index, flat)
        return flat.unflatten(0, self.shape)


def integers_on(device: torch.device | None, numbers: Sequence[int]) -> Tensor:
    """``(n,)`` integers on a device; nobody waits for what a GPU is still computing, as an ordinary copy would."""
    if torch.device(device or "cpu").type == "cuda":
        return torch.tensor(numbers, device="cpu", pin_memory=True).to(device, non_blocking=True)
    return torch.tensor(numbers, device=device)


def packed_position_ids(lengths: Sequence[int], device: torch.device | None = None) -> Tensor:
    """``(1, T)`` positions that start again at zero with every sequence."""
    counts = integers_on(device, lengths)
    # With the size of the output nobody waits for the device to count.
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=sum(lengths))
    return (torch.arange(len(starts), device=device) - starts)[None]


def sequence_lengths_of(position_ids: Tensor) -> list[int]:
    """Lengths of the sequences that ``(rows, width)`` positions mark: one starts where a position does not follow."""
    rows, width = position_ids.shape
    # Minus two is followed by no position: every row starts a text.
    follows = position_ids.diff(prepend=position_ids.new_full((rows, 1), -2)) == 1
    starts = (~follows).flatten().nonzero()[:, 0]
    return starts.diff(append=starts.new_full((1,), rows * width)).tolist()


# Every argument by which a caller, or `boundary_kwargs`, says where the sequences of a packed batch end.
BOUNDARY_NAMES = ("sequence_lengths", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def compiles_each_shape(device: torch.device) -> bool:
    """Whether torch compiles kernels for, and keeps, each distinct shape of tensors, as it does on Apple's GPU."""
    return device.type == "mps"


def rounded_up(number: int, digits: int) -> int:
    """The next number that has nothing but zeros after its first binary digits; one more may count as a digit."""
    step = 1 << max(0, (number - 1).bit_length() - digits)
    return -(-number // step) * step


@dataclass(frozen=True)
class FewShapes:
    """The attention of a packed batch by calls of few distinct shapes: a power of two of texts, a rounded width.

    A text is read beyond its end. Its own tokens do not see what follows there, for attention is causal.

    Attributes:
        runs: (number of sequences, width) of each call.
        index: ``(number * width,)`` tokens of the packed batch that each call reads.
        back: ``(T,)`` where the tokens lie in the outputs of all calls, one after the other; 0 for those of no text.
    """

    runs: list[tuple[int, int]]
    index: tuple[Tensor, ...]
    back: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], tokens: int, device: torch.device) -> FewShapes:
        """The calls for texts of these lengths, with which a batch of ``tokens`` begins."""
        texts: dict[int, list[tuple[int, int]]] = {}
        for start, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
            if length:
                texts.setdefault(rounded_up(length, 3), []).append((start, length))
        runs, index, done, back = [], [], 0, torch.zeros(tokens, dtype=torch.long)
        for width, group in texts.items():
            while group:
                count, at = 1 << (len(group).bit_length() - 1), torch.arange(width)
                starts, ends = (torch.tensor(each)[:, None] for each in zip(*group[:count], strict=True))
                group, inside = group[count:], at < ends
                back[(starts + at)[inside]] = done + inside.flatten().nonzero()[:, 0]
                runs.append((count, width))
                index.append((starts + at).clamp(max=tokens - 1).flatten())
                done += count * width
        sizes = [len(each) for each in index]
        return cls(runs, torch.cat([back, *index]).to(device).split([tokens, *sizes])[1:], back.to(device))


def boundary_kwargs(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Keyword arguments that tell every attention backend where the sequences of a packed batch end."""
    lengths = list(lengths)
    # Kernels that share keys between heads take no empty text beside texts of one token, and none takes no text at all.
    present = [length for length in lengths if length] or [0]
    ends = integers_on(device, [0, *present]).cumsum(0).to(torch.int32)
    longest = max(lengths, default=0)
    return {
        "sequence_lengths": lengths,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
