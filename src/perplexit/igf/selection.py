"""Selections: which candidate contexts a fine-tuning step uses. One function per method.

Shape suffixes: N = candidates, T = ids of a context.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import UsageError
from perplexit.igf.articles import Articles
from perplexit.igf.learners import Learner
from perplexit.igf.random_contexts import Contexts, ContextStream

Ids = NDArray[np.int32]
Flags = NDArray[np.bool_]
Losses = Callable[[Ids], NDArray[np.float64]]  # the model's loss of each context, in nats

_CALIBRATION_SEED = 1_000_003
NUM_CALIBRATION = 512

METHODS = (
    "standard",
    "igf-constant",
    "igf-shifting",
    "igf-quantile",
    "random-skip",
    "high-loss",
    "perplexity-band",
)


@dataclass(frozen=True, slots=True)
class ShiftingThreshold:
    """`first` for `steps` steps, `then` from there on: the paper's +1, then -1 after 10."""

    first: float = 1.0
    then: float = -1.0
    steps: int = 10

    def at(self, step: int) -> float:
        """Return the threshold at a step, counted from 0."""
        return self.first if step < self.steps else self.then


def quantile_threshold(predicted_N: NDArray[np.float64], share: float) -> float:
    """Return the threshold that accepts the best `share` of contexts like those predicted here.

    Predictions shrink towards the mean, so +1 accepts few and -1 rejects almost none; a quantile
    of the predictions themselves accepts what it says.
    """
    check_share(share)
    return float(np.quantile(predicted_N, 1 - share))


def check_share(share: float) -> None:
    """Raise UsageError unless 0 < share <= 1."""
    if not 0 < share <= 1:
        raise UsageError(f"expected a share of contexts to accept in (0, 1], got {share}")


