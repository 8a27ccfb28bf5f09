"""What a stage starts from, as far as it can be known before anything is trained or fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig, PreTrainedTokenizerBase

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.errors import UserError, in_one_line
from training.config.arguments import StageArguments
from training.config.inputs import Input
from training.data.manifest import Source
from training.models.adapter_folder import base_of
from training.stages.setup import check_max_length, make_config, make_tokenizer


class Origin(NamedTuple):
    """What a stage's model will be like: all that a plan needs of it.

    Attributes:
        config: Its shape.
        tokenizer: Its tokenizer; None if it is not at hand.
    """

    config: F2LLMConfig
    tokenizer: PreTrainedTokenizerBase | None


def origin_of(args: StageArguments, earlier: Mapping[str, Origin], sources: Sequence[Source] | None) -> Origin:
    """What a stage starts from.

    Args:
        args: The stage.
        earlier: What earlier stages would make, by folder.
        sources: All sources of the manifest, to train a tokenizer on; None if the data is not at hand, and then no
            tokenizer is of use and none is loaded.

    Raises:
        UserError: If the shape is not known, or not that of ``model_family``.
    """
    tokenizer = _tokenizer(args, earlier, sources)
    made = earlier.get(str(args.model))
    if made is None:
        return Origin(_config(args, tokenizer), tokenizer)
    args.check_family(made.config)
    check_max_length(args, made.config, tokenizer)
    return Origin(made.config, tokenizer)


def _tokenizer(
    args: StageArguments, earlier: Mapping[str, Origin], sources: Sequence[Source] | None
) -> PreTrainedTokenizerBase | None:
    made = earlier.get(str(args.tokenizer or args.model))
    if made is not None:
        return made.tokenizer
    if sources is None:
        return None
    try:
        return make_tokenizer(args, list(sources))
    except UserError:
        # Of a model that is not at hand, as its shape is not.
        if args.model_family is None or args.tokenizer is not None or Path(args.model).exists():
            raise
        return None


def _config(args: StageArguments, tokenizer: PreTrainedTokenizerBase | None) -> F2LLMConfig:
    """The shape of a model that no earlier stage makes; the published one where the model is not on this machine."""
    if args.model is None or args.model_family is None or Path(args.model).exists():
        return make_config(args, tokenizer)
    try:
        cached = F2LLMConfig.from_pretrained(args.model, local_files_only=True)
    # Neither a folder nor in the Hub's cache; a damaged one comes out of the library as anything.
    except Exception:
        return F2LLMConfig.from_family(args.model_family)
    args.check_family(cached)
    return cached


def teacher_config(
    args: StageArguments, earlier: Mapping[str, Origin], inputs: Sequence[Input] = ()
) -> F2LLMConfig | None:
    """The shape of a stage's teacher; None if there is none, or it is no Qwen3 and counted as nothing.

    Args:
        args: The stage.
        earlier: What earlier stages would make, by folder.
        inputs: What the stage reads: a teacher that another recipe makes has the shape that this one names.

    Raises:
        UserError: If the teacher is not known.
    """
    if args.teacher is None:
        return None
    if str(args.teacher) in earlier:
        return earlier[str(args.teacher)].config
    maker = next((each.maker for each in inputs if each.key == "teacher"), None)
    try:
        if maker is not None and maker.keys.get("model_family") is not None:
            return F2LLMConfig.from_family(maker.keys["model_family"])
        teacher = base_of(args.teacher)
        if AutoConfig.from_pretrained(teacher, trust_remote_code=False).model_type != "qwen3":
            return None
        return F2LLMConfig.from_pretrained(teacher)
    # Damaged folders come out of the library as anything.
    except Exception as error:
        raise UserError(f"key 'teacher': {args.teacher!r} cannot be used: {in_one_line(error)}") from None
