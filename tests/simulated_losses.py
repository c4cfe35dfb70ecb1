"""Simulated losses of a known mean: skewed, correlated, drifting, in documents of unequal length.

    python tests/simulated_losses.py      prints the coverage of docs/coverage.md

Shape suffixes: R = repetitions, M = tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import signal, special

from perplexit.metrics.bootstrap import bootstrap_check
from perplexit.metrics.intervals import clusters_for, mean_interval, ratio_interval

_SPREAD, _SHIFT = 0.8, 0.3
MEAN = float(np.exp(_SPREAD**2 / 2 + _SHIFT))
VARIANCE = float((np.exp(_SPREAD**2) - 1) * np.exp(_SPREAD**2 + 2 * _SHIFT))


def autoregressive(shape: tuple[int, int], rho: float, random: np.random.Generator) -> np.ndarray:
    """Standard normal in every place, correlation rho ** lag along the second axis."""
    noise = random.standard_normal(shape)
    noise[:, 0] /= np.sqrt(1 - rho**2)
    return signal.lfilter([np.sqrt(1 - rho**2)], [1, -rho], noise, axis=1)


def smooth_drift(shape: tuple[int, int], length: float, random: np.random.Generator) -> np.ndarray:
    """Standard normal in every place, without a kink: correlation exp(-(lag / length)² / 2)."""
    reach = round(4 * length)
    kernel = np.exp(-((np.arange(-reach, reach + 1) / length) ** 2))
    noise = random.standard_normal((shape[0], shape[1] + 2 * reach))
    return signal.fftconvolve(
        noise, (kernel / np.sqrt(kernel @ kernel))[None], mode="valid", axes=1
    )


def sections(shape: tuple[int, int], length: float, random: np.random.Generator) -> np.ndarray:
    """Standard normal in every place, the same within a section of `length` on average."""
    begins_RM = random.random(shape) < 1 / length
    section_RM = np.cumsum(begins_RM, axis=1)
    levels = random.standard_normal((shape[0], int(section_RM.max()) + 1))
    return np.take_along_axis(levels, section_RM, axis=1)


DRIFTS = {
    "autoregressive": lambda shape, length, random: autoregressive(
        shape, float(np.exp(-1 / length)), random
    ),
    "smooth": smooth_drift,
    "sections": sections,
}


def losses(
    shape: tuple[int, int],
    random: np.random.Generator,
    *,
    rho: float,
    drift_share: float = 0.0,
    drift_length: float = 400.0,
    drift_shape: str = "autoregressive",
) -> np.ndarray:
    """Lognormal AR(1) losses of mean MEAN; a share of their variance drifts over many tokens."""
    nll_RM = np.exp(_SPREAD * autoregressive(shape, rho, random) + _SHIFT)
    if drift_share:
        drift_RM = DRIFTS[drift_shape](shape, drift_length, random)
        nll_RM += np.sqrt(drift_share * VARIANCE) * drift_RM
    return nll_RM


@dataclass(frozen=True)
class Coverage:
    clustered: float
    independent: float  # of the interval that takes tokens for independent
    half_width: float


def coverage(samples: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Coverage:
    """How often 95 % intervals of (nll, document, window) samples hold MEAN."""
    hits, naive_hits, widths = [], [], []
    for nll, document, window in samples:
        interval = mean_interval(nll, clusters_for(document, window))
        assert interval.low is not None
        assert interval.high is not None
        hits.append(interval.low <= MEAN <= interval.high)
        widths.append((interval.high - interval.low) / 2)
        naive_hits.append(abs(nll.mean() - MEAN) <= 1.96 * nll.std(ddof=1) / np.sqrt(len(nll)))
    return Coverage(float(np.mean(hits)), float(np.mean(naive_hits)), float(np.mean(widths)))


def one_text(
    repetitions: int, num_tokens: int, window: int, seed: int, **options: float | str
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """One document in windows of `window` targets."""
    random = np.random.default_rng(seed)
    windows = np.arange(num_tokens) // window
    for nll in losses((repetitions, num_tokens), random, **options):  # type: ignore[arg-type]
        yield nll, np.zeros(num_tokens, dtype=int), windows


def many_documents(
    repetitions: int, num_documents: int, length_spread: float, effect: float, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Documents of lognormal lengths (about 50 tokens), each with a difficulty of its own."""
    random = np.random.default_rng(seed)
    for _ in range(repetitions):
        spread = length_spread * random.standard_normal(num_documents) - length_spread**2 / 2
        lengths = np.maximum(2, np.round(50 * np.exp(spread))).astype(int)
        document = np.repeat(np.arange(num_documents), lengths)
        nll = losses((1, len(document)), random, rho=0.5)[0]
        yield nll + effect * random.standard_normal(num_documents)[document], document, document


