"""The processor's cores."""

import os
from pathlib import Path


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_virtual_amx() -> bool:
    """Return whether this is a virtual machine whose processor says that it has AMX (Linux)."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return {"hypervisor", "amx_bf16"} <= flags
