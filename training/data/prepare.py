"""From the published format to prepared sources: every distinct text tokenised once, rows turned into integers."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_f2llm.prompts import instruct
from modeling_f2llm.tokenizer import append_eos
from training.data.manifest import Source
from training.data.prepared import DESCRIPTION, OFFSETS, SPLITS, TOKENS, PreparedSource
from training.data.published import PublishedFile
from training.errors import UserError
from training.keyed import keyed_bits, keyed_uniform, text_key

__all__ = ["PreparationOptions", "prepare", "prepare_source"]

logger = logging.getLogger(__name__)

FORMAT = 1
# What a draw is for: the first key after the seed, so that draws for different ends are independent.
_CAP, _SPLIT, _DOCUMENT_INSTRUCTION = 1, 2, 3
_TEXTS_PER_CALL = 1024


@dataclass(frozen=True)
class PreparationOptions:
    """How sources are prepared.

    Attributes:
        max_length: Tokens of a text at most, EOS included; longer texts are cut and still end with EOS.
        instructions: Whether queries carry their source's instruction (stage 2) or are raw (stage 1).
        document_instruction_share: Share of the documents of symmetric sources that carry it too.
        validation_share: Share of the rows kept for validation.
        num_hard_negatives: Negatives that a row must have, by task type.
        seed: Seed of all draws.
    """

    max_length: int = 1024
    instructions: bool = True
    document_instruction_share: float = 0.3
    validation_share: float = 0.01
    num_hard_negatives: tuple[tuple[str, int], ...] = (("retrieval", 7), ("clustering", 9), ("classification", 1))
    seed: int = 0


class _Texts:
    """Positions of a source's distinct texts, and those that still await their tokens."""

    def __init__(self, source: Source, options: PreparationOptions) -> None:
        self._positions: dict[str, int] = {}
        self._documents: dict[str, int] = {}
        self._waiting: list[str] = []
        self._instruction = source.instruction if options.instructions else None
        self._document_share = options.document_instruction_share if source.symmetric and options.instructions else 0.0
        self._key = (options.seed, _DOCUMENT_INSTRUCTION, text_key(source.name))

    def __len__(self) -> int:
        return len(self._positions)

    def query(self, text: str) -> int:
        """Position of a query, under its instruction if there is one."""
        return self._position(self._instructed(text))

    def document(self, text: str | None) -> int:
        """Position of a passage or negative, -1 for None.

        Whether a document carries the instruction is drawn per text rather than per row: a text keeps one form, and so
        stays one text.
        """
        if text is None:
            return -1
        position = self._documents.get(text)
        if position is None:
            drawn = self._document_share and keyed_uniform(*self._key, text_key(text)) < self._document_share
            position = self._documents[text] = self._position(self._instructed(text) if drawn else text)
        return position

    def _position(self, text: str) -> int:
        position = self._positions.get(text)
        if position is None:
            position = self._positions[text] = len(self._positions)
            self._waiting.append(text)
        return position

    def _instructed(self, text: str) -> str:
        # Published files may carry the instruction in the text already.
        if self._instruction is None or (text.startswith("Instruct: ") and "\nQuery: " in text):
            return text
        return instruct(self._instruction, text)

    def take_new(self) -> list[str]:
        """Texts that were positioned since the last call, in the order of their positions."""
        new, self._waiting = self._waiting, []
        return new


def prepare(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, folder: Path | str, options: PreparationOptions
) -> list[PreparedSource]:
    """Prepares each source into a subfolder of its name, reusing those that are finished and unchanged.

    Args:
        sources: What to prepare.
        tokenizer: A fast tokenizer with an EOS token.
        folder: Where the prepared sources go.
        options: How.

    Raises:
        UserError: If a source is faulty, or the tokenizer has no EOS. Sources prepared before it stay.
    """
    try:
        append_eos(tokenizer)
    except ValueError as error:
        raise UserError(str(error)) from None
    folder = Path(folder)
    return [
        prepare_source(source, tokenizer, folder / source.name, options)
        for source in tqdm(sources, desc="prepare", unit="source", disable=None)
    ]


def prepare_source(
    source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path, options: PreparationOptions
) -> PreparedSource:
    """Prepares one source; the folder is whole or absent."""
    fingerprint = _fingerprint(source, tokenizer, options)
    finished = _finished(folder, fingerprint)
    if finished is not None:
        return finished
    ours = {TOKENS, OFFSETS, DESCRIPTION, *SPLITS.values()}
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - ours):
        raise UserError(f"{folder}: the folder holds something else than a prepared source; give another prepared_dir")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write(source, tokenizer, partial, options, fingerprint)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    prepared = PreparedSource(folder)
    logger.info("prepared %s", prepared)
    return prepared


