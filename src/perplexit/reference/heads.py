"""The head that makes logits of a reference's stored states: kept with them, or loaded again.

Either way it is proven before it is used: on one window, it must give the losses that the reference
recorded.

Shape suffixes: N = targets of one window, D = hidden size, V = vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from perplexit.errors import CapabilityError, FingerprintMismatchError, RunError
from perplexit.functional.nll import (
    DEFAULT_LOGITS_BYTES,
    TokenStatistics,
    rows_within,
    token_statistics,
)
from perplexit.reference.states import ReferenceStates
from perplexit.runs.run import Run
from perplexit.sessions.base import HiddenStateSession, InferenceSession
from perplexit.sessions.registry import load_session
from perplexit.token_columns import TokenDetails

# Nats a token by which the mean of |loss - recorded loss| may exceed what was measured on saving.
_SLACK = {"float32": 1e-4, "float64": 1e-4}
_LOW_PRECISION_SLACK = 1e-2
_SHARE_OF_RANKS = 0.9  # that must be within 1, or 5 % of the rank


class Head(Protocol):
    """Makes logits of hidden states."""

    def logits_of(self, hidden_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of hidden states, (N, V), float32."""


@dataclass(frozen=True, slots=True)
class HeadProof:
    """How far a head's results are from those recorded, over the finite targets of a window.

    nll_mean, nll_max, entropy_mean: of the absolute differences, nats; ranks: the share that agree.
    """

    window: int
    num_tokens: int
    nll_mean: float = 0.0
    nll_max: float = 0.0
    entropy_mean: float = 0.0
    ranks: float = 1.0


def proof_of(
    head: Head,
    window: int,
    states_ND: NDArray[np.float32],
    targets_N: NDArray[np.int64],
    recorded: TokenDetails,
) -> HeadProof:
    """Compare the head's results on a window's states with those that were recorded.

    recorded: `nll` of each target and, where recorded, `entropy` and `rank`.
    Raises RunError where states and results are not of the same targets, or not of this head.
    """
    if len(states_ND) != len(targets_N):
        raise RunError(
            f"expected the states of {len(targets_N)} targets in window {window}, got "
            f"{len(states_ND)}; evaluate the reference again with --save-reference"
        )
    finite_N = np.isfinite(recorded.nll_N)
    if not finite_N.any():
        return HeadProof(window, 0)
    found = _statistics(head, states_ND, targets_N).to_numpy()
    difference = {
        name: np.abs(found.columns[name].astype(np.float64) - column)[finite_N]
        for name, column in recorded.columns.items()
        if name in found.columns
    }
    proof = {
        "nll_mean": float(difference["nll"].mean()),
        "nll_max": float(difference["nll"].max()),
    }
    if "entropy" in difference:
        proof["entropy_mean"] = float(difference["entropy"].mean())
    if "rank" in difference:
        near_N = np.maximum(1, 0.05 * recorded.columns["rank"][finite_N])
        proof["ranks"] = float((difference["rank"] <= near_N).mean())
    return HeadProof(window, int(finite_N.sum()), **proof)


def _statistics(
    head: Head, states_ND: NDArray[np.float32], targets_N: NDArray[np.int64]
) -> TokenStatistics:
    parts, start, rows = [], 0, 1  # one row tells the vocabulary's size
    while start < len(states_ND):
        logits_NV = torch.from_numpy(head.logits_of(states_ND[start : start + rows]).copy())
        targets = torch.from_numpy(targets_N[start : start + len(logits_NV)])
        if int(targets.max()) >= logits_NV.shape[1]:
            raise RunError(
                f"expected a head of more than {int(targets.max())} ids, got {logits_NV.shape[1]}; "
                "evaluate the reference again with --save-reference"
            )
        parts.append(token_statistics(logits_NV, targets))
        start += rows
        rows = rows_within(DEFAULT_LOGITS_BYTES, logits_NV.shape[1])
    return TokenStatistics.joined(parts)


