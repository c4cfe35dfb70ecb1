"""The conditions of a measurement: machine, versions, load."""

import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from perplexit.resources.cores import num_cores

PACKAGES = (
    "perplexit",
    "torch",
    "transformers",
    "lm-eval",
    "openvino",
    "llama-cpp-python",
    "tokenizers",
    "numpy",
)


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system, Python, and the versions of what is compared."""
    return {
        "processor": processor_name(),
        "cores": num_cores(),
        "instructions": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags()],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
    }


def load_average() -> float:
    """Processes that wanted a core in the last minute, on average."""
    return round(float(psutil.getloadavg()[0]), 2)


def processor_name() -> str:
    """As the system calls it."""
    found = re.search(r"^model name\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    return found[1] if found else platform.processor()


def flags() -> set[str]:
    """The processor's features (Linux; elsewhere none are known)."""
    found = re.search(r"^flags\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    return set(found[1].split()) if found else set()


def version_of(package: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.exists() else ""
