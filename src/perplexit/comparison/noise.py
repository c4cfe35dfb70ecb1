"""Below which difference two runs say nothing: rounding, and what runs measured of themselves."""

from typing import Any

from perplexit.runs.run import Run

SMALLEST_DIFFERENCE = 1e-5  # nats a token: below it, float32 engines differ among themselves


def margin_of(reference: Run, candidate: Run, given: float) -> tuple[float, dict[str, Any]]:
    """(the margin in nats a token, what it was made of): max(1e-5, given, measured by the runs)."""
    noise = {
        "given": given,
        "reference": _measured(reference),
        "candidate": _measured(candidate),
    }
    return max(SMALLEST_DIFFERENCE, *(value or 0.0 for value in noise.values())), noise


def _measured(run: Run) -> float | None:
    return None if run.noise_floor is None else float(run.noise_floor["nats_a_token"])
