"""MemoryTracker and HostMemory: each kind of memory seen, nesting, bounds, cost."""

import gc
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest

from perplexit.errors import MemoryBoundError, UsageError
from perplexit.resources.host_memory import HostMemory, lifetime_peak_bytes, rss_bytes
from perplexit.resources.memory_advice import return_freed_memory
from perplexit.resources.memory_tracker import MemoryTracker
from perplexit.resources.shared_peak import SharedPeak
from tests.resident import mapped

MB = 1 << 20
SLACK = 4096  # bytes of `with` itself that an enclosing tracker's tracing sees


@pytest.fixture(autouse=True)
def no_freed_memory_kept():
    """Sessions of earlier tests may have left memory with the process, which hides what is new."""
    return_freed_memory()


def held(num_bytes: int) -> np.ndarray:
    """Memory that is touched, so that it is resident."""
    return np.ones(num_bytes, dtype=np.uint8)


def test_the_seeds_example() -> None:
    with MemoryTracker("Assembly") as tracker:
        block = held(40 * MB)
        del block
        kept = held(10 * MB)
    assert 40 <= tracker.peak_mb < 80
    assert 9 <= tracker.current_mb <= tracker.peak_mb
    assert tracker.duration_seconds > 0
    assert tracker.label == "Assembly"
    assert str(tracker).startswith("Assembly: peak ")
    assert len(kept) == 10 * MB


def test_what_the_system_has_back_is_not_current() -> None:
    with MemoryTracker() as tracker:
        block = mapped(40 * MB)
        del block
        kept = mapped(10 * MB)
    assert 8 <= tracker.current_mb < 30  # the kernel counts pages in batches
    assert len(kept) == 10 * MB


def test_python_and_numpy_allocations_have_a_figure() -> None:
    with MemoryTracker() as tracker:
        text = "x" * (5 * MB)
        array = np.zeros(20 * MB, dtype=np.uint8)  # never touched: not resident
    assert 25 * MB <= tracker.python_peak_bytes < 27 * MB
    assert len(text) + len(array) == 25 * MB


def test_only_what_is_beyond_the_start_counts() -> None:
    before = held(60 * MB)
    with MemoryTracker() as tracker:
        pass
    assert tracker.peak_mb < 20
    assert tracker.host_rss_total_peak_bytes > 60 * MB
    assert len(before) == 60 * MB


def test_nested_trackers_keep_the_outer_peak() -> None:
    """tracemalloc has one resettable peak: an inner tracker must not zero the outer one's."""
    with MemoryTracker("outer") as outer:
        block = held(50 * MB)
        del block
        with MemoryTracker("first") as first:
            small = held(5 * MB)
        with MemoryTracker("second") as second:
            pass
    assert 50 * MB <= outer.python_peak_bytes < 52 * MB
    assert 5 * MB - SLACK <= first.python_peak_bytes < 6 * MB
    assert second.python_peak_bytes < MB
    assert len(small) == 5 * MB


def test_an_inner_peak_counts_for_the_outer_tracker() -> None:
    with MemoryTracker() as outer:
        with MemoryTracker() as inner:
            block = held(30 * MB)
            del block
        assert outer.python_peak_bytes + SLACK >= inner.python_peak_bytes >= 30 * MB - SLACK
    assert outer.host_rss_peak_bytes >= inner.host_rss_peak_bytes - MB


def test_trackers_may_overlap_across_threads() -> None:
    inside, done = threading.Event(), threading.Event()
    trackers: list[MemoryTracker] = []

    def other() -> None:
        with MemoryTracker("other") as tracker:
            trackers.append(tracker)
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    with MemoryTracker("first") as first:
        thread.start()
        inside.wait(10)
        block = held(20 * MB)
        del block
    done.set()
    thread.join()
    assert first.python_peak_bytes >= 20 * MB
    assert trackers[0].python_peak_bytes >= 20 * MB - SLACK
    assert not tracemalloc.is_tracing()


def test_the_programs_own_tracing_goes_on() -> None:
    tracemalloc.start()
    try:
        with MemoryTracker():
            pass
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()
    with MemoryTracker():
        assert tracemalloc.is_tracing()
    assert not tracemalloc.is_tracing()


def test_tracing_can_be_switched_off() -> None:
    with MemoryTracker(python=False, torch_cpu=False) as tracker:
        assert not tracemalloc.is_tracing()
        block = held(40 * MB)
    assert tracker.python_peak_bytes is None
    assert tracker.torch_cpu_peak_bytes is None
    assert tracker.host_rss_peak_bytes >= 38 * MB
    assert tracker.peak_bytes == tracker.host_rss_peak_bytes
    assert len(block)


def test_a_bound_is_checked_at_exit() -> None:
    with MemoryTracker("fits", bound_bytes=200 * MB):
        held(MB)
    with (
        pytest.raises(MemoryBoundError, match=r"scoring was to stay within 10,485,760 bytes.*peak"),
        MemoryTracker("scoring", bound_bytes=10 * MB) as tracker,
    ):
        held(30 * MB)
    assert tracker.peak_bytes > 10 * MB
    assert not tracemalloc.is_tracing()
    with pytest.raises(UsageError, match="bound_bytes"):
        MemoryTracker(bound_bytes=-1)


