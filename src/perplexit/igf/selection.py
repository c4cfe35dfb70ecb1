"""Selections: which candidate contexts a fine-tuning step uses. One class per method.

`costs_forward_pass` says whether a method needs a forward pass of the language model; the record of
a run counts what each method really read.

Shape suffixes: N = candidates, T = ids of a context.
"""

import warnings
from abc import ABC, abstractmethod
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
class ConstantThreshold:
    """The least predicted gain (a z-score) that is accepted, the same at every step."""

    value: float = 1.0

    def at(self, step: int) -> float:
        """Return the threshold at a step, counted from 0."""
        return self.value

    def to_json(self) -> dict[str, Any]:
        """Return kind and parameters as JSON values."""
        return {"threshold": "constant", **asdict(self)}


@dataclass(frozen=True, slots=True)
class ShiftingThreshold:
    """`first` for `steps` steps, `then` from there on: the paper's +1, then -1 after 10."""

    first: float = 1.0
    then: float = -1.0
    steps: int = 10

    def at(self, step: int) -> float:
        """Return the threshold at a step, counted from 0."""
        return self.first if step < self.steps else self.then

    def to_json(self) -> dict[str, Any]:
        """Return kind and parameters as JSON values."""
        return {"threshold": "shifting", **asdict(self)}


def quantile_threshold(predicted_N: NDArray[np.float64], share: float) -> ConstantThreshold:
    """Return the threshold that accepts the best `share` of contexts like those predicted here.

    Predictions shrink towards the mean, so +1 accepts few and -1 rejects almost none; a quantile
    of the predictions themselves accepts what it says.
    """
    check_share(share)
    return ConstantThreshold(float(np.quantile(predicted_N, 1 - share)))


def check_share(share: float) -> None:
    """Raise UsageError unless 0 < share <= 1."""
    if not 0 < share <= 1:
        raise UsageError(f"expected a share of contexts to accept in (0, 1], got {share}")


class Selection(ABC):
    """Decides which candidates a step uses. `costs_forward_pass`: whether it asks the model."""

    name: str
    costs_forward_pass = False

    @abstractmethod
    def accepts(self, ids_NT: Ids, first: int, step: int, losses: Losses) -> Flags:
        """Return which candidates step `step` uses, [N].

        first:  the number of the first of them in the stream of candidates.
        losses: gives the losses of contexts under the model in its present state.
        """

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return name and parameters as JSON values."""


@dataclass(frozen=True)
class Everything(Selection):
    """Standard fine-tuning: every candidate is used."""

    name: str = "standard"

    def accepts(self, ids_NT: Ids, first: int, step: int, losses: Losses) -> Flags:
        """See Selection."""
        return np.ones(len(ids_NT), dtype=np.bool_)

    def to_json(self) -> dict[str, Any]:
        """See Selection."""
        return {"name": self.name}


@dataclass(frozen=True)
class InformationGain(Selection):
    """Uses candidates predicted at or above the threshold, before any forward pass."""

    learner: Learner
    threshold: ConstantThreshold | ShiftingThreshold = field(default_factory=ShiftingThreshold)
    name: str = "igf-shifting"

    def accepts(self, ids_NT: Ids, first: int, step: int, losses: Losses) -> Flags:
        """See Selection."""
        return np.asarray(self.learner.predict(ids_NT) >= self.threshold.at(step))

    def to_json(self) -> dict[str, Any]:
        """See Selection."""
        return {"name": self.name, "learner": self.learner.kind, **self.threshold.to_json()}


@dataclass(frozen=True)
class RandomSkip(Selection):
    """Uses a candidate with probability `share`: shows what skipping alone does."""

    share: float = 0.25
    seed: int = 0
    name: str = "random-skip"

    def __post_init__(self) -> None:
        check_share(self.share)

    def accepts(self, ids_NT: Ids, first: int, step: int, losses: Losses) -> Flags:
        """See Selection."""
        numbers = range(first, first + len(ids_NT))
        return np.array([self.draw(number) < self.share for number in numbers])

    def draw(self, number: int) -> float:
        """Return the random number in [0, 1) that belongs to a candidate of the stream."""
        return float(np.random.default_rng([self.seed, 1, number]).random())

    def to_json(self) -> dict[str, Any]:
        """See Selection."""
        return {"name": self.name, "share": self.share}


@dataclass(frozen=True)
class LossBand(Selection):
    """Uses candidates whose loss under the model being tuned lies between two bounds, in nats.

    `high-loss` has no upper bound; `perplexity-band` keeps the middle. Costs one forward pass per
    candidate.
    """

    low: float
    high: float = float("inf")
    name: str = "high-loss"
    costs_forward_pass = True

    def accepts(self, ids_NT: Ids, first: int, step: int, losses: Losses) -> Flags:
        """See Selection."""
        losses_N = losses(ids_NT)
        return np.asarray((losses_N >= self.low) & (losses_N <= self.high))

    def to_json(self) -> dict[str, Any]:
        """See Selection."""
        high = self.high if np.isfinite(self.high) else None
        return {"name": self.name, "low_nats": self.low, "high_nats": high}


def _check_reached(predicted_N: NDArray[np.float64], threshold: float) -> None:
    if not (predicted_N >= threshold).any():
        raise UsageError(
            f"expected a learner that predicts {threshold:+g} or more for some contexts, got at "
            f"most {predicted_N.max():+.3f} on {len(predicted_N)} of them, so the filter would "
            "accept next to nothing; use igf-quantile, lower the threshold, or collect more pairs"
        )


def threshold_within_reach(
    predicted_N: NDArray[np.float64], threshold: float, *, least: float = 0.01
) -> float:
    """Return `threshold`, or the lower one that the share `least` reaches."""
    return min(threshold, quantile_threshold(predicted_N, least).value)


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


def selection_named(  # noqa: PLR0911 - one return per method
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
    if name == "standard":
        return Everything()
    if name == "random-skip":
        return RandomSkip(share, seed)
    if name in ("high-loss", "perplexity-band"):
        if calibration_losses is None:
            raise UsageError(f"expected losses to calibrate {name} with, got none")
        found = calibration_losses()
        check_share(share)
        if name == "high-loss":
            return LossBand(float(np.quantile(found, 1 - share)))
        low, high = np.quantile(found, [0.5 - share / 2, 0.5 + share / 2])
        return LossBand(float(low), float(high), name)
    if name not in METHODS:
        raise UsageError(f"expected a method of {', '.join(METHODS)}, got {name!r}")
    if learner is None:
        raise UsageError(f"expected a secondary learner for {name}; train one first")
    if calibration_NT is not None and name != "igf-quantile":
        _check_reached(learner.predict(calibration_NT), constant)
    if name == "igf-constant":
        return InformationGain(learner, ConstantThreshold(constant), name)
    if name == "igf-shifting":
        return InformationGain(learner, ShiftingThreshold(first=constant), name)
    if calibration_NT is None:
        raise UsageError("expected contexts to calibrate the quantile with, got none")
    return InformationGain(
        learner, quantile_threshold(learner.predict(calibration_NT), share), name
    )
