"""Run folders for tests of the report: toy models over any text, one of them a little damaged."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import perplexit as px
from perplexit.runs.run import Run
from perplexit.session_descriptions import ModelDescription, SessionDescription
from tests.toy_sessions import BigramSession

VOCAB_SIZE = 400


class DamagedSession(BigramSession):
    """The toy model with noise in its logits; `shift` makes it worse on some rows only."""

    def __init__(self, *, noise: float, seed: int = 7, name: str = "toy:damaged") -> None:
        super().__init__(VOCAB_SIZE)
        random = np.random.default_rng(seed)
        logits_VV = self.logprobs_VV + random.normal(0, noise, self.logprobs_VV.shape)
        self.logprobs_VV = logits_VV - np.log(np.exp(logits_VV).sum(axis=1, keepdims=True))
        self.model = ModelDescription(name, "Bigram", VOCAB_SIZE**2, f"n{noise}", VOCAB_SIZE)
        self.description = SessionDescription("toy", "1", "int4", "cpu", threads=1)


def toy_runs(
    folder: Path,
    texts: Sequence[str] | Path,
    tokenizer: Path,
    *,
    noises: Sequence[float] = (0.4,),
    top_k: int = 5,
    max_length: int = 64,
) -> list[Run]:
    """A reference and a run a noise, stored under `folder` beside their input."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = px.prepare(
        list(texts) if not isinstance(texts, Path) else texts,
        tokenizer=tokenizer,
        max_length=max_length,
        stride=max_length // 2,
        output=folder / "input.safetensors",
    )
    sessions = [BigramSession(VOCAB_SIZE)]
    sessions += [DamagedSession(noise=noise, seed=7 + n) for n, noise in enumerate(noises)]
    names = ["full", *(f"noise-{noise:g}" for noise in noises)]
    return [
        px.evaluate(session, tokens, run=folder / name, top_k=top_k)
        for session, name in zip(sessions, names, strict=True)
    ]


def shifted(run: Run, shift: float, spread: float = 0.0, seed: int = 0) -> Run:
    """The run with `shift` on every loss, and a shift of its own for each document."""
    random = np.random.default_rng(seed)
    own_D = random.normal(0, 1, int(run.tokens.document.max()) + 1)
    own_D = (own_D - np.average(own_D[run.tokens.document])) * spread
    nll = (run.tokens.nll + shift + own_D[run.tokens.document]).astype(np.float32)
    return replace(run, loaded_tokens=run.tokens.with_columns(nll=nll))


def with_kl(candidate: Run, reference: Run, *, scale: float = 0.01, seed: int = 0) -> Run:
    """The candidate as if it had been scored against `reference`, with made-up divergences."""
    random = np.random.default_rng(seed)
    rows = len(candidate.tokens)
    columns = {
        "kl": np.abs(random.normal(0, scale, rows)).astype(np.float32),
        "same_top1": random.random(rows) > scale,
        "reference_top_p": random.random(rows).astype(np.float32),
    }
    return replace(
        candidate,
        loaded_tokens=candidate.tokens.with_columns(**columns),
        reference=reference_record(reference),
    )


def reference_record(reference: Run) -> dict[str, object]:
    """What a run that was scored against `reference` records of it."""
    return {
        "address": reference.model["address"],
        "weights_fingerprint": reference.model["weights_fingerprint"],
        "input_fingerprint": reference.input_fingerprint,
        "measurement_fingerprint": getattr(reference, "measurement_fingerprint", None),
    }
