from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest
import torch

from tests.benchmarks import gpu, gpu_speed, prediction, run
from tests.benchmarks.common import describe_hardware
from tests.benchmarks.gpu_common import Bench, largest_that_fits
from tests.benchmarks.gpu_report import GOALS, failures, markdown
from tests.benchmarks.timing import Contestant, add_ratio, measure


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    status = run.main(["--quick", "--no-compile", "--repeats", "1", "--output", str(folder)])
    return status, folder


def test_a_quick_run_measures_every_suite(quick_run):
    status, folder = quick_run
    suites = json.loads((folder / "results.json").read_text())["suites"]
    assert status == 0, [suite["skipped"] for suite in suites.values()]
    assert list(suites) == list(run.SUITES)
    for name, suite in suites.items():
        assert suite["measurements"] or name in ("growth", "scale"), name
        for measurement in suite["measurements"]:
            assert measurement["contestants"] and measurement["ratios"], measurement["case"]
            assert all(len(contestant["samples"]) == 1 for contestant in measurement["contestants"].values())
    assert {point["axis"] for point in suites.pop("scale")["points"]} == {
        *(f"{kind}, sources: {sources}" for kind in ("epoch", "resumed epoch") for sources in (1, 157)),
        *("teacher cache, texts", "mining, texts"),
    }
    points = {name: {point["axis"] for point in suite["points"]} for name, suite in suites.items() if suite["points"]}
    assert points == {
        **{"growth": {"batch", "length"}, "preparation": {"corpus"}, "pruning": {"calibration", "cutting"}}
    }
    ratios = [ratio for measurement in suites["encode"]["measurements"] for ratio in measurement["ratios"]]
    assert {(ratio["contestant"], ratio["baseline"]) for ratio in ratios} == {
        *(("ours_fp32", "stock_fp32"), ("ours_bf16", "stock_bf16"), ("ours_bf16", "stock_fp32"))
    }


def test_the_table_names_the_hardware_and_what_was_left_out(quick_run):
    text = (quick_run[1] / "results.md").read_text()
    for part in (describe_hardware()["processor"], "torch", "Date:", "A quick run", "no --openvino-python was given"):
        assert part in text


def test_contestants_take_turns_and_ratios_are_taken_round_by_round():
    calls = []

    def contestant(name, seconds):
        seconds = iter(seconds)
        return Contestant(lambda: calls.append(name) or next(seconds), reports_seconds=True)

    measurement = measure(
        "case", {"stock": contestant("stock", [9.0, 2.0, 6.0]), "ours": contestant("ours", [9.0, 1.0, 2.0])}, 2
    )
    add_ratio(measurement, "stock", "ours")
    assert calls == ["stock", "ours", "stock", "ours", "ours", "stock"]
    ratio = measurement["ratios"][0]
    assert (ratio["min"], ratio["median"], ratio["max"]) == (2.0, 2.5, 3.0)


def test_disagreement_ends_the_measurement_before_anything_is_timed():
    def check(results):
        assert results["stock"] == results["ours"], "they differ"

    with pytest.raises(AssertionError, match="they differ"):
        measure("case", {"stock": Contestant(lambda: 1), "ours": Contestant(lambda: 2)}, 1, check=check)


def test_an_optional_contestant_that_fails_is_left_out_with_its_reason():
    def fail():
        raise RuntimeError("no compiler")

    measurement = measure("case", {"stock": Contestant(lambda: 1), "ours": Contestant(fail, optional=True)}, 1)
    assert list(measurement["contestants"]) == ["stock"]
    assert measurement["left_out"] == {"ours": "RuntimeError: no compiler"}
    with pytest.raises(RuntimeError, match="no compiler"):
        measure("case", {"stock": Contestant(fail)}, 1)


# -- the first minutes on a GPU ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    status = gpu.main(["--tiny", "--output", str(folder)])
    return status, json.loads((folder / "results.json").read_text()), folder


def test_a_tiny_run_takes_every_way_and_all_are_equal(tiny_run):
    status, results, _ = tiny_run
    assert status == 0, failures(results)
    records = {name: part["records"] for name, part in results["parts"].items()}
    left_out = [each for part in records.values() for each in part if "left_out" in each]
    if not torch.cuda.is_available():
        assert {each["way"] for each in left_out} == {"packed, torch_varlen"}
    assert sum(each.get("equal", False) for each in records["equality"]) == 18
    ways = {name: {each.get("way") for each in part} for name, part in records.items()}
    ours = {"ours", "ours, compiled"}
    assert ways["training f2llm-v2-80m"] >= {
        "sentence-transformers",
        "released method",
        "stock",
        "matrix products",
        *ours,
    }
    encoders = {"stock", "sentence-transformers unpadded", "ours", "ours compiled"}
    assert ways["encoding f2llm-v2-80m"] >= {f"{what}, {whose}" for what in ("forward", "encode") for whose in encoders}
    assert {"2 rows", "4 rows"} <= ways["growth"]
    assert {"LoRA", "LoRA, compiled"} <= ways["lora"]
    encoded = [each["lowest_cosine"] for each in records["encoding f2llm-v2-80m"] if "lowest_cosine" in each]
    assert len(encoded) == 12 and min(encoded) > 0.99
    trained = next(each for each in records["training f2llm-v2-80m"] if each["way"] == "ours")
    # All chunks but the last are encoded twice.
    assert trained["useful_fraction"] < trained["performed_fraction"] < trained["useful_fraction"] * 4 / 3


