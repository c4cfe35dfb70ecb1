"""ONNX Runtime: a program that `perplexit compile --to onnx` made, whole windows at a time.

Shape suffixes: B = windows, T = ids a window (padded), N = targets over all windows, V =
vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from perplexit.errors import CapabilityError, ModelError, UsageError
from perplexit.inputs.windows import WindowIds
from perplexit.option_ranges import check_numbers
from perplexit.program_batches import (
    check_vocabulary,
    nll_of_feeds,
    padded_ids,
    parts_of,
    rows_before,
    split_by_window,
    windows_at_once,
)
from perplexit.resources.cores import num_cores
from perplexit.resources.freed_memory import return_freed_memory
from perplexit.sessions.base import (
    MOST_CACHED_IDS,
    LogitsChunk,
    ModelDescription,
    SessionDescription,
)
from perplexit.sessions.by_details import ScoresByDetails
from perplexit.sessions.logit_rows import details_of_rows
from perplexit.sessions.onnx.engine import open_session, provider_of, translated
from perplexit.sessions.onnx.past_key_values import OnnxCache, cache_bytes, with_logits_probed
from perplexit.sessions.onnx.ports import ports_of
from perplexit.sessions.onnx.program_folder import check_asked, describe, find_program
from perplexit.token_columns import TokenDetails

_MOST_WINDOWS = 32  # decoded together: beyond, copying caches costs what batching gains
_MOST_IDS = 4096  # ids a batch: beyond, a CPU gains no speed and only pays memory


class OnnxInferenceSession:
    """A compiled program on ONNX Runtime; with logits, it is an `OnnxLogitsSession`.

    folder:  made by `perplexit compile --to onnx`.
    dtype, quantization: what the program must be; they were settled when it was compiled.
    device:  "cpu" or "cuda". threads: of one operator; None: one a core.
    Raises ModelError where the folder holds no program or a damaged one, and CapabilityError
    where it is not what was asked for.
    """

    def __new__(cls, folder: str | Path, **_: Any) -> "OnnxInferenceSession":
        """A session with the abilities that the program gives it."""
        if cls is not OnnxInferenceSession:
            return super().__new__(cls)
        program = find_program(folder)
        if program.metadata.perplexity:
            return super().__new__(cls)
        return super().__new__(OnnxCachingSession if program.takes_cache else OnnxLogitsSession)

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        quantization: str | None = None,
        address: str | None = None,
    ) -> None:
        program = find_program(folder)
        self._metadata, self._rope_border = program.metadata, program.rope_border
        check_asked(self._metadata, dtype, quantization)
        if not program.foreign:
            self._metadata.check_files(program.graph.parent)
        provider = provider_of(device or "cpu")
        check_numbers(threads=threads)
        self._threads = threads or num_cores()
        self._session: Any = open_session(program.graph, provider, self._threads)
        made_from = asdict(self._metadata.model)
        self._model = ModelDescription(**{**made_from, "address": address or f"onnx:{folder}"})
        self._ports = ports_of(self._session, program=self._model.address)
        self._description = describe(
            program, device or "cpu", self._threads, self._session.get_providers()
        )

    @property
    def model(self) -> ModelDescription:
        """The checkpoint that the program was made from, at the program's address."""
        return self._model

    @property
    def description(self) -> SessionDescription:
        """The engine and the settings in effect."""
        return self._description

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """The nll of each target, from the head inside the program; see InferenceSession."""
        if not windows:
            return []
        parts = parts_of(windows, self._metadata.shapes)
        nll_N = [self._program_nll(part) for part in parts]
        return split_by_window(np.concatenate(nll_N), windows)

    def max_batch_size(self, window_length: int) -> int:
        """How many windows of that many ids take half of the free memory, at most 4096 ids."""
        return windows_at_once(
            window_length,
            self._metadata.shapes,
            window_bytes=self._window_bytes(window_length),
            most_ids=_MOST_IDS,
        )

    def close(self) -> None:
        """Release the program."""
        self._session = None
        return_freed_memory()

    def _window_bytes(self, length: int) -> int:
        memory = self._metadata.memory
        return length * (memory.bytes_per_id + length * memory.bytes_per_id_pair)

    def _program_nll(self, windows: Sequence[WindowIds]) -> NDArray[np.float32]:
        feed = self._feed(windows)
        return nll_of_feeds(
            lambda targets: self._run(feed | targets),
            windows,
            length=feed["input_ids"].shape[1],
            num_targets=self._metadata.shapes.num_targets,
        )

    def _feed(self, windows: Sequence[WindowIds]) -> dict[str, NDArray[Any]]:
        self._check_windows(windows)
        ids_BT = padded_ids(windows, self._metadata.shapes, program=self._model.address)
        mask_BT = np.zeros_like(ids_BT)
        for row, window in enumerate(windows):
            mask_BT[row, : len(window.ids_T)] = 1
        mask_BT[len(windows) :] = mask_BT[0]
        return self._named(ids_BT, mask_BT)

    def _named(
        self, ids_BT: NDArray[np.int64], mask_BT: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """What the program takes of ids, mask and positions, by its own names."""
        ports = self._ports
        feed = {ports.ids.name: ids_BT.astype(ports.ids.dtype, copy=False)}
        if ports.mask is not None:
            feed[ports.mask.name] = mask_BT.astype(ports.mask.dtype, copy=False)
        if ports.positions is not None:
            position_T = np.arange(ids_BT.shape[1], dtype=ports.positions.dtype)
            feed[ports.positions.name] = np.broadcast_to(position_T, ids_BT.shape).copy()
        return feed

    def _check_windows(self, windows: Sequence[WindowIds]) -> None:
        check_vocabulary(windows, self._model.vocab_size)
        border = self._rope_border
        longest = max((len(window.ids_T) for window in windows), default=0)
        if border is not None and longest > border:
            raise CapabilityError(
                f"expected windows of at most {border} ids, got one of {longest}: beyond, the RoPE "
                f"of the model in {self._model.address} changes with each window's length, which "
                f"a program does not see; prepare the input with --max-length {border}, or score "
                "the checkpoint with PyTorch (hf:…)"
            )

    def _run(self, feed: dict[str, NDArray[Any]]) -> Any:
        """The losses or logits alone, whatever else the program gives."""
        session = self._opened()
        try:
            return session.run([self._ports.logits.name], feed)[0]
        except Exception as error:  # ONNX Runtime's errors have no common root
            raise translated(error, f"running {self._model.address}") from error

    def _opened(self) -> Any:
        if self._session is None:
            raise UsageError(f"the session of {self._model.address} is closed; load it again")
        return self._session


class OnnxLogitsSession(ScoresByDetails, OnnxInferenceSession):
    """A program that gives logits (`--no-perplexity`): it tells whole distributions too."""

    _last_position_alone = (
        "it gives the last position alone and keeps no keys and values, so no window can be scored "
        "with it. Export it with the logits of every position, or with past keys and values"
    )

    def target_logits(
        self, windows: Sequence[WindowIds], *, chunk_rows: int
    ) -> Iterator[LogitsChunk]:
        """The logits of every target, chunk by chunk; see LogitsSession."""
        for place, window in enumerate(windows):
            rows_NV = rows_before(self._logits([window])[0], window.targets_N)
            for start in range(0, len(rows_NV), chunk_rows):
                yield LogitsChunk(place, start, rows_NV[start : start + chunk_rows])

    def _window_bytes(self, length: int) -> int:
        # The logits of every position, and once more while they are handed over.
        return super()._window_bytes(length) + 2 * 4 * length * self._model.vocab_size

    def _details(
        self, windows: Sequence[WindowIds], *, with_details: bool, top_k: int
    ) -> list[TokenDetails]:
        results = []
        for part in parts_of(windows, self._metadata.shapes):
            logits_BTV = self._logits(part)
            for window, logits_TV in zip(part, logits_BTV, strict=False):  # rows of padding
                results.append(
                    details_of_rows(
                        rows_before(logits_TV, window.targets_N),
                        window.ids_T[window.targets_N],
                        with_details=with_details,
                        top_k=top_k,
                    )
                )
        return results

    def _logits(self, windows: Sequence[WindowIds]) -> NDArray[np.float32]:
        feed = self._feed(windows)
        logits_BTV: NDArray[np.float32] = self._run(feed).astype(np.float32, copy=False)
        if logits_BTV.shape[:2] != feed[self._ports.ids.name].shape:
            raise ModelError(
                f"expected logits of every position from {self._model.address}, got an array of "
                f"shape {logits_BTV.shape} for ids of {feed[self._ports.ids.name].shape}: "
                + self._last_position_alone
            )
        return logits_BTV


class OnnxCachingSession(OnnxLogitsSession):
    """A program that takes and gives keys and values: whole windows, or prefill and decode."""

    _last_position_alone = "it gives the last position alone, so score it with --mode cached"
    rows_are_logits = True

    @property
    def cache_rows(self) -> int | None:
        """The program's batch size where it is fixed; see CachingSession."""
        return self._ports.batch_size

    def caching(self) -> Mapping[str, Any]:
        """How the program keeps its cache; see CachingSession."""
        ports = self._ports = with_logits_probed(self._ports, self._run_values)
        return {
            "dtype": str(ports.caches[0].past.dtype),
            "kind": "grows" if ports.capacity is None else f"retained, {ports.capacity} ids",
            "logits": "last position" if ports.last_position_only else "every position",
            "ids_a_call": ports.length or "any",
        }

    def open_cache(self, windows: Sequence[WindowIds]) -> OnnxCache:
        """An empty cache for these windows; see CachingSession."""
        self._check_windows(windows)
        longest = max(int(window.targets_N[-1]) for window in windows)
        if self._ports.capacity is not None and longest > self._ports.capacity:
            raise CapabilityError(
                f"{self._model.address} keeps {self._ports.capacity} ids in its cache, got a "
                f"window that feeds {longest}; prepare the input with --max-length "
                f"{self._ports.capacity + 1}, or compile the program for longer ones"
            )
        return OnnxCache(self._ports, self._run_values, program=self._model.address)

    def logits_of(self, hidden_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """The rows themselves, which are logits; see CachingSession."""
        return hidden_ND

    def max_cached_windows(self, window_length: int) -> int:
        """How many windows' caches, once more while they are copied, half of the memory holds."""
        if window_length > MOST_CACHED_IDS:
            return 1
        if self._ports.batch_size is not None:
            return self._ports.batch_size
        free = int(psutil.virtual_memory().available) // 2
        a_window = 2 * cache_bytes(self._ports) * window_length
        return max(1, min(_MOST_WINDOWS, free // a_window))

    def _named(
        self, ids_BT: NDArray[np.int64], mask_BT: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """With pasts of no ids, which make the call a plain forward pass."""
        ports = self._ports
        if not ports.sees_whole_windows:
            raise CapabilityError(
                f"{self._model.address} gives one position at a time and cannot score a whole "
                "window in one pass; use --mode cached"
            )
        feed = super()._named(ids_BT, mask_BT)
        if ports.use_cache_branch is not None:
            feed[ports.use_cache_branch] = np.array([False])
        shapes = {c.past.name: (len(ids_BT), c.heads, 0, c.head_size) for c in ports.caches}
        return feed | {
            c.past.name: np.empty(shapes[c.past.name], c.past.dtype) for c in ports.caches
        }

    def _run_values(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
        session = self._opened()
        try:
            values: list[Any] = session.run_with_ort_values(names, feed)
        except Exception as error:  # ONNX Runtime's errors have no common root
            raise translated(error, f"running {self._model.address}") from error
        return values
