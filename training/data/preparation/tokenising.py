"""The third phase: the distinct texts of a partition, each tokenised once by the Rust tokenizer, many in a call."""

from __future__ import annotations

from itertools import chain

import numpy as np
from tokenizers import Tokenizer

from training.common.errors import UserError
from training.common.keyed import text_key
from training.data.cleaning.normalise import normalise
from training.data.instructions import without_instruction
from training.data.preparation.plan import PreparationPlan
from training.data.preparation.runs import read_partition

_TEXTS_PER_CALL = 1024


def tokenise_partition(plan: PreparationPlan, partition: int) -> None:
    """Writes hashes, lengths and tokens of a partition's distinct texts, in the order of their hashes.

    Where texts are kept, their UTF-8 and its lengths are written, too: whole, however many tokens are cut.

    Raises:
        UserError: If two texts have one hash.
    """
    hashes, texts = _distinct(plan, partition)
    tokenizer = Tokenizer.from_file(str(plan.tokenizer_file))
    # Truncation comes before the post-processor and leaves room for what that appends: EOS stays.
    tokenizer.enable_truncation(plan.options.max_length)
    lengths = np.zeros(len(texts), dtype="<i4")
    with plan.texts_file(partition, "tokens").open("wb") as file:
        for start in range(0, len(texts), _TEXTS_PER_CALL):
            encodings = tokenizer.encode_batch_fast(texts[start : start + _TEXTS_PER_CALL])
            ids = [encoding.ids for encoding in encodings]
            lengths[start : start + len(ids)] = [len(each) for each in ids]
            file.write(np.fromiter(chain.from_iterable(ids), dtype="<i4").tobytes())
    plan.texts_file(partition, "lengths").write_bytes(lengths.tobytes())
    if plan.options.keep_texts:
        _write_texts(plan, partition, texts)
    if plan.options.text_forms:
        # Of the text alone: under an instruction it says the same.
        forms = np.fromiter((text_key(normalise(without_instruction(text))) for text in texts), "<u8", len(texts))
        plan.texts_file(partition, "forms").write_bytes(forms.tobytes())
    plan.texts_file(partition, "hashes").write_bytes(hashes.astype("<u8").tobytes())


def _write_texts(plan: PreparationPlan, partition: int, texts: list[str]) -> None:
    lengths = np.zeros(len(texts), dtype="<i4")
    with plan.texts_file(partition, "utf8").open("wb") as file:
        for number, text in enumerate(texts):
            lengths[number] = file.write(text.encode())
    plan.texts_file(partition, "utf8_lengths").write_bytes(lengths.tobytes())


def _distinct(plan: PreparationPlan, partition: int) -> tuple[np.ndarray, list[str]]:
    """Hashes in ascending order and their texts."""
    texts: dict[int, str] = {}
    for hashes, found in read_partition([plan.runs(shard) for shard in range(len(plan.shards))], partition):
        for key, text in zip(hashes.tolist(), found, strict=True):
            if texts.setdefault(key, text) != text:
                raise UserError(
                    f"source {plan.source.name!r}: two texts have one 64-bit hash ({text[:50]!r}, "
                    f"{texts[key][:50]!r}); prepare it with another seed"
                )
    order = sorted(texts)
    return np.array(order, dtype=np.uint64), [texts[key] for key in order]