def test_the_blocks_own_error_comes_first() -> None:
    def allocate_and_fail() -> None:
        held(5 * MB)
        raise KeyError

    with pytest.raises(KeyError), MemoryTracker(bound_bytes=0):
        allocate_and_fail()
    assert not tracemalloc.is_tracing()


def test_a_tracker_can_be_used_again_but_not_inside_itself() -> None:
    tracker = MemoryTracker("again")
    with tracker:
        held(20 * MB)
        with pytest.raises(UsageError, match="second one"), tracker:
            pass
    with tracker:
        pass
    assert tracker.python_peak_bytes < MB


def test_cpu_tensors_have_a_figure_of_their_own() -> None:
    torch = pytest.importorskip("torch")
    outside = torch.ones(5 * MB, dtype=torch.uint8)
    with MemoryTracker("outer") as outer:
        block = torch.ones(30 * MB, dtype=torch.uint8)
        view = block.view(2, -1)[0] + 0  # a view is no new storage; the sum is
        del block
        with MemoryTracker("inner") as inner:
            kept = torch.empty(4 * MB, dtype=torch.uint8)  # never touched: not resident
            seen = outside.reshape(5, -1)  # somebody else's storage
    assert outer.torch_cpu_peak_bytes == 45 * MB
    assert inner.torch_cpu_peak_bytes == 4 * MB
    assert outer.peak_bytes >= 45 * MB
    assert outer.python_peak_bytes < 10 * MB  # tracemalloc sees no tensor
    assert len(view) + len(kept) + seen.numel() == 24 * MB


def test_resized_and_freed_tensors_are_followed() -> None:
    torch = pytest.importorskip("torch")
    from perplexit.resources.cpu_tensor_bytes import CpuTensorBytes  # noqa: PLC0415 - imports torch

    weight = torch.ones(1000)
    with CpuTensorBytes() as tensors:
        out = torch.empty(0)
        torch.add(weight, weight, out=out)
        assert tensors.current_bytes == 4000
        row = torch.tensor([1.0, 2.0])
        assert tensors.current_bytes == 4008
        del out, row
        gc.collect()
        assert tensors.current_bytes == 0
        torch.nn.functional.linear(torch.ones(2, 1000), weight[None]).sum()
    assert tensors.peak_bytes >= 8000


def test_results_are_the_same_under_a_tracker() -> None:
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(8, 8)
    batch = torch.ones(2, 8)
    expected = layer(batch)
    with MemoryTracker():
        assert torch.equal(layer(batch), expected)
        layer(batch).sum().backward()
    assert layer.weight.grad is not None


class OnePeak:
    """A meter whose readings the test sets."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.log: list[str] = []

    def begin(self) -> None:
        self.log.append("begin")

    def end(self) -> None:
        self.log.append("end")

    def read(self) -> tuple[int, int]:
        return self.now, self.peak

    def reset(self) -> None:
        self.peak = self.now

    def to(self, *values: int) -> None:
        for value in values:
            self.now = value
            self.peak = max(self.peak, value)


def test_stretches_of_one_meter_have_peaks_of_their_own() -> None:
    meter = OnePeak()
    shared = SharedPeak(meter)
    meter.to(500, 100)  # before anything is open
    outer = shared.open()
    meter.to(300, 120)
    inner = shared.open()
    meter.to(200, 150)
    shared.close(inner)
    meter.to(160)
    shared.close(outer)
    assert (outer.start_bytes, outer.peak_bytes, outer.current_bytes) == (100, 300, 160)
    assert (inner.start_bytes, inner.peak_bytes, inner.current_bytes) == (120, 200, 150)
    assert meter.log == ["begin", "end"]


@pytest.fixture
def grown() -> int:
    """A process whose lifetime peak is above what it holds now."""
    block = mapped(150 * MB)
    del block
    return lifetime_peak_bytes()


def test_host_memory_sees_a_spike_below_the_lifetime_peak(grown: int) -> None:
    with HostMemory(sample_seconds=0.005) as host:
        block = mapped(60 * MB)
        time.sleep(0.05)
        del block
    assert host.peak_bytes - host.start_bytes >= 55 * MB
    assert host.peak_bytes < grown + MB
    assert host.current_bytes < host.peak_bytes


@pytest.mark.skipif(sys.platform == "win32", reason="peak_wset is sampled by another call")
def test_host_memory_sees_a_record_between_two_samples() -> None:
    """A spike that no sample hits is known from the kernel's high-water mark, if it is a record."""
    num_bytes = lifetime_peak_bytes() - rss_bytes() + 50 * MB
    host = HostMemory(sample_seconds=60).start()
    block = mapped(num_bytes)
    del block
    assert host.stop() >= host.start_bytes + num_bytes - 10 * MB


def test_host_memory_costs_next_to_nothing() -> None:
    """A sample costs well under 0.5 % of the time between two."""
    host = HostMemory()
    started = time.perf_counter()
    for _ in range(200):
        host._sample()
    per_sample = (time.perf_counter() - started) / 200
    assert per_sample < 0.01 * host._sample_seconds


def test_host_memory_may_be_stopped_twice_and_unstarted() -> None:
    assert HostMemory().stop() == 0
    host = HostMemory().start()
    assert host.stop() == host.stop() > 0
    assert not any(thread.name == "perplexit-rss" for thread in threading.enumerate())
