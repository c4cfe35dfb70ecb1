"""Reading a pickle that the original IGF wrote, by joblib, where the user allows it.

A pickle is a program: reading it runs its code with the user's full rights. No filter would change
that, so there is none; the user is warned instead.
"""

import warnings
from pathlib import Path
from typing import Any

from perplexit.errors import TrustWarning, UsageError, needing
from perplexit.igf.tensors_with_record import StoredFileError

RIGHTS = "the code in the file is run with your full rights: it can read, change and send any file"


def read_pickle(path: str | Path, *, allowed: bool) -> Any:
    """Return what a joblib or pickle file holds, after a warning that its code is run.

    Raises UsageError where it is not allowed, StoredFileError where it cannot be read.
    """
    if not allowed:
        raise UsageError(
            f"expected text or a .safetensors file, got {path}, a pickle. When a pickle is read, "
            f"{RIGHTS}. If you trust whoever made it, allow it with --allow-pickle "
            "(allow_pickle=True)"
        )
    with needing(f"reading {path}", "pip install 'perplexit[igf]'", "joblib"):
        import joblib  # noqa: PLC0415 - an optional package's door
    warnings.warn(f"{path} is a pickle and was allowed: {RIGHTS}", TrustWarning, stacklevel=2)
    try:
        return joblib.load(path)
    except Exception as error:
        raise StoredFileError(
            f"expected a file written by joblib or pickle in {path}, could not read it "
            f"({type(error).__name__}: {error}); make it again, or convert it to .safetensors"
        ) from None
