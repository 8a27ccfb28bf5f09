"""A stage that prunes a model instead of training one: calibrate, plan, slice, trim the vocabulary, save."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml
from torch import Tensor
from xxhash import xxh3_128

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.modeling_f2llm import F2LLMModel
from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.common.keyed import keyed_bits, text_key
from training.common.outputs import new_folder, write_whole
from training.common.run_folder import DATA, FINAL_MODEL, IMPORTANCE_FILE, RECIPE
from training.config.arguments import StageArguments
from training.config.recipe import Stage
from training.data.prepared import PreparedSource
from training.models.encoding import packed_texts
from training.models.saved_prompts import kept_prompts
from training.pruning.importance import Importance, calibrate
from training.pruning.plan import make_plan
from training.pruning.pruning import apply_plan
from training.pruning.shape import pruned_config
from training.pruning.vocabulary import trim_vocabulary
from training.stages.setup import make_model, make_tokenizer, prepare_sources, read_sources
from training.trainer.resumption import writing

logger = logging.getLogger(__name__)

_PLAN, _VOCABULARY = "pruning.yaml", "vocabulary.json"
PRUNING_FILES = (IMPORTANCE_FILE, _PLAN, _VOCABULARY)
_CALIBRATION = 41
_TOKENS_AT_ONCE = 8192


def prune_stage(stage: Stage) -> None:
    """Prune the stage's model and write the result to the stage's folder.

    Beside the model lie its recipe, ``importance.safetensors`` (the measurement, for other cuts of the same model),
    ``pruning.yaml`` (what of the model stayed) and, if the vocabulary was trimmed, ``vocabulary.json`` (what it saved).
    """
    args = stage.arguments
    needs_data = args.trim_vocabulary or (args.prune_to is not None and args.importance is None)
    all_sources, selected = read_sources(args) if needs_data else ([], [])
    tokenizer = make_tokenizer(args, all_sources)
    model = make_model(args, tokenizer).eval()
    # Fails on a shape that does not fit before the data is prepared.
    target = None if args.prune_to is None else pruned_config(model.config, args.mapping("prune_to"), "key 'prune_to'")
    sources = prepare_sources(stage, selected, tokenizer) if needs_data else []
    output_dir, before = Path(args.output_dir), model.num_parameters()
    write_whole(output_dir / RECIPE, yaml.safe_dump(stage.keys, sort_keys=False))
    data = {source.name: source.description["fingerprint"] for source in sources}
    write_whole(output_dir / DATA, json.dumps(data, indent=2))
    if target is not None:
        model = _cut(model, target, sources, args)
    if args.trim_vocabulary:
        used = np.zeros(model.config.vocab_size, dtype=bool)
        for tokens in (block for source in sources for block in source.token_blocks()):
            used[tokens] = True
        model, tokenizer, report = trim_vocabulary(model, tokenizer, np.flatnonzero(used).tolist())
        write_whole(output_dir / _VOCABULARY, json.dumps(asdict(report), indent=2) + "\n")
        logger.info("vocabulary: %s", report)
    prompts = kept_prompts(args)
    with writing(f"{output_dir}: the pruned model", output_dir), new_folder(output_dir / FINAL_MODEL) as partial:
        saved = build_sentence_transformer(model, tokenizer, prompts.prompts)
        saved.save_pretrained(str(partial), create_model_card=False)
    logger.info("%s", prompts.line())
    logger.info("%s: pruned from %s to %s parameters", args.model, f"{before:,}", f"{model.num_parameters():,}")


def _cut(model: F2LLMModel, target: F2LLMConfig, sources: Sequence[PreparedSource], args: StageArguments) -> F2LLMModel:
    output_dir = Path(args.output_dir)
    # Names the model by its weights, wherever they lie.
    digest = xxh3_128()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().numpy().data)
    if args.importance is None:
        batches = calibration_batches(sources, args.calibration_texts, args.seed, args.max_tokens_per_forward)
        importance = calibrate(model.to(args.device), batches, digest.hexdigest(), autocast=args.bf16)
        model.cpu()
        with writing(f"{output_dir}: the importance", output_dir):
            importance.save(output_dir / IMPORTANCE_FILE)
    else:
        importance = Importance.load(Path(args.importance), model.config, digest.hexdigest())
    plan = make_plan(model.config, target, importance, args.prune_hidden, args.prune_layers)
    plan.save(output_dir / _PLAN)
    return apply_plan(model, target, plan)


def calibration_batches(
    sources: Sequence[PreparedSource], texts: int, seed: int, max_tokens: int | None = None
) -> Iterator[tuple[Tensor, list[int]]]:
    """Pack the same number of texts of every source, drawn by key, into batches of token ids and lengths.

    ``texts`` is their number over all sources, rounded up for each; a source that has fewer gives all of them.
    """
    each = -(-texts // len(sources))
    for source in sources:
        draws = keyed_bits(seed, _CALIBRATION, text_key(source.name), np.arange(source.description["texts"]))
        drawn = np.sort(np.argsort(draws, kind="stable")[:each])
        for batch in packed_texts(source, drawn, max_tokens or _TOKENS_AT_ONCE):
            yield batch.input_ids, batch.lengths
