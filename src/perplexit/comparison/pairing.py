"""Which rows of two runs belong together, and what may not be compared.

Shape suffix: M = tokens that both runs scored with a finite loss, in window order.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import EmptyScoreError, FingerprintMismatchError, RunError
from perplexit.metrics.intervals import Clusters, clusters_for
from perplexit.runs.measurement import flat_record
from perplexit.runs.run import Run
from perplexit.runs.run_tokens import RunTokens


@dataclass(frozen=True, slots=True)
class Pairs:
    """The rows that both runs scored with a finite loss."""

    tokens: RunTokens
    rows: NDArray[np.int64]  # M of the rows of `tokens`
    reference: NDArray[np.float32]  # M losses, nats
    candidate: NDArray[np.float32]
    clusters: Clusters
    num_unpaired: int

    @property
    def delta(self) -> NDArray[np.float64]:
        """Return M differences candidate - reference, nats."""
        return self.candidate.astype(np.float64) - self.reference


def opened(run: Run | str | Path) -> Run:
    """Return a run as it is, or the one in a folder. Raises RunError where there is none."""
    return run if isinstance(run, Run) else Run.open(run)


def paired(reference: RunTokens, candidate: RunTokens) -> Pairs:
    """Return the common tokens of two runs over one input.

    Raises RunError where the runs hold different tokens, EmptyScoreError where none is common.
    """
    for name in ("document", "window", "position", "token_id"):
        if not np.array_equal(getattr(reference, name), getattr(candidate, name)):
            raise RunError(
                f"two runs over one input must hold the same tokens, got another {name} column: "
                "one of them is damaged (`perplexit runs verify` says which); evaluate it again"
            )
    rows = np.flatnonzero(np.isfinite(reference.nll) & np.isfinite(candidate.nll))
    if len(rows) == 0:
        raise EmptyScoreError(
            f"expected a token with a finite loss in both runs, got 0 of {len(reference)}: "
            "score in a wider dtype"
        )
    return Pairs(
        reference,
        rows,
        reference.nll[rows],
        candidate.nll[rows],
        clusters_for(reference.document[rows], reference.window[rows]),
        len(reference) - len(rows),
    )


def only_by_bytes(reference: Run, candidate: Run) -> bool:
    """Tell whether two runs have the same text in other tokens or windows."""
    return (
        reference.input_fingerprint != candidate.input_fingerprint
        and reference.text_fingerprint == candidate.text_fingerprint != ""
    )


def require_same_input(reference: Run, candidate: Run) -> None:
    """Check that both runs scored the same prepared input.

    Raises FingerprintMismatchError, which names each thing that differs, with both values.
    """
    if reference.input_fingerprint == candidate.input_fingerprint:
        return
    differences = [
        f"the {what} ({ours[:12]}… and {theirs[:12]}…)"
        for what, ours, theirs in (
            ("text", reference.text_fingerprint, candidate.text_fingerprint),
            ("tokenizer", reference.tokenizer_fingerprint, candidate.tokenizer_fingerprint),
        )
        if ours != theirs
    ]
    ours, theirs = flat_record(reference.input_spec), flat_record(candidate.input_spec)
    differing = [key for key in sorted(ours | theirs) if ours.get(key) != theirs.get(key)]
    chosen = [key for key in differing if key.startswith("protocol.")]
    if not differences and not chosen:
        chosen = differing
    differences += [f"{key} ({ours.get(key)!r} and {theirs.get(key)!r})" for key in chosen]
    raise FingerprintMismatchError(
        "expected two runs over the same prepared input, got inputs that differ in "
        + (", ".join(differences) or "their token ids, scored tokens or windows")
        + ": evaluate both models on one file that `perplexit prepare` wrote"
    )