@dataclass(frozen=True)
class Selection:
    """Which candidates the steps of a fine-tuning use.

    accepts: (ids [N, T], number of the first of them in the stream of candidates, step, losses)
             → which of them the step uses, [N]. `losses` gives the losses of contexts under the
             model in its present state.
    parameters: what it decides by, as JSON values.
    learner: by which it predicts; seed: by which it draws.
    costs_forward_pass: whether it asks the model; what was really read is counted.
    """

    name: str
    accepts: Callable[[Ids, int, int, Losses], Flags]
    parameters: dict[str, Any] = field(default_factory=dict)
    learner: Learner | None = None
    seed: int | None = None
    costs_forward_pass: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return name and parameters as JSON values."""
        return {"name": self.name, **self.parameters}


def all_candidates() -> Selection:
    """Return standard fine-tuning: every candidate is used."""
    return Selection("standard", lambda ids_NT, *_: np.ones(len(ids_NT), dtype=np.bool_))


def by_predicted_gain(
    learner: Learner, threshold: float | ShiftingThreshold, name: str = "igf-shifting"
) -> Selection:
    """Use candidates predicted at or above the threshold, before any forward pass."""

    def accepts(ids_NT: Ids, first: int, step: int, losses: Losses) -> Flags:
        least = threshold.at(step) if isinstance(threshold, ShiftingThreshold) else threshold
        return np.asarray(learner.predict(ids_NT) >= least)

    kind = (
        {"threshold": "shifting", **asdict(threshold)}
        if isinstance(threshold, ShiftingThreshold)
        else {"threshold": "constant", "value": threshold}
    )
    return Selection(name, accepts, {"learner": learner.kind, **kind}, learner=learner)


def random_skip(share: float = 0.25, seed: int = 0) -> Selection:
    """Use a candidate with probability `share`: shows what skipping alone does.

    The random number of a candidate follows from the seed and its number in the stream.
    """
    check_share(share)

    def accepts(ids_NT: Ids, first: int, step: int, losses: Losses) -> Flags:
        draws = (np.random.default_rng([seed, 1, first + i]).random() for i in range(len(ids_NT)))
        return np.array([draw < share for draw in draws])

    return Selection("random-skip", accepts, {"share": share}, seed=seed)


def loss_band(low: float, high: float = math.inf, name: str = "high-loss") -> Selection:
    """Use candidates whose loss under the model being tuned lies between two bounds, in nats.

    `high-loss` has no upper bound; `perplexity-band` keeps the middle. Costs one forward pass per
    candidate.
    """

    def accepts(ids_NT: Ids, first: int, step: int, losses: Losses) -> Flags:
        losses_N = losses(ids_NT)
        return np.asarray((losses_N >= low) & (losses_N <= high))

    bounds = {"low_nats": low, "high_nats": high if math.isfinite(high) else None}
    return Selection(name, accepts, bounds, costs_forward_pass=True)


def threshold_within_reach(
    predicted_N: NDArray[np.float64], threshold: float, *, least: float = 0.01
) -> float:
    """Return `threshold`, or the lower one that the share `least` reaches."""
    return min(threshold, quantile_threshold(predicted_N, least))


def reachable_threshold(
    learner: Learner, threshold: float, train: Articles, context_length: int
) -> float:
    """Return `threshold`, or with a warning the lower one that 1 % of contexts reach."""
    predicted = learner.predict(calibration_contexts(train, context_length).ids_NT)
    first = threshold_within_reach(predicted, threshold)
    if first < threshold:
        share = (predicted >= threshold).mean()
        warnings.warn(
            f"the learner predicts {threshold:+g} or more for {share:.1%} "
            f"of contexts; {first:+.3f} is used for the first 10 steps, which 1 % reach. More "
            "pairs, more epochs or a higher learning rate would make it tell contexts apart",
            stacklevel=3,
        )
    return first


def calibration_contexts(
    train: Articles, context_length: int, number: int = NUM_CALIBRATION
) -> Contexts:
    """Return contexts to take quantiles from, drawn by a seed that no fine-tuning has."""
    return ContextStream(train, context_length, _CALIBRATION_SEED).take(0, number)


def selection_named(
    name: str,
    *,
    learner: Learner | None = None,
    calibration_NT: NDArray[np.int32] | None = None,
    calibration_losses: Callable[[], NDArray[np.float64]] | None = None,
    share: float = 0.25,
    constant: float = 1.0,
    seed: int = 0,
) -> Selection:
    """Return one of METHODS. share: how many candidates quantile, random and loss methods accept.

    calibration_NT: contexts like the candidates, from which quantiles are taken;
    calibration_losses: gives the untouched model's losses on them (asked for only where needed).
    Raises UsageError where the method lacks what it needs.
    """
    if name not in METHODS:
        raise UsageError(f"expected a method of {', '.join(METHODS)}, got {name!r}")
    if name == "standard":
        return all_candidates()
    if name == "random-skip":
        return random_skip(share, seed)
    if name in ("high-loss", "perplexity-band"):
        if calibration_losses is None:
            raise UsageError(f"expected losses to calibrate {name} with, got none")
        found = calibration_losses()
        check_share(share)
        if name == "high-loss":
            return loss_band(float(np.quantile(found, 1 - share)))
        low, high = np.quantile(found, [0.5 - share / 2, 0.5 + share / 2])
        return loss_band(float(low), float(high), name)
    if learner is None:
        raise UsageError(f"expected a secondary learner for {name}; train one first")
    predicted_N = None if calibration_NT is None else learner.predict(calibration_NT)
    if name == "igf-quantile":
        if predicted_N is None:
            raise UsageError("expected contexts to calibrate the quantile with, got none")
        return by_predicted_gain(learner, quantile_threshold(predicted_N, share), name)
    if predicted_N is not None and not (predicted_N >= constant).any():
        raise UsageError(
            f"expected a learner that predicts {constant:+g} or more for some contexts, got at "
            f"most {predicted_N.max():+.3f} on {len(predicted_N)} of them, so the filter would "
            "accept next to nothing; use igf-quantile, lower the threshold, or collect more pairs"
        )
    shifting = name == "igf-shifting"
    return by_predicted_gain(learner, ShiftingThreshold(constant) if shifting else constant, name)
