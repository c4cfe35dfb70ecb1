"""Perplexit's own ways to score, through its public functions."""

from typing import Any

import numpy as np

import perplexit as px
from perplexit.sessions.base import InferenceSession
from sidebyside.contenders import Prepare, Scored, Setting, Turn
from sidebyside.workloads import Workload


def evaluation(setting: Setting, **options: Any) -> Prepare:
    """Open what `perplexit eval` does: losses, entropies, ranks, intervals, the record.

    options: of `load_session`, in place of the setting's.
    """
    return evaluation_in(open_session(setting, **options))


def chunked_prefill(setting: Setting) -> Prepare:
    """Open the same against a key/value cache, 128 ids per call."""
    return evaluation_in(open_session(setting), mode="cached", prompt_len=1, decode_chunk=128)


def evaluation_in(session: InferenceSession, **options: Any) -> Prepare:
    """Return `perplexit.evaluate` of an open session, with these options of it."""

    def prepare(workload: Workload) -> Turn:
        tokens = workload.tokens

        def turn() -> Scored:
            run = px.evaluate(session, tokens, batch_size=workload.batch_size or "auto", **options)
            nll = run.tokens.nll.tolist()
            return Scored(run.nll_sum, len(nll), run.protocol_perplexity, nll=nll)

        return turn

    return prepare


def losses_alone(setting: Setting) -> Prepare:
    """Open `session.token_nll`: no entropy, no rank, no record.

    All windows are scored, in batches of the size that the session itself calls right.
    """
    session = open_session(setting)

    def prepare(workload: Workload) -> Turn:
        windows = workload.windows()
        size = session.max_batch_size(workload.max_length)

        def turn() -> Scored:
            found = []
            for start in range(0, len(windows), size):
                found += session.token_nll(windows[start : start + size])
            nll = np.concatenate(found).astype(np.float64)
            return Scored(float(nll.sum()), len(nll), nll=nll.tolist())

        return turn

    return prepare


def open_session(setting: Setting, **changes: Any) -> InferenceSession:
    """Open the setting's program, or else its checkpoint in PyTorch."""
    options: dict[str, Any] = {"dtype": setting.dtype, "threads": setting.threads} | changes
    if setting.device != "cpu":
        options["device"] = setting.device
    address = f"hf:{setting.model}" if setting.program is None else setting.program
    return px.load_session(address, **options)
