"""What a session does with a CUDA device's memory, as far as a machine without one can tell."""

import numpy as np
import pytest
import torch

import perplexit as px
from perplexit.functional.nll import DEFAULT_LOGITS_BYTES, token_statistics
from perplexit.resources.shared_peak import SharedPeak
from perplexit.sessions.pytorch import PytorchInferenceSession
from perplexit.sessions.pytorch import cuda as pytorch_cuda
from perplexit.sessions.pytorch.cuda import DeviceMemory, chunk_rows_for, to_device, to_host
from perplexit.sessions.pytorch.device_choice import is_out_of_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class _Meter:
    """An allocator whose holdings a test sets."""

    def __init__(self) -> None:
        self.held = self.peak = 0

    def hold(self, held: int) -> None:
        self.held, self.peak = held, max(self.peak, held)

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def read(self) -> tuple[int, int]:
        return self.held, self.peak

    def reset(self) -> None:
        self.peak = self.held


def test_working_memory_is_the_peak_beyond_what_was_held_after_loading(monkeypatch) -> None:
    meter = _Meter()
    monkeypatch.setattr(pytorch_cuda, "CUDA_PEAKS", SharedPeak(meter))
    meter.hold(900)  # an earlier session's peak: not this one's
    meter.hold(500)
    memory = DeviceMemory(CUDA)
    meter.hold(700)
    meter.hold(550)
    assert (memory.peak_bytes(), memory.peak_beyond_weights()) == (700, 200)
    memory.close()
    meter.hold(2000)
    assert memory.peak_bytes() == 700
    memory.close()


def test_on_the_cpu_there_is_no_device_memory(tiny_llama_dir) -> None:
    memory = DeviceMemory(CPU)
    assert (memory.peak_bytes(), memory.peak_beyond_weights()) == (None, None)
    tokens = px.prepare(["A window is what one pass sees."], tokenizer=tiny_llama_dir)
    peaks = px.evaluate(PytorchInferenceSession(tiny_llama_dir, device="cpu"), tokens)
    assert peaks.peak_memory_bytes["torch_device_beyond_weights"] is None


@pytest.mark.parametrize(
    ("total", "rows"),
    [(80 << 30, 512), (16 << 30, 256), (4 << 30, 128)],
    ids=["80 GB", "16 GB", "4 GB"],
)
def test_chunks_on_cuda_grow_with_the_devices_memory_in_whole_tiles(
    monkeypatch, total, rows
) -> None:
    monkeypatch.setattr(pytorch_cuda, "total_bytes", lambda device: total)
    assert chunk_rows_for(CUDA, 128_256, None) == rows


def test_chunks_elsewhere_and_as_told() -> None:
    assert chunk_rows_for(CPU, 320, None) == DEFAULT_LOGITS_BYTES // (4 * 320)
    assert chunk_rows_for(CPU, 320, 4 * 320 * 7) == 7


def test_copies_keep_what_they_copy() -> None:
    ids = np.arange(6).reshape(2, 3)
    assert torch.equal(to_device(ids, CPU), torch.arange(6).reshape(2, 3))
    statistics = token_statistics(torch.randn(4, 9), torch.arange(4), top_k=2)
    coming = to_host(statistics)()
    assert torch.equal(coming.nll_N, statistics.nll_N)
    assert torch.equal(coming.top_ids_NK, statistics.top_ids_NK)
    assert to_host(token_statistics(torch.randn(1, 3), torch.zeros(1).long(), with_details=False))()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
    ],
)
def test_a_lack_of_device_memory_is_known_by_what_cuda_says(error, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
