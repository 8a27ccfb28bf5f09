"""Run the stages of a recipe: what may be written where, training or pruning, saving, and evaluating."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from xxhash import xxh3_128

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.modeling_f2llm import F2LLMModel
from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.common import run_folder
from training.common.errors import InterruptedTrainingError, OutputError, StoppedError, UserError, in_one_line
from training.common.outputs import check_output, locked, new_folder, write_whole
from training.common.run_folder import DATA, FINAL_MODEL, IMPORTANCE_FILE, RECIPE, holds_model, last_checkpoint
from training.common.yaml_file import load_yaml
from training.config.arguments import StageArguments
from training.config.checks import unread_keys
from training.config.recipe import Recipe, Stage, made_by, require_inputs
from training.data.prepared import PreparedSource
from training.evaluation.report import check_report_folder, evaluate_and_report
from training.models.model_ref import base_of
from training.models.saved_prompts import given_prompt, kept_prompts, set_query_prompt
from training.pruning.importance import Importance, calibrate, calibration_batches
from training.pruning.plan import PruningPlan, default_hidden, make_plan, pruned_config
from training.pruning.pruning import apply_plan
from training.pruning.search import Budget, possible_shapes, search_shape
from training.pruning.vocabulary import rank_tokens, trim_vocabulary
from training.stages.continuation import Changes, check_data, check_keys, note_changes
from training.stages.mining import MINED
from training.stages.own_data import OWN_NAMES, answer, compares, score_start
from training.stages.setup import find_models, make_model, make_tokenizer, prepare_sources, read_sources, set_up
from training.trainer.saving import GO_ON, checkpoint_to_resume, writing
from training.trainer.stopping import Interruption
from training.trainer.trainer import F2LLMTrainer

logger = logging.getLogger("training")

_VOCABULARY = "vocabulary.json"
# What a run makes before it starts to train: made again, or checked by fingerprint, when it is started again.
_PREPARATIONS = {"prepared", "tokenizer", ".tokenizer.partial", ".tokenizer.lock", f".{RECIPE}.partial"}
_PREPARATIONS |= {f".{FINAL_MODEL}.lock", MINED, f".{MINED}.lock"}
_PREPARATIONS |= {IMPORTANCE_FILE, run_folder.PRUNING_PLAN, run_folder.PRUNING_SEARCH, _VOCABULARY}


class Uploads(NamedTuple):
    """How checkpoints are uploaded. The command passes it in, so that training does not import publishing."""

    start: Callable[[Interruption], Any]  # makes a callback; its `end(hurry)` waits for the uploads, or some seconds
    push_pending: Callable[[], None]  # uploads the checkpoints that an earlier training left in the queue


def run_recipe(
    recipe: Recipe,
    chosen: Sequence[Stage],
    resume: bool,
    accept_changes: bool,
    uploads_of: Callable[[Stage], Uploads | None],
) -> None:
    """Run stages of a recipe in order, each as in :func:`run_stage`, and evaluate those with ``evaluation_pairs``."""
    require_inputs(recipe, chosen, finished=[stage.name for stage in chosen if holds_model(Path(made_by(stage)))])
    evaluations = _evaluation_files(recipe)
    for stage in chosen:
        logger.info("stage %s", stage.name)
        model = run_stage(stage, resume, accept_changes, more=stage is not chosen[-1], uploads=uploads_of(stage))
        if stage.name in evaluations and stage.arguments.process_index == 0:
            evaluate_and_report(model, stage.arguments, evaluations[stage.name])
        if compares(stage.arguments) and stage.arguments.process_index == 0:
            answer(stage.arguments)


def _evaluation_files(recipe: Recipe) -> dict[str, Path]:
    """Return the file of each stage's evaluation: ``evaluation.json`` for the last one; refuse to overwrite others."""
    evaluated, files = [stage for stage in recipe.stages if stage.arguments.evaluation_pairs], {}
    if evaluated:
        check_report_folder(recipe.output_dir / "report", option="output_dir")
    for stage in evaluated:
        path = recipe.output_dir / ("evaluation.json" if stage is evaluated[-1] else f"evaluation-{stage.name}.json")
        if path.exists() and load_yaml(path).get("model") != made_by(stage):
            raise UserError(f"{path}: holds the evaluation of another model; move it or give another output_dir")
        files[stage.name] = path
    return files


