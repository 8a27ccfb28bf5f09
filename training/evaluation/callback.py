"""The evaluation of pairs while a model is trained: what the finished model will be scored by, on a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.common.agreement import as_first_process
from training.evaluation.pairs import CUTOFF, Pairs, ranking_scores
from training.models.encoding import embed_batch
from training.models.layout import lay_out


class PairsCallback(TrainerCallback):
    """Adds to each evaluation of a Trainer how well its model finds the passages of pairs.

    Texts are read as the saved model reads them: queries under its query prompt, cut at its greatest length, EOS at the
    end. All processes encode their shares in chunks, as in training, and report what the first of them computes. No
    random number is drawn.

    Metrics are ``eval_pairs_accuracy`` (accuracy@1, as :func:`~training.evaluation.pairs.evaluate_pairs` gives it) and
    ``eval_pairs_ndcg_at_10`` at the full width; with ``_dim64`` appended, for example, at others.

    Args:
        pairs: What to find.
        tokenizer: The model's; it appends EOS and is left as it is.
        prompts: ``query`` and ``document``, the texts that go before those of either side.
        dims: Widths, widest first.
        accelerator: That of the Trainer.
        max_length: Tokens that the saved model reads of a text at most.
        max_tokens: Tokens that a process encodes at once; a longer text is encoded by itself.
    """

    def __init__(
        self,
        pairs: Pairs,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Mapping[str, str],
        dims: Sequence[int],
        accelerator: Accelerator,
        max_length: int,
        max_tokens: int,
    ) -> None:
        self._pairs, self._dims, self._accelerator = pairs, list(dims), accelerator
        texts = [prompts["query"] + query for query in pairs.queries]
        texts += [prompts["document"] + candidate for candidate in pairs.candidates]
        tokens = _tokenise(tokenizer, texts, max_length)
        lengths = np.array([len(each) for each in tokens])
        order = np.argsort(lengths, kind="stable")
        layout = lay_out(lengths[order], accelerator.process_index, accelerator.num_processes, max_tokens)
        ids = chain.from_iterable(tokens[text] for text in order[np.concatenate(layout.chunks)])
        self._batch = {"input_ids": torch.tensor(list(ids))[None], **layout.of_batch(lengths[order])}
        self._places = torch.from_numpy(np.argsort(order))

    @property
    def metric_names(self) -> list[str]:
        """What is added to the metrics of an evaluation."""
        suffixes = ["", *(f"_dim{dim}" for dim in self._dims[1:])]
        return [f"eval_pairs_{kind}{suffix}" for suffix in suffixes for kind in ("accuracy", f"ndcg_at_{CUTOFF}")]

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Encodes all texts on all processes together and adds the scores."""
        device = self._accelerator.device
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self._batch.items()}
        with self._accelerator.autocast():
            embeddings = embed_batch(model, moved)
        values = [0.0] * len(self.metric_names)
        if self._accelerator.is_main_process:
            values = self._scores(embeddings.cpu()[self._places])
        metrics.update(as_first_process(self._accelerator, dict(zip(self.metric_names, values, strict=True))))

    def _scores(self, embeddings: Tensor) -> list[float]:
        """In the order of the names."""
        # As the saved model's last module does; each width is made of unit length again.
        embeddings = torch.nn.functional.normalize(embeddings, dim=-1)
        queries, candidates = embeddings.split([len(self._pairs.queries), len(self._pairs.candidates)])
        values = []
        for dim in self._dims:
            values += ranking_scores(queries, candidates, self._pairs, dim)
        return values


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> list[list[int]]:
    """Token ids of each text, EOS included."""
    # A copy: truncation and padding are states of a fast tokenizer, and would be saved with it.
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_padding()
    copy.enable_truncation(max_length)
    return [encoding.ids for encoding in copy.encode_batch_fast(texts)]
