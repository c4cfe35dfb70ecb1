"""A recording's file (JSONL, Parquet, CSV, llama.cpp's base file) → what it says, and its windows.

Shape suffixes: P = recorded positions of one window, K = alternatives per position.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from perplexit.errors import ModelError
from perplexit.inputs.kl_base_file import KlBaseFile, is_kl_base_file
from perplexit.untrusted_files import (
    Expected,
    check_regular,
    open_regular,
    parse_json,
    read_json,
    stated,
    typed,
)
from perplexit.untrusted_tensors import read_parquet

NO_ID = -1  # pads the alternatives of a position that lists fewer than another
_COLUMNS = ("window", "position", "token_id", "logprob")
_LISTS = ("top_ids", "top_logprobs")
_BEFORE_FIRST = -1  # no window has this number


_EXPECTED = Expected(
    "a recording: JSONL with window, ids and logprobs on each line, or Parquet or CSV with the "
    f"columns {', '.join(_COLUMNS)},",
    ModelError,
    "write the recording again",
)
_SIDECAR = Expected("a recording's description", ModelError, "write the recording again")
_LARGEST = (1 << 31) - 1
_LARGEST_RECTANGLE, _WIDEST = 1 << 22, 64  # padded entries, and padded entries for each listed one


Positive = Annotated[int, msgspec.Meta(gt=0, le=_LARGEST)]


class RecordedModel(msgspec.Struct, frozen=True):
    """The model whose numbers were recorded; no fingerprint: the recording's own stands for it."""

    architecture: str = "unknown"
    num_parameters: Annotated[int, msgspec.Meta(ge=0)] = 0
    weights_fingerprint: str = ""
    vocab_size: Positive = int(np.iinfo(np.int32).max)  # any id
    max_length: Positive | None = None


class RecordedSession(msgspec.Struct, frozen=True):
    """What it was run on."""

    engine: str = "unknown engine"
    version: str | int | float = "unknown"
    dtype: str = "unknown"
    device: str = "unknown"
    settings: dict[str, Any] = {}


class RecordingIdentity(msgspec.Struct, frozen=True):
    """The description of a recording; there may be more keys."""

    model: RecordedModel = RecordedModel()
    session: RecordedSession = RecordedSession()
    log_base: int | float | str = "e"


class RecordedLine(TypedDict, total=False):
    """One line of a recording: a window, or (without `window`) the recording's description."""

    model: RecordedModel
    session: RecordedSession
    log_base: int | float | str
    window: int
    ids: list[int]
    logprobs: list[float | None]
    top_ids: list[list[int] | None]
    top_logprobs: list[list[float] | None]


@dataclass(frozen=True, slots=True)
class RecordedWindow:
    """What is recorded of one window, sorted by position; log-probabilities in the file's base.

    is_given_P:     where there is a log-probability: not at position 0, nor at mere context.
    top_ids_PK:     listed tokens in the file's order, NO_ID where a position lists fewer.
    top_logprobs_PK: theirs, -inf at NO_ID. Both None where the file lists none.
    """

    positions_P: NDArray[np.int64]
    ids_P: NDArray[np.int64]
    logprobs_P: NDArray[np.float64]
    is_given_P: NDArray[np.bool_]
    top_ids_PK: NDArray[np.int64] | None = None
    top_logprobs_PK: NDArray[np.float64] | None = None

    def fewest_alternatives(self) -> int | None:
        """Return how many every scored position lists at least; None where none is scored."""
        if not self.is_given_P.any():
            return None
        if self.top_ids_PK is None:
            return 0
        return int((self.top_ids_PK[self.is_given_P] != NO_ID).sum(axis=1).min())


