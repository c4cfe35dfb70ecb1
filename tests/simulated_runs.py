"""Simulated runs whose true figures are known: documents of unequal length and tokens per byte.

    python tests/proofs/test_coverage.py      prints the tables of docs/coverage.md

Shape suffixes: D = documents, R = rows (scored tokens).
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from perplexit.runs.run_tokens import RunTokens
from tests.simulated_losses import MEAN, VARIANCE, autoregressive, losses

BYTES_PER_TOKEN, WORDS_PER_TOKEN = 4.0, 0.7
CONFIDENCE = 0.95


def run_tokens(
    nll_R: np.ndarray,
    document_R: np.ndarray,
    window_R: np.ndarray,
    random: np.random.Generator,
    *,
    rates_R: tuple[np.ndarray, np.ndarray] | None = None,
    num_domains: int = 0,
) -> RunTokens:
    """Scored tokens with bytes and words, whose rates differ between documents.

    Mean bytes and words for each token are BYTES_PER_TOKEN and WORDS_PER_TOKEN, also in `rates_R`,
    which says how many of both each token has on average.
    """
    num_documents = int(document_R.max()) + 1
    if rates_R is None:
        spread_D = 0.4 * random.standard_normal(num_documents) - 0.4**2 / 2
        words_D = random.uniform(WORDS_PER_TOKEN - 0.2, WORDS_PER_TOKEN + 0.2, num_documents)
        rates_R = ((BYTES_PER_TOKEN * np.exp(spread_D))[document_R], words_D[document_R])
    bytes_R, words_R = rates_R
    whole_R = np.floor(bytes_R)
    num_rows = len(nll_R)
    domain_D = np.arange(num_documents) % num_domains if num_domains else None
    nothing = np.zeros(num_rows, dtype=np.int32)
    return RunTokens(
        {
            "document": document_R.astype(np.int32),
            "window": window_R.astype(np.int32),
            "position": nothing,
            "token_index": np.arange(num_rows),
            "byte_start": np.zeros(num_rows, dtype=np.int64),
            "num_bytes": (whole_R + (random.random(num_rows) < bytes_R - whole_R)).astype(np.int32),
            "num_words": (random.random(num_rows) < words_R).astype(np.int32),
            "domain": nothing - 1 if domain_D is None else domain_D[document_R].astype(np.int32),
            "token_id": nothing,
            "nll": nll_R.astype(np.float32),
            "token_bytes": pa.nulls(
                num_rows, pa.large_binary()
            ),  # there is text; no figure reads it
        },
        domains=tuple(f"domain {index}" for index in range(num_domains)),
    )


def document_lengths(
    num_documents: int, length_spread: float, random: np.random.Generator, *, mean: int = 50
) -> np.ndarray:
    """Lognormal lengths of `mean` tokens on average, at least 2."""
    spread_D = length_spread * random.standard_normal(num_documents) - length_spread**2 / 2
    return np.maximum(2, np.round(mean * np.exp(spread_D))).astype(int)


def document_runs(
    repetitions: int,
    num_documents: int,
    seed: int,
    *,
    length_spread: float,
    effect: float = 0.4,
    num_domains: int = 0,
) -> Iterator[RunTokens]:
    """Runs over documents, each with a difficulty of its own; the true mean loss is MEAN."""
    random = np.random.default_rng(seed)
    for _ in range(repetitions):
        lengths_D = document_lengths(num_documents, length_spread, random)
        document_R = np.repeat(np.arange(num_documents), lengths_D)
        nll_R = losses((1, len(document_R)), random, rho=0.5)[0]
        nll_R += effect * random.standard_normal(num_documents)[document_R]
        yield run_tokens(nll_R, document_R, document_R, random, num_domains=num_domains)


def drifting_runs(
    repetitions: int,
    num_tokens: int,
    window: int,
    seed: int,
    *,
    rates_drift: bool = False,
    **options: float | str,
) -> Iterator[RunTokens]:
    """Runs over one text whose difficulty drifts.

    rates_drift: bytes and words for each token drift too, by the same share of their mean.
    """
    random = np.random.default_rng(seed)
    share, length = float(options.get("drift_share", 0)), float(options.get("drift_length", 400))
    spread = np.sqrt(share * VARIANCE) / MEAN if rates_drift else 0.0
    window_R = np.arange(num_tokens) // window
    nothing_R = np.zeros(num_tokens, dtype=int)
    for nll_R in losses((repetitions, num_tokens), random, **options):  # type: ignore[arg-type]
        drift_R = autoregressive((2, num_tokens), float(np.exp(-1 / length)), random)
        bytes_R = BYTES_PER_TOKEN * np.exp(spread * drift_R[0] - spread**2 / 2)
        words_R = np.clip(WORDS_PER_TOKEN * (1 + spread * drift_R[1]), 0.4, 1.0)
        rates_R = (1.0 + random.poisson(bytes_R - 1), words_R)
        yield run_tokens(nll_R, nothing_R, window_R, random, rates_R=rates_R)


TRUE = {
    "perplexity": float(np.exp(MEAN)),
    "bits_per_byte": MEAN / BYTES_PER_TOKEN / float(np.log(2)),
    "byte_perplexity": float(np.exp(MEAN / BYTES_PER_TOKEN)),
    "word_perplexity": float(np.exp(MEAN / WORDS_PER_TOKEN)),
    "macro_average_perplexity": float(np.exp(MEAN)),
}
