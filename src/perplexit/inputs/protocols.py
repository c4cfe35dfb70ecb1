"""Named, versioned protocols: how windows, BOS and denominators are chosen.

A protocol is one entry of PROTOCOLS. `resolve_protocol` turns its name and the caller's options
into a ResolvedProtocol, in which nothing is left open; that is what the token file records.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perplexit.errors import EmptyScoreError, UsageError
from perplexit.inputs.windows import (
    BosPolicy,
    WindowArray,
    disjoint_windows,
    document_windows,
    mlc_windows,
    qefficient_windows,
    sliding_windows,
)

BosOption = Literal["auto", "none", "first", "every"]
Aggregate = Literal["tokens", "window-means"]
Generator = Callable[[NDArray[np.int64], "ResolvedProtocol"], WindowArray]

BLANK_LINE = "\n\n"


@dataclass(frozen=True, slots=True)
class Protocol:
    """One named way to cut text into windows.

    joined_with: the string between documents where they become one; None: windows never cross.
    max_length:  the default; None: a window is as long as its document.
    stride:      the default as a function of max_length; None: the protocol has no stride.
    bos:         the BOS policies it allows (`auto` resolves to `none` or `first`).
    aggregate:   how the tool it is named after turns losses into its perplexity.
    """

    name: str
    version: int
    summary: str
    generate: Generator
    joined_with: str | None = None
    max_length: int | None = 1024
    stride: Callable[[int], int] | None = None
    bos: tuple[BosPolicy, ...] = ("none", "first", "every")
    aggregate: Aggregate = "tokens"


@dataclass(frozen=True, slots=True)
class ResolvedProtocol:
    """A protocol with every option settled: what decides the windows, and nothing else."""

    name: str
    version: int
    max_length: int | None
    stride: int | None
    bos: BosPolicy
    prefix_id: int  # -1 without a BOS
    joined_with: str | None
    aggregate: Aggregate

    def windows(
        self, lengths_D: ArrayLike, *, first_document: int = 0, own_bos_D: ArrayLike = False
    ) -> WindowArray:
        """The window table of documents of these lengths, numbered from `first_document`: [W, 7].

        `own_bos_D` marks documents whose ids begin with the BOS already. Their windows start after
        it and the protocol's own BOS takes its place, so that no model sees two.
        """
        lengths = np.asarray(lengths_D, dtype=np.int64)
        if self.max_length is not None and self.name == "document":
            self._check_lengths(lengths, first_document)
        own = np.broadcast_to(np.asarray(own_bos_D, dtype=np.int64), lengths.shape)
        own = own * int(self.bos != "none")
        table = PROTOCOLS[self.name].generate(lengths - own, self)
        table[:, 1:5] += own[table[:, 0], None]
        table[:, 0] += first_document
        return table

    def to_json(self) -> dict[str, Any]:
        """The protocol as the token file's spec records it."""
        return {field: getattr(self, field) for field in self.__slots__}

    def _check_lengths(self, lengths_D: NDArray[np.int64], first_document: int) -> None:
        fed_D = lengths_D + int(self.bos != "none")
        too_long = np.flatnonzero(fed_D > (self.max_length or 0))
        if len(too_long):
            document = int(too_long[0])
            raise UsageError(
                f"The protocol 'document' feeds a document in one window of at most max_length = "
                f"{self.max_length} ids, but document {first_document + document} needs "
                f"{fed_D[document]}. Raise max_length, or use the protocol 'sliding'."
            )


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="sliding",
            version=1,
            summary="windows advance by stride; each target is scored once, with long context",
            generate=lambda lengths_D, plan: sliding_windows(
                lengths_D, max_length=plan.max_length or 0, stride=plan.stride or 0, **_bos(plan)
            ),
            stride=lambda max_length: max_length // 2,
        ),
        Protocol(
            name="disjoint",
            version=1,
            summary="consecutive chunks; the first id of each is context alone",
            generate=lambda lengths_D, plan: disjoint_windows(
                lengths_D, max_length=plan.max_length or 0, **_bos(plan)
            ),
        ),
        Protocol(
            name="document",
            version=1,
            summary="one window a document",
            generate=lambda lengths_D, plan: document_windows(lengths_D, **_bos(plan)),
            max_length=None,
        ),
        Protocol(
            name="qefficient",
            version=1,
            summary="QEfficient: joined by blank lines, full windows, overlap scored twice",
            generate=lambda lengths_D, plan: qefficient_windows(
                lengths_D, max_length=plan.max_length or 0, stride=plan.stride or 0, **_bos(plan)
            ),
            joined_with=BLANK_LINE,
            max_length=2048,
            stride=lambda max_length: max_length // 2,
            bos=("none", "first"),
        ),
        Protocol(
            name="mlc",
            version=1,
            summary="MLC: joined by blank lines, short tails kept, mean of window means",
            generate=lambda lengths_D, plan: mlc_windows(
                lengths_D, max_length=plan.max_length or 0, stride=plan.stride or 0, **_bos(plan)
            ),
            joined_with=BLANK_LINE,
            max_length=256,
            stride=lambda max_length: max_length // 2,
            bos=("none", "first"),
            aggregate="window-means",
        ),
    )
}


