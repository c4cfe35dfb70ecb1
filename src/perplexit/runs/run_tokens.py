"""RunTokens: one row per scored token, as columns, in memory or in `tokens.parquet`.

`token_columns` says what each column is. Shape suffixes: R = rows (scored tokens over all windows),
K = alternatives for each token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from perplexit.errors import RunError
from perplexit.token_columns import TOKEN_COLUMNS, Needs, TokenColumn
from perplexit.untrusted_files import Expected, stated
from perplexit.untrusted_tensors import read_parquet

ROWS_PER_GROUP = 1 << 18
EXPECTED = Expected(
    "a run's tokens", RunError, "`perplexit runs verify` says more, or evaluate again"
)
_KINDS = {"bytes": pa.large_binary(), "text": pa.dictionary(pa.int32(), pa.string())}
_IN_EVERY_RUN = (Needs.INPUT, Needs.LOSS)


def read_token_table(path: Path) -> pa.Table:
    """Return the table of a `tokens.parquet`, each column of its type.

    Raises RunError where it cannot be read, or a value lies outside what it counts.
    """
    table = read_parquet(path, EXPECTED)
    names = table.column_names
    lists = {name for name in names if name in TOKEN_COLUMNS and TOKEN_COLUMNS[name].is_list}
    sizes = {getattr(table.schema.field(name).type, "list_size", -1) for name in lists}
    for name, column in TOKEN_COLUMNS.items():
        found = table.schema.field(name).type if name in names else None
        if found is None and column.needs not in _IN_EVERY_RUN and not (column.is_list and lists):
            continue
        kind = _arrow_type(column, max(sizes, default=0))
        if found != kind or len(sizes) > 1:
            there = "no such column" if found is None else found
            EXPECTED.refuse(path, f"the column {name} of type {there}, not {kind}")
    with stated(path, EXPECTED):
        for name, column in TOKEN_COLUMNS.items():
            if column.needs not in _IN_EVERY_RUN or column.unknown == "null":
                continue
            values = table.column(name)
            if values.null_count:
                EXPECTED.refuse(path, f"the column {name} with rows that have no value")
            if column.needs is Needs.INPUT and (pc.min(values).as_py() or 0) < column.lowest:
                EXPECTED.refuse(path, f"the column {name} with a value below {column.lowest}")
    return table


def _arrow_type(column: TokenColumn, list_size: int) -> pa.DataType:
    kind = _KINDS.get(column.dtype)
    if kind is None:
        kind = pa.from_numpy_dtype(np.dtype(column.dtype))
    return pa.list_(kind, list_size) if column.is_list else kind


def _cast(name: str, column: Any) -> Any:
    if isinstance(column, pa.Array):
        return column
    return column.astype("int32" if name == "domain" else TOKEN_COLUMNS[name].dtype, copy=False)


def _array_of(column: pa.ChunkedArray) -> NDArray[Any]:
    if not pa.types.is_fixed_size_list(column.type):
        return np.asarray(column.to_numpy())
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat).reshape(-1, column.type.list_size)


@dataclass(frozen=True)
class PartialColumn:
    """A column that is known for some rows only; the values of the others mean nothing."""

    values: NDArray[Any]
    known_R: NDArray[np.bool_]

    def take(self, rows: NDArray[np.integer]) -> "PartialColumn":
        """Return the chosen rows."""
        return PartialColumn(self.values[rows], self.known_R[rows])

    @classmethod
    def of_arrow(cls, column: pa.ChunkedArray) -> "PartialColumn":
        """Return the column of a table, which is null where it is not known."""
        known_R, known = column.is_valid().to_numpy(), _array_of(column.drop_null())
        values = np.zeros((len(column), *known.shape[1:]), known.dtype)
        values[known_R] = known
        return cls(values, known_R)


class RunTokens:
    """Per-token results in window order: the columns of `TOKEN_COLUMNS` that the run has.

    `tokens.nll` is a column as an array; a column that the run does not have is None.

    domain:      here int32 codes into `domains`, -1 where the document has none.
    token_bytes: a pyarrow LargeBinaryArray, or None where the input holds ids without text.
    top_ids, top_logprobs: of shape (R, K).
    partial:     what a session gave for some windows only. As an attribute such a column is None,
                 so that no figure is made of it; the file has null where it is not known.
    """

    document: NDArray[np.int32]
    window: NDArray[np.int32]
    position: NDArray[np.int32]
    token_index: NDArray[np.int64]
    byte_start: NDArray[np.int64]
    num_bytes: NDArray[np.int32]
    num_words: NDArray[np.int32]
    domain: NDArray[np.int32]
    token_id: NDArray[np.int32]
    token_bytes: Any
    nll: NDArray[np.float32]
    entropy: NDArray[np.float32] | None
    rank: NDArray[np.int32] | None
    top_ids: NDArray[np.int32] | None
    top_logprobs: NDArray[np.float32] | None

    def __init__(
        self,
        columns: Mapping[str, Any],
        *,
        domains: tuple[str, ...] = (),
        partial: Mapping[str, PartialColumn] | None = None,
    ) -> None:
        """Take the columns that are not None, each cast to the schema's type."""
        self.columns = {n: _cast(n, column) for n, column in columns.items() if column is not None}
        self.domains = domains
        self.partial = dict(partial or {})

    def __getattr__(self, name: str) -> Any:
        if name not in TOKEN_COLUMNS:
            raise AttributeError(f"RunTokens has no attribute {name!r}")
        return self.columns.get(name)

    def __len__(self) -> int:
        return len(self.columns["nll"])

    def with_columns(self, **columns: Any) -> "RunTokens":
        """Return the tokens with some columns replaced; None takes one away."""
        return RunTokens({**self.columns, **columns}, domains=self.domains, partial=self.partial)

    def take(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> "RunTokens":
        """Return the chosen rows of every column."""
        flat = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        columns = {
            name: column.take(flat) if isinstance(column, pa.Array) else column[flat]
            for name, column in self.columns.items()
        }
        partial = {name: column.take(np.asarray(flat)) for name, column in self.partial.items()}
        return RunTokens(columns, domains=self.domains, partial=partial)

    def text_of(self, row: int) -> str:
        """Return the text of a row's token; bytes that are no whole character as U+FFFD."""
        if self.token_bytes is None:
            return f"<{int(self.token_id[row])}>"
        data: bytes = self.token_bytes[row].as_py()
        return data.decode("utf-8", errors="replace")

    def table(self) -> pa.Table:
        """Return the columns as an Arrow table, as `tokens.parquet` holds them."""
        given = {**self.columns, **{name: x.values for name, x in self.partial.items()}}
        kinds = {
            name: _arrow_type(column, given[name].shape[1] if column.is_list else 0)
            for name, column in TOKEN_COLUMNS.items()
            if name in given or not column.optional
        }
        arrays = [self._arrow_of(name, kind) for name, kind in kinds.items()]
        return pa.table(arrays, schema=pa.schema(kinds.items()))

    def write(self, path: Path) -> None:
        """Write as Parquet, byte for byte the same for equal columns."""
        pq.write_table(self.table(), path, compression="zstd", row_group_size=ROWS_PER_GROUP)

    def _arrow_of(self, name: str, kind: pa.DataType) -> pa.Array:
        partial = self.partial.get(name)
        column = self.columns.get(name) if partial is None else partial.values
        if column is None:
            return pa.nulls(len(self), kind)
        unknown = None if partial is None else ~partial.known_R
        if isinstance(column, pa.Array):
            return column
        if name == "domain":
            codes = pa.array(column, mask=column < 0)
            return pa.DictionaryArray.from_arrays(codes, pa.array(self.domains, pa.string()))
        if pa.types.is_fixed_size_list(kind):
            flat = pa.array(column.reshape(-1), kind.value_type)
            mask = None if unknown is None else pa.array(unknown)
            return pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=mask)
        return pa.array(column, kind, mask=unknown)

    @classmethod
    def read(cls, path: Path) -> "RunTokens":
        """Return the columns of a `tokens.parquet`; raises RunError where it cannot be read."""
        table = read_token_table(path)
        with stated(path, EXPECTED):
            return cls._from_table(table)

    @classmethod
    def _from_table(cls, table: pa.Table) -> "RunTokens":
        columns: dict[str, Any] = {}
        partial: dict[str, PartialColumn] = {}
        domain = table.column("domain").unify_dictionaries().combine_chunks()
        if isinstance(domain, pa.ChunkedArray):  # an empty table has no chunk to combine
            domain = pa.DictionaryArray.from_arrays(
                pa.array([], pa.int32()), pa.array([], pa.string())
            )
        codes = domain.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        columns["domain"] = codes.astype(np.int32)
        for name in TOKEN_COLUMNS.keys() & set(table.column_names) - {"domain"}:
            column = table.column(name)
            if name == "token_bytes":
                columns[name] = None if column.null_count else column.combine_chunks()
            elif not column.null_count:
                columns[name] = _array_of(column)
            elif column.null_count < len(table):
                partial[name] = PartialColumn.of_arrow(column)
        return cls(columns, domains=tuple(domain.dictionary.to_pylist()), partial=partial)
