"""What PyTorch runs on: devices, threads, free memory, and the process's settings meanwhile."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import nn

from perplexit.declared_options import check_numbers
from perplexit.errors import UsageError
from perplexit.resources.cores import num_cores

# Larger batches than this many ids gain nothing: the matrix products already fill the machine.
# On the CPU they lose: activations of more ids no longer fit into its caches.
CPU_IDS = 512
_IDS_A_BATCH = {"cpu": CPU_IDS, "cuda": 65_536, "mps": 8192}
_SHARE_OF_FREE_MEMORY = 0.5


def chosen_device(name: str | None) -> torch.device:
    """Return the device of that name; without one, CUDA where there is one, else the CPU.

    Raises UsageError for a device that this machine, or this build of PyTorch, does not have.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"expected a device cpu, cuda, cuda:N or mps, got {name!r}") from error
    available = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if device.type not in available:
        raise UsageError(f"expected a device cpu, cuda, cuda:N or mps, got {name!r}")
    if not available[device.type]:
        here = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
        raise UsageError(
            f"expected a device that PyTorch sees on this machine ({', '.join(here)}), got "
            f"{name!r}; choose one of them, or install a PyTorch build for that device"
        )
    return device


def chosen_threads(threads: int | None) -> int:
    """Return `threads`, or OMP_NUM_THREADS where it is set, or the cores this process may use."""
    if threads is not None:
        check_numbers(threads=threads)
        return threads
    from_environment = os.environ.get("OMP_NUM_THREADS", "")
    if from_environment.isdecimal() and 0 < len(from_environment) < 5 and int(from_environment):
        check_numbers(threads=int(from_environment))
        return int(from_environment)
    return num_cores()


def batch_size_for(
    device: torch.device, window_length: int, bytes_per_id: int, *, parts: int = 1
) -> int:
    """Return how many windows fit into half of the free memory, at least one.

    parts: of a batch that run side by side, each as large as a batch would otherwise be.
    """
    by_memory = int(_SHARE_OF_FREE_MEMORY * free_bytes(device)) // (bytes_per_id * window_length)
    return max(1, min(by_memory, parts * max(1, _IDS_A_BATCH[device.type] // window_length)))


def free_bytes(device: torch.device) -> int:
    """Return the bytes that the device can still give."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return int(psutil.virtual_memory().available)


def total_bytes(device: torch.device) -> int:
    """Return the bytes of a CUDA device's memory, used or not."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an engine's exception says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text
        or "out of memory" in text
        or "CUBLAS_STATUS_ALLOC_FAILED" in text  # its workspace, which torch does not allocate
    )


def _float32_accumulation() -> dict[tuple[Any, str], bool]:
    """Forbid CUDA's products to add up in less than float32; return what they were allowed before.

    cuBLAS may otherwise split a 16-bit product and add its parts in 16 bits, and cuDNN's
    convolutions (Mamba has some) take TF32 unless told not to.
    """
    before: dict[tuple[Any, str], bool] = {}
    for backend, name in (
        (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
        (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
        (torch.backends.cudnn, "allow_tf32"),
    ):
        before[backend, name] = getattr(backend, name)
        setattr(backend, name, False)
    return before


@contextmanager
def scoring_settings(model: nn.Module, threads: int, *, owned: bool) -> Iterator[None]:
    """Set evaluation mode, true float32 products and no gradients; restore everything afterwards.

    A model that was handed in may be trained later, so its forward runs under `no_grad`: caches
    that a model makes under `inference_mode` could never take part in a gradient again.
    """
    training = [module for module in model.modules() if module.training]
    reductions = _float32_accumulation()
    precision = torch.get_float32_matmul_precision()
    num_threads = torch.get_num_threads()
    model.eval()
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    if num_threads != threads:
        torch.set_num_threads(threads)
    try:
        with torch.inference_mode() if owned else torch.no_grad():
            yield
    finally:
        for (backend, name), value in reductions.items():
            setattr(backend, name, value)
        for module in training:
            module.training = True
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)
        if num_threads != threads and not owned:
            torch.set_num_threads(num_threads)
