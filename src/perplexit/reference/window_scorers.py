"""Scoring with a reference: its states saved as it is scored, or a candidate held against it.

Shape suffixes: N = targets of one window, D = hidden size, V = vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from perplexit.errors import CapabilityError, RunError, VocabularyError
from perplexit.functional.divergence import partial_divergences, token_divergences
from perplexit.functional.nll import (
    DEFAULT_LOGITS_BYTES,
    TokenStatistics,
    rows_within,
    token_statistics,
)
from perplexit.functional.output_head import OutputHead
from perplexit.inputs.windows import WindowIds
from perplexit.reference.heads import Head, proof_of
from perplexit.reference.partial_distributions import PartialReference
from perplexit.reference.states import ReferenceStates, StatesWriter
from perplexit.sessions.base import (
    AlternativesSession,
    HiddenStateSession,
    InferenceSession,
    LogitsChunk,
    LogitsSession,
)
from perplexit.token_columns import TokenDetails


@runtime_checkable
class ReferenceLogits(Protocol):
    """Gives the reference's logits for targets that a candidate is being scored on."""

    def begin(self, windows: Sequence[WindowIds]) -> None:
        """Prepare for a batch of windows, which will be asked for in order."""

    def rows(self, place: int, start: int, stop: int) -> NDArray[np.float32]:
        """Return the logits (N, V) of targets `start … stop - 1` of window `place` of the batch."""


@runtime_checkable
class KeepsHead(HiddenStateSession, Protocol):
    """A session that knows whether its head can be had again, and can write it out."""

    def head_to_keep(self) -> OutputHead | None:
        """Return the head to keep with states; None where the model's address gives it again.

        Raises CapabilityError where neither can be had.
        """


class StoredLogits:
    """Logits made again of stored hidden states, by the reference's own head."""

    def __init__(self, states: ReferenceStates, head: Head) -> None:
        self._states, self._head = states, head
        self._windows: Sequence[WindowIds] = ()
        self._place: int | None = None
        self._states_ND: NDArray[np.float32] = np.empty((0, 0), np.float32)

    def begin(self, windows: Sequence[WindowIds]) -> None:
        """Remember which windows are asked for."""
        self._windows, self._place = windows, None

    def rows(self, place: int, start: int, stop: int) -> NDArray[np.float32]:
        """Return the logits of some targets; the states of a window are read once."""
        if place != self._place:
            self._states_ND = self._states.of_window(self._windows[place].index)
            self._place = place
        return self._head.logits_of(self._states_ND[start:stop])


class LiveLogits:
    """Logits of a second session that scores the same windows in step."""

    def __init__(self, session: LogitsSession) -> None:
        self._session = session
        self._chunks: Iterator[Any] = iter(())
        self._place, self._start = 0, 0
        self._held_NV: NDArray[np.float32] = np.empty((0, 0), np.float32)

    def begin(self, windows: Sequence[WindowIds]) -> None:
        """Start the second session on the same batch."""
        rows = rows_within(DEFAULT_LOGITS_BYTES, self._session.model.vocab_size)
        self._chunks = self._session.target_logits(windows, chunk_rows=rows)
        self._place, self._start = -1, 0
        self._held_NV = np.empty((0, self._session.model.vocab_size), np.float32)

    def rows(self, place: int, start: int, stop: int) -> NDArray[np.float32]:
        """Return the logits of some targets, which must be asked for in order."""
        while self._place < place or self._start + len(self._held_NV) < stop:
            chunk = next(self._chunks)
            if chunk.place != self._place:
                self._place, self._start = chunk.place, chunk.start
                self._held_NV = chunk.logits_NV.copy()
            else:
                self._held_NV = np.concatenate([self._held_NV, chunk.logits_NV])
        rows_NV = self._held_NV[start - self._start : stop - self._start]
        self._held_NV, self._start = self._held_NV[stop - self._start :], stop
        return rows_NV


