"""The block bootstrap beside the clustered interval: reproducible, calibrated, not silent."""

from pathlib import Path

import numpy as np
import pytest

import perplexit as px
from perplexit.metrics.bootstrap import bootstrap_check
from perplexit.metrics.intervals import ratio_interval
from tests.simulated_losses import MEAN, bootstrap_notes, many_documents, one_text
from tests.toy_sessions import BigramSession


def of_samples(samples: object) -> tuple[float, float]:
    """(how often the bootstrap's interval holds the mean, its mean width over the reported one)."""
    hits, ratios = [], []
    for nll, document, window in samples:
        labels = document if document.any() else window // 2
        sums, counts = np.bincount(labels, weights=nll), np.bincount(labels)
        interval = ratio_interval(sums, counts, "document", 0.95)
        found = bootstrap_check(sums, counts, interval)
        hits.append(found.low <= MEAN <= found.high)
        ratios.append(found.width_ratio)
    return float(np.mean(hits)), float(np.mean(ratios))


@pytest.mark.trap(29)
def test_trap_29_the_bootstrap_covers_what_the_interval_covers() -> None:
    for samples in (one_text(200, 4096, 256, 1, rho=0.5), many_documents(200, 40, 0.5, 0.4, 2)):
        coverage, width = of_samples(samples)
        assert 0.91 <= coverage <= 0.985
        assert 0.9 <= width <= 1.1


def test_it_is_the_same_every_time_and_follows_its_seed() -> None:
    random = np.random.default_rng(0)
    sums, counts = random.normal(5, 1, 30), random.integers(5, 50, 30)
    interval = ratio_interval(sums, counts, "document", 0.9)
    first, second = (bootstrap_check(sums, counts, interval) for _ in range(2))
    assert first == second
    assert bootstrap_check(sums, counts, interval, seed=1).low != first.low
    many = random.normal(5, 1, 3000)
    of_many = bootstrap_check(
        many, np.full(3000, 9), ratio_interval(many, np.full(3000, 9), "document", 0.95)
    )
    assert of_many.num_resamples == 500
    assert of_many.agrees


@pytest.mark.trap(29)
@pytest.mark.parametrize("length_spread", [0.0, 0.5])
def test_trap_29_it_has_nothing_to_say_where_all_is_well(length_spread: float) -> None:
    notes, _ = bootstrap_notes(many_documents(200, 30, length_spread, 0.4, 9))
    assert notes <= 0.02
    assert bootstrap_notes(one_text(200, 12_000, 512, 4, rho=0.5))[0] <= 0.02


def test_unequal_documents_alone_are_no_reason_for_a_note() -> None:
    """The bootstrap of unequal clusters is too narrow: that it differs says nothing."""
    notes, width = bootstrap_notes(many_documents(200, 40, 1.0, 0.4, 9))
    assert width < 0.97
    assert notes <= 0.05


def test_one_document_that_decides_is_noticed() -> None:
    random = np.random.default_rng(3)
    counts = np.full(40, 50)
    sums = counts * (2 + random.normal(0, 0.3, 40))
    plain = bootstrap_check(sums, counts, ratio_interval(sums, counts, "document", 0.95))
    assert plain.agrees
    sums[7] += 400.0  # eight nats a token more in one document
    found = bootstrap_check(sums, counts, ratio_interval(sums, counts, "document", 0.95))
    assert not found.agrees
    assert found.decisive_share > 0.8
    assert found.decisive_token_share == pytest.approx(1 / 40)


def test_one_document_that_holds_nearly_everything_is_noticed() -> None:
    sums = np.array([400.0, *np.ones(25)])
    counts = np.array([200, *np.ones(25)]).astype(int)
    sums[1:] += np.random.default_rng(3).normal(0, 0.5, 25)
    interval = ratio_interval(sums, counts, "document", 0.95)
    found = bootstrap_check(sums, counts, interval)
    assert not found.agrees
    assert found.decisive_token_share == pytest.approx(200 / 225)


def test_blocks_of_one_text_are_drawn_in_pairs() -> None:
    sums, counts = np.random.default_rng(0).normal(100, 3, 16), np.full(16, 50)
    found = bootstrap_check(sums, counts, ratio_interval(sums, counts, "window-block", 0.95))
    pairs, pair_counts = sums[::2] + sums[1::2], counts[::2] * 2
    same = bootstrap_check(pairs, pair_counts, ratio_interval(pairs, pair_counts, "document", 0.95))
    assert found == same


def test_a_comparison_carries_it_and_its_text_tells_of_a_disagreement(
    tmp_path: Path, byte_tokenizer_json: Path
) -> None:
    even = [f"Document {n} of the harbour office, which is closed on Mondays." for n in range(24)]
    for name, texts in (("even", even), ("uneven", [" ".join(even * 4), *(t[:9] for t in even)])):
        tokens = px.prepare(
            texts,
            tokenizer=byte_tokenizer_json,
            max_length=32,
            output=tmp_path / f"{name}.safetensors",
        )
        found = px.compare(*(px.evaluate(BigramSession(seed=n), tokens) for n in (0, 1)))
        record = found.to_json()["bootstrap"]
        assert record["low"] < found.log_perplexity_difference < record["high"]
        assert ("drawn anew (bootstrap)" in str(found)) == (not record["agrees"])
        assert record["agrees"] == (name == "even")
    same = px.compare(*(px.evaluate(BigramSession(seed=0), tokens) for _ in range(2)))
    assert same.bootstrap is None
