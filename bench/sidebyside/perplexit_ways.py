"""Perplexit's own ways to score, through its public functions."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import perplexit as px
from perplexit.sessions.base import InferenceSession
from sidebyside.contenders import Contender, Scored, Setting
from sidebyside.workloads import Workload, token_file_of


@dataclass(frozen=True)
class Evaluating:
    """`perplexit.evaluate` of an open session: the whole of it, intervals and record included."""

    session: InferenceSession
    scratch: str
    options: dict[str, Any]

    def prepare(self, workload: Workload) -> Callable[[], Scored]:
        """One evaluation of the workload's token file."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        tokens = token_file_of(workload, folder / "input.safetensors")

        def turn() -> Scored:
            run = px.evaluate(self.session, tokens, **self.options)
            nll, own = run.tokens.nll.tolist(), run.protocol_perplexity
            return Scored(run.nll_sum, len(nll), own, nll=nll)

        return turn


@dataclass(frozen=True)
class LossesAlone:
    """`session.token_nll`: no entropy, no rank, no record."""

    session: InferenceSession
    scratch: str

    def prepare(self, workload: Workload) -> Callable[[], Scored]:
        """All windows, in batches of the size that the session itself calls right."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        tokens = token_file_of(workload, folder / "input.safetensors")
        windows = [tokens.window_ids(index) for index in range(tokens.num_windows)]
        size = self.session.max_batch_size(workload.max_length)

        def turn() -> Scored:
            found = []
            for start in range(0, len(windows), size):
                found += self.session.token_nll(windows[start : start + size])
            nll = np.concatenate(found).astype(np.float64)
            return Scored(float(nll.sum()), len(nll), nll=nll.tolist())

        return turn


def _session(setting: Setting, dtype: str | None = None) -> InferenceSession:
    address = f"hf:{setting.model}" if setting.program is None else setting.program
    return px.load_session(address, dtype=dtype or setting.dtype, threads=setting.threads)


def evaluating(setting: Setting) -> Contender:
    """PyTorch, whole windows: what `perplexit eval` does."""
    return Evaluating(_session(setting), setting.scratch, {})


def losses_alone(setting: Setting) -> Contender:
    """PyTorch, whole windows, nothing but the losses."""
    return LossesAlone(_session(setting), setting.scratch)


def evaluating_bfloat16(setting: Setting) -> Contender:
    """PyTorch in bfloat16, whatever the others of the section compute in."""
    return Evaluating(_session(setting, "bfloat16"), setting.scratch, {})


def chunked_prefill(setting: Setting) -> Contender:
    """PyTorch against a key/value cache, 128 ids a call."""
    options = {"mode": "cached", "prompt_len": 1, "decode_chunk": 128}
    return Evaluating(_session(setting), setting.scratch, options)


def openvino_float32(setting: Setting) -> Contender:
    """An OpenVINO program with the head inside."""
    return Evaluating(_session(setting, "float32"), setting.scratch, {})


def openvino_bfloat16(setting: Setting) -> Contender:
    """The same program with its body in bfloat16 and its head in float32."""
    return Evaluating(_session(setting, "bfloat16"), setting.scratch, {})