def run_stage(
    stage: Stage, resume: bool = False, accept_changes: bool = False, more: bool = False, uploads: Uploads | None = None
) -> Path:
    """Run a stage, of training or of pruning, to its end and return the folder of the finished model.

    Every process calls this. ``resume`` goes on from the last checkpoint, or returns at once if the stage is finished;
    with ``accept_changes`` although recipe or data changed since. If ``more`` stages follow, a signal that comes too
    late to stop this one stops before them. ``uploads`` uploads the checkpoints of a stage with ``push_checkpoints``.
    """
    args, final = stage.arguments, Path(made_by(stage))
    if args.n_gpu > 1:
        what = f"stage {stage.name!r}: one process drives one device, of which there are {args.n_gpu}"
        raise UserError(f"{what}; start with 'accelerate launch', or set CUDA_VISIBLE_DEVICES to one")
    _check_paths(args)
    output_dir, uploads = final.parent, None if args.prunes else uploads
    with _alone(args, final):
        output_dir.mkdir(parents=True, exist_ok=True)
        # The first process makes what the others then find.
        with args.main_process_first(local=args.save_on_each_node):
            if args.prunes and not args.should_save:
                return final
            changed = _check_run(output_dir, stage, resume, accept_changes)
            if _is_finished(stage, final):
                if uploads is not None:
                    uploads.push_pending()
                return final
            for line in unread_keys(args, stage.keys) if args.process_index == 0 else ():
                logger.warning("stage %r: %s", stage.name, line)
            if args.prunes:
                prune_stage(stage)
                return final
            checkpoint = checkpoint_to_resume(output_dir) if resume else None
            trainer = set_up(stage)
            if compares(args) and args.should_save:
                score_start(args)
            changed |= _record(stage, trainer, checkpoint, accept_changes)
            if args.should_save:
                note_changes(output_dir, changed, checkpoint)
        with ExitStack() as stack:
            if uploads is not None:
                upload = uploads.start(trainer.interruption)
                trainer.add_callback(upload)
                stack.push(lambda error, *_: upload.end(hurry=True) if error else upload.end())
            with _stopped_by(trainer):
                trainer.fill_teacher_cache()
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            number, state = trainer.interruption.signal, trainer.state
            if number and state.global_step < state.max_steps:
                saved = last_checkpoint(output_dir)
                raise _interrupted(number, f"at step {state.global_step} of {state.max_steps}; saved {saved}")
            _save(trainer, final)
        number = trainer.interruption.received()
        if number and more:
            raise _interrupted(number, f"after the last step; saved {final}")
        return final


def _check_paths(args: StageArguments) -> None:
    """Refuse to write where the stage reads: into a model's folder, or into that of the data."""
    models = [Path(name) for name in (args.model, args.teacher, args.miner, args.reranker) if name is not None]
    outputs = {"output_dir": args.output_dir, "prepared_dir": args.prepared_folder}
    if args.teacher_cache_dir:
        outputs["teacher_cache_dir"] = args.teacher_cache_dir
    for key, folder in outputs.items():
        check_output(Path(folder), models, option=key)
        if args.manifest is not None and Path(folder).resolve() == Path(args.manifest).resolve().parent:
            raise UserError(f"{folder}: is the folder of {args.manifest}, which is read; give another {key}")


@contextmanager
def _alone(args: StageArguments, final: Path) -> Iterator[None]:
    """Lock the model's folder for this command; if another holds it, all processes raise a UserError."""
    refused: list[str | None] = [None]
    busy = "another process trains there; wait for it to end, or give another output_dir"
    with ExitStack() as stack:
        try:
            if args.process_index == 0:
                stack.enter_context(locked(final, busy))
        except UserError as error:
            refused = [str(error)]
        if args.world_size > 1:
            torch.distributed.broadcast_object_list(refused)
        if refused[0] is not None:
            raise UserError(refused[0])
        yield


