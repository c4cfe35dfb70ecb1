"""functional/: the in-place arithmetic against a float64 log-softmax."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perplexit.functional.nll import HeadRequest, head_statistics, rows_within, token_statistics


def reference(logits_NV, targets_N):
    logprobs_NV = logits_NV.double().log_softmax(-1)
    nll_N = -logprobs_NV.gather(1, targets_N[:, None])[:, 0]
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).nan_to_num(0.0).sum(-1)
    rank_N = 1 + (logits_NV > logits_NV.gather(1, targets_N[:, None])).sum(-1)
    return nll_N, entropy_N, rank_N


def random_logits(num_rows, vocab_size, scale=4.0, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * scale + offset
    targets = torch.randint(vocab_size, (num_rows,), generator=generator)
    return logits, targets


@pytest.mark.trap(11)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, -100.0])
@pytest.mark.parametrize("vocab_size", [7, 320, 50_257, 256_000])
def test_nll_is_within_1e5_of_float64_whatever_the_logits_dtype(dtype, offset, vocab_size):
    """Trap 11: the log-softmax of bfloat16 logits runs in float32 and adds up accurately."""
    logits, targets = random_logits(12, vocab_size, offset=offset)
    logits = logits.to(dtype)
    nll, entropy, rank = reference(logits, targets)
    result = token_statistics(logits, targets)
    assert result.nll_N.dtype == torch.float32
    assert (result.nll_N - nll).abs().max() < 1e-5
    assert (result.entropy_N - entropy).abs().max() < 2e-5
    assert torch.equal(result.rank_N.long(), rank)


@pytest.mark.trap(11)
def test_sum_over_a_2048_token_window_of_bfloat16_logits_is_not_nats_off():
    """Trap 11: the mean over a window, against float64."""
    logits, targets = random_logits(2048, 1000)
    logits = logits.bfloat16()
    total = token_statistics(logits, targets, with_details=False).nll_N.double().sum()
    assert abs(total - reference(logits, targets)[0].sum()) < 2048 * 1e-6


@settings(max_examples=50, deadline=None)
@given(
    num_rows=st.integers(0, 9),
    vocab_size=st.integers(1, 40),
    chunk_rows=st.integers(1, 10),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_chunked_hidden_states_give_what_whole_logits_give(
    num_rows, vocab_size, chunk_rows, scale, seed
):
    hidden, _ = random_logits(num_rows, 5, seed=seed)
    weights, _ = random_logits(vocab_size, 5, scale, seed=seed + 1)
    targets = torch.randint(vocab_size, (num_rows,))
    whole = reference(hidden @ weights.t(), targets)
    chunked = head_statistics(lambda h: h @ weights.t())(
        hidden, targets, HeadRequest(chunk_rows, with_details=True)
    )
    assert chunked.nll_N.shape == (num_rows,)
    torch.testing.assert_close(chunked.nll_N.double(), whole[0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(chunked.entropy_N.double(), whole[1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("vocab_size", [3, 49_152])
def test_details_do_not_change_a_bit_of_the_nll(vocab_size):
    logits, targets = random_logits(30, vocab_size)
    plain = token_statistics(logits, targets, with_details=False)
    detailed = token_statistics(logits, targets, with_details=True, top_k=3)
    assert torch.equal(plain.nll_N, detailed.nll_N)
    assert plain.entropy_N is None
    assert plain.rank_N is None


def test_the_logits_are_left_as_they_were():
    logits, targets = random_logits(4, 11)
    before = logits.clone()
    token_statistics(logits, targets)
    assert torch.equal(before, logits)


@pytest.mark.trap(22)
def test_probabilities_over_the_whole_vocabulary_sum_to_one():
    """Trap 22: no token's logit is masked, whichever is the target."""
    logits, _ = random_logits(1, 50)
    nll = token_statistics(logits.expand(50, 50), torch.arange(50)).nll_N
    assert float((-nll.double()).exp().sum()) == pytest.approx(1.0, abs=1e-6)


def test_uniform_logits_have_nll_and_entropy_log_v_and_rank_one():
    result = token_statistics(torch.zeros(3, 1000), torch.tensor([0, 5, 999]))
    assert result.nll_N.tolist() == pytest.approx([math.log(1000)] * 3, abs=1e-6)
    assert result.entropy_N.tolist() == pytest.approx([math.log(1000)] * 3, abs=1e-5)
    assert result.rank_N.tolist() == [1, 1, 1]


def test_alternatives_are_the_most_likely_tokens_with_their_logprobs():
    logits, targets = random_logits(6, 40)
    result = token_statistics(logits, targets, top_k=4)
    expected = logits.double().log_softmax(-1).topk(4)
    assert torch.equal(result.top_ids_NK.long(), expected.indices)
    torch.testing.assert_close(result.top_logprobs_NK.double(), expected.values, atol=1e-5, rtol=0)


def test_more_alternatives_than_tokens_give_the_whole_vocabulary():
    logits, targets = random_logits(2, 5)
    assert token_statistics(logits, targets, top_k=9).top_ids_NK.shape == (2, 5)


@pytest.mark.trap(23)
def test_non_finite_logits_are_not_hidden():
    """Trap 23: a NaN logit gives a NaN loss, a target at -inf an infinite one."""
    logits = torch.tensor([[0.0, float("nan"), 1.0], [0.0, float("-inf"), 0.0]])
    result = token_statistics(logits, torch.tensor([0, 1]))
    assert math.isnan(result.nll_N[0])
    assert result.nll_N[1] == math.inf
    assert float(result.entropy_N[1]) == pytest.approx(math.log(2), abs=1e-6)


def test_rows_within_keeps_to_the_budget_and_never_gives_none():
    assert rows_within(64 * 2**20, 256_000) * 256_000 * 4 <= 64 * 2**20
    assert rows_within(10, 256_000) == 1
