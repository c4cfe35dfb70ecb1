"""Perplexit's own ways to score, through its public functions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import perplexit as px
from sidebyside.contenders import Score, Scored, Setting, Workload


def compiled(model: Path, folder: str, options: Mapping[str, Any]) -> str:
    """Compile the checkpoint to a program, with options of `perplexit.compile`."""
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    px.compile(model, output=folder, **options)
    return folder


def evaluation(setting: Setting, *, scoring: Any = None, **opens: Any) -> Score:
    """Open what `perplexit eval` does: losses, entropies, ranks, intervals, the record.

    scoring: options of `evaluate`. opens: of `load_session`, in place of the setting's.
    """
    return evaluation_in(open_session(setting, **opens), **(scoring or {}))


def evaluation_in(session: Any, **options: Any) -> Score:
    """Return `perplexit.evaluate` of an open session, with these options of it."""

    def score(workload: Workload) -> Scored:
        run = px.evaluate(
            session, workload.tokens, batch_size=workload.batch_size or "auto", **options
        )
        nll = run.tokens.nll.tolist()
        return Scored(run.nll_sum, len(nll), run.protocol_perplexity, nll=nll)

    return score


def losses_alone(setting: Setting, **options: Any) -> Score:
    """Open `session.token_nll`: no entropy, no rank, no record.

    All windows are scored, in batches of the size that the session itself calls right.
    """
    session = open_session(setting, **options)

    def score(workload: Workload) -> Scored:
        windows, found = workload.windows(), []
        size = session.max_batch_size(workload.max_length)
        for start in range(0, len(windows), size):
            found += session.token_nll(windows[start : start + size])
        nll = np.concatenate(found).astype(np.float64)
        return Scored(float(nll.sum()), len(nll), nll=nll.tolist())

    return score


def open_session(setting: Setting, **changes: Any) -> Any:
    """Open the setting's program, or else its checkpoint in PyTorch."""
    options: dict[str, Any] = {"dtype": setting.dtype, "threads": setting.threads} | changes
    if setting.device != "cpu":
        options["device"] = setting.device
    address = f"hf:{setting.model}" if setting.program is None else setting.program
    return px.load_session(address, **options)
