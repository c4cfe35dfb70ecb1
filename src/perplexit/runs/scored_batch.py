"""ScoredBatch: the results of windows that were scored together, in memory and as a committed part.

Shape suffix: W = windows of the batch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from perplexit.errors import RunError
from perplexit.token_columns import TokenDetails
from perplexit.untrusted_files import Expected
from perplexit.untrusted_json import parse_json

PART = Expected("a committed part of a run", RunError, "remove the file: it is scored again")
_KNOWN = "known."  # before a column's name: which of its rows are known, where not all are


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """Results of the windows at places `start … stop - 1` of the batch plan's order.

    window_W:      int64, rows of the window table.
    num_targets_W: int64, how many results each window has.
    details:       the results, window after window.
    seconds:       time in the session; decode_seconds: of these, what was not prefill.
    """

    start: int
    stop: int
    window_W: NDArray[np.int64]
    num_targets_W: NDArray[np.int64]
    details: TokenDetails
    seconds: float
    decode_seconds: float = 0.0

    @classmethod
    def of(
        cls,
        places: range,
        window_W: NDArray[np.int64],
        details: Sequence[TokenDetails],
        seconds: float,
        decode_seconds: float = 0.0,
    ) -> "ScoredBatch":
        """Return the batch of the windows at `places`, of which each has its own details."""
        counts_W = np.array([len(window) for window in details], dtype=np.int64)
        joined = TokenDetails.joined(details)
        return cls(places.start, places.stop, window_W, counts_W, joined, seconds, decode_seconds)

    @classmethod
    def joined(cls, batches: Sequence["ScoredBatch"]) -> "ScoredBatch":
        """Return consecutive batches of the plan as one; `batches` holds at least one."""
        return cls(
            start=batches[0].start,
            stop=batches[-1].stop,
            window_W=np.concatenate([batch.window_W for batch in batches]),
            num_targets_W=np.concatenate([batch.num_targets_W for batch in batches]),
            details=TokenDetails.joined([batch.details for batch in batches]),
            seconds=sum(batch.seconds for batch in batches),
            decode_seconds=sum(batch.decode_seconds for batch in batches),
        )

    def to_bytes(self) -> bytes:
        """Return the batch as a safetensors document."""
        columns = dict(self.details.columns)
        columns |= {_KNOWN + n: flags for n, flags in self.details.known.items() if not flags.all()}
        tensors = {f"column.{name}": np.ascontiguousarray(a) for name, a in columns.items()}
        tensors |= {"window": self.window_W, "num_targets": self.num_targets_W}
        seconds = {"prefill": self.seconds - self.decode_seconds, "decode": self.decode_seconds}
        return bytes(save(tensors, metadata={"seconds": json.dumps(seconds)}))

    @classmethod
    def from_bytes(cls, data: bytes, start: int, stop: int) -> "ScoredBatch":
        """Return the batch that `to_bytes` wrote.

        Raises RunError where a column has another length than the windows say.
        """
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        seconds = parse_json(
            header["__metadata__"]["seconds"], PART, dict[str, float], place="a part"
        )
        window_W, num_targets_W = tensors.pop("window"), tensors.pop("num_targets")
        columns = {name.removeprefix("column."): array for name, array in tensors.items()}
        total = int(num_targets_W.sum()) if num_targets_W.dtype.kind == "i" else -1
        shaped = window_W.shape == num_targets_W.shape == (len(window_W),)
        long = all(len(column) == total for column in columns.values())
        if not (shaped and long and "nll" in columns and int(window_W.min(initial=0)) >= 0):
            PART.refuse(f"part {start}-{stop}", "columns of other lengths")
        known = {n: columns.pop(n) for n in [*columns] if n.startswith(_KNOWN)}
        details = TokenDetails(columns, {n.removeprefix(_KNOWN): a for n, a in known.items()})
        return cls(
            start,
            stop,
            window_W,
            num_targets_W,
            details,
            sum(seconds.values()),
            seconds["decode"],
        )
