"""Choose the prompts that a model is saved with: for queries the one that its sources were trained with, if shared."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from modeling_f2llm.prompts import DEFAULT_PROMPTS, instruct
from training.common.outputs import write_whole
from training.config.arguments import StageArguments
from training.data.instructions import split_instruction
from training.data.prepared import PreparedSource
from training.models.model_folder import read_json
from training.models.model_ref import default_prompt_name, prompts_of

logger = logging.getLogger("training")

SETTINGS = "config_sentence_transformers.json"
# Queries of a source that are looked at: files may bring other instructions than the manifest's.
_SAMPLE = 32


@dataclass(frozen=True)
class SavedPrompts:
    """The prompts of a model that a stage makes, by name (``query``, ``document``), and why the query has this one."""

    prompts: dict[str, str]
    reason: str
    trained: tuple[str, ...] = ()  # the query prompts that a sample of the stage's sources was trained with

    @property
    def is_trained(self) -> bool:
        """Whether a source was trained with the query prompt."""
        return self.prompts["query"] in self.trained

    def line(self) -> str:
        """Return the choice in one line."""
        return f"query prompt of the saved model: {self.prompts['query']!r} ({self.reason})"

    def warning(self) -> str:
        """Return the warning for a query prompt that no source was trained with, in one line."""
        trained = ", ".join(map(repr, self.trained[:3]))
        return f"{self.line()}, but no source is trained with it (they have {trained}); set 'query_instruction: …'"


def given_prompt(args: StageArguments) -> str | None:
    """Return the query prompt that ``query_instruction`` asks for (empty: no prompt); None if it is not set."""
    return args.query_instruction and instruct(args.query_instruction)


def default_prompts(args: StageArguments) -> dict[str, str]:
    """Return what goes before queries and documents of sources without an instruction, exactly, by option.

    Before queries it is that of ``query_instruction``, the start model's own (which may be empty), or, if that has
    none, the published one; before documents it is the start model's own, or nothing.
    """
    given, start = given_prompt(args), {} if args.model is None else prompts_of(args.model) or {}
    query = start.get("query", DEFAULT_PROMPTS["query"]) if given is None else given
    return {"query_prompt": query, "document_prompt": start.get("document", "")}


def choose_prompts(
    args: StageArguments, sources: Sequence[PreparedSource], tokenizer: PreTrainedTokenizerBase
) -> SavedPrompts:
    """Return the prompts of a model that is trained.

    Queries get ``query_instruction``, or the prompt that all sources are trained with, that of the start model or the
    published one. Documents get the start model's if a source was trained with it, else none. Others are those of the
    start model.
    """
    start = {} if args.model is None else prompts_of(args.model) or {}
    trained = tuple(sorted({prompt for source in sources for prompt in _trained_prompts(source, tokenizer)}))
    given = given_prompt(args)
    if given is not None:
        query, reason = given, "as 'query_instruction' says"
    elif len(trained) == 1:
        reason = "as all sources are trained with" if args.instructions else "'instructions: false' trains on raw text"
        query = trained[0]
    elif start.get("query") or start.get("query") in trained:
        query, reason = start["query"], f"that of {args.model}, because the sources share none"
    else:
        query, reason = DEFAULT_PROMPTS["query"], "the published one, because the sources share none"
    document = start.get("document", "")
    if all(source.description.get("document_prompt", "") != document for source in sources):
        if args.process_index == 0:
            what = "%s puts %r before documents, with which no source is trained; the saved model does not"
            logger.warning(what, args.model, document)
        document = ""
    if args.model is not None and (name := default_prompt_name(args.model)) and args.process_index == 0:
        what = "%s puts its prompt %r before texts encoded without one; the saved model does not: name it"
        logger.warning(what, args.model, name)
    return SavedPrompts({**start, "query": query, "document": document}, reason, trained)


def kept_prompts(args: StageArguments) -> SavedPrompts:
    """Return the prompts of a model that is pruned: the start model's, unless ``query_instruction`` is given."""
    start = prompts_of(args.model)
    prompts, reason = {"query": "", **(start or {})}, f"that of {args.model}" if start else f"{args.model} has none"
    given = given_prompt(args)
    if given is not None:
        prompts["query"], reason = given, "as 'query_instruction' says"
    return SavedPrompts(prompts, reason)


def _trained_prompts(source: PreparedSource, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return what goes before a source's queries in a sample of what the model reads; the manifest's if it is cut."""
    instruction, prompt = source.description["instruction"], source.description.get("prompt", "")
    prompt, rows = prompt if instruction is None else instruct(instruction), source.rows["train"]
    if not len(rows):
        return set()
    if not prompt:
        return {""}
    prompts = set()
    for row in np.unique(np.linspace(0, len(rows) - 1, _SAMPLE).astype(int)):
        tokens = source.tokens(int(rows[row, 0]))
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found, query = split_instruction(text)
        prompts.add(prompt if found is None or text.startswith(prompt) else text.removesuffix(query))
    return prompts


def set_query_prompt(folder: Path, prompt: str) -> bool:
    """Give a finished model another query prompt; return whether its prompt changed."""
    settings = read_json(folder / SETTINGS)
    prompts = settings.get("prompts") or {}
    if prompts.get("query") == prompt:
        return False
    settings["prompts"] = {**prompts, "query": prompt}
    write_whole(folder / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False))
    return True
