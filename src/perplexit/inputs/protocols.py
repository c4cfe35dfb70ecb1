"""Protocols with their options settled, as the token file records them, and their aggregates.

The protocols themselves are entries of `protocol_table.PROTOCOLS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perplexit.declared_options import check_numbers
from perplexit.errors import EmptyScoreError, UsageError
from perplexit.inputs.protocol_table import PROTOCOLS, Aggregate, Protocol
from perplexit.inputs.windows import BosPolicy, WindowArray

BosOption = Literal["auto", "none", "first", "every"]


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
        """Return the windows of documents of these lengths, numbered from `first_document`: [W, 7].

        `own_bos_D` marks documents whose ids begin with the BOS already. Their windows start after
        it and the protocol's own BOS takes its place, so that no model sees two.
        """
        lengths = np.asarray(lengths_D, dtype=np.int64)
        if self.max_length is not None and self.name == "document":
            self._check_lengths(lengths, first_document)
        own = np.broadcast_to(np.asarray(own_bos_D, dtype=np.int64), lengths.shape)
        own = own * int(self.bos != "none")
        table = PROTOCOLS[self.name].windows(
            lengths - own,
            max_length=self.max_length,
            stride=self.stride,
            bos=self.bos,
            bos_id=self.prefix_id,
        )
        table[:, 1:5] += own[table[:, 0], None]
        table[:, 0] += first_document
        return table

    def to_json(self) -> dict[str, Any]:
        """Return the protocol as the token file's spec records it."""
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


def resolve_protocol(
    name: str,
    *,
    max_length: int | None = None,
    stride: int | None = None,
    bos: str = "auto",
    added_prefix_id: int | None = None,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> ResolvedProtocol:
    """Return the protocol `name` with defaults filled in and every option checked.

    `added_prefix_id` is the token that the tokenizer itself puts before a text (None: it adds
    none), `bos_id` and `eos_id` the tokens that it names so. Raises UsageError for an unknown name,
    a value out of range, and an option that contradicts the protocol.
    """
    check_numbers(max_length=max_length, stride=stride)
    protocol = PROTOCOLS.get(name)
    if protocol is None:
        raise UsageError(f"Unknown protocol {name!r}. Known: {', '.join(PROTOCOLS)}.")
    length = protocol.max_length if max_length is None else max_length
    if length is not None and length < 2:
        raise UsageError(
            f"max_length must be at least 2 (one id of context and one target), got {length}."
        )
    if protocol.fixed_length and length != protocol.max_length:
        raise UsageError(
            f"The protocol {name!r} fixes max_length = {protocol.max_length}, got {length}. Leave "
            f"it out, or use the protocol 'disjoint'."
        )
    policy = _resolve_bos(protocol, bos, added_prefix_id)
    own = (added_prefix_id, bos_id, eos_id)
    return ResolvedProtocol(
        name=protocol.name,
        version=protocol.version,
        max_length=length,
        stride=_resolve_stride(protocol, stride, length),
        bos=policy,
        prefix_id=-1 if policy == "none" else _prefix_id(protocol, bos, *own),
        joined_with=protocol.joined_with,
        aggregate=protocol.aggregate,
    )


def protocol_perplexity(
    protocol: Mapping[str, Any], nll_N: NDArray[np.floating], window_N: NDArray[np.integer]
) -> float:
    """Compute the perplexity as the tool does that the protocol is named after.

    `tokens`: exp(mean of nll). `window-means`: exp(mean over windows of their mean nll).
    `window-perplexities`: mean over windows of exp(mean nll). `hf-guide`: exp of the mean of window
    means, weighted by their target counts, which the guide takes one too small where windows
    overlap. Sums are float64; `protocol` is the spec's entry, `window_N` the window of each token.
    Raises EmptyScoreError without a scored token.
    """
    sum_W, weight_W = protocol_sums(protocol, nll_N, window_N)
    mean = float(sum_W.sum() / weight_W.sum())
    if protocol["aggregate"] == "window-perplexities":
        return mean
    with np.errstate(over="ignore"):
        return float(np.exp(mean))


def protocol_sums(
    protocol: Mapping[str, Any], nll_N: NDArray[np.floating], window_N: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (a sum, its weight) for each window with a scored token: [W] each.

    Their ratio over all windows is the mean that `protocol_perplexity` takes exp of; for
    `window-perplexities` it is the figure itself.
    Raises EmptyScoreError without a scored token.
    """
    if not len(nll_N):
        raise EmptyScoreError("No token was scored, so there is no perplexity to compute.")
    aggregate: Aggregate = protocol["aggregate"]
    _, row_N, count_W = np.unique(window_N, return_inverse=True, return_counts=True)
    sum_W = np.bincount(row_N, weights=np.asarray(nll_N, np.float64)).astype(np.float64)
    if aggregate == "tokens":
        return sum_W, count_W.astype(np.float64)
    mean_W, weight_W = sum_W / count_W, np.ones(len(count_W))
    if aggregate == "window-perplexities":
        with np.errstate(over="ignore"):
            return np.exp(mean_W), weight_W
    if aggregate == "hf-guide":
        overlapping = protocol["stride"] < protocol["max_length"]
        weight_W = count_W - 1.0 * (overlapping & (np.arange(len(count_W)) > 0))
    return mean_W * weight_W, weight_W


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
        raise UsageError(f"stride must be between 1 and max_length = {max_length}, got {chosen}")
    return chosen


def _resolve_bos(protocol: Protocol, bos: str, added_prefix_id: int | None) -> BosPolicy:
    """Return the policy in effect; `auto` follows the tokenizer or the protocol's own prefix."""
    if bos not in get_args(BosOption):
        raise UsageError(f"bos must be one of {', '.join(get_args(BosOption))}, got {bos!r}.")
    if bos == "auto":
        follows = protocol.prefix == "tokenizer"
        return "none" if follows and added_prefix_id is None else "first"
    for policy in protocol.bos:
        if policy == bos:
            return policy
    raise UsageError(
        f"The protocol {protocol.name!r} allows bos {', '.join(protocol.bos)} or auto, got "
        f"{bos!r}. Leave bos out, or use the protocol 'sliding'."
    )


def _prefix_id(
    protocol: Protocol, bos: str, added: int | None, bos_id: int | None, eos_id: int | None
) -> int:
    """Return the token before windows; an EOS only where the protocol itself says so."""
    candidates = [bos_id, added]
    if bos == "auto" and protocol.prefix == "tokenizer":
        candidates.reverse()
    if protocol.prefix == "bos-or-eos":
        candidates.append(eos_id)
    for candidate in candidates:
        if candidate is not None:
            return candidate
    raise UsageError(
        f"The protocol {protocol.name!r} with bos {bos!r} needs a tokenizer with a BOS token, and "
        f"this one names none. Use bos 'none', or a tokenizer folder whose tokenizer_config.json "
        f"names a bos_token."
    )
