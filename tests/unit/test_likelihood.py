"""Likelihood figures against closed forms, tables against dull loops."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perplexit.errors import EmptyScoreError, NonFiniteError, UsageError
from perplexit.metrics import likelihood
from perplexit.metrics.totals import NllTotals


@dataclass
class Tokens:
    document: np.ndarray
    nll: np.ndarray
    num_bytes: np.ndarray
    num_words: np.ndarray
    domain: np.ndarray | None = None
    domains: tuple[str, ...] = field(default=())


def totals_of(tokens: Tokens, rows: np.ndarray) -> NllTotals:
    """Return the totals of some rows."""
    return NllTotals.of(tokens.nll[rows], tokens.num_bytes[rows], tokens.num_words[rows])


def test_a_uniform_model_has_its_vocabulary_as_perplexity() -> None:
    totals = NllTotals(100 * math.log(50_000), 100, 400, 80)
    assert likelihood.perplexity(totals) == pytest.approx(50_000)
    assert likelihood.bits_per_byte(totals) == pytest.approx(math.log2(50_000) / 4)
    assert likelihood.byte_perplexity(totals) == pytest.approx(50_000**0.25)
    assert likelihood.word_perplexity(totals) == pytest.approx(50_000**1.25)


@pytest.mark.parametrize(
    ("mean", "expected"),
    [(100.0, math.exp(100)), (709.78, math.exp(709.78)), (709.79, math.inf), (1e4, math.inf)],
)
def test_infinite_only_past_the_limit_of_exp(mean: float, expected: float) -> None:
    """exp(100) is 2.7e43: far from the limit of float64, which lies at exp(709.78)."""
    assert likelihood.perplexity(NllTotals(3 * mean, 3)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "metric",
    [
        likelihood.perplexity,
        likelihood.mean_nll,
        likelihood.bits_per_byte,
        likelihood.byte_perplexity,
        likelihood.word_perplexity,
    ],
)
def test_without_a_denominator_there_is_no_figure(metric: object) -> None:
    with pytest.raises(EmptyScoreError, match="at least one scored"):
        metric(NllTotals())  # type: ignore[operator]


def test_json_has_null_with_its_reason() -> None:
    assert likelihood.json_figure("perplexity", 2.5) == (2.5, None)
    for value, word in ((math.inf, "overflows"), (math.nan, "NaN"), (None, "does not exist")):
        figure, reason = likelihood.json_figure("perplexity", value)
        assert figure is None
        assert reason is not None
        assert word in reason


@pytest.mark.trap(12)
def test_trap_12_exp_of_the_mean_not_mean_of_the_exps() -> None:
    """Two texts: 10 tokens at 1 nat, 90 at 3 nats. Right: e^2.8; mean of perplexities: 11.4."""
    totals = NllTotals.of(np.r_[np.full(10, 1.0), np.full(90, 3.0)])
    assert likelihood.perplexity(totals) == pytest.approx(math.exp(2.8))
    assert likelihood.perplexity(totals) != pytest.approx((math.exp(1) + math.exp(3)) / 2)


@pytest.mark.trap(30)
def test_trap_30_a_short_last_chunk_weighs_by_its_tokens() -> None:
    chunks = [np.full(512, 2.0), np.full(512, 2.0), np.full(3, 8.0)]
    merged = sum((NllTotals.of(chunk) for chunk in chunks), NllTotals())
    brute_force = float(np.concatenate(chunks).mean())
    assert likelihood.mean_nll(merged) == pytest.approx(brute_force, rel=1e-15)
    assert likelihood.mean_nll(merged) < 2.02 < np.mean([c.mean() for c in chunks])


@pytest.mark.trap(13)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 6))
def test_trap_13_groups_count_only_their_own_scored_text(
    seed: int, num_tokens: int, num_groups: int
) -> None:
    random = np.random.default_rng(seed)
    tokens = Tokens(
        document=random.integers(0, num_groups, num_tokens),
        nll=random.gamma(1, 2, num_tokens).astype(np.float32),
        num_bytes=random.integers(0, 9, num_tokens),
        num_words=random.integers(0, 2, num_tokens),
    )
    groups = likelihood.group_rows(tokens.document)
    assert list(groups) == np.unique(tokens.document).tolist()
    for document, rows in groups.items():
        totals = totals_of(tokens, rows)
        mine = [i for i in range(num_tokens) if tokens.document[i] == document]
        assert totals.num_tokens == len(mine)
        assert totals.num_bytes == sum(int(tokens.num_bytes[i]) for i in mine)
        assert totals.num_words == sum(int(tokens.num_words[i]) for i in mine)
        assert totals.nll_sum == math.fsum(float(tokens.nll[i]) for i in mine)
        perplexity = likelihood.perplexity(totals)
        assert perplexity == pytest.approx(math.exp(totals.nll_sum / len(mine)))


def test_domains_and_their_macro_average() -> None:
    """Domain a: 3 tokens at 1 nat; b: 1 token at 3 nats; a token without a domain is in no row."""
    tokens = Tokens(
        document=np.zeros(5, dtype=int),
        nll=np.array([1, 1, 1, 3, 9], dtype=np.float32),
        num_bytes=np.ones(5, dtype=int),
        num_words=np.ones(5, dtype=int),
        domain=np.array([1, 1, 1, 0, -1]),
        domains=("b", "a", "unused"),
    )
    groups = likelihood.group_rows(tokens.domain)
    totals = {code: totals_of(tokens, rows) for code, rows in groups.items()}
    assert {code: total.num_tokens for code, total in totals.items()} == {-1: 1, 0: 1, 1: 3}
    macro = likelihood.macro_average_perplexity([totals[0], totals[1]])
    assert macro == pytest.approx(math.exp((1 + 3) / 2))
    assert likelihood.group_rows(np.empty(0, dtype=int)) == {}


@given(st.integers(0, 2**32 - 1), st.integers(1, 80), st.integers(1, 20))
def test_loss_by_position_holds_every_token_once(
    seed: int, num_tokens: int, num_buckets: int
) -> None:
    random = np.random.default_rng(seed)
    position = random.integers(1, 50, num_tokens)
    nll = random.gamma(1, 2, num_tokens)
    buckets = likelihood.loss_by_position(position, nll, num_buckets)
    assert sum(bucket.num_tokens for bucket in buckets) == num_tokens
    assert [b.start for b in buckets[1:]] == [b.stop for b in buckets[:-1]]
    for bucket in buckets:
        mine = nll[(position >= bucket.start) & (position < bucket.stop)]
        expected = pytest.approx(mine.mean()) if len(mine) else None
        assert (bucket.num_tokens, bucket.mean_nll) == (len(mine), expected)


@pytest.mark.trap(27)
def test_trap_27_a_jump_of_the_loss_at_long_context_shows() -> None:
    position = np.arange(1, 1025)
    nll = np.where(position < 768, 1.8, 6.75)
    buckets = likelihood.loss_by_position(position, nll)
    assert buckets[-1].mean_nll == pytest.approx(6.75)
    assert buckets[0].mean_nll == pytest.approx(1.8)


def test_tables_refuse_what_they_cannot_average() -> None:
    with pytest.raises(UsageError, match="num_buckets"):
        likelihood.loss_by_position(np.ones(1, dtype=int), np.ones(1), 0)
    with pytest.raises(NonFiniteError):
        likelihood.loss_by_position(np.ones(1, dtype=int), np.array([np.nan]))
    with pytest.raises(EmptyScoreError):
        likelihood.macro_average_perplexity([])
    assert likelihood.loss_by_position(np.empty(0, dtype=int), np.empty(0)) == ()
