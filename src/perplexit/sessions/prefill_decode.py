"""Prefill and decode: any engine with a key/value cache, as a session of its own.

A window's first `prompt_len` ids are fed in one call, the rest in calls of `decode_chunk` ids,
each call seeing the ids before it in the cache alone. The ids fed are always the text's own
(teacher forcing). Windows go side by side: row by row at the same positions, longest first, so that
no mask is needed and finished windows leave at the end of the batch.

Shape suffixes: B = windows, T = ids of a window, M = targets of all windows, N = targets of one
window or call, X = hidden size or vocabulary, V = vocabulary, K = alternatives.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import CapabilityError, UsageError
from perplexit.inputs.windows import WindowIds
from perplexit.resources.timer import Timer
from perplexit.session_descriptions import ModelDescription
from perplexit.sessions.base import (
    CachingSession,
    FedRows,
    HiddenStateSession,
    InferenceSession,
    KeyValueCache,
    LogitsChunk,
    MeasuresDeviceMemory,
    PhaseSeconds,
)
from perplexit.sessions.logit_rows import ScoresByDetails
from perplexit.token_columns import TokenDetails

_KEPT_LOGITS_BYTES = 512 * 2**20  # logits of whole windows held at a time, where asked for


# What the model made of the picked places, the slots of their targets, the targets' ids.
_Take = Callable[[FedRows, NDArray[np.int64], NDArray[np.int64]], None]


@dataclass(frozen=True, slots=True)
class _WindowBlock:
    """Windows that share a cache, longest first, and where each target's result belongs.

    places: of the windows in the call. lengths_B: ids to feed, those before the last target.
    ids_BT: padded on the right with each window's own last id.
    row_M, column_M: where the prediction of each target stands, by column and then by row.
    id_M: the target's id. slot_M: its index among the targets of all windows of the call.
    """

    places: list[int]
    lengths_B: NDArray[np.int64]
    ids_BT: NDArray[np.int64]
    row_M: NDArray[np.int64]
    column_M: NDArray[np.int64]
    id_M: NDArray[np.int64]
    slot_M: NDArray[np.int64]

    def feed(self, cache: KeyValueCache, rows: slice, columns: slice, take: _Take) -> None:
        """Feed a rectangle of the ids and hand over what precedes its targets."""
        first, last = np.searchsorted(self.column_M, [columns.start, columns.stop])
        row_N = self.row_M[first:last]
        inside = np.flatnonzero((row_N >= rows.start) & (row_N < rows.stop)) + first
        picked = self.row_M[inside] - rows.start, self.column_M[inside] - columns.start
        ids_BT = np.ascontiguousarray(self.ids_BT[rows, columns])
        fed = cache.feed(ids_BT, first_row=rows.start, start=columns.start, picked=picked)
        if len(inside):
            take(fed, self.slot_M[inside], self.id_M[inside])


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
        self.description = replace(
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

    def peak_device_bytes(self) -> tuple[int | None, int | None]:
        """Return both peaks of the engine's session; see MeasuresDeviceMemory."""
        session = self._session
        if not isinstance(session, MeasuresDeviceMemory):
            return None, None
        return session.peak_device_bytes()

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
        whole = TokenDetails({})

        def take(rows: FedRows, slots_N: NDArray[np.int64], ids_N: NDArray[np.int64]) -> None:
            details = rows.details(ids_N, with_details=with_details, top_k=top_k)
            whole.put(slots_N, details, num_targets=sum(counts))

        self._sweep(windows, take)
        if not whole.columns:
            k = min(top_k, self.model.vocab_size)
            whole = TokenDetails.empty(with_details=with_details, num_alternatives=k)
        return list(whole.split(counts))

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

    def _sweep(self, windows: Sequence[WindowIds], take: _Take) -> None:
        """Feed the windows that have targets; `take` gets the rows before each target once."""
        prefill_seconds = decode_seconds = 0.0
        for block in _window_blocks(windows, self._session.cache_rows):
            cache = self._session.open_cache([windows[place] for place in block.places])
            with Timer("prefill") as prefill:
                self._prefill(cache, block, take)
            with Timer("decode") as decode:
                self._decode(cache, block, take)
            prefill_seconds += prefill.seconds
            decode_seconds += decode.seconds
        self._prefill_seconds += prefill_seconds
        self._decode_seconds += decode_seconds

    def _prefill(self, cache: KeyValueCache, block: _WindowBlock, take: _Take) -> None:
        # As many windows at a time as whole windows of that length: activations need room too.
        prompt_len = min(self._prompt_len, int(block.lengths_B[0]))
        size = self._session.cache_rows or self._session.max_batch_size(prompt_len)
        for first in range(0, len(block.places), size):
            stop = min(prompt_len, int(block.lengths_B[first]))
            rows = slice(first, min(first + size, len(block.places)))
            block.feed(cache, rows, slice(0, stop), take)

    def _decode(self, cache: KeyValueCache, block: _WindowBlock, take: _Take) -> None:
        longest = int(block.lengths_B[0])
        for start in range(self._prompt_len, longest, self._decode_chunk):
            still_going = int(np.count_nonzero(block.lengths_B > start))
            stop = min(start + self._decode_chunk, longest)
            block.feed(cache, slice(0, still_going), slice(start, stop), take)


