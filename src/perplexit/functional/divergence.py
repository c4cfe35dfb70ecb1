"""Two distributions a token in, their divergences out.

Shape suffixes: N = targets, V = vocabulary, K = how many top tokens are compared.

The naive equivalent, with p the reference and q the candidate:

    kl_N         = (p_NV * (log p_NV - log q_NV)).sum(-1)          KL(reference ‖ candidate), nats
    reverse_kl_N = (q_NV * (log q_NV - log p_NV)).sum(-1)          KL(candidate ‖ reference), nats
    js_N         = (KL(p ‖ m) + KL(q ‖ m)) / 2,  m = (p + q) / 2   Jensen–Shannon, nats, ≤ ln 2
    delta_p_N    = q(target) - p(target)

Sources: Kullback & Leibler 1951; Lin 1991 (Jensen–Shannon); Δp as llama.cpp's perplexity tool.
"""

import math

import torch
from torch import Tensor

from perplexit.functional.nll import TokenStatistics, slices_of_rows

_BLOCK_ELEMENTS = 1 << 18  # 2 MiB of float64


def token_divergences(
    reference_NV: Tensor, candidate_NV: Tensor, targets_N: Tensor, *, top_k: int = 10
) -> TokenStatistics:
    """Return the divergence columns of two sets of logits for the same targets.

    `kl`, `reverse_kl` and `js` are float64 in nats, never negative, from float32 logits.
    top_k: how many of the most likely tokens `top_k_agreement` looks at.

    Each term of a KL sum is taken as p·(e^d - 1 - d) with d = log q - log p, which is the same sum
    (both distributions add up to 1), has no negative term, and is exactly 0 for equal logits.
    """
    parts = [
        _block_divergences(
            reference_NV[rows].double(), candidate_NV[rows].double(), targets_N[rows, None], top_k
        )
        for rows in blocks_of(reference_NV)
    ]
    return TokenStatistics.joined(parts)


def blocks_of(logits_NV: Tensor) -> list[slice]:
    """Return slices of rows, each of at most 2 MiB of float64 logits, or one row."""
    size = max(1, _BLOCK_ELEMENTS // logits_NV.shape[-1])
    return slices_of_rows(len(logits_NV), size)


def _block_divergences(
    reference_NV: Tensor, candidate_NV: Tensor, targets_N1: Tensor, top_k: int
) -> TokenStatistics:
    logp_NV = reference_NV.log_softmax(-1)
    logq_NV = candidate_NV.log_softmax(-1)
    p_NV, q_NV = logp_NV.exp(), logq_NV.exp()
    logm_NV = torch.logaddexp(logp_NV, logq_NV) - math.log(2)
    k = min(top_k, reference_NV.shape[-1])
    top_p, top_q = logp_NV.topk(k, dim=-1), logq_NV.topk(k, dim=-1)
    shared_N = (top_p.indices[:, :, None] == top_q.indices[:, None, :]).any(-1).float().mean(-1)
    delta_p_N = (q_NV.gather(1, targets_N1) - p_NV.gather(1, targets_N1))[:, 0]
    return TokenStatistics(
        {
            "kl": kl_of_logs(logp_NV, logq_NV, p_NV),
            "reverse_kl": kl_of_logs(logq_NV, logp_NV, q_NV),
            "js": (kl_of_logs(logp_NV, logm_NV, p_NV) + kl_of_logs(logq_NV, logm_NV, q_NV)) / 2,
            "same_top1": top_p.indices[:, 0] == top_q.indices[:, 0],
            "top_k_agreement": shared_N,
            "delta_p": delta_p_N.float(),
            "reference_top_p": top_p.values[:, 0].exp().float(),
        }
    )


def kl_of_logs(logp_NV: Tensor, logq_NV: Tensor, p_NV: Tensor) -> Tensor:
    """Return KL(p ‖ q) of each row from log-probabilities, with no negative term (see above).

    Where both are 0 (-inf) the term is 0.
    """
    d_NV = logq_NV - logp_NV
    # Where p is 0 the term is q, not 0 · inf; beyond d = 30, p·e^d is taken as q itself.
    near = torch.expm1(d_NV.clamp(max=30.0)).sub_(d_NV).mul_(p_NV)
    far = logq_NV.exp() - p_NV - p_NV * d_NV
    terms_NV = torch.where(d_NV > 30.0, far, near)
    terms_NV = torch.where(p_NV == 0, logq_NV.exp(), terms_NV)
    return terms_NV.sum(-1)