def resolve_protocol(
    name: str,
    *,
    max_length: int | None = None,
    stride: int | None = None,
    bos: str = "auto",
    added_prefix_id: int | None = None,
    bos_id: int | None = None,
) -> ResolvedProtocol:
    """The protocol `name` with defaults filled in and every option checked.

    `added_prefix_id` is the token that the tokenizer itself puts before a text (None: it adds
    none), `bos_id` its BOS token. Raises UsageError for an unknown name, a value out of range, and
    an option that contradicts the protocol.
    """
    protocol = PROTOCOLS.get(name)
    if protocol is None:
        raise UsageError(f"Unknown protocol {name!r}. Known: {', '.join(PROTOCOLS)}.")
    length = protocol.max_length if max_length is None else max_length
    if length is not None and length < 2:
        raise UsageError(
            f"max_length must be at least 2 (one id of context and one target), got {length}."
        )
    policy, prefix_id = _resolve_bos(protocol, bos, added_prefix_id, bos_id)
    return ResolvedProtocol(
        name=protocol.name,
        version=protocol.version,
        max_length=length,
        stride=_resolve_stride(protocol, stride, length),
        bos=policy,
        prefix_id=prefix_id,
        joined_with=protocol.joined_with,
        aggregate=protocol.aggregate,
    )


def protocol_perplexity(
    protocol: Mapping[str, Any], nll_N: NDArray[np.floating], window_N: NDArray[np.integer]
) -> float:
    """The perplexity as the tool that the protocol is named after computes it.

    `tokens`: exp(mean of nll). `window-means`: exp(mean over windows of their mean nll). Sums are
    float64; `protocol` is the spec's entry, `window_N` the window of each scored token.
    Raises EmptyScoreError without a scored token.
    """
    if not len(nll_N):
        raise EmptyScoreError("No token was scored, so there is no perplexity to compute.")
    nll = np.asarray(nll_N, dtype=np.float64)
    if protocol["aggregate"] == "window-means":
        _, row_N, count_W = np.unique(window_N, return_inverse=True, return_counts=True)
        mean = float((np.bincount(row_N, weights=nll) / count_W).mean())
    else:
        mean = float(nll.mean())
    with np.errstate(over="ignore"):
        return float(np.exp(mean))


def _resolve_stride(protocol: Protocol, stride: int | None, max_length: int | None) -> int | None:
    if protocol.stride is None or max_length is None:
        if stride is not None:
            raise UsageError(
                f"The protocol {protocol.name!r} has no stride, got {stride}. Leave it out, or use "
                f"the protocol 'sliding'."
            )
        return None
    chosen = protocol.stride(max_length) if stride is None else stride
    if not 1 <= chosen <= max_length:
        raise UsageError(
            f"stride must be between 1 and max_length = {max_length}, got {chosen}: a larger one "
            f"would leave tokens unscored."
        )
    return chosen


def _resolve_bos(
    protocol: Protocol, bos: str, added_prefix_id: int | None, bos_id: int | None
) -> tuple[BosPolicy, int]:
    """(policy, the id it puts before windows or -1)."""
    if bos == "auto":
        return ("none", -1) if added_prefix_id is None else ("first", added_prefix_id)
    if bos not in get_args(BosPolicy):
        raise UsageError(f"bos must be one of {', '.join(get_args(BosOption))}, got {bos!r}.")
    policy: BosPolicy = bos  # type: ignore[assignment]  # narrowed by the check above
    if policy not in protocol.bos:
        raise UsageError(
            f"The protocol {protocol.name!r} allows bos {', '.join(protocol.bos)} or auto, got "
            f"{policy!r}. Leave bos out, or use the protocol 'sliding'."
        )
    if policy == "none":
        return policy, -1
    chosen = bos_id if bos_id is not None else added_prefix_id
    if chosen is None:
        raise UsageError(
            f"bos {policy!r} needs a tokenizer with a BOS token, and this one names none (an EOS "
            f"is never put in its place). Use bos 'none', or a tokenizer folder whose "
            f"tokenizer_config.json names a bos_token."
        )
    return policy, chosen


def _bos(plan: ResolvedProtocol) -> dict[str, Any]:
    return {"bos": plan.bos, "bos_id": plan.prefix_id}
