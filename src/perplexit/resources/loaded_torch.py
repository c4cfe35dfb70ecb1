"""Devices as a clock or a memory figure sees them, without ever importing torch.

A program that has not loaded torch has put no work on torch's devices, so a look at the modules
already loaded is enough.
"""

import sys
from types import ModuleType


def loaded_torch() -> ModuleType | None:
    """Return the torch module where this process has loaded it, else None."""
    torch = sys.modules.get("torch")
    # A half-imported torch (another thread is importing it) has no `cuda` yet.
    return torch if torch is not None and hasattr(torch, "cuda") else None


def cuda_in_use() -> bool:
    """Return whether torch has opened a CUDA context in this process."""
    torch = loaded_torch()
    return torch is not None and bool(torch.cuda.is_initialized())


def synchronize() -> None:
    """Wait until the accelerators that torch uses have done the work queued so far."""
    torch = loaded_torch()
    if torch is None:
        return
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)
    if torch.backends.mps.is_available():
        torch.mps.synchronize()
