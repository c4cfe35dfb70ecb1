"""Divergences against SciPy, and where they have bitten other tools."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, rel_entr

from perplexit.functional.divergence import token_divergences


def random_logits(seed: int, rows: int = 40, vocab: int = 300, scale: float = 4.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (rows, vocab)).astype(np.float32)


@pytest.mark.trap(15)
@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0, 40.0])
def test_trap_15_direction_base_and_sign_are_scipys(scale: float) -> None:
    a, b = random_logits(1, scale=scale), random_logits(2, scale=scale)
    p, q = (np.exp(log_softmax(x.astype(np.float64), axis=1)) for x in (a, b))
    targets = torch.arange(40)
    found = token_divergences(torch.from_numpy(a), torch.from_numpy(b), targets)
    np.testing.assert_allclose(found.kl_N, rel_entr(p, q).sum(1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.reverse_kl_N, rel_entr(q, p).sum(1), rtol=1e-9, atol=1e-12)
    js = [jensenshannon(x, y) ** 2 for x, y in zip(p, q, strict=True)]
    np.testing.assert_allclose(found.js_N, js, rtol=1e-7, atol=1e-12)
    rows = np.arange(40)
    np.testing.assert_allclose(found.delta_p_N, q[rows, rows] - p[rows, rows], atol=1e-7)
    np.testing.assert_array_equal(found.same_top1_N, p.argmax(1) == q.argmax(1))
    np.testing.assert_allclose(found.reference_top_p_N, p.max(1), rtol=1e-6)
    top = [set(np.argsort(-x)[:10]) for x in p], [set(np.argsort(-x)[:10]) for x in q]
    shared = [len(x & y) / 10 for x, y in zip(*top, strict=True)]
    np.testing.assert_allclose(found.top_k_agreement_N, shared, rtol=1e-6)


@pytest.mark.trap(17)
def test_trap_17_equal_bfloat16_logits_at_a_large_vocabulary_give_zero() -> None:
    logits = torch.from_numpy(random_logits(3, rows=4, vocab=250_000)).bfloat16()
    found = token_divergences(logits, logits.clone(), torch.zeros(4, dtype=torch.long))
    for column in (found.kl_N, found.reverse_kl_N, found.js_N, found.delta_p_N):
        assert (column == 0).all()
    assert found.same_top1_N.all()


@pytest.mark.trap(17)
@pytest.mark.parametrize("noise", [1e-7, 1e-5, 1e-3])
def test_trap_17_a_kl_is_never_negative(noise: float) -> None:
    a = random_logits(4, vocab=5000)
    b = a + noise * random_logits(5, vocab=5000, scale=1.0)
    found = token_divergences(torch.from_numpy(a), torch.from_numpy(b), torch.zeros(40).long())
    assert (found.kl_N >= 0).all()
    assert (found.reverse_kl_N >= 0).all()


def test_impossible_tokens_cost_what_they_must() -> None:
    a = torch.tensor([[0.0, 0.0, -float("inf")]])
    b = torch.tensor([[0.0, -float("inf"), 0.0]])
    found = token_divergences(a, b, torch.zeros(1).long(), top_k=2)
    assert found.kl_N.item() == float("inf")
    same = token_divergences(a, a, torch.zeros(1).long(), top_k=2)
    assert same.kl_N.item() == pytest.approx(0.0)