def read_recording(path: Path) -> tuple[RecordingIdentity, dict[int, RecordedWindow]]:
    """Return (the recording's description, its windows). Raises ModelError for another file."""
    if not path.is_file():
        raise ModelError(f"expected a recording (.jsonl, .parquet or .csv), found none at {path}")
    if is_kl_base_file(path):
        return _of_base_file(KlBaseFile(path))
    beside = path.with_name(f"{path.name}.json")
    identity = read_json(beside, _SIDECAR, dict[str, Any]) if beside.is_file() else {}
    with stated(path, _EXPECTED):
        if path.suffix == ".parquet":
            table = read_parquet(path, _EXPECTED)
            text = (table.schema.metadata or {}).get(b"perplexit", b"{}")
            own = parse_json(text, _EXPECTED, dict[str, Any], place=path)
            windows = _windows_of_table(table)
        elif path.suffix == ".csv":
            check_regular(path, _EXPECTED)
            own, windows = {}, _windows_of_table(pa_csv.read_csv(path))
        else:
            own, windows = _windows_of_lines(path)
        for number, window in windows.items():
            _check_window(number, window)
    place = beside if identity else path
    return typed({**own, **identity}, _SIDECAR, RecordingIdentity, place=place), windows


def _check_window(number: int, window: RecordedWindow) -> None:
    """Raise ValueError for a window, position or id that cannot be."""
    for values in (window.positions_P, window.ids_P):
        low, high = int(values.min(initial=0)), int(values.max(initial=0))
        if not 0 <= number <= _LARGEST or low < 0 or high > _LARGEST:
            raise ValueError(f"window {number} has a position or an id out of range")


def _of_base_file(file: KlBaseFile) -> tuple[RecordingIdentity, dict[int, RecordedWindow]]:
    """Read the losses that llama.cpp's file holds.

    A clamped target has the clamp as its log-probability, as in llama.cpp's own figures: its loss
    is a lower bound, and `num_clamped_targets` in the settings says how many there are.
    """
    num_clamped = 0
    first = file.num_context // 2 + 1
    positions = np.arange(first, file.num_context)
    windows: dict[int, RecordedWindow] = {}
    for chunk in range(file.num_chunks):
        rows = file.rows(chunk, 0, file.num_targets)
        ids = file.ids[chunk, first:].astype(np.int64)
        own = rows.logp_NV[np.arange(len(ids)), ids]
        num_clamped += int(np.count_nonzero(~np.isfinite(own)))
        logprobs = np.minimum(np.where(np.isfinite(own), own, np.log(rows.cap_N)), 0.0)
        windows[chunk] = RecordedWindow(positions, ids, logprobs, np.ones(len(ids), dtype=bool))
    return base_file_identity(file, num_clamped_targets=num_clamped), windows


def base_file_identity(file: KlBaseFile, **settings: int) -> RecordingIdentity:
    """Return the description of llama.cpp's file, without reading its rows."""
    return RecordingIdentity(
        RecordedModel(weights_fingerprint=file.fingerprint, vocab_size=file.vocab_size),
        RecordedSession("llama.cpp", dtype="uint16 steps", settings=settings),
    )


def _windows_of_lines(path: Path) -> tuple[dict[str, Any], dict[int, RecordedWindow]]:
    own: dict[str, Any] = {}
    windows: dict[int, RecordedWindow] = {}
    for record in _records(path):
        if "window" not in record:
            own = dict(record)
            continue
        if "ids" not in record or "logprobs" not in record:
            raise ValueError(f"window {record['window']} lacks ids or logprobs")
        if record["window"] in windows:
            raise ValueError(f"window {record['window']} stands there twice")
        windows[int(record["window"])] = _window_of_record(record)
    return own, windows


