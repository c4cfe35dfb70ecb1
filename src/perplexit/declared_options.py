"""Options that are declared once, as annotations: type, help and default of each."""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, get_args, get_type_hints


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
