from __future__ import annotations

import json

import pytest

from tests.benchmarks import run
from tests.benchmarks.common import describe_hardware
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
        assert suite["measurements"] or name == "growth", name
        for measurement in suite["measurements"]:
            assert measurement["contestants"] and measurement["ratios"], measurement["case"]
            assert all(len(contestant["samples"]) == 1 for contestant in measurement["contestants"].values())
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
