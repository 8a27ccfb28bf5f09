from __future__ import annotations

import numpy as np
import pytest

from tests.training.foreign_teacher import save_foreign_teacher
from tests.training.recipes import error_of, state_of, write_recipe, write_single_stage
from tests.training.stages.test_prune_stage import write_pruning
from training.common.run_folder import RECIPE, numbered_checkpoints
from training.config.recipe import load_recipe, made_by
from training.planning.batches import count_batches
from training.planning.devices import DEVICES, Fleet
from training.planning.plan import make_plan
from training.run_stage import main
from training.stages.setup import make_tokenizer, prepare_sources, read_sources
from training.trainer.batches import GlobalBatchSampler, PackedCollator, PreparedRows


def _stage(folder, **keys):
    return load_recipe(write_single_stage(folder, **keys)).stages[0]


def test_steps_and_batches_are_those_of_the_training(tmp_path):
    stage = _stage(tmp_path, max_tokens_per_forward=150, eval_strategy="steps", eval_steps=4)
    plan, args = make_plan(stage, {}), stage.arguments
    assert main([str(tmp_path / "single.yaml")]) == 0
    state = state_of(tmp_path / "run")
    assert plan.steps == state["global_step"]
    assert plan.checkpoints == len(numbered_checkpoints(tmp_path / "run"))
    assert plan.evaluations == len([line for line in state["log_history"] if "eval_loss" in line])
    all_sources, sources = read_sources(args)
    prepared = prepare_sources(stage, sources, make_tokenizer(args, all_sources))
    collator = PackedCollator(prepared, args.num_hard_negatives, args.seed, max_tokens_per_forward=150)
    rows = PreparedRows(prepared)
    sampler = GlobalBatchSampler([len(rows)], args.global_batch_size, args.seed)
    batches = [collator([rows[key] for key in keys]) for keys in sampler]
    counted = count_batches(args, prepared, "train")
    assert counted == plan.training and counted.count == len(batches)
    assert counted.tokens == pytest.approx(np.mean([batch["input_ids"].numel() for batch in batches]))
    assert counted.chunks == pytest.approx(np.mean([len(batch["chunk_lengths"]) for batch in batches]))
    assert counted.most_texts == max(len(batch["slots"]) for batch in batches)
    assert counted.most_chunk_tokens == max(sum(chunk) for batch in batches for chunk in batch["chunk_lengths"]) <= 150
    # The same batches on two processes.
    shared, alone = make_plan(stage, {}, processes=2), plan
    assert shared.training.tokens == alone.training.tokens and shared.training.chunks < alone.training.chunks
    assert shared.memory.state > alone.memory.state and shared.memory.gathered == 0


