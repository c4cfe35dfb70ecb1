"""A causal language model split into what makes its rows and the head that makes their logits.

Shape suffixes: B = batch, T = ids of a row, N = rows picked for the head, D = hidden size,
V = vocabulary, X = D or V.
"""

import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from perplexit.checkpoints.module_call import ModuleCall, Past, field_of
from perplexit.functional.blocked_nll import BLOCKED_COLUMNS, blocked_statistics
from perplexit.functional.nll import HeadRequest, TokenStatistics, statistics_by_chunks
from perplexit.token_columns import Needs, columns_that_need


class ForwardPass(Protocol):
    """A forward pass in two steps: rows for every position, then logits for the rows wanted."""

    kind: str  # "chunked (linear)", "chunked (own forward)" or "whole forward"
    keeps_logits: bool  # the rows are whole logits, so memory grows with batch × window × V
    takes_mask: bool  # an attention mask can be given; without one, rows are never padded

    takes_cache: bool  # keys and values of earlier ids can be given
    alone: bool  # a window's rows depend on its batch or length: it runs whole, by itself

    def rows(self, ids_BT: Tensor, mask_BT: Tensor | None, past: Past | None = None) -> Tensor:
        """Return features BTX, one row per position; with a past, the ids follow those in it."""

    def head(self, rows_NX: Tensor) -> Tensor:
        """Return logits NV; they may be overwritten."""


class WrappedForward:
    """A forward pass around another one; what it does not change is the inner one's.

    why_no_cache: why the wrapped pass takes no key/value cache; None: as the inner one.
    """

    def __init__(self, inner: ForwardPass, *, why_no_cache: str | None = None) -> None:
        self._inner = inner
        self.kind, self.keeps_logits = inner.kind, inner.keeps_logits
        self.takes_mask, self.alone = inner.takes_mask, inner.alone
        self.why_no_cache: str | None = why_no_cache or getattr(inner, "why_no_cache", None)
        self.takes_cache = inner.takes_cache and self.why_no_cache is None

    def rows(self, ids_BT: Tensor, mask_BT: Tensor | None, past: Past | None = None) -> Tensor:
        """Return the inner rows."""
        return self._inner.rows(ids_BT, mask_BT, past)


class WholeForward:
    """The model's forward as it is: the rows are its logits."""

    kind = "whole forward"
    keeps_logits = True
    alone = False
    _field = "logits"  # of the module's output

    def __init__(self, module: nn.Module) -> None:
        self._call = ModuleCall(module)
        self.takes_mask, self.takes_cache = self._call.takes_mask, self._call.takes_cache

    def rows(self, ids_BT: Tensor, mask_BT: Tensor | None, past: Past | None = None) -> Tensor:
        """Return the logits, or the final hidden state, of every position."""
        return field_of(self._call(ids_BT, mask_BT, past), self._field)

    def head(self, rows_NX: Tensor) -> Tensor:
        """Return the rows themselves."""
        return rows_NX


class ChunkedForward(WholeForward):
    """The layers give hidden states; a head gives logits for those that are wanted."""

    keeps_logits = False
    _field = "last_hidden_state"

    def __init__(self, body: nn.Module, head: Callable[[Tensor], Tensor], kind: str) -> None:
        super().__init__(body)
        self.kind, self.head = kind, head  # type: ignore[assignment]


class LinearHead:
    """`hidden @ weight.T + bias`; on the CPU, results come by blocks that stay in the cache.

    blocked: False makes whole logits first, into one buffer that every chunk reuses. (A fresh
    tensor of that size is fresh memory from the system each time, whose page faults cost a tenth of
    the matrix product.)
    """

    def __init__(self, linear: nn.Linear, *, blocked: bool = True) -> None:
        self.linear = linear
        self._room = threading.local()  # windows may be scored side by side
        self.blocked = blocked and linear.weight.device.type == "cpu"

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Return the logits, valid until the next call."""
        weight: Tensor = self.linear.weight
        bias: Tensor | None = self.linear.bias
        buffer: Tensor | None = getattr(self._room, "buffer_NV", None)
        if buffer is None or len(buffer) < len(hidden_ND) or buffer.dtype != hidden_ND.dtype:
            buffer = hidden_ND.new_empty(len(hidden_ND), len(weight))
            self._room.buffer_NV = buffer
        out_NV = buffer[: len(hidden_ND)]
        if bias is None:
            return torch.mm(hidden_ND, weight.t(), out=out_NV)
        return torch.addmm(bias, hidden_ND, weight.t(), out=out_NV)

    def statistics(
        self, hidden_ND: Tensor, targets_N: Tensor, request: HeadRequest
    ) -> TokenStatistics:
        """Return the columns of the targets; see HeadStatistics. Some need whole logits."""
        wanted = columns_that_need(Needs.LOSS, Needs.DISTRIBUTION)
        if not self.blocked or request.top_k or not BLOCKED_COLUMNS.issuperset(wanted):
            return statistics_by_chunks(self, hidden_ND, targets_N, request)
        return blocked_statistics(
            hidden_ND,
            targets_N,
            self.linear.weight,
            self.linear.bias,
            with_details=request.with_details,
            block_rows=request.chunk_rows,
        )
