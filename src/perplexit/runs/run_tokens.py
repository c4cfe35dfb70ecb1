"""RunTokens: a row a scored token, as columns, in memory or in `tokens.parquet`.

Shape suffixes: R = rows (scored tokens over all windows), K = alternatives a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from perplexit.errors import RunError
from perplexit.untrusted_files import Expected, stated
from perplexit.untrusted_tensors import read_parquet

ROWS_PER_GROUP = 1 << 18
DIVERGENCES = (
    "kl",
    "reverse_kl",
    "js",
    "same_top1",
    "top_k_agreement",
    "delta_p",
    "reference_top_p",
    "kl_high",
)


_PLAIN_TYPES = {
    "document": pa.int32(),
    "window": pa.int32(),
    "position": pa.int32(),
    "token_index": pa.int64(),
    "byte_start": pa.int64(),
    "num_bytes": pa.int32(),
    "num_words": pa.int32(),
    "token_id": pa.int32(),
    "token_bytes": pa.large_binary(),
    "nll": pa.float32(),
}
_DOMAIN_TYPE = pa.dictionary(pa.int32(), pa.string())
EXPECTED = Expected(
    "a run's tokens", RunError, "`perplexit runs verify` says more, or evaluate again"
)


def read_token_table(path: Path) -> pa.Table:
    """The table of a `tokens.parquet`, each column of its type.

    Raises RunError where it cannot be read, or a value lies outside what it counts.
    """
    table = read_parquet(path, EXPECTED)
    for name, kind in {**_PLAIN_TYPES, "domain": _DOMAIN_TYPE}.items():
        found = table.schema.field(name).type if name in table.column_names else "no such column"
        if found != kind:
            EXPECTED.refuse(path, f"the column {name} of type {found}, not {kind}")
    _check_optional(path, table.schema)
    with stated(path, EXPECTED):
        for name in ("document", "window", "position", "token_index", "num_bytes", "num_words"):
            column = table.column(name)
            if column.null_count or (pc.min(column).as_py() or 0) < 0:
                EXPECTED.refuse(path, f"the column {name} with a value below 0, or with none")
    return table


def _check_optional(path: Path, schema: pa.Schema) -> None:
    """Raise RunError where a column that not every run has is of another type."""
    kinds = {name: pa.float32() for name in ("entropy", *DIVERGENCES)}
    kinds |= {"rank": pa.int32(), "same_top1": pa.bool_()}
    lists = {"top_ids": pa.int32(), "top_logprobs": pa.float32()}
    sizes = set()
    for column in schema:
        kind = column.type
        fits = kind == kinds.get(column.name, kind)
        if column.name in lists:
            fits = pa.types.is_fixed_size_list(kind) and kind.value_type == lists[column.name]
            sizes.add(kind.list_size if fits else -1)
        if not fits or len(sizes) > 1:
            EXPECTED.refuse(path, f"the column {column.name} of type {kind}")
    if sizes and not lists.keys() <= set(schema.names):
        EXPECTED.refuse(path, "one of top_ids and top_logprobs without the other")


@dataclass(frozen=True)
class PartialColumn:
    """A column that is known for some rows only; the values of the others mean nothing."""

    values: NDArray[Any]
    known_R: NDArray[np.bool_]

    def take(self, rows: NDArray[np.integer]) -> "PartialColumn":
        """The chosen rows."""
        return PartialColumn(self.values[rows], self.known_R[rows])

    def to_arrow(self, rows: slice, kind: pa.DataType) -> pa.Array:
        """Some rows, with null for what is not known."""
        part, unknown = self.values[rows], pa.array(~self.known_R[rows])
        if not pa.types.is_fixed_size_list(kind):
            return pa.array(part, kind, mask=~self.known_R[rows])
        flat = pa.array(part.reshape(-1), kind.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=unknown)

    @classmethod
    def of_arrow(cls, column: pa.ChunkedArray) -> "PartialColumn":
        """The column of a table, null where it is not known."""
        known_R = column.is_valid().to_numpy()
        if pa.types.is_fixed_size_list(column.type):
            size = column.type.list_size
            values = np.zeros((len(column), size), column.type.value_type.to_pandas_dtype())
            values[known_R] = column.combine_chunks().flatten().to_numpy().reshape(-1, size)
        else:
            values = np.zeros(len(column), column.type.to_pandas_dtype())
            values[known_R] = column.drop_null().to_numpy()
        return cls(values, known_R)


@dataclass(frozen=True)
class RunTokens:
    """Per-token results in window order; a token that two windows score has two rows.

    document:    int32; window: int32 (row of the window table); position: int32, the target's
                 index in the ids its window was fed; token_index: int64, in the document.
    byte_start:  int64, in the document's UTF-8; num_bytes: int32; num_words: int32, words that
                 begin in the token. -1 / 0 where the input holds ids without text.
    domain:      int32 codes into `domains`, -1 where the document has none.
    nll:         float32, nats. entropy: float32, nats. rank: int32, 1 = most likely.
    top_ids / top_logprobs: (R, K), most likely first.
    token_bytes: the UTF-8 bytes each token stands for.
    kl … reference_top_p: divergences from a reference, where the run had one: KL(reference ‖
                 candidate), KL(candidate ‖ reference), Jensen-Shannon (nats), whether both find
                 the same token most likely, the share of the top 10 in common, the change of the
                 target's probability, the reference's probability of its most likely token.
    kl_high:     where only a part of the reference is known: `kl` (and reverse_kl, js) are lower
                 bounds, and this is the KL's upper one.
    partial:     what a session gave for some windows only. Such a column is None above, so that no
                 figure is made of it; the file has null where it is not known.
    """

    document: NDArray[np.int32]
    window: NDArray[np.int32]
    position: NDArray[np.int32]
    token_index: NDArray[np.int64]
    byte_start: NDArray[np.int64]
    num_bytes: NDArray[np.int32]
    num_words: NDArray[np.int32]
    domain: NDArray[np.int32]
    domains: tuple[str, ...]
    token_id: NDArray[np.int32]
    nll: NDArray[np.float32]
    entropy: NDArray[np.float32] | None = None
    rank: NDArray[np.int32] | None = None
    top_ids: NDArray[np.int32] | None = None
    top_logprobs: NDArray[np.float32] | None = None
    token_bytes: Any = None  # pyarrow LargeBinaryArray
    kl: NDArray[np.float32] | None = None
    reverse_kl: NDArray[np.float32] | None = None
    js: NDArray[np.float32] | None = None
    same_top1: NDArray[np.bool_] | None = None
    top_k_agreement: NDArray[np.float32] | None = None
    delta_p: NDArray[np.float32] | None = None
    reference_top_p: NDArray[np.float32] | None = None
    kl_high: NDArray[np.float32] | None = None
    partial: Mapping[str, PartialColumn] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.nll)

    def text_of(self, row: int) -> str:
        """The text that a row's token stands for; bytes that are no whole character as U+FFFD."""
        if self.token_bytes is None:
            return f"<{int(self.token_id[row])}>"
        data: bytes = self.token_bytes[row].as_py()
        return data.decode("utf-8", errors="replace")

    def write(self, path: Path) -> None:
        """Write as Parquet, row group by row group, byte for byte the same for equal columns."""
        schema = self._schema()
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for start in range(0, max(len(self), 1), ROWS_PER_GROUP):
                writer.write_batch(self._batch(schema, start, start + ROWS_PER_GROUP))

    def _schema(self) -> pa.Schema:
        columns = [
            ("document", _PLAIN_TYPES["document"]),
            ("domain", _DOMAIN_TYPE),
            *(item for item in _PLAIN_TYPES.items() if item[0] != "document"),
            ("entropy", pa.float32()),
            ("rank", pa.int32()),
        ]
        some = self.partial.get("top_ids")
        top_ids = self.top_ids if some is None else some.values
        if top_ids is not None:
            columns.append(("top_ids", pa.list_(pa.int32(), top_ids.shape[1])))
            columns.append(("top_logprobs", pa.list_(pa.float32(), top_ids.shape[1])))
        for name in DIVERGENCES:
            if getattr(self, name) is not None or name in self.partial:
                columns.append((name, pa.bool_() if name == "same_top1" else pa.float32()))
        return pa.schema(columns)

    def _batch(self, schema: pa.Schema, start: int, stop: int) -> pa.RecordBatch:
        stop = min(stop, len(self))
        arrays = []
        for column in schema:
            values = getattr(self, column.name)
            part = None if values is None else values[start:stop]
            if column.name in self.partial:
                rows = slice(start, stop)
                arrays.append(self.partial[column.name].to_arrow(rows, column.type))
            elif part is None:
                arrays.append(pa.nulls(stop - start, column.type))
            elif column.name == "domain":
                codes = pa.array(part, mask=part < 0)
                names = pa.array(self.domains, pa.string())
                arrays.append(pa.DictionaryArray.from_arrays(codes, names))
            elif pa.types.is_fixed_size_list(column.type):
                flat = pa.array(part.reshape(-1), column.type.value_type)
                arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=column.type))
            elif column.name == "token_bytes":
                arrays.append(part)
            else:
                arrays.append(pa.array(part, column.type))
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    @classmethod
    def read(cls, path: Path) -> "RunTokens":
        """The columns of a `tokens.parquet`; raises RunError where it cannot be read."""
        table = read_token_table(path)
        with stated(path, EXPECTED):
            return cls._from_table(table)

    @classmethod
    def _from_table(cls, table: pa.Table) -> "RunTokens":
        def numbers(name: str) -> NDArray[Any]:
            return np.asarray(table.column(name).to_numpy())

        def numbers_or_none(name: str) -> NDArray[Any] | None:
            if name not in table.column_names or table.column(name).null_count:
                return None
            column = table.column(name)
            if pa.types.is_fixed_size_list(column.type):
                flat = column.combine_chunks().flatten().to_numpy()
                return np.asarray(flat).reshape(-1, column.type.list_size)
            return np.asarray(column.to_numpy())

        domain = table.column("domain").unify_dictionaries().combine_chunks()
        if isinstance(domain, pa.ChunkedArray):  # an empty table has no chunk to combine
            domain = pa.DictionaryArray.from_arrays(
                pa.array([], pa.int32()), pa.array([], pa.string())
            )
        token_bytes = table.column("token_bytes")
        detailed = ("entropy", "rank", "top_ids", "top_logprobs", *DIVERGENCES)
        partial = {
            name: PartialColumn.of_arrow(table.column(name))
            for name in detailed
            if name in table.column_names and 0 < table.column(name).null_count < len(table)
        }
        return cls(
            document=numbers("document"),
            window=numbers("window"),
            position=numbers("position"),
            token_index=numbers("token_index"),
            byte_start=numbers("byte_start"),
            num_bytes=numbers("num_bytes"),
            num_words=numbers("num_words"),
            domain=domain.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32),
            domains=tuple(domain.dictionary.to_pylist()),
            token_id=numbers("token_id"),
            nll=numbers("nll"),
            entropy=numbers_or_none("entropy"),
            rank=numbers_or_none("rank"),
            top_ids=numbers_or_none("top_ids"),
            top_logprobs=numbers_or_none("top_logprobs"),
            **{name: numbers_or_none(name) for name in DIVERGENCES},
            partial=partial,
            token_bytes=None if token_bytes.null_count else token_bytes.combine_chunks(),
        )