def _check_run(output_dir: Path, stage: Stage, resume: bool, accept_changes: bool) -> Changes:
    """Refuse an output folder with something that this run would overwrite; return the accepted changes of keys."""
    args = stage.arguments
    # Written below the output folder before the training.
    folders = [args.prepared_folder, args.teacher_cache_dir, args.builder and Path(args.manifest or "").parent]
    names = [name for folder in folders if folder for name in Path(os.path.relpath(folder, output_dir)).parts[:1]]
    names += OWN_NAMES if args.data else ()
    ours = {form for name in names for form in (name, f".{name}.partial", f".{name}.lock")}
    held = {path.name for path in output_dir.iterdir()} - _PREPARATIONS - ours
    if held and RECIPE not in held:
        raise OutputError(f"{output_dir}: the folder holds something else", "give another output_dir")
    numbered = run_folder.numbered_checkpoints(output_dir)
    # A run that ended before its first checkpoint has nothing to lose: its recipe may be corrected.
    if FINAL_MODEL not in held and not numbered:
        return {}
    if FINAL_MODEL not in held and last_checkpoint(output_dir) is None:
        newest = numbered[-1]
        what = f"none of the checkpoints can be resumed from, {newest.name} lacks {run_folder.missing_part(newest)}"
        raise OutputError(f"{output_dir}: {what}", f"start again from 'model: {newest}' with another output_dir")
    if not resume:
        remedy = "add --resume to go on, or give another output_dir"
        raise OutputError(f"{output_dir}: the folder holds another run", remedy)
    return check_keys(output_dir, stage, accept_changes)


def _is_finished(stage: Stage, final: Path) -> bool:
    """Return whether a stage has made its model, which then gets the query prompt that the stage has now."""
    if not holds_model(final):
        return False
    logger.info("stage %s is finished: %s", stage.name, final)
    prompt = given_prompt(stage.arguments) if stage.arguments.should_save else None
    if prompt is not None and set_query_prompt(final, prompt):
        now = {"query_instruction": stage.arguments.query_instruction}
        recipe, arguments = final.parent / RECIPE, final / "training_arguments.json"
        write_whole(recipe, yaml.safe_dump({**load_yaml(recipe), **now}, sort_keys=False))
        # A stage that prunes a model has none.
        if arguments.exists():
            write_whole(arguments, json.dumps({**json.loads(arguments.read_text()), **now}, indent=2))
        logger.info("%s: its query prompt is now %r", final, prompt)
    return True


def _record(stage: Stage, trainer: F2LLMTrainer, checkpoint: Path | None, accept_changes: bool) -> Changes:
    """Record keys and data of the run; of a resumed run, return the accepted changes of its data."""
    output_dir, changed = Path(stage.arguments.output_dir), {}
    data = {source.name: source.description["fingerprint"] for source in trainer.sources}
    weights = {source.name: source.weight for source in trainer.sources if source.weight != 1}
    if weights:
        data[run_folder.WEIGHTS_DATA] = json.dumps(weights)
    if trainer.distillation is not None:
        data[run_folder.TEACHER_DATA] = trainer.distillation.identity
    if trainer.base_revision is not None:
        # Checkpoints hold only the adapter.
        data[run_folder.BASE_DATA] = trainer.base_revision
    if checkpoint is not None:
        sharded = any(checkpoint.glob("pytorch_model_fsdp*"))
        if sharded != trainer.is_fsdp_enabled:
            then, now = ("with", "without") if sharded else ("without", "with")
            raise UserError(f"{checkpoint}: was written {then} FSDP and cannot be resumed {now} it; launch as before")
        changed = check_data(output_dir / DATA, data, accept_changes)
    if stage.arguments.should_save:
        # The recipe first: it marks the folder as that of a run.
        write_whole(output_dir / RECIPE, yaml.safe_dump(stage.keys, sort_keys=False))
        write_whole(output_dir / DATA, json.dumps(data, indent=2))
    return changed


