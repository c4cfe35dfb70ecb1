"""Prefill and decode: any engine with a key/value cache, as a session of its own.

A window's first `prompt_len` ids are fed in one call, the rest in calls of `decode_chunk` ids,
each call seeing the ids before it in the cache alone. The ids fed are always the text's own
(teacher forcing). Windows go side by side: row by row at the same positions, longest first, so that
no mask is needed and finished windows leave at the end of the batch.

Shape suffixes: B = windows, T = ids of a window, M = targets of all windows, N = targets of one
window or call, X = hidden size or vocabulary, V = vocabulary, K = alternatives.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import CapabilityError, UsageError
from perplexit.inputs.windows import WindowIds
from perplexit.resources.timer import Timer
from perplexit.session_descriptions import (
    ModelDescription,
    SessionDescription,
)
from perplexit.sessions.base import (
    CachingSession,
    FedRows,
    HiddenStateSession,
    InferenceSession,
    KeyValueCache,
    LogitsChunk,
    MeasuresDeviceMemory,
    MeasuresWorkingMemory,
    PhaseSeconds,
)
from perplexit.sessions.logit_rows import ScoresByDetails
from perplexit.sessions.window_blocks import Take, WindowBlock, window_blocks
from perplexit.token_columns import TokenDetails

_KEPT_LOGITS_BYTES = 512 * 2**20  # logits of whole windows held at a time, where asked for


def cached_session(
    session: InferenceSession, *, prompt_len: int = 1, decode_chunk: int = 1
) -> "CachedInferenceSession":
    """Return a session that scores by prefill and decode; closing it closes `session`.

    prompt_len: ids of the one prefill; shorter windows are prefilled whole.
    decode_chunk: ids per decode call.
    Raises UsageError for sizes below 1, CapabilityError where the engine or model keeps no cache.
    """
    for name, value in (("prompt_len", prompt_len), ("decode_chunk", decode_chunk)):
        if value < 1:
            raise UsageError(f"expected {name} of at least 1, got {value}")
    if not isinstance(session, CachingSession):
        raise CapabilityError(
            f"expected a session that keeps a key/value cache, but {session.model.address} on "
            f"{session.description.engine} scores whole windows alone; use --mode full (PyTorch "
            "and ONNX programs made with --no-perplexity can do both)"
        )
    kind = CachedInferenceSession
    if isinstance(session, HiddenStateSession):
        kind = CachedHiddenStateSession
    return kind(session, prompt_len=prompt_len, decode_chunk=decode_chunk)


class CachedInferenceSession(ScoresByDetails):
    """The losses of a caching session's model, by one prefill and a teacher-forced decode."""

    def __init__(self, session: CachingSession, *, prompt_len: int, decode_chunk: int) -> None:
        self._session, self._prompt_len, self._decode_chunk = session, prompt_len, decode_chunk
        described = session.description
        self._description = replace(
            described,
            settings={**described.settings, "cache": dict(session.caching())},
            mode="cached",
            prompt_len=prompt_len,
            decode_chunk=decode_chunk,
        )
        self._prefill_seconds = self._decode_seconds = 0.0

    @property
    def model(self) -> ModelDescription:
        """Describe the loaded model."""
        return self._session.model

    @property
    def description(self) -> SessionDescription:
        """Describe the engine with the mode and its sizes."""
        return self._description

    def target_logits(
        self, windows: Sequence[WindowIds], *, chunk_rows: int
    ) -> Iterator[LogitsChunk]:
        """Return the logits of every target, window after window; see LogitsSession."""
        size = self._windows_kept(windows)
        for first in range(0, len(windows), size):
            for place, rows_NX in enumerate(self._rows(windows[first : first + size]), first):
                for start in range(0, len(rows_NX), chunk_rows):
                    logits_NV = self._session.logits_of(rows_NX[start : start + chunk_rows])
                    yield LogitsChunk(place, start, logits_NV)

    def max_batch_size(self, window_length: int) -> int:
        """Return how many windows to decode together; more than whole windows fit, for speed."""
        return self._session.max_cached_windows(window_length)

    def peak_device_bytes(self) -> int | None:
        """Return the peak of device memory in bytes; None where it is not measured."""
        session = self._session
        return session.peak_device_bytes() if isinstance(session, MeasuresDeviceMemory) else None

    def peak_device_bytes_beyond_weights(self) -> int | None:
        """Return the peak of device memory beyond the weights; None where it is not measured."""
        if isinstance(self._session, MeasuresWorkingMemory):
            return self._session.peak_device_bytes_beyond_weights()
        return None

    def take_seconds(self) -> PhaseSeconds:
        """Return the seconds of prefill and decode since this was last called."""
        seconds = PhaseSeconds(self._prefill_seconds, self._decode_seconds)
        self._prefill_seconds = self._decode_seconds = 0.0
        return seconds

    def close(self) -> None:
        """Close the engine's session."""
        self._session.close()

    def _details(
        self, windows: Sequence[WindowIds], *, with_details: bool, top_k: int
    ) -> list[TokenDetails]:
        counts = [len(window.targets_N) for window in windows]
        columns: dict[str, NDArray[Any]] = {}

        def take(rows: FedRows, slots_N: NDArray[np.int64], ids_N: NDArray[np.int64]) -> None:
            details = rows.details(ids_N, with_details=with_details, top_k=top_k)
            for name, values in details.columns.items():
                if name not in columns:
                    columns[name] = np.empty((sum(counts), *values.shape[1:]), values.dtype)
                columns[name][slots_N] = values

        self._sweep(windows, take)
        if not columns:
            k = min(top_k, self.model.vocab_size)
            empty = TokenDetails.empty(with_details=with_details, num_alternatives=k)
            return [empty] * len(windows)
        return list(TokenDetails(columns).split(counts))

    def _rows(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """Return what the head makes each target's logits of, window by window."""
        counts = [len(window.targets_N) for window in windows]
        kept: list[NDArray[np.float32]] = []

        def take(rows: FedRows, slots_N: NDArray[np.int64], _: NDArray[np.int64]) -> None:
            rows_NX = rows.array()
            if not kept:
                kept.append(np.empty((sum(counts), rows_NX.shape[1]), np.float32))
            kept[0][slots_N] = rows_NX

        self._sweep(windows, take)
        if not kept:
            return [np.empty((0, 1), np.float32) for _ in windows]
        return np.split(kept[0], np.cumsum(counts)[:-1])

    def _windows_kept(self, windows: Sequence[WindowIds]) -> int:
        if not self._session.rows_are_logits:
            return max(1, len(windows))
        most = max((len(window.targets_N) for window in windows), default=1)
        return max(1, _KEPT_LOGITS_BYTES // (4 * max(1, most) * self.model.vocab_size))

    def _sweep(self, windows: Sequence[WindowIds], take: Take) -> None:
        """Feed the windows that have targets; `take` gets the rows before each target once."""
        prefill, decode = Timer("prefill"), Timer("decode")
        seconds = [0.0, 0.0]
        for block in window_blocks(windows, self._session.cache_rows):
            cache = self._session.open_cache([windows[place] for place in block.places])
            with prefill:
                self._prefill(cache, block, take)
            with decode:
                self._decode(cache, block, take)
            seconds = [seconds[0] + prefill.seconds, seconds[1] + decode.seconds]
        self._prefill_seconds += seconds[0]
        self._decode_seconds += seconds[1]

    def _prefill(self, cache: KeyValueCache, block: WindowBlock, take: Take) -> None:
        # As many windows at a time as whole windows of that length: activations need room too.
        prompt_len = min(self._prompt_len, int(block.lengths_B[0]))
        size = self._session.cache_rows or self._session.max_batch_size(prompt_len)
        for first in range(0, len(block.places), size):
            stop = min(prompt_len, int(block.lengths_B[first]))
            rows = slice(first, min(first + size, len(block.places)))
            block.feed(cache, rows, slice(0, stop), take)

    def _decode(self, cache: KeyValueCache, block: WindowBlock, take: Take) -> None:
        longest = int(block.lengths_B[0])
        for start in range(self._prompt_len, longest, self._decode_chunk):
            still_going = int(np.count_nonzero(block.lengths_B > start))
            stop = min(start + self._decode_chunk, longest)
            block.feed(cache, slice(0, still_going), slice(start, stop), take)


class CachedHiddenStateSession(CachedInferenceSession):
    """Of a model whose final hidden states can be kept; see HiddenStateSession."""

    def target_hidden_states(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """Return one array per window, (targets, hidden size); see HiddenStateSession."""
        if self._session.rows_are_logits:
            raise CapabilityError(
                f"expected a model whose head can be told from its layers, but "
                f"{self.model.address} is scored by its whole forward pass; compare with two "
                "models in one process instead: eval CANDIDATE --reference MODEL"
            )
        return self._rows(windows)

    def logits_of(self, hidden_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits that the model's own head makes of hidden states."""
        return self._session.logits_of(hidden_ND)

    def head_to_keep(self) -> Any:
        """Return the head to keep with states, as the engine's session gives it."""
        give = getattr(self._session, "head_to_keep", None)
        return None if give is None else give()