class CachedHiddenStateSession(CachedInferenceSession):
    """Prefill and decode of a model whose hidden states can be kept; see HiddenStateSession."""

    def target_hidden_states(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """Return one array per window, (targets, hidden size); see HiddenStateSession."""
        if self._session.rows_are_logits:
            session: Any = self._session  # which has no states without their head, and says so
            return session.target_hidden_states(windows)  # type: ignore[no-any-return]
        return self._rows(windows)

    def logits_of(self, hidden_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits that the model's own head makes of hidden states."""
        return self._session.logits_of(hidden_ND)

    def head_to_keep(self) -> Any:
        """Return the head to keep with states, as the engine's session gives it."""
        give = getattr(self._session, "head_to_keep", None)
        return None if give is None else give()


def _window_blocks(windows: Sequence[WindowIds], cache_rows: int | None) -> Iterator[_WindowBlock]:
    """Yield the windows with targets, longest first, as many per block as one cache holds."""
    counts = np.array([len(window.targets_N) for window in windows], dtype=np.int64)
    first_slots = np.cumsum(counts) - counts
    lengths = np.array(
        [int(window.targets_N[-1]) if n else 0 for window, n in zip(windows, counts, strict=True)]
    )
    order = [int(place) for place in np.argsort(-lengths, kind="stable") if counts[place]]
    size = cache_rows or max(1, len(order))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        yield _block_of(windows, places, lengths[places], first_slots)


def _block_of(
    windows: Sequence[WindowIds],
    places: list[int],
    lengths_B: NDArray[np.int64],
    first_slots: NDArray[np.int64],
) -> _WindowBlock:
    ids_BT = np.empty((len(places), int(lengths_B[0])), dtype=np.int64)
    parts = []
    for row, (place, fed) in enumerate(zip(places, lengths_B.tolist(), strict=True)):
        ids_T, targets_N = windows[place].ids_T, windows[place].targets_N
        ids_BT[row, :fed], ids_BT[row, fed:] = ids_T[:fed], ids_T[fed - 1]
        slots_N = first_slots[place] + np.arange(len(targets_N))
        rows_N = np.full(len(targets_N), row)
        parts.append(np.stack([rows_N, targets_N - 1, ids_T[targets_N], slots_N]))
    targets_4M = np.concatenate(parts, axis=1).astype(np.int64)
    by_column_then_row = np.lexsort(targets_4M[:2])
    return _WindowBlock(places, lengths_B, ids_BT, *targets_4M[:, by_column_then_row])
