"""Models as mteb sees them: each width and precision a view of the same embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mteb
import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt, get_prompt_name
from mteb.types import PromptType
from numpy.typing import NDArray

from training.common.errors import UserError
from training.evaluation.models import Prompts
from training.evaluation.quantization import QUANTIZERS, calibrate, quantized, unit_length
from training.evaluation.records import PRECISIONS
from training.evaluation.store import EmbeddingStore


class EncoderView(AbsEncoder):
    """An mteb encoder: leading dimensions of a store's embeddings in a precision.

    Precisions are what is stored: queries stay in float32 beside documents in int8, as FAISS has them, and are binary
    beside binary ones. What is compared by cosine has unit length before it is stored in int8. int8 is calibrated on
    each corpus of retrieval, or else once for a task, on the texts that it asks for first, so that training and test
    texts share a scale. Nothing else has an influence.

    Args:
        store: The embeddings.
        meta: What mteb knows of the model, without the view.
        dimension: Leading dimensions used.
        precision: One of ``PRECISIONS``.
        prompts: What to put before texts; nothing if None.

    Raises:
        UserError: If the dimension is not one of the model's.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        meta: ModelMeta,
        dimension: int,
        precision: str = "float32",
        prompts: Prompts | None = None,
    ) -> None:
        if not 1 <= dimension <= store.width:
            raise UserError(f"dimension {dimension}: {meta.name} has {store.width}; choose from 1 to {store.width}")
        if precision not in PRECISIONS:
            raise UserError(f"precision {precision!r} is not known; choose from {', '.join(PRECISIONS)}")
        self.store, self.dimension, self.precision = store, dimension, precision
        self.prompts = prompts or Prompts()
        # Where mteb's own methods look for them.
        self.model, self.model_prompts = store.model, self.prompts.own
        self.prompts_dict, self.instruction_template = self.prompts.by_task, self.prompts.template
        self._ranges: dict[str, NDArray[np.float32]] = {}
        # Part of the address of a result in mteb's cache: views must not share one.
        experiment = {**(meta.experiment_kwargs or {}), "dimension": dimension, "precision": precision}
        if precision in QUANTIZERS:
            experiment["quantizer"] = QUANTIZERS[precision]
        self._similarity = meta.similarity_fn_name or store.model.similarity_fn_name
        full = dimension == store.width and precision == "float32"
        self.mteb_model_meta = meta if full else meta.model_copy(update={"experiment_kwargs": experiment})

    def prompt(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """What is put before a text: the instruction for the task or its type, or else the model's prompt."""
        used = self.prompts
        if used.template is not None and (not used.own or self._instructs(task_metadata, prompt_type)):
            if prompt_type == PromptType.document and not used.on_documents:
                return ""
            return self.get_task_instruction(task_metadata, prompt_type)
        own = get_prompt(used.own, task_metadata, prompt_type)
        return used.default if own is None else own

    def _instructs(self, task_metadata: Any, prompt_type: PromptType | None) -> bool:
        """Whether there is an instruction for one of mteb's own tasks; local ones are what the model was made for."""
        found = get_prompt_name(self.prompts.by_task, task_metadata, prompt_type)
        return found is not None and is_of_mteb(task_metadata.name)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> NDArray[np.float32]:
        """``(n, dimension)`` embeddings of mteb's batches of texts."""
        texts = [text for batch in inputs for text in batch["text"]]
        return self.embed(texts, task_metadata, prompt_type)

    def embed(self, texts: Sequence[str], task_metadata: Any, prompt_type: PromptType | None) -> NDArray[np.float32]:
        """``(n, dimension)`` embeddings of texts of a task."""
        found = self._leading(texts, task_metadata, prompt_type)
        if self.precision == "float32" or (self.precision == "int8" and prompt_type == PromptType.query):
            return found
        return quantized(found, self.precision, self._ranges_of(task_metadata, lambda: found))

    def _leading(self, texts: Sequence[str], task_metadata: Any, prompt_type: PromptType | None) -> NDArray[np.float32]:
        prompt = self.prompt(task_metadata, prompt_type)
        found = self.store.encode(texts, prompt, prompt_type and prompt_type.value)[:, : self.dimension]
        return unit_length(found) if self.precision == "int8" and self._similarity == "cosine" else found

    def _ranges_of(self, task_metadata: Any, calibration: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """The int8 ranges of a task, from the embeddings that are given when it is first asked for."""
        if task_metadata.name not in self._ranges:
            self._ranges[task_metadata.name] = calibrate(calibration())
        return self._ranges[task_metadata.name]


@cache
def is_of_mteb(task: str) -> bool:
    """Whether mteb itself has a task of that name."""
    try:
        mteb.get_task(task)
    except KeyError:
        return False
    return True