_AS_REFERENCE = (
    "Let it be the reference: evaluate it with --top-k 20 --run RUN, then the other model with "
    "--reference RUN, which puts the KL between two bounds"
)
_WITHOUT_THE_LOSS_INSIDE = (
    "Compile it with --no-perplexity, or leave --reference out (perplexities are compared without "
    "it)"
)
_OF_A_MODEL = (
    "Use the PyTorch session (hf:), or compare two models in one process: eval CANDIDATE "
    "--reference MODEL"
)


class ReferenceScoring:
    """Scores a candidate, with each token's divergence from the reference beside it."""

    def __init__(
        self, session: InferenceSession, reference: ReferenceLogits | PartialReference
    ) -> None:
        if not isinstance(session, LogitsSession):
            some = isinstance(session, AlternativesSession)
            gives = "at most its likeliest tokens" if some else "the loss of each target alone"
            raise CapabilityError(
                f"a KL divergence needs the candidate's whole distributions, but "
                f"{session.model.address} gives {gives}. "
                + (_AS_REFERENCE if some else _WITHOUT_THE_LOSS_INSIDE)
            )
        self._session, self._reference = session, reference
        self._chunk_rows = rows_within(DEFAULT_LOGITS_BYTES, session.model.vocab_size)

    def details(self, windows: Sequence[WindowIds], *, top_k: int = 0) -> list[TokenDetails]:
        """Return the columns of `token_details` with the divergences."""
        self._reference.begin(windows)
        parts: list[list[TokenStatistics]] = [[] for _ in windows]
        for chunk in self._session.target_logits(windows, chunk_rows=self._chunk_rows):
            window = windows[chunk.place]
            stop = chunk.start + len(chunk.logits_NV)
            targets_N = torch.from_numpy(
                window.ids_T[window.targets_N[chunk.start : stop]].astype(np.int64)
            )
            candidate_NV = torch.from_numpy(chunk.logits_NV.copy())  # engines reuse their buffers
            divergences = self._divergences(chunk, stop, candidate_NV, targets_N)
            statistics = token_statistics(candidate_NV, targets_N, top_k=top_k)
            columns = {**statistics.columns, **divergences.columns}
            parts[chunk.place].append(TokenStatistics(columns))
        return [_details(window_parts) for window_parts in parts]

    def _divergences(
        self, chunk: LogitsChunk, stop: int, candidate_NV: torch.Tensor, targets_N: torch.Tensor
    ) -> TokenStatistics:
        vocab_size = candidate_NV.shape[1]
        if not isinstance(self._reference, ReferenceLogits):
            partial = self._reference.partial_rows(chunk.place, chunk.start, stop, vocab_size)
            return partial_divergences(partial, candidate_NV, targets_N)
        reference_NV = torch.from_numpy(
            np.ascontiguousarray(self._reference.rows(chunk.place, chunk.start, stop))
        )
        if reference_NV.shape != candidate_NV.shape:
            raise VocabularyError(
                f"expected two distributions over one vocabulary, got {reference_NV.shape[1]} "
                f"entries in the reference and {vocab_size} in the candidate; "
                "a KL divergence between them does not exist"
            )
        return token_divergences(reference_NV, candidate_NV, targets_N)


