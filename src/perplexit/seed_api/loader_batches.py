"""A data loader's batches → windows: one row is one window, scored from its second id on.

Shape suffixes: R = rows of a batch, T = ids of a row, N = targets of a row.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import UsageError
from perplexit.inputs.windows import WindowIds

NOT_SCORED = -100  # in `labels`, as torch's cross entropy has it
Row = tuple[Any, Any, Any]  # ids, attention mask or None, labels or None


def window_batches(
    data_loader: Iterable[Any], *, ctx_len: int | None = None, pad_id: int | None = None
) -> Iterator[list[WindowIds]]:
    """Yield the loader's rows as windows, in order, one list per batch.

    A batch is an array or tensor of ids (a row, or rows), a list of rows, `(ids, mask)`, or a
    mapping with `input_ids` and, where there are any, `attention_mask` and `labels`.

    mask:    1 for a token, 0 for padding, on either side. Padding is neither fed nor scored.
    labels:  where they are -100, the token is context only; elsewhere they repeat the id.
    pad_id:  without mask and labels, targets equal to it are not scored. With a mask or labels
             those alone decide, so a real token whose id is the pad id is scored.
    ctx_len: a row with more tokens is an error.
    """
    first = 0
    for batch in data_loader:
        windows = [
            _window(index, row, ctx_len, pad_id) for index, row in enumerate(_rows(batch), first)
        ]
        yield windows
        first += len(windows)


def _rows(batch: Any) -> Iterator[Row]:
    parts = [batch]
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise UsageError(
                f"a mapping batch must have 'input_ids', got {sorted(map(str, batch))}: "
                "name the ids so"
            )
        parts = [batch.get(name) for name in ("input_ids", "attention_mask", "labels")]
    elif isinstance(batch, tuple) or _is_collated(batch):
        parts = list(batch)
        if len(parts) not in (1, 2):
            raise UsageError(
                f"a batch must be ids or (ids, mask), got {len(parts)} parts: give labels in a "
                "mapping, as {'input_ids': …, 'labels': …}"
            )
    ids, *others = [None if part is None else _row_list(part) for part in parts]
    ids = ids or []
    columns = [*others, None, None][:2]
    for name, column in zip(("mask", "labels"), columns, strict=True):
        if column is not None and len(column) != len(ids):
            raise UsageError(
                f"a batch's {name} must have a row for each of its {len(ids)} rows of ids, got "
                f"{len(column)}: give both the same shape"
            )
    for place, row_ids in enumerate(ids):
        mask, labels = (None if column is None else column[place] for column in columns)
        yield row_ids, mask, labels


def _is_collated(batch: Any) -> bool:
    """Return whether a list is [ids, mask], as torch's default collation makes it, not rows."""
    return isinstance(batch, list) and bool(batch) and getattr(batch[0], "ndim", 0) == 2


def _row_list(part: Any) -> Sequence[Any]:
    """Return the rows of ids, mask or labels; one row where there is no row dimension."""
    if hasattr(part, "ndim"):
        array = _array(part)
        return list(np.atleast_2d(array)) if array.size else []
    if not isinstance(part, Sequence) or isinstance(part, str):
        raise UsageError(
            f"expected a batch of token ids, got {type(part).__name__}: a loader yields rows of "
            "ids (arrays, tensors or lists), (ids, mask), or mappings with 'input_ids'"
        )
    rows = list(part)
    return [rows] if rows and np.ndim(_array(rows[0])) == 0 else rows


def _array(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):  # a tensor, on any device
        values = values.detach().cpu().numpy()
    return np.asarray(values)


def _window(index: int, row: Row, ctx_len: int | None, pad_id: int | None) -> WindowIds:
    ids, mask, labels = row
    ids_T = _integers(ids, index, "ids")
    fed_T = scored_T = np.ones(len(ids_T), dtype=np.bool_)
    if mask is not None:
        fed_T = _mask(mask, len(ids_T), index)
    if labels is not None:
        scored_T = _scored_by_labels(labels, ids_T, index)
    if mask is None and labels is None and pad_id is not None:
        scored_T = ids_T != pad_id
    ids_T, scored_T = ids_T[fed_T], scored_T[fed_T]
    if ctx_len is not None and len(ids_T) > ctx_len:
        raise UsageError(
            f"expected rows of at most ctx_len = {ctx_len} tokens, got {len(ids_T)} in row "
            f"{index}: cut the text into windows of ctx_len, or raise ctx_len"
        )
    targets_N = np.flatnonzero(scored_T)
    targets_N = targets_N[targets_N >= 1].astype(np.int64)
    if len(targets_N):  # what follows the last target cannot change a causal model's answer
        ids_T = ids_T[: targets_N[-1] + 1]
    return WindowIds(index, ids_T.astype(np.int32), targets_N)


def _integers(values: Any, index: int, name: str) -> NDArray[np.int64]:
    array = _array(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise UsageError(
            f"expected a row of integer {name}, got {array.dtype} of shape {array.shape} in row "
            f"{index}: batches are rows × ids of token ids, not embeddings or text"
        )
    return array.astype(np.int64)


def _mask(values: Any, length: int, index: int) -> NDArray[np.bool_]:
    array = _array(values)
    if array.shape != (length,) or not np.isin(array, (0, 1)).all():
        raise UsageError(
            f"expected a mask of {length} zeros and ones in row {index}, got "
            f"{array.dtype} of shape {array.shape}: the second part of a batch is the attention "
            "mask; give labels in a mapping, as {'input_ids': …, 'labels': …}"
        )
    mask_T = array.astype(bool)
    if np.count_nonzero(np.diff(mask_T.astype(np.int8), prepend=0) == 1) > 1:
        raise UsageError(
            f"expected padding only before or after a row's tokens, got a hole in the mask of row "
            f"{index}: mark tokens that are context only with -100 in 'labels'"
        )
    return mask_T


def _scored_by_labels(values: Any, ids_T: NDArray[np.int64], index: int) -> NDArray[np.bool_]:
    labels_T = _integers(values, index, "labels")
    if labels_T.shape != ids_T.shape:
        raise UsageError(
            f"expected a label for each of {len(ids_T)} ids in row {index}, got {len(labels_T)}: "
            "labels[t] stands for ids[t], unshifted"
        )
    scored_T: NDArray[np.bool_] = labels_T != NOT_SCORED
    wrong = np.flatnonzero(scored_T & (labels_T != ids_T))
    if len(wrong):
        at = int(wrong[0])
        raise UsageError(
            f"expected labels that repeat the id or are -100, got {labels_T[at]} for id "
            f"{ids_T[at]} at position {at} of row {index}: labels are not shifted by one"
        )
    return scored_T
