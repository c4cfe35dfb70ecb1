"""ONNX Runtime: a program that `perplexit compile --to onnx` or another exporter made.

Shape suffixes: B = windows, T = ids per window (padded), N = targets over all windows, V =
vocabulary.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime
import psutil
from numpy.typing import NDArray

from perplexit.errors import CapabilityError, ModelError, UsageError
from perplexit.inputs.windows import WindowIds
from perplexit.program_batches import Feed
from perplexit.program_record import ProgramMetadata
from perplexit.quantization.engine_errors import engine_error
from perplexit.resources.cores import num_cores
from perplexit.resources.memory_advice import return_freed_memory
from perplexit.sessions.base import MOST_CACHED_IDS
from perplexit.sessions.compiled_program import (
    ProgramLogits,
    ProgramSession,
    RunningProgram,
    path_of_program,
)
from perplexit.sessions.onnx.past_key_values import OnnxCache, cache_bytes, with_logits_probed
from perplexit.sessions.onnx.ports import ports_of
from perplexit.sessions.onnx.program_folder import find_program
from perplexit.sessions.options import EngineOptions

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_MOST_WINDOWS = 32  # decoded together: beyond, copying caches costs what batching gains


class OnnxInferenceSession(ProgramSession):
    """A compiled program on ONNX Runtime; with logits, it is an `OnnxLogitsSession`.

    folder:  made by `perplexit compile --to onnx`, or by another exporter.
    dtype, quantization: what the program must be; they were settled when it was compiled.
    device:  "cpu", "cuda" or another execution provider. threads: of one operator; None: one per
             core.
    Raises ModelError where the folder holds no program or a damaged one, and CapabilityError
    where it is not what was asked for.
    """

    _engine = "onnx"
    _most_ids = 4096
    _takes_mask = True
    _head_fields = ("head_rows",)
    _last_position_alone: str  # the end of the error for a program that gives the last position

    @classmethod
    def _class_for(cls, folder: str | Path) -> type[Self]:
        program = find_program(path_of_program(folder, cls._engine))
        if program.metadata.perplexity:
            return cls
        chosen: Any = OnnxCachingSession if program.takes_cache else OnnxLogitsSession
        return chosen  # type: ignore[no-any-return]

    def _read(self, folder: Path) -> ProgramMetadata:
        self._found = find_program(folder)
        return self._found.metadata

    def _open(self, folder: Path, asked: EngineOptions) -> RunningProgram:
        device, threads = asked["device"] or "cpu", asked["threads"] or num_cores()
        self._session: Any = _open_session(self._found.graph, _provider_of(device), threads)
        self._ports = ports_of(self._session, program=self.model.address)
        self.cache_rows = self._ports.batch_size  # of OnnxCachingSession, see CachingSession
        settings: dict[str, Any] = {
            "providers": list(self._session.get_providers()),
            "graph_optimization": "all",
            "cpu_memory_arena": "shared, grows by need" if _has_shared_arena() else "off",
            "opset": self._metadata.opset,
        }
        if self._found.activations is not None:
            settings["weights"] = {
                "activations": self._found.activations,
                "batch_invariant": False,
            }
        return RunningProgram(
            self._run_whole, "onnxruntime", onnxruntime.__version__, device, threads, settings
        )

    def close(self) -> None:
        """Release the program."""
        self._session = None
        super().close()

    def _check_windows(self, windows: Sequence[WindowIds]) -> None:
        super()._check_windows(windows)
        border = self._found.rope_border
        longest = max((len(window.ids_T) for window in windows), default=0)
        if border is not None and longest > border:
            raise CapabilityError(
                f"expected windows of at most {border} ids, got one of {longest}: beyond, the RoPE "
                f"of the model in {self.model.address} changes with each window's length, which "
                f"a program does not see; prepare the input with --max-length {border}, or score "
                "the checkpoint with PyTorch (hf:…)"
            )

    def _run_whole(self, feed: Feed) -> NDArray[np.float32]:
        """Return the losses or the logits of whole windows, whatever else the program gives."""
        ports, address = self._ports, self.model.address
        if ports.caches and not ports.sees_whole_windows:
            raise CapabilityError(
                f"{address} gives one position at a time and cannot score a whole window in one "
                "pass; use --mode cached"
            )
        try:
            output = self._session.run([ports.logits.name], ports.whole_windows(feed))[0]
        except Exception as error:  # ONNX Runtime's errors have no common root
            raise engine_error("ONNX Runtime", f"run {address}", error) from error
        result: NDArray[np.float32] = output.astype(np.float32, copy=False)
        if not self._metadata.perplexity and result.shape[:2] != feed["input_ids"].shape:
            raise ModelError(
                f"expected logits of every position from {address}, got an array of shape "
                f"{result.shape} for ids of {feed['input_ids'].shape}: {self._last_position_alone}"
            )
        return result


class OnnxLogitsSession(ProgramLogits, OnnxInferenceSession):
    """A program that gives logits (`--no-perplexity`), and with them whole distributions."""

    _last_position_alone = (
        "it gives the last position alone and keeps no keys and values, so no window can be scored "
        "with it. Export it with the logits of every position, or with past keys and values"
    )


class OnnxCachingSession(OnnxLogitsSession):
    """A program that takes and gives keys and values: whole windows, or prefill and decode."""

    _last_position_alone = "it gives the last position alone, so score it with --mode cached"
    rows_are_logits = True

    def caching(self) -> Mapping[str, Any]:
        """Describe how the program keeps its cache; see CachingSession."""
        ports = self._ports = with_logits_probed(self._ports, self._run_values)
        return {
            "dtype": str(ports.caches[0].past.dtype),
            "kind": "grows" if ports.capacity is None else f"retained, {ports.capacity} ids",
            "logits": "last position" if ports.last_position_only else "every position",
            "ids_a_call": ports.length or "any",
        }

    def open_cache(self, windows: Sequence[WindowIds]) -> OnnxCache:
        """Return an empty cache for these windows; see CachingSession."""
        self._check_windows(windows)
        longest = max(int(window.targets_N[-1]) for window in windows)
        if self._ports.capacity is not None and longest > self._ports.capacity:
            raise CapabilityError(
                f"{self.model.address} keeps {self._ports.capacity} ids in its cache, got a "
                f"window that feeds {longest}; prepare the input with --max-length "
                f"{self._ports.capacity + 1}, or compile the program for longer ones"
            )
        return OnnxCache(self._ports, self._run_values, program=self.model.address)

    def logits_of(self, hidden_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the rows themselves, which are logits; see CachingSession."""
        return hidden_ND

    def max_cached_windows(self, window_length: int) -> int:
        """Return how many windows' caches half of the memory holds twice: joining copies them."""
        if window_length > MOST_CACHED_IDS:
            return 1
        if self._ports.batch_size is not None:
            return self._ports.batch_size
        free = int(psutil.virtual_memory().available) // 2
        a_window = 2 * cache_bytes(self._ports) * window_length
        return max(1, min(_MOST_WINDOWS, free // a_window))

    def _run_values(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
        self._running()
        made = onnxruntime.OrtValue.ortvalue_from_numpy
        values = {
            name: made(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
            for name, value in feed.items()
        }
        try:
            results: list[Any] = self._session.run_with_ort_values(names, values)
        except Exception as error:  # ONNX Runtime's errors have no common root
            raise engine_error("ONNX Runtime", f"run {self.model.address}", error) from error
        return results


def _provider_of(device: str) -> str:
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


def _open_session(path: Path, provider: str, threads: int) -> Any:
    """Open the graph at `path` for `provider`, one operator at a time on `threads` threads.

    Raises ModelError, or EngineOutOfMemoryError where the weights do not fit.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # patterns are kept for every shape that was ever seen
    if _has_shared_arena():
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Weights outside: the arena outlives the session, and they should not.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    else:
        options.enable_cpu_mem_arena = False
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # ONNX Runtime's errors have no common root
        raise engine_error("ONNX Runtime", f"load {path}", error) from error
    if session.get_providers()[0] != provider:  # it falls back to the CPU without an error
        raise CapabilityError(
            f"expected ONNX Runtime to run {path} on {provider}, but it fell back to "
            f"{session.get_providers()[0]}; check the driver and the libraries of the device"
        )
    return_freed_memory()  # what optimising the graph left behind
    return session


@cache
def _has_shared_arena() -> bool:
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
