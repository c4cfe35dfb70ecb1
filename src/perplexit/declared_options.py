"""Options that are declared once, as annotations, and the ranges of their numbers.

An absurd number is refused before anything is opened: engines end the process at a million threads,
and an array has no place for 2**63 ids.
"""

import math
import operator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, get_args, get_type_hints

from perplexit.errors import UsageError


@dataclass(frozen=True, slots=True)
class Option:
    """What the command line says of an option.

    flag: where it is not the option's name. lowest: the smallest value of a number.
    """

    help: str
    default: Any = None
    flag: str | None = None
    metavar: str | None = None
    lowest: int | None = None


def declared(kind: type[Any]) -> dict[str, tuple[Any, Option]]:
    """Return the type and the entry of each option, by name, in the order of declaration.

    kind: a TypedDict, or a dataclass, whose defaults are its own.
    """
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        shown, *notes = get_args(hint) or (hint,)
        if notes and isinstance(notes[0], Option):
            found[name] = (shown, notes[0])
    for field in fields(kind) if is_dataclass(kind) else ():
        if field.name in found:
            shown, option = found[field.name]
            found[field.name] = (shown, replace(option, default=field.default))
    return found


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