@contextmanager
def proven_head(run: Run, states: ReferenceStates) -> Iterator[Head]:
    """Yield the head of a reference run: the one kept with its states, or its model's.

    Raises FingerprintMismatchError where the checkpoint is no longer the one it was, or the head
    does not give what the run recorded; RunError for a missing or damaged file; what loading the
    model raises.
    """
    if not states.keeps_head:
        with _loaded_again(run) as head:
            _require_proof(run, states, head, f"the head of {run.model.get('address')}")
            yield head
        return
    head_kept = states.head(_device_of(run))
    _require_proof(run, states, head_kept, "the head that is kept with it")
    yield head_kept


def _require_proof(run: Run, states: ReferenceStates, head: Head, which: str) -> None:
    """Raise FingerprintMismatchError unless the head gives a window's recorded results."""
    measured = states.record.get("proof") or {}
    window = int(measured["window"]) if "window" in measured else _longest_window(run, states)
    if window is None:
        return  # nothing was scored
    rows = run.tokens.take(run.tokens.window == window)
    targets_N = rows.token_id.astype(np.int64)
    recorded = TokenDetails({"nll": rows.nll, "entropy": rows.entropy, "rank": rows.rank})
    try:
        proof = proof_of(head, window, states.of_window(window), targets_N, recorded)
    except RuntimeError as error:  # a head of another size
        raise _unproven(run, which, str(error).splitlines()[0]) from error
    precisions = {str(run.session.get("dtype")), str(states.record.get("dtype"))}
    slack = max(_SLACK.get(name, _LOW_PRECISION_SLACK) for name in precisions)
    for name, found in (("nll", proof.nll_mean), ("entropy", proof.entropy_mean)):
        allowed = slack + 2 * float(measured.get(f"{name}_mean", 0.0))
        if not found <= allowed:
            what = "losses" if name == "nll" else "entropies"
            rounding = f"(rounding explains {allowed:.1g})"
            reason = f"on window {window} {what} differ by {found:.3g} nats a token {rounding}"
            raise _unproven(run, which, reason)
    if proof.ranks < _SHARE_OF_RANKS * float(measured.get("ranks", 1.0)):
        raise _unproven(run, which, f"on window {window} {proof.ranks:.0%} of the ranks agree")


def _longest_window(run: Run, states: ReferenceStates) -> int | None:
    """Return the first stored window with the most scored tokens; None where none is stored."""
    windows, counts = np.unique(run.tokens.window, return_counts=True)
    stored = np.isin(windows, list(states.windows))
    return int(windows[stored][counts[stored].argmax()]) if stored.any() else None


def _unproven(run: Run, which: str, reason: str) -> FingerprintMismatchError:
    return FingerprintMismatchError(
        f"expected {which} to give what the reference {run.folder or run.model.get('address')} "
        f"recorded, but {reason}: its states were made with another head (quantized, adapted or "
        "changed). Evaluate the reference again with --save-reference, which then keeps the head"
    )


@contextmanager
def _loaded_again(run: Run) -> Iterator[Head]:
    """Yield the session that scored the run, loaded again from its address."""
    address = str(run.model.get("address"))
    if address.startswith("module:"):
        raise RunError(
            f"expected a reference with its head, got one of a model from memory ({address}) "
            "that was saved without; evaluate it again with save_reference=True"
        )
    quantization, adapter = run.session.get("quantization"), run.model.get("adapter")
    with load_session(
        address,
        dtype=run.session.get("dtype"),
        device=run.session.get("device"),
        quantization=quantization and quantization["name"],
        adapter=adapter and adapter["path"],
        merge_adapter=bool(adapter and adapter["merged"]),
    ) as session:
        yield _checked(session, run)


def _checked(session: InferenceSession, run: Run) -> HiddenStateSession:
    recorded, found = run.model["weights_fingerprint"], session.model.weights_fingerprint
    if found != recorded:
        raise FingerprintMismatchError(
            f"the checkpoint {run.model['address']} is no longer the one that the reference was "
            f"made with ({recorded[:12]}… then, {found[:12]}… now); evaluate the reference again"
        )
    if not isinstance(session, HiddenStateSession):
        raise CapabilityError(f"{run.model['address']} has no head to make logits with")
    return session


def _device_of(run: Run) -> torch.device:
    """Return the device that scored the run if it is here, else the CPU."""
    name = str(run.session.get("device"))
    if name.startswith("cuda") and torch.cuda.is_available():
        return torch.device(name)
    return torch.device("cpu")
