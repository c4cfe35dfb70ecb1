"""ONNX Runtime itself: opening a graph on a device, its memory arena, its errors."""

from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime

from perplexit.errors import CapabilityError, EngineOutOfMemoryError, ModelError, UsageError
from perplexit.resources.memory_advice import return_freed_memory

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_OUT_OF_MEMORY = ("bad_alloc", "failed to allocate memory", "out of memory", "bad allocation")


def provider_of(device: str) -> str:
    """Return ONNX Runtime's name of a device: cpu, cuda, or an execution provider's own name.

    `dnnl`, `DnnlExecutionProvider` and so on are one thing. Raises UsageError for an unknown
    device, CapabilityError that names those available for one that this build lacks.
    """
    known: dict[str, str] = {
        name.lower().removesuffix("executionprovider"): name
        for name in onnxruntime.get_all_providers()
    }
    provider = known.get(device.lower().removesuffix("executionprovider"))
    if provider is None:
        raise UsageError(
            f"expected a device for ONNX Runtime, cpu or cuda, or another of its execution "
            f"providers ({', '.join(sorted(known))}), got {device!r}"
        )
    available = onnxruntime.get_available_providers()
    if provider not in available:
        hint = ": pip install onnxruntime-gpu" if provider == _PROVIDERS["cuda"] else ""
        raise CapabilityError(
            f"this build of ONNX Runtime has no {provider}; it has {', '.join(available)}. "
            f"Install a build with it for device {device!r}{hint}"
        )
    return provider


def open_session(path: Path, provider: str, threads: int) -> Any:
    """Open the graph at `path` for `provider`, one operator at a time on `threads` threads.

    Raises ModelError, or EngineOutOfMemoryError where the weights do not fit.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # patterns are kept for every shape that was ever seen
    if has_shared_arena():
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Weights outside: the arena outlives the session, and they should not.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    else:
        options.enable_cpu_mem_arena = False
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # ONNX Runtime's errors have no common root
        raise translated(error, f"loading {path}") from error
    if session.get_providers()[0] != provider:  # it falls back to the CPU without an error
        raise CapabilityError(
            f"expected ONNX Runtime to run {path} on {provider}, but it fell back to "
            f"{session.get_providers()[0]}; check the driver and the libraries of the device"
        )
    return_freed_memory()  # what optimising the graph left behind
    return session


@cache
def has_shared_arena() -> bool:
    """Return whether this process's sessions share an arena that grows by what is asked.

    A session's own arena grows by powers of two, and without an arena every buffer is mapped and
    unmapped anew, which costs a tenth of the time.
    """
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu",
        onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
        0,
        onnxruntime.OrtMemType.DEFAULT,
    )
    # 0 and -1 leave the default; strategy 1 extends by the size that is asked for
    growth = {
        "max_mem": 0,
        "arena_extend_strategy": 1,
        "initial_chunk_size_bytes": -1,
        "max_dead_bytes_per_chunk": -1,
    }
    try:
        onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(growth))
    except Exception:  # another library's arena is registered already: go without
        return False
    return True


def translated(error: Exception, doing: str) -> Exception:
    """Return EngineOutOfMemoryError or ModelError, with the first line of the engine's message."""
    first_line = str(error).strip().partition("\n")[0]
    if isinstance(error, MemoryError) or any(x in str(error).lower() for x in _OUT_OF_MEMORY):
        return EngineOutOfMemoryError(f"ONNX Runtime ran out of memory {doing}: {first_line}")
    return ModelError(f"ONNX Runtime failed {doing}: {first_line}")
