"""Log-probabilities recorded elsewhere (a device's dump), checked against the windows asked for.

Four forms of one record, where `position` counts a window's fed ids from 0:

- JSONL: `{"window": 0, "ids": [5, 7, 9], "logprobs": [null, -1.5, -0.2]}` per line; `logprobs[i]`
  is that of `ids[i]`, null where there is none (at position 0, and at context).
- llama.cpp's `--kl-divergence-base` file: the reference's own losses, to compare candidates with.
- Parquet and CSV: the columns `window, position, token_id, logprob`, one row per scored token.

JSONL and Parquet may list the most likely tokens too: `top_ids` and `top_logprobs`, one
list per position (null where there is none), in any order.

A description of the recording may stand in `FILE.json` beside it, in Parquet's `perplexit`
metadata, or in a first JSONL line `{"model": {…}, "session": {…}, "log_base": 2}`.

Shape suffixes: N = targets of one window, K = alternatives per target.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import msgspec
import numpy as np
from numpy.typing import NDArray

from perplexit.checkpoints.identity import weights_fingerprint
from perplexit.errors import CapabilityError, FingerprintMismatchError, ModelError
from perplexit.inputs.kl_base_file import KlBaseFile
from perplexit.inputs.windows import WindowIds
from perplexit.session_descriptions import ModelDescription, SessionDescription
from perplexit.sessions.base import ClosedByWith
from perplexit.sessions.logit_rows import contradiction, most_likely_first
from perplexit.sessions.loss_file_formats import (
    RecordedWindow,
    RecordingIdentity,
    base_file_identity,
    read_recording,
)
from perplexit.sessions.options import EngineOptions, engine_options, without_settings
from perplexit.token_columns import TokenDetails

_ROUNDING_NATS = 1e-2  # devices write half precision, or a few digits
_ONLY = without_settings("a recording", "its numbers were made elsewhere; leave the option out")


class RecordedInferenceSession(ClosedByWith):
    """Recorded per-token results as a session; nothing is computed.

    Every target's id must be the recorded one (and every other recorded id must agree with the
    window), so a recording of another tokenizer, window length or BOS policy is refused.
    Raises ModelError for a file of another form.
    """

    def __init__(
        self, path: str | Path, *, address: str | None = None, **options: Unpack[EngineOptions]
    ) -> None:
        engine_options("recorded", options, only=_ONLY)
        self._path = Path(path)
        identity, self._windows = read_recording(self._path)
        counts = [window.fewest_alternatives() for window in self._windows.values()]
        self._num_alternatives = min((n for n in counts if n is not None), default=0)
        self._nats = _nats_a_unit(identity.log_base, self._path)
        self.model, self.description = _described(
            identity, address or f"recorded:{self._path}", weights_fingerprint(self._path)
        )

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """Return the recorded nll of each target; see InferenceSession.

        Raises FingerprintMismatchError where the recording is of other ids or lacks a target, and
        ModelError where a log-probability is positive. A recorded NaN stays one.
        """
        return [self._window(window, 0).nll_N for window in windows]

    def token_alternatives(self, windows: Sequence[WindowIds], *, top_k: int) -> list[TokenDetails]:
        """Return the recorded nll with the `top_k` most likely tokens that were recorded.

        Raises CapabilityError where the recording lists fewer anywhere, ModelError where what it
        lists contradicts the target's log-probability, and what `token_nll` raises.
        """
        if top_k > self._num_alternatives:
            raise CapabilityError(
                f"expected the {top_k} most likely tokens beside each target (--top-k {top_k}) in "
                f"{self._path}, which lists {self._num_alternatives}; record top_ids and "
                "top_logprobs (JSONL or Parquet), ask for fewer, or leave --top-k out"
            )
        return [self._window(window, top_k) for window in windows]

    def max_batch_size(self, window_length: int) -> int:
        """Return as many windows as are wanted: the recording is in memory."""
        return max(1, (1 << 20) // max(1, window_length))

    def close(self) -> None:
        """Release the recording."""
        self._windows = {}

    def _window(self, window: WindowIds, top_k: int) -> TokenDetails:
        recorded, row_N = self._rows(window)
        nll_N = -recorded.logprobs_P[row_N] * self._nats
        self._check_sign(window, nll_N)
        nll_N = nll_N.astype(np.float32)
        if not top_k:
            return TokenDetails({"nll": nll_N})
        if recorded.top_ids_PK is None or recorded.top_logprobs_PK is None:
            raise self._mismatch(f"no alternatives in window {window.index}")
        top_ids_NK, top_logprobs_NK = most_likely_first(
            recorded.top_ids_PK[row_N], recorded.top_logprobs_PK[row_N] * self._nats, top_k
        )
        targets_N = window.ids_T[window.targets_N].astype(np.int64)
        own_N = -nll_N.astype(np.float64)
        # a NaN is named by the evaluation, as without alternatives
        kept_N = np.flatnonzero(~np.isnan(own_N))
        listed = (top_ids_NK[kept_N], top_logprobs_NK[kept_N])
        wrong = contradiction(targets_N[kept_N], own_N[kept_N], listed, slack=_ROUNDING_NATS)
        if wrong is not None:
            position = int(window.targets_N[kept_N[wrong[0]]])
            raise ModelError(
                f"expected the alternatives of the target's own distribution in {self._path}, got "
                f"{wrong[1]} at position {position} of window {window.index}; a list belongs to "
                "the id that stands at the same place, and is of what the ids before it predict"
            )
        return TokenDetails({"nll": nll_N, "top_ids": top_ids_NK, "top_logprobs": top_logprobs_NK})

    def _rows(self, window: WindowIds) -> tuple[RecordedWindow, NDArray[np.int64]]:
        """Return (what is recorded of the window, the row in it of each target)."""
        if window.index not in self._windows:
            raise self._mismatch(f"no window {window.index}: is the recording complete?")
        recorded = self._windows[window.index]
        positions = recorded.positions_P
        self._check_ids(window, positions, recorded.ids_P)
        missing = np.setdiff1d(window.targets_N, positions[recorded.is_given_P])
        if len(missing):
            num_targets = len(window.targets_N)
            raise self._mismatch(
                f"{num_targets - len(missing)} of {num_targets} targets of window {window.index}; "
                f"the first that is missing is at position {int(missing[0])}",
            )
        return recorded, np.searchsorted(positions, window.targets_N)

    def _check_ids(
        self, window: WindowIds, positions: NDArray[np.int64], ids: NDArray[np.int64]
    ) -> None:
        if len(positions) and not 0 <= positions[0] <= positions[-1] < len(window.ids_T):
            raise self._mismatch(
                f"position {int(positions[-1])} in window {window.index}, which feeds "
                f"{len(window.ids_T)} ids",
            )
        wrong = np.flatnonzero(window.ids_T[positions] != ids)
        if len(wrong):
            at = int(positions[wrong[0]])
            raise self._mismatch(
                f"id {int(ids[wrong[0]])} at position {at} of window {window.index}, where the "
                f"input has {int(window.ids_T[at])} ({len(wrong)} ids differ)",
            )

    def _check_sign(self, window: WindowIds, nll_N: NDArray[np.float64]) -> None:
        # a rounding error above 0 is allowed
        bad = np.flatnonzero(nll_N < -1e-4)
        if len(bad):
            raise ModelError(
                f"expected log-probabilities (at most 0) in {self._path}, got "
                f"{-float(nll_N[bad[0]]) / self._nats:g} at position "
                f"{int(window.targets_N[bad[0]])} of window {window.index}; if these are losses, "
                "negate them"
            )

    def _mismatch(self, got: str) -> FingerprintMismatchError:
        return FingerprintMismatchError(
            f"expected the recording {self._path} to be of this input, but it has {got}. Record "
            "the ids that `perplexit prepare --export-ids` gives, window by window"
        )


def described_base_file(file: KlBaseFile) -> tuple[ModelDescription, SessionDescription]:
    """Describe a session on llama.cpp's base file without reading the file's rows."""
    digest = weights_fingerprint(file.path)
    return _described(base_file_identity(file), f"recorded:{file.path}", digest)


def _described(
    identity: RecordingIdentity, address: str, digest: str
) -> tuple[ModelDescription, SessionDescription]:
    session = identity.session
    model = msgspec.structs.asdict(identity.model)
    model["weights_fingerprint"] = model["weights_fingerprint"] or digest
    return ModelDescription(address=address, **model), SessionDescription(
        engine=f"recorded ({session.engine})",
        version=str(session.version),
        dtype=session.dtype,
        device=session.device,
        settings={
            **session.settings,
            "recording_sha256": digest,  # of the file alone: the unit may stand in one beside it
            "log_base": identity.log_base,
        },
    )


def _nats_a_unit(base: object, path: Path) -> float:
    if base == "e":
        return 1.0
    if base in (2, 10):
        return math.log(float(str(base)))
    raise ModelError(f'expected log_base "e", 2 or 10 in {path}, got {base!r}')