def test_a_dry_run_shows_every_stage_and_trains_none(tmp_path, capsys):
    recipe = str(write_recipe(tmp_path))
    assert main([recipe, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("stage ")] == ["stage stage1", "stage stage2"]
    assert not any("measured" in line or line.startswith("  time") for line in lines)
    for stage in ("stage1", "stage2"):
        assert {path.name for path in (tmp_path / "run" / stage).iterdir()} <= {"prepared", "tokenizer"}
    # What was prepared is used by the run, which nothing stands in the way of.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("tokens.int32")}
    assert before and main([recipe]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (tmp_path / "run/stage1" / RECIPE).exists()
    assert "--measure belongs to --dry-run" in error_of([recipe, "--measure"], capsys)
    for key in ("--exit_layers", "--embedding_ranks"):
        assert f"key '{key[2:]}'" in error_of([recipe, "--dry-run", key, "64"], capsys)
    capsys.readouterr()
    assert main([recipe, "--dry-run", "--embedding_ranks", "4"]) == 0
    factored = {line.rpartition(", ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("stage ")}
    whole = {line.rpartition(", ")[2] for line in lines if line.startswith("stage ")}
    assert factored != whole


def test_a_plan_says_what_is_measured_and_that_the_stage_may_end_early(tmp_path):
    keys = {"evaluation_pairs": "pairs.parquet", "evaluation_sample": 2, "early_stopping_patience": 3}
    plan = make_plan(_stage(tmp_path, **keys, metric_for_best_model="pairs_accuracy"), {}, measure=True)
    text = "\n".join(plan.lines)
    assert "an epoch), fewer if it is stopped early\n" in text and "2 (up to 2 pairs in each" in text
    assert plan.seconds > 0 and "\n  time  " in text and "tokens a second" in text
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not list((tmp_path / "run").rglob(".measure*"))


def test_pairs_are_checked_before_anything_is_prepared_unless_a_builder_makes_them(tmp_path, capsys):
    recipe, pairs = write_recipe(tmp_path), tmp_path / "pairs.csv"
    pairs.write_text("query,answer\na,b\n")
    for dry in (["--dry-run"], []):
        # Those of the second stage.
        error = error_of([recipe, *dry, "--evaluation_pairs", pairs], capsys)
        assert "pairs.csv: column 'passage' is missing; it has query, answer" in error
        assert not (tmp_path / "run").exists()
    manifest, pairs = tmp_path / "built/manifest.yaml", tmp_path / "built/held_out.parquet"
    keys = {"builder": "cldr", "builder_options": {"languages": ["de", "fr"]}, "manifest": str(manifest)}
    recipe = write_single_stage(tmp_path, **keys, evaluation_pairs=str(pairs))
    assert main([str(recipe), "--dry-run"]) == 0
    error = error_of([recipe, "--dry-run", "--evaluation_candidates", "nothing.parquet"], capsys)
    assert "nothing.parquet: no such file" in error


def test_a_cache_costs_one_pass_of_the_teacher_and_no_steps(tmp_path):
    cached = {"teacher": "stage1", "teacher_cache_dir": str(tmp_path / "cache")}
    first, second = load_recipe(write_recipe(tmp_path, {"stage2": cached})).stages
    origins = {made_by(first): make_plan(first, {}).origin}
    cached = make_plan(second, origins)
    assert cached.memory.teacher == 0
    second.arguments.teacher_cache_dir = None
    online = make_plan(second, origins)
    # The teacher is as large as the student.
    assert online.memory.teacher > 0 and cached.flops < online.flops
    # Predicted hours have the pass.
    fleet = Fleet(DEVICES["H200"], 1, fraction=1.0)
    assert cached.flops < cached.seconds_on(fleet) * DEVICES["H200"].fp32 < online.flops
    (line,) = [line for line in cached.lines if line.startswith("  cache        the teacher embeds ")]
    assert line not in online.lines
    second.arguments.distillation_weight = 0.0
    assert make_plan(second, origins).flops == cached.flops


def test_a_stage_that_prunes_is_planned(tmp_path, capsys):
    assert main([str(write_pruning(tmp_path)), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = ("stage stage1: ", "stage pruned: cuts ", "stage student: ")
    before, cut, student = (next(line for line in lines if line.startswith(start)) for start in starts)
    parameters = [line.split()[-2] for line in (before, cut, student)]
    assert cut.split()[3] == parameters[0] != parameters[1] == parameters[2]
    assert any(line.startswith("all stages: about ") for line in lines)


def test_a_dry_run_prepares_texts_for_a_teacher_that_reads_them(tmp_path, capsys):
    teacher = save_foreign_teacher(tmp_path / "teacher", width=40)
    recipe = str(write_single_stage(tmp_path, teacher=str(teacher), max_steps=1))
    assert main([recipe, "--dry-run"]) == 0 and "\n  not counted  the teacher" in capsys.readouterr().out
    (made,) = (tmp_path / "run/prepared").glob("tiny_*")
    assert made.name.endswith("-texts")
    assert main([recipe]) == 0 and [*(tmp_path / "run/prepared").glob("tiny_*")] == [made]


def test_the_folder_of_a_run_is_its_model(tmp_path, capsys):
    assert main([str(write_single_stage(tmp_path / "first", max_steps=1))]) == 0
    run = tmp_path / "first/run"
    keys = {"model": str(run), "tokenizer": str(run), "teacher": str(run), "model_config": None}
    recipe = str(write_single_stage(tmp_path / "second", max_steps=1, **keys))
    assert main([recipe, "--dry-run"]) == 0 and main([recipe]) == 0
    # Without the teacher there is nothing that the stage would lack.
    assert main([recipe, "--dry-run", "--teacher", "no/folder/of/that/name", "--distillation_weight", "0"]) == 0
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in error_of([recipe, "--dry-run", "--model", str(tmp_path / "empty")], capsys)
