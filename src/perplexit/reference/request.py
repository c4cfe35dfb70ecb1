"""What is asked of a reference, checked before any model is loaded: nothing here needs PyTorch."""

from pathlib import Path

from perplexit.errors import FingerprintMismatchError, RunError, UsageError
from perplexit.inputs.kl_base_file import KlBaseFile, is_kl_base_file
from perplexit.inputs.token_file import TokenFile
from perplexit.runs.run import RUN_FILE, Run
from perplexit.sessions.base import InferenceSession
from perplexit.sessions.registry import split_address

Reference = Run | KlBaseFile | InferenceSession | str
STATES_DTYPES = ("float32", "float16")


def requested_reference(
    reference: Run | InferenceSession | str | Path | None,
    tokens: TokenFile,
    *,
    save_reference: bool,
    dtype: str,
) -> Reference | None:
    """Return the reference that is meant: a run, llama.cpp's base file, a session or an address.

    Raises UsageError where a reference is to be saved and used at once or the dtype is unknown,
    RunError where the run keeps nothing that a KL divergence can be taken from,
    FingerprintMismatchError where it scored another input, ModelError for a wrong address.
    """
    if dtype not in STATES_DTYPES:
        raise UsageError(f"reference_dtype must be float32 or float16, got {dtype!r}")
    if save_reference and reference is not None:
        raise UsageError(
            "a run either saves a reference or is held against one, but both were asked for; "
            "evaluate twice"
        )
    meant = _opened(reference) if isinstance(reference, str | Path) else reference
    if isinstance(meant, KlBaseFile):
        meant.require_input(tokens)
    if isinstance(meant, Run):
        _check_run(meant, tokens)
    return meant


def _opened(reference: str | Path) -> Run | KlBaseFile | str:
    if is_kl_base_file(reference):
        return KlBaseFile(Path(reference))
    path = Path(reference)
    if (path / RUN_FILE).is_file() or path.name == RUN_FILE:
        return Run.open(path)
    split_address(reference)
    return str(reference)


def _check_run(run: Run, tokens: TokenFile) -> None:
    if run.saved_reference is None and not run.top_k:
        raise RunError(
            f"expected a run with stored hidden states, got {run.folder or run} without; evaluate "
            "the reference with --save-reference or, where its engine has no hidden states, with "
            "--top-k 20"
        )
    if run.status != "complete":
        raise UsageError(f"expected a complete reference run, got one that is {run.status}")
    if run.input_fingerprint != tokens.input_fingerprint:
        raise FingerprintMismatchError(
            f"expected a reference over this very input, got one over another "
            f"({run.input_fingerprint[:12]}… and {tokens.input_fingerprint[:12]}…); evaluate the "
            "reference on the same token file"
        )
