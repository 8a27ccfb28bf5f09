"""The table of a family: what it says of stages that fit, and what makes others fit."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest

from modeling_f2llm import F2LLMConfig
from tests.training.recipes import error_of, write_recipe
from training.planning.costs import estimate_memory, kept_bytes
from training.planning.devices import DEVICES, Fleet
from training.planning.table import Row, remedy
from training.run_stage import main

CONFIG = F2LLMConfig.from_family("f2llm-v2-4b")
KNOWN = {"config": CONFIG, "kept": kept_bytes(CONFIG, bf16=True), "parameters": 4_022_468_096}


def _row(checkpointing=True, sharded=True, processes=8, teacher=0, loss=2**30):
    estimate = partial(
        estimate_memory,
        **{**KNOWN, "chunk_tokens": 32768, "loss": loss, "bf16": True, "teacher": teacher},
        **{"gradient_checkpointing": checkpointing, "processes": processes, "sharded": sharded},
    )
    args = SimpleNamespace(activation_checkpointing=checkpointing, max_length=1024)
    return Row("stage", args, 10, estimate(), estimate, lambda fleet: 3600.0)


@pytest.mark.parametrize(
    ("row", "device", "count", "advice"),
    [
        ({"checkpointing": False}, "H100", 8, "give max_tokens_per_forward: 8192"),
        ({"sharded": False}, "H100", 8, "give fsdp: true"),
        ({"checkpointing": False, "sharded": False}, "A100", 8, "give fsdp: true and max_tokens_per_forward: 8192"),
        ({"teacher": 14 * 10**9, "loss": 2**34}, "H100", 8, "give teacher_cache_dir: FOLDER"),
        (
            {"processes": 1},
            "RTX-4090",
            1,
            "take 8 devices (--devices 8) with fsdp: true and max_tokens_per_forward: 8192",
        ),
        ({"loss": 2**38}, "H200", 8, "give a smaller global_batch_size"),
    ],
)
def test_the_fewest_keys_are_named_that_make_a_stage_fit(row, device, count, advice):
    row, fleet = _row(**row), Fleet(DEVICES[device], count)
    assert not fleet.holds(row.memory.total) and remedy(row, fleet) == advice


def test_a_dry_run_predicts_every_stage_on_devices(tmp_path, capsys):
    recipe = str(write_recipe(tmp_path))
    assert main([recipe, "--dry-run", "--devices", "8", "--fsdp"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(
        number for number, line in enumerate(lines) if line.startswith("predicted for 8 x H200 of 141 GiB and 989.5 ")
    )
    head, *stages, total, others = lines[start + 1 :]
    assert head.split()[:5] == ["stage", "steps", "s/step", "hours", "GPU-hours"]
    assert [line.split()[0] for line in stages] == ["stage1", "stage2"] and total.startswith("all stages")
    hours, of_all = [float(line.split()[3]) for line in stages], [float(line.split()[4]) for line in stages]
    assert of_all == pytest.approx([8 * each for each in hours], rel=0.02)
    assert float(total.split()[-1]) == pytest.approx(sum(of_all), rel=0.02)
    assert others.startswith("on other devices, 8 of each: H100 ") and "RTX-4090" in others
    assert any("gathered" in line for line in lines[:start] if line.startswith("  memory "))
    error = error_of([recipe, "--devices", "8"], capsys)
    assert error.endswith("--devices, --device and --fraction belong to --dry-run without --measure")
