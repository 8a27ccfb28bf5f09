"""Loading a model that embeds texts: any SentenceTransformer, checked, pooled as it was trained, its code asked for."""

from __future__ import annotations

import logging
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling

from modeling_f2llm.prompts import DEFAULT_PROMPTS
from modeling_f2llm.tokenizer import append_eos
from training.common.errors import UserError, in_one_line
from training.models.checks import check_finite, check_tokenizer
from training.models.missing_weights import missing_weight
from training.models.reference import ModelRef
from training.models.remote_code import has_code, runs_own_code
from training.models.settings import described_by, is_plain

logger = logging.getLogger("training")

# What the user of a command that has this option can do to have other code run.
TRUST_OPTION = "add --trust-remote-code if you trust it"


def load_encoder(
    model: ModelRef, key: str, *, trust_remote_code: bool = False, trust: str | None = None, **options: Any
) -> SentenceTransformer:
    """Loads a model and checks that it is whole.

    A plain Qwen3 model, which has no ``modules.json``, is read as this repository trains one: at the last token, with
    its EOS appended where its tokenizer appends nothing, normalised, and with the published prompts.

    Args:
        model: What to load.
        key: What the user gave it as, such as ``--model`` or ``key 'teacher'``.
        trust_remote_code: Run code that comes with the model. This package's own is run in any case.
        trust: What the user can do to have other code run; None if the command runs none.
        **options: Those of ``SentenceTransformer``.

    Raises:
        UserError: If it cannot be loaded, its tokenizer has no words, a weight that matters is missing, or one is not
            finite.
    """
    try:
        return _load(model, trust_remote_code, trust, options)
    # Damaged folders come out of the libraries as anything.
    except Exception as error:
        reason = in_one_line(error)
        if not isinstance(error, UserError) and "trust_remote_code" in str(error):
            reason = (
                f"it needs code that comes with it, which is not run unasked; {trust or 'use a model that needs none'}"
            )
        raise UserError(f"{key}: {model.name!r} cannot be used: {reason}") from None


def _load(model: ModelRef, trust_remote_code: bool, trust: str | None, options: dict[str, Any]) -> SentenceTransformer:
    local = model.revision is None
    own = local and not trust_remote_code and runs_own_code(model.place)
    if local and not own and not trust_remote_code and has_code(model.place):
        said = f"{model.name}: the code that comes with it is not this package's and is not run"
        logger.info("; ".join(filter(None, [said, trust])))
    place, revision = described_by(model.place, model.revision)
    loaded = SentenceTransformer(place, revision=revision, trust_remote_code=own or trust_remote_code, **options)
    if place != model.place:
        # An adapter without modules is read as its base is.
        loaded.load_adapter(model.place, adapter_kwargs={"revision": model.revision})
    if is_plain(model.place, model.revision):
        loaded = _with_pooling(loaded, model.name)
    check_tokenizer(loaded.tokenizer)
    check_finite(loaded)
    random = missing_weight(loaded, model.place, model.revision)
    if random is not None:
        raise ValueError(f"its weights lack {random}; fetch or save the model again")
    return loaded


def _with_pooling(model: SentenceTransformer, name: str) -> SentenceTransformer:
    """A plain model as it is meant to be read, where that is known; as sentence-transformers reads it otherwise."""
    config = getattr(model[0], "config", None)
    if getattr(config, "model_type", None) != "qwen3":
        logger.info("%s: has no modules.json; sentence-transformers pools it by %s", name, pooling_of(model))
        return model
    append_eos(model.tokenizer)
    read = SentenceTransformer(
        modules=[model[0], Pooling(model[0].get_embedding_dimension(), pooling_mode="lasttoken"), Normalize()],
        prompts=dict(DEFAULT_PROMPTS),
        similarity_fn_name="cosine",
        truncate_dim=model.truncate_dim,
        device=str(model.device),
    )
    logger.info("%s: has no modules.json; read as F2LLM is, at the last token, with its prompts", name)
    return read


def pooling_of(model: SentenceTransformer) -> str:
    """How a model makes one embedding of many, in words."""
    modes = [module.pooling_mode for module in model if isinstance(module, Pooling)]
    flat = [each for mode in modes for each in ([mode] if isinstance(mode, str) else mode)]
    return " and ".join(flat) or type(model[-1]).__name__
