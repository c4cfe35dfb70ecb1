"""compare: pairing, verdicts, refusals and the most changed tokens, on runs of toy sessions."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import perplexit as px
from perplexit.comparison.verdicts import verdict_of
from perplexit.errors import EmptyScoreError, FingerprintMismatchError, RunError, UsageError
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.windows import WindowIds
from perplexit.metrics.estimate import Estimate
from perplexit.runs.run import Run
from tests.toy_sessions import BigramSession

TEXT = "A ratio of perplexities is the exponential of a mean of paired differences. " * 12
Prepare = Callable[..., TokenFile]


class ShiftedSession(BigramSession):
    """The bigram model with `shift` added to every loss (and noise of its own to each)."""

    def __init__(self, shift: float = 0.0, noise: float = 0.0, **options: object) -> None:
        super().__init__(details=False, **options)  # type: ignore[arg-type]
        self.shift, self.noise = shift, noise
        self.random = np.random.default_rng(7)

    def _nll(self, window: WindowIds) -> NDArray[np.float32]:
        nll_N = super()._nll(window).astype(np.float64)
        nll_N += self.shift + self.random.normal(0, self.noise, len(nll_N))
        return nll_N.astype(np.float32)


@pytest.fixture(scope="module")
def prepare(byte_tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    def made(corpus: str | list[str] | Path = TEXT, **options: object) -> TokenFile:
        options = {"max_length": 32, "stride": 16} | options
        output = tmp_path_factory.mktemp("input") / "in.safetensors"
        texts = [corpus] if isinstance(corpus, str) else corpus
        return px.prepare(texts, tokenizer=byte_tokenizer_json, output=output, **options)

    return made


@pytest.fixture(scope="module")
def tokens(prepare: Prepare) -> TokenFile:
    return prepare()


@pytest.fixture(scope="module")
def reference(tokens: TokenFile) -> Run:
    return px.evaluate(BigramSession(), tokens)


def test_a_run_against_itself_is_equivalent(reference: Run) -> None:
    same = px.compare(reference, reference)
    assert same.verdict == "equivalent"
    assert same.ppl_ratio == 1.0
    assert same.max_abs_nll_difference == 0.0
    assert same.most_changed == ()


def test_a_constant_shift_is_the_log_ratio(tokens: TokenFile, reference: Run) -> None:
    worse = px.compare(reference, px.evaluate(ShiftedSession(0.01), tokens))
    assert worse.verdict == "worse"
    assert worse.log_perplexity_difference == pytest.approx(0.01, abs=1e-6)
    assert worse.ppl_ratio == pytest.approx(math.exp(0.01), rel=1e-6)
    assert worse.ppl_ratio_low <= worse.ppl_ratio <= worse.ppl_ratio_high
    assert worse.perplexity_candidate / worse.perplexity_reference == pytest.approx(worse.ppl_ratio)
    assert worse.perplexity_reference == pytest.approx(reference.perplexity)
    assert px.compare(reference, px.evaluate(ShiftedSession(-0.01), tokens)).verdict == "better"


def test_a_difference_below_float32_noise_is_not_claimed(tokens: TokenFile, reference: Run) -> None:
    """Every loss is shifted by 5e-6: the interval excludes 0, and lies inside ± 1e-5."""
    shifted = replace(
        reference, loaded_tokens=reference.tokens.with_columns(nll=reference.tokens.nll + 5e-6)
    )
    tiny = px.compare(reference, shifted)
    assert tiny.log_perplexity_difference_low > 0
    assert tiny.verdict == "equivalent"


def test_a_noise_floor_widens_what_is_equivalent(tokens: TokenFile, reference: Run) -> None:
    candidate = px.evaluate(ShiftedSession(0.001), tokens)
    assert px.compare(reference, candidate).verdict == "worse"
    floored = px.compare(reference, candidate, noise_floor=0.002)
    assert (floored.verdict, floored.margin) == ("equivalent", 0.002)
    with pytest.raises(UsageError, match="noise_floor"):
        px.compare(reference, candidate, noise_floor=-1.0)


def test_noise_around_zero_is_distinguished_as_rarely_as_promised(reference: Run) -> None:
    """Of 200 candidates that differ by noise alone, about 5 % are called better or worse."""
    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        noise = random.normal(0, 0.05, len(reference.tokens)).astype(np.float32)
        nll = reference.tokens.nll + noise
        candidate = replace(reference, loaded_tokens=reference.tokens.with_columns(nll=nll))
        wrong += px.compare(reference, candidate).verdict != "inconclusive"
    assert 2 <= wrong <= 20


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1e-4, 2e-4, "worse"),
        (-2e-4, -1e-4, "better"),
        (-1e-4, 1e-4, "inconclusive"),
        (1e-6, 9e-6, "equivalent"),
        (-1e-5, 1e-5, "equivalent"),
        (1e-6, 2e-5, "inconclusive"),
        (-2e-5, -1e-6, "inconclusive"),
        (None, None, "inconclusive"),
    ],
)
def test_verdicts(low: float | None, high: float | None, expected: str) -> None:
    interval = Estimate(0.0, low, high, "window-block", 8, 0.95)
    assert verdict_of(interval, 1e-5) == expected


def test_pairing_is_far_narrower_than_either_interval(tokens: TokenFile, reference: Run) -> None:
    noisy = px.compare(reference, px.evaluate(ShiftedSession(0.02, noise=0.01), tokens))
    assert noisy.verdict == "worse"
    own = math.log(reference.perplexity_high / reference.perplexity_low)
    paired = noisy.log_perplexity_difference_high - noisy.log_perplexity_difference_low
    assert paired < own / 10


def test_the_most_changed_tokens_come_with_their_text(tokens: TokenFile, reference: Run) -> None:
    row = 100
    nll = reference.tokens.nll.copy()
    nll[row] += 3
    nll[5] -= 1
    candidate = replace(reference, loaded_tokens=reference.tokens.with_columns(nll=nll))
    first, second = px.compare(reference, candidate).most_changed
    assert (first.token_index, second.token_index) == tuple(reference.tokens.token_index[[row, 5]])
    assert first.delta == pytest.approx(3, abs=1e-5)
    assert first.token == reference.tokens.text_of(row)
    assert (first.context + first.token) in TEXT
    assert first.context
    assert px.compare(reference, candidate, num_most_changed=1).most_changed == (first,)


def test_other_window_parameters_are_refused_by_name(prepare: Prepare, reference: Run) -> None:
    other = px.evaluate(BigramSession(), prepare(stride=8))
    with pytest.raises(FingerprintMismatchError, match=r"protocol\.stride \(16 and 8\)") as caught:
        px.compare(reference, other)
    assert "the text" not in str(caught.value)
    assert "the tokenizer" not in str(caught.value)


def test_another_text_is_refused_by_name(prepare: Prepare, reference: Run) -> None:
    other = px.evaluate(BigramSession(), prepare(TEXT + "More."))
    with pytest.raises(FingerprintMismatchError, match="differ in the text") as caught:
        px.compare(reference, other)
    assert "stride" not in str(caught.value)


def test_another_tokenizer_is_refused_by_name(reference: Run) -> None:
    other = replace(reference, tokenizer_fingerprint="f" * 64, input_fingerprint="0" * 64)
    with pytest.raises(FingerprintMismatchError, match=r"the tokenizer \(.*ffff"):
        px.compare(reference, other)


def test_one_fingerprint_with_other_tokens_is_a_damaged_run(reference: Run) -> None:
    ids = reference.tokens.token_id.copy()
    ids[3] += 1
    damaged = replace(reference, loaded_tokens=reference.tokens.with_columns(token_id=ids))
    with pytest.raises(RunError, match="token_id"):
        px.compare(reference, damaged)


@pytest.mark.trap(23)
def test_trap_23_tokens_without_a_finite_loss_are_counted_not_dropped(reference: Run) -> None:
    nll = reference.tokens.nll.copy()
    nll[[2, 9]] = [np.nan, np.inf]
    candidate = replace(reference, loaded_tokens=reference.tokens.with_columns(nll=nll))
    comparison = px.compare(reference, candidate)
    assert comparison.num_unpaired == 2
    assert comparison.num_tokens == len(nll) - 2
    assert "2 tokens" in str(comparison)
    nothing = replace(reference, loaded_tokens=reference.tokens.with_columns(nll=nll * np.nan))
    with pytest.raises(EmptyScoreError):
        px.compare(reference, nothing)


def test_a_single_window_has_no_interval_and_claims_nothing(prepare: Prepare) -> None:
    tokens = prepare("One window.", max_length=64, stride=32)
    run = px.evaluate(BigramSession(), tokens)
    comparison = px.compare(run, px.evaluate(ShiftedSession(0.5), tokens))
    assert comparison.verdict == "inconclusive"
    assert comparison.ppl_ratio_low is None
    assert "1 window, and at least 4" in comparison.reasons["ppl_ratio_low"]
    assert "1 window, and at least 4" in str(comparison)


def test_domains_have_ratios_of_their_own(prepare: Prepare, tmp_path: Path) -> None:
    rows = [{"text": TEXT, "kind": "easy"}, {"text": "Another text here. " * 40, "kind": "hard"}]
    corpus = tmp_path / "rows.jsonl"
    corpus.write_text("\n".join(json.dumps(row) for row in rows))
    tokens = prepare(corpus, domain_key="kind")
    run = px.evaluate(BigramSession(), tokens)
    hard = run.tokens.domain == run.tokens.domains.index("hard")
    nll = run.tokens.nll + np.where(hard, 0.1, 0.0).astype(np.float32)
    comparison = px.compare(run, replace(run, loaded_tokens=run.tokens.with_columns(nll=nll)))
    ratios = {row.domain: row.ppl_ratio for row in comparison.domains}
    assert ratios == pytest.approx({"easy": 1.0, "hard": math.exp(0.1)}, rel=1e-5)
    assert sum(row.num_tokens for row in comparison.domains) == comparison.num_tokens


def test_folders_are_opened_and_the_record_is_plain_json(tokens: TokenFile, tmp_path: Path) -> None:
    px.evaluate(BigramSession(), tokens, run=tmp_path / "a")
    px.evaluate(ShiftedSession(0.01), tokens, run=tmp_path / "b")
    comparison = px.compare(str(tmp_path / "a"), tmp_path / "b")
    record = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert record["verdict"] == "worse"
    assert record["candidate"]["folder"] == str(tmp_path / "b")
    assert record["most_changed"][0]["delta"] == pytest.approx(0.01, abs=1e-5)
    for word in ("worse", "ratio", "95 %", "clusters", "toy:bigram"):
        assert word in str(comparison)
