"""The ranges of numbers that people give, on the command line and in Python alike.

An absurd number is refused before anything is opened: engines end the process at a million threads,
and an array has no place for 2**63 ids.
"""

import math
import operator

from perplexit.errors import UsageError

_LARGEST = 2**31 - 1
_MOST_THREADS = 1024  # the largest machines have some 900 hardware threads
_RANGES: dict[str, tuple[int, int]] = {
    "threads": (1, _MOST_THREADS),
    "tensor_parallel": (2, _MOST_THREADS),
    "batch_size": (1, _LARGEST),
    "prompt_len": (1, _LARGEST),
    "decode_chunk": (1, _LARGEST),
    "top_k": (0, _LARGEST),
    "num_most_changed": (0, _LARGEST),
    "seed": (0, 2**63 - 1),
}


def check_whole(name: str, value: object, *, shown: str | None = None) -> None:
    """Raise UsageError unless an option's value is a whole number within the option's range.

    name: as in Python (`max_length`). A name without a range of its own takes what 32 bits hold.
    shown: what the message calls it, where that is not its name.
    """
    low, high = _RANGES.get(name, (-_LARGEST, _LARGEST))
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        wanted = f"a whole number from {low:,} to {high:,}"
        raise UsageError(f"expected {shown or name} to be {wanted}, got {value!r:.40}")


def check_finite(name: str, value: float) -> None:
    """Raise UsageError for NaN and infinity, which no option means."""
    if not math.isfinite(value):
        raise UsageError(f"expected {name} to be a finite number, got {value}")


def check_numbers(**given: object) -> None:
    """Check the options that are given; None and "auto" stand for no number."""
    for name, value in given.items():
        if value is not None and value != "auto":
            check_whole(name, value)
