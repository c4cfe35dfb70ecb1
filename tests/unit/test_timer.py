"""Timer: a monotonic clock, devices waited for, usable again."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from perplexit.resources import timer as timer_module
from perplexit.resources.timer import Timer


def test_seconds_between_entry_and_exit() -> None:
    with Timer("nap") as timer:
        time.sleep(0.05)
        inside = timer.seconds
    assert 0.05 <= inside <= timer.seconds < 5
    assert timer.seconds == timer.duration_seconds == timer.seconds
    assert timer.label == "nap"
    assert str(timer).startswith("nap: 0.")


def test_a_timer_starts_anew_and_decorates() -> None:
    timer = Timer("nap")
    with timer:
        time.sleep(0.05)
    with timer:
        pass
    assert timer.seconds < 0.05

    @timer
    def nap() -> int:
        time.sleep(0.03)
        return 7

    assert nap() == 7
    assert 0.03 <= timer.seconds < 5


def test_a_wall_clock_that_is_set_back_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Timer() as timer:
        monkeypatch.setattr(time, "time", lambda: 0.0)
    assert timer.seconds >= 0


def test_errors_pass_and_the_time_is_kept() -> None:
    timer = Timer()

    def nap_and_fail() -> None:
        time.sleep(0.01)
        raise KeyError

    with pytest.raises(KeyError), timer:
        nap_and_fail()
    assert timer.seconds >= 0.01


def fake_torch(log: list[str], *, cuda: bool, mps: bool) -> SimpleNamespace:
    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_initialized=lambda: cuda,
            device_count=lambda: 2,
            synchronize=lambda device: log.append(f"cuda:{device}"),
        ),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
        mps=SimpleNamespace(synchronize=lambda: log.append("mps")),
    )


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(False, False, []), (True, False, ["cuda:0", "cuda:1"]), (False, True, ["mps"])],
)
def test_devices_in_use_are_waited_for_at_both_ends(
    cuda: bool, mps: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    monkeypatch.setitem(sys.modules, "torch", fake_torch(log, cuda=cuda, mps=mps))
    with Timer():
        assert log == expected
    assert log == 2 * expected


def test_a_device_that_failed_does_not_hide_the_blocks_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> None:
        raise RuntimeError("the device is gone")

    def fail() -> None:
        monkeypatch.setattr(timer_module, "synchronize", broken)
        raise KeyError

    with pytest.raises(KeyError), Timer():
        fail()


def test_timing_loads_no_torch() -> None:
    code = (
        "import sys, perplexit as px\n"
        "with px.Timer('a'), px.MemoryTracker('b'): pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