@contextmanager
def _stopped_by(trainer: F2LLMTrainer) -> Iterator[None]:
    """Turn a full disk, a lack of memory or a dead loader worker into a StoppedError that says how to go on."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        lacks_memory = isinstance(error, torch.OutOfMemoryError)
        expected = isinstance(error, OSError) or lacks_memory or "DataLoader worker" in str(error)
        if isinstance(error, StoppedError) or not expected:
            raise
        limit = trainer.args.max_tokens_per_forward or "without limit"
        mend = f"Lower 'max_tokens_per_forward', now {limit}," if lacks_memory else "Mend that"
        saved = last_checkpoint(Path(trainer.args.output_dir)) or "none yet"
        raise StoppedError(f"{in_one_line(error)}; last good checkpoint: {saved}", f"{mend} and {GO_ON}") from error


def _interrupted(number: int, where: str) -> InterruptedTrainingError:
    return InterruptedTrainingError(f"{signal.Signals(number).name} {where}", f"To go on, {GO_ON}", number)


def _save(trainer: F2LLMTrainer, final: Path) -> None:
    # All processes gather the weights; some write them.
    target = new_folder(final) if trainer.args.should_save else nullcontext(final)
    with writing(f"{final}: the finished model", final.parent), target as partial:
        trainer.save_model(str(partial))
        if trainer.args.should_save and trainer.projection is not None:
            trainer.projection.export(final.parent)
    trainer.accelerator.wait_for_everyone()


def prune_stage(stage: Stage) -> None:
    """Prune the stage's model: calibrate, plan, slice, trim the vocabulary, save.

    Beside the model lie its recipe, ``importance.safetensors`` (the measurement, for other cuts of the same model),
    ``pruning.yaml`` (what of the model stayed), with a budget ``pruning_search.yaml`` (the shapes that were tried) and,
    if the vocabulary was trimmed, ``vocabulary.json`` (what it saved).
    """
    args = stage.arguments
    find_models(args)
    given = args.mapping("prune_to")
    budget = Budget.read(given, "key 'prune_to'")
    needs_data = args.trim_vocabulary or (args.prune_to is not None and (args.importance is None or budget is not None))
    all_sources, selected = read_sources(args) if needs_data else ([], [])
    tokenizer = make_tokenizer(args, all_sources)
    model = make_model(args, tokenizer).eval()
    # Fails on a shape that does not fit, or a budget that none fits, before the data is prepared.
    target = None
    if budget is not None:
        fewest = rank_tokens(tokenizer, np.zeros(1))[1] if args.trim_vocabulary else model.config.vocab_size
        possible_shapes(model.config, budget, [fewest])
    elif args.prune_to is not None:
        target = pruned_config(model.config, given, "key 'prune_to'")
    sources = prepare_sources(stage, selected, tokenizer) if needs_data else []
    output_dir, before = Path(args.output_dir), model.num_parameters()
    write_whole(output_dir / RECIPE, yaml.safe_dump(stage.keys, sort_keys=False))
    data = {source.name: source.description["fingerprint"] for source in sources}
    write_whole(output_dir / DATA, json.dumps(data, indent=2))
    counts = np.zeros(model.config.vocab_size, dtype=np.int64)
    for tokens in (block for source in sources for block in source.token_blocks()) if args.trim_vocabulary else ():
        counts += np.bincount(tokens, minlength=len(counts))
    used = np.flatnonzero(counts).tolist()
    if args.prune_to is not None:
        plan_of = _planner(model, sources, args)
        if budget is not None:
            shape, used = search_shape(model, tokenizer, budget, plan_of, sources, counts, args)
            target = shape.cut(model.config)
        plan = plan_of(target)
        plan.save(output_dir / run_folder.PRUNING_PLAN)
        model = apply_plan(model, target, plan)
        logger.info("cut %s parameters to %s", f"{before:,}", f"{model.num_parameters():,}")
    if args.trim_vocabulary:
        model, tokenizer, report = trim_vocabulary(model, tokenizer, used)
        write_whole(output_dir / _VOCABULARY, json.dumps(asdict(report), indent=2) + "\n")
        logger.info("vocabulary: %s", report)
    prompts = kept_prompts(args)
    with writing(f"{output_dir}: the pruned model", output_dir), new_folder(output_dir / FINAL_MODEL) as partial_folder:
        saved = build_sentence_transformer(model, tokenizer, prompts.prompts)
        saved.save_pretrained(str(partial_folder), create_model_card=False)
    logger.info("%s", prompts.line())
    logger.info("%s: pruned from %s to %s parameters", args.model, f"{before:,}", f"{model.num_parameters():,}")


def _planner(
    model: F2LLMModel, sources: Sequence[PreparedSource], args: StageArguments
) -> Callable[[F2LLMConfig], PruningPlan]:
    """Measure the importance, or load it; return what chooses what stays of the model in a shape."""
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
        importance = Importance.load(Path(args.importance), digest.hexdigest())
    written = {} if args.model is None else F2LLMConfig.get_config_dict(base_of(args.model))[0]
    hidden, why = (args.prune_hidden, "as its key says") if args.prune_hidden else default_hidden(model.config, written)
    logger.info("prune_hidden: %s, %s", hidden, why)
    return partial(make_plan, model.config, importance=importance, hidden=hidden, layers=args.prune_layers)