def _window_of_record(record: Mapping[str, Any]) -> RecordedWindow:
    ids, logprobs = record["ids"], record["logprobs"]
    lists = [[row or [] for row in record[name]] for name in _LISTS if name in record]
    for name, values in zip(("logprobs", *_LISTS), (logprobs, *lists), strict=False):
        if len(ids) != len(values):
            raise ValueError(
                f"window {record['window']} has {len(ids)} ids and {len(values)} {name}, "
                "which stand in pairs (null at position 0)"
            )
    lengths = [np.array([len(row) for row in rows], dtype=np.int64) for rows in lists]
    values = [np.array([x for row in rows for x in row], dtype=np.float64) for rows in lists]
    return RecordedWindow(
        np.arange(len(ids)),
        np.asarray(ids, dtype=np.int64),
        np.array([0.0 if x is None else x for x in logprobs], dtype=np.float64),
        np.array([x is not None for x in logprobs], dtype=bool),
        *_padded(lengths, values),
    )


def _records(path: Path) -> Iterator[RecordedLine]:
    with open_regular(path, _EXPECTED) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                yield parse_json(line, _EXPECTED, RecordedLine, place=place, non_finite=True)


def _windows_of_table(table: pa.Table) -> dict[int, RecordedWindow]:
    names = [name for name in _LISTS if name in table.column_names]
    table = table.select([*_COLUMNS, *names]).filter(pc.is_valid(table["logprob"]))
    if any(table[name].null_count for name in _COLUMNS):
        raise ValueError("a row lacks its window, position or id")
    # A safe cast: 5.0 is an id, 5.5 and NaN are none.
    types = [pa.int64(), pa.int64(), pa.int64(), pa.float64()]
    columns = [table[n].cast(kind).to_numpy() for n, kind in zip(_COLUMNS, types, strict=True)]
    order = np.lexsort((columns[1], columns[0]))
    window, position, ids, logprob = (column[order] for column in columns)
    if np.any((np.diff(window) == 0) & (np.diff(position) == 0)):
        raise ValueError("a position stands there twice")
    lists = [table[name].combine_chunks() for name in names]
    lengths = [pc.fill_null(pc.list_value_length(x), 0).to_numpy() for x in lists]
    values = [pc.list_flatten(x).to_numpy(zero_copy_only=False) for x in lists]
    top = [padded[order] for padded in _padded(lengths, values)]
    bounds = [*np.flatnonzero(np.diff(window, prepend=_BEFORE_FIRST)).tolist(), len(window)]
    return {
        int(window[a]): RecordedWindow(
            position[a:b].astype(np.int64),
            ids[a:b].astype(np.int64),
            logprob[a:b].astype(np.float64),
            np.ones(b - a, dtype=bool),
            *(padded[a:b] for padded in top),
        )
        for a, b in pairwise(bounds)
    }


def _padded(lengths: Sequence[NDArray[Any]], values: Sequence[NDArray[Any]]) -> tuple[Any, ...]:
    """Return (ids, log-probabilities) as rectangles, or () where the file has no such lists.

    lengths, values: of `top_ids` and `top_logprobs`, the rows' lists one after the other.
    """
    if not lengths:
        return ()
    if len(lengths) != len(_LISTS) or not np.array_equal(lengths[0], lengths[1]):
        raise ValueError(f"{' and '.join(_LISTS)} stand in pairs")
    lengths_P = lengths[0].astype(np.int64)
    shape = (len(lengths_P), int(lengths_P.max(initial=0)))
    if math.prod(shape) > _LARGEST_RECTANGLE + _WIDEST * len(values[0]):
        raise ValueError(
            f"one position lists {shape[1]:,} alternatives, the others next to none: such rows "
            f"would take {16 * math.prod(shape):,} bytes"
        )
    row = np.repeat(np.arange(shape[0]), lengths_P)
    column = np.arange(len(row)) - np.repeat(np.cumsum(lengths_P) - lengths_P, lengths_P)
    ids_PK = np.full(shape, NO_ID, dtype=np.int64)
    logprobs_PK = np.full(shape, -np.inf)
    with np.errstate(invalid="ignore"):  # a NaN becomes an id below 0
        ids_PK[row, column], logprobs_PK[row, column] = values
    if np.any(ids_PK[row, column] < 0):
        raise ValueError("an alternative's id is below 0")
    return ids_PK, logprobs_PK
