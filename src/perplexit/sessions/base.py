"""What a session is: one loaded model on one engine that gives per-token results for windows.

The minimum is `InferenceSession.token_nll`. Every further ability is a Protocol of its own, so a
session that lacks one fails an `isinstance` check before anything runs.

Shape suffixes: N = scored tokens of one window, K = alternatives of a token.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from perplexit.inputs.windows import WindowIds
from perplexit.session_descriptions import ModelDescription, SessionDescription
from perplexit.token_columns import TokenDetails

MOST_CACHED_IDS = 2**20  # ids in one cache over all its windows; no batch gains from more


@dataclass(frozen=True, slots=True)
class LogitsChunk:
    """Logits of some consecutive targets of one window.

    place: index of the window in the batch; start: the first of the targets in its `targets_N`.
    logits_NV: float32; they may be overwritten, and the next chunk may reuse their memory.
    """

    place: int
    start: int
    logits_NV: NDArray[np.float32]


@runtime_checkable
class InferenceSession(Protocol):
    """One loaded model on one engine. The windows of one call form one batch."""

    @property
    def model(self) -> ModelDescription:
        """Describe the loaded model."""

    @property
    def description(self) -> SessionDescription:
        """Describe the engine and the settings in effect."""

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """Return one array per window: the nll of each target in nats, in the order of `targets_N`.

        Raises EngineOutOfMemoryError where the batch does not fit (the caller halves it), and
        VocabularyError where an id has no row in the model.
        """

    def max_batch_size(self, window_length: int) -> int:
        """Return how many windows of `window_length` ids fit into free memory for one call."""

    def close(self) -> None:
        """Release the model. A closed session is not used again."""


class OpenSession(InferenceSession, Protocol):
    """A session that was loaded; as a context manager it is closed at the end of the block."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class ClosedByWith:
    """Makes a session a context manager: `with` closes it."""

    def close(self) -> None:
        """Release the model."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@runtime_checkable
class DetailedSession(InferenceSession, Protocol):
    """A session that sees whole distributions: entropy, rank and the most likely alternatives."""

    def token_details(self, windows: Sequence[WindowIds], *, top_k: int = 0) -> list[TokenDetails]:
        """Return nll (the bits of `token_nll`), entropy, rank and alternatives of each window."""


@runtime_checkable
class AlternativesSession(InferenceSession, Protocol):
    """A session that is told the most likely tokens beside the target, and no more."""

    def token_alternatives(self, windows: Sequence[WindowIds], *, top_k: int) -> list[TokenDetails]:
        """Return the nll with the `top_k` most likely tokens; `rank_N` where told, no `entropy_N`.

        Raises CapabilityError where so many are not to be had, before anything is scored.
        """


@runtime_checkable
class LogitsSession(InferenceSession, Protocol):
    """A session that gives whole distributions, which a KL divergence needs."""

    def target_logits(
        self, windows: Sequence[WindowIds], *, chunk_rows: int
    ) -> Iterator[LogitsChunk]:
        """Return the logits of every target, window after window, about `chunk_rows` at a time."""


@runtime_checkable
class HiddenStateSession(LogitsSession, Protocol):
    """A session whose final hidden states can be kept and turned into logits later."""

    def target_hidden_states(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """Return the head's input for each target, one (targets, hidden size) array per window.

        Raises CapabilityError where the model's head cannot be told from its layers.
        """

    def logits_of(self, hidden_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits that the model's own head makes of hidden states, (N, V), float32."""


@runtime_checkable
class MeasuresDeviceMemory(Protocol):
    """A session that knows how much accelerator memory its process has used at most."""

    def peak_device_bytes(self) -> tuple[int | None, int | None]:
        """Return (the peak since the session was made, the peak beyond the weights), in bytes.

        None where the model runs on the host.
        """


@runtime_checkable
class TokenizesText(Protocol):
    """A session whose engine has a tokenizer of its own. Scores never use it; `doctor` does."""

    def own_token_ids(self, text: str, *, special: bool) -> list[int]:
        """Return the ids of `text` by the engine's tokenizer; `special` adds what it adds."""


@runtime_checkable
class SpellsTokens(Protocol):
    """A session whose engine tells the text that it takes each id for."""

    def own_token_texts(self, ids: Sequence[int]) -> list[str | None]:
        """Return the engine's text of each id, None where it tells none."""


Places = tuple[NDArray[np.int64], NDArray[np.int64]]  # (rows, columns) of a block of ids


class FedRows(Protocol):
    """What a model made of some of the positions that were fed to it, before its head."""

    def details(self, ids_N: NDArray[np.int64], *, with_details: bool, top_k: int) -> TokenDetails:
        """Return the details of the token `ids_N[n]` as the one after position n."""

    def array(self) -> NDArray[np.float32]:
        """Return one row per position, of which `CachingSession.logits_of` makes logits."""


class KeyValueCache(Protocol):
    """Keys and values of the ids that were fed so far, one row per window."""

    def feed(
        self, ids_BT: NDArray[np.int64], *, first_row: int, start: int, picked: Places
    ) -> FedRows:
        """Feed ids to rows `first_row…` at positions `start…`; return the picked places' rows.

        Every one of these rows has been fed exactly `start` ids. picked: (rows, columns) of the
        block. Raises EngineOutOfMemoryError.
        """


@runtime_checkable
class CachingSession(InferenceSession, Protocol):
    """A session that can be fed a window in blocks, each seeing those before it in a cache."""

    @property
    def cache_rows(self) -> int | None:
        """Return how many windows one cache holds at most; None: any number."""

    @property
    def rows_are_logits(self) -> bool:
        """Return whether `FedRows.array` gives logits, of which many take much memory."""

    def caching(self) -> Mapping[str, Any]:
        """Return how the cache is kept, for the record.

        Raises CapabilityError where this model cannot be scored so.
        """

    def open_cache(self, windows: Sequence[WindowIds]) -> KeyValueCache:
        """Return an empty cache with one row for each of the windows, which all have targets.

        Raises VocabularyError, ModelError and CapabilityError for windows that do not fit.
        """

    def logits_of(self, hidden_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of rows that a cache gave, (N, V), float32."""

    def max_cached_windows(self, window_length: int) -> int:
        """Return how many windows of that many ids to decode together, judged by free memory."""


@dataclass(frozen=True, slots=True)
class PhaseSeconds:
    """Time in a session, queued work of the device included."""

    prefill: float
    decode: float


@runtime_checkable
class TimesPhases(Protocol):
    """A session that measures prefill and decode apart."""

    def take_seconds(self) -> PhaseSeconds:
        """Return the seconds of successful calls since this was last called."""


@runtime_checkable
class QueueingSession(DetailedSession, Protocol):
    """A session that can start a batch and go on while a device works on it."""

    @property
    def queues(self) -> bool:
        """Return whether a started batch goes on by itself on this device."""

    def queue_details(
        self, windows: Sequence[WindowIds], *, top_k: int = 0
    ) -> Callable[[], list[TokenDetails]]:
        """Start `token_details` and return a function that waits for its results.

        The function is called once. Both calls may raise what `token_details` raises,
        EngineOutOfMemoryError included.
        """
