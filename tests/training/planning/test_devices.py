"""Time that is predicted: what makes it longer, and what the options may be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from training.common.errors import UserError
from training.planning.devices import DEVICES, Fleet, find_fleet

ARGS = SimpleNamespace(bf16=True, fp16=False, tf32=None)
WORK = {"flops": 1e18, "traffic": 1e15, "steps": 10, "loss": 10**9, "trained": 1e9}


def test_devices_share_all_but_the_loss_and_the_optimizer():
    one, eight = (Fleet(DEVICES["H100"], count) for count in (1, 8))
    shared = {"flops": 1e18, "traffic": 1e15}
    assert eight.seconds(ARGS, **shared) == pytest.approx(one.seconds(ARGS, **shared) / 8)
    own = one.seconds(ARGS, **WORK) - one.seconds(ARGS, **shared)
    assert own > 0 and eight.seconds(ARGS, **WORK) == pytest.approx(eight.seconds(ARGS, **shared) + own)


def test_a_measured_fraction_replaces_what_is_assumed():
    fleet = find_fleet("h100", 4, 0.4)
    assert fleet.seconds(ARGS, **WORK) == pytest.approx(1e18 / (4 * 0.4 * 989.5e12))


def test_precision_and_memory_decide():
    single, half = (SimpleNamespace(bf16=False, fp16=False, tf32=tf32) for tf32 in (False, True))
    for device in DEVICES.values():
        assert device.rate(single) <= device.rate(half) < device.rate(ARGS) == device.bf16
    assert device._replace(name="CPU").rate(ARGS) == 0.6 * device.bf16
    fleet = Fleet(DEVICES["RTX-4090"], 1)
    assert fleet.holds(21 * 2**30) and not fleet.holds(23 * 2**30)


def test_the_rates_of_this_machine_are_measured():
    device = find_fleet("cpu", None, None).device
    assert min(device.bf16, device.fp32, device.bandwidth) > 1e8 and device.memory > 2**30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((None, 0, None), "--devices 0: give a number above 0"),
        (("B300", 1, None), "--device B300: there are H200, H100, A100, RTX-4090, and cpu"),
        ((None, 1, 0.0), "--fraction 0: give a number above 0"),
        ((None, 1, 40.0), "--fraction 40: give the part of the matrix rate that was reached, at most 1"),
    ],
)
def test_faulty_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        find_fleet(*options)