def test_a_run_on_a_gpu_is_reported_beside_its_goals(tiny_run):
    _, results, folder = tiny_run
    text = (folder / "results.md").read_text()
    for part in (results["parts"]["rate"]["records"][0]["versions"]["torch"], "needs CUDA", "A tiny run", "figure.png"):
        assert part in text
    assert "| training | f2llm-v2-80m |  | " in text and f" | {GOALS['training']} | " in text
    assert (folder / "figure.png").stat().st_size
    ended = {**results, "parts": {**results["parts"], "growth": {"seconds": 1, "ended": "stopped", "records": []}}}
    assert "**growth: stopped**" in markdown(ended)


def test_what_is_not_equal_or_not_compared_is_a_failure():
    def records(*found):
        return {"parts": {"equality": {"ended": None, "records": [{"way": "packed", **each} for each in found]}}}

    assert not failures(records({"equal": True}, {"left_out": "needs CUDA and half precision"}))
    found = failures(records({"equal": False}, {"precision": "bf16", "left_out": "RuntimeError: no kernel"}))
    assert found == ["equality: packed: not equal", "equality: packed: bf16: RuntimeError: no kernel"]


def test_a_gpu_without_the_packages_of_training_measures_too(tmp_path):
    """What the process lacks is what only preparing, mining and publishing need; it waits for what it is told."""
    hidden = (
        "datasets babel datatrove faiss langcodes loguru matplotlib mteb pandas pyarrow ray tensorboard xxhash".split()
    )
    arguments = ["--tiny", "--part", "training f2llm-v2-80m", "--output", str(tmp_path)]
    code = _WITHOUT.format(hidden=hidden, program=gpu.__file__, arguments=arguments)
    with (tmp_path / "log.txt").open("w") as log:
        process = gpu.start([sys.executable, "-c", code], log)
    assert gpu.finish(process, {"rate": 1e9, "limit": 60}, 120) is None, (tmp_path / "log.txt").read_text()
    records = [json.loads(line) for line in next(tmp_path.glob(".*.jsonl")).read_text().splitlines()]
    assert len(records) == 7 and not any("left_out" in each for each in records), records


# Hides packages, and that they are installed, from everything that is imported afterwards.
_WITHOUT = """
import runpy, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *where):
        return None if name.partition(".")[0] in {hidden} else self.finder.find_spec(name, *where)

    def find_distributions(self, *context):
        found = getattr(self.finder, "find_distributions", lambda *_: ())(*context)
        return (each for each in found if each.name not in {hidden})

sys.meta_path[:] = map(Without, sys.meta_path)
sys.argv[1:] = {arguments}
runpy.run_path({program!r}, run_name="__main__")
"""


def test_a_part_that_takes_too_long_leaves_its_records(tmp_path):
    code = "import time; print(input(), flush=True); time.sleep(60)"
    with (tmp_path / "log.txt").open("w") as log:
        slow, failing = (gpu.start([sys.executable, "-c", each], log) for each in (code, "raise SystemExit(3)"))
    assert gpu.finish(slow, {"rate": None}, 1) == "stopped after its 1 s"
    assert gpu.finish(failing, {}, 60) == "ended with status 3; see log.txt"
    assert json.loads((tmp_path / "log.txt").read_text()) == {"rate": None}


def test_every_part_gets_a_process_and_the_rate_that_the_first_measured(tmp_path, monkeypatch):
    code = """if True:
        import json, sys
        record = {"precision": "bf16", "size": 1, "operations_per_second": 8.0, **json.loads(input())}
        open(sys.argv[1], "a").write(json.dumps(record) + '\\n{"cut": ')
    """

    def begin(name, output):
        with (output / "log.txt").open("a") as log:
            return gpu.start([sys.executable, "-c", code, str(gpu._records_file(name, output))], log)

    monkeypatch.setattr(gpu, "_start", begin)
    command = ["--only", "growth", "--output", str(tmp_path)]
    assert gpu.main(command) == 0
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert {name: [each["rate"] for each in part["records"]] for name, part in parts.items()} == {
        **{"rate": [None], "growth": [8.0]}
    }
    assert gpu.main([*command, "--minutes", "0"]) == 1
    assert "not begun" in (tmp_path / "results.md").read_text()


def test_what_fails_or_comes_too_late_is_left_out_with_its_reason():
    records = []
    bench = Bench(records.append)
    bench.attempt({"way": "broken"}, lambda: 1 / 0)
    Bench(records.append, ends=time.monotonic() - 1).attempt({"way": "late"}, dict)
    assert records == [
        {"way": "broken", "left_out": "ZeroDivisionError: division by zero"},
        {"way": "late", "left_out": "the time of this part was over"},
    ]


def test_steps_are_timed_once_both_passes_and_the_optimizer_have_run():
    calls, model = [], torch.nn.Linear(1, 1)
    bench = Bench(calls.append, tiny=True)

    def gradient_of(rows, size):
        calls.append((len(rows), size))
        return lambda: model(torch.ones(1, 1)).sum().backward()

    ways = {"size": 1000, "rows_of": lambda _: np.full((8, 9), 10)}
    found = gpu_speed._steps(bench, bench.shape("f2llm-v2-80m"), model, gradient_of, **ways)
    # A quarter of the rows, in two chunks; then all.
    assert calls == [(2, 90), (8, 1000)] and found["seconds"]["calls"] == 3


def test_sizes_are_halved_until_they_fit():
    def measure(size):
        if size > 2:
            raise torch.OutOfMemoryError("too much")
        return size

    assert largest_that_fits(9, measure) == 2
    with pytest.raises(torch.OutOfMemoryError):
        largest_that_fits(1, lambda size: measure(3))


def test_what_is_predicted_is_trained_in_tiny(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    cases = ["adapter, bf16, checkpointing", "teacher"]
    assert prediction.main(["--quick", "--output", str(tmp_path), "--only", *cases]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == cases
    assert all(0.5 < float(row[3]) < 2 for row in rows[2:])
