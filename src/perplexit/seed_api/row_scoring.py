"""Rows through a session in batches: the session that is meant, and each row's losses in order.

Shape suffix: N = targets of a row.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import EngineOutOfMemoryError, UsageError
from perplexit.inputs.windows import WindowIds
from perplexit.metrics.totals import require_finite
from perplexit.sessions.base import InferenceSession
from perplexit.sessions.registry import opened_session


def session_of(given: Any, *, device: Any = None) -> AbstractContextManager[InferenceSession]:
    """Return the session of a session, an address or a module; see `opened_session`."""
    return opened_session(given, device=None if device is None else str(device))


def regrouped(batches: Iterable[Sequence[WindowIds]], size: int) -> Iterator[list[WindowIds]]:
    """Yield the same windows in batches of `size`, the last one shorter."""
    if size < 1:
        raise UsageError(f"batch_size must be at least 1, got {size}: give a number of rows")
    windows = chain.from_iterable(batches)
    while batch := list(islice(windows, size)):
        yield batch


def row_losses(
    session: InferenceSession, batches: Iterable[Sequence[WindowIds]]
) -> Iterator[tuple[WindowIds, NDArray[np.float32]]]:
    """Yield each window with the nll of its targets, nats; one call per batch.

    A window without targets is not fed. A batch that does not fit is halved.
    Raises NonFiniteError that names row, position and token of the first NaN or infinite loss.
    """
    for batch in batches:
        fed = [window for window in batch if len(window.targets_N)]
        losses = iter(_batch_losses(session, fed) if fed else [])
        for window in batch:
            nll_N = next(losses) if len(window.targets_N) else np.empty(0, dtype=np.float32)
            require_finite(
                nll_N,
                window_M=np.full(len(nll_N), window.index),
                position_M=window.targets_N,
                token_id_M=window.ids_T[window.targets_N],
            )
            yield window, nll_N


def _batch_losses(
    session: InferenceSession, windows: Sequence[WindowIds]
) -> list[NDArray[np.float32]]:
    try:
        return session.token_nll(windows)
    except EngineOutOfMemoryError:
        if len(windows) == 1:
            raise
    half = len(windows) // 2
    return _batch_losses(session, windows[:half]) + _batch_losses(session, windows[half:])
