"""Log-probabilities recorded elsewhere (a device's dump), checked against the windows asked for.

Four forms of one record, where `position` counts a window's fed ids from 0:

- JSONL: `{"window": 0, "ids": [5, 7, 9], "logprobs": [null, -1.5, -0.2]}` a line; `logprobs[i]`
  is that of `ids[i]`, null where there is none (at position 0, and at context).
- llama.cpp's `--kl-divergence-base` file: the reference's own losses, to compare candidates with.
- Parquet and CSV: the columns `window, position, token_id, logprob`, a row a scored token.

What the recording is of may stand in `FILE.json` beside it, in Parquet's `perplexit` metadata, or
in a first JSONL line `{"model": {…}, "session": {…}, "log_base": 2}`.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from perplexit.checkpoints.identity import weights_fingerprint
from perplexit.errors import CapabilityError, FingerprintMismatchError, ModelError
from perplexit.inputs.kl_base_file import KlBaseFile, is_kl_base_file
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.base import ModelDescription, SessionDescription

_ANY_ID = np.iinfo(np.int32).max
_COLUMNS = ("window", "position", "token_id", "logprob")
_BEFORE_FIRST = -1  # no window has this number

# positions (sorted), token ids, log-probabilities, and which of those there are
_Window = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]


class RecordedInferenceSession:
    """Recorded per-token results as a session; nothing is computed.

    Every target's id must be the recorded one (and every other recorded id must agree with the
    window), so a recording of another tokenizer, window length or BOS policy is refused.
    Raises ModelError for a file of another form.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: str | None = None,
        quantization: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        address: str | None = None,
    ) -> None:
        asked = {"dtype": dtype, "quantization": quantization, "device": device}
        for name, value in asked.items():
            if value is not None:
                raise CapabilityError(
                    f"expected no --{name} for a recording, got {value!r}: its numbers were made "
                    "elsewhere; leave the option out"
                )
        del threads
        self._path = Path(path)
        identity, self._windows = _read(self._path)
        self._nats = _nats_a_unit(identity.get("log_base", "e"), self._path)
        digest = weights_fingerprint(self._path)
        model, session = identity.get("model", {}), identity.get("session", {})
        self.model = ModelDescription(
            address=address or f"recorded:{self._path}",
            architecture=str(model.get("architecture", "unknown")),
            num_parameters=int(model.get("num_parameters", 0)),
            weights_fingerprint=str(model.get("weights_fingerprint", digest)),
            vocab_size=int(model.get("vocab_size", _ANY_ID)),
            max_length=model.get("max_length"),
        )
        self.description = SessionDescription(
            engine=f"recorded ({session.get('engine', 'unknown engine')})",
            version=str(session.get("version", "unknown")),
            dtype=str(session.get("dtype", "unknown")),
            device=str(session.get("device", "unknown")),
            settings={"recording_sha256": digest, **session.get("settings", {})},
        )

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """The recorded nll of each target; see InferenceSession.

        Raises FingerprintMismatchError where the recording is of other ids or lacks a target, and
        ModelError where a log-probability is positive. A recorded NaN stays one.
        """
        return [self._window_nll(window) for window in windows]

    def max_batch_size(self, window_length: int) -> int:
        """As many windows as are wanted: the recording is in memory."""
        return max(1, (1 << 20) // max(1, window_length))

    def close(self) -> None:
        """Release the recording."""
        self._windows = {}

    def _window_nll(self, window: WindowIds) -> NDArray[np.float32]:
        if window.index not in self._windows:
            raise self._mismatch(window, f"no window {window.index}: is the recording complete?")
        positions, ids, logprobs, present = self._windows[window.index]
        self._check_ids(window, positions, ids)
        row_N = np.searchsorted(positions, window.targets_N)
        found_N = np.zeros(len(row_N), dtype=bool)
        inside_N = row_N < len(positions)
        found_N[inside_N] = positions[row_N[inside_N]] == window.targets_N[inside_N]
        found_N[inside_N] &= present[row_N[inside_N]]
        if not found_N.all():
            missing = int(window.targets_N[~found_N][0])
            raise self._mismatch(
                window,
                f"{int(found_N.sum())} of {len(found_N)} targets of window {window.index}; the "
                f"first that is missing is at position {missing}",
            )
        nll_N = -logprobs[row_N] * self._nats
        self._check_sign(window, nll_N)
        return nll_N.astype(np.float32)

    def _check_ids(
        self, window: WindowIds, positions: NDArray[np.int64], ids: NDArray[np.int64]
    ) -> None:
        if len(positions) and not 0 <= positions[0] <= positions[-1] < len(window.ids_T):
            raise self._mismatch(
                window,
                f"position {int(positions[-1])} in window {window.index}, which feeds "
                f"{len(window.ids_T)} ids",
            )
        wrong = np.flatnonzero(window.ids_T[positions] != ids)
        if len(wrong):
            at = int(positions[wrong[0]])
            raise self._mismatch(
                window,
                f"id {int(ids[wrong[0]])} at position {at} of window {window.index}, where the "
                f"input has {int(window.ids_T[at])} ({len(wrong)} ids differ)",
            )

    def _check_sign(self, window: WindowIds, nll_N: NDArray[np.float64]) -> None:
        # a rounding error above 0 is left in peace
        bad = np.flatnonzero(nll_N < -1e-4)
        if len(bad):
            raise ModelError(
                f"expected log-probabilities (at most 0) in {self._path}, got "
                f"{-float(nll_N[bad[0]]) / self._nats:g} at position "
                f"{int(window.targets_N[bad[0]])} of window {window.index}; if these are losses, "
                "negate them"
            )

    def _mismatch(self, window: WindowIds, got: str) -> FingerprintMismatchError:
        del window
        return FingerprintMismatchError(
            f"expected the recording {self._path} to be of this input, but it has {got}. Record "
            "the ids that `perplexit prepare --export-ids` gives, window by window"
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[int, _Window]]:
    """(what the recording says of itself, its windows)."""
    if not path.is_file():
        raise ModelError(f"expected a recording (.jsonl, .parquet or .csv), found none at {path}")
    if is_kl_base_file(path):
        return _of_base_file(KlBaseFile(path))
    beside = path.with_name(f"{path.name}.json")
    identity = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            own = json.loads((table.schema.metadata or {}).get(b"perplexit", b"{}"))
            return {**own, **identity}, _windows_of_table(table)
        if path.suffix == ".csv":
            return identity, _windows_of_table(pa_csv.read_csv(path))
        own, windows = _windows_of_lines(path)
        return {**own, **identity}, windows
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ModelError(
            f"expected {path} to be a recording: JSONL with window, ids and logprobs a line, or "
            f"Parquet or CSV with the columns {', '.join(_COLUMNS)}; got something else: {error!r}"
        ) from error


def _of_base_file(file: KlBaseFile) -> tuple[dict[str, Any], dict[int, _Window]]:
    """The losses that llama.cpp's file holds.

    A clamped target has the clamp as its log-probability, as in llama.cpp's own figures: its loss
    is a lower bound, and `num_clamped_targets` in the settings says how many there are.
    """
    num_clamped = 0
    first = file.num_context // 2 + 1
    positions = np.arange(first, file.num_context)
    windows: dict[int, _Window] = {}
    for chunk in range(file.num_chunks):
        rows = file.rows(chunk, 0, file.num_targets)
        ids = file.ids[chunk, first:].astype(np.int64)
        own = rows.logp_NV[np.arange(len(ids)), ids]
        num_clamped += int(np.count_nonzero(~np.isfinite(own)))
        logprobs = np.minimum(np.where(np.isfinite(own), own, np.log(rows.cap_N)), 0.0)
        windows[chunk] = (positions, ids, logprobs, np.ones(len(ids), dtype=bool))
    model = {"weights_fingerprint": file.fingerprint, "vocab_size": file.vocab_size}
    session = {
        "engine": "llama.cpp",
        "dtype": "uint16 steps",
        "settings": {"num_clamped_targets": num_clamped},
    }
    return {"model": model, "session": session}, windows


def _windows_of_lines(path: Path) -> tuple[dict[str, Any], dict[int, _Window]]:
    own: dict[str, Any] = {}
    windows: dict[int, _Window] = {}
    for record in _records(path):
        if "window" not in record:
            own = dict(record)
            continue
        ids, logprobs = record["ids"], record["logprobs"]
        if len(ids) != len(logprobs):
            raise ValueError(
                f"window {record['window']} has {len(ids)} ids and {len(logprobs)} logprobs, "
                "which stand in pairs (null at position 0)"
            )
        if record["window"] in windows:
            raise ValueError(f"window {record['window']} stands there twice")
        windows[int(record["window"])] = (
            np.arange(len(ids)),
            np.asarray(ids, dtype=np.int64),
            np.array([0.0 if x is None else x for x in logprobs], dtype=np.float64),
            np.array([x is not None for x in logprobs], dtype=bool),
        )
    return own, windows


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def _windows_of_table(table: pa.Table) -> dict[int, _Window]:
    table = table.select(list(_COLUMNS)).filter(pc.is_valid(table["logprob"]))
    columns = [table[name].to_numpy() for name in _COLUMNS]
    order = np.lexsort((columns[1], columns[0]))
    window, position, ids, logprob = (column[order] for column in columns)
    if np.any((np.diff(window) == 0) & (np.diff(position) == 0)):
        raise ValueError("a position stands there twice")
    bounds = [*np.flatnonzero(np.diff(window, prepend=_BEFORE_FIRST)).tolist(), len(window)]
    return {
        int(window[a]): (
            position[a:b].astype(np.int64),
            ids[a:b].astype(np.int64),
            logprob[a:b].astype(np.float64),
            np.ones(b - a, dtype=bool),
        )
        for a, b in pairwise(bounds)
    }


def _nats_a_unit(base: object, path: Path) -> float:
    if base == "e":
        return 1.0
    if base in (2, 10):
        return math.log(float(str(base)))
    raise ModelError(f'expected log_base "e", 2 or 10 in {path}, got {base!r}')
