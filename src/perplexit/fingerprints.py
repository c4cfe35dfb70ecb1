"""Fingerprints: the canonical JSON of a value, and SHA-256 of values and files."""

import hashlib
import json
from pathlib import Path


def canonical_json(value: object, *, allow_nan: bool = False) -> str:
    """Return the one spelling of a JSON value: sorted keys, no blanks, no NaN unless allowed.

    Every fingerprint of a record is the SHA-256 of this text in UTF-8.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=allow_nan
    )


def json_fingerprint(value: object, *, allow_nan: bool = False) -> str:
    """Return the SHA-256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value, allow_nan=allow_nan).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