def few_documents(
    repetitions: int, num_documents: int, length_spread: float, effect: float, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Documents of lognormal lengths (about 500 tokens) in windows of 256: too few for clusters."""
    random = np.random.default_rng(seed)
    for _ in range(repetitions):
        spread = length_spread * random.standard_normal(num_documents) - length_spread**2 / 2
        lengths = np.maximum(20, np.round(500 * np.exp(spread))).astype(int)
        document = np.repeat(np.arange(num_documents), lengths)
        places = np.concatenate([np.arange(length) // 256 for length in lengths])
        window = np.unique(document * 10_000 + places, return_inverse=True)[1]
        nll = losses((1, len(document)), random, rho=0.5)[0]
        yield nll + effect * random.standard_normal(num_documents)[document], document, window


def with_fewer_corrections(
    samples: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[float, float]:
    """Coverage without the leverage correction, and with it but C - 1 degrees of freedom."""
    linear, leverage = [], []
    for nll, document, _ in samples:
        counts, sums = np.bincount(document), np.bincount(document, weights=nll)
        shares, clusters = counts / counts.sum(), len(counts)
        mean = sums.sum() / counts.sum()
        residuals = (sums - mean * counts) / counts.sum()
        quantile = special.stdtrit(clusters - 1, 0.975)
        plain = clusters / (clusters - 1) * (residuals**2).sum()
        corrected = (clusters - 1) / clusters * ((residuals / (1 - shares)) ** 2).sum()
        linear.append(abs(mean - MEAN) <= quantile * np.sqrt(plain))
        leverage.append(abs(mean - MEAN) <= quantile * np.sqrt(corrected))
    return float(np.mean(linear)), float(np.mean(leverage))


def bootstrap_notes(
    samples: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[float, float]:
    """(how often the bootstrap check has something to say, its mean relative width)."""
    notes, widths = [], []
    for nll, document, window in samples:
        clusters = clusters_for(document, window)
        counts = np.bincount(clusters.labels)
        sums = np.bincount(clusters.labels, weights=nll)
        found = bootstrap_check(sums, counts, ratio_interval(sums, counts, clusters.method, 0.95))
        assert found is not None
        notes.append(not found.agrees)
        widths.append(found.width_ratio)
    return float(np.mean(notes)), float(np.mean(widths))


def _print_one_text() -> None:
    print("one text: tokens, window, rho, drift: 95 % covers (independent)")
    drifts = [
        {"drift_share": share, "drift_length": length, "drift_shape": shape}
        for share, length, shape in (
            (0.003, 400, "autoregressive"),
            (0.006, 200, "autoregressive"),
            (0.0015, 800, "autoregressive"),
            (0.003, 400, "smooth"),
            (0.003, 400, "sections"),
        )
    ]
    for num_tokens, window in (
        (2048, 256),
        (4096, 256),
        (4096, 512),
        (12_000, 512),
        (48_000, 1024),
    ):
        for options in (
            {"rho": 0.0},
            {"rho": 0.5},
            {"rho": 0.9},
            *({"rho": 0.3, **x} for x in drifts),
        ):
            found = coverage(one_text(2000, num_tokens, window, 1, **options))
            print(
                f"  {num_tokens:6} {window:5} {' '.join(map(str, options.values())):30}: "
                f"{found.clustered:.1%} ({found.independent:.1%}), ± {found.half_width:.3f}",
                flush=True,
            )


def _print_documents() -> None:
    print("documents: number, spread of lengths, effect: 95 % covers (independent)")
    for num_documents in (20, 40, 200):
        for spread in (0.0, 0.5, 1.0, 1.5):
            for effect in (0.1, 0.4):
                found = coverage(many_documents(1000, num_documents, spread, effect, 2))
                print(
                    f"  {num_documents:4} {spread:4} {effect:4}: {found.clustered:.1%} "
                    f"({found.independent:.1%})",
                    flush=True,
                )
    print("few documents of about 500 tokens: number, spread of lengths: 95 % covers (independent)")
    for num_documents in (5, 10, 15, 19):
        for spread in (0.0, 0.5):
            found = coverage(few_documents(1500, num_documents, spread, 0.4, 3))
            print(
                f"  {num_documents:4} {spread:4}: {found.clustered:.1%} ({found.independent:.1%})",
                flush=True,
            )
    print("the same without leverage correction, and with C - 1 degrees of freedom")
    for spread in (0.5, 1.0, 1.5):
        linear, leverage = with_fewer_corrections(many_documents(1000, 20, spread, 0.4, 2))
        print(f"    20 {spread:4}  0.4: {linear:.1%}, {leverage:.1%}")


def _print_bootstrap() -> None:
    print("how often the bootstrap has something to say, and its relative width")
    for num_documents in (20, 40, 200):
        for spread in (0.0, 0.5, 1.0, 1.5):
            notes, width = bootstrap_notes(many_documents(500, num_documents, spread, 0.4, 9))
            print(f"  {num_documents:4} documents {spread:4}: {notes:.1%}, {width:.2f}", flush=True)
    for num_tokens, window in ((4096, 256), (12_000, 512), (48_000, 1024)):
        notes, width = bootstrap_notes(one_text(500, num_tokens, window, 4, rho=0.5))
        print(f"  one text of {num_tokens:6}: {notes:.1%}, {width:.2f}", flush=True)


def main() -> None:
    _print_one_text()
    _print_documents()
    _print_bootstrap()


if __name__ == "__main__":
    main()