class SavingScoring:
    """Scores the reference itself, and keeps its final hidden states.

    The head is kept too, where the session says that its address would not give it again. On the
    first batch a fresh forward pass is held against the logits that this head (or the session's
    own) makes of the stored states: the floor below which a KL says nothing (`self_kl`, mean and
    largest, nats), and the head's proof on the batch's longest window.
    """

    def __init__(self, session: InferenceSession, writer: StatesWriter) -> None:
        if not isinstance(session, HiddenStateSession):
            instead = _AS_REFERENCE if isinstance(session, AlternativesSession) else ""
            raise CapabilityError(
                f"--save-reference keeps final hidden states, which {session.model.address} does "
                f"not give. {instead or _OF_A_MODEL}"
            )
        self._session, self._writer = session, writer
        self.head = session.head_to_keep() if isinstance(session, KeepsHead) else None
        self._chunk_rows = rows_within(DEFAULT_LOGITS_BYTES, session.model.vocab_size)
        # On the run's first batch, whichever process scored it: a resumed run repeats its figures.
        self._measured = writer.measured()

    def details(self, windows: Sequence[WindowIds], *, top_k: int = 0) -> list[TokenDetails]:
        """Return the columns of `token_details`, after the states were written to disk."""
        states = self._session.target_hidden_states(windows)
        results = [
            self._window_details(window, states_ND, top_k)
            for window, states_ND in zip(windows, states, strict=True)
        ]
        self._writer.add([window.index for window in windows], states)
        if self._measured is None:
            mean, largest = self._measured_floor(windows, states)
            proof = self._proof(windows, states, results)
            self._measured = {"self_kl_mean": mean, "self_kl_max": largest, "proof": proof}
            self._writer.keep_measured(self._measured)
        return results

    def measured(self) -> dict[str, Any]:
        """Return the floor and the head's proof.

        Raises RunError where nothing was scored here and an earlier process's figures are gone.
        """
        if self._measured is None:
            raise RunError(
                f"expected what was measured of the states in {self._writer.folder}, but it is "
                "gone; evaluate the reference again in a new folder"
            )
        return self._measured

    def _stored(self, states_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        stored_ND: NDArray[np.float32] = states_ND.astype(self._writer.dtype).astype(np.float32)
        return stored_ND

    def _proof(
        self,
        windows: Sequence[WindowIds],
        states: Sequence[NDArray[np.float32]],
        results: Sequence[TokenDetails],
    ) -> dict[str, Any] | None:
        place = int(np.argmax([len(states_ND) for states_ND in states]))
        window, details = windows[place], results[place]
        targets_N = window.ids_T[window.targets_N].astype(np.int64)
        kept = {name: details.columns.get(name) for name in ("nll", "entropy", "rank")}
        stored_ND, head = self._stored(states[place]), self.head or self._session
        proof = proof_of(head, window.index, stored_ND, targets_N, TokenDetails(kept))
        return asdict(proof)

    def _window_details(
        self, window: WindowIds, states_ND: NDArray[np.float32], top_k: int
    ) -> TokenDetails:
        targets_N = torch.from_numpy(window.ids_T[window.targets_N].astype(np.int64))
        parts = []
        for start in range(0, len(states_ND), self._chunk_rows):
            stop = start + self._chunk_rows
            logits_NV = torch.from_numpy(self._session.logits_of(states_ND[start:stop]))
            parts.append(token_statistics(logits_NV, targets_N[start:stop], top_k=top_k))
        return _details(parts)

    def _measured_floor(
        self, windows: Sequence[WindowIds], states: Sequence[NDArray[np.float32]]
    ) -> tuple[float, float]:
        found = []
        for chunk in self._session.target_logits(windows, chunk_rows=self._chunk_rows):
            rows = slice(chunk.start, chunk.start + len(chunk.logits_NV))
            stored_ND = self._stored(states[chunk.place][rows])
            fresh_NV = torch.from_numpy(chunk.logits_NV.copy())  # the head reuses its buffer
            made_NV = torch.from_numpy((self.head or self._session).logits_of(stored_ND))
            zeros = torch.zeros(len(made_NV), dtype=torch.long)
            found.append(token_divergences(fresh_NV, made_NV, zeros).columns["kl"])
        kl = torch.cat(found) if found else torch.zeros(1)
        return float(kl.mean()), float(kl.max())


def _details(parts: Sequence[TokenStatistics]) -> TokenDetails:
    """Return one window's parts as one record."""
    if not parts:
        return TokenDetails.empty(with_details=False, num_alternatives=0)
    return TokenStatistics.joined(parts).to_numpy()
