"""The head in blocks of rows and vocabulary, against a float64 log-softmax of whole logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perplexit.functional import blocked_nll
from perplexit.functional.blocked_nll import blocked_statistics


def case(num_rows, vocab_size, size=24, scale=1.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, size, generator=generator).to(dtype)
    weight = (scale * torch.randn(vocab_size, size, generator=generator)).to(dtype)
    targets = torch.randint(vocab_size, (num_rows,), generator=generator)
    return hidden, weight, targets


def reference(logits_NV, targets_N):
    """float64 nll and entropy, and the rank, of logits as they are."""
    logprobs = logits_NV.double().log_softmax(-1)
    nll = -logprobs.gather(1, targets_N[:, None])[:, 0]
    entropy = -torch.where(logprobs == -math.inf, 0.0, logprobs.exp() * logprobs).sum(-1)
    rank = 1 + (logits_NV > logits_NV.gather(1, targets_N[:, None])).sum(-1)
    return nll, entropy, rank


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(0, 40),
    vocab_size=st.integers(1, 90),
    block_rows=st.integers(1, 20),
    block=st.tuples(st.integers(1, 20), st.integers(1, 30)),
    scale=st.sampled_from([0.0, 1.0, 20.0]),
    biased=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_blocks_of_any_size_give_what_whole_logits_give(
    num_rows, vocab_size, block_rows, block, scale, biased, seed
):
    hidden, weight, targets = case(num_rows, vocab_size, 5, scale, seed=seed)
    bias = torch.randn(vocab_size) if biased else None
    logits = hidden.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    nll, entropy, _ = reference(logits, targets)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blocked_nll, "_BLOCK", block)
        got = blocked_statistics(
            hidden, targets, weight, bias, with_details=True, block_rows=block_rows
        )
    assert got.nll_N.shape == got.rank_N.shape == (num_rows,)
    assert got.nll_N.dtype == torch.float32
    assert got.rank_N.dtype == torch.int32
    torch.testing.assert_close(got.nll_N.double(), nll, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(got.entropy_N.double(), entropy, atol=1e-4, rtol=1e-5)


@pytest.mark.trap(11)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [7, 50_257])
def test_it_is_within_1e5_of_float64_whatever_the_logits_dtype(dtype, vocab_size):
    """Trap 11: of the logits that the product gives; ranks are theirs exactly."""
    hidden, weight, targets = case(70, vocab_size, dtype=dtype, scale=0.8)
    nll, entropy, rank = reference(torch.mm(hidden, weight.t()), targets)
    got = blocked_statistics(hidden, targets, weight, with_details=True)
    assert (got.nll_N - nll).abs().max() < 1e-5
    assert (got.entropy_N - entropy).abs().max() < 2e-5
    # A block's product may add up in another order than the whole one.
    assert (got.rank_N - rank).abs().max() <= (1 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("num_rows", [1, 3, 600])
def test_details_do_not_change_a_bit_of_the_nll(num_rows):
    hidden, weight, targets = case(num_rows, 5003)
    detailed = blocked_statistics(hidden, targets, weight, with_details=True)
    plain = blocked_statistics(hidden, targets, weight)
    assert torch.equal(detailed.nll_N, plain.nll_N)
    assert plain.entropy_N is None
    assert plain.rank_N is None


def test_ties_count_in_the_targets_favour():
    hidden, weight, targets = case(40, 3000)
    weight[1500:] = weight[:1500]  # every token has a twin in another block
    logits = torch.mm(hidden, weight.t())
    below = 1 + (logits > logits.gather(1, targets[:, None])).sum(-1)
    got = blocked_statistics(hidden, targets, weight, with_details=True)
    assert torch.equal(got.rank_N.long(), below)
    assert (got.rank_N % 2 == 1).all()  # what is above a token, its twin is above too


def test_a_rank_is_counted_again_where_a_block_gives_other_bits(monkeypatch):
    """As on a machine whose product of few columns adds in another order."""
    hidden, weight, targets = case(40, 3000)
    expected = blocked_statistics(hidden, targets, weight, with_details=True)
    exact = blocked_nll._Head.target_logits
    monkeypatch.setattr(blocked_nll._Head, "target_logits", lambda *args: exact(*args) * (1 - 1e-2))
    got = blocked_statistics(hidden, targets, weight, with_details=True)
    assert torch.equal(got.rank_N, expected.rank_N)


@pytest.mark.trap(23)
def test_tokens_at_minus_infinity_have_no_share_and_nan_stays_nan():
    """Trap 23: whole blocks of -inf too; a NaN in a row reaches that row alone."""
    hidden, weight, targets = case(6, 1500)
    bias = torch.zeros(1500)
    bias[:1024] = -math.inf  # the first two blocks, and the start of what is left
    targets = targets % 400 + 1100
    nll, entropy, rank = reference(hidden @ weight.t() + bias, targets)
    got = blocked_statistics(hidden, targets, weight, bias, with_details=True)
    torch.testing.assert_close(got.nll_N.double(), nll, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.entropy_N.double(), entropy, atol=1e-5, rtol=0)
    assert torch.equal(got.rank_N.long(), rank)
    impossible = blocked_statistics(hidden, torch.zeros(6, dtype=torch.int64), weight, bias)
    assert (impossible.nll_N == math.inf).all()
    hidden[2] = math.nan
    poisoned = blocked_statistics(hidden, targets, weight, bias, with_details=True)
    assert poisoned.nll_N.isnan().tolist() == [False, False, True, False, False, False]
    assert poisoned.entropy_N.isnan().tolist() == [False, False, True, False, False, False]


def test_a_float64_model_keeps_its_precision():
    hidden, weight, targets = case(9, 700, dtype=torch.float64)
    nll, entropy, rank = reference(hidden @ weight.t(), targets)
    got = blocked_statistics(hidden, targets, weight, with_details=True)
    torch.testing.assert_close(got.nll_N, nll, atol=1e-12, rtol=0)
    torch.testing.assert_close(got.entropy_N, entropy, atol=1e-12, rtol=0)
    assert torch.equal(got.rank_N.long(), rank)