def _finished(folder: Path, fingerprint: str) -> PreparedSource | None:
    """The prepared source in a folder, if it is whole and was made of the same."""
    try:
        prepared = PreparedSource(folder)
    except UserError:
        return None
    return prepared if prepared.description.get("fingerprint") == fingerprint else None


def _fingerprint(source: Source, tokenizer: PreTrainedTokenizerBase, options: PreparationOptions) -> str:
    """Changes with anything that the prepared folder depends on."""
    digest = hashlib.blake2b(digest_size=16)
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.files if path.exists()]
    described = {**asdict(source), "files": files}
    # Other task types' negatives do not matter to this source.
    chosen = {**asdict(options), "num_hard_negatives": dict(options.num_hard_negatives)[source.task_type]}
    digest.update(json.dumps([FORMAT, described, chosen]).encode())
    backend = tokenizer.backend_tokenizer
    # The truncation and padding of the last call would be part of the JSON.
    backend.no_truncation()
    backend.no_padding()
    digest.update(backend.to_str().encode())
    return digest.hexdigest()


def _write(
    source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path, options: PreparationOptions, fingerprint: str
) -> None:
    required = dict(options.num_hard_negatives)[source.task_type]
    files = [PublishedFile(path, required) for path in source.files]
    width = max(len(file.negatives) for file in files)
    texts, offsets, counts = _Texts(source, options), array("q", [0]), dict.fromkeys(SPLITS, 0)
    with (folder / TOKENS).open("wb") as tokens_file:
        splits = {split: (folder / file).open("wb") for split, file in SPLITS.items()}
        try:
            for split, rows in _positions(source, files, width, texts, options):
                splits[split].write(rows.astype("<i4").tobytes())
                counts[split] += len(rows)
                _append_tokens(texts.take_new(), tokenizer, options.max_length, tokens_file, offsets)
        finally:
            for handle in splits.values():
                handle.close()
    (folder / OFFSETS).write_bytes(np.asarray(offsets, dtype="<i8").tobytes())
    description = {
        "format": FORMAT,
        "name": source.name,
        "task_type": source.task_type,
        "symmetric": source.symmetric,
        "instruction": source.instruction if options.instructions else None,
        "languages": source.languages,
        "negatives": width,
        "texts": len(texts),
        "tokens": offsets[-1],
        "rows": counts,
        "fingerprint": fingerprint,
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2))


def _positions(
    source: Source, files: Sequence[PublishedFile], width: int, texts: _Texts, options: PreparationOptions
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields blocks of rows, as positions of their texts, with the split that they belong to."""
    kept = _kept_rows(source, sum(file.num_rows for file in files), options.seed)
    key = text_key(source.name)
    row = 0
    for file in files:
        for batch in file.batches():
            numbers = np.arange(row, row + len(batch))
            row += len(batch)
            wanted = np.flatnonzero(kept[numbers]) if kept is not None else np.arange(len(batch))
            block = np.full((len(wanted), 2 + width), -1, dtype=np.int64)
            block[:, 0] = [texts.query(batch.columns["query"][i]) for i in wanted]
            for column, name in enumerate(("passage", *file.negatives), start=1):
                block[:, column] = [texts.document(batch.columns[name][i]) for i in wanted]
            held_out = keyed_uniform(options.seed, _SPLIT, key, numbers[wanted]) < options.validation_share
            yield "train", block[~held_out]
            yield "validation", block[held_out]


def _kept_rows(source: Source, num_rows: int, seed: int) -> np.ndarray | None:
    """``(num_rows,)`` booleans of the rows under the source's cap, drawn by key; None for all."""
    if source.cap is None or num_rows <= source.cap:
        return None
    draws = keyed_bits(seed, _CAP, text_key(source.name), np.arange(num_rows))
    kept = np.zeros(num_rows, dtype=bool)
    kept[np.argpartition(draws, source.cap)[: source.cap]] = True
    return kept


def _append_tokens(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, file, offsets: array
) -> None:
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        encoded = tokenizer(
            list(texts[start : start + _TEXTS_PER_CALL]),
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
        )["input_ids"]
        for ids in encoded:
            offsets.append(offsets[-1] + len(ids))
        file.write(np.concatenate([np.asarray(ids, dtype="<i4") for ids in encoded]).tobytes())
