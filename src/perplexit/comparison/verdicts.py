"""The four verdicts: what the interval of a difference says, given a margin.

With low and high the ends of the interval of candidate - reference in log-perplexity:

    worse         low > margin
    better        high < -margin
    equivalent    -margin ≤ low and high ≤ margin
    inconclusive  everything else, and wherever there is no interval
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from perplexit.errors import UsageError
from perplexit.metrics.estimate import Estimate
from perplexit.runs.run import Run

Verdict = Literal["worse", "better", "equivalent", "inconclusive"]
VERDICTS: tuple[Verdict, ...] = ("worse", "better", "equivalent", "inconclusive")
SMALLEST_DIFFERENCE = 1e-5  # nats: below it, float32 engines differ among themselves


def verdict_of(difference: Estimate, margin: float) -> Verdict:
    """Return what the interval of candidate - reference says; both in nats."""
    low, high = difference.low, difference.high
    if low is None or high is None:
        return "inconclusive"
    if low > margin:
        return "worse"
    if high < -margin:
        return "better"
    return "equivalent" if -margin <= low and high <= margin else "inconclusive"


@dataclass(frozen=True, slots=True)
class Margin:
    """The difference in log-perplexity that does not matter, and what decided it.

    nats:  max(1e-5, the noise floors, the margin asked for), per token or per byte.
    asked: the margin asked for, as a share of the perplexity (0.01 is 1 %); 0 where none was.
    noise: the noise floors in nats: `given`, and what the `reference` and the `candidate` measured
           of themselves (None where they did not).
    """

    nats: float
    asked: float
    noise: dict[str, float | None]

    @property
    def is_asked(self) -> bool:
        """Tell whether the margin asked for is what decides."""
        return self.asked > 0 and self.nats <= math.log1p(self.asked)


def margin_of(
    reference: Run, candidate: Run, *, noise_floor: float, margin: float | str, per_byte: bool
) -> Margin:
    """Return the margin of a comparison; a run's own noise floor counts.

    Raises UsageError for a noise floor or a margin that is none.
    """
    unit = "byte" if per_byte else "token"
    if not (math.isfinite(noise_floor) and noise_floor >= 0):
        raise UsageError(
            f"noise_floor must be 0 or above, got {noise_floor}: give nats per {unit}, such as 1e-4"
        )
    asked = share_of(margin)
    noise = {
        "given": float(noise_floor),
        "reference": _measured(reference, per_byte),
        "candidate": _measured(candidate, per_byte),
    }
    floors = [value for value in noise.values() if value is not None]
    return Margin(max(SMALLEST_DIFFERENCE, math.log1p(asked), *floors), asked, noise)


def share_of(margin: float | str) -> float:
    """Return a margin as a share of the perplexity: 0.01 for `1%`, `0.01` or 0.01.

    Raises UsageError for anything else, below 0, or from 100 % on.
    """
    text = str(margin).strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share < 1:
        raise UsageError(
            f"expected a margin from 0 to below 100 % of the perplexity, got {text!r}: give a "
            "percentage such as 1%, or a share such as 0.01"
        )
    return share


def _measured(run: Run, per_byte: bool) -> float | None:
    """Return a run's own noise floor; None where it measured none, or none that is a number."""
    found: Any = (run.noise_floor or {}).get("nats_a_token")
    if not isinstance(found, int | float) or not math.isfinite(found):
        return None
    if not per_byte:
        return float(found)
    if not run.num_bytes or run.num_tokens is None:
        return None
    return float(found) * run.num_tokens / run.num_bytes


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a text can show, from the half-width of the interval of a difference.

    half_width:     of the interval, in nats.
    smallest_shown: the smallest difference in nats that this text would have called worse or
                    better: half-width plus margin.
    text_factor:    how many times as much text would decide against the margin, if the difference
                    stays what it is. The half-width falls with the root of the text, so this is
                    (half-width / | |difference| - margin |)²; None where it is beyond 10,000.
    """

    half_width: float
    smallest_shown: float
    text_factor: float | None


LARGEST_FACTOR = 10_000


def resolution_of(difference: Estimate, margin: float) -> Resolution | None:
    """Return what the text can show; None without an interval."""
    if difference.low is None or difference.high is None:
        return None
    half = (difference.high - difference.low) / 2
    if not math.isfinite(half):
        return None
    distance = abs(abs(difference.value) - margin)
    factor = (half / distance) ** 2 if distance > half / math.sqrt(LARGEST_FACTOR) else None
    return Resolution(half, half + margin, factor)
