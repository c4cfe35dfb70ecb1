"""Document and Keys: one document as it was found, and the columns that a row is read by."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from perplexit.errors import CorpusError


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of the columns that hold text, domain and prompt, and of those that are kept."""

    text: str = "text"
    domain: str | None = None
    prompt: str | None = None
    keep: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Return the columns that are read, each once."""
        named = (self.text, self.domain, self.prompt, *self.keep)
        return list(dict.fromkeys(key for key in named if key is not None))

    @property
    def beside_text(self) -> str | None:
        """Return a column that a plain text cannot have; None where there is none."""
        return self.domain or self.prompt or next(iter(self.keep), None)


@dataclass(frozen=True, slots=True)
class Document:
    """One document as it was found. `text` is None where the source has a null.

    source_file: as the file was reached; None in memory. source_row: the row of the file, or the
    item of the list, empty ones counted. kept: the values of the columns that are kept.
    long_text: the pieces of a text that is not held at once; `text` is then "".
    """

    text: str | None
    origin: str  # for messages: file and line
    domain: str | None = None
    prompt: str | None = None
    source_file: str | None = None
    source_row: int = 0
    kept: tuple[Any, ...] = ()
    long_text: Iterable[str] | None = None


def row_document(
    row: Mapping[str, Any],
    keys: Keys,
    origin: str,
    *,
    source_file: str | None = None,
    source_row: int = 0,
) -> Document:
    """Return the document in a row.

    Raises CorpusError where a column is missing or holds another type.
    """
    check_columns(row, keys, origin)
    text, prompt = row[keys.text], row[keys.prompt] if keys.prompt else None
    domain = row[keys.domain] if keys.domain else None
    if not (text is None or isinstance(text, str)):
        others = ", ".join(map(str, row))
        what = f"text. Name the column that holds it with the text key; there are {others}."
        raise _wrong_type(origin, keys.text, text, what)
    if keys.prompt and not isinstance(prompt, str):
        what = "text (an empty one where there is no prompt)."
        raise _wrong_type(origin, keys.prompt, prompt, what)
    if keys.domain and not isinstance(domain, str | int):
        raise _wrong_type(origin, keys.domain, domain, "the name of a domain.")
    return Document(
        text,
        origin,
        None if domain is None else str(domain),
        prompt,
        source_file,
        source_row,
        tuple(_as_json(row[key]) for key in keys.keep),
    )


def _wrong_type(origin: str, key: str, value: Any, expected: str) -> CorpusError:
    return CorpusError(f"{origin}: {key!r} holds a {type(value).__name__}, expected {expected}")


def check_columns(names: Iterable[str], keys: Keys, origin: str) -> None:
    """Raise CorpusError unless every column that is read is among `names`."""
    known = list(names)
    for key in keys.names:
        if key not in known:
            raise CorpusError(
                f"{origin} has no {key!r}. Its keys: {', '.join(map(repr, known)) or 'none'}. Name "
                f"the one to read with the text, domain or prompt key, or to keep."
            )


def _as_json(value: Any) -> Any:
    """Return a column's value as JSON can hold it: dates, NaN and bytes as text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    return str(value)
