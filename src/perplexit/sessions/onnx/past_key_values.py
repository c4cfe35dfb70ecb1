"""A key/value cache that an ONNX program takes and gives: growing, or retained at a fixed size.

Shape suffixes: B = rows fed, T = ids fed, S = ids in the cache, N = picked positions,
V = vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import CapabilityError, ModelError
from perplexit.sessions.base import FedRows, Places
from perplexit.sessions.logit_rows import details_of_rows
from perplexit.sessions.onnx.ports import GraphPorts
from perplexit.token_columns import TokenDetails

Feed = dict[str, Any]
Run = Callable[[list[str], Feed], list[Any]]  # names of outputs, OrtValues or arrays → OrtValues


@dataclass
class _Group:
    """Consecutive rows with caches of one length."""

    num_rows: int
    num_ids: int
    values: list[Any]  # in the order of the ports' caches: OrtValues, or arrays to make them of


class OnnxCache:
    """The presents of the last call, which are the pasts of the next; see KeyValueCache.

    run: the program, on OrtValues, so that a cache is never copied on its way through.
    """

    def __init__(self, ports: GraphPorts, run: Run, *, program: str) -> None:
        self._ports, self._run, self._program = ports, run, program
        self._groups: list[_Group] = []

    def feed(
        self, ids_BT: NDArray[np.int64], *, first_row: int, start: int, picked: Places
    ) -> FedRows:
        """Feed a block of ids, in the calls that the program's shapes allow."""
        group = self._group(len(ids_BT), first_row, start)
        row_N, column_N = picked
        logits_NV: NDArray[np.float32] | None = None
        for a, b in self._pieces(ids_BT.shape[1], column_N):
            logits_BTV = self._step(group, ids_BT[:, a:b], start + a)
            inside = np.flatnonzero((column_N >= a) & (column_N < b))
            if not len(inside):
                continue
            if logits_NV is None:
                logits_NV = np.empty((len(row_N), logits_BTV.shape[-1]), np.float32)
            # counted from the end: a program may give the last position alone
            logits_NV[inside] = logits_BTV[row_N[inside], column_N[inside] - b]
        return _OnnxRows(np.empty((0, 1), np.float32) if logits_NV is None else logits_NV)

    def _group(self, num_rows: int, first_row: int, start: int) -> _Group:
        """Return the rows that are fed, as one group at the front; finished ones are left out."""
        if start == 0:
            if first_row == 0:
                self._groups = []
            group = _Group(num_rows, 0, self._ports.empty_pasts(self._ports.batch_size or num_rows))
            self._groups.append(group)
            return group
        if self._ports.batch_size is None:
            kept = [g for g in self._groups if g.num_ids == start]
            if len(kept) > 1 or kept[0].num_rows > num_rows:
                self._groups = [_joined(kept, num_rows)]
        return self._groups[0]

    def _pieces(self, length: int, column_N: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Return the block cut so that each piece is a call that gives all that is picked in it."""
        cuts = {0, length}
        if self._ports.last_position_only:
            cuts |= {int(column) + 1 for column in column_N}
        most = self._ports.length or length
        edges = sorted(cuts)
        return [
            (a, min(a + most, stop))
            for begin, stop in pairwise(edges)
            for a in range(begin, stop, most)
        ]

    def _step(self, group: _Group, ids_BT: NDArray[np.int64], start: int) -> NDArray[np.float32]:
        """Return one call's logits, (rows fed, ids fed or 1, V), float32; the cache moves on."""
        num_rows, num_ids = ids_BT.shape
        block_BT = self._padded(ids_BT, start)
        feed = self._ports.inputs(block_BT, start, group.values)
        names = [self._ports.logits.name, *(cache.present for cache in self._ports.caches)]
        logits, *group.values = self._run(names, feed)
        group.num_ids = start + num_ids
        return self._checked(logits.numpy(), block_BT)[:num_rows, :num_ids]

    def _padded(self, ids_BT: NDArray[np.int64], start: int) -> NDArray[np.int64]:
        """Return the ids at the program's fixed sizes.

        Rows are added at the end. Ids are added on the right: a retained cache takes them at
        places that are written again before anything sees them.
        """
        rows = (self._ports.batch_size or len(ids_BT)) - len(ids_BT)
        columns = (self._ports.length or ids_BT.shape[1]) - ids_BT.shape[1]
        capacity = self._ports.capacity
        if columns and (capacity is None or start + ids_BT.shape[1] + columns > capacity):
            raise CapabilityError(
                f"expected a block of {self._ports.length} ids, for which {self._program} was "
                f"compiled, got one of {ids_BT.shape[1]} at position {start}; choose prompt_len "
                "and decode_chunk so that blocks are whole, or compile for one id per call"
            )
        return np.pad(ids_BT, ((0, rows), (0, columns)), mode="edge")

    def _checked(
        self, logits: NDArray[np.floating[Any]], block_BT: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return the logits with an axis for positions. Raises ModelError for another number."""
        logits_BTV = logits[:, None] if logits.ndim == 2 else logits
        expected = 1 if self._ports.last_position_only else block_BT.shape[1]
        if logits_BTV.shape[:2] != (len(block_BT), expected):
            raise ModelError(
                f"expected logits for {len(block_BT)} windows at {expected} positions from "
                f"{self._program}, got {logits_BTV.shape[0]} at {logits_BTV.shape[1]}: a cache "
                "inside the program cuts them short; export it without one"
            )
        return logits_BTV.astype(np.float32, copy=False)


def cache_bytes(ports: GraphPorts) -> int:
    """Return bytes of one id's keys and values over all layers."""
    return sum(c.heads * c.head_size * c.past.dtype.itemsize for c in ports.caches)


def with_logits_probed(ports: GraphPorts, run: Run) -> GraphPorts:
    """Return the ports, with the logits' number of positions tried on two ids if not fixed.

    A program may say "any number" and still give the last position alone.
    """
    if ports.length is not None or len(ports.logits.shape) == 2 or ports.logits.size(1) is not None:
        return ports
    rows = ports.batch_size or 1
    feed = ports.inputs(np.zeros((rows, 2), np.int64), 0, ports.empty_pasts(rows))
    (logits,) = run([ports.logits.name], feed)
    shape = ports.logits.shape
    positions = 1 if logits.shape()[1] == 1 else shape[1]
    return replace(ports, logits=replace(ports.logits, shape=(shape[0], positions, *shape[2:])))


@dataclass(frozen=True, slots=True)
class _OnnxRows:
    logits_NV: NDArray[np.float32]

    def details(self, ids_N: NDArray[np.int64], *, with_details: bool, top_k: int) -> TokenDetails:
        """Return the details of the ids as the next tokens; see FedRows."""
        return details_of_rows(self.logits_NV, ids_N, with_details=with_details, top_k=top_k)

    def array(self) -> NDArray[np.float32]:
        """Return the logits; see FedRows."""
        return self.logits_NV


def _joined(groups: list[_Group], num_rows: int) -> _Group:
    """Return the first rows of several groups as one."""
    columns = zip(*(group.values for group in groups), strict=True)
    joined = (np.concatenate([value.numpy() for value in column]) for column in columns)
    return _Group(num_rows, groups[0].num_ids, [values[:num_rows] for values in joined])
